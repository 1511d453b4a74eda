"""What an update learns from: so many own samples and so many of others', none too old, none too often.

SAPO (arXiv 2509.08721) takes I own and J foreign rollouts for each update, drawn evenly from what has passed a filter;
its swarm shares text, each member has a model of its own, and 4 own with 4 foreign did best. Here shards say by which
policy version they were made, so a member draws from its own run's versions, at most K old. Deviations: numbers are of
samples and not of rollouts, as rows are of unlike lengths; no author gives more than a share of the foreign samples,
so that making much is not having much to say; and where there are too few, an update is of fewer: own samples do not
stand in for others', which would change what the ratio says.

What is drawn is a *unit*: the steps of one environment in a shard of rows, or all plays of one scenario in a shard of
takes, since the advantages of a group need the whole of it. A draw follows from the store, the version and a generator
that is handed in. Nothing is drawn twice in one update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.rollouts.store import Kept, Reason, Used

MAX_AUTHORS: Final = 4096
"""Of whom accounts are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How an update is made up.

    Attributes:
        own: samples of this node's own shards (I).
        foreign: of others' (J).
        max_age: K, in versions.
        max_uses: of each unit.
        max_share: of the foreign samples, that one author may give; where there are few authors, an equal share.
        needs_check: whether foreign shards are used only when they were looked into and found true.
    """

    own: int
    foreign: int
    max_age: int = 6
    max_uses: int = 1
    max_share: float = 0.5
    needs_check: bool = False

    def __post_init__(self) -> None:
        if self.own < 0 or self.foreign < 0 or self.own + self.foreign < 1:
            raise UsageError(f"an update of {self.own} own and {self.foreign} foreign samples has none; say how many")
        if self.max_age < 0 or self.max_uses < 1 or not 0 < self.max_share <= 1:
            raise UsageError("samples are 0 versions old or more, used once or more, and a share is above 0, to 1")


@dataclass(frozen=True, slots=True)
class Pick:
    """Units of one shard.

    Attributes:
        cid: the shard's name.
        author: the shard's.
        age: in versions.
        units: their numbers, ascending.
        samples: that they have together.
    """

    cid: Cid
    author: PeerId
    age: int
    units: tuple[int, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class Draw:
    """What an update learns from.

    Attributes:
        picks: by the name of the shard.
        own: samples of own shards.
        foreign: of others'.
        passed_over: samples that were not used, by reason.
    """

    picks: tuple[Pick, ...]
    own: int
    foreign: int
    passed_over: Mapping[Reason, int]

    def used(self) -> tuple[Used, ...]:
        """What the store is told when the update is done."""
        return tuple(Used(pick.cid, pick.units) for pick in self.picks)


@dataclass(frozen=True, slots=True)
class Usage:
    """What became of one author's samples here.

    Attributes:
        made: samples in its shards that came.
        used: that went into updates; twice, where they were used twice.
        checked: that were looked into and found true.
        refused: that were not taken, or dropped as false.
        stale: that were too old when they came, or grew so before they were used.
        age_sum: of all used samples, in versions.
    """

    made: int = 0
    used: int = 0
    checked: int = 0
    refused: int = 0
    stale: int = 0
    age_sum: int = 0

    @property
    def mean_staleness(self) -> float:
        """Of what was used, in versions."""
        return self.age_sum / self.used if self.used else 0.0


def draw(
    kept: Iterable[Kept],
    version: int,
    me: PeerId,
    ratio: Ratio,
    rng: np.random.Generator,
    *,
    shunned: frozenset[PeerId] = frozenset(),
) -> Draw:
    """Choose what the next update learns from.

    Args:
        kept: the shards that are here.
        version: of the policy that is updated.
        me: whose own samples are own.
        ratio: how the update is made up.
        rng: of the choice; equal stores, versions and generators give equal draws.
        shunned: authors whose shards are not used.
    """
    passed_over: Counter[Reason] = Counter()
    own: list[_Unit] = []
    foreign: list[_Unit] = []
    for shard in sorted(kept, key=lambda each: each.cid):
        reason = _reason_against(shard, version, me, ratio, shunned)
        if reason is not None:
            passed_over[reason] += shard.samples
            continue
        units = own if shard.place.author == me else foreign
        for number, (size, uses) in enumerate(zip(shard.units, shard.uses, strict=True)):
            if uses < ratio.max_uses:
                units.append(_Unit(shard, number, size))
            else:
                passed_over[Reason.USED_UP] += size
    authors = {unit.shard.place.author for unit in foreign}
    share = max(ratio.max_share, 1 / max(1, len(authors)))
    chosen_own = _choose(own, ratio.own, ratio.own, rng, passed_over)
    chosen = _choose(foreign, ratio.foreign, ratio.foreign * share, rng, passed_over)
    by_shard: dict[Cid, list[_Unit]] = {}
    for unit in [*chosen_own, *chosen]:
        by_shard.setdefault(unit.shard.cid, []).append(unit)
    picks = tuple(_pick(by_shard[cid], version) for cid in sorted(by_shard))
    return Draw(picks, _samples(chosen_own), _samples(chosen), dict(passed_over))


@dataclass(frozen=True, slots=True)
class _Unit:
    shard: Kept
    number: int
    samples: int


def _reason_against(shard: Kept, version: int, me: PeerId, ratio: Ratio, shunned: frozenset[PeerId]) -> Reason | None:
    if shard.place.author in shunned:
        return Reason.SHUNNED
    if shard.version > version:
        return Reason.AHEAD
    if shard.version < version - ratio.max_age:
        return Reason.STALE
    if ratio.needs_check and shard.place.author != me and not shard.is_checked:
        return Reason.UNCHECKED
    return None


def _choose(
    units: list[_Unit], wanted: int, most: float, rng: np.random.Generator, passed_over: Counter[Reason]
) -> list[_Unit]:
    """Units in random order, until there are enough samples; of one author no more than its share."""
    chosen: list[_Unit] = []
    given: Counter[PeerId] = Counter()
    total = 0
    for index in rng.permutation(len(units)).tolist():
        unit = units[index]
        author = unit.shard.place.author
        if unit.samples > most:
            passed_over[Reason.TOO_LARGE] += unit.samples if wanted else 0
        if total + unit.samples > wanted or given[author] + unit.samples > most:
            continue
        chosen.append(unit)
        given[author] += unit.samples
        total += unit.samples
    return chosen


def _pick(units: list[_Unit], version: int) -> Pick:
    shard = units[0].shard
    numbers = tuple(sorted(unit.number for unit in units))
    return Pick(shard.cid, shard.place.author, version - shard.version, numbers, _samples(units))


def _samples(units: list[_Unit]) -> int:
    return sum(unit.samples for unit in units)


@dataclass(slots=True)
class Accounts:
    """Who contributed what that was used, as this node saw it.

    Attributes:
        by_author: of at most `MAX_AUTHORS`; what others did is counted under nobody's name, in ``others``.
        others: all those together.
    """

    by_author: dict[PeerId, Usage] = field(default_factory=dict)
    others: Usage = field(default_factory=Usage)

    def made(self, author: PeerId, samples: int) -> None:
        """A shard came."""
        self._add(author, made=samples)

    def dropped(self, author: PeerId, samples: int, reason: Reason) -> None:
        """A shard was not taken, or let go of."""
        match reason:
            case Reason.STALE:
                self._add(author, stale=samples)
            case Reason.FALSE | Reason.SHUNNED | Reason.TWICE | Reason.AHEAD:
                self._add(author, refused=samples)
            case _:
                pass

    def checked(self, author: PeerId, samples: int) -> None:
        """A shard was looked into and found true."""
        self._add(author, checked=samples)

    def used(self, drawn: Draw) -> None:
        """An update was made from this."""
        for pick in drawn.picks:
            self._add(pick.author, used=pick.samples, age_sum=pick.age * pick.samples)

    def _add(self, author: PeerId, **more: int) -> None:
        is_known = author in self.by_author or len(self.by_author) < MAX_AUTHORS
        before = self.by_author.get(author, Usage()) if is_known else self.others
        after = replace(before, **{name: getattr(before, name) + value for name, value in more.items()})
        if is_known:
            self.by_author[author] = after
        else:
            self.others = after
