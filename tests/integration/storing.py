"""Nodes that are processes of their own and only store: they start in a second, and are ended as a power cut would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.node.api.client import Client
from shoal.node.api.schemas import SwarmDetail
from shoal.node.config import NodeConfig
from shoal.node.store.database import Storage, StoredSwarm
from shoal.protocol.errors import NoDaemonError
from shoal.protocol.signing import Signer
from shoal.training.manifest import Manifest, sign_manifest

OWNER = Signer(b"o" * 32)
RUN, MANIFEST = sign_manifest(Manifest(owner=OWNER.peer_id, task="gym:CartPole-v1", algorithm="ppo"), OWNER)
PATIENCE_S = 40.0

_CHILD = """
import json, sys, time
from pathlib import Path
from shoal.node.config import NodeConfig
from shoal.node.daemon import run
from shoal.node.logs import set_up_logging
from shoal.node.reach.settings import ReachConfig

home, profile, relay, bootstrap, clock_offset_s = json.loads(sys.argv[1])
config = NodeConfig(
    home=Path(home), profile=profile, listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, bootstrap=tuple(bootstrap),
    reach=ReachConfig(port_mapping=False, relay=relay), wall_clock=lambda: time.time() + clock_offset_s,
)
set_up_logging(config.paths.log, foreground=False)
run(config, on_ready=lambda info: print(info.model_dump_json(), flush=True))
"""


class StoringNode:
    """One, in the swarm `RUN` unless it is a relay; it knows nobody at first."""

    def __init__(self, home: Path, profile: str, *, is_relay: bool = False) -> None:
        self.config = NodeConfig(home=home, profile=profile, mdns=False)
        self.config.paths.create()
        self.is_relay = is_relay
        self.peer_id = ""
        self.addresses: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        if not is_relay:
            with Storage(self.config.paths.database) as storage:
                storage.add_swarm(StoredSwarm(swarm=RUN, manifest=MANIFEST, role="storage", joined_at=1.0))

    @property
    def port(self) -> int:
        return int(self.addresses[0].split("/")[4])

    def up(self, *, bootstrap: list[str] | None = None, clock_offset_s: float = 0.0) -> StoringNode:
        """Start it; returns when it is ready."""
        relay = "on" if self.is_relay else "off"
        words = [str(self.config.home), self.config.profile, relay, bootstrap or [], clock_offset_s]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "default"},
        )
        assert self._process.stdout is not None
        info = json.loads(self._process.stdout.readline() or "{}")
        assert info, self.log()
        self.peer_id, self.addresses = info["peer_id"], info["addresses"]
        return self

    def kill(self) -> None:
        """It is gone at once, as in a power cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def shown(self) -> SwarmDetail:
        with Client(self.config.paths, self.config.profile) as client:
            return client.swarm(RUN)

    def live(self) -> set[str]:
        """Whom it takes for live, itself included; nobody while its API does not answer."""
        try:
            return {member.peer_id for member in self.shown().members if member.live}
        except NoDaemonError:
            return set()

    def kept(self) -> tuple[str, ...]:
        """Where members are, by what is on disk."""
        with Storage(self.config.paths.database) as storage:
            return storage.list_swarms()[0].addresses

    def relays(self) -> bytes:
        """The relays that it knew, by what is on disk."""
        with Storage(self.config.paths.database) as storage:
            return storage.get_fact("relays") or b""

    def log(self) -> str:
        path = self.config.paths.log
        return path.read_text(encoding="utf-8") if path.exists() else ""


def until(holds: Callable[[], object], *nodes: StoringNode) -> float:
    """Ask until it is so; how long that took, in seconds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < PATIENCE_S, "\n\n".join(node.log()[-3000:] for node in nodes)
        time.sleep(0.05)
    return time.monotonic() - began


def until_together(*nodes: StoringNode) -> float:
    """Until each takes each for live."""
    names = {node.peer_id for node in nodes}
    return until(lambda: all(names <= node.live() for node in nodes), *nodes)


@contextmanager
def storing_nodes(home: Path, number: int) -> Iterator[list[StoringNode]]:
    """So many, which are not up yet; they end with the block."""
    nodes = [StoringNode(home, f"node{each}") for each in range(number)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.kill()
