"""What the documents say together: pure functions from every author's registers to one answer.

The registers are written by strangers. Whatever in them is not of the form that `docs/architecture.md` gives is as good
as not written; nothing here raises. Every node with the same documents computes the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId

Documents = Mapping[PeerId, Mapping[str, Any]]
"""What `shoal.crdt.sync.SwarmDocs.documents` gives."""

MAX_COUNT: Final = 2**53
"""Above this a counter or an epoch is a lie; sums of 256 still fit into 64 bits."""

MAX_ROLE_CHARS: Final = 32
MAX_DIGEST_CHARS: Final = 128


@dataclass(frozen=True, slots=True)
class Membership:
    """An author's own word on its membership.

    Attributes:
        role: what it does in the swarm, as it names it.
        left: whether it left for good; one that is only away has not.
    """

    role: str
    left: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """A state of the run, and who holds it.

    Attributes:
        epoch: how many outer updates made it.
        cid: of its bytes.
        env_steps: how many environment steps of all learners went into it.
        digest: of its parameters.
        holders: the members whose newest state it is, in order.
    """

    epoch: int
    cid: Cid
    env_steps: int
    digest: str
    holders: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of one policy, as its author found it."""

    epoch: int
    cid: Cid
    mean_return: float
    env_steps: int
    episodes: int
    author: PeerId


@dataclass(frozen=True, slots=True)
class Contributed:
    """What an author says it put in.

    Attributes:
        env_steps: environment steps collected for updates that happened.
        rounds: averaging rounds that it was part of.
    """

    env_steps: int
    rounds: int


def members(docs: Documents) -> dict[PeerId, Membership]:
    """Everybody who ever joined, in order; those who left are marked so."""
    found = {}
    for author in sorted(docs):
        register = _map(docs[author].get("member"))
        role, left = register.get("role"), register.get("left", False)
        if isinstance(role, str) and 0 < len(role) <= MAX_ROLE_CHARS and isinstance(left, bool):
            found[author] = Membership(role, left)
    return found


def best_policy(docs: Documents, refused: AbstractSet[str] = frozenset()) -> Policy | None:
    """The newest state: of the highest epoch, then of the most environment steps, then with the lowest CID.

    Args:
        docs: of everybody; who is no member, or left, does not count.
        refused: CIDs and authors that do not count either, because they were checked and found false.
    """
    best: Policy | None = None
    for author, membership in members(docs).items():
        policy = None if membership.left or author in refused else _policy(docs[author], author)
        if policy is None or policy.cid in refused:
            continue
        if best is None or _rank(policy) < _rank(best):
            best = policy
        elif _rank(policy) == _rank(best):
            best = Policy(best.epoch, best.cid, best.env_steps, best.digest, (*best.holders, author))
    return best


def evaluations(docs: Documents) -> tuple[Evaluation, ...]:
    """Every evaluation by every author, by epoch, then CID, then author."""
    found = [
        evaluation
        for author in docs
        for epoch, entry in _map(docs[author].get("evaluations")).items()
        if (evaluation := _evaluation(author, epoch, _map(entry))) is not None
    ]
    return tuple(sorted(found, key=lambda item: (item.epoch, item.cid, item.author)))


def first_solved(
    docs: Documents, target_return: float | None, refused: AbstractSet[str] = frozenset()
) -> Evaluation | None:
    """The first evaluation that reached the target: of the lowest epoch, then with the lowest CID.

    Args:
        docs: of everybody.
        target_return: of the manifest; without one, no run is ever solved.
        refused: CIDs and authors that do not count, because they were checked and found false.
    """
    if target_return is None:
        return None
    for evaluation in evaluations(docs):
        if evaluation.mean_return >= target_return and not {evaluation.cid, evaluation.author} & refused:
            return evaluation
    return None


def contributions(docs: Documents) -> dict[PeerId, Contributed]:
    """What each author says it put in, in order of authors; an unverified claim."""
    found = {}
    for author in sorted(docs):
        register = _map(docs[author].get("contributions"))
        env_steps, rounds = _count(register.get("env_steps")), _count(register.get("rounds"))
        if env_steps is not None and rounds is not None:
            found[author] = Contributed(env_steps, rounds)
    return found


def _rank(policy: Policy) -> tuple[int, int, str, str]:
    return (-policy.epoch, -policy.env_steps, policy.cid, policy.digest)


def _policy(registers: Mapping[str, Any], author: PeerId) -> Policy | None:
    register = _map(registers.get("policy"))
    epoch, env_steps = _count(register.get("epoch")), _count(register.get("env_steps"))
    cid, digest = _cid(register.get("cid")), register.get("digest")
    if epoch is None or env_steps is None or cid is None:
        return None
    if not isinstance(digest, str) or len(digest) > MAX_DIGEST_CHARS:
        return None
    return Policy(epoch, cid, env_steps, digest, (author,))


def _evaluation(author: PeerId, epoch_key: Any, entry: Mapping[str, Any]) -> Evaluation | None:
    epoch, cid, mean_return = _epoch(epoch_key), _cid(entry.get("cid")), _number(entry.get("return"))
    env_steps, episodes = _count(entry.get("env_steps")), _count(entry.get("episodes"))
    if epoch is None or cid is None or mean_return is None or env_steps is None or not episodes:
        return None
    return Evaluation(epoch, cid, mean_return, env_steps, episodes, author)


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _epoch(key: Any) -> int | None:
    # One spelling only, so that an author has one evaluation per epoch.
    if not isinstance(key, str) or not (key.isascii() and key.isdigit()) or len(key) > 16 or str(int(key)) != key:
        return None
    return _count(int(key))


def _number(value: Any) -> float | None:
    if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def _cid(value: Any) -> Cid | None:
    try:
        return Cid.parse(value) if isinstance(value, str) else None
    except UsageError:
        return None
