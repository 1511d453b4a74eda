"""How small are patches of a policy's copy, from one epoch to the next?

PPO learns with Shoal's defaults in one process, epoch by epoch; after each, the copy that actors would act by is taken
and the patch from the copy before it is made, as `shoal.training.rollouts.patches` sends it. The ratio is that of all
words of the copy, two bytes each, to the patch, and beside it that of the whole state, which members fetch (float32,
both networks, Adam's moments); keyframes that come every so often are left out, and are what the patch is if nothing
smaller can be made. ``eased`` are copies in which words that are at most so many steps of bfloat16 off
stay as they were; the divergence from the rounded policy is measured where the eased one goes.

A vector as large as the convolutional network that plays Atari (Mnih et al., 2015; 1.7 million words), which no model
of Shoal's is yet, walks as Adam's first steps do at that learning rate: each step moves a weight by about the rate, in
a direction that persists for ten steps. It tells what steps and rates do, not what a game would.

    python benchmarks/patches.py [--tasks gym:CartPole-v1,gym:LunarLander-v3] [--epochs 60] [--keep]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from shoal.protocol.ids import PeerId
from shoal.training.algorithms.local import update_together
from shoal.training.algorithms.ppo import PPO
from shoal.training.manifest import Manifest
from shoal.training.rollouts.acting import Acting, ActorShape, Noise, Words, copy_of
from shoal.training.rollouts.patches import eased, head_of, patch_of
from shoal.training.tasks import Task, load_task

RESULT = Path(__file__).parent / "results" / "patches.md"
RATES = (3e-4, 1e-3)
EASES = (0, 2, 8, 32)
BATCH = 2048
OWNER = PeerId.of_public_key(bytes(32))
CNN = 1_686_180
TARGET = 20


@dataclass(frozen=True)
class Row:
    """Of one run, or one walk."""

    what: str
    rate: float
    steps: int
    eased: int
    words: int
    changed: float
    ratio: float
    state: float | None
    kind: str
    divergence: float | None

    def __str__(self) -> str:
        """As a line of the table."""
        state = "" if self.state is None else f"{self.state:.0f}"
        apart = "" if self.divergence is None else f"{self.divergence:.1e}"
        return (
            f"| {self.what} | {self.rate:g} | {self.steps} | {self.eased} | {self.words:,} | {self.changed:.1%} "
            f"| {self.kind} | **{self.ratio:.1f}** | {state} | {apart} |"
        )


def copies(task: Task, rate: float, epochs: int) -> Iterator[tuple[ActorShape, Words, int]]:
    """One after each epoch, and how many bytes the whole state has."""
    run = Manifest(owner=OWNER, task=task.name, algorithm="ppo", hyperparameters={"learning_rate": rate}, seed=1)
    learner = PPO().learner(run, task, peer=OWNER)
    config = learner.config
    shape = ActorShape(
        task.observation_space.size, task.action_space, tuple(config.hidden_sizes), config.normalize_observations
    )
    for _ in range(epochs):
        learner.collect(BATCH)
        update_together({OWNER: learner})
        state_bytes = sum(array.nbytes for array in learner.export_state().values())
        yield shape, copy_of(shape, learner.policy_arrays()), state_bytes


def measured(
    what: str, rate: float, steps: int, ease: int, some: list[tuple[Words, Words]], state_bytes: int | None = None
) -> Row:
    """Of copies ``(before, after)``."""
    patches = [(before, after, patch_of(before, after, 1)) for before, after in some]
    kinds = [str(head_of(patch).kind) for _, _, patch in patches]
    return Row(
        what,
        rate,
        steps,
        ease,
        some[0][0].size,
        statistics.median(float((before != after).mean()) for before, after, _ in patches),
        statistics.median(after.nbytes / len(patch) for _, after, patch in patches),
        None if state_bytes is None else statistics.median(state_bytes / len(patch) for _, _, patch in patches),
        statistics.mode(kinds),
        None,
    )


def divergence(task: Task, shape: ActorShape, exact: Words, near: Words) -> float:
    """The mean of log π_near - log π_exact of what the near one does, in a few hundred steps: its divergence."""
    acting, other = Acting(shape, near), Acting(shape, exact)
    env, noise = task.make(8), Noise(7)
    shown, found = env.reset(list(range(8))), []
    for _ in range(100):
        acts, said = acting.act(shown, noise)
        found.append(float((said - other.log_probs(shown, acts)).mean()))
        shown = env.step(acts).observations
    env.close()
    return statistics.fmean(found)


def of_task(name: str, rate: float, epochs: int) -> Iterator[Row]:
    """Patches of a policy that learns."""
    task = load_task(name)
    seen = list(copies(task, rate, epochs))
    shape, config = seen[0][0], PPO.settings()
    for ease in EASES:
        before = seen[0][1]
        some, apart = [], []
        for number, (_, exact, _) in enumerate(seen[1:]):
            after = eased(before, exact, shape.num_parameters, most=ease) if ease else exact
            some.append((before, after))
            if ease and number % 10 == 9:
                apart.append(divergence(task, shape, exact, after))
            before = after
        row = measured(name, rate, config.num_steps, ease, some, seen[0][2])
        yield Row(**(vars(row) | {"divergence": statistics.fmean(apart) if apart else None}))


def of_walk(rate: float, steps: int) -> Row:
    """Patches of a vector that walks."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(CNN) * 0.05).astype(np.float32)
    some = []
    before = rounded(weights)
    for _ in range(3):
        direction = rng.standard_normal(CNN).astype(np.float32)
        for step in range(steps):
            if step % 10 == 9:
                direction = rng.standard_normal(CNN).astype(np.float32)
            weights += np.float32(rate) * np.clip(direction, -1, 1)
        after = rounded(weights)
        some.append((before, after))
        before = after
    return measured("a walk, as large as Atari's CNN", rate, steps, 0, some)


def rounded(weights: np.ndarray) -> Words:
    """To the nearest bfloat16, ties to even."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def main() -> None:
    """Measure, print, and keep if that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tasks", default="gym:CartPole-v1,gym:LunarLander-v3")
    parser.add_argument("--epochs", type=int, default=60, help=f"of {BATCH} environment steps (default: 60)")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    rows: list[Row] = []
    columns = "what, learning rate, steps, eased, words, changed, mostly, times smaller, than the state, divergence"
    head = "| " + " | ".join(columns.split(", ")) + " |"
    print(head)
    print(line := "|" + "---|" * 10)
    for name in arguments.tasks.split(","):
        for rate in RATES:
            for row in of_task(name, rate, arguments.epochs):
                rows.append(row)
                print(row, flush=True)
    for rate, steps in ((1e-3, 320), (3e-4, 320), (3e-4, 1), (1e-5, 10), (1e-6, 10), (1e-6, 1)):
        rows.append(of_walk(rate, steps))
        print(rows[-1], flush=True)
    if arguments.keep:
        command = f"`python benchmarks/patches.py --epochs {arguments.epochs}`"
        machine = f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}"
        reached = [row for row in rows if row.ratio >= TARGET and not row.what.startswith("a walk")]
        text = RESULT.read_text() if RESULT.exists() else ""
        said = text.partition("## What limits it\n")[2]
        verdict = f"{len(reached)} of the rows of policies that learn reach {TARGET} times."
        table = "\n".join([head, line, *map(str, rows)])
        RESULT.write_text(
            f"# Patches: how much smaller a new version is than all of it\n\n{command}, {machine}.\n"
            f"Medians over epochs of {BATCH} environment steps; see the head of the benchmark. {verdict}\n\n{table}\n"
            + (f"\n## What limits it\n{said}" if said else "")
        )


if __name__ == "__main__":
    main()
