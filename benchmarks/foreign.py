"""Environments that nobody here wrote: each made as a task of Shoal's, and learned for a while in one process.

Every one is a process of its own, by PPO with all settings at their defaults. It *learns* if the last fifth of its
episodes earn more than the first fifth, by more than two standard errors of the difference; it *runs* if they do not,
or if there were too few; it is *refused*, with what Shoal says, if Shoal ends it with an error of its own. All else,
a traceback, a signal or a process that does not come back, is *fails*, and ends this script with exit code 1.

    python -m venv foreign && foreign/bin/pip install '.[train,tasks,atari]' minigrid highway-env \\
        flappy-bird-gymnasium gym-pusht mo-gymnasium gymnasium-robotics miniworld panda-gym gym-anytrading
    foreign/bin/python benchmarks/foreign.py [--tasks gym:A,gym:B] [--steps 40000] [--seconds 100]
        [--json FILE] [--keep]

``--json`` writes rows into a file, in place of those of the same tasks that it holds already; what is printed and kept
is of all its rows, so that tasks can be run one by one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

RESULT: Final = Path(__file__).parent / "results" / "foreign.md"
TASKS: Final = (
    "gym:CartPole-v1",
    "gym:Acrobot-v1",
    "gym:MountainCarContinuous-v0",
    "gym:Taxi-v4",
    "gym:FrozenLake-v1",
    "gym:Blackjack-v1",
    "gym:LunarLander-v3",
    "gym:BipedalWalker-v3",
    "gym:InvertedPendulum-v5",
    "gym:Hopper-v5",
    "gym:ALE/Pong-v5",
    "gym:ALE/Breakout-v5",
    "gym:minigrid:MiniGrid-Empty-5x5-v0",
    "gym:minigrid:MiniGrid-Empty-5x5-v0?observe=image",
    "gym:minigrid:MiniGrid-DoorKey-5x5-v0?observe=image",
    "gym:minigrid:MiniGrid-Dynamic-Obstacles-5x5-v0?observe=image",
    "gym:minigrid:BabyAI-GoToRedBallGrey-v0?observe=image",
    "gym:highway_env:highway-fast-v0",
    "gym:highway_env:parking-v0",
    "gym:highway_env:racetrack-v0",
    "gym:highway_env:intersection-multi-agent-v0",
    "gym:flappy_bird_gymnasium:FlappyBird-v0",
    "gym:gym_pusht:gym_pusht/PushT-v0",
    "gym:mo_gymnasium:deep-sea-treasure-v0",
    "gym:gymnasium_robotics:FetchReachDense-v4",
    "gym:gymnasium_robotics:PointMaze_UMazeDense-v3",
    "gym:gymnasium_robotics:AdroitHandDoor-v1",
    "gym:gymnasium_robotics:HandReachDense-v3",
    "gym:gymnasium_robotics:FrankaKitchen-v1",
    "gym:miniworld:MiniWorld-Hallway-v0",
    "gym:panda_gym:PandaReachDense-v3",
    "gym:gym_anytrading:stocks-v0",
)
PACKAGES: Final = (
    "gymnasium",
    "mujoco",
    "ale-py",
    "minigrid",
    "highway-env",
    "flappy-bird-gymnasium",
    "gym-pusht",
    "mo-gymnasium",
    "gymnasium-robotics",
    "miniworld",
    "panda-gym",
    "gym-anytrading",
)
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
BATCH: Final = 2048
STRIDE: Final = 128
"""Steps between two looks at the clock: some environments make ten a second."""
SHARE: Final = 5
"""One part in so many of the episodes is compared, at either end;"""
FEWEST: Final = 5
"""of so many at least."""
ERRORS: Final = 2.0
GRACE_S: Final = 180.0
"""That a process may take beyond its time, to begin and for one update."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one."""

    task: str
    outcome: str
    shows: str = ""
    acts: str = ""
    env_steps: int = 0
    first: float | None = None
    last: float | None = None
    replaced: int = 0
    said: str = ""


def learn(written: str, steps: int, seconds: float) -> Row:
    """Make it, try it, learn it, in this process; ``gym:NAME?KEY=VALUE`` is made with an argument."""
    from shoal.protocol.errors import ShoalError
    from shoal.protocol.ids import PeerId
    from shoal.training.algorithms import load_algorithm
    from shoal.training.algorithms.local import update_together
    from shoal.training.manifest import Manifest
    from shoal.training.tasks import load_task
    from shoal.training.tasks.catalogue import acts_in_words, box_in_words

    owner = PeerId.of_public_key(bytes(32))
    shows = acts = ""
    done, returns = 0, list[float]()
    try:
        name, _, argument = written.partition("?")
        key, _, value = argument.partition("=")
        arguments = {key: value} if key else {}
        task = load_task(name, arguments)
        shows, acts = box_in_words(task.observation_space), acts_in_words(task.action_space)
        task.try_out(0)  # type: ignore[attr-defined]  # as a node does before it joins
        manifest = Manifest(owner=owner, task=name, algorithm="ppo", batch_size=BATCH, env_arguments=arguments)
        learner = load_algorithm("ppo").learner(manifest, task, peer=owner)
        until = time.monotonic() + seconds
        while done < steps and time.monotonic() < until:
            collected = learner.collect(STRIDE)
            done += collected.samples
            returns += collected.episode_returns
            if collected.total >= BATCH:
                update_together({owner: learner})
    except ShoalError as error:
        return Row(written, "refused", shows, acts, done, said=str(error))
    size = len(returns) // SHARE
    if size < FEWEST:
        return Row(
            written, "runs", shows, acts, done, replaced=task.failures.count, said=f"{len(returns)} episodes ended"
        )
    first, last = returns[:size], returns[-size:]
    spread = ((statistics.variance(first) + statistics.variance(last)) / size) ** 0.5
    gain = statistics.fmean(last) - statistics.fmean(first)
    outcome = "learns" if gain > ERRORS * spread and gain > 0 else "runs"
    means = (round(statistics.fmean(each), 3) for each in (first, last))
    return Row(written, outcome, shows, acts, done, *means, replaced=task.failures.count)


def apart(name: str, steps: int, seconds: float) -> Row:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--one", name, "--steps", str(steps), "--seconds", str(seconds)]
    environment = os.environ | dict.fromkeys(THREADS, "1") | {"SDL_VIDEODRIVER": "dummy"}
    try:
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        return Row(name, "fails", said="it did not come back")
    if ran.returncode:
        return Row(name, "fails", said=(ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1])
    return Row(**json.loads(ran.stdout.strip().splitlines()[-1]))


def report(rows: list[Row], command: str) -> list[str]:
    """The table, in Markdown."""
    versions = {name: _version(name) for name in PACKAGES}
    counts = {word: sum(row.outcome == word for row in rows) for word in ("learns", "runs", "refused", "fails")}
    lines = [
        "# Environments that nobody here wrote",
        "",
        f"`{command}`, Python {platform.python_version()}, {platform.machine()}",
        f"with {os.cpu_count()} cores, which other work used too. Each in a process of its own, by PPO with every",
        "setting at its default, for as many steps as the table says: enough to see that it learns, and mostly not to",
        "learn it. *learns*: the last fifth of the episodes earned more than the first, by more than two standard",
        "errors. *runs*: not so, or too few episodes ended. *refused*: Shoal said why in one line. *fails*: all else.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version) + ".",
        "",
        ", ".join(f"{count} {word}" for word, count in counts.items()) + f", of {len(rows)}.",
        "",
        "| task | outcome | networks see | policies act by | steps | return, first fifth | last | replaced | said |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        means = ("" if each is None else f"{each:.4g}" for each in (row.first, row.last))
        said = row.said.replace("|", "\\|")
        cells = (f"`{row.task}`", row.outcome, row.shows, row.acts, f"{row.env_steps:,}", *means, row.replaced, said)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=100.0, help="of each at most, beside one epoch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(asdict(learn(given.one, given.steps, given.seconds))))
        return
    held = given.json is not None and given.json.exists()
    found = {row["task"]: Row(**row) for row in json.loads(given.json.read_text())} if held else {}
    for name in given.tasks.split(","):
        found[name] = apart(name, given.steps, given.seconds)
        print(found[name], file=sys.stderr, flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(row) for row in found.values()], indent=1) + "\n")
    rows = list(found.values())
    command = " ".join(["python", "benchmarks/foreign.py", *sys.argv[1:]])
    text = "\n".join(report(rows, command)) + "\n"
    print(text)
    if given.keep:
        RESULT.write_text(text, encoding="utf-8")
    if any(row.outcome == "fails" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
