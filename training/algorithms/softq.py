"""Inverse soft Q-learning of each of several agents by a critic that is marginal over the others: ``softq``.

From IQ-Learn (Garg et al., arXiv 2106.12142; its loss as its authors published it): a policy is the softmax of a soft Q
over a temperature τ, V(s) = τ log Σ exp(Q(s, a) / τ), and what Q implies as reward of a step is r = Q(s, a) - g V(s').
The loss is

    -E[r over demonstrated turns] + E[V(s) - g V(s')] + E[r²] / 4a,

the last term being the regulariser of the χ² divergence. The second and third are over demonstrated turns and over the
policies' own, half and half; without own turns, which is the offline form, over what was demonstrated. No reward of
the game is ever used.

From MAMQL (Haynam et al., arXiv 2503.04679): each agent's critic is marginal over the policies of the others, Q̄_i(s,
a_i) = E[Q_i(s, a_i, a_-i)], a_-i being drawn from them, and its policy a Boltzmann distribution of that, so that the
single agent's criterion holds for each. Here that is so by construction: ``decide`` of a model is Q̄ / τ, and Q_i(s,
a_i, a_-i) = Q̄_i + B(s, a_i, a_-i) - E[B(s, a_i, ·)], where B is ``beside`` of the model (its size ``others``), linear
in who does what, so that the expectation over the others' present policies is exact. A model without it (``others`` 0)
is IQ-Learn for each agent alone: what the others do is part of what comes next.

Taken from MAMQL's abstract and summary: marginal critics, Boltzmann policies, the criterion of IQ-Learn. Its text and
its code could not be had, so the following may differ from it: that Q_i is put together so (what several others add is
added up in pairs with the own act); that the expectation of V(s') is that of the one step that was seen; that there
is no target network; that rewards are read off Q_i directly and not fitted by a regression of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.settings import setting
from shoal.training.algorithms.takes import TakeSettings
from shoal.training.exchange.averager import Arrays
from shoal.training.models.bodies import BodyModel, Ids, Turns, following
from shoal.training.tasks.base import Discrete, Floats
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftQSettings(TakeSettings):
    """What can be set of it."""

    learning_rate: float = setting(2e-3, "Adam's", 1e-9, 1.0)
    adam_epsilon: float = setting(1e-5, "Adam's", 1e-12, 1.0)
    num_minibatches: int = setting(20, "optimiser steps per pass", 1, 65536)
    max_grad_norm: float = setting(5.0, "longer gradients are scaled down to this", 1e-6, 1e9)
    gamma: float = setting(0.95, "discount per turn of a role", 0.0, 1.0)
    temperature: float = setting(0.1, "of the policy: how much worse an act may be that is taken still", 1e-6, 1e6)
    bound: float = setting(0.5, "of the divergence: rewards are drawn to at most twice this", 1e-6, 1e9)
    kept: int = setting(10, "updates whose own turns are used", 1, 1000)


@dataclass(frozen=True, slots=True)
class Steps:
    """Turns of one role, each with what came after it.

    Attributes:
        turns: ``[n, 1]``, of a model without memory.
        after: what was seen next.
        goes_on: ``[n]``, 0 where the play ended.
        others: ``[n, 1, k]``, of every kind of act of the others whether it was done, less how likely it was.
        earned: ``[n]``, by the game; for measures alone.
    """

    turns: Turns
    after: Turns
    goes_on: torch.Tensor
    others: torch.Tensor
    earned: torch.Tensor

    def __len__(self) -> int:
        return len(self.turns)

    def part(self, rows: Ids) -> Steps:
        """Some of them."""
        rest = (self.goes_on[rows], self.others[rows], self.earned[rows])
        return Steps(self.turns.part(rows), self.after.part(rows), *rest)


@dataclass(frozen=True, slots=True)
class SoftQBatch:
    """What was demonstrated, and the own turns. It is as long as these, or as the former if there are none."""

    shown: Steps
    own: Steps | None

    def __len__(self) -> int:
        return len(self.shown if self.own is None else self.own)

    def part(self, rows: Ids) -> SoftQBatch:
        """Some own turns, and as many that were demonstrated, one after the other."""
        own = None if self.own is None else self.own.part(rows)
        return SoftQBatch(self.shown.part(np.asarray(rows) % len(self.shown)), own)


class SoftQ:
    """The objective called ``softq``. Takes that are not proven are demonstrations, all others its policy's own."""

    name = "softq"
    version = 1
    num_exchanges = 0
    summary = "rewards and a policy from demonstrations, by a soft Q that is marginal over the other agents; for bodies"
    paper = "arXiv 2503.04679, on arXiv 2106.12142"
    settings_type: type[SoftQSettings] = SoftQSettings

    def __init__(self, settings: SoftQSettings) -> None:
        self.settings = settings
        self._own: deque[list[Take]] = deque(maxlen=settings.kept)
        self._newest: list[Take] | None = None  # of the update under way
        self._beside: dict[Take, list[Take]] = {}
        self._policies: Mapping[str, Any] = {}

    def meet(self, takes: Iterable[Take], policies: Mapping[str, Any]) -> None:
        """Be told what all did in the plays that are learned from, and by which policies; see `Mindful`."""
        by_play: dict[tuple[bool, int], list[Take]] = {}
        for take in takes:
            by_play.setdefault((take.proven, take.play), []).append(take)
        kept = {take for update in self._own for take in update}
        self._beside = {take: others for take, others in self._beside.items() if take in kept}
        for together in by_play.values():
            for take in together:
                self._beside[take] = [other for other in together if other is not take]
        self._policies = policies

    def prepare(
        self, takes: Sequence[Take], model: BodyModel, news: News
    ) -> Generator[Exchange, Arrays, SoftQBatch | None]:
        """What came after each turn, and what the others did; None without demonstrations."""
        yield from ()
        used = [take for take in takes if len(take)]
        shown = [take for take in used if not take.proven]
        self._newest = [take for take in used if take.proven]
        if not shown:
            return None
        earlier = list(self._own)[-(self.settings.kept - 1) :] if self.settings.kept > 1 else []
        own = [take for update in [*earlier, self._newest] for take in update]
        return SoftQBatch(self.steps(model, shown), self.steps(model, own) if own else None)

    def used(self) -> None:
        """Keep the own turns of the update that is done; see `Keeping`."""
        if self._newest is not None:
            self._own.append(self._newest)
            self._newest = None

    def loss(self, model: BodyModel, batch: SoftQBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """See the head of this module."""
        parts = [batch.shown] if batch.own is None else [batch.shown, batch.own]
        found = [self._judged(model, part) for part in parts]
        rewards = [each[0] for each in found]
        value = torch.stack([(each[1] - each[2]).mean() for each in found]).mean()
        size = torch.stack([each.square().mean() for each in rewards]).mean()
        loss = value - rewards[0].mean() + size / (4 * self.settings.bound)
        with torch.no_grad():
            shown = model.log_probs(batch.shown.turns).mean()
            measures = {
                "loss": float(loss.detach()),
                "shown_reward": float(rewards[0].detach().mean()),
                "log_prob": float(shown),
            }
            if batch.own is not None:
                measures["own_reward"] = float(rewards[1].detach().mean())
        return loss, measures

    @torch.no_grad()
    def rewards(self, model: BodyModel, steps: Steps) -> Floats:
        """What the critic implies that each step earned, ``[n]``."""
        found: Floats = self._judged(model, steps)[0].numpy()
        return found

    def steps(self, model: BodyModel, takes: Sequence[Take]) -> Steps:
        """Of takes that are over, each with acts.

        Raises:
            UsageError: if the model remembers, acts by numbers, or others did not act whenever this role did.
        """
        if model.is_recurrent or not isinstance(model.acts, Discrete):
            raise UsageError("softq learns acts of a few kinds, by models without memory; take mlp or entities")
        turns, after, goes_on = following(model, takes)
        earned = np.concatenate([np.asarray(take.rewards, np.float32) for take in takes])
        return Steps(turns, after, goes_on, self._others(model, takes), torch.from_numpy(earned))

    def _judged(self, model: BodyModel, steps: Steps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rewards, V(s) and g V(s'), each ``[n]``."""
        settings = self.settings
        logits = model.logits(steps.turns)
        worth = settings.temperature * logits
        if steps.others.shape[-1]:
            worth = worth + model.beside(steps.turns, steps.others)  # type: ignore[attr-defined]  # who has `others`
        chosen = worth.gather(-1, steps.turns.acts[..., None])[:, 0, 0]
        value = settings.temperature * torch.logsumexp(logits, dim=-1)[:, 0]
        then = settings.temperature * torch.logsumexp(model.logits(steps.after), dim=-1)[:, 0]
        then = settings.gamma * steps.goes_on * then
        return chosen - then, value, then

    @torch.no_grad()
    def _others(self, model: BodyModel, takes: Sequence[Take]) -> torch.Tensor:
        """See `Steps`: ``[n, 1, k]``, the others one after the other in the order of their roles."""
        size = getattr(model, "others", 0)
        if not size:
            return torch.zeros((sum(map(len, takes)), 1, 0))
        rows = []
        for take in takes:
            others = self._beside.get(take, [])
            if any(len(other) != len(take) for other in others):
                raise UsageError("softq with others needs a game in which all act at once; set the model's others to 0")
            columns = [self._surprise(other) for other in others]
            if sum(column.shape[1] for column in columns) != size:
                raise UsageError(
                    f"the others of {take.role!r:.80} do not have {size} kinds of acts; set others to that"
                )
            rows.append(torch.cat(columns, dim=1))
        return torch.cat(rows)[:, None]

    def _surprise(self, take: Take) -> torch.Tensor:
        """``[T, count]``: what was done, less how likely it was; nothing of who is no policy, and so does as it did."""
        model = self._policies.get(take.seat.policy) if isinstance(take.seat, Learned) else None
        space = take.spaces.acts
        count = space.count if isinstance(space, Discrete) else 0
        if model is None or not count:
            return torch.zeros((len(take), count))
        likely = functional.softmax(model.logits(model.encode([take])), dim=-1)[:, 0]
        return functional.one_hot(torch.tensor(take.acts), count) - likely
