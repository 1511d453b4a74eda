"""Places: each node of a run has a number, so that a source can give each something of its own (`News.place`).

Places are agreed on with the first update and kept from then on, in all lives of a node: whoever has none says its name
as a number, and those get the least places that nobody has, in the order of these numbers. All see the same, and so
agree. A newcomer that finds a place empty, as somebody has left, takes it.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId

NOWHERE: Final = -1
MAX_PLACE: Final = 2**20
_NUMBERS: Final = 2**52


def number_of(peer: PeerId) -> int:
    """A peer's name as a number of 52 bits."""
    return int.from_bytes(hashlib.sha256(str(peer).encode()).digest()[:8], "big") >> 12


def place_of(number: int, said: npt.NDArray[np.int64]) -> int:
    """The place of who has this number, by what all said, ``[n, 2]``: numbers and places.

    `NOWHERE`, if that one said nothing.
    """
    taken = {int(place) for _, place in said if place != NOWHERE}
    found = {int(each): int(place) for each, place in said}
    free = (place for place in range(len(said) + len(taken)) if place not in taken)
    for each in sorted(found):
        if found[each] == NOWHERE:
            found[each] = next(free)
    return found.get(number, NOWHERE)


def check_said(said: npt.NDArray[Any]) -> None:
    """Refuse what no node says of itself.

    Raises:
        ProtocolError: if it is no number and no place.
    """
    number, place = (int(each) for each in said)
    if not 0 <= number < _NUMBERS or not NOWHERE <= place < MAX_PLACE:
        raise ProtocolError(f"no node has the number {number} and the place {place}; leave it out")
