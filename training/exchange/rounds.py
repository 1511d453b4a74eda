"""One round: how live learners settle, without a leader, which contributions are averaged.

A round is named by (epoch, step). Every learner offers what it wants averaged: content named by a CID, with a weight.
The live learner with the lowest rendezvous hash of (swarm, epoch, step, peer) proposes the offers that it *holds*, so
whoever accepts can fetch them all from it. Everybody merges the proposed offers in the order of their authors and
so gets the same bytes (`averager`).

* A proposer that is seen to be gone makes the next hash the proposer at once; one that is silent does so after
  twice the wait after which a silent learner is left out of the proposal, so that waiting for it is no silence.
* Whoever accepts a proposal says so in presence too: whoever comes late, or did not hear the proposer before it died,
  finds it there, and fetches the bytes from those who hold them by then.
* Waits are learned: median + 4·MAD of how long past rounds took, within `MIN_PATIENCE_S` and `MAX_PATIENCE_S`.
* Two learners whose views of who is alive differ may both propose. Of what it sees, each learner accepts the lowest
  attempt, then the most offers, and stays with it while it can be fetched; if two groups so end with different
  policies, the policy view of the CRDT picks one of them for everybody (`crdt.views.best_policy`).

Rendezvous hashing: Thaler and Ravishankar 1998. This core has no clock: ``now`` is seconds of any monotonic clock.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId, SwarmId

MIN_PATIENCE_S: Final = 0.75
MAX_PATIENCE_S: Final = 30.0
FIRST_PATIENCE_S: Final = 10.0
PATIENCE_MADS: Final = 4.0
PAST_ROUNDS: Final = 32


@dataclass(frozen=True, slots=True)
class RoundKey:
    """Names a round within a swarm: the epoch, and which of its exchanges."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What one learner wants averaged.

    Attributes:
        author: who offers it.
        cid: names the bytes.
        weight: in samples.
    """

    author: PeerId
    cid: Cid
    weight: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Which offers to average: at least one, in the order of their authors, one of each.

    Attributes:
        epoch: with ``step``, names the round.
        step: likewise.
        attempt: how often its author had passed over a silent proposer before.
        offers: the bytes, and their weights.
    """

    epoch: int
    step: int
    attempt: int
    offers: tuple[Offer, ...]

    def __post_init__(self) -> None:
        authors = [offer.author for offer in self.offers]
        if not authors or any(one >= other for one, other in itertools.pairwise(authors)):
            raise ProtocolError("a proposal names offers, one of each author, in order")
        if self.attempt < 0 or any(offer.weight <= 0 for offer in self.offers):
            raise ProtocolError("a proposal's attempt cannot be negative, and each of its offers weighs something")


@dataclass(frozen=True, slots=True)
class LearnerView:
    """What the presence of a live learner says, as far as rounds go.

    Attributes:
        key: the round it works towards.
        is_ready: whether it has arrived there: from then on it has made its offer, or has nothing to offer.
        offer: what it offers for that round.
        proposal: the newest it made or accepted.
    """

    key: RoundKey
    is_ready: bool = False
    offer: Offer | None = None
    proposal: Proposal | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get these bytes; the round goes on when `Round.hold` says that they are there."""

    offer: Offer
    sources: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Propose:
    """Say this in presence: it was made here, or accepted."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class Decide:
    """Average these; all of them are held. The round is over."""

    proposal: Proposal


Output = Fetch | Propose | Decide


class Patience:
    """How long to wait for others, learned from the rounds that went well."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=PAST_ROUNDS)

    @property
    def seconds(self) -> float:
        """The wait for the next round."""
        if len(self._durations) < 3:
            return FIRST_PATIENCE_S
        median = statistics.median(self._durations)
        deviation = statistics.median(abs(duration - median) for duration in self._durations)
        return min(MAX_PATIENCE_S, max(MIN_PATIENCE_S, median + PATIENCE_MADS * deviation))

    def learn(self, duration_s: float) -> None:
        """A round took this long from the own offer to the decision."""
        self._durations.append(duration_s)


def rendezvous_rank(swarm: SwarmId, purpose: str, epoch: int, step: int, peer: PeerId) -> bytes:
    """The hash by which peers are ordered for one purpose at one point of a run; lowest first."""
    return hashlib.sha256(f"{swarm}/{purpose}/{epoch}/{step}/{peer}".encode()).digest()


def choose(swarm: SwarmId, purpose: str, epoch: int, peers: Iterable[PeerId]) -> PeerId | None:
    """The one of ``peers`` whose turn it is, the same for everybody with the same view."""
    return min(peers, key=lambda peer: rendezvous_rank(swarm, purpose, epoch, 0, peer), default=None)


class Round:
    """One learner's part in one round."""

    def __init__(
        self, swarm: SwarmId, me: PeerId, key: RoundKey, own: Offer | None, patience_s: float, now: float
    ) -> None:
        self.key = key
        self.patience_s = patience_s
        self._swarm = swarm
        self._me = me
        self._own = own
        self._held: set[Cid] = {own.cid} if own is not None else set()
        self._asked: set[Cid] = set()
        self._accepted: Proposal | None = None
        self._given_up: set[Proposal] = set()
        self._decided = False
        self._attempt = 0
        self._waiting_since = now
        self._wake_at = now

    @property
    def next_wake(self) -> float:
        """When to call `update` at the latest, even if nothing happens."""
        return self._wake_at

    def hold(self, cid: Cid) -> None:
        """These bytes are here now."""
        self._held.add(cid)

    def spoil(self, cid: Cid) -> None:
        """These bytes cannot be had for now."""
        self._asked.discard(cid)

    def update(self, learners: Mapping[PeerId, LearnerView], now: float) -> list[Output]:
        """Look at the live learners (without this one) and the clock, and say what to do."""
        if self._decided:
            return []
        outputs: list[Output] = []
        if self._accepted is not None and now >= self._waiting_since + 2 * self.patience_s:
            self._given_up.add(self._accepted)  # it cannot be had: nobody who is left holds it all
            self._accepted = None
            self._start_attempt(now)
        if self._accepted is None:
            proposal = self._best_visible(learners) or self._propose(learners, now)
            if proposal is not None:
                self._accepted = proposal
                self._waiting_since = now
                self._wake_at = now + 2 * self.patience_s
                outputs.append(Propose(proposal))
        if self._accepted is None:
            for peer, view in learners.items():
                if view.offer is not None and view.key == self.key:
                    self._want(view.offer, (peer,), outputs)
        else:
            for offer in self._accepted.offers:
                self._want(offer, tuple(learners), outputs)
            if all(offer.cid in self._held for offer in self._accepted.offers):
                self._decided = True
                outputs.append(Decide(self._accepted))
        return outputs

    def _start_attempt(self, now: float) -> None:
        self._attempt += 1
        self._waiting_since = now

    def _want(self, offer: Offer, sources: tuple[PeerId, ...], outputs: list[Output]) -> None:
        if offer.cid not in self._held and offer.cid not in self._asked:
            self._asked.add(offer.cid)
            outputs.append(Fetch(offer, sources))

    def _best_visible(self, learners: Mapping[PeerId, LearnerView]) -> Proposal | None:
        """What to accept of what others made or accepted for this round, the same for everybody with the same view."""
        fitting = {
            view.proposal
            for view in learners.values()
            if view.proposal is not None and RoundKey(view.proposal.epoch, view.proposal.step) == self.key
        }
        return min(fitting - self._given_up, key=_preference, default=None)

    def _propose(self, learners: Mapping[PeerId, LearnerView], now: float) -> Proposal | None:
        """Propose if it is this learner's turn and nobody is waited for; or pass over whoever does not."""
        present = {
            peer: view
            for peer, view in learners.items()
            if view.key.epoch == self.key.epoch and view.key.step <= self.key.step
        }
        candidates = sorted([self._me, *present], key=self._rank)
        if candidates[self._attempt % len(candidates)] != self._me and now >= self._waiting_since + 2 * self.patience_s:
            self._start_attempt(now)
        if candidates[self._attempt % len(candidates)] != self._me:
            self._wake_at = self._waiting_since + 2 * self.patience_s
            return None
        waited = self._attempt > 0 or now >= self._waiting_since + self.patience_s
        offers = [view.offer for view in present.values() if view.offer is not None and view.key == self.key]
        held = [offer for offer in offers if offer.cid in self._held]
        everybody = len(held) == len(offers) and all(
            view.is_ready and view.key == self.key for view in present.values()
        )
        if self._own is not None:
            held.append(self._own)
        if not held or not (everybody or waited):
            self._wake_at = (now if waited else self._waiting_since) + self.patience_s
            return None
        ordered = tuple(sorted(held, key=lambda offer: offer.author))
        return Proposal(self.key.epoch, self.key.step, self._attempt, ordered)

    def _rank(self, peer: PeerId) -> bytes:
        return rendezvous_rank(self._swarm, "round", self.key.epoch, self.key.step, peer)


def _preference(proposal: Proposal) -> tuple[int, int, list[tuple[PeerId, Cid, int]]]:
    offers = [(offer.author, offer.cid, offer.weight) for offer in proposal.offers]
    return proposal.attempt, -len(offers), offers
