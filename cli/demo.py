"""``shoal demo``: the whole promise on one machine. Nodes train together, the first is killed, the others finish.

Each node is a process of its own with its own profile, under a folder of this demo's own, so two demos may run at
once. The demo knows of them only what their local APIs say, as any user's program would.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live

from shoal.cli import render
from shoal.cli.common import AsJson, Profile, print_json
from shoal.cli.spawn import BackgroundNode, kill_tree, wait_gone
from shoal.node.api.client import Client
from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.api.schemas import SwarmDetail
from shoal.node.config import NodeConfig
from shoal.node.store.files import make_private_folder, storage_error
from shoal.protocol.errors import RefusedError, ShoalError, UsageError
from shoal.training.keeper import descendants

MAX_PEERS: Final = 32
KILL_AT_TRAINING: Final = 0.2
KILL_AT_EVALUATION: Final = 0.5
"""One node is killed at these shares of the target return: well on the way, and not there yet."""
KILL_AT_EVALUATIONS: Final = 2
"""Or when there were so many evaluations, since a greedy policy may leap from far below to the target."""
STOP_TIMEOUT_S: Final = 5.0
RESULT_FILES: Final = ("curve.png", "policy.safetensors", "result.json")


def demo(  # the options of one command; Typer wants them as arguments
    peers: Annotated[int, typer.Option(min=1, max=MAX_PEERS, help="How many nodes.")] = 3,
    task: Annotated[str, typer.Option(help="What they learn.")] = "gym:CartPole-v1",
    algorithm: Annotated[str, typer.Option(help="How they learn it.")] = "ppo",
    kill_one: Annotated[bool, typer.Option(help="Kill the node that began, halfway.")] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Give up after so long.")] = 180.0,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("shoal-demo"),
    keep: Annotated[bool, typer.Option(help="Keep the nodes' folders.")] = False,
    profile: Profile = "peer",
    as_json: AsJson = False,
) -> None:
    """Train one policy with several nodes on this machine."""
    if kill_one and peers < 2:
        raise UsageError("--kill-one needs at least 2 peers: somebody has to finish")
    if importlib.util.find_spec("torch") is None:
        raise RefusedError("learning needs the train extra: pip install 'shoal[train]'")
    home = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    configs = [
        NodeConfig(home=home, profile=f"{profile}{index + 1}", listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
        for index in range(peers)
    ]
    request = CreateSwarm(task=task, algorithm=algorithm, min_learners=peers)
    show = _Show(Console(highlight=False, quiet=as_json))
    with ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        if keep:
            show.say(f"the nodes' folders stay in {home}")
        else:
            stack.callback(shutil.rmtree, home, ignore_errors=True)
        school = _School(show, stack, time.monotonic() + timeout, timeout)
        school.start(configs)
        result = school.train(request, kill_one=kill_one)
        _copy_results(school.results, out, result)
    _report(result, out, show, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Result:
    solved: bool
    mean_return: float | None
    env_steps: int
    seconds: float
    epochs: int
    peers: int
    killed: str | None
    digests: dict[str, str | None]

    @property
    def is_agreed(self) -> bool:
        return len(set(self.digests.values())) == 1 and None not in self.digests.values()

    def to_json(self) -> dict[str, Any]:
        return {
            "solved": self.solved,
            "return": self.mean_return,
            "env_steps": self.env_steps,
            "seconds": round(self.seconds, 2),
            "epochs": self.epochs,
            "peers": self.peers,
            "killed": self.killed,
            "digests": self.digests,
        }


def _report(result: _Result, out: Path, show: _Show, *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json())
    verdict = "solved" if result.solved else "NOT solved"
    show.say(
        f"{verdict}: return {render.number(result.mean_return)} after {result.env_steps:,} steps, "
        f"{result.epochs} epochs, {result.seconds:.1f} s"
    )
    digest = next(iter(result.digests.values())) or "none"
    if result.is_agreed:
        show.say(f"all {len(result.digests)} living nodes hold the same parameters: {digest[:16]}…")
    show.say(f"results in {out.absolute()}")
    if result.solved and result.is_agreed:
        return
    problem = "the task was not solved" if not result.solved else f"the nodes' parameters differ: {result.digests}"
    typer.echo(f"shoal: {problem}", err=True)
    raise typer.Exit(1)


@dataclass(slots=True)
class _Pupil:
    """One node of the demo."""

    node: BackgroundNode
    peer_id: str = ""
    is_alive: bool = True

    def connect(self) -> Client:
        return Client(self.node.config.paths, self.node.config.profile)


@dataclass(slots=True)
class _School:
    """The nodes, from their start to their end."""

    show: _Show
    stack: ExitStack
    deadline: float
    timeout_s: float
    pupils: list[_Pupil] = field(default_factory=list)
    results: Path | None = None
    killed: str | None = None

    def start(self, configs: list[NodeConfig]) -> None:
        """Start all nodes at once, and wait until they are ready; they are stopped at the end, whatever happens."""
        self.stack.callback(self._stop_all)
        for config in configs:
            self.pupils.append(_Pupil(BackgroundNode(config)))
        for pupil in self.pupils:
            ready = pupil.node.wait_ready()
            pupil.peer_id = ready["peer_id"]
            self.show.say(f"{pupil.node.config.profile}  {pupil.peer_id}  pid {ready['pid']}")

    def train(self, request: CreateSwarm, *, kill_one: bool) -> _Result:
        """Let them learn until the run is done; the first creates the swarm, the others join it."""
        started_at = time.monotonic()
        first, last = self.pupils[0], self.pupils[-1]
        with first.connect() as client:
            created = client.create_swarm(request)
        for pupil in self.pupils[1:]:
            with pupil.connect() as client:
                client.join_swarm(JoinSwarm(ticket=created.ticket))
        self.show.say(f"{first.node.config.profile} began swarm {created.swarm}; the others joined by its ticket\n")
        must_kill = kill_one

        def look(detail: SwarmDetail) -> None:
            nonlocal must_kill
            self.show.update(detail)
            if must_kill and _is_halfway(detail):
                must_kill = False
                self._kill(first, detail)

        with self.show:
            final = self._follow(last, created.swarm, look)
        seconds = time.monotonic() - started_at
        if must_kill:
            raise ShoalError(f"the run ended ({final.phase}) before anybody was killed; try again, or --no-kill-one")
        finals = {pupil.peer_id: self._follow(pupil, created.swarm) for pupil in self.pupils if pupil.is_alive}
        failed = next((detail for detail in finals.values() if detail.phase != "done"), None)
        if failed is not None:
            raise ShoalError(f"the run ended as {failed.phase}: {failed.error or 'see the logs, with --keep'}")
        self.results = Path(final.results) if final.results else None
        return _Result(
            solved=all(detail.solved for detail in finals.values()),
            mean_return=final.mean_return,
            env_steps=final.env_steps,
            seconds=seconds,
            epochs=final.epoch,
            peers=len(self.pupils),
            killed=self.killed,
            digests={peer: detail.digest for peer, detail in finals.items()},
        )

    def _follow(self, pupil: _Pupil, swarm: str, look: Callable[[SwarmDetail], None] = lambda _: None) -> SwarmDetail:
        """Watch the run through one node until it has ended there."""
        with pupil.connect() as client:
            for detail in client.watch_swarm(swarm):
                look(detail)
                if detail.phase in render.ENDED:
                    return detail
                if time.monotonic() > self.deadline:
                    raise ShoalError(
                        f"not done in {self.timeout_s:.0f} s (epoch {detail.epoch}, {detail.phase}, return "
                        f"{render.number(detail.mean_return)}); raise --timeout, or look into the logs with --keep"
                    )
        raise AssertionError("watching ends with the run or with an error")

    def _kill(self, pupil: _Pupil, detail: SwarmDetail) -> None:
        pupil.node.kill()
        pupil.is_alive = False
        self.killed = pupil.peer_id
        self.show.say(
            f"[bold red]killed {pupil.node.config.profile}[/] (SIGKILL, its worker too), who began the run, in epoch "
            f"{detail.epoch}"
        )

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


class _Show:
    """What people see: lines that stay, and under them the run, live."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal and not console.quiet else None
        self._last_epoch = -1

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def update(self, detail: SwarmDetail) -> None:
        if self._live is not None:
            self._live.update(Group(render.swarm(detail)), refresh=True)
        elif detail.epoch != self._last_epoch:
            self._last_epoch = detail.epoch
            self._console.print(render.plain_line(detail), soft_wrap=True, markup=False)


def _is_halfway(detail: SwarmDetail) -> bool:
    target = detail.target_return
    if target is None or detail.phase in render.ENDED:
        return False
    by_training = detail.training_return is not None and detail.training_return >= KILL_AT_TRAINING * target
    by_evaluations = len(detail.curve) >= KILL_AT_EVALUATIONS
    return (
        by_training
        or by_evaluations
        or (detail.mean_return is not None and detail.mean_return >= KILL_AT_EVALUATION * target)
    )


def _copy_results(results: Path | None, out: Path, result: _Result) -> None:
    make_private_folder(out)
    try:
        for name in RESULT_FILES:
            if results is not None and (results / name).is_file():
                shutil.copy(results / name, out / name)
        (out / "demo.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise storage_error(out, error) from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it cleans up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
