"""Two networks of tanh units, one that acts and one that values: what classic control and particles need.

The initial values differ from those of `shoal.training.models.actor_critic` in that rows are not orthogonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.training.models.bodies import BodyModel, Turns
from shoal.training.tasks.play import Role


class MLP(BodyModel):
    """The model called ``mlp``. Its features are the sights."""

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        central: int = 0,
        initial_log_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Initialise it; see `BodyModel`."""
        super().__init__(roles, central)
        self._begin({}, self.sizes[0], hidden_sizes, initial_log_std, seed)

    def see(self, turns: Turns) -> torch.Tensor:
        """The sights."""
        return turns.sights
