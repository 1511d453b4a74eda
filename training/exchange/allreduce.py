"""The all-reduce of large arrays: each member reduces a span of them, and everybody gets the same bytes.

Butterfly all-reduce (reduce-scatter, then all-gather: Thakur, Rabenseifner and Gropp, 2005) among the members of a
round, who were voted on before. The array is cut into *parts*. Each part has an *owner*, which pulls it from every
member, reduces it, and tells the others, who pull the result. So a member sends and receives about twice its array,
however many members there are. Who can send more owns more (`shoal.training.exchange.owning`).

Nobody waits for one that does not come on:

* An owner to whom nothing more of a part has come for `patience_s` reduces what it has if that is most of the weight,
  and after half as long again in any case. Whose part did not come is left out of all that the owner has yet to
  reduce; each result says whose parts are in it.
* A member to whom no result has come for half as long again gives up those whose results it lacks, as owners. Their
  parts go to the next in each part's order. The new owner asks the others first whether anybody holds what the old one
  made of it, so that all end with the same bytes; only then it reduces the part itself. Who answers that it holds
  nothing takes nothing more of the old owner.
* Two outcomes of one part need a member that holds one and could not be asked. That is seen at the end: `digest` is
  that of all results, and whoever differs from most gets theirs by content.

A result can be held against its owner: the parts are named in what their authors signed, and reducing is a function of
them, to the bit.

This core has no clock: ``now`` is seconds of any monotonic clock. Bytes are moved by whoever drives it.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeAlias

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.training.exchange.owning import order_of, owners

MAX_PARTS: Final = 65_536
MAX_PULLS: Final = 4
"""Parts that are pulled from one member at a time; fewer from one that sends less than others do, so that its first
ones are here, and what comes of them goes back to it, while it still sends the others."""
MAX_SCRATCH: Final = 24
"""Parts of others that lie here until they are reduced, however large the array is; two of each, if they are many."""
MOST: Final = 1 / 2
OWNER_PATIENCE: Final = 1.5
HASH_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Member:
    """One of those who reduce together.

    Attributes:
        weight: of its array in a mean, in samples.
        rate: what it is taken to send, in bytes per second: owners have parts by it; 0: it owns none.
    """

    peer: PeerId
    weight: float
    rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one part.

    Attributes:
        owner: who reduced it.
        authors: whose parts are in it, in order.
        digest: SHA-256 of its bytes.
    """

    owner: PeerId
    authors: tuple[PeerId, ...]
    digest: bytes


# What happens.


@dataclass(frozen=True, slots=True)
class Ready:
    """A member's array can be pulled."""

    author: PeerId


@dataclass(frozen=True, slots=True)
class Pulled:
    """A member's part is here."""

    author: PeerId
    part: int


@dataclass(frozen=True, slots=True)
class NotPulled:
    """A member does not give its part."""

    author: PeerId
    part: int


@dataclass(frozen=True, slots=True)
class Reduced:
    """This member has reduced a part; ``authors``: whose are in it, as some may have been of no use."""

    part: int
    authors: tuple[PeerId, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Announced:
    """A member says that it holds what came of a part."""

    holder: PeerId
    part: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Asked:
    """A member asks who holds what came of a part, which its owner does not give; this one does not.

    ``heir``: who is to own it.
    """

    part: int
    heir: PeerId


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a part is here from a holder, and has the digest that was announced."""

    part: int
    holder: PeerId


@dataclass(frozen=True, slots=True)
class NotFetched:
    """A holder does not give it, or gives something else."""

    part: int
    holder: PeerId


@dataclass(frozen=True, slots=True)
class NobodyHolds:
    """All who answered were asked for a part's outcome."""

    part: int


@dataclass(frozen=True, slots=True)
class Left:
    """A member is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = (
    Ready | Pulled | NotPulled | Reduced | Announced | Asked | Fetched | NotFetched | NobodyHolds | Left | Tick
)

# What to do.


@dataclass(frozen=True, slots=True)
class Pull:
    """Pull a member's part."""

    author: PeerId
    part: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """Reduce these members' parts, then say `Reduced`."""

    part: int
    authors: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the others that this member holds what came of a part."""

    part: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pull what came of a part from a holder, check its digest, and say `Fetched` or `NotFetched`."""

    part: int
    holder: PeerId
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask these members who holds what came of a part: `Announced` for each that does, and `NobodyHolds` if none.

    ``heir``: who is to own it.
    """

    part: int
    members: tuple[PeerId, ...]
    heir: PeerId


@dataclass(frozen=True, slots=True)
class Done:
    """All parts are here; they are given to others for as long as they ask."""

    digest: bytes


Output: TypeAlias = Pull | Reduce | Announce | Fetch | Ask | Done


@dataclass(slots=True)
class _Own:
    """A part that this member owns."""

    came: set[PeerId]
    last_at: float
    authors: tuple[PeerId, ...] = ()  # of what is reduced

    @property
    def is_reducing(self) -> bool:
        return bool(self.authors)


@dataclass(slots=True)
class _Source:
    """What is pulled of one member."""

    max_pulls: int
    is_ready: bool = False
    todo: deque[int] = field(default_factory=deque)
    num_pulling: int = 0


class AllReduce:
    """One member's part in one all-reduce: `handle` takes what happens and says what to do.

    Attributes:
        outcomes: of each part that is here.
        is_over: whether all parts are here.
    """

    __slots__ = (
        "_asking",
        "_fetching",
        "_gone",
        "_known",
        "_last_at",
        "_left",
        "_left_out",
        "_me",
        "_members",
        "_num_parts",
        "_own",
        "_owner_of",
        "_patience_s",
        "_shunned",
        "_sources",
        "_total",
        "is_over",
        "outcomes",
    )

    def __init__(
        self,
        me: PeerId,
        members: Sequence[Member],
        num_parts: int,
        *,
        patience_s: float,
        now: float,
        shunned: Set[PeerId] = frozenset(),
    ) -> None:
        """Take part from now on; `start` begins.

        Args:
            me: this member.
            members: all, the same for everybody; this one among them.
            num_parts: that the array is cut into.
            patience_s: for which nothing may come on.
            now: the time.
            shunned: whose results this member does not take, as if they gave none.

        Raises:
            UsageError: if there are too many parts, nobody owns any, or this node is no member.
        """
        self._members = {member.peer: member for member in sorted(members, key=lambda member: member.peer)}
        if me not in self._members or not 1 <= num_parts <= MAX_PARTS:
            raise UsageError(f"{me} cannot reduce {num_parts} parts with {len(members)} members")
        self.outcomes: dict[int, Outcome] = {}
        self.is_over = False
        self._me = me
        self._num_parts = num_parts
        self._patience_s = patience_s
        self._total = sum(member.weight for member in members)
        self._owner_of = owners({peer: member.rate for peer, member in self._members.items()}, num_parts)
        self._own: dict[int, _Own] = {}
        usual = statistics.median(member.rate for member in members)
        self._sources = {
            peer: _Source(MAX_PULLS if member.rate >= usual else max(1, int(MAX_PULLS * member.rate / usual)))
            for peer, member in self._members.items()
            if peer != me
        }
        self._left_out: set[PeerId] = set()  # of what this member reduces
        self._gone: set[PeerId] = set()  # as owners
        self._left: set[PeerId] = set()  # altogether
        self._known: dict[int, list[tuple[PeerId, Outcome]]] = {}  # who says to hold what, of what is not here
        self._fetching: dict[int, tuple[PeerId, Outcome]] = {}
        self._asking: set[int] = set()
        self._last_at = now
        self._shunned = shunned - {me}

    def start(self, now: float) -> list[Output]:
        """Begin: own the parts that are this member's."""
        outputs: list[Output] = []
        for part, owner in enumerate(self._owner_of):
            if owner == self._me:
                self._begin_to_own(part, now)
        self._give_up(set(self._shunned), outputs)
        self._plan(outputs)
        return outputs

    @property
    def next_wake(self) -> float:
        """When to hand in a `Tick` at the latest."""
        if self.is_over:
            return float("inf")
        dues = [own.last_at + self._patience_s for own in self._own.values() if not own.is_reducing]
        return min([self._last_at + OWNER_PATIENCE * self._patience_s, *dues])

    @property
    def digest(self) -> bytes:
        """Of all that is here: SHA-256 over the parts' digests and whose are in them, in order."""
        whole = hashlib.sha256()
        for part in sorted(self.outcomes):
            outcome = self.outcomes[part]
            whole.update(outcome.digest + ",".join(outcome.authors).encode() + b"\n")
        return whole.digest()

    def handle(self, event: Event, now: float) -> list[Output]:
        """Take in what happened; what is to be done about it."""
        outputs: list[Output] = []
        match event:
            case Ready(author):
                if author in self._sources:
                    self._sources[author].is_ready = True
            case Pulled(author, part):
                self._pulled(author, part, now)
            case NotPulled(author, part):
                self._sources[author].num_pulling -= 1
                self._leave_out(author)
            case Reduced(part, authors, digest):
                self._reduced(part, authors, digest, now, outputs)
            case Announced(holder, part, outcome):
                self._announced(holder, part, outcome, outputs)
            case Asked(part, heir):
                self._asked(part, heir, now, outputs)
            case Fetched(part, holder):
                self._fetched(part, holder, now, outputs)
            case NotFetched(part, holder):
                self._not_fetched(part, holder, outputs)
            case NobodyHolds(part):
                if part in self._asking:
                    self._asking.discard(part)
                    if not (part in self.outcomes or part in self._fetching):
                        self._begin_to_own(part, now)
            case Left(peer):
                self._left.add(peer)
                self._give_up({peer}, outputs)
            case Tick():
                self._look(now, outputs)
        self._plan(outputs)
        return outputs

    # As an owner.

    def _begin_to_own(self, part: int, now: float) -> None:
        self._owner_of[part] = self._me
        if part in self._own:
            return
        self._own[part] = _Own({self._me}, now)
        for source in self._sources.values():
            source.todo.append(part)

    def _pulled(self, author: PeerId, part: int, now: float) -> None:
        self._sources[author].num_pulling -= 1
        own = self._own.get(part)
        if own is not None:
            own.came.add(author)
            own.last_at = now

    def _leave_out(self, author: PeerId) -> None:
        """Nothing more is asked of a member; what came of it counts."""
        self._left_out.add(author)
        self._sources[author].todo.clear()

    def _reduced(
        self, part: int, authors: tuple[PeerId, ...], digest: bytes, now: float, outputs: list[Output]
    ) -> None:
        own = self._own.pop(part, None)
        if own is None or part in self.outcomes:
            return
        outcome = Outcome(self._me, authors, digest)
        self.outcomes[part] = outcome
        self._last_at = now
        outputs.append(Announce(part, outcome))

    # As one of those who get the results.

    def _announced(self, holder: PeerId, part: int, outcome: Outcome, outputs: list[Output]) -> None:
        is_sense = 0 <= part < self._num_parts and self._members.keys() >= {outcome.owner, *outcome.authors}
        if holder not in self._sources or not is_sense or part in self.outcomes or outcome.owner in self._shunned:
            return
        known = self._known.setdefault(part, [])
        if all(each != holder for each, _ in known):
            known.append((holder, outcome))
        self._fetch(part, outputs)

    def _fetch(self, part: int, outputs: list[Output]) -> None:
        """Get what came of a part, if somebody who is believed holds it: its owner; once that is given up, anybody."""
        own = self._own.get(part)
        if part in self._fetching or part in self.outcomes or (own is not None and own.is_reducing):
            return
        owner = self._owner_of[part]
        for holder, outcome in self._known.get(part, ()):
            if owner in (outcome.owner, holder) or owner in self._gone or part in self._asking or own is not None:
                self._fetching[part] = holder, outcome
                self._own.pop(part, None)
                self._asking.discard(part)
                outputs.append(Fetch(part, holder, outcome))
                return

    def _asked(self, part: int, heir: PeerId, now: float, outputs: list[Output]) -> None:
        """Nothing is taken of the owner before any more: the heir was told that it is not here."""
        own = self._own.get(part)
        if heir not in self._members or part in self.outcomes or (own is not None and own.is_reducing):
            return
        before, waited_s = self._owner_of[part], now - self._last_at
        if heir == self._me == before:
            return
        if heir == self._me:
            self._take_over(part, outputs)
        else:
            self._owner_of[part] = heir
            self._own.pop(part, None)
            self._asking.discard(part)
        self._last_at = now  # and it has as long as anybody had
        self._fetching.pop(part, None)
        self._known.pop(part, None)
        if before not in (self._me, heir) and before not in self._gone and waited_s >= self._patience_s / 2:
            self._give_up({before}, outputs)

    def _fetched(self, part: int, holder: PeerId, now: float, outputs: list[Output]) -> None:
        found = self._fetching.get(part)
        if found is not None and found[0] == holder:
            del self._fetching[part]
            self._known.pop(part, None)
            self.outcomes[part] = found[1]
            self._last_at = now
            if self._owner_of[part] == self._me:  # the others wait for this one
                outputs.append(Announce(part, found[1]))

    def _not_fetched(self, part: int, holder: PeerId, outputs: list[Output]) -> None:
        fetching = self._fetching.get(part)
        if fetching is not None and fetching[0] == holder:
            del self._fetching[part]
        known = self._known.get(part, [])
        known[:] = [each for each in known if each[0] != holder]
        self._fetch(part, outputs)

    # Those that do not come on.

    def _look(self, now: float, outputs: list[Output]) -> None:
        for own in self._own.values():
            if own.is_reducing or now < own.last_at + self._patience_s:
                continue
            weight = sum(self._members[peer].weight for peer in own.came)
            if weight >= MOST * self._total or now >= own.last_at + OWNER_PATIENCE * self._patience_s:
                for author in self._lacking(own):
                    self._leave_out(author)
        if now >= self._last_at + OWNER_PATIENCE * self._patience_s and not self._own:
            self._last_at = now
            lacking = {self._owner_of[part] for part in range(self._num_parts) if part not in self.outcomes}
            self._give_up(lacking - {self._me}, outputs)

    def _give_up(self, peers: set[PeerId], outputs: list[Output]) -> None:
        """These own nothing any more; what they own goes to the next of each part."""
        for peer in peers & self._sources.keys():
            self._gone.add(peer)
            self._leave_out(peer)
        for part, owner in enumerate(self._owner_of):
            if owner not in self._gone:
                continue
            if part in self.outcomes:
                if self._heir(part) == self._me:  # the others wait for this one
                    self._owner_of[part] = self._me
                    outputs.append(Announce(part, self.outcomes[part]))
                continue
            fetching = self._fetching.get(part)
            if fetching is not None and fetching[0] in self._gone:
                self._not_fetched(part, fetching[0], outputs)
            self._fetch(part, outputs)
            if part in self._fetching:
                continue
            heir = self._heir(part)
            if heir == self._me:
                if part not in self._asking and part not in self._own:
                    self._take_over(part, outputs)
            else:
                self._owner_of[part] = heir
                outputs.append(Ask(part, self._others(), heir))

    def _take_over(self, part: int, outputs: list[Output]) -> None:
        """Own a part that another owned, if nobody holds what came of it."""
        self._owner_of[part] = self._me
        self._asking.add(part)
        outputs.append(Ask(part, self._others(), self._me))

    def _others(self) -> tuple[PeerId, ...]:
        return tuple(peer for peer in self._sources if peer not in self._left)

    def _heir(self, part: int) -> PeerId:
        return next(peer for peer in order_of(part, list(self._members)) if peer not in self._gone)

    def _lacking(self, own: _Own) -> list[PeerId]:
        return [peer for peer in self._sources if peer not in own.came and peer not in self._left_out]

    def _plan(self, outputs: list[Output]) -> None:
        if self.is_over:
            return
        open_parts = set(islice(self._own, max(2, MAX_SCRATCH // max(1, len(self._sources)))))
        for author, source in self._sources.items():
            while source.is_ready and source.todo and source.num_pulling < source.max_pulls:
                part = source.todo[0]
                own = self._own.get(part)
                if own is not None and not own.is_reducing:
                    if part not in open_parts:
                        break
                    source.num_pulling += 1
                    outputs.append(Pull(author, part))
                source.todo.popleft()
        for part, own in self._own.items():
            if not own.is_reducing and not self._lacking(own):
                own.authors = tuple(peer for peer in self._members if peer in own.came)
                outputs.append(Reduce(part, own.authors))
        if len(self.outcomes) == self._num_parts:
            self.is_over = True
            outputs.append(Done(self.digest))
