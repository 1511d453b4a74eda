"""Two networks of tanh units, one that acts and one that values: what classic control and particles need.

The initial values differ from those of `shoal.training.models.actor_critic` in that rows are not orthogonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.training.models.bodies import INDIFFERENT, BodyModel, Turns
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
        initial_gain: float = INDIFFERENT,
        seed: int = 0,
    ) -> None:
        """Initialise it; see `BodyModel`.

        Args:
            roles: whose sights and acts it is for.
            hidden_sizes: of the network that decides, and of the one that values.
            central: numbers that values see beside.
            initial_log_std: of a continuous policy.
            initial_gain: of the layer that acts. At 1, what it does depends on what it sees from the first act on: for
                acts that others have to read, such as messages.
            seed: of the initial values.
        """
        super().__init__(roles, central)
        self._begin({}, self.sizes[0], hidden_sizes, initial_log_std, seed, initial_gain)

    def see(self, turns: Turns) -> torch.Tensor:
        """The sights."""
        return turns.sights
