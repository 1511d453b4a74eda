"""Who takes the seats that are here, for a recipe: its policies as they are and as they were, and what else may sit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from shoal.training.recipes.fixed import Fixeds
from shoal.training.recipes.past import Pasts
from shoal.training.tasks.cast import Actor, Fixed, Foreign, Past, Scripted, Seat, scripted
from shoal.training.tasks.foreign import ForeignActor, check_seat
from shoal.training.tasks.play import Role


class Seating(Mapping[Seat, Actor]):
    """Actors by seat, found when they are asked for."""

    def __init__(
        self,
        present: Mapping[Seat, Actor],
        pasts: Pasts,
        fixed: Fixeds,
        epoch: Callable[[], int],
        roles: Mapping[str, Role],
        foreign: Iterable[Foreign],
        seed: int,
    ) -> None:
        """Seat nobody yet.

        Args:
            present: the recipe's policies as they are, and scripts of its own.
            pasts: the policies as they were.
            fixed: those that never change.
            epoch: that it is now.
            roles: of the game.
            foreign: seats that the casts name.
            seed: of what foreign seats draw.

        Raises:
            UsageError: if no installed package offers a foreign seat that is named.
        """
        for seat in foreign:
            check_seat(seat)
        self._roles, self._seed = roles, seed
        self._foreign: dict[str, ForeignActor] = {}
        self._present: Final = present
        self._pasts: Final = pasts
        self._fixed: Final = fixed
        self._epoch: Final = epoch

    def __getitem__(self, seat: Seat) -> Actor:
        match seat:
            case Past():
                return self._pasts.actor(seat, self._epoch())
            case Fixed():
                found = self._fixed.actor(seat)
                if found is None and seat.otherwise is not None:
                    found = self[seat.otherwise]
                if found is None:
                    raise KeyError(seat)
                return found
            case Scripted(name) if seat not in self._present:
                return scripted(name)
            case Foreign(name):
                if name not in self._foreign:
                    self._foreign[name] = ForeignActor(seat, self._roles, seed=self._seed)
                return self._foreign[name]
            case _:
                return self._present[seat]

    def __iter__(self) -> Iterator[Seat]:
        """Those that are always there."""
        return iter(self._present)

    def close(self) -> None:
        """End the processes of foreign seats."""
        for actor in self._foreign.values():
            actor.close()

    def __len__(self) -> int:
        return len(self._present)
