"""What was heard in a swarm, and what follows from it: how far its members are, what each is at, who contributed when.

It is fed with the lines of `observer`, in the order in which they come. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Condition
from typing import Any, Final

QUORUM: Final = 2 / 3
"""Of those that voted in the round before: with so many votes for a ballot, it counts as decided."""
USUAL_OF: Final = 12


class Place(StrEnum):
    """What a member is at, as finely as its word tells."""

    STARTING = "starting"
    LOADING = "loading"
    COLLECTING = "collecting"
    UPDATING = "updating"
    OFFERING = "offering"
    FETCHING = "fetching"
    PROPOSING = "proposing"
    VOTING = "voting"
    MERGING = "merging"
    EVALUATING = "evaluating"


@dataclass(slots=True)
class Member:
    """One of them.

    Attributes:
        epochs: of the policies that it held, ascending, and when it was heard of each.
        offered: epoch of its newest offer; likewise below. -1: none.
    """

    epochs: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    phase: str = "starting"
    phase_epoch: int = -1
    heard_at: float = 0.0
    offered: int = -1
    proposed: int = -1
    voted: int = -1
    vote: str = ""

    @property
    def epoch(self) -> int:
        """Of what it holds."""
        return self.epochs[-1] if self.epochs else -1

    def held_at(self, epoch: int) -> float:
        """When it had come at least so far; infinity if it has not."""
        index = bisect_left(self.epochs, epoch)
        return self.times[index] if index < len(self.times) else float("inf")


class Curve:
    """Something that only grows, at the moments at which it did."""

    __slots__ = ("_amounts", "_times")

    def __init__(self) -> None:
        self._times: list[float] = []
        self._amounts: list[float] = []

    def add(self, at: float, amount: float) -> None:
        """It is so much now; what is no more than before is no news."""
        if not self._amounts or amount > self._amounts[-1]:
            self._times.append(at)
            self._amounts.append(amount)

    def amount(self, at: float) -> float:
        """How much it was, as if it had grown evenly between two moments; after the last one it has not grown."""
        later = bisect_right(self._times, at)
        if later == 0:
            return self._amounts[0] if self._amounts else 0.0
        if later == len(self._times):
            return self._amounts[-1]
        (began, ended), (least, most) = self._times[later - 1 : later + 1], self._amounts[later - 1 : later + 1]
        return least + (most - least) * (at - began) / (ended - began)

    def per_s(self, since: float, until: float) -> float:
        """By how much a second it grew between two moments."""
        return (self.amount(until) - self.amount(since)) / (until - since)


@dataclass(frozen=True, slots=True)
class Loss:
    """What the others lost to something.

    Attributes:
        pause_s: by how much the longest of their epochs was longer than usual.
        lost_s: how much longer all of their epochs took together than as many usual ones; below 0 by chance.
        usual_s: one epoch before it.
        epochs: how many of them are counted.
    """

    pause_s: float
    lost_s: float
    usual_s: float
    epochs: int


class Hearing:
    """Of one swarm. `take` may be called by another thread than those that wait.

    Attributes:
        members: by name; those that only store say nothing that counts.
        env_steps: that went into the policy, by all together.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._changed = Condition()
        self._offers: dict[str, tuple[str, float]] = {}  # by hash: author, and when it was heard
        self._ballots: dict[str, tuple[str, ...]] = {}
        self._votes: dict[str, set[str]] = {}
        self._proposed_epoch = -1
        self.env_steps = Curve()
        self._made: list[tuple[float, str, str]] = []  # when, by whom, of which ballot

    def take(self, line: Mapping[str, Any]) -> None:
        """Something was heard."""
        with self._changed:
            self._take(line)
            self._changed.notify_all()

    def _take(self, line: Mapping[str, Any]) -> None:
        author, at = str(line["author"]), float(line["at"])
        member = self.members.setdefault(author, Member())
        member.heard_at = at
        match line["topic"]:
            case "facts":
                member.phase, member.phase_epoch = line["phase"], line["epoch"]
            case "offer":
                self._offers.setdefault(line["name"], (author, at))
                member.offered = max(member.offered, line["epoch"])
            case "proposal":
                self._ballots.setdefault(line["ballot"], tuple(line["offers"]))
                member.proposed = max(member.proposed, line["epoch"])
                self._proposed_epoch = max(self._proposed_epoch, line["epoch"])
            case "vote":
                member.voted, member.vote = line["epoch"], line["ballot"]
                self._votes.setdefault(line["ballot"], set()).add(author)
            case "result":
                self._held(member, author, line, at)
            case _:
                pass

    def _held(self, member: Member, author: str, line: Mapping[str, Any], at: float) -> None:
        self._made.append((at, author, line["ballot"]))
        if line["epoch"] > member.epoch:
            member.epochs.append(line["epoch"])
            member.times.append(at)
        self.env_steps.add(at, line["env_steps"])

    def wait(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Until something holds, which is looked at whenever something is heard; whether it came to that in time."""
        with self._changed:
            return self._changed.wait_for(holds, limit_s)

    # How far they are.

    def fronts(self, authors: Iterable[str], since: float, until: float) -> list[float]:
        """The moments between these two at which the last of these members came to an epoch; the one before first."""
        present = [self.members[author] for author in authors]
        with self._changed:
            least = min((member.epoch for member in present), default=-1)
            epochs = sorted({epoch for member in present for epoch in member.epochs if epoch <= least})
            moments = [max(member.held_at(epoch) for member in present) for epoch in epochs]
        first = max(bisect_right(moments, since) - 1, 0)
        return moments[first : bisect_right(moments, until)]

    def loss(self, authors: Iterable[str], at: float, until: float, least: int = 3) -> Loss | None:
        """What these members lost to what began at one time and was over at another; None if it is too early to say.

        Epochs count from the one in which it began to the first that ended after it was over, and at least so many.
        """
        authors = tuple(authors)
        before = self.fronts(authors, 0.0, at)[-USUAL_OF - 1 :]
        after = self.fronts(authors, at, float("inf"))
        counted = max(bisect_left(after, until), least)
        if len(before) < least + 1 or counted >= len(after):
            return None
        usual_s = statistics.median(_gaps(before))
        gaps = _gaps(after[: counted + 1])
        return Loss(max(0.0, max(gaps) - usual_s), sum(gaps) - usual_s * len(gaps), usual_s, len(gaps))

    def contributed_at(self, author: str, since: float) -> float | None:
        """When others first held a policy with something in it that a member offered after ``since``."""
        with self._changed:
            for at, holder, ballot in self._made:
                if at < since or holder == author:
                    continue
                offers = [self._offers.get(name, ("", 0.0)) for name in self._ballots.get(ballot, ())]
                if any(each == author and offered_at >= since for each, offered_at in offers):
                    return at
        return None

    # What one is at.

    def place(self, author: str) -> Place:
        """As its last words, and those of the others, tell."""
        member = self.members.get(author)
        if member is None or member.phase == "starting":
            return Place.STARTING
        epoch = member.epoch
        if member.voted == epoch:
            num_voters = sum(each.voted >= epoch - 1 for each in self.members.values())
            if len(self._votes.get(member.vote, ())) >= QUORUM * num_voters:
                return Place.MERGING
            return Place.PROPOSING if member.proposed == epoch else Place.VOTING
        if member.offered == epoch:
            return Place.FETCHING if self._proposed_epoch >= epoch else Place.OFFERING
        if member.phase_epoch == epoch:
            match member.phase:
                case "updating" | "exchanging":
                    return Place.UPDATING
                case "evaluating":
                    return Place.EVALUATING
                case "fetching":
                    return Place.LOADING
                case _:
                    pass
        return Place.COLLECTING


def _gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(moments)]
