"""Ordinary nodes that learn together on machines that can be struck, and what is heard of them meanwhile."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from shoal.node.api.client import Client
from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.config import NodeConfig
from shoal.protocol.errors import ShoalError

from .ground import Ground
from .hearing import Hearing
from .netns import LabError

SHOAL: Final = (sys.executable, "-m", "shoal.cli.main")
PORT: Final = 4001
START_LIMIT_S: Final = 120.0
POLL_S: Final = 0.1
ENDLESS: Final[dict[str, Any]] = {"target_return": 1e9, "max_env_steps": 2**50}
"""A run that nobody comes to the end of."""


class Company:
    """A node on each machine of a ground, all in one swarm.

    Attributes:
        names: of the nodes, in the order of the machines.
        hearing: what they say to each other.
        listens_from: where the one is that hears it.
        swarm: the run.
    """

    def __init__(self, ground: Ground, *, joins_as: str = "auto", **settings: Any) -> None:
        """Nothing is started yet; ``settings``: of `CreateSwarm`; ``joins_as``: the role of all but the first."""
        self.ground = ground
        self._joins_as = joins_as
        self.names: list[str] = []
        self.hearing = Hearing()
        self.listens_from = ground.outside
        self.swarm = ""
        self._settings = {"task": "gym:CartPole-v1", "algorithm": "ppo", **ENDLESS, **settings}
        self._configs = [NodeConfig(home=ground.folder, profile=f"m{n}") for n in range(len(ground.machines))]
        self._processes: dict[int, subprocess.Popen[Any]] = {}
        self._observer: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    # Their life.

    def start(self, epochs: int = 4) -> None:
        """Start them all, let them learn so many epochs together, and only then limit the machines.

        Raises:
            LabError: if they do not come so far.
        """
        self.gather()
        self.wait_epochs(epochs)
        self.ground.limit()

    def gather(self) -> None:
        """Start them all, and let them be in one swarm.

        Raises:
            LabError: if one of them does not come.
        """
        for number in range(len(self._configs)):
            self.up(number)
        with ThreadPoolExecutor() as pool:
            self.names = list(pool.map(self._wait_ready, range(len(self._configs))))
        with self.client(0) as client:
            count = len(self._configs)
            created = client.create_swarm(CreateSwarm(**{"min_learners": count, **self._settings}))
        self.swarm = str(created.swarm)
        self._observe()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda number: self._join(number, created.ticket), range(1, count)))

    def up(self, number: int) -> None:
        """Start a node, as a machine's service manager does: one process, which runs until it is killed."""
        machine = self.ground.machines[number]
        bootstrap = [self.address(other) for other in range(len(self.names)) if other != number]
        words = ["up", "--profile", f"m{number}", "--no-mdns", "--no-port-mapping", "--relay", "off"]
        words += ["--listen", f"/ip4/{machine.address}/tcp/{PORT}"]
        words += [word for address in bootstrap for word in ("--bootstrap", address)]
        before = self._processes.pop(number, None)
        if before is not None:
            before.wait()
        with (self.ground.folder / f"m{number}.log").open("ab") as log:
            self._processes[number] = machine.popen(
                *("env", f"SHOAL_HOME={self.ground.folder}", *SHOAL, *words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_ready(self, number: int) -> str:
        ends = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(ShoalError), self.client(number) as client:
                return str(client.node().peer_id)
            if time.monotonic() > ends:
                raise LabError(f"node {number} is not there after {START_LIMIT_S:.0f} s\n{self.log(number)}")
            time.sleep(POLL_S)

    def _join(self, number: int, ticket: str) -> None:
        with self.client(number) as client:
            client.join_swarm(JoinSwarm(ticket=ticket, role=self._joins_as))

    def wait_epochs(self, more: int, limit_s: float = START_LIMIT_S) -> None:
        """Until each of those that nothing is wrong with has come so many epochs further.

        Raises:
            LabError: if they do not.
        """
        wanted = max((member.epoch for member in self.hearing.members.values()), default=0) + more

        def are_there() -> bool:
            well = self.well()
            return all(name in self.hearing.members and self.hearing.members[name].epoch >= wanted for name in well)

        if not self.hearing.wait(are_there, limit_s):
            told = {name[-6:]: self.hearing.place(name) for name in self.names}
            raise LabError(f"no {more} epochs in {limit_s:.0f} s; {told}\n{self.log(0)}")

    def well(self) -> list[str]:
        """Those that nothing is wrong with."""
        return [name for number, name in enumerate(self.names) if number not in self.ground.struck]

    def client(self, number: int) -> Client:
        """A node's local API; use it in a ``with`` block."""
        return Client(self._configs[number].paths, f"m{number}")

    def address(self, number: int) -> str:
        """Where a node is reached."""
        return f"/ip4/{self.ground.machines[number].address}/tcp/{PORT}/p2p/{self.names[number]}"

    def log(self, number: int, num_lines: int = 30) -> str:
        """The end of a node's log."""
        path = self.ground.folder / f"m{number}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-num_lines:])

    def end(self) -> None:
        """Kill them all."""
        if self._observer is not None and self._listener is not None:
            self._observer.kill()
            self._listener.join()
            self._observer.communicate()
        self.ground.kill_all()
        for process in self._processes.values():
            process.wait()

    # What is heard.

    def _observe(self) -> None:
        program = str(Path(__file__).with_name("observer.py"))
        addresses = [self.address(number) for number in range(len(self.names))]
        with (self.ground.folder / "observer.log").open("wb") as log:
            self._observer = self.listens_from.popen(
                *(sys.executable, program, self.swarm, *addresses),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._listener = threading.Thread(target=self._hear, args=(self._observer,), daemon=True)
        self._listener.start()

    def _hear(self, observer: subprocess.Popen[str]) -> None:
        assert observer.stdout is not None
        for line in observer.stdout:
            self.take(json.loads(line))

    def take(self, line: dict[str, Any]) -> None:
        """This was heard."""
        self.hearing.take(line)


@contextlib.contextmanager
def company(count: int, cores: float, **settings: Any) -> Iterator[Company]:
    """So many nodes that learn together; gone when the context ends."""
    with Ground(count, cores) as ground:
        nodes = Company(ground, **settings)
        try:
            nodes.start()
            yield nodes
        finally:
            nodes.end()
