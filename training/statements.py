"""What a member of a swarm says of itself and of a round, each signed by it as a presence record of its own topic.

================  ====================================================================================
``facts``         what it does now; for people, and for how long others wait; nothing is decided by it
``addresses``     where it is reached
``offer``         "for this round I give these bytes, made from so many samples"
``proposal``      "these offers should be averaged", by hash
``vote``          "I hold all that this ballot lists, and would average it"
``result``        "this is the policy I hold, from this parent by this ballot"
``posts``         "these contents of mine can be had", by topic; what is in them is for recipes to read
``shards``        "this is what I collected last, by these policies"
``copies``        "this is what leads to the acting copy of this policy, and I have it"
================  ====================================================================================

A statement names the round that it is for: the epoch, the exchange within it, and what both follow from, so that nobody
averages what was made from another policy. A ballot is named by what it lists and not by who proposed it: whoever
proposes the same again gathers the same votes. Every number has a bound that an honest member cannot pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, TypeAlias

from shoal.crdt.presence import TopicRule
from shoal.protocol.codec import from_plain
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.manifest import Role

HASH_BYTES: Final = 32
MAX_EPOCH: Final = 2**40
MAX_STEPS: Final = 2**50
"""Environment steps of a run, or of one member."""
MAX_SAMPLES: Final = 2**31
MAX_RATE: Final = 1e7
"""Environment steps per second of one member."""
MAX_SECONDS: Final = 1e6
MAX_UPLINK: Final = 2**40
"""Bytes per second that one member can send."""
MAX_ADDRESSES: Final = 16
MAX_ADDRESS_CHARS: Final = 512
MAX_OFFERS: Final = 128
"""Offers of one ballot."""
MAX_ATTEMPTS: Final = 2**20
MAX_DIGEST_CHARS: Final = 128
MAX_TOPIC_CHARS: Final = 40
MAX_PART_CHARS: Final = 40
MAX_POSTED: Final = 32
"""Newest things that one member has posted, under all topics, that others can ask for."""
MAX_POST_BYTES: Final = 4 * 1024 * 1024
"""Of one."""
MAX_GIVEN: Final = 16
"""Newest shards of an actor that others can ask for."""
MAX_COPY_BYTES: Final = 2**30
MAX_SHARD_BYTES: Final = 16 * 1024 * 1024
"""Of one that crosses the wire."""


class Phase(StrEnum):
    """What a member does now."""

    STARTING = "starting"
    WAITING = "waiting"
    FETCHING = "fetching"
    COLLECTING = "collecting"
    UPDATING = "updating"
    EXCHANGING = "exchanging"
    EVALUATING = "evaluating"
    STORING = "storing"
    DONE = "done"
    FAILED = "failed"


class Wait(StrEnum):
    """What a member waits for; a code, since words of a stranger are shown to nobody."""

    NOTHING = ""
    POLICY = "policy"
    NEWER = "newer"
    LEARNERS = "learners"
    OUTRUN = "outrun"
    MEMBERS = "members"
    OTHERS = "others"

    @property
    def words(self) -> str:
        """The same, for people."""
        return _WAITS[self]


_WAITS: Final = {
    Wait.NOTHING: "",
    Wait.POLICY: "for the first policy: no learner has given it one yet",
    Wait.NEWER: "for a newer policy to evaluate",
    Wait.LEARNERS: "for a learner: nobody learns from what it would make",
    Wait.OUTRUN: "for a newer policy: it outruns the learners, and of this version it has made what they can use",
    Wait.MEMBERS: "for more learners, without whom the run does not begin",
    Wait.OTHERS: "for the other learners of this round",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a member does now.

    Attributes:
        epoch: of the policy it holds.
        step: the exchange within the epoch that it works towards.
        samples: environment steps it collected since that policy.
        env_steps: by itself, in this run, in all.
        steps_per_s: its recent rate of environment steps, pauses included.
        speed: environment steps per second while it collects.
        part: what it is in a recipe; empty: nothing, or nothing yet.
        wait: what for, while its phase is ``waiting``.
        stands_by: whether it would learn if it were needed: its role is its own choice, and it can learn.
    """

    role: Role
    phase: Phase = Phase.STARTING
    epoch: int = 0
    step: int = 0
    samples: int = 0
    env_steps: int = 0
    steps_per_s: float = 0.0
    speed: float = 0.0
    part: str = ""
    wait: Wait = Wait.NOTHING
    stands_by: bool = False

    def __post_init__(self) -> None:
        if len(self.part) > MAX_PART_CHARS:
            raise ProtocolError(f"the name of a part has at most {MAX_PART_CHARS} characters")
        _check(self.epoch, MAX_EPOCH, "epoch")
        _check(self.step, MAX_EPOCH, "step")
        _check(self.samples, MAX_SAMPLES, "samples")
        _check(self.env_steps, MAX_STEPS, "env_steps")
        _check(self.steps_per_s, MAX_RATE, "steps_per_s")
        _check(self.speed, MAX_RATE, "speed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Full multiaddrs at which a member listens."""

    addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.addresses) > MAX_ADDRESSES or any(len(each) > MAX_ADDRESS_CHARS for each in self.addresses):
            raise ProtocolError(f"a member names at most {MAX_ADDRESSES} addresses")


@dataclass(frozen=True, slots=True)
class RoundKey:
    """Names a round within a swarm.

    Attributes:
        epoch: of the policy that the round starts from.
        step: which exchange of the epoch's update.
        after: what it follows from: `first_after` of the policy, or the ballot that the step before decided.
    """

    epoch: int
    step: int
    after: bytes

    def __post_init__(self) -> None:
        _check(self.epoch, MAX_EPOCH, "epoch")
        _check(self.step, MAX_EPOCH, "step")
        _check_hash(self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one learner wants averaged.

    Attributes:
        key: the round.
        cid: names the bytes.
        weight: in samples.
        seconds: of work that it took, collecting and optimising; paces the shares of the epochs to come.
        uplink: bytes per second that the learner can send, as it measured; 0 if it does not know. By it owners have
            parts, where these bytes name an array that is reduced together.
    """

    key: RoundKey
    cid: Cid
    weight: int
    seconds: float = 0.0
    uplink: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.weight <= MAX_SAMPLES:
            raise ProtocolError(f"an offer cannot weigh {self.weight}")
        _check(self.seconds, MAX_SECONDS, "seconds")
        _check(self.uplink, MAX_UPLINK, "uplink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Which offers to average.

    Attributes:
        key: the round.
        attempt: how many proposers were passed over before.
        offers: the record hashes of the offers, ascending.
    """

    key: RoundKey
    attempt: int
    offers: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check(self.attempt, MAX_ATTEMPTS, "attempt")
        if not 1 <= len(self.offers) <= MAX_OFFERS:
            raise ProtocolError(f"a proposal lists 1 to {MAX_OFFERS} offers, not {len(self.offers)}")
        before = b""
        for offer in self.offers:
            _check_hash(offer)
            if offer <= before:
                raise ProtocolError("a proposal lists offers once each, in order")
            before = offer

    @property
    def ballot(self) -> bytes:
        """The name of what is proposed, whoever proposes it."""
        return ballot_name(self.key, self.offers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """The voter holds all that a ballot lists, and votes for nothing in earlier attempts any more.

    Attributes:
        key: the round.
        attempt: that the voter is in.
        ballot: that it voted for last; `NO_BALLOT` if for none.
        cast: the attempt in which it did.
    """

    key: RoundKey
    ballot: bytes
    attempt: int = 0
    cast: int = 0

    def __post_init__(self) -> None:
        _check(self.attempt, MAX_ATTEMPTS, "attempt")
        _check(self.cast, self.attempt, "vote's attempt")
        _check_hash(self.ballot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The policy that a member holds.

    Attributes:
        epoch: of the policy.
        cid: of its state.
        parent: the state that it was made from; None for the initial one.
        ballot: of the first exchange of the update that made it; `NO_BALLOT` for the initial one.
        env_steps: by all learners together, that went into it.
    """

    epoch: int
    cid: Cid
    parent: Cid | None
    ballot: bytes
    env_steps: int

    def __post_init__(self) -> None:
        _check(self.epoch, MAX_EPOCH, "epoch")
        _check(self.env_steps, MAX_STEPS, "env_steps")
        _check_hash(self.ballot)


@dataclass(frozen=True, slots=True)
class Posting:
    """One thing that a member has posted.

    Attributes:
        topic: under which others ask for it.
        cid: of its content.
        epoch: in which it was posted.
        num_bytes: of its content.
    """

    topic: str
    cid: Cid
    epoch: int
    num_bytes: int

    def __post_init__(self) -> None:
        _check(self.epoch, MAX_EPOCH, "epoch")
        _check(self.num_bytes, MAX_POST_BYTES, "post")
        if not 1 <= len(self.topic) <= MAX_TOPIC_CHARS:
            raise ProtocolError(f"a topic has 1 to {MAX_TOPIC_CHARS} characters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Postings:
    """The newest things that a member has posted, newest first."""

    posted: tuple[Posting, ...] = ()

    def __post_init__(self) -> None:
        if len(self.posted) > MAX_POSTED:
            raise ProtocolError(f"a member has at most {MAX_POSTED} posts, not {len(self.posted)}")


@dataclass(frozen=True, slots=True)
class GivenShard:
    """What an actor collected.

    Attributes:
        cid: of its bytes (`shoal.training.rollouts.shard`).
        version: epoch of the policy that acted.
        samples: environment steps.
        num_bytes: of it.
    """

    cid: Cid
    version: int
    samples: int
    num_bytes: int

    def __post_init__(self) -> None:
        _check(self.version, MAX_EPOCH, "version")
        _check(self.samples, MAX_SAMPLES, "samples")
        _check(self.num_bytes, MAX_SHARD_BYTES, "shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenShards:
    """The newest shards of an actor, newest first."""

    given: tuple[GivenShard, ...] = ()

    def __post_init__(self) -> None:
        if len(self.given) > MAX_GIVEN:
            raise ProtocolError(f"an actor names at most {MAX_GIVEN} shards, not {len(self.given)}")


NO_BALLOT: Final = bytes(HASH_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenCopy:
    """The acting copy of a policy, as far as this member has what leads to it (`shoal.training.rollouts.copies`).

    Attributes:
        version: epoch of the policy.
        state: names it.
        digest: of the copy.
        key: a keyframe.
        key_bytes: of that.
        patch: from another copy.
        patch_bytes: of that.
        base: digest of that other copy.
    """

    version: int
    state: Cid
    digest: bytes
    key: Cid | None = None
    key_bytes: int = 0
    patch: Cid | None = None
    patch_bytes: int = 0
    base: bytes = bytes(HASH_BYTES)

    def __post_init__(self) -> None:
        _check(self.version, MAX_EPOCH, "version")
        _check(self.key_bytes, MAX_COPY_BYTES, "keyframe")
        _check(self.patch_bytes, MAX_COPY_BYTES, "patch")
        _check_hash(self.digest)
        _check_hash(self.base)


Statement: TypeAlias = Facts | Addresses | Offer | Proposal | Vote | Result | Postings | GivenShards | GivenCopy

TOPICS: Final[Mapping[str, type[Any]]] = {
    "facts": Facts,
    "addresses": Addresses,
    "offer": Offer,
    "proposal": Proposal,
    "vote": Vote,
    "result": Result,
    "posts": Postings,
    "shards": GivenShards,
    "copies": GivenCopy,
}
TOPIC_OF: Final = {kind: topic for topic, kind in TOPICS.items()}


def _learns(_: Mapping[str, Any]) -> int:
    return 1


def _may_learn(facts: Mapping[str, Any]) -> int:
    return int(facts.get("role") == Role.LEARNER)


TOPIC_RULES: Final = {
    "facts": TopicRule(max_bytes=768, per_s=4, burst=16, worth=_may_learn),
    "addresses": TopicRule(max_bytes=10_240, per_s=0.5, burst=8),
    "offer": TopicRule(max_bytes=768, keep=4, per_s=200, burst=400, worth=_learns),
    "proposal": TopicRule(max_bytes=6144, keep=4, per_s=200, burst=400, worth=_learns),
    "vote": TopicRule(max_bytes=768, keep=4, per_s=200, burst=400, worth=_learns),
    "result": TopicRule(max_bytes=768, keep=4, per_s=20, burst=40),
    "posts": TopicRule(max_bytes=8192, per_s=2, burst=16),
    "shards": TopicRule(max_bytes=3072, per_s=4, burst=16),
    "copies": TopicRule(max_bytes=768, per_s=8, burst=32),
}
"""How much of each one member may say: in mode ``gradient`` a round takes some milliseconds, an epoch never does.

Of more members than can be listened to, those who learn are heard, however many only follow and store."""


def read_statement(topic: str, facts: dict[str, Any]) -> Statement | None:
    """What another member says; None if it makes no sense."""
    kind = TOPICS.get(topic)
    if kind is None:
        return None
    try:
        statement: Statement = from_plain(kind, facts)
    except ProtocolError:
        return None
    return statement


def first_after(policy: Cid) -> bytes:
    """What the first round after a policy follows from."""
    return hashlib.sha256(policy.encode()).digest()


def ballot_name(key: RoundKey, offers: tuple[bytes, ...]) -> bytes:
    """The name of a ballot: of its round, and of the offers that it lists."""
    return hashlib.sha256(b"%d/%d/" % (key.epoch, key.step) + key.after + b"".join(offers)).digest()


@lru_cache(maxsize=4096)
def turn_rank(purpose: str, key: RoundKey, attempt: int, peer: PeerId) -> bytes:
    """The hash that orders peers for a purpose, lowest first (rendezvous hashing, Thaler and Ravishankar 1998)."""
    return hashlib.sha256(f"{purpose}/{key.step}/{attempt}/{peer}".encode() + key.after).digest()


def _check(value: float, limit: float, what: str) -> None:
    if not (0 <= value <= limit and math.isfinite(value)):
        raise ProtocolError(f"a member's {what} cannot be {value:g}")


def _check_hash(value: bytes) -> None:
    if len(value) != HASH_BYTES:
        raise ProtocolError(f"a hash has {HASH_BYTES} bytes, not {len(value)}")
