"""What poisoners among the actors do to a run, with shards that are looked into and without, and what looking costs.

A learner and ten actors in one process and without a network, each shard by way of the real cores: intake, trust,
admission with its checks. Three actors poison all that they make, from the first shard on or once they are trusted: as
if a hundred shards of each had been found true before, so that all are looked at as seldom as anybody ever is.

Told are the mean return at the end, what was caught of what was looked at, how many poisoned shards were learned from
before their author was found out, and whom else that hit. Then what looking costs beside acting, with shards as large
as actors make them, of an actor that begins as a stranger.

    python benchmarks/poisoners.py [--task gym:CartPole-v1] [--steps 50000] [--seeds 1] [--rate R]
                                   [--costs] [--keep]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from staleness import ME, Given, Together

from shoal.protocol.signing import Signer
from shoal.training.manifest import Manifest
from shoal.training.rollouts.actor import Made
from shoal.training.rollouts.evidence import Finding, Verdict
from shoal.training.rollouts.intake import Intake
from shoal.training.rollouts.trust import Look, Trust
from shoal.training.statements import GivenShard

RESULT: Final = Path(__file__).parent / "results" / "poisoners.md"
ACTORS: Final = 10
LIARS: Final = 3
GIVERS: Final = 4
"""Actors whose shards an update is made from, by turns."""
LATE: Final = 1
BATCH: Final = 1024
KNOWN: Final = 100
COSTS: Final = ("gym:CartPole-v1", "gym:LunarLander-v3", "gym:Pendulum-v1")
REAL_SAMPLES: Final = 460
"""Of a shard, by an actor that is fast enough, with the default batch."""
SHARDS: Final = 400
LEARNERS: Final = 8
"""That look, each by its own chance."""
STRANGERS_STEPS: Final = 8000
"""Of the runs in which liars are new: it is over with them after a shard or two, and nothing is left to learn from."""


class Poisoned(Together):
    """A run whose last actors lie, in one way."""

    lie = ""
    copied: Made | None = None
    """The last that an honest actor made."""

    def poison(self, number: int, made: Made) -> Made:
        """What an actor of a number signs."""
        if number < ACTORS - LIARS or not self.lie:
            self.copied = made
            return made
        head, rows = made.head, made.rows
        match self.lie:
            case "false rewards":
                rows = replace(rows, rewards=-10 * rows.rewards)
            case "edited log-probabilities":
                rows = replace(rows, log_probs=np.minimum(rows.log_probs - np.float32(2), 0))
            case "copied shards":
                rows = rows if self.copied is None else self.copied.rows
            case _:  # made so by who made them
                pass
        return Made(head, rows, made.episode_returns)

    def turn(self, lie: str) -> None:
        """Let them lie from now on."""
        self.lie = lie
        for number in range(ACTORS - LIARS, ACTORS):
            actor = self.actors[number]
            match lie:
                case "another policy":
                    honest = actor.take

                    def take(arrays, version, state, honest=honest):  # type: ignore[no-untyped-def]
                        """The opposite of what is wanted."""
                        worse = {
                            name: -array if name.startswith("parameters/actor/2") else array
                            for name, array in arrays.items()
                        }
                        honest(worse, version, state)

                    actor.take = take  # type: ignore[method-assign]
                case "invented seeds":
                    self.actors[number] = self.actor(Signer((77 + number).to_bytes(32, "big")))
                case "over-long":
                    roll_out = actor.roll_out
                    actor.roll_out = lambda samples, before, whole=roll_out: whole(2 * BATCH, before)  # type: ignore[misc]
                case _:
                    pass


LIES: Final = (
    "false rewards",
    "edited log-probabilities",
    "copied shards",
    "another policy",
    "invented seeds",
    "over-long",
)


@dataclass(slots=True)
class Outcome:
    """Of a run.

    Attributes:
        last: mean return at the end.
        looked: poisoned shards that were looked into.
        caught: of these, those that were found false, or refused as no shard of this run.
        used: poisoned shards that were learned from.
        accused: honest actors that were called liars.
    """

    last: float = 0.0
    looked: int = 0
    caught: int = 0
    used: int = 0
    accused: int = 0


def measure(task: str, steps: int, seed: int, rate: float, lie: str, *, is_known: bool) -> Outcome:
    """One run."""
    run = Poisoned(task, "ppo", {}, actors=ACTORS, late=LATE, seed=seed, batch=BATCH, givers=GIVERS, check_rate=rate)
    if lie:
        run.turn(lie)
    liars = {signer.peer_id for signer in run.signers[ACTORS - LIARS :]} if lie else set()
    intake = Intake(ME.peer_id, LATE, most_samples=run.manifest.most_foreign)
    trust, found, returns = Trust(rate), Outcome(), list[float]()
    rng, turns = np.random.default_rng(seed), np.random.default_rng(seed)  # who gives does not hang on who looks
    if is_known:
        for signer in run.signers:
            for _ in range(KNOWN):
                trust.found_true(signer.peer_id)
    while run.env_steps < steps:
        given: dict[str, Given] = {}
        for each in run.shards(run.poison, turns.permutation(ACTORS)[:GIVERS].tolist()):
            given[each.cid] = each
            said = GivenShard(each.cid, each.version, run.share, len(each.data))
            intake.named(each.signer.peer_id, [said])
            for author, shard in intake.next(run.epoch, []):
                taken = given[shard.cid]
                look = trust.look(author, rng.random())
                chance = int(rng.integers(2**32)) if look is Look.ONE else None
                finding, samples, is_looked_into = run.admit(taken, is_checked=look is not Look.NONE, chance=chance)
                if is_looked_into or look is not Look.NONE:
                    if finding.verdict is Verdict.TRUE:
                        trust.found_true(author)
                    found.looked += author in liars
                    found.caught += author in liars and finding.verdict is not Verdict.TRUE
                found.used += author in liars and samples > 0
                if finding.verdict is Verdict.FALSE:
                    intake.shunned.add(author)
                    found.accused += author not in liars
                intake.came(shard.cid)
        run.learn()
        if run.env_steps >= 0.8 * steps and run.epoch % 2 == 0:
            returns.append(run.evaluate())
    found.last = statistics.fmean(returns)
    return found


def row(words: str, some: list[Outcome], clean: float | None) -> str:
    """A line of the table; without the return, where there is none to hold it against."""
    last = statistics.fmean(each.last for each in some)
    looked, caught, used, accused = (sum(getattr(each, name) for each in some) for name in _COUNTS)
    told = "" if clean is None else f"{last:.0f} ({100 * (last / clean - 1):+.0f} %)"
    return f"| {words} | {told} | {caught} of {looked} | {used} | {accused} |"


def cost(task: str, rate: float) -> str:
    """What looking at an actor's shards costs beside its acting: a line.

    Looking is what a learner does to a shard because it looks at it. Opening it and taking it over comes to every
    shard, and is told apart. How often a learner looks is chance, so several learners with chances of their own draw.
    """
    run = Together(task, "ppo", {}, actors=1, late=0, seed=0, batch=2048, check_rate=rate)
    run.share = REAL_SAMPLES
    learners = [(Trust(rate), random.Random(number)) for number in range(LEARNERS)]
    acted, looked, counts = [0.0, 0.0], [0.0, 0.0], [0, 0]
    one_s, taken_s, inside_s = list[float](), list[float](), 0.0
    check = run.admission._check

    def timed(*given: Any) -> Finding:
        nonlocal inside_s
        began = time.process_time()
        found = check(*given)
        inside_s = time.process_time() - began
        return found

    run.admission._check = timed  # type: ignore[method-assign]
    chances = random.Random(-1)
    for number in range(SHARDS):
        (given,) = run.shards()
        half = int(number >= SHARDS // 2)
        acted[half] += given.act_s
        author = given.signer.peer_id
        looks = [trust.look(author, rng.random()) for trust, rng in learners]
        for kind in Look:
            those = [trust for (trust, _), look in zip(learners, looks, strict=True) if look is kind]
            if not those:
                continue
            inside_s, began = 0.0, time.process_time()
            chance = chances.getrandbits(32) if kind is Look.ONE else None
            finding, _, is_looked_into = run.admit(given, is_checked=kind is not Look.NONE, chance=chance)
            assert finding.verdict is Verdict.TRUE, finding
            taken_s.append(time.process_time() - began - inside_s)
            looked[half] += len(those) * inside_s / LEARNERS
            if kind is Look.ONE:
                one_s.append(inside_s)
            for trust in those if is_looked_into else ():
                trust.found_true(author)
                counts[half] += 1
            run.learner.abandon()
    early, late = (f"{n / LEARNERS:.0f} | {100 * b / a:.1f} %" for n, a, b in zip(counts, acted, looked, strict=True))
    of_shard = SHARDS / sum(acted)
    beside = f"{statistics.fmean(one_s) * of_shard:.2f} | {statistics.fmean(taken_s) * of_shard:.2f}"
    of_all = f"**{100 * sum(looked) / sum(acted):.1f} %**"
    return f"| {task.partition(':')[2]} | {early} | {late} | {of_all} | {beside} |"


_COUNTS: Final = ("looked", "caught", "used", "accused")


def main() -> None:
    """Measure, print, and keep if that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--task", default="gym:CartPole-v1")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=1)
    default = Manifest(owner=ME.peer_id, task="gym:x", algorithm="ppo").check_rate
    parser.add_argument("--rate", type=float, default=default, help=f"the least share looked into (default: {default})")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--costs", action="store_true", help="only what looking costs")
    options = parser.parse_args()
    head = ("task", f"looked at of {SHARDS // 2}", "looking ÷ acting", f"of {SHARDS // 2} more", "÷ acting", "of all")
    head += ("a look ÷ acting of a shard", "opening and taking over any shard, likewise")
    costs = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    def tell_costs() -> None:
        print("\n".join(costs), flush=True)
        for task in COSTS:
            costs.append(cost(task, options.rate))
            print(costs[-1], flush=True)

    if options.costs:
        tell_costs()
        return

    def some(rate: float, lie: str, *, is_known: bool, steps: int = options.steps) -> list[Outcome]:
        return [measure(options.task, steps, seed, rate, lie, is_known=is_known) for seed in range(options.seeds)]

    lines = [
        "| lie | looked at | return | caught of looked at | poisoned and used | honest accused |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)

    def tell(words: str, outcomes: list[Outcome], clean: float | None) -> None:
        lines.append(row(words, outcomes, clean))
        print(lines[-1], flush=True)

    honest = some(options.rate, "", is_known=True)
    clean = statistics.fmean(each.last for each in honest)
    tell("nobody | once all are known", honest, clean)
    for lie in LIES:
        tell(f"{lie} | once all are known", some(options.rate, lie, is_known=True), clean)
        tell(f"{lie} | never", some(0.0, lie, is_known=False), clean)
    for lie in LIES:
        tell(f"{lie} | at who is new", some(options.rate, lie, is_known=False, steps=STRANGERS_STEPS), None)
    tell_costs()
    if options.keep:
        text = (
            f"# Poisoners: three of ten actors\n\n`python benchmarks/poisoners.py --task {options.task} --steps "
            f"{options.steps} --seeds {options.seeds} --rate {options.rate}`, Python {platform.python_version()}, "
            f"{platform.machine()}, one thread.\nSee the head of the benchmark. In brackets: beside the run in which "
            f"nobody lies, {clean:.0f}.\n\n"
        )
        RESULT.write_text(text + "\n".join([*lines, "", *costs]) + "\n")


if __name__ == "__main__":
    main()
