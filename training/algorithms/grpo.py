"""Group-relative policy optimisation (Shao et al., arXiv 2402.03300): advantages from several plays of one scenario.

The plays of one scenario (one seed, tag and role) are a group; the advantage of a play is its reward less the group's
mean, the same for every token of its acts. The loss is PPO's clipped one, token by token.

Deviations, which are standard by now: the advantage is not divided by the group's deviation, which favours scenarios
that are nearly always or never solved, and a sequence is not divided by its own length, which favours long failures
(Dr. GRPO, arXiv 2503.20783; ``scale_by_deviation`` and ``divide_by_length`` bring both back); the ratio may rise
further than it may fall (DAPO's clip-higher, arXiv 2503.14476). There is no penalty for leaving a reference policy,
unless ``kl_coefficient`` asks for one; the reference is the policy that this learner began with. Log-probabilities of
the policy that acted are those of the parameters with which the update begins. Of a model of a body without memory
every act is a sequence of its own, with the advantage of its take; ``divide_by_length`` divides by the take's length.

Where nodes share their plays (mode ``rollouts``), some are of earlier policies. ``correction`` says how they count:
``none`` as if the newest had played them, as in SAPO (arXiv 2509.08721); ``group_expectation`` by GEPO's weights
(arXiv 2508.17850, `shoal.training.rollouts.staleness`): a sequence has one ratio, of its probability to the expectation
over its group of what the probabilities were when it was played, and that ratio is clipped. Deviation: whose reward is
its group's mean is not in the expectation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.settings import setting
from shoal.training.algorithms.takes import TakeSettings
from shoal.training.effects import Effect
from shoal.training.models.text import Ids, Sequences, TextModel
from shoal.training.rollouts.staleness import group_expectation
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News


class GroupCorrection(StrEnum):
    """How plays of earlier policies count."""

    NONE = "none"
    GROUP_EXPECTATION = "group_expectation"


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSettings(TakeSettings):
    """What can be set of it."""

    clip_range: float = setting(0.2, "how far the ratio of a token's probabilities may fall below 1", 1e-6, 1.0)
    clip_range_high: float = setting(0.28, "and rise above it", 1e-6, 100.0)
    kl_coefficient: float = setting(0.0, "weight of the divergence from the policy at the beginning", 0.0, 1e3)
    scale_by_deviation: bool = setting(False, "divide advantages by their group's standard deviation")
    divide_by_length: bool = setting(False, "divide a sequence's loss by its own length")
    correction: GroupCorrection = setting(
        GroupCorrection.NONE, "how plays of earlier policies count: none, or group_expectation (GEPO)"
    )


@dataclass(frozen=True, slots=True)
class GRPOBatch:
    """What an update is made from.

    Attributes:
        sequences: of S takes.
        old: ``[S, T]``, log-probabilities of the tokens that were chosen.
        reference: the same under the policy at the beginning; empty, if it does not count.
        advantages: ``[S]``.
        weights: ``[S]``, by which the terms of each count.
        begun: ``[S]``, the ratio of each as the update begins; empty, if tokens have ratios of their own, from 1.
    """

    sequences: Sequences
    old: torch.Tensor
    reference: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    begun: torch.Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def part(self, rows: Ids) -> GRPOBatch:
        """Some of the takes."""
        sequences = self.sequences.part(rows)
        length = sequences.is_act.shape[1]
        reference = self.reference[rows][:, :length] if len(self.reference) else self.reference
        begun = self.begun[rows] if len(self.begun) else self.begun
        own = (self.advantages[rows], self.weights[rows], begun)
        return GRPOBatch(sequences, self.old[rows][:, :length], reference, *own)


class GRPO:
    """The objective called ``grpo``."""

    name = "grpo"
    version = 1
    num_exchanges = 0
    summary = "advantages from several plays of one scenario; for language models and bodies"
    paper = "arXiv 2402.03300"
    settings_type: type[GRPOSettings] = GRPOSettings

    def __init__(self, settings: GRPOSettings) -> None:
        self.settings = settings
        self._first: Floats | None = None  # parameters at the beginning

    def prepare(
        self, takes: Sequence[Take], model: TextModel, news: News
    ) -> Generator[Exchange | Effect, Any, GRPOBatch | None]:
        """Rewards are what the plays' roles earned."""
        yield from ()
        return self.batch(takes, np.array([take.earned for take in takes], np.float32), model)

    def batch(self, takes: Sequence[Take], rewards: Floats, model: TextModel) -> GRPOBatch | None:
        """Takes with rewards ``[S]``; None, if there is nothing to learn from them."""
        return self.advised(takes, group_advantages(takes, rewards, scale=self.settings.scale_by_deviation), model)

    def advised(self, takes: Sequence[Take], advantages: Floats, model: TextModel) -> GRPOBatch | None:
        """Takes with advantages ``[S]``; None, if there is nothing to learn from them."""
        if self._first is None and self.settings.kl_coefficient:
            self._first = model.flat.copy()
        used = [index for index, take in enumerate(takes) if len(take) and advantages[index] != 0]
        if not used:
            return None
        sequences = model.encode([takes[index] for index in used])
        with torch.no_grad():
            old = model.log_probs(sequences)
            reference = torch.zeros(0)
            if self._first is not None:
                now = model.flat.copy()
                model.flat[:] = self._first
                reference = model.log_probs(sequences)
                model.flat[:] = now
        chosen = torch.from_numpy(advantages[used])
        weights = torch.ones(len(used))
        if len(sequences) > len(used):  # of a body without memory: a row for each act
            lengths = torch.tensor([len(takes[index]) for index in used])
            if self.settings.divide_by_length:
                weights = lengths.float().mean() / lengths
            chosen, weights = chosen.repeat_interleave(lengths), weights.repeat_interleave(lengths)
        begun = torch.zeros(0)
        if self.settings.correction is GroupCorrection.GROUP_EXPECTATION:
            begun = _begun([takes[index] for index in used], sequences, old)
        return GRPOBatch(sequences, old, reference, chosen, weights, begun)

    def loss(self, model: TextModel, batch: GRPOBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean over the sequences, and what is worth knowing."""
        settings, is_act = self.settings, batch.sequences.is_act
        log_probs = model.log_probs(batch.sequences)
        lengths = is_act.sum(dim=1).clamp(min=1)
        if len(batch.begun):
            moved = ((log_probs - batch.old) * is_act).sum(dim=1) / lengths
            ratio = (batch.begun * torch.exp(moved))[:, None].expand_as(log_probs)
        else:
            ratio = torch.exp(log_probs - batch.old)
        clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range_high)
        advantages = batch.advantages[:, None]
        terms = -torch.minimum(ratio * advantages, clipped * advantages)
        if settings.kl_coefficient and len(batch.reference):
            away = batch.reference - log_probs
            terms = terms + settings.kl_coefficient * (torch.exp(away) - away - 1)  # Schulman's third estimator
        terms = terms * batch.weights[:, None] * is_act
        total = terms.sum(dim=1) / (lengths if settings.divide_by_length else lengths.float().mean())
        loss = total.mean()
        count = is_act.sum().clamp(min=1)
        with torch.no_grad():
            measures = {
                "loss": float(loss.detach()),
                "clipped": float(((ratio != clipped) & is_act).sum() / count),
                "log_prob": float((log_probs * is_act).sum() / count),
            }
        return loss, measures


def _begun(takes: Sequence[Take], sequences: Sequences, old: torch.Tensor) -> torch.Tensor:
    """GEPO's ratio of each take as the update begins, ``[S]``.

    Raises:
        UsageError: if a take is more than one sequence.
    """
    if len(sequences) != len(takes):
        raise UsageError(
            "the correction group_expectation weighs whole sequences, and of a body without memory every act is one of "
            "its own; set correction none"
        )
    lengths = sequences.is_act.sum(dim=1).numpy()
    now = (old * sequences.is_act).sum(dim=1).numpy()
    acted = np.array([sum(take.log_probs) for take in takes], np.float32)
    acted = np.where(np.isnan(acted), now, acted)  # of others' acts that nobody vouches for, it is not known
    groups = np.zeros(len(takes), np.int64)
    for number, members in enumerate(_groups(takes)):
        groups[members] = number
    return torch.from_numpy(group_expectation(now, acted, groups, lengths=lengths))


def _groups(takes: Sequence[Take]) -> list[list[int]]:
    """Indices of takes of one scenario."""
    groups: defaultdict[tuple[int, str, str], list[int]] = defaultdict(list)
    for index, take in enumerate(takes):
        groups[take.scenario.seed, take.scenario.tag, take.role].append(index)
    return list(groups.values())


def group_advantages(takes: Sequence[Take], rewards: Floats, *, scale: bool = False) -> Floats:
    """``[S]``: of each take's reward ``[S]`` what is above the mean of its scenario's; 0 where one stands alone."""
    advantages = np.zeros(len(takes), np.float32)
    for members in _groups(takes):
        own = rewards[members].astype(np.float64)
        away = own - own.mean()
        advantages[members] = away / (own.std() + 1e-4) if scale else away
    return advantages
