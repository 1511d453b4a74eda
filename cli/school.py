"""Nodes on this machine for as long as a command lasts: each a process of its own, under a folder of the command's own.

The command knows of them only what their local APIs say, as any user's program would. However it ends, Ctrl-C and
SIGTERM among that, they end with it, and so do their workers.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from shoal.cli import render
from shoal.cli.spawn import BackgroundNode, kill_tree, wait_gone
from shoal.node.api.client import Client
from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.api.schemas import CreatedSwarm, SwarmDetail
from shoal.node.config import NodeConfig
from shoal.node.identity import create_known_identity
from shoal.protocol.errors import RefusedError, ShoalError
from shoal.training.keeper import descendants

MAX_PEERS: Final = 32
STOP_TIMEOUT_S: Final = 5.0


@dataclass(slots=True)
class Pupil:
    """One node."""

    node: BackgroundNode
    peer_id: str = ""
    is_alive: bool = True

    @property
    def name(self) -> str:
        """Its profile's."""
        return self.node.config.profile

    def connect(self) -> Client:
        """Its local API; use it in a ``with`` block."""
        return Client(self.node.config.paths, self.node.config.profile)

    def kill(self) -> None:
        """SIGKILL, its worker too."""
        self.node.kill()
        self.is_alive = False


@dataclass(slots=True)
class School:
    """The nodes, from their start to their end.

    Attributes:
        say: tells people a line.
        stack: ends them.
        timeout_s: for whatever they are followed in.
        pupils: in the order in which they were started.
    """

    say: Callable[[str], None]
    stack: ExitStack
    timeout_s: float
    pupils: list[Pupil] = field(default_factory=list)
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.timeout_s

    def start(self, configs: list[NodeConfig]) -> None:
        """Start all nodes at once, and wait until they are ready; they are stopped at the end, whatever happens."""
        self.stack.callback(self._stop_all)
        for config in configs:
            self.pupils.append(Pupil(BackgroundNode(config)))
        for pupil in self.pupils:
            ready = pupil.node.wait_ready()
            pupil.peer_id = ready["peer_id"]
            self.say(f"{pupil.name}  {pupil.peer_id}  pid {ready['pid']}")

    def begin(self, request: CreateSwarm, parts: Sequence[str] = ("",)) -> CreatedSwarm:
        """The first creates a swarm, the others join it; each is the next of the parts, and then they begin again."""
        with self.pupils[0].connect() as client:
            created = client.create_swarm(request.model_copy(update={"part": parts[0]}) if parts[0] else request)
        for number, pupil in enumerate(self.pupils[1:], 1):
            with pupil.connect() as client:
                client.join_swarm(JoinSwarm(ticket=created.ticket, part=parts[number % len(parts)]))
        self.say(f"{self.pupils[0].name} began swarm {created.swarm}; the others joined by its ticket\n")
        return created

    def follow(self, pupil: Pupil, swarm: str, is_over: Callable[[SwarmDetail], bool] = lambda _: False) -> SwarmDetail:
        """Watch a run through one node until it has ended there, or ``is_over``.

        Raises:
            ShoalError: if that takes too long.
        """
        with pupil.connect() as client:
            for detail in client.watch_swarm(swarm):
                if is_over(detail) or detail.phase in render.ENDED:
                    return detail
                if time.monotonic() > self.deadline:
                    raise ShoalError(
                        f"not done in {self.timeout_s:.0f} s (epoch {detail.epoch}, {detail.phase}, return "
                        f"{render.number(detail.mean_return)}); raise --timeout, or look into the logs with --keep"
                    )
        raise AssertionError("watching ends with the run or with an error")

    def _stop_all(self) -> None:
        living = [pupil for pupil in self.pupils if pupil.node.process.poll() is None]
        workers = [worker for pupil in living for worker in descendants(pupil.node.process.pid)]
        for pupil in living:
            pupil.node.process.terminate()
        stop_at = time.monotonic() + STOP_TIMEOUT_S
        for pupil in living:
            try:
                pupil.node.process.wait(max(0.0, stop_at - time.monotonic()))
            except Exception:  # too slow, or interrupted once more: it must not be left behind
                pupil.node.kill()
        for worker in workers:
            if not wait_gone(worker, max(0.0, stop_at - time.monotonic())):
                kill_tree(worker)


@contextmanager
def school(
    command: str,
    peers: int,
    say: Callable[[str], None],
    timeout_s: float,
    *,
    keep: bool,
    profile: str = "peer",
    seed: int | None = None,
) -> Iterator[School]:
    """So many nodes that are up.

    Args:
        command: in whose folder they live.
        peers: how many.
        say: tells people a line.
        timeout_s: for whatever they are followed in.
        keep: the folder stays.
        profile: what their names begin with.
        seed: from which their identities come, the same again each time; none: new ones.

    Raises:
        RefusedError: if they could not learn here.
    """
    if importlib.util.find_spec("torch") is None:
        raise RefusedError("learning needs the train extra: pip install 'shoal[train]'")
    home = Path(tempfile.mkdtemp(prefix=f"shoal-{command}-"))
    configs = [
        NodeConfig(home=home, profile=f"{profile}{index + 1}", listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
        for index in range(peers)
    ]
    with ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        if keep:
            say(f"the nodes' folders stay in {home}")
        else:
            stack.callback(shutil.rmtree, home, ignore_errors=True)
        for config in configs if seed is not None else ():
            create_known_identity(config.paths.identity, f"{command}/{seed}/{config.profile}")
        found = School(say, stack, timeout_s)
        found.start(configs)
        yield found


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, so that it cleans up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
