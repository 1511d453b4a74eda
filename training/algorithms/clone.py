"""Behaviour cloning: raise the likelihood of what was done, each take by its weight (Pomerleau, 1991).

Takes are demonstrations: of a script, of a person, of another policy, or a policy's own that were judged good. A take's
weight is what its role earned, or 1 where ``is_weighted`` is off; weights of 0 and below are left out. So with weights
it is the supervised half of reward-weighted regression (Peters and Schaal, 2007) without its exponent.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.settings import setting
from shoal.training.algorithms.takes import TakeSettings
from shoal.training.exchange.averager import Arrays
from shoal.training.models.text import Ids, Sequences, TextModel
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneSettings(TakeSettings):
    """What can be set of it."""

    is_weighted: bool = setting(False, "weigh each take by what its role earned, and leave out what earned nothing")


@dataclass(frozen=True, slots=True)
class CloneBatch:
    """Demonstrations of S takes, with weights ``[S]``."""

    sequences: Sequences
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def part(self, rows: Ids) -> CloneBatch:
        """Some of the takes."""
        return CloneBatch(self.sequences.part(rows), self.weights[rows])


class Clone:
    """The objective called ``clone``."""

    name = "clone"
    version = 1
    num_exchanges = 0
    summary = "imitates what was done, weighted or not"
    paper = "Pomerleau, Neural Computation 3(1), 1991"
    settings_type: type[CloneSettings] = CloneSettings

    def __init__(self, settings: CloneSettings) -> None:
        self.settings = settings

    def prepare(
        self, takes: Sequence[Take], model: TextModel, news: News
    ) -> Generator[Exchange, Arrays, CloneBatch | None]:
        """All takes with acts and a weight."""
        yield from ()
        weights = [take.earned if self.settings.is_weighted else 1.0 for take in takes]
        used = [index for index, take in enumerate(takes) if len(take) and weights[index] > 0]
        if not used:
            return None
        sequences = model.encode([takes[index] for index in used])
        chosen = torch.tensor([weights[index] for index in used], dtype=torch.float32)
        if len(sequences) > len(used):  # of a model without memory every act is a row
            chosen = chosen.repeat_interleave(torch.tensor([len(takes[index]) for index in used]))
        return CloneBatch(sequences, chosen)

    def loss(self, model: TextModel, batch: CloneBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy, the weighted mean over the tokens of acts."""
        weights = batch.weights[:, None] * batch.sequences.is_act
        loss = -(model.log_probs(batch.sequences) * weights).sum() / weights.sum().clamp(min=1e-6)
        return loss, {"loss": float(loss.detach())}
