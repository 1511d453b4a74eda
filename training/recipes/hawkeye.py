"""Hawkeye (arXiv 2504.00424): a large model writes a short line of thought, a small one on another node answers by it.

What crosses the wire are the questions with the thoughts, and the answers; the small model never leaves its node's
part, and never learns. The large one is paid for right answers, less what its words cost, so it says what the small one
needs and no more.

Deviations: both are small transformers from scratch in place of pretrained models, taught to add three numbers step by
step, the running sums being the thought; GRPO on the price of words in place of the paper's reward on length and its
distilled data. All nodes hold the small model, so a play goes on by the own copy where nobody answers.

What decides is what is taught first: shorter thoughts have to be come upon, and be right about as often as whole ones,
or the price leads away from them. With an eighth of the demonstrations shortened in place of a third nothing was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from shoal.training.recipes.recipe import Part, Policy, Probe, Recipe, Report, Verdict, Warm
from shoal.training.tasks.cast import Away, ByRole, Learned
from shoal.training.tasks.play import Ask, End, Play, Role, Take, Text
from shoal.training.tasks.source import OwnPrompts, Scenario, SharedPrompts

TERMS: Final = 3
CHAIN: Final = 8
"""Characters of a thought at most."""
TALK: Final = Role(Text(64), Text(64))


@dataclass(frozen=True)
class Guided:
    """Three digits to be added: one thinks, the other answers.

    Attributes:
        price: of each character of a thought.
        budget: characters that it may have.
    """

    price: float = 0.05
    budget: int = CHAIN
    name = "guided sums"

    @property
    def roles(self) -> dict[str, Role]:
        """The one who thinks, and the one who answers."""
        return {"large": TALK, "small": TALK}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """Think, then answer."""
        terms = rng.integers(1, 10, TERMS)
        question = "+".join(map(str, terms))
        (thought,) = yield (Ask("large", question, max_tokens=self.budget),)
        (answer,) = yield (Ask("small", f"{question}|{thought}", max_tokens=2),)
        right = float(answer == str(terms.sum()))
        words = len(str(thought))
        return End(
            {"large": right - self.price * words, "small": right}, scores={"right": right, "tokens": float(words)}
        )


def chain(question: str) -> str:
    """The running sums: ``8,17`` of ``3+5+9``."""
    return ",".join(map(str, list(accumulate(map(int, question.split("+"))))[1:]))


def think(take: Take) -> str:
    """What the large one is taught: whole chains, and the last sum alone of every third, so that it comes upon that."""
    if take.role == "small":
        return _last(take.sights[-1])
    whole = chain(take.sights[-1])
    return _last(whole) if take.scenario.seed % 3 == 0 else whole


def think_less(take: Take) -> str:
    """What the small one is taught by: chains of any length."""
    if take.role == "small":
        return _last(take.sights[-1])
    parts = chain(take.sights[-1]).split(",")
    return ",".join(parts[take.scenario.seed // 4 % len(parts) :])


def _last(sight: str) -> str:
    """The last number of the thought, or of the question."""
    return str(re.findall(r"\d+", sight)[-1])


def judge(run: Report, baseline: Report) -> Verdict:
    """As right as by the whole chain, at half of its words."""
    right = run.last("right", of=2) / max(run.first("right"), 1e-9)
    words = run.last("tokens", of=2) / max(run.first("tokens"), 1e-9)
    unpaid = baseline.last("tokens", of=2) / max(baseline.first("tokens"), 1e-9)
    text = (
        f"{right:.0%} of the accuracy that whole chains give, at {words:.0%} of their length (the bars are 95 % and "
        f"50 %); with words that cost nothing, at {unpaid:.0%}"
    )
    return Verdict(right >= 0.95 and words <= 0.5, words, unpaid, text)


PROBED: Final = SharedPrompts(128, seed=1, is_fixed=True)
RECIPE: Final = Recipe(
    name="hawkeye",
    version=2,
    summary="a large model thinks in few words, a small one on another node answers by them",
    paper="arXiv 2504.00424",
    claim="a thought of half the length serves a small model on another node as well as the whole one",
    game=Guided(price=0.15),
    source=OwnPrompts(64, 8),
    cast=ByRole(large="large", small=Away("small", "small", otherwise=Learned("small"))),
    policies={
        "large": Policy(
            model="tokens",
            sizes={"width": 96, "layers": 2, "context": 32},
            objective="grpo",
            settings={"learning_rate": 2e-4},
            warm=Warm(
                think,
                roles=("large",),
                until=0.75,
                settings={"learning_rate": 2e-3},
                takes=128,
                score="right",
                max_steps=1500,
            ),
        ),
        "small": Policy(
            model="tokens",
            sizes={"width": 32, "layers": 2, "context": 48},
            objective="clone",
            is_frozen=True,
            warm=Warm(
                think_less, roles=("small",), until=0.9, settings={"learning_rate": 4e-3}, takes=128, score="right"
            ),
        ),
    },
    parts={"large": Part(trains=("large",)), "small": Part(trains=(), acts=False, answers=("small",))},
    probes=(Probe("right", PROBED, score="right"), Probe("tokens", PROBED, score="tokens")),
    verdict=judge,
    baseline={"game.price": 0.0},
    epochs=80,
    turns=512,
    plays=128,
)
