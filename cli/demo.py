"""``shoal demo``: the whole promise on one machine. Nodes train together, the first is killed, the others finish.

Each node is a process of its own with its own profile, under a folder of this demo's own, so two demos may run at
once. The demo knows of them only what their local APIs say, as any user's program would.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live

from shoal.cli import render
from shoal.cli.common import AsJson, Profile, print_json
from shoal.cli.school import MAX_PEERS, School, school
from shoal.node.api.requests import CreateSwarm
from shoal.node.api.schemas import SwarmDetail
from shoal.node.store.files import make_private_folder, storage_error
from shoal.protocol.errors import ShoalError, UsageError

KILL_AT_TRAINING: Final = 0.2
KILL_AT_EVALUATION: Final = 0.5
"""One node is killed at these shares of the target return: well on the way, and not there yet."""
KILL_AT_EVALUATIONS: Final = 2
"""Or when there were so many evaluations, since a greedy policy may leap from far below to the target."""
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
    request = CreateSwarm(task=task, algorithm=algorithm, min_learners=peers)
    show = _Show(Console(highlight=False, quiet=as_json))
    with school("demo", peers, show.say, timeout, keep=keep, profile=profile) as nodes:
        result, results = _train(nodes, show, request, kill_one=kill_one)
        _copy_results(results, out, result)
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


def _train(nodes: School, show: _Show, request: CreateSwarm, *, kill_one: bool) -> tuple[_Result, Path | None]:
    """Let them learn until the run is done; gives what came of it, and the folder with the results."""
    started_at = time.monotonic()
    first, last = nodes.pupils[0], nodes.pupils[-1]
    created = nodes.begin(request)
    must_kill, killed = kill_one, None

    def look(detail: SwarmDetail) -> bool:
        nonlocal must_kill, killed
        show.update(detail)
        if must_kill and _is_halfway(detail):
            must_kill, killed = False, first.peer_id
            first.kill()
            show.say(
                f"[bold red]killed {first.name}[/] (SIGKILL, its worker too), who began the run, in epoch "
                f"{detail.epoch}"
            )
        return False

    with show:
        final = nodes.follow(last, created.swarm, look)
    seconds = time.monotonic() - started_at
    if must_kill:
        raise ShoalError(f"the run ended ({final.phase}) before anybody was killed; try again, or --no-kill-one")
    finals = {pupil.peer_id: nodes.follow(pupil, created.swarm) for pupil in nodes.pupils if pupil.is_alive}
    failed = next((detail for detail in finals.values() if detail.phase != "done"), None)
    if failed is not None:
        raise ShoalError(f"the run ended as {failed.phase}: {failed.error or 'see the logs, with --keep'}")
    result = _Result(
        solved=all(detail.solved for detail in finals.values()),
        mean_return=final.mean_return,
        env_steps=final.env_steps,
        seconds=seconds,
        epochs=final.epoch,
        peers=len(nodes.pupils),
        killed=killed,
        digests={peer: detail.digest for peer, detail in finals.items()},
    )
    return result, Path(final.results) if final.results else None


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
