"""What is large of a run's exchanges: the shell between the all-reduce, the worker's memory and the run.

Nothing is decided here: who is in it and with what weight, a ballot says; what an owner that lied is denied, the run
does.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from shoal.node.swarm.following import follow
from shoal.node.swarm.reducing import KEY_BYTES, Commitments, Reductions
from shoal.protocol.ids import PeerId, SwarmId
from shoal.training.arena import Arena, Region
from shoal.training.exchange.allreduce import Member, Outcome
from shoal.training.exchange.audits import SignedOutcome
from shoal.training.exchange.ballots import Ballot, SignedOffer
from shoal.training.exchange.owning import rates_of
from shoal.training.exchange.rules import Aggregator
from shoal.training.worker_calls import LargeArray

if TYPE_CHECKING:
    from shoal.training.exchange.layout import Layout

log = logging.getLogger(__name__)

FIRST_PATIENCE_S: Final = 10.0
"""For which nothing may come on, before anything is known of the others."""
MIN_PATIENCE_S: Final = 1.0
MAX_PATIENCE_S: Final = 30.0
PATIENCE: Final = 3.0
"""Times the longest gap of the last ones."""
PATIENT_PART: Final = 1 / 4
"""Of what they took: in a long one a pause costs little, and whoever is left out was of use for nothing."""
REMEMBERED: Final = 8
LINGER_S: Final = 1.0
PRESENT: Final = 1 / 2
"""Of its parts: how much of what a member gives must be in what came of it, to count as given."""


class Exchanging:
    """One run's all-reduces."""

    def __init__(
        self,
        swarm: SwarmId,
        reductions: Reductions,
        aggregator: Aggregator,
        reach: Callable[[PeerId], Awaitable[None]],
        on_lie: Callable[[SignedOutcome], None],
        on_false: Callable[[PeerId], None],
    ) -> None:
        """Know nothing of the others' timing yet.

        Args:
            swarm: of which.
            reductions: of this node.
            aggregator: of the run.
            reach: connects to a member, if it can.
            on_lie: told what an owner signed that is not so.
            on_false: told who gives another part than it signed.
        """
        self._swarm = swarm
        self._reductions = reductions
        self._aggregator = aggregator
        self._reach = reach
        self._on_lie = on_lie
        self._on_false = on_false
        self._gaps: deque[float] = deque(maxlen=REMEMBERED)
        self._took: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def patience_s(self) -> float:
        """For which nothing may come on, as learned."""
        if not self._gaps:
            return FIRST_PATIENCE_S
        patience_s = max(PATIENCE * max(self._gaps), PATIENT_PART * statistics.median(self._took))
        return min(max(patience_s, MIN_PATIENCE_S), MAX_PATIENCE_S)

    @property
    def uplink(self) -> int:
        """Bytes per second that this node can send; 0 if it does not know."""
        return round(self._reductions.links.bulk.uplink.per_s)

    @asynccontextmanager
    async def reduced(
        self,
        ballot: Ballot,
        contents: Sequence[bytes | memoryview],
        arrays: Sequence[LargeArray],
        arena: Arena,
        shunned: Set[PeerId],
    ) -> AsyncIterator[tuple[PeerId, ...]]:
        """Have what is large of a ballot's contributions reduced; it lies in the arena within the context.

        A node that gave nothing to them takes what the others make of them.

        Args:
            ballot: whose.
            contents: of its contributions, in order; each begins with the hashes of its parts.
            arrays: what is large of each, as the worker has told.
            arena: shared with the worker, which has put there what this node gives.
            shunned: members whose results are not taken.

        Yields:
            Members of whose arrays too little came.

        Raises:
            ProtocolError: if it is too large for the arena.
            UnavailableError: if this node gave nothing, and the others do not give what they made.
        """
        from shoal.training.exchange.layout import hashes_of

        layout = self._layout(arrays)
        hashes = {}
        for signed, content in zip(ballot.offers, contents, strict=True):
            named = hashes_of(layout.num_parts, content)
            if named is not None:
                hashes[signed.author] = named
        members = members_of(each for each in ballot.offers if each.author in hashes)
        key = hashlib.sha256(f"{self._swarm}".encode() + ballot.name).digest()[:KEY_BYTES]
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(self._reach, member.peer)
        place = arena.view(Region.RESULT, layout.num_bytes)
        if self._reductions.me not in hashes:
            authors = [member.peer for member in members]
            outcomes = await follow(
                *(self._reductions.links, key, authors, layout, place), patience_s=self.patience_s, shunned=shunned
            )
            log.info("swarm %s: what came of %d members", self._swarm, len(members))
            yield _absent(ballot, layout, outcomes)
            return
        async with self._reductions.reducing(
            key,
            members,
            layout,
            arena.view(Region.OFFERED, layout.num_bytes),
            into=place,
            patience_s=self.patience_s,
            commitments=Commitments(hashes, shunned, self._on_lie, self._on_false),
            linger_s=LINGER_S,
            run=self._swarm,
        ) as result:
            self._gaps.append(result.longest_gap_s)
            self._took.append(result.seconds)
            log.info(
                "swarm %s: %.1f MB of each of %d in %.2f s",
                *(self._swarm, layout.num_bytes / 1e6, len(members), result.seconds),
            )
            yield _absent(ballot, layout, result.outcomes)

    def forget(self) -> None:
        """The arena goes: what came of the last one is not given to anybody any more."""
        self._reductions.forget(self._swarm)

    def _layout(self, arrays: Sequence[LargeArray]) -> Layout:
        from shoal.protocol.tensors import TensorCodec
        from shoal.training.exchange.layout import Layout, Segment

        segments = tuple(Segment(each.name, each.numel, TensorCodec(each.codec), each.bound) for each in arrays)
        return Layout(segments, self._aggregator)


def members_of(offers: Iterable[SignedOffer]) -> list[Member]:
    """Who reduces, and what each is taken to send: the same for all who hold these offers."""
    found = {signed.author: signed.offer for signed in offers}
    rates = rates_of({author: offer.uplink for author, offer in found.items()})
    return [Member(author, float(offer.weight), rates[author]) for author, offer in found.items()]


def _absent(ballot: Ballot, layout: Layout, outcomes: Mapping[int, Outcome]) -> tuple[PeerId, ...]:
    """Of whose arrays too little came."""
    given = Counter(author for outcome in outcomes.values() for author in outcome.authors)
    return tuple(signed.author for signed in ballot.offers if given[signed.author] < PRESENT * layout.num_parts)
