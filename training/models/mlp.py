"""Two networks of tanh units, one that acts and one that values: what classic control and particles need.

A third one may say what the acts of others add to what one's own are worth (``beside/*``), for objectives that ask.

The initial values differ from those of `shoal.training.models.actor_critic` in that rows are not orthogonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from shoal.training.models.bodies import INDIFFERENT, BodyModel, Turns, layers, through, whole
from shoal.training.tasks.play import Role

_MAX_OTHERS: Final = 1024


class MLP(BodyModel):
    """The model called ``mlp``. Its features are the sights."""

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        central: int = 0,
        others: int = 0,
        initial_log_std: float = 0.0,
        initial_gain: float = INDIFFERENT,
        seed: int = 0,
    ) -> None:
        """Initialise it; see `BodyModel`.

        Args:
            roles: that it is to play.
            hidden_sizes: of each network.
            central: how many numbers its values see beside the features.
            others: how many kinds of acts all others have together; 0: what they do is nothing to it.
            initial_log_std: of a continuous policy.
            initial_gain: of the layer that acts. At 1, what it does depends on what it sees from the first act on: for
                acts that others have to read, such as messages.
            seed: of all parameters.
        """
        super().__init__(roles, central)
        self.others = whole("others", others, 0, _MAX_OTHERS)
        sizes = [self.sizes[0], *hidden_sizes, self._outputs * others]
        beside = layers("beside", sizes, last_gain=0.01) if others else {}
        self._begin(beside, self.sizes[0], hidden_sizes, initial_log_std, seed, initial_gain)

    def beside(self, turns: Turns, others: torch.Tensor) -> torch.Tensor:
        """What others add to each of the own acts, ``[S, T, count]``.

        Args:
            turns: what was seen.
            others: ``[S, T, others]``, a weight of each kind of act of each of them; what they add is linear in these.
        """
        found = through(self._parameters.tensors, "beside", self.see(turns))
        by_act = found.reshape(*found.shape[:-1], self._outputs, self.others)
        added: torch.Tensor = (by_act * others[..., None, :]).sum(dim=-1)
        return added

    def see(self, turns: Turns) -> torch.Tensor:
        """The sights."""
        return turns.sights
