"""Places and parts: each node of a run has a number, or is something, and all agree who has and is which.

*Places*: so that a source can give each node something of its own (`News.place`). They are agreed on with the first
update and kept from then on, in all lives of a node: whoever has none says its name as a number, and those get the
least places that nobody has, in the order of these numbers. All see the same, and so agree. A newcomer that finds a
place empty, as somebody has left, takes it.

*Parts*: a node may have been told what it is. Those that were not become something with their first update, one after
the other in the order of their numbers, and stay it: each takes the part that the fewest have, told or not, in relation
to its share; of several the first of the recipe. Of one coach to two players, the first three nodes are a player, a
coach and a player. Until then such a node plays nothing and trains nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.recipes.recipe import Part

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


def check_said(said: npt.NDArray[Any], most: int = MAX_PLACE) -> None:
    """Refuse what no node says of itself.

    Raises:
        ProtocolError: if it is no number and no place, or part, below ``most``.
    """
    number, place = (int(each) for each in said)
    if not 0 <= number < _NUMBERS or not NOWHERE <= place < most:
        raise ProtocolError(f"no node has the number {number} and the place or part {place}; leave it out")


def part_of(number: int, said: npt.NDArray[np.int64], parts: Mapping[str, Part]) -> str:
    """What a node that was not told is, by what all said, ``[n, 2]``: numbers, and which parts or `NOWHERE`.

    Empty, if the one of this number did not say that it was not told.
    """
    names = list(parts)
    counts = [int((said[:, 1] == index).sum()) for index in range(len(names))]
    for each in sorted({int(row[0]) for row in said if row[1] == NOWHERE}):
        index = _wanted(counts, parts)
        counts[index] += 1
        if each == number:
            return names[index]
    return ""


def parts_of(count: int, parts: Mapping[str, Part]) -> list[str]:
    """What so many nodes are, none of which was told."""
    names = list(parts)
    counts, found = [0] * len(names), []
    for _ in range(count):
        index = _wanted(counts, parts)
        counts[index] += 1
        found.append(names[index])
    return found


def _wanted(counts: Sequence[int], parts: Mapping[str, Part]) -> int:
    shares = [part.share for part in parts.values()]
    able = [index for index, share in enumerate(shares) if share]
    return min(able, key=lambda index: (counts[index] / shares[index], index))
