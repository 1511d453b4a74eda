"""Who takes the seats that are here, for a recipe: its policies as they are and as they were, and what else may sit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from shoal.training.recipes.past import Pasts
from shoal.training.tasks.cast import Actor, Learned, Past, Seat


class Seating(Mapping[Seat, Actor]):
    """Actors by seat, found when they are asked for."""

    def __init__(self, policies: Mapping[str, Actor], pasts: Pasts, epoch: Callable[[], int]) -> None:
        """Seat nobody yet.

        Args:
            policies: of the recipe, as they are.
            pasts: as they were.
            epoch: that it is now.
        """
        self._policies: Final = policies
        self._pasts: Final = pasts
        self._epoch: Final = epoch

    def __getitem__(self, seat: Seat) -> Actor:
        match seat:
            case Learned(policy):
                return self._policies[policy]
            case Past():
                return self._pasts.actor(seat, self._epoch())
            case _:
                raise KeyError(seat)

    def __iter__(self) -> Iterator[Seat]:
        """Those that are always there."""
        return map(Learned, self._policies)

    def __len__(self) -> int:
        return len(self._policies)
