"""Plays that are shown to others, so that they learn from them: as arrays that are posted, and back.

Of a post, by role: ``ROLE/lengths`` int64 ``[P]``, how many acts it had in each of P plays; then, of all plays one
after the other, ``ROLE/sights`` float32 ``[n, size]``, ``ROLE/acts`` int64 ``[n]`` or float32 ``[n, size]``,
``ROLE/legal`` bool ``[n, count]`` where the game says such, and ``ROLE/last`` float32 ``[P, size]``, the sights with
which plays were cut off; ``ROLE/cut`` bool ``[P]`` says which had one. What a role earned is not in it.

A post is its author's word: whoever reads it holds it to the game's spaces, and to a bound. That what it shows is
worth imitating nobody can check.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.exchange.averager import Arrays
from shoal.training.tasks.cast import Seat
from shoal.training.tasks.play import (
    BadActError,
    BadPlayError,
    Box,
    Discrete,
    Role,
    Take,
    Text,
    check_legal,
    read_act,
    read_sight,
)
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import Posted, Scenario

log = logging.getLogger(__name__)

TOPIC: Final = "demonstrations"
MAX_POSTS: Final = 32
"""That are asked for at once."""
MAX_AUTHORS: Final = 16
"""Of whom one post each is kept."""
MAX_PLAYS: Final = 1024
"""In one post."""
MAX_ACTS: Final = 65_536
"""In one post, of one role."""


def show(plays: Sequence[Played], roles: Mapping[str, Role]) -> Arrays:
    """Plays as arrays; nothing of roles that did not act.

    Raises:
        UsageError: if they are too many, or a role sees or acts in text.
    """
    arrays: Arrays = {}
    for role, spaces in roles.items():
        takes = [take for played in plays for take in played.takes if take.role == role and len(take)]
        if not takes:
            continue
        if not isinstance(spaces.sights, Box) or isinstance(spaces.acts, Text):
            raise UsageError(f"the role {role!r:.80} reads or writes text; only numbers are shown in posts")
        columns = [take.arrays() for take in takes]
        lengths = np.array([len(take) for take in takes], np.int64)
        if len(takes) > MAX_PLAYS or lengths.sum() > MAX_ACTS:
            raise UsageError(f"{len(takes)} plays of {lengths.sum()} acts are too many for one post; show fewer")
        found = {"lengths": lengths, "cut": np.array([take.final is not None for take in takes])}
        for name in ("sights", "acts", "legal"):
            if name in columns[0]:
                found[name] = np.concatenate([each[name] for each in columns])
        nothing = np.zeros(spaces.sights.size, np.float32)
        found["last"] = np.stack([nothing if take.final is None else np.asarray(take.final) for take in takes])
        arrays |= {f"{role}/{name}": array for name, array in found.items()}
    return arrays


def read_shown(post: Posted, roles: Mapping[str, Role], seats: Mapping[str, Seat], first: int = 0) -> list[Take]:
    """The takes of a post's plays, none of them proven; nothing, with a warning, if it is of no use.

    Args:
        post: of anybody.
        roles: of the game.
        seats: who sits where when the policies play.
        first: the number of its first play.
    """
    takes: list[Take] = []
    try:
        known = set()
        for role, spaces in roles.items():
            names = [name for name in post.arrays if name.startswith(f"{role}/")]
            known |= set(names)
            if names:
                own = {name.removeprefix(f"{role}/"): post.arrays[name] for name in names}
                takes += _takes(role, spaces, seats[role], own, first)
        _require_roles(post.arrays.keys() - known)
    except (ProtocolError, BadPlayError, BadActError) as error:
        log.warning("what %s shows is no play of this game, and is passed over: %s", post.author, error)
        return []
    return takes


def _require_roles(strange: set[str]) -> None:
    if strange:
        raise ProtocolError(f"it is about {min(strange)[:80]!r}, which is no role's")


def _takes(role: str, spaces: Role, seat: Seat, own: Mapping[str, Any], first: int) -> list[Take]:
    if not isinstance(spaces.sights, Box) or isinstance(spaces.acts, Text):
        raise ProtocolError(f"the role {role!r:.80} reads or writes text, which is not shown in posts")
    plays = len(own["lengths"]) if "lengths" in own and own["lengths"].ndim == 1 else 0
    if not 1 <= plays <= MAX_PLAYS or own["lengths"].dtype != np.int64 or (own["lengths"] < 1).any():
        raise ProtocolError(f"{role!r:.80} acted in no play, or in more than {MAX_PLAYS}")
    if (own["lengths"] > MAX_ACTS).any() or own["lengths"].sum() > MAX_ACTS:
        raise ProtocolError(f"{role!r:.80} acted more than {MAX_ACTS} times")
    count = int(own["lengths"].sum())
    wanted: dict[str, tuple[tuple[int, ...], Any]] = {"lengths": ((plays,), np.int64), "cut": ((plays,), np.bool_)}
    wanted |= {"sights": ((count, spaces.sights.size), np.float32), "last": ((plays, spaces.sights.size), np.float32)}
    if isinstance(spaces.acts, Discrete):
        wanted["acts"] = ((count,), np.int64)
        if "legal" in own:
            wanted["legal"] = ((count, spaces.acts.count), np.bool_)
    else:
        wanted["acts"] = ((count, spaces.acts.size), np.float32)
    if {name: (array.shape, array.dtype.type) for name, array in own.items()} != wanted:
        raise ProtocolError(f"what is shown of {role!r:.80} has other arrays, shapes or types than it needs")
    takes = []
    starts = np.cumsum([0, *own["lengths"][:-1]])
    for number, (start, length) in enumerate(zip(starts.tolist(), own["lengths"].tolist(), strict=True)):
        take = Take(role, spaces, seat, Scenario(0), first + number, proven=False)
        for row in range(start, start + length):
            legal = None
            if "legal" in own:
                legal = own["legal"][row].copy()
                check_legal(spaces.acts, legal)
                take.legal.append(legal)
            take.sights.append(read_sight(spaces.sights, own["sights"][row]))
            take.acts.append(read_act(spaces.acts, _act(own["acts"][row]), legal))
        take.log_probs, take.rewards = [float("nan")] * length, [0.0] * length
        if own["cut"][number]:
            take.cut, take.final = True, read_sight(spaces.sights, own["last"][number])
        takes.append(take)
    return takes


def _act(act: Any) -> Any:
    return int(act) if act.ndim == 0 else act
