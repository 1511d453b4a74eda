"""What an update wants averaged, as the content that this member gives, and as what came of everybody's.

A shell of pure parts: codecs (`exchange.codecs`), large arrays in the arena (`exchange.packing`), sections of several
policies (`algorithms.joint`), who is absurd (`exchange.outliers`), the rule (`exchange.averager`). All members that
merge the same contents from the same state leave out the same authors and get the same bytes.

Who lies in one section is left out of all of them: what else it says is worth no more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.algorithms.base import Exchange, Joint
from shoal.training.algorithms.joint import Section, decode_joint, encode_joint
from shoal.training.arena import Arena, Region
from shoal.training.exchange.averager import Arrays, Contribution, merge, validate
from shoal.training.exchange.codecs import Sender, decode_contribution
from shoal.training.exchange.layout import Layout, layout_of
from shoal.training.exchange.outliers import outliers
from shoal.training.exchange.packing import pack, small_of, unpack
from shoal.training.exchange.rules import Aggregator, Codec

log = logging.getLogger(__name__)

_ALONE: Final = ""
"""The section of an exchange that is the only one."""

Answer: TypeAlias = Arrays | Mapping[str, Arrays]


class NothingToMergeError(ProtocolError):
    """No contribution is of any use."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a member gave.

    Attributes:
        author: who.
        weight: of its offer.
        data: its content.
    """

    author: PeerId
    weight: float
    data: bytes


class Merging:
    """One member's part in what is averaged, one exchange after the other.

    Attributes:
        wanted: what is averaged now.
        layout: of what is large of it, and lies in the arena; None if nothing is.
    """

    def __init__(self, aggregator: Aggregator, codec: Codec, arena: Arena) -> None:
        self.wanted: Exchange | Joint = Exchange({}, 0, {})
        self.layout: Layout | None = None
        self._aggregator = aggregator
        self._codec = codec
        self._arena = arena
        self._senders: dict[str, Sender] = {}

    def offer(self, wanted: Exchange | Joint) -> bytes | None:
        """The content of this member's contribution; None if it has nothing to give.

        Large arrays of a single exchange are written into the arena. Those of several policies travel in the content.
        """
        self.wanted, self.layout = wanted, None
        if isinstance(wanted, Joint):
            sections = {
                name: Section(each.weight, self._encode(name, each))
                for name, each in wanted.exchanges.items()
                if each.weight > 0
            }
            return encode_joint(sections) if wanted.weight > 0 else None
        codec = self._codec if wanted.codec is None else wanted.codec
        self.layout = layout = layout_of(wanted.template, wanted.lossy, codec, self._aggregator)
        if not wanted.weight > 0:
            return None
        if layout is None:
            return self._encode(_ALONE, wanted)
        offered = self._arena.view(Region.OFFERED, layout.num_bytes)
        return pack(layout, self._sender(_ALONE, wanted), wanted.arrays, wanted.lossy, wanted.centres, offered)

    def merge(self, given: Sequence[Given], rejected: list[PeerId]) -> Answer:
        """What was given, merged; who is left out is put into ``rejected``.

        Where arrays are large, what came of them lies in the arena.

        Raises:
            NothingToMergeError: if nobody's is of any use.
            ProtocolError: if what lies in the arena is none.
        """
        wanted = self.wanted
        exchanges = wanted.exchanges if isinstance(wanted, Joint) else {_ALONE: wanted}
        large, templates = Arrays(), {name: each.template for name, each in exchanges.items()}
        if self.layout is not None and isinstance(wanted, Exchange):
            result = self._arena.view(Region.RESULT, self.layout.num_bytes)
            large = unpack(self.layout, wanted.template, wanted.centres, result)
            templates[_ALONE] = {name: array for name, array in wanted.template.items() if name not in large}
        let_in: dict[str, list[Contribution]] = {name: [] for name in exchanges}
        honest: set[PeerId] = set()
        for each in given:
            try:
                found = self._read(each, exchanges, templates)
            except ProtocolError as error:
                log.warning("%s", error)
                rejected.append(each.author)
                continue
            honest.add(each.author)
            for name, contribution in found.items():
                let_in[name].append(contribution)
        absurd: dict[PeerId, str] = {}
        for name, exchange in exchanges.items():
            scales = {array: scale for array, scale in exchange.scales.items() if array not in large}
            absurd = outliers(let_in[name], scales) | absurd
        for author, reason in absurd.items():
            log.warning("the contribution of %s is left out: %s", author, reason)
            rejected.append(author)
        merged = {}
        for name, contributions in let_in.items():
            sound = [each for each in contributions if each.author not in absurd]
            if sound:
                merged[name] = merge(sound, self._aggregator, centres=exchanges[name].centres)
        if not honest - absurd.keys():
            raise NothingToMergeError("no contribution of the round is of any use")
        return merged if isinstance(wanted, Joint) else merged[_ALONE] | large

    def settle(self, *, arrived: bool) -> None:
        """Say whether what was offered last was merged."""
        for sender in self._senders.values():
            sender.settle(arrived=arrived)

    def forget(self) -> None:
        """Another state than the next is gone on from: what codecs lost is to be made up for no more."""
        for sender in self._senders.values():
            sender.forget()

    def _read(
        self, given: Given, exchanges: Mapping[str, Exchange], templates: Mapping[str, Arrays]
    ) -> dict[str, Contribution]:
        sections = {_ALONE: Section(given.weight, given.data)}
        if isinstance(self.wanted, Joint):
            sections = decode_joint(given.data, exchanges.keys())
        found = {}
        for name, section in sections.items():
            exchange, template = exchanges[name], templates[name]
            small = section.data if self.layout is None else small_of(self.layout, section.data)
            codec = self._codec if exchange.codec is None else exchange.codec
            arrays = decode_contribution(small, codec, exchange.lossy, exchange.centres, template)
            contribution = Contribution(given.author, section.weight, arrays)
            validate(contribution, template)
            exchange.check(contribution)
            found[name] = contribution
        return found

    def _encode(self, name: str, exchange: Exchange) -> bytes:
        return self._sender(name, exchange).encode(exchange.arrays, exchange.lossy, exchange.centres)

    def _sender(self, name: str, exchange: Exchange) -> Sender:
        sender = self._senders.setdefault(name, Sender(self._codec))
        sender.codec = self._codec if exchange.codec is None else exchange.codec
        return sender
