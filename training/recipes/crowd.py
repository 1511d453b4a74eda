"""How `rlccf` learns: GRPO on the answer of the crowd, and on each policy's own alone, which it is held against."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from shoal.protocol.errors import ProtocolError
from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.grpo import GRPO, GRPOBatch, GRPOSettings
from shoal.training.algorithms.settings import setting
from shoal.training.exchange.averager import Arrays
from shoal.training.models.text import TextModel
from shoal.training.tasks.games.text import sorted_digits
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News, Plain, SharedPrompts

FIRST, LAST = 5, 10
"""Epochs over which it is counted how often the crowd is right."""
HASH_BITS: Final = 26
NOBODY: Final = 0
"""The hash of no answer at all, and of one of no form."""

Ballots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrowdSettings(GRPOSettings):
    """What can be set of it."""

    prompts: int = setting(48, "scenarios of an epoch, as the source draws them", 1, 4096)
    plays: int = setting(8, "of each", 2, 1024)


class CrowdGRPO(GRPO):
    """GRPO whose reward is the crowd's answer.

    How often the crowd is right is told beside the losses, on prompts that nobody has learned from yet, and nothing
    learns from that: ``vote_first`` over the first epochs, ``vote`` over the last.
    """

    name = "crowd-grpo"
    num_exchanges = 1
    settings_type: type[Any] = CrowdSettings
    settings: CrowdSettings

    def __init__(self, settings: CrowdSettings) -> None:
        super().__init__(settings)
        self._votes: list[float] = []  # how much of the crowd's answers was right, in the first epochs and the last

    def memory(self) -> dict[str, Plain]:
        """How often the crowd was right."""
        return {"votes": list(self._votes)}

    def remember(self, memory: Mapping[str, Plain]) -> None:
        """Likewise."""
        votes = memory.get("votes", [])
        if not isinstance(votes, list) or len(votes) > FIRST + LAST or not all(type(each) is float for each in votes):
            raise ProtocolError("no votes are remembered so; begin anew")
        self._votes = list(votes)

    def loss(self, model: TextModel, batch: GRPOBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """GRPO's, and how often the crowd is right."""
        loss, measures = super().loss(model, batch)
        first, last = (float(np.mean(votes)) if votes else 0.0 for votes in (self._votes[:FIRST], self._votes[-LAST:]))
        return loss, {**measures, "vote_first": first, "vote": last}

    def prepare(
        self, takes: Sequence[Take], model: TextModel, news: News
    ) -> Generator[Exchange, Arrays, GRPOBatch | None]:
        """Ask the crowd, and reward who agrees with it."""
        settings = self.settings
        own = np.full((settings.prompts, settings.plays), NOBODY, np.int64)
        prompt_of = self._prompts(news)
        given: Counter[int] = Counter()
        places: list[tuple[int, int] | None] = []
        truth: dict[int, int] = {}
        for take in takes:
            prompt, play = prompt_of.get(take.scenario.seed), given[take.scenario.seed]
            given[take.scenario.seed] += 1
            is_asked = prompt is not None and play < settings.plays and len(take.acts) > 0
            places.append((prompt, play) if is_asked and prompt is not None else None)
            if is_asked and prompt is not None:
                own[prompt, play] = hash_of(take.acts[-1])
                truth[prompt] = hash_of(sorted_digits(take))
        ballots: Arrays = {"each/answers": packed(own)}
        merged = yield Exchange(ballots if takes else {}, float(len(takes)), ballots)
        if not merged or not takes:
            return None
        labels = crowd(unpacked(merged["each/answers"].astype(np.int64), settings.plays))
        self._count(float(np.mean([labels[prompt] == right for prompt, right in truth.items()] or [0.0])))
        rewards = [float(place is not None and own[place] == labels[place[0]] != NOBODY) for place in places]
        return self.batch(takes, np.array(rewards, np.float32), model)

    def _count(self, vote: float) -> None:
        self._votes.append(vote)
        if len(self._votes) > FIRST + LAST:
            del self._votes[FIRST]

    def _prompts(self, news: News) -> dict[int, int]:
        """The number of each scenario of the epoch, by its seed."""
        source, rng = SharedPrompts(self.settings.prompts), np.random.default_rng(0)
        drawn = (source.draw(replace(news, drawn=number), rng) for number in range(self.settings.prompts))
        return {scenario.seed: number for number, scenario in enumerate(drawn) if scenario is not None}


class OwnVote(CrowdGRPO):
    """The same by each policy's own vote alone: what it is held against."""

    name = "own-vote-grpo"
    num_exchanges = 0

    def prepare(
        self, takes: Sequence[Take], model: TextModel, news: News
    ) -> Generator[Exchange, Arrays, GRPOBatch | None]:
        """Ask nobody."""
        asking = super().prepare(takes, model, news)
        own = next(asking)
        try:
            asking.send({name: array[None] for name, array in own.arrays.items()})
        except StopIteration as end:
            batch: GRPOBatch | None = end.value
            return batch
        yield from ()
        return None


def crowd(answers: Ballots) -> npt.NDArray[np.int64]:
    """What the crowd says of each prompt, ``[P]``, by answers ``[authors, P, plays]``.

    A policy's vote for an answer is how often it gave it, times how often it gave its most frequent one. Where nobody
    says anything, it is `NOBODY`.
    """
    labels = np.full(answers.shape[1], NOBODY, np.int64)
    for prompt in range(answers.shape[1]):
        votes: Counter[int] = Counter()
        for author in range(answers.shape[0]):
            counts = Counter(answers[author, prompt].tolist())
            del counts[NOBODY]
            confidence = max(counts.values(), default=0) / answers.shape[2]
            for answer, count in counts.items():
                votes[answer] += round(1e6 * confidence * count)
        if votes:
            labels[prompt] = max(votes, key=lambda answer: (votes[answer], answer))
    return labels


def hash_of(answer: str) -> int:
    """Of an answer, 26 bits; `NOBODY` of one that is empty.

    Two of the answers to one prompt, of which there are dozens, look alike once in some 10,000 epochs.
    """
    text = answer.strip()
    if not text:
        return NOBODY
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 32 - HASH_BITS or 1


def packed(answers: Ballots) -> Ballots:
    """Hashes ``[P, plays]``, two in each number of at most 52 bits, ``[P, ceil(plays / 2)]``."""
    even = np.pad(answers, ((0, 0), (0, answers.shape[1] % 2)), constant_values=NOBODY)
    return even[:, ::2] << HASH_BITS | even[:, 1::2]


def unpacked(ballots: Ballots, plays: int) -> Ballots:
    """The inverse of all authors' ``[authors, P, ceil(plays / 2)]``: ``[authors, P, plays]``, of any numbers."""
    both = np.stack([ballots >> HASH_BITS, ballots & (1 << HASH_BITS) - 1], axis=-1)
    return both.reshape(*ballots.shape[:2], -1)[:, :, :plays]
