"""What does a generator cost? CartPole-v1 through Play and Stage, beside the loop around its `VectorEnv`.

Both have the same actor, a layer of NumPy that samples and gives log-probabilities, both go through the checks of what
the environment answers, and the stage and the stream keep all that an update needs. They take turns, and processor time
is what counts, since the machine is never quiet; figures are medians over the rounds. One actor balances the pole for
some hundred steps; the other does anything, so that plays are short, and what it costs to begin one counts: each is
seeded, so that it can be had again, where the loops reset without.

    python benchmarks/plays.py [--steps 40000] [--rounds 5] [--keep]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import gymnasium
import numpy as np

from shoal.training.algorithms.rollouts import Stream
from shoal.training.tasks import load_task
from shoal.training.tasks.cast import Everyone, Learned
from shoal.training.tasks.games.gym import GymGame
from shoal.training.tasks.play import Take, newest
from shoal.training.tasks.source import FreshSeeds, News
from shoal.training.tasks.stage import Stage, alone

RESULT = Path(__file__).parent / "results" / "plays.md"
TARGET = 0.7
WEIGHTS = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 6.0], [0.0, 3.0]], np.float32)

WHERE = [
    "A play costs about 100 µs beside its turns, which are all that a long one has. Measured apart, by a timer",
    "around each part within 1,800 short plays (tenth percentile of wall time): to begin one 57 µs, of which",
    "Gymnasium's seeding of its environment is 11 and the seeding of the play's own generator 11; to draw its",
    "scenario and its seats 10; to end it 9; the rest is memory that is made for its takes. The loops seed nothing",
    "and keep no play apart. Without either seeding, the two rows of short plays come to 0.67 and 0.65; 0.7 would",
    "take as much again, and what is left is what makes a play one that can be had again and checked. Who plays 22",
    "turns of a microsecond's game, and needs none of that, takes the vector loop.",
]


class Actor:
    """One layer."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights

    def policy(self, sights: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Sample acts; gives their log-probabilities too."""
        logits = sights @ self.weights
        logits -= np.logaddexp(logits[:, :1], logits[:, 1:])
        acts = (rng.random(len(sights), np.float32) < np.exp(logits[:, 1])).astype(np.int64)
        return acts, logits[np.arange(len(acts)), acts]

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
        """The same for takes."""
        return self.policy(newest(takes), rng)


class ByStream:
    """The loop as a learner has it: it keeps what an update needs."""

    def __init__(self, plays: int, weights: np.ndarray) -> None:
        self.stream = Stream(load_task("gym:CartPole-v1"), num_envs=plays, gamma=0.99, seed=0, name="bench")
        self.actor = Actor(weights)

    def run(self, steps: int) -> int:
        """Take so many."""
        taken, _ = self.stream.collect(steps, lambda sights, rng, memory: self.actor.policy(sights, rng)[0])
        self.stream.drop()
        return taken


class ByVector:
    """The barest loop: nothing is kept."""

    def __init__(self, plays: int, weights: np.ndarray) -> None:
        self.env = load_task("gym:CartPole-v1").make(plays)
        self.sights = self.env.reset(range(plays))
        self.actor, self.rng = Actor(weights), np.random.default_rng(0)

    def run(self, steps: int) -> int:
        """Take so many."""
        for _ in range(-(-steps // self.env.num_envs)):
            acts, _ = self.actor.policy(self.sights, self.rng)
            self.sights = self.env.step(acts).observations
        return steps


class ByStage:
    """Plays on a stage."""

    def __init__(self, plays: int, weights: np.ndarray) -> None:
        game = GymGame("CartPole-v1")
        self.stage = Stage(game, FreshSeeds(), Everyone("agent"), {Learned("agent"): Actor(weights)}, plays)
        self.lengths: list[int] = []

    def run(self, steps: int) -> int:
        """Take so many."""
        staged = alone(self.stage.collect(News(), steps))
        self.lengths += [len(take) for take in staged.takes]
        return staged.turns


def measure(plays: int, weights: np.ndarray, steps: int, rounds: int) -> tuple[np.ndarray, float]:
    """Take turns.

    Returns:
        ``[rounds, 3]``, steps per second of processor time of the bare loop, of the stream, and of the stage; and the
        mean length of an episode.
    """
    stage = ByStage(plays, weights)
    kinds = [ByVector(plays, weights), ByStream(plays, weights), stage]
    rates = np.zeros((rounds, len(kinds)))
    for kind in kinds:
        kind.run(steps // 10)
    for turn in range(rounds):
        for number, kind in enumerate(kinds):
            began = time.process_time()
            taken = kind.run(steps)
            rates[turn, number] = taken / (time.process_time() - began)
    return rates, float(np.mean(stage.lengths))


def main() -> None:
    """Print the table, and keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--keep", action="store_true", help="write the table into results/plays.md")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for plays, weights in ((8, WEIGHTS), (32, WEIGHTS), (8, 0 * WEIGHTS), (32, 0 * WEIGHTS)):
        rates, length = measure(plays, weights, options.steps, options.rounds)
        bare, stream, stage = np.median(rates, axis=0)
        of_bare, of_stream, _ = np.median(rates[:, 2:] / rates, axis=0)
        met = "yes" if of_stream >= TARGET else "no"
        rows.append(
            f"| {plays} | {length:.0f} | {bare:,.0f} | {stream:,.0f} | {stage:,.0f} | {of_bare:.2f} "
            f"| **{of_stream:.2f}** | {met} |"
        )
    command = f"python benchmarks/plays.py --steps {options.steps} --rounds {options.rounds}"
    versions = f"Python {platform.python_version()}, Gymnasium {gymnasium.__version__}, NumPy {np.__version__}"
    lines = [
        "# Plays: CartPole-v1 through Play and Stage, beside the vector loop",
        "",
        f"`{command}`, {versions},",
        f"{platform.machine()} with {os.cpu_count()} cores, one thread; load {load:.1f} when it began. Steps per",
        f"second of processor time, medians of {options.rounds} alternating rounds.",
        "",
        "| plays | steps each | bare vector loop | `Stream` | Play, Stage | of the bare loop | of `Stream` | ≥ 0.7 |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *WHERE,
    ]
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
