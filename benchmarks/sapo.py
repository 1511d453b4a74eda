"""What others' plays are worth to a small language model: SAPO's direction (arXiv 2509.08721), with a liar.

    python benchmarks/sapo.py [--epochs 60] [--seeds 2] [--apart]

Four nodes, each with a transformer of its own that nobody's is averaged with, learn to sort digits by GRPO. An update
is made from 128 plays, of which a part is others'; a node plays so many fewer itself. So at every ratio a node takes
the same optimiser steps on as many plays, and at a ratio of 0 it is alone; beside it stands one that is alone with half
as many plays. All begin with one model that was taught a little, as SAPO's nodes with one base model; ``--apart``: each
with one of its own. The learners, the shards, what is looked
into and the sampler are those of a node; the network is left out, and all run in this process
(`training/recipes/local.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer
from shoal.training.effects import Give
from shoal.training.manifest import Mode
from shoal.training.recipes.installed import load_recipe
from shoal.training.recipes.local import Company
from shoal.training.recipes.recipe import Probe, Recipe, Warm
from shoal.training.recipes.sharing import Sharing
from shoal.training.rollouts.evidence import Finding, Verdict
from shoal.training.rollouts.replaying import again
from shoal.training.tasks.games.text import SortDigits, TextTask, sorted_digits
from shoal.training.tasks.source import OwnPrompts, SharedPrompts

NODES = 4
PROMPTS, PLAYS = 16, 8
DIGITS = 5
RATIOS = (0.0, 0.25, 0.5, 0.75)
RESULTS = Path(__file__).parent / "results" / "sapo.md"


def a_recipe(until: float, prompts: int) -> Recipe:
    """``sorting``, smaller, and each node's policy its own."""
    sorting = load_recipe("sorting")
    policy = replace(
        sorting.policies["solver"],
        sizes={"width": 64, "layers": 2, "context": 2 * DIGITS + 4},
        settings={"learning_rate": 3e-4},
        warm=Warm(sorted_digits, until=until, settings={"learning_rate": 1e-3}),
        owner="own",
        is_varied=True,
    )
    held_out = SharedPrompts(256, seed=1, is_fixed=True)
    return replace(
        sorting,
        game=TextTask(SortDigits(DIGITS), max_tokens=DIGITS),
        source=OwnPrompts(prompts, PLAYS),
        policies={"solver": policy},
        probes=(Probe("sampled", held_out, greedy=False),),
        turns=prompts * PLAYS,
        plays=prompts * PLAYS,
        mode=Mode.ROLLOUTS,
    )


@dataclass
class Outcome:
    """Of one run, of its honest nodes."""

    cumulated: float
    first: float
    last: float
    own: float
    foreign: float
    refused: int
    used_of_liar: int
    cpu_s: float
    check_s: float


def keys_of(seed: int) -> list[Signer]:
    made = (Signer(bytes([seed + 1, number + 1]) * 16) for number in range(NODES))
    return sorted(made, key=lambda key: key.peer_id)


def inverted(given: Give) -> Give:
    """False rewards: what is wrong is right."""
    return replace(given, columns={**given.columns, "rewards": np.float32(1) - given.columns["rewards"]})


def believing(self: Sharing, shard: object, plays: Sequence[object], redrawn: object) -> Finding:
    """In place of `Sharing._check`: what was shown is had again, and rewards are believed, as SAPO does."""
    for play in plays:
        replayed = {take.role: take for take in again(self._recipe.game, play).played.takes}
        for part in play.parts:
            part.take.sights = replayed[part.take.role].sights
    return Finding(Verdict.TRUE)


def run(ratio: float, seed: int, given: argparse.Namespace, *, prompts: int = PROMPTS, lies: bool = False) -> Outcome:
    recipe, keys, epochs = a_recipe(given.until, prompts), keys_of(seed), given.epochs
    names = [key.peer_id for key in keys]
    liar = names[0] if lies else None
    honest = [name for name in names if name != liar]

    def tamper(name: PeerId, given: Give) -> Give:
        return inverted(given) if name == liar else given

    check_s, checking = 0.0, Sharing.admit

    def timed(self: Sharing, *given: object, **more: object) -> object:
        nonlocal check_s
        began = time.process_time()
        found = checking(self, *given, **more)
        check_s += time.process_time() - began
        return found

    Sharing.admit = timed
    company = Company(recipe, names, seed, keys=keys, tamper=tamper, foreign_ratio=ratio)
    cumulated, played, learned, of_liar = 0.0, 0, 0, 0
    first = last = 0.0
    began = time.process_time()
    try:
        for epoch in range(epochs + 1):
            earned: list[float] = []
            for name, learner in company.learners.items():
                while learner.samples < recipe.turns:
                    found = learner.collect(recipe.turns - learner.samples)
                    if name in honest:
                        earned += found.episode_returns
            company.update()
            if epoch == 0:  # they were taught, and played nothing
                if not given.apart:
                    begin_alike(company)
                first = probe(company, honest)
                began = time.process_time()
                continue
            cumulated += statistics.fmean(earned)
            played += len(earned)
            used = [each for name in honest for each in company.learners[name].learned_from]
            learned += sum(samples for _, _, samples in used)
            of_liar += sum(samples for author, _, samples in used if author == liar)
    finally:
        Sharing.admit = checking
    cpu_s = time.process_time() - began
    last = probe(company, honest)
    refused = sum(found.verdict is Verdict.FALSE for _, author, found in company.findings)
    wrongly = [author for _, author, found in company.findings if found.verdict is Verdict.FALSE and author != liar]
    assert not wrongly, f"honest nodes were accused: {wrongly}"
    nodes = len(honest) * epochs
    return Outcome(cumulated, first, last, played / nodes, learned / nodes, refused, of_liar, cpu_s, check_s)


def begin_alike(company: Company) -> None:
    """All go on with what the first was taught."""
    first, *others = (learner._trainees["solver"].model for learner in company.learners.values())
    for model in others:
        model.flat[:] = first.flat


def probe(company: Company, names: Sequence[PeerId]) -> float:
    return statistics.fmean(statistics.fmean(company.learners[name].evaluate(1, 1)) for name in names)


def row(words: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, words))} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--apart", action="store_true", help="each begins with a model of its own")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--until", type=float, default=0.1, help="accuracy that each is taught before")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--no-liar", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    text = row(
        ["foreign", "seed", "plays, own + others'", "taught", "at the end", "rewards cumulated", "against alone"]
    )
    text += row(["---"] * 7)
    alone: dict[int, float] = {}
    rows = [(ratio, PROMPTS) for ratio in given.ratios]
    for ratio, prompts in [*rows[:1], (0.0, PROMPTS // 2), *rows[1:]]:
        for seed in seeds:
            found = run(ratio, seed, given, prompts=prompts)
            alone.setdefault(seed, found.cumulated)
            gain = f"{found.cumulated / alone[seed] - 1:+.0%}"
            sizes = f"{found.own:.0f} + {found.foreign:.0f}"
            line = row([ratio, seed, sizes, f"{found.first:.3f}", f"{found.last:.3f}", f"{found.cumulated:.2f}", gain])
            print(line, f"{found.cpu_s:.1f} CPU-s, of them {found.check_s:.1f} looking into shards", flush=True)
            text += line
    lying = ""
    if not given.no_liar:
        lying = row(["one of four lies", "seed", "false shards found", "its plays learned from", "at the end"])
        lying += row(["---"] * 5)
        honest_check = Sharing._check
        for words, check in (("looked into", honest_check), ("believed, as SAPO does", believing)):
            Sharing._check = check
            for seed in seeds:
                found = run(0.5, seed, given, lies=True)
                line = row([words, seed, found.refused, found.used_of_liar, f"{found.last:.3f}"])
                print(line, flush=True)
                lying += line
        Sharing._check = honest_check
    if given.write:
        RESULTS.write_text(f"{text}\n{lying}")


if __name__ == "__main__":
    main()
