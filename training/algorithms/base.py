"""What an algorithm is to those who drive it: a learner collects, updates, and says what it wants averaged.

The driver owns time and the network; a learner owns neither. It runs alone as well as in a swarm: the driver
answers every `Exchange` with the merge of whatever contributions there are, its own alone if there are no others.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from shoal.protocol.ids import PeerId
from shoal.training.exchange.averager import Arrays
from shoal.training.manifest import Manifest
from shoal.training.tasks import Task


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a learner wants averaged now.

    Attributes:
        arrays: named as `shoal.training.exchange.averager` says; empty where the learner has nothing to add.
        weight: in samples; 0 where it has nothing to add, and then it contributes nothing but takes the result.
        template: what everybody's ``arrays`` look like (names, shapes, dtypes); given even where they are empty.
    """

    arrays: Arrays
    weight: float
    template: Arrays


@dataclass(frozen=True, slots=True)
class Collected:
    """What one call of `Learner.collect` brought.

    Attributes:
        samples: environment steps in this call.
        total: environment steps since the last update.
        episode_returns: undiscounted returns of the episodes that ended in this call.
    """

    samples: int
    total: int
    episode_returns: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """How an update went on this learner's own samples.

    Attributes:
        samples: that it was made from.
        steps: of the optimiser.
        metrics: by name, the algorithm's own; empty where there were no samples.
    """

    samples: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)


Update: TypeAlias = Generator[Exchange, Arrays, UpdateStats]


class Learner(Protocol):
    """One peer's part in learning a manifest's task."""

    def collect(self, num_steps: int) -> Collected:
        """Take ``num_steps`` environment steps, rounded up to whole vector steps, where the last call left off.

        Raises:
            UsageError: while an update is under way, or when far more than a batch waits for one.
        """
        ...

    def update(self) -> Update:
        """Optimise on what was collected since the last update.

        Every yield is one exchange and is sent the merged arrays, ``{}`` if nobody had any. How many there are depends
        on the manifest alone, so it is the same for every peer, with samples or without. An update that is closed or
        fails leaves the learner as it was before, samples included.

        Raises:
            ProtocolError: if the merged arrays do not fit.
        """
        ...

    def abandon(self) -> None:
        """Drop what was collected and any half-done update. Running episodes go on."""
        ...

    def export_state(self) -> Arrays:
        """Everything that all peers share, copied: parameters, optimiser, normalisers.

        Raises:
            UsageError: while an update is under way.
        """
        ...

    def import_state(self, arrays: Arrays) -> None:
        """Take a state that some peer exported. Drops collected samples, which another policy made.

        Raises:
            ProtocolError: if it does not fit this manifest.
        """
        ...

    def policy_arrays(self) -> Arrays:
        """What it takes to act, copied: for the digest and for checkpoints."""
        ...

    def evaluate(self, episodes: int, seed: int) -> list[float]:
        """Undiscounted returns of ``episodes`` greedy episodes in environments of their own; repeatable by ``seed``."""
        ...


class Algorithm(Protocol):
    """A way to learn."""

    name: str
    version: int
    """Raised when the same samples and merges would lead to other parameters, or its state has another form."""

    def learner(self, manifest: Manifest, task: Task, *, peer: PeerId) -> Learner:
        """A learner in its initial state, which is the same on every peer.

        Raises:
            UsageError: if the manifest's hyperparameters are unknown or out of range.
        """
        ...
