"""Adapters of a pretrained language model, averaged: GRPO (arXiv 2402.03300) with LoRA (arXiv 2106.09685) on SmolLM2.

Every node holds the model itself, which never crosses the wire; what is averaged is how far each node's adapters came,
2.8 MiB, by an outer step of 1 without momentum, so that Adam's moments stay where they are. The task is "3 * 7 =",
without examples in the prompt: 64 products, and the first number of the answer counts.

What this shows is that a pretrained model is moved by several nodes together, and no more: held-out prompts are of the
same 64 products as those that are learned from, and four examples in the prompt give the untrained model more than this
training does, so most of what is learned is probably to answer with a number at once. Nodes are held to the adapters'
shapes alone: who holds another base under the same name learns something of little use to the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.training.manifest import Mode
from shoal.training.models.smollm2 import NAME
from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict
from shoal.training.tasks.cast import Everyone
from shoal.training.tasks.games.text import Entry, TextTask
from shoal.training.tasks.source import SharedPrompts

PROMPTS: Final = 16
PLAYS: Final = 8
HELD_OUT: Final = 128
GAIN: Final = 0.08


@dataclass(frozen=True, slots=True)
class SpokenProducts:
    """Products of two numbers from 2 to 9, asked of a model that was not told how to answer."""

    name = "spoken products"

    def entry(self, seed: int) -> Entry:
        """``3 * 7 =``."""
        rng = np.random.default_rng(seed)
        one, other = rng.integers(2, 10, size=2).tolist()
        return {"question": f"{one} * {other} =", "answer": str(one * other)}

    def score(self, answer: str, entry: Entry) -> float:
        """1, if the first number in the answer is the right one."""
        said = re.search(r"[0-9]+", answer)
        return float(said is not None and said[0] == entry["answer"])


def judge(run: Report, baseline: Report) -> Verdict:
    """What is sampled becomes right more often than the untrained model's."""
    sampled, greedy = (run.last(name) - baseline.last(name) for name in ("sampled", "greedy"))
    text = (
        f"on {HELD_OUT} prompts what is sampled is right in {run.last('sampled'):.3f} instead of "
        f"{baseline.last('sampled'):.3f} ({sampled:+.3f}; the bar is {GAIN:+.2f}), and the likeliest answer in "
        f"{run.last('greedy'):.3f} instead of {baseline.last('greedy'):.3f} ({greedy:+.3f})"
    )
    return Verdict(sampled >= GAIN, sampled, 0.0, text)


_HELD_OUT: Final = SharedPrompts(HELD_OUT, seed=1, is_fixed=True)

RECIPE: Final = Recipe(
    name="products",
    summary="adapters of a pretrained language model, averaged",
    paper="arXiv 2106.09685",
    claim="nodes that average nothing but adapters make a pretrained language model right more often",
    game=TextTask(SpokenProducts(), max_tokens=4),
    source=SharedPrompts(PROMPTS, PLAYS),
    cast=Everyone("model"),
    policies={
        "model": Policy(
            model="hf_lora",
            sizes={"folder": NAME, "rank": 8, "targets": ("q_proj", "v_proj", "o_proj"), "context": 64},
            objective="grpo",
            settings={"learning_rate": 1e-3, "outer_learning_rate": 1.0, "outer_momentum": 0.0},
        )
    },
    probes=(Probe("sampled", _HELD_OUT, greedy=False), Probe("greedy", _HELD_OUT)),
    verdict=judge,
    baseline={"policies.model.is_frozen": True, "source.per_epoch": 1, "source.plays": 1},
    epochs=10,
    baseline_epochs=5,
    turns=PROMPTS * PLAYS,
    plays=PROMPTS * PLAYS,
    eval_interval=5,
    mode=Mode.DILOCO,
)
