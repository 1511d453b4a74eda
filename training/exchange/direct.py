"""The exchanges of an update between its first and its last: each member gives its part to each other one directly.

In mode ``gradient`` an update has hundreds of exchanges, and nearly always nothing fails in them. Who takes part was
voted on in the first one (`rounds`); after that nothing is left to decide, unless something fails. So nobody proposes
or votes: whoever holds the parts of all merges them, in the order of the authors, and goes on to the next step. A part
travels from its author to each other member in one call. The last exchange is settled by votes again, so that all who
take what came of it have taken the same.

A step is named by all that was merged before it. A member that gives different parts to different members is seen one
step later, where these names differ. When a part does not come within the learned silence, a member is gone, or the
names differ, the update is taken back, and its epoch is settled anew, every exchange by votes, which nobody can bend;
and so are the epochs after it, for a number that doubles with every failure (`Trust`). Whoever wants votes from the
start says so by an offer for step 1; there nothing has been merged yet, so the others follow.

This core has no clock: ``now`` is seconds of any monotonic clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.ballots import Ballot, SignedOffer
from shoal.training.exchange.waits import Waits
from shoal.training.statements import MAX_SAMPLES, Offer, RoundKey

MAX_DIRECT: Final = 32
"""Members that give each other everything: as many as are all connected to each other."""
MAX_PART_BYTES: Final = 1024 * 1024
"""A larger part goes as content, by ballots."""
MAX_AHEAD: Final = 1
"""Steps that another member can be ahead: for the next one it needs this learner's part."""
MAX_DOUBLINGS: Final = 6
PATIENCE_S: Final = 1.5
"""That a part is waited for at least: an update that is taken back costs more than that."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one member gives at one step.

    Attributes:
        key: the step.
        cid: names the bytes; None if the member has nothing to give.
        weight: in samples; 0 if it has nothing.
    """

    key: RoundKey
    cid: Cid | None
    weight: int

    def __post_init__(self) -> None:
        if self.key.step < 1:
            raise ProtocolError("a part is for a step after the first exchange")
        if (self.cid is None) != (self.weight == 0) or not 0 <= self.weight <= MAX_SAMPLES:
            raise ProtocolError(f"a part cannot weigh {self.weight}")

    def name(self, author: PeerId) -> bytes:
        """32 bytes, different for every part."""
        text = f"{self.key.epoch}/{self.key.step}/{author}/{self.cid or ''}/{self.weight}".encode()
        return hashlib.sha256(text + self.key.after).digest()


class Direct:
    """One learner's part in the direct exchanges of one update.

    Attributes:
        key: the step that is on.
        failure: why it cannot go on; empty while it can.
    """

    __slots__ = ("_gave_at", "_given", "_me", "_members", "_waits", "failure", "key")

    def __init__(self, me: PeerId, key: RoundKey, members: Iterable[PeerId], waits: Waits) -> None:
        """Begin before step 1.

        Args:
            me: this learner, one of the members.
            key: of step 1.
            members: who were averaged in the first exchange.
            waits: what was learned of the others' timing in steps.
        """
        self.key = key
        self.failure = ""
        self._me = me
        self._members = sorted(members)
        self._waits = waits
        self._given: dict[int, dict[PeerId, Part]] = {key.step: {}}
        self._gave_at: float | None = None

    @property
    def members(self) -> tuple[PeerId, ...]:
        """Who give, in order."""
        return tuple(self._members)

    @property
    def own(self) -> Part | None:
        """What this learner gave at the step that is on."""
        return self._given[self.key.step].get(self._me)

    @property
    def next_wake(self) -> float:
        """When waiting is over."""
        if self._gave_at is None:
            return float("inf")
        return self._gave_at + max(PATIENCE_S, self._waits.silence_s)

    def give(self, cid: Cid | None, weight: int, now: float) -> Part:
        """This learner gives its part of the step that is on."""
        part = Part(self.key, cid, weight)
        self._given[self.key.step][self._me] = part
        self._gave_at = now
        return part

    def take(self, author: PeerId, part: Part) -> None:
        """Another member's part came; its first word on a step is the one that counts."""
        step = part.key.step
        if author not in self._members or author == self._me or part.key.epoch != self.key.epoch:
            return
        if not self.key.step <= step <= self.key.step + MAX_AHEAD:
            return
        self._given.setdefault(step, {}).setdefault(author, part)
        if step == self.key.step:
            self._check(author, part)

    def left(self, author: PeerId, reason: str) -> None:
        """A member is gone, cannot be given anything, or settles the epoch anew."""
        if author in self._members and not self.failure:
            self.failure = f"{author} {reason}"

    def ballot(self, now: float) -> Ballot | None:
        """What is to be merged, once the parts of all are there; the next step is on then."""
        given = self._given[self.key.step]
        if self.failure or self._gave_at is None or len(given) < len(self._members):
            return None
        parts = [(author, given[author]) for author in self._members]
        names = b"".join(part.name(author) for author, part in parts)
        name = hashlib.sha256(b"%d/%d/" % (self.key.epoch, self.key.step) + self.key.after + names).digest()
        offers = tuple(
            SignedOffer(author, part.name(author), Offer(key=self.key, cid=part.cid, weight=part.weight))
            for author, part in parts
            if part.cid is not None
        )
        self._waits.learn(0.0, now - self._gave_at)
        del self._given[self.key.step]
        self.key = RoundKey(self.key.epoch, self.key.step + 1, name)
        self._gave_at = None
        for author, part in self._given.setdefault(self.key.step, {}).items():
            self._check(author, part)
        return Ballot(name, offers)

    def tick(self, now: float) -> None:
        """Time passed: nobody is waited for any longer than usual."""
        if now >= self.next_wake and not self.failure:
            given = self._given[self.key.step]
            silent = [str(member) for member in self._members if member not in given]
            if silent:
                self.failure = f"nothing came from {', '.join(silent)}"

    def _check(self, author: PeerId, part: Part) -> None:
        if part.key.after != self.key.after and not self.failure:
            self.failure = f"{author} was given something else than this learner"


class Trust:
    """From which epoch on members exchange directly: at once, and later after every failure in a row."""

    __slots__ = ("_from_epoch", "_num_failures")

    def __init__(self) -> None:
        self._from_epoch = 0
        self._num_failures = 0

    def holds(self, epoch: int) -> bool:
        """Whether an epoch is to be exchanged directly."""
        return epoch >= self._from_epoch

    def failed(self, epoch: int) -> None:
        """The direct exchanges of an epoch failed."""
        self._from_epoch = epoch + 1 + 2 ** min(self._num_failures, MAX_DOUBLINGS)
        self._num_failures += 1

    def succeeded(self, epoch: int) -> None:
        """The update of an epoch is done; if it failed on the way, this changes nothing."""
        if self.holds(epoch):
            self._num_failures = 0
