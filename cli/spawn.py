"""Starts nodes in the background.

The child gets one end of a pipe. It writes a line of JSON when it is ready (what ``shoal up --json`` prints) or has
failed (``{"error": …}``); if it dies, the pipe closes. So its parent waits for exactly that, and polls nothing.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import Any, Final

from shoal.node.config import NodeConfig, budget_words, relay_limit_words
from shoal.node.store.files import open_own, storage_error
from shoal.protocol.errors import NoPeersError, RefusedError, ShoalError, UsageError
from shoal.training.keeper import descendants

READY_TIMEOUT_S: Final = 60.0
_ERRORS: Final[dict[int, type[ShoalError]]] = {
    kind.exit_code: kind for kind in (ShoalError, UsageError, NoPeersError, RefusedError)
}


class BackgroundNode:
    """A node that was started in a session of its own, and so outlives this terminal.

    Raises:
        ShoalError: if its log cannot be written.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        config.paths.create()
        reader, writer = os.pipe()
        command = [
            *(
                sys.executable,
                "-P",
                "-m",
                "shoal.cli.main",
                "up",
                "--profile",
                config.profile,
                "--ready-fd",
                str(writer),
            ),
            *(word for address in config.listen for word in ("--listen", address)),
            *(word for address in config.bootstrap for word in ("--bootstrap", address)),
            *("--mdns" if config.mdns else "--no-mdns", "--api-port", str(config.api_port)),
            *_reach_words(config),
            *(("--serve-bench",) if config.serve_bench else ()),
        ]
        try:
            with open(open_own(config.paths.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:  # noqa: PTH123
                self.process = subprocess.Popen(  # noqa: S603  this program, with checked settings
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writer,),
                    start_new_session=True,
                    cwd="/",
                    env=os.environ | {"SHOAL_HOME": str(config.home)},
                )
        except OSError as error:
            os.close(reader)
            raise storage_error(config.paths.log, error) from error
        finally:
            os.close(writer)
        self._reader = reader

    def wait_ready(self) -> dict[str, Any]:
        """Wait until the node is ready; gives what ``shoal up --json`` prints.

        Raises:
            ShoalError: the node's own, if it failed; one that names its log, if it died or is too slow.
        """
        try:
            answer = json.loads(self._read_line() or "null")
        except BaseException:
            self.kill()
            raise
        if answer is None:
            self.kill()
            raise ShoalError(f"the node ended before it was ready; see {self.config.paths.log}")
        if "error" in answer:
            self.process.wait()
            raise _ERRORS.get(answer["error"]["code"], ShoalError)(answer["error"]["message"])
        return dict(answer)

    def kill(self) -> None:
        """Kill the node and its workers at once."""
        if self.process.poll() is None:  # else its number may be another's by now
            kill_tree(self.process.pid)
            self.process.wait()

    def _read_line(self) -> bytes:
        line = b""
        try:
            while not line.endswith(b"\n"):
                if not select.select([self._reader], [], [], READY_TIMEOUT_S)[0]:
                    raise ShoalError(f"the node was not ready in {READY_TIMEOUT_S:.0f} s; see {self.config.paths.log}")
                chunk = os.read(self._reader, 65536)
                if not chunk:
                    return b""
                line += chunk
        finally:
            os.close(self._reader)
        return line


def _reach_words(config: NodeConfig) -> list[str]:
    reach = config.reach
    switches = {"port-mapping": reach.port_mapping, "punch": reach.punch, "webrtc": reach.webrtc}
    lists = {
        "relay-limit": relay_limit_words(reach.relay_limits),
        "announce": reach.announce,
        "stun": reach.stun_servers,
    }
    return [
        *("--relay", reach.relay, "--max-peers", str(config.max_peers)),
        *budget_words(config.budgets),
        *(f"--{name}" if is_on else f"--no-{name}" for name, is_on in switches.items()),
        *(word for name, words in lists.items() for each in words for word in (f"--{name}", each)),
    ]


def kill_tree(pid: int) -> None:
    """SIGKILL to a process of this user and to all that descend from it."""
    victims = [pid, *descendants(pid)]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended; False if it has not by then."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
