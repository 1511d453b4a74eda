"""Which copy of a policy an actor takes, from whom, and when its turn is: a core. What it is made of: `patches`.

Learners say of each version what its acting copy is called: the digest of its words, a keyframe, and a patch from the
version before. An actor believes what most of the learners say, if none of them says otherwise; else it takes the
whole state, from which it makes the copy itself. It takes what is smallest of what leads there from the copy that it
has, and says that it has it as soon as the bytes are there, so that others take it from there: what its worker is doing
meanwhile holds nobody up.

Of all actors that want a version at once, one asks a learner, by rendezvous hash; the others wait until one of them
has it, and each a little longer than the one before it if none comes to have it: so that a slow link of a learner, or
to where they are, carries it about once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from shoal.protocol.ids import Cid, PeerId
from shoal.training.statements import NO_BALLOT, GivenCopy, RoundKey, first_after, turn_rank

LEAST_TURN_S: Final = 0.5
"""From one actor that asks a learner to the next."""
TURN_PART: Final = 1.5
"""Of the time that the last copy took, if that is longer."""
KEEPERS: Final = 2
"""Actors that take whole states once in a while, and hold them for others should all learners be gone."""
WORDS_S: Final = 2.0
"""For learners to say what the copy of a version is; then the whole state is taken."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to come to a copy.

    Attributes:
        cid: of a patch or a keyframe.
        num_bytes: of it.
        holders: who have it, other actors first.
        digest: of the copy that it leads to.
        of_actors: how many of the holders are actors.
        base: digest of the copy that it is a patch of; None: a keyframe.
        version: epoch of the policy, as the learners say.
    """

    cid: Cid
    num_bytes: int
    holders: tuple[PeerId, ...]
    digest: bytes
    of_actors: int
    base: bytes | None
    version: int


def agreed(said: Mapping[PeerId, GivenCopy], learners: Collection[PeerId], state: Cid) -> bytes | None:
    """The digest of the copy of a state, if most of the learners say it and none of them another."""
    named = [said[peer].digest for peer in learners if peer in said and said[peer].state == state]
    return named[0] if len(set(named)) == 1 and 2 * len(named) > len(learners) else None


def way_to(
    said: Mapping[PeerId, GivenCopy], learners: Collection[PeerId], state: Cid, held: bytes | None
) -> Way | None:
    """The smallest way from the copy that is held, and who have it; None: nothing is agreed on.

    Args:
        said: what members say that they have.
        learners: those of them that learn.
        state: the policy that is wanted.
        held: digest of the copy that is here; None: none.
    """
    digest = agreed(said, learners, state)
    if digest is None:
        return None
    holders: dict[tuple[int, Cid, bool], list[PeerId]] = {}
    for peer, each in said.items():
        if each.state != state or each.digest != digest:
            continue
        if each.key is not None:
            holders.setdefault((each.key_bytes, each.key, False), []).append(peer)
        if each.patch is not None and each.base == held:
            holders.setdefault((each.patch_bytes, each.patch, True), []).append(peer)
    if not holders:
        return None
    (num_bytes, cid, is_patch), peers = min(holders.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    ordered = sorted(peers, key=lambda peer: (peer in learners, peer))
    of_actors = sum(peer not in learners for peer in peers)
    version = next(said[peer].version for peer in learners if peer in said and said[peer].state == state)
    return Way(cid, num_bytes, tuple(ordered), digest, of_actors, held if is_patch else None, version)


def turn_s(me: PeerId, actors: Collection[PeerId], state: Cid, last_s: float) -> float:
    """How long this actor waits for others to have a version before it asks a learner.

    Args:
        me: this actor.
        actors: the others.
        state: the policy.
        last_s: that the last copy took: from when a learner was asked for it, or, if an actor was, from when it was
            wanted.
    """
    key = RoundKey(0, 0, first_after(state))
    before = sum(turn_rank("copy", key, 0, peer) < turn_rank("copy", key, 0, me) for peer in actors if peer != me)
    return before * max(LEAST_TURN_S, TURN_PART * last_s)


def is_keeper(me: PeerId, actors: Collection[PeerId]) -> bool:
    """Whether this actor is one of the few that hold whole states; ``actors``: the others."""
    key = RoundKey(0, 0, NO_BALLOT)
    mine = turn_rank("whole", key, 0, me)
    return sum(turn_rank("whole", key, 0, peer) < mine for peer in actors if peer != me) < KEEPERS
