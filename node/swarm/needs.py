"""Which contents a run needs: in memory, to merge and to give to others; on disk, to start from again.

In memory: the contributions of the round under way and of the one before, for members that are a moment behind; the
policy that is held and the one before; what is on its way. On disk: the policy that was written down last, the one
before it, and those of which this node says that they solve the task, since others come to evaluate them.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from shoal.protocol.ids import Cid
from shoal.training.statements import RoundKey

MAX_COMING: Final = 4
MAX_CLAIMED: Final = 4
"""Of the policies that this node says solve the task, those that it came to first: one of them ends the run."""


class Needs:
    """What one run needs."""

    __slots__ = ("_claimed", "_coming", "_key", "_own", "_policies", "_rounds", "_written")

    def __init__(self) -> None:
        """Nothing yet."""
        self._key: RoundKey | None = None
        self._rounds: deque[set[Cid]] = deque([set()], maxlen=2)
        self._own: deque[Cid] = deque(maxlen=2)
        self._policies: deque[Cid] = deque(maxlen=2)
        self._coming: deque[Cid] = deque(maxlen=MAX_COMING)
        self._written: deque[Cid] = deque(maxlen=2)
        self._claimed: list[Cid] = []

    def follow(self, key: RoundKey | None, policy: Cid | None) -> bool:
        """This round is under way, and this policy held; whether either is new."""
        is_new = False
        if key is not None and key != self._key:
            self._key, is_new = key, True
            self._rounds.append(set())
        if policy is not None and (not self._policies or self._policies[-1] != policy):
            self._policies.append(policy)
            is_new = True
        return is_new

    def offer(self, cid: Cid) -> None:
        """What this learner contributes to the round under way, or to the one that begins now."""
        self._own.append(cid)

    def come(self, cid: Cid, *, is_policy: bool) -> None:
        """A policy, or what others contribute to the round under way, is asked for."""
        if is_policy:
            self._coming.append(cid)
        else:
            self._rounds[-1].add(cid)

    def claim(self, cid: Cid) -> None:
        """This node says that a policy solves the task."""
        if cid not in self._claimed and len(self._claimed) < MAX_CLAIMED:
            self._claimed.append(cid)

    def write(self, cid: Cid) -> None:
        """A policy was written down, to start from it again."""
        if cid not in self._written:
            self._written.append(cid)

    def is_over(self, cid: Cid) -> bool:
        """Whether what others contributed is of no round any more that counts."""
        return not any(cid in contents for contents in self._rounds)

    def in_memory(self) -> set[Cid]:
        """To be held."""
        return {*self._own, *self._policies, *self._coming}.union(*self._rounds)

    def on_disk(self, newest: Cid | None = None) -> tuple[Cid, ...]:
        """To be kept, if ``newest`` is written down now."""
        written = list(self._written)
        if newest is not None and newest not in written:
            written = [*written[-1:], newest]
        return tuple(dict.fromkeys([*written, *self._claimed]))
