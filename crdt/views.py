"""What the documents say together: pure functions from every author's registers to one answer.

`Views` keeps the answers up to date: only registers that changed are read again, so that a change costs the same
however much everybody else has written.

The registers are written by strangers. Whatever in them is not of the form that `docs/architecture.md` gives is as good
as not written; nothing here raises. Every node with the same documents computes the same answers.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId

Documents = Mapping[PeerId, Mapping[str, Any]]
"""What `shoal.crdt.sync.SwarmDocs.documents` gives."""

MAX_COUNT: Final = 2**53
"""Above this a counter or an epoch is a lie; sums of 256 still fit into 64 bits."""

MAX_CLAIMS: Final = 16
"""Evaluations of one author that reached the target, in `Views.useful`,"""
NUM_NEWEST: Final = 16
"""and those of its highest epochs."""

MAX_ROLE_CHARS: Final = 32
MAX_DIGEST_CHARS: Final = 128
MAX_SCORES: Final = 64
"""That are read of one evaluation."""
MAX_SCORE_CHARS: Final = 80


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
    """One evaluation of one policy, as its author found it; ``scores``: what else it found, by name."""

    epoch: int
    cid: Cid
    mean_return: float
    env_steps: int
    episodes: int
    author: PeerId
    scores: tuple[tuple[str, float], ...] = ()


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
    found = ((author, _membership(docs[author])) for author in sorted(docs))
    return {author: membership for author, membership in found if membership is not None}


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
    found = ((author, _contributed(docs[author])) for author in sorted(docs))
    return {author: contributed for author, contributed in found if contributed is not None}


@dataclass(slots=True)
class _Read:
    """What was read of one author: of which registers, and each of its evaluations with the entry that says it."""

    registers: Mapping[str, Any]
    entries: dict[str, tuple[Any, Evaluation | None]]
    useful: tuple[Evaluation, ...]


class Views:
    """The answers to the newest documents that it was told of.

    Attributes:
        members: as the function `members`.
        contributions: as the function `contributions`.
        useful: every evaluation that can matter to a run: of each author the first `MAX_CLAIMS` that reached the
            target, and the `NUM_NEWEST` of the highest epochs. As long as it does not change, it is the same object.
        num_read: how many entries of growing registers were read.
    """

    def __init__(self, target_return: float | None = None) -> None:
        """Start with no documents; without a target, no evaluation reaches it."""
        self.members: Mapping[PeerId, Membership] = {}
        self.contributions: Mapping[PeerId, Contributed] = {}
        self.useful: tuple[Evaluation, ...] = ()
        self.num_read = 0
        self._target_return = target_return
        self._docs: Documents = {}
        self._read: dict[PeerId, _Read] = {}
        self._sorted: list[tuple[int, str, str, Evaluation]] = []
        self._evaluations: tuple[Evaluation, ...] | None = ()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """As the function `evaluations`; as long as it does not change, it is the same object."""
        if self._evaluations is None:
            self._evaluations = tuple(item[3] for item in self._sorted)
        return self._evaluations

    def update(self, docs: Documents) -> None:
        """These are the documents now; registers that did not change have to be the same objects as before."""
        if docs is self._docs:
            return
        self._docs = docs
        are_useful_as_before = True
        memberships, contributed = dict(self.members), dict(self.contributions)
        for author in self._read.keys() - docs.keys():
            are_useful_as_before &= not self._evaluate(author, {})
            del self._read[author]
            memberships.pop(author, None)
            contributed.pop(author, None)
        for author, registers in docs.items():
            before = self._read.get(author)
            if before is not None and before.registers is registers:
                continue
            _keep(memberships, author, _membership(registers))
            _keep(contributed, author, _contributed(registers))
            are_useful_as_before &= not self._evaluate(author, registers)
        self.members = {author: memberships[author] for author in sorted(memberships)}
        self.contributions = {author: contributed[author] for author in sorted(contributed)}
        if not are_useful_as_before:
            self.useful = tuple(each for author in sorted(self._read) for each in self._read[author].useful)

    def _evaluate(self, author: PeerId, registers: Mapping[str, Any]) -> bool:
        """Read the evaluations that changed; whether that changes what is useful of them."""
        read = self._read.get(author)
        if read is None:
            read = self._read[author] = _Read({}, {}, ())
        entries = _map(registers.get("evaluations"))
        if entries is read.registers.get("evaluations"):
            read.registers = registers
            return False
        held = read.entries
        changed = [key for key, entry in entries.items() if key not in held or held[key][0] is not entry]
        gone = [key for key in held if key not in entries]
        for key in (*gone, *changed):
            before = held.pop(key, (None, None))[1]
            if before is not None:
                del self._sorted[bisect_left(self._sorted, _place(before))]
            if key in entries:
                self.num_read += 1
                found = _evaluation(author, key, _map(entries[key]))
                held[key] = entries[key], found
                if found is not None:
                    insort(self._sorted, (*_place(found), found))
        read.registers = registers
        if changed or gone:
            self._evaluations = None
        useful = self._useful(each for _, each in held.values() if each is not None)
        is_changed, read.useful = useful != read.useful, useful
        return is_changed

    def _useful(self, found: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
        in_order = sorted(found, key=lambda each: (each.epoch, each.cid))
        target = self._target_return
        claims = [each for each in in_order if target is not None and each.mean_return >= target][:MAX_CLAIMS]
        return tuple(dict.fromkeys((*claims, *in_order[-NUM_NEWEST:])))


def _keep(found: dict[PeerId, Any], author: PeerId, value: Membership | Contributed | None) -> None:
    if value is None:
        found.pop(author, None)
    else:
        found[author] = value


def _place(evaluation: Evaluation) -> tuple[int, str, str]:
    return evaluation.epoch, evaluation.cid, evaluation.author


def _membership(registers: Mapping[str, Any]) -> Membership | None:
    register = _map(registers.get("member"))
    role, left = register.get("role"), register.get("left", False)
    if isinstance(role, str) and 0 < len(role) <= MAX_ROLE_CHARS and isinstance(left, bool):
        return Membership(role, left)
    return None


def _contributed(registers: Mapping[str, Any]) -> Contributed | None:
    register = _map(registers.get("contributions"))
    env_steps, rounds = _count(register.get("env_steps")), _count(register.get("rounds"))
    return None if env_steps is None or rounds is None else Contributed(env_steps, rounds)


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
    return Evaluation(epoch, cid, mean_return, env_steps, episodes, author, _scores(entry.get("scores")))


def _scores(value: Any) -> tuple[tuple[str, float], ...]:
    """At most `MAX_SCORES` numbers with names; what is anything else is passed over."""
    found = []
    for name, said in sorted(_map(value).items(), key=lambda item: str(item[0]))[:MAX_SCORES]:
        score = _number(said)
        if isinstance(name, str) and len(name) <= MAX_SCORE_CHARS and score is not None:
            found.append((name, score))
    return tuple(found)


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
