"""What others collected, until an update is made from it: the newest first, and no more than a run allows.

To an update, a foreign rollout is a stream like the learner's own whose steps are all there at once. Its actions were
taken under an earlier policy of the run, and the log-probabilities that its actor gave them are known; what to make of
that is up to the objective. An update that is closed or fails leaves all of it for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.protocol.ids import PeerId
from shoal.training.algorithms.rollouts import Rollout
from shoal.training.tasks.base import Floats


class Foreign:
    """One rollout that another member made.

    Attributes:
        author: who.
        version: epoch of the policy that acted.
        samples: environment steps.
        log_probs: ``[T, N]``, what that policy gave to its actions.
        rng: shuffles.
        age: by how many versions that policy is older than the present one, as `Pool.at` was told.
    """

    def __init__(
        self, author: PeerId, rollout: Rollout, log_probs: Floats, version: int, rng: np.random.Generator
    ) -> None:
        """Hold it; ``rng`` shuffles."""
        self.author = author
        self.version, self.samples, self.log_probs = version, rollout.samples, log_probs
        self._rollout, self.rng = rollout, rng
        self.age = 0

    def rollout(self) -> Rollout:
        """All of it."""
        return self._rollout

    def shuffled(self, parts: int) -> list[npt.NDArray[np.int64]]:
        """As `shoal.training.algorithms.rollouts.Stream.shuffled`."""
        return [np.asarray(part) for part in np.array_split(self.rng.permutation(self.samples), parts)]


class Pool:
    """What waits for a learner's next updates.

    Attributes:
        most: samples of one update.
    """

    def __init__(self, most: int, capacity: int) -> None:
        """Hold nothing.

        Args:
            most: samples of one update.
            capacity: samples in all; the oldest go first.
        """
        self.most = most
        self._capacity = capacity
        self._version = 0  # that the learner holds
        self._waiting: list[Foreign] = []  # newest version first
        self._used: list[Foreign] = []

    @property
    def samples(self) -> int:
        """That the next update would use."""
        return sum(each.samples for each in self._next())

    @property
    def waiting(self) -> int:
        """Samples in all."""
        return sum(each.samples for each in self._waiting)

    def add(self, rollout: Foreign) -> None:
        """One came."""
        self._waiting.append(rollout)
        self._waiting.sort(key=lambda each: -each.version)  # stable: of one version, those that came first
        while self.waiting > self._capacity:
            self._waiting.pop()

    def at(self, version: int, oldest: int) -> int:
        """The learner holds another policy: drop what is older than ``oldest``; how many samples that were."""
        self._version = version
        old = [each for each in self._waiting if each.version < oldest]
        self._waiting = [each for each in self._waiting if each.version >= oldest]
        return sum(each.samples for each in old)

    def use(self) -> Sequence[Foreign]:
        """An update begins; what it is made from."""
        self._used = self._next()
        for each in self._used:
            each.age = max(0, self._version - each.version)
        return self._used

    def used(self) -> Sequence[Foreign]:
        """It is done: forget what it was made from, and say what that was."""
        used, self._used = self._used, []
        gone = set(map(id, used))
        self._waiting = [each for each in self._waiting if id(each) not in gone]
        return used

    def drop(self) -> None:
        """Forget all."""
        self._waiting, self._used = [], []

    def _next(self) -> list[Foreign]:
        found: list[Foreign] = []
        room = self.most
        for each in self._waiting:
            if each.samples <= room:
                found.append(each)
                room -= each.samples
        return found
