"""Several policies that are updated side by side: what each wants averaged goes out together, as one exchange.

A run has one round per exchange, in which everybody gives one content. Where a run trains several policies, or one
policy wants something beside its parameters, that content has a *section* for each: its weight, and the bytes that it
would be alone. So everything that holds for one exchange holds for each of them: its own template, check, scales,
centres and codec. A member that has nothing for a policy leaves its section out, and takes what the others made of it.

`together` runs updates in step. Each of them has as many exchanges as the manifest says, with samples or without
(`Learner.update`), so every member is at the same step with each; those that have fewer are done earlier.

What travels, little-endian: 4 bytes that say how long the list is, the list (MessagePack: name, weight and length of
each section, in the order of the names), then the sections.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.training.algorithms.base import AskingUpdate, Exchange, Joint, UpdateStats
from shoal.training.effects import Effect
from shoal.training.exchange.averager import Arrays

MAX_SECTIONS: Final = 64
MAX_NAME_CHARS: Final = 80
_MAX_WEIGHT: Final = 2.0**53
_LENGTH_BYTES: Final = 4
_MAX_LIST_BYTES: Final = 64 * 1024


JointUpdate: TypeAlias = Generator[Joint | Effect, Any, dict[str, UpdateStats]]


def together(updates: Mapping[str, AskingUpdate], weight: float) -> JointUpdate:
    """Run updates in step, each by what came of its own section; ``{}`` is what came of one that nobody gave anything.

    Effects other than averages are asked for at once, one after the other, and are in step with nobody.

    Args:
        updates: by the name of the section; not begun.
        weight: in environment steps, for all together.

    Returns:
        What each says of itself.

    Raises:
        ProtocolError: as the updates do. When one fails, all that are under way are closed; those that were done
            already are not taken back, so the caller keeps what it needs for that.
    """
    stats: dict[str, UpdateStats] = {}
    waiting: dict[str, Exchange] = {}
    try:
        for name in sorted(updates):
            yield from _advance(name, updates[name], None, waiting, stats)
        while waiting:
            answers = yield Joint(dict(waiting), weight, all(each.is_last for each in waiting.values()))
            for name in sorted(waiting):
                yield from _advance(name, updates[name], answers.get(name, {}), waiting, stats)
    finally:
        for update in updates.values():
            update.close()
    return stats


def _advance(
    name: str,
    update: AskingUpdate,
    answer: Arrays | None,
    waiting: dict[str, Exchange],
    stats: dict[str, UpdateStats],
) -> Generator[Effect, Any, None]:
    """Run one update until it wants something averaged, or is done."""
    try:
        wanted = next(update) if answer is None else update.send(answer)
        while not isinstance(wanted, Exchange):
            wanted = update.send((yield wanted))
        waiting[name] = wanted
    except StopIteration as end:
        stats[name] = end.value
        waiting.pop(name, None)


@dataclass(frozen=True, slots=True)
class Section:
    """What one member gives to one exchange.

    Attributes:
        weight: in the exchange's own samples; positive.
        data: as it would be alone.
    """

    weight: float
    data: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    weight: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _List:
    entries: tuple[_Entry, ...]


def encode_joint(sections: Mapping[str, Section]) -> bytes:
    """A content of several sections."""
    names = sorted(sections)
    entries = tuple(_Entry(name, float(sections[name].weight), len(sections[name].data)) for name in names)
    head = encode(_List(entries))
    return b"".join([len(head).to_bytes(_LENGTH_BYTES, "little"), head, *(sections[name].data for name in names)])


def decode_joint(data: bytes | memoryview, names: Collection[str]) -> dict[str, Section]:
    """The sections of a content from anybody.

    Args:
        data: as `encode_joint` gives it.
        names: that are asked for now; each may be missing.

    Raises:
        ProtocolError: if it is no such content, or has a section that nobody asks for.
    """
    data = bytes(data)
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or start > min(len(data), _LENGTH_BYTES + _MAX_LIST_BYTES):
        raise ProtocolError("the contribution does not say what its sections are; leave it out")
    try:
        entries = decode(_List, data[_LENGTH_BYTES:start], strict=True).entries
    except LimitError as error:
        raise ProtocolError(f"the list of the contribution's sections is too deep: {error}") from error
    found: dict[str, Section] = {}
    for entry in entries[: MAX_SECTIONS + 1]:
        if entry.name not in names or entry.name in found:
            raise ProtocolError(f"the contribution has a section {entry.name[:MAX_NAME_CHARS]!r} that is not asked for")
        if not (math.isfinite(entry.weight) and 0 < entry.weight <= _MAX_WEIGHT) or entry.num_bytes < 0:
            raise ProtocolError(f"the section {entry.name!r} of the contribution cannot weigh {entry.weight:g}")
        end = start + entry.num_bytes
        if end > len(data):
            raise ProtocolError(f"the section {entry.name!r} of the contribution ends after the contribution does")
        found[entry.name] = Section(entry.weight, data[start:end])
        start = end
    if start != len(data):
        raise ProtocolError("the contribution is longer than its sections; leave it out")
    return found
