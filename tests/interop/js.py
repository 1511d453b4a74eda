"""A js-libp2p node as a test sees it: `peer.mjs` in a process of its own, asked one thing after the other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parents[1] / "build"
OLDEST_NODE: Final = 20
INSTALL_S: Final = 300.0
ANSWER_S: Final = 40.0
MAX_LINE_BYTES: Final = 1024 * 1024
NO_NETWORK: Final = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")


class JsError(Exception):
    """What a command of the node failed with."""


def install() -> Path:
    """The folder of a js-libp2p as in the lock file; once installed, it stays until the lock file changes."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("js-libp2p needs Node.js and npm")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"js-libp2p needs Node.js {OLDEST_NODE}, here is {version}")
    lock = (HERE / "package-lock.json").read_bytes()
    folder = BUILD / f"interop-js-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode and any(sign in done.stderr for sign in NO_NETWORK):
            pytest.skip("npm reaches no registry to install js-libp2p from")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "installed").touch()
    for name in ("peer.mjs", "polyfill.mjs"):
        shutil.copy(HERE / name, folder)
    return folder


class Js:
    """One running node."""

    def __init__(self, process: trio.Process) -> None:
        self.peer_id = ""
        self.addresses: list[str] = []
        self._process = process
        self._num_asked = 0
        self._read = bytearray()

    async def ask(self, do: str, **given: Any) -> Any:
        """Let the node do something; gives its answer.

        Raises:
            JsError: if the node could not do it.
        """
        assert self._process.stdin is not None
        self._num_asked += 1
        question = {"id": self._num_asked, "do": do, **given}
        with trio.fail_after(ANSWER_S):
            await self._process.stdin.send_all(json.dumps(question).encode() + b"\n")
            answer = json.loads(await self._read_line())
        assert answer["id"] == self._num_asked
        if "error" in answer:
            raise JsError(f"{do}: {answer['error']}\n{answer['stack']}")
        return answer["ok"]

    async def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._read:
            data = await self._process.stdout.receive_some()
            assert data, "the js-libp2p node ended; standard error says why"
            self._read += data
            assert len(self._read) <= MAX_LINE_BYTES
        line, _, self._read = self._read.partition(b"\n")
        return bytes(line)


@asynccontextmanager
async def js_node(
    folder: Path, *, listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",), relay: bool = False
) -> AsyncIterator[Js]:
    """A node that listens at these multiaddrs, at ``…/p2p-circuit`` by a reservation, and relays if asked to."""
    command = ["node", "--import", "./polyfill.mjs", "peer.mjs"]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, env=os.environ | {"NO_COLOR": "1"}
    )
    node = Js(process)
    try:
        started = await node.ask("start", listen=list(listen), relay=relay)
        node.peer_id, node.addresses = started["peer_id"], started["addresses"]
        yield node
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.aclose()
            await process.stdout.aclose()


def js_dialer(folder: Path) -> AbstractAsyncContextManager[Js]:
    """A node that listens nowhere.

    One that listens, and dials somebody by a circuit, may be reached directly in the meantime, and loses the circuit.
    """
    return js_node(folder, listen=())
