"""What was found of a shard, said in signed words, and those words held against who says them.

What can be found is one of four things, and no two of them are one: the shard is true as far as was looked; it is
*false*, of a kind and at a place; whether it is true *cannot be had now* (the policy or a shard before is not here, an
environment failed); or it *does not fit* (another task, other surroundings, another version of columns). What is false
is false by arithmetic that every member can do again.

A finding that matters is signed (`Checked`): who says so, of which shard, and for what is false the kind, the place and
the author's own signed head. Whoever hears it can look there itself and then knows who lied: the author, or the one who
accused it, or both the author and whoever said that all was well (`disproved`). As in
`shoal.training.exchange.audits`, nobody is believed: what a node acts on is what it found itself.

Who looks at a shard follows from a hash that its author could not know when it announced the shard (`who_checks`), and
how often an author is looked at from how many of its shards were found true (`shoal.training.rollouts.trust`).

What this does not stop: an author may throw away shards that it does not like. It cannot choose seeds, but it can begin
streams until one is lucky; that costs it as much as doing the work, and shows as numbers of streams that nobody saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer
from shoal.training.rollouts.shard import MAX_HEAD_BYTES, MAX_SAMPLES, Head, Shard, ShardKind, open_head

CHECKED: Final = "shard-checked/1"
"""What a member signs of a shard is of this kind."""
MAX_CHECKED_BYTES: Final = MAX_HEAD_BYTES + 2048
MAX_CHECKERS: Final = 4


class Verdict(StrEnum):
    """What was found."""

    TRUE = "true"
    FALSE = "false"
    CANNOT_BE_HAD = "cannot be had"
    DOES_NOT_FIT = "does not fit"


class Lie(StrEnum):
    """What is false about a shard."""

    FORM = "form"
    SEEDS = "seeds"
    LEAD = "lead"
    ENDS = "ends"
    REWARDS = "rewards"
    SIGHTS = "sights"
    ACTS = "acts"
    DRAWS = "draws"
    LOG_PROBS = "log_probs"


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of looking.

    Attributes:
        verdict: in one word.
        words: for people.
        lie: of what kind, if it is false.
        step: where: the step of a row, or the act of a take; 0 where it is false as a whole.
        part: likewise, which environment, or which play.
        looked: kinds of lies that would have been found, if it is true, within
        seen: the first so many steps of rows, or plays.
    """

    verdict: Verdict
    words: str = ""
    lie: Lie | None = None
    step: int = 0
    part: int = 0
    looked: frozenset[Lie] = frozenset()
    seen: int = 0


# --- what is said of a shard, and by whom ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a member found of a shard.

    Attributes:
        swarm: of the run.
        shard: its name.
        verdict: true or false; nothing else is worth saying.
        lie: of what kind, if it is false.
        step: where, see `Finding`.
        part: likewise.
        proof: the author's signed head, if it is false; else empty.
    """

    swarm: SwarmId
    shard: Cid
    verdict: Verdict
    lie: Lie | None = None
    step: int = 0
    part: int = 0
    proof: bytes = b""

    def __post_init__(self) -> None:
        if self.verdict not in (Verdict.TRUE, Verdict.FALSE):
            raise ProtocolError("only what is true or false is said of a shard; say nothing")
        if (self.lie is None) != (self.verdict is Verdict.TRUE) or bool(self.proof) != (self.verdict is Verdict.FALSE):
            raise ProtocolError("what is false is said with its kind and its author's word, what is true without")
        if not (0 <= self.step <= MAX_SAMPLES and 0 <= self.part <= MAX_SAMPLES):
            raise ProtocolError("what is false is at a place that no shard has; refuse it")


@dataclass(frozen=True, slots=True)
class Said:
    """What somebody signed of a shard.

    Attributes:
        by: who.
        checked: what.
        author: of the shard, if it is said to be false.
        head: likewise.
    """

    by: PeerId
    checked: Checked
    author: PeerId | None = None
    head: Head | None = None


def say(signer: Signer, shard: Shard, finding: Finding) -> bytes | None:
    """Sign what was found; None, if that is nothing to say."""
    if finding.verdict not in (Verdict.TRUE, Verdict.FALSE):
        return None
    checked = Checked(
        swarm=shard.head.swarm,
        shard=shard.cid,
        verdict=finding.verdict,
        lie=finding.lie,
        step=finding.step,
        part=finding.part,
        proof=shard.proof if finding.verdict is Verdict.FALSE else b"",
    )
    return encode(signer.seal(CHECKED, encode(checked)))


def accuse(signer: Signer, swarm: SwarmId, shard: Cid, proof: bytes, lie: Lie, step: int, part: int) -> bytes:
    """Sign that a shard is false, from what is left of it: its name and its author's signed head.

    Raises:
        ProtocolError: if that is nothing that can be said.
    """
    checked = Checked(swarm=swarm, shard=shard, verdict=Verdict.FALSE, lie=lie, step=step, part=part, proof=proof)
    return encode(signer.seal(CHECKED, encode(checked)))


def hear(data: bytes | memoryview, swarm: SwarmId) -> Said:
    """Read what somebody says it found. Whether it did is another question: look yourself, then ask `disproved`.

    Raises:
        SignatureError: if nobody signed it, or the author did not sign the shard that it is held against.
        ProtocolError: if it is anything else, or of another swarm.
    """
    signed = decode(Signed, bytes(data), max_bytes=MAX_CHECKED_BYTES, strict=True)
    signed.check(CHECKED)
    checked = decode(Checked, signed.payload, max_bytes=MAX_CHECKED_BYTES, strict=True)
    if encode(checked) != signed.payload or checked.swarm != swarm:
        raise ProtocolError("what is said of a shard is of another swarm, or not in the canonical form; refuse it")
    if checked.verdict is Verdict.TRUE:
        return Said(signed.author, checked)
    author, head = open_head(checked.proof)
    if head.swarm != swarm:
        raise ProtocolError("a shard of another swarm is held against its author; refuse it")
    return Said(signed.author, checked, author, head)


def disproved(said: Said, shard: Shard, own: Finding) -> tuple[PeerId, ...]:
    """Who has lied, by what this node found itself.

    Args:
        said: what somebody says of the shard.
        shard: that shard, as this node opened it.
        own: what it found, at the place that is named if one is.

    Raises:
        ProtocolError: if it is another shard.
    """
    if said.checked.shard != shard.cid or (said.author is not None and said.checked.proof != shard.proof):
        raise ProtocolError("this is not the shard that is spoken of; fetch that one")
    if own.verdict is Verdict.FALSE:
        return (shard.author, said.by) if said.checked.verdict is Verdict.TRUE else (shard.author,)
    if own.verdict is not Verdict.TRUE or said.checked.verdict is Verdict.TRUE or said.checked.lie not in own.looked:
        return ()
    place = said.checked.step if shard.head.kind is ShardKind.ROWS else said.checked.part
    return (said.by,) if place < own.seen else ()


def forked(first: bytes, second: bytes) -> PeerId | None:
    """Who signed two shards for one place of one stream; None: nobody did. It needs no other proof, and no check.

    Raises:
        ProtocolError: if one of the two is no signed head of a shard.
    """
    (author, one), (other_author, other) = open_head(first), open_head(second)
    places = [(each.swarm, each.policy, each.stream, each.number) for each in (one, other)]
    return author if author == other_author and places[0] == places[1] and encode(one) != encode(other) else None


def who_checks(
    shard: Cid, author: PeerId, members: Iterable[PeerId], beacon: bytes, rate: float, *, checkers: int = 1
) -> tuple[PeerId, ...]:
    """Who looks into a shard; nobody, for most shards of those who are trusted.

    Args:
        shard: its name.
        author: who does not check itself.
        members: all who can.
        beacon: what nobody knew when the shard was announced, such as the name of the policy after it. An author that
            knew it could make shards until one is looked into by nobody.
        rate: the share of shards that is looked into, by `shoal.training.rollouts.trust.rate_of`.
        checkers: how many look into one, at most `MAX_CHECKERS`.
    """
    if _unit("whether", shard, beacon) >= rate:
        return ()
    others = [member for member in members if member != author]
    ranked = sorted(others, key=lambda member: (_unit(f"who {member}", shard, beacon), member))
    return tuple(ranked[: min(checkers, MAX_CHECKERS)])


def _unit(purpose: str, shard: Cid, beacon: bytes) -> float:
    """From 0 to 1, by a hash."""
    digest = hashlib.sha256(f"{purpose}\n{shard}\n".encode() + beacon).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
