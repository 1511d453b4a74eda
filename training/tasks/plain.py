"""Roles to plain words (`shoal.training.plain_roles`) and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.plain_roles import PlainRole, PlainSpace
from shoal.training.tasks.base import Box, Continuous, Discrete
from shoal.training.tasks.play import ActSpace, Role, SightSpace, Text

_KINDS: Final[Mapping[str, type[Any]]] = {"box": Box, "discrete": Discrete, "continuous": Continuous, "text": Text}


def plain_roles(roles: Mapping[str, Role]) -> tuple[PlainRole, ...]:
    """Roles in plain words, in their order."""
    return tuple(PlainRole(name, plain_space(role.sights), plain_space(role.acts)) for name, role in roles.items())


def read_roles(said: Sequence[PlainRole]) -> dict[str, Role]:
    """The inverse.

    Raises:
        ProtocolError: if a space is none.
    """
    try:
        return {
            each.name: Role(_KINDS[each.sights.kind](each.sights.size), _KINDS[each.acts.kind](each.acts.size))
            for each in said
        }
    except (KeyError, UsageError) as error:
        raise ProtocolError(f"a role has a space that is none: {error}") from error


def plain_space(space: SightSpace | ActSpace) -> PlainSpace:
    """A space in plain words."""
    match space:
        case Box():
            return PlainSpace("box", space.size)
        case Discrete(count):
            return PlainSpace("discrete", count)
        case Continuous(size):
            return PlainSpace("continuous", size)
        case Text(max_chars):
            return PlainSpace("text", max_chars)
