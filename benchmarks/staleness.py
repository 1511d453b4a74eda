"""What is lost of the return when the policy that acts is K versions behind the one that learns, by each correction.

One learner in one process with the real cores and no network: four actors play by the policy of K versions ago and
seal shards; the learner opens them and makes nine tenths of an update from them and the rest from its own environments,
as in mode ``rollouts`` by default. Every run takes as many environment steps. Told is the mean return of greedy
episodes at the evaluations in the last fifth of a run: where it ended, and not one evaluation's luck.

    python benchmarks/staleness.py [--runs gym:CartPole-v1:50000:0,2,4,6,8,16 ...] [--seeds 3] [--first 0]
                                   [--lines FILE] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

from joining import update_together

from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.engine import OnEngine
from shoal.training.exchange.averager import Arrays
from shoal.training.manifest import Manifest, Mode
from shoal.training.rollouts.actor import Actor, Made
from shoal.training.rollouts.admitting import Admission
from shoal.training.rollouts.evidence import Finding, Verdict
from shoal.training.rollouts.shard import seal
from shoal.training.tasks import load_task
from shoal.training.worker_calls import Admit

RESULT: Final = Path(__file__).parent / "results" / "staleness.md"
RUNS: Final = ["gym:CartPole-v1:50000:0,2,4,6,8,16", "gym:LunarLander-v3:100000:0,6"]
SWARM: Final = SwarmId.of_manifest(b"a swarm")
ME: Final = Signer(bytes([1]) * 32)
CORRECTIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "none": ("ppo", {"correction": "none"}),
    "decoupled": ("ppo", {"correction": "decoupled"}),
    "a3po": ("ppo", {"correction": "a3po"}),
    "vtrace": ("vtrace", {}),
}
EPISODES: Final = 10
EVERY: Final = 2
"""Epochs from one evaluation to the next, at the end."""


@dataclass(frozen=True, slots=True)
class Given:
    """A shard on its way.

    Attributes:
        signer: who made it.
        data: its bytes.
        cid: its name.
        version: epoch of the policy that it names.
        samples: environment steps.
        act_s: seconds of the processor that acting and sealing took.
    """

    signer: Signer
    data: bytes
    cid: Cid
    version: int
    samples: int
    act_s: float


class Together:
    """A learner and its actors, version by version.

    Attributes:
        learner: what learns.
        epoch: of its policy.
        env_steps: that were learned from.
    """

    def __init__(
        self,
        task_name: str,
        algorithm: str,
        settings: dict[str, Any],
        *,
        actors: int,
        late: int,
        seed: int,
        batch: int,
        givers: int | None = None,
        check_rate: float = 0.0,
    ) -> None:
        """Begin.

        Args:
            task_name: of the task.
            algorithm: that learns.
            settings: of it.
            actors: how many.
            late: by how many versions they are behind.
            seed: of everything.
            batch: environment steps per update.
            givers: how many actors' shards an update is made from; None: all.
            check_rate: of shards.
        """
        self.task, kind = load_task(task_name), load_algorithm(algorithm)
        assert isinstance(kind, OnEngine)
        self.manifest = Manifest(
            owner=ME.peer_id,
            task=task_name,
            algorithm=algorithm,
            seed=seed,
            mode=Mode.ROLLOUTS,
            hyperparameters=settings,
            batch_per_learner=batch,
            max_staleness=max(late, 1),
            check_rate=check_rate,
        )
        self.learner = kind.learner(self.manifest, self.task, peer=ME.peer_id)
        config, self.shape = kind.configured(self.manifest, self.task), kind.actor_shape(self.manifest, self.task)
        self.admission = Admission(
            self.learner,
            self.manifest,
            self.task,
            self.shape,
            num_envs=config.num_envs,
            gamma=config.gamma,
            swarm=SWARM,
        )
        self.signers = [Signer((1000 * (seed + 1) + number).to_bytes(32, "big")) for number in range(actors)]
        self.actors = [self.actor(signer) for signer in self.signers]
        self._num_envs, self._late, self._batch, self._seed = config.num_envs, late, batch, seed
        most = int(self.manifest.foreign_ratio * batch)
        self.share = most // (givers or actors) // config.num_envs * config.num_envs
        self._before: list[Cid | None] = [None] * actors
        self._policies: dict[int, Arrays] = {}
        self.epoch = self.env_steps = 0
        self._hold()

    def actor(self, signer: Signer) -> Actor:
        """One of this run."""
        config = load_algorithm(self.manifest.algorithm).configured(self.manifest, self.task)  # type: ignore[attr-defined]
        return Actor(self.manifest, self.task, self.shape, config.num_envs, swarm=SWARM, peer=signer.peer_id, stream=0)

    @property
    def version(self) -> int:
        """Of the policy by which is acted."""
        return max(0, self.epoch - self._late)

    def name(self, version: int) -> Cid:
        """Of a policy."""
        return Cid.of_block(b"policy %d" % version)

    def shards(
        self, edit: Callable[[int, Made], Made] = lambda _, made: made, by: Sequence[int] | None = None
    ) -> Iterator[Given]:
        """One of each actor, or of these; ``edit`` makes of what an actor of a number made what it signs."""
        version = self.version
        for number in range(len(self.actors)) if by is None else by:
            signer, actor = self.signers[number], self.actors[number]
            began = time.process_time()
            actor.take(self._policies[version], version, self.name(version))
            made = edit(number, actor.roll_out(self.share, self._before[number]))
            cid, data = seal(signer, made.head, made.rows.columns(self.task.action_space))
            self._before[number] = cid
            yield Given(signer, data, cid, version, made.head.samples, time.process_time() - began)

    def admit(self, given: Given, *, is_checked: bool = False, chance: int | None = None) -> tuple[Finding, int, bool]:
        """What is found of a shard, how many samples of it are learned from, and whether it was looked into."""
        state = self.name(given.version)
        asked = Admit(given.data, given.cid, given.signer.peer_id, given.version, state, is_checked, chance)
        looked = self.admission.admit(asked, self.epoch)
        return looked.finding, looked.samples, looked.is_checked

    def learn(self) -> None:
        """Fill up with own samples, and make the next policy."""
        self.learner.collect(max(self._num_envs, self._batch - self.learner.samples))
        self.env_steps += self.learner.samples
        update_together([self.learner], [ME.peer_id], 0)
        self.epoch += 1
        self._hold()

    def evaluate(self) -> float:
        """The mean return."""
        return statistics.fmean(self.learner.evaluate(EPISODES, (self._seed + 1_000_003 * self.epoch) % 2**32))

    def _hold(self) -> None:
        self._policies[self.epoch] = self.learner.policy_arrays()
        self._policies.pop(self.epoch - self._late - 1, None)
        self.admission.holds(self.epoch, self._policies[self.epoch])


def measure(task: str, steps: int, correction: str, late: int, seed: int) -> tuple[float, float]:
    """The return in the end, and seconds of the processor."""
    began = time.process_time()
    algorithm, settings = CORRECTIONS[correction]
    run = Together(task, algorithm, settings, actors=4, late=late, seed=seed, batch=2048)
    found = []
    while run.env_steps < steps:
        for given in run.shards():
            finding, taken, _ = run.admit(given)
            assert finding.verdict is Verdict.TRUE, finding
            assert taken
        run.learn()
        if run.env_steps >= 0.8 * steps and run.epoch % EVERY == 0:
            found.append(run.evaluate())
    return statistics.fmean(found), time.process_time() - began


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Of each task, in Markdown."""
    found = []
    for task, steps in dict.fromkeys((each["task"], each["steps"]) for each in lines):
        here = [each for each in lines if (each["task"], each["steps"]) == (task, steps)]
        lates = sorted({each["late"] for each in here})
        found += [
            f"## {task.partition(':')[2]}, {steps:,} environment steps",
            "",
            f"| correction | {' | '.join(f'K = {late}' for late in lates)} |",
            "|---|" + "---|" * len(lates),
        ]
        for correction in (each for each in CORRECTIONS if each in {line["correction"] for line in here}):
            cells = []
            for late in lates:
                same = [e["return"] for e in here if (e["correction"], e["late"]) == (correction, late)]
                each = ", ".join(f"{one:.0f}" for one in same)
                cells.append(f"**{statistics.fmean(same):.0f}** ({each})" if same else "")
            found.append(f"| `{correction}` | {' | '.join(cells)} |")
        found.append("")
    return found


def main() -> None:
    """Measure, print, and keep if that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", nargs="*", default=RUNS, help="task:steps:K,K,…")
    parser.add_argument("--corrections", default=",".join(CORRECTIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--lines", type=Path, help="a file that runs are added to and told from")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    if options.lines and options.lines.exists():
        lines = [json.loads(line) for line in options.lines.read_text().splitlines()]
    known = {tuple(each[name] for name in ("task", "steps", "correction", "late", "seed")) for each in lines}
    for seed in range(options.first, options.first + options.seeds):
        for task, steps, lates in (each.rsplit(":", 2) for each in options.runs):
            for late in map(int, lates.split(",")):
                for correction in options.corrections.split(","):
                    if (task, int(steps), correction, late, seed) in known:
                        continue
                    found, cpu_s = measure(task, int(steps), correction, late, seed)
                    line = {"task": task, "steps": int(steps), "correction": correction, "late": late, "seed": seed}
                    lines.append(line | {"return": round(found, 1), "cpu_s": round(cpu_s, 1)})
                    print(json.dumps(lines[-1]), flush=True)
                    if options.lines:
                        with options.lines.open("a") as out:
                            out.write(json.dumps(lines[-1]) + "\n")
    lines.sort(key=lambda each: each["seed"])
    told = table(lines)
    print("\n".join(told))
    if options.keep:
        head = (
            "# Staleness: the return with a policy that acts K versions behind\n\n"
            f"`python benchmarks/staleness.py --seeds {options.seeds}`, Python {platform.python_version()}, "
            f"{platform.machine()}, one thread each.\n"
            "See the head of the benchmark. Means over the seeds, and each seed in brackets. `none`, `decoupled` and\n"
            "`a3po` are PPO with this `correction` and its defaults else; `vtrace` is the algorithm of that name.\n\n"
        )
        RESULT.write_text(head + "\n".join(told).rstrip() + "\n")


if __name__ == "__main__":
    main()
