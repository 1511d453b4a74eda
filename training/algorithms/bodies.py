"""What objectives share that learn from the takes of bodies: advantages of what was done in each, and batches of them.

Advantages are GAE (arXiv 1506.02438) per take, by the code that serves streams (`rollouts.gae`), over all takes one
after the other. A take that was cut off is worth the value of its last sight from there on (Pardo et al., arXiv
1712.00378); every take is over, so none still runs. What a role earned before its first act counts for none of its
acts. The batch's advantages get mean 0 and deviation 1; in mode ``gradient`` over all members' batches.

Log-probabilities of the policy that acted are those that were taken down when it acted, so takes may have begun under
an earlier policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from shoal.training.algorithms.rollouts import gae
from shoal.training.algorithms.settings import setting
from shoal.training.algorithms.takes import TakeSettings
from shoal.training.exchange.averager import Moments
from shoal.training.models.bodies import BodyModel, Ids, Turns
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Take


@dataclass(frozen=True, slots=True, kw_only=True)
class BodySettings(TakeSettings):
    """What can be set of all of them."""

    learning_rate: float = setting(1e-3, "Adam's", 1e-9, 1.0)
    adam_epsilon: float = setting(1e-5, "Adam's", 1e-12, 1.0)
    max_grad_norm: float = setting(0.5, "longer gradients are scaled down to this", 1e-6, 1e9)
    gamma: float = setting(0.99, "discount per turn of a role", 0.0, 1.0)
    reward_scale: float = setting(1.0, "rewards are multiplied by this, so that values are about 1", 1e-9, 1e9)
    entropy_coefficient: float = setting(0.01, "weight of the entropy bonus; 0 for continuous acts", 0.0, 1e6)


@dataclass(frozen=True, slots=True)
class BodyBatch:
    """What an update is made from; each but ``turns`` is ``[S, T]``, and of no meaning where a row is padded.

    Attributes:
        turns: of S rows.
        old: log-probabilities of the acts under the policy that acted.
        advantages: of the acts.
        returns: what the values are to be.
    """

    turns: Turns
    old: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def __len__(self) -> int:
        return len(self.turns)

    def part(self, rows: Ids) -> BodyBatch:
        """Some of the rows."""
        turns = self.turns.part(rows)
        end = turns.is_act.shape[1]
        return BodyBatch(turns, *(each[rows][:, :end] for each in (self.old, self.advantages, self.returns)))

    def moments(self) -> Moments:
        """Of the advantages, as of so many as there are rows."""
        own = Moments.of(self.advantages[self.turns.is_act].numpy())
        return Moments(float(len(self)), own.mean, own.m2 * (len(self) / own.count))

    def normalized(self, moments: Moments) -> BodyBatch:
        """With advantages of mean 0 and deviation 1."""
        normal = (self.advantages - float(moments.mean)) / (float(moments.std) + 1e-8)
        return replace(self, advantages=normal)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Over all acts, of ``[S, T]``."""
        return values[self.turns.is_act].mean()


def batch_of(
    takes: Sequence[Take], model: BodyModel, settings: BodySettings, *, gae_lambda: float, has_values: bool
) -> BodyBatch | None:
    """Takes with advantages; None, if nobody acted.

    Args:
        takes: that are over.
        model: that judges them.
        settings: of the objective.
        gae_lambda: 0 trusts the values alone, 1 the rewards alone.
        has_values: whether there are values; if not, they count as 0, and so does what comes after a cut.
    """
    takes = [take for take in takes if len(take)]
    if not takes:
        return None
    turns = model.encode(takes)
    with torch.no_grad():
        judged = model.evaluate(turns)
    is_act = turns.is_act
    values: Floats = judged.values[is_act].numpy() if has_values else np.zeros(int(is_act.sum()), np.float32)
    last = model.last_values(takes) if has_values else np.zeros(len(takes), np.float32)
    recorded = np.concatenate([np.asarray(take.log_probs, np.float32) for take in takes])
    own: Floats = judged.log_probs[is_act].numpy()
    advantages = take_advantages(takes, values, last, settings, gae_lambda)
    columns = (np.where(np.isnan(recorded), own, recorded), advantages, advantages + values)
    return BodyBatch(turns, *(_placed(column, is_act) for column in columns))


def take_advantages(
    takes: Sequence[Take], values: Floats, last: Floats, settings: BodySettings, gae_lambda: float
) -> Floats:
    """Of every act of all takes, one after the other, ``[n]``.

    Args:
        takes: that are over, each with acts.
        values: ``[n]``, of their sights.
        last: ``[takes]``, what comes after each is worth; counts where it was cut off.
        settings: of the objective.
        gae_lambda: 0 trusts the values alone, 1 the rewards alone.
    """
    ends = np.cumsum([len(take) for take in takes]) - 1
    is_cut: npt.NDArray[np.bool_] = np.array([take.cut for take in takes])
    terminated, truncated = (np.zeros((len(values), 1), np.bool_) for _ in range(2))
    terminated[ends, 0], truncated[ends, 0] = ~is_cut, is_cut
    rewards = np.concatenate([np.asarray(take.rewards, np.float32) for take in takes]) * np.float32(
        settings.reward_scale
    )
    return gae(
        terminated,
        truncated,
        rewards[:, None],
        np.append(values, np.float32(0))[:, None],
        last[is_cut],
        gamma=settings.gamma,
        gae_lambda=gae_lambda,
    )[:, 0]


def _placed(column: Floats, is_act: torch.Tensor) -> torch.Tensor:
    """``[S, T]``, with what belongs to each act in its place."""
    placed = torch.zeros(is_act.shape)
    placed[is_act] = torch.from_numpy(column)
    return placed
