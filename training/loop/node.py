"""What a training loop asks the node of its user: which swarms it is in, and where a loop attaches to one of them.

Over the Unix socket of the local API (``docs/api.md``), which none but the same user can open. It knows no more of the
node than that page says, as the node is above everything in training/.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from shoal.protocol.errors import NoDaemonError, NoPeersError, RefusedError, ShoalError, UsageError
from shoal.protocol.profiles import API_FILE, check_profile, default_home, profile_folder
from shoal.training.arena import Arena
from shoal.training.manifest import LOOP_ALGORITHM, LOOP_SCHEME
from shoal.training.ticket import Ticket

ANSWER_S: Final = 10.0
WORK_S: Final = 120.0
"""For joining: others are dialed, and a manifest is fetched."""
BEGIN_S: Final = 15.0
"""For a run that is being taken up to let loops in."""
LOOK_S: Final = 0.1
WELCOME: Final = b"welcome"
"""The line with which a node greets the loop that it takes; any other says why it does not."""
MAX_GREETING_BYTES: Final = 1000
OK: Final = range(200, 300)

_ERRORS: Final[dict[int, type[ShoalError]]] = {
    kind.exit_code: kind for kind in (ShoalError, UsageError, NoDaemonError, NoPeersError, RefusedError)
}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = _connected(self._path, self.timeout)


class LocalNode:
    """The node that runs under a profile of this user.

    Every method raises `NoDaemonError` if there is none, and otherwise what the node answers with.
    """

    def __init__(self, profile: str) -> None:
        self._profile = check_profile(profile)

    def swarm(self, name: str) -> dict[str, Any]:
        """A swarm by its name or the beginning of it, as ``GET /v1/swarms/{swarm}`` shows it."""
        found: dict[str, Any] = self._ask("GET", f"/v1/swarms/{quote(name, safe='')}")
        return found

    def find(self, wanted: str | None) -> str:
        """The full name of a swarm: of a ticket, which is joined, of a name, or of the only one for loops there is.

        Raises:
            UsageError: if none is meant, or more than one.
        """
        if wanted is not None:
            if wanted.strip().startswith("shoal1"):
                ticket = Ticket.parse(wanted)
                return str(self._ask("POST", "/v1/swarms/join", {"ticket": str(ticket)}, WORK_S)["swarm"])
            for each in self._loops():
                if wanted in (each["name"], each["task"].partition(":")[2]):
                    return str(each["swarm"])
            return str(self.swarm(wanted)["swarm"])
        loops = self._loops()
        if len(loops) != 1:
            number = f"{len(loops)} swarms" if loops else "no swarm"
            raise UsageError(
                f"this node is in {number} for training loops; name one by its ticket, or start one: "
                "Averager(model, create='NAME')"
            )
        return str(loops[0]["swarm"])

    def find_or_create(self, name: str, settings: dict[str, Any], shapes: dict[str, Any]) -> str:
        """The node's swarm of this name for training loops; a new one, if it is in none.

        Raises:
            UsageError: if there is one, with other settings.
        """
        for each in self._loops():
            if each["task"] == f"{LOOP_SCHEME}:{name}" and each["phase"] != "done":
                detail = self.swarm(each["swarm"])
                for key, value in settings.items():
                    if key in detail and detail[key] != value:
                        raise UsageError(
                            f"the swarm {name!r} that this node is in has {key.replace('_', ' ')} {detail[key]}, not "
                            f"{value}; take that, or start another under another name"
                        )
                return str(each["swarm"])
        body = {"task": f"{LOOP_SCHEME}:{name}", "algorithm": LOOP_ALGORITHM, "role": "learner", **settings}
        return str(self._ask("POST", "/v1/swarms", body | {"hyperparameters": shapes}, WORK_S)["swarm"])

    def attach(self, swarm: str) -> tuple[socket.socket, Arena]:
        """A connection on which the node will drive the loop that asks for it, and the memory that both share.

        Raises:
            UsageError: if this swarm, or this node in it, takes no loops.
            RefusedError: if another loop is attached.
        """
        ends = time.monotonic() + BEGIN_S
        while True:
            detail = self.swarm(swarm)
            path = detail.get("loop_socket")
            if path is not None:
                break
            _require_loops(detail)
            if time.monotonic() >= ends:
                raise ShoalError(f"the node does not let loops into {swarm}: {detail.get('error') or 'see its log'}")
            time.sleep(LOOK_S)
        if detail["phase"] == "done":
            raise UsageError(f"the run {swarm} is over; its results are in {detail.get('results')}; start another")
        try:
            connection = _connected(path, ANSWER_S)
            try:
                arena = _welcomed(connection)
                connection.settimeout(None)
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise self._no_daemon() from error
        return connection, arena

    def _loops(self) -> list[dict[str, Any]]:
        return [each for each in self._ask("GET", "/v1/swarms") if each["algorithm"] == LOOP_ALGORITHM]

    def _ask(self, method: str, target: str, body: dict[str, Any] | None = None, timeout_s: float = ANSWER_S) -> Any:
        folder = profile_folder(default_home(), self._profile)
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            connection = _UnixConnection(_socket_in(folder / API_FILE), timeout_s)
            try:
                connection.request(method, target, content, headers)
                answer = connection.getresponse()
                said = json.loads(answer.read())
            finally:
                connection.close()
        except TimeoutError as error:
            raise ShoalError(f"the node did not answer in {timeout_s:.0f} s; see its log") from error
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise self._no_daemon() from error
        if answer.status not in OK:
            error_said = said.get("error", {}) if isinstance(said, dict) else {}
            kind = _ERRORS.get(error_said.get("code", 1), ShoalError)
            raise kind(error_said.get("message", f"the node answered {target} with HTTP {answer.status}"))
        return said

    def _no_daemon(self) -> NoDaemonError:
        flag = "" if self._profile == "default" else f" --profile {self._profile}"
        return NoDaemonError(f"no node is running under profile {self._profile!r}; start one with `shoal up{flag}`")


def _require_loops(detail: dict[str, Any]) -> None:
    if detail["algorithm"] != LOOP_ALGORITHM:
        raise UsageError(
            f"the swarm {detail['swarm']} learns {detail['task']} by itself, with no training loop of yours; an "
            f"Averager needs one whose task is {LOOP_SCHEME}:NAME"
        )
    if detail["role"] != "learner":
        raise UsageError(
            f"this node only stores what {detail['swarm']} makes; to train in it: `shoal leave`, then `shoal join` "
            "with --role learner"
        )
    if detail["phase"] == "failed":
        raise ShoalError(f"the run {detail['swarm']} has failed on this node: {detail.get('error')}")


def _welcomed(connection: socket.socket) -> Arena:
    """The memory that comes with the line of welcome, which is read byte by byte: what follows is another's to read."""
    line, descriptors, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    while (byte := connection.recv(1)) and byte != b"\n" and len(line) < MAX_GREETING_BYTES:
        line += byte
    if line != WELCOME or not descriptors:
        for each in descriptors:
            os.close(each)
        raise RefusedError(line.decode(errors="replace") or "the node refuses this loop; its log says why")
    return Arena(descriptors[0])


def _socket_in(path: Path) -> str:
    return str(json.loads(path.read_bytes())["socket"])


def _connected(path: str, timeout_s: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
