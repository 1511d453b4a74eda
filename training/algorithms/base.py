"""What an algorithm is to those who drive it: a learner collects, updates, and says what it wants averaged.

The driver owns time and the network; a learner owns neither. It runs alone as well as in a swarm: the driver
answers every `Exchange` with the merge of whatever contributions there are, its own alone if there are no others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId
from shoal.training.effects import Effect, Wanted
from shoal.training.exchange.averager import Arrays, Contribution
from shoal.training.exchange.outliers import Scale
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import Manifest
from shoal.training.tasks import Task
from shoal.training.tasks.play import Role


class DivergedError(ShoalError):
    """What was merged leads to numbers that are not finite, or that no peer would take; it was taken back."""


def _let_through(_: Contribution) -> None:
    """There is nothing that an honest learner could not have made."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a learner wants averaged now.

    Attributes:
        arrays: named as `shoal.training.exchange.averager` says; empty where the learner has nothing to add.
        weight: in samples; 0 where it has nothing to add, and then it contributes nothing but takes the result.
        template: what everybody's ``arrays`` look like (names, shapes, dtypes); given even where they are empty.
        check: raises `ProtocolError` for a contribution that fits and that no honest learner could have made.
        scales: how honest contributions compare with each other; see `shoal.training.exchange.outliers`. Like ``check``
            these depend on nothing but the state that all peers share, so that all leave out the same.
        centres: by name, what of that state an array of ``arrays`` is another version of; zeros, where there is none.
        lossy: by name, what may travel smaller and a little wrong (`shoal.training.exchange.codecs`), and the largest
            magnitude that its difference from the centre may have.
        codec: what that travels as, the same for all; the run's, if None.
        is_last: whether the update is done after this; an update whose last exchange does not say so stands by none.
    """

    arrays: Arrays
    weight: float
    template: Arrays
    check: Callable[[Contribution], None] = _let_through
    scales: Mapping[str, Scale] = field(default_factory=dict)
    centres: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    lossy: Mapping[str, float] = field(default_factory=dict)
    codec: Codec | None = None
    is_last: bool = True


@dataclass(frozen=True, slots=True)
class Joint:
    """What several policies want averaged now; see `shoal.training.algorithms.joint`.

    Attributes:
        exchanges: by the name of the section.
        weight: of what this member gives, in environment steps, whatever policy they are for, also where it has nothing
            for any of them; 0: it gives nothing in this update.
        is_last: whether all updates are done after this.
    """

    exchanges: Mapping[str, Exchange]
    weight: float
    is_last: bool


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
"""Of one policy that wants nothing but averages."""
AskingUpdate: TypeAlias = Generator[Exchange | Effect, Any, UpdateStats]
"""Of one policy, with effects between its exchanges."""
AnyUpdate: TypeAlias = Generator[Exchange | Joint | Effect, Any, UpdateStats]
"""Of one policy or of several; what answers a `Joint` are arrays by section."""


class Learner(Protocol):
    """One peer's part in learning a manifest's task."""

    @property
    def samples(self) -> int:
        """Environment steps that wait for the next update."""
        ...

    def collect(self, num_steps: int, is_over: Callable[[], bool] = ...) -> Collected:
        """Take ``num_steps`` environment steps, rounded up to whole vector steps, where the last call left off.

        After each vector step, of which there is at least one, ``is_over`` is asked whether to stop early.

        Raises:
            UsageError: while an update is under way, or when far more than a batch waits for one.
        """
        ...

    def collect_ahead(self, is_over: Callable[[], bool]) -> Collected:
        """While an update waits for an exchange: go on collecting for the next one, until ``is_over``.

        No more than an honest learner may offer at once; nothing, where the update under way has yet to use what is
        collected, or the algorithm cannot use what another policy made.
        """
        ...

    def update(self) -> AnyUpdate:
        """Optimise on what was collected since the last update.

        Every yield is one exchange and is sent the merged arrays, ``{}`` if nobody had any. How many there are depends
        on the manifest alone, so it is the same for every peer, with samples or without. An update that is closed or
        fails leaves the learner as it was before, samples included, and those that were collected meanwhile.

        Raises:
            ProtocolError: if the merged arrays do not fit.
            DivergedError: if they fit, and the state that they lead to is of no use.
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

    def import_state(self, arrays: Arrays, *, keep_samples: bool = False) -> None:
        """Take a state that some peer exported. A half-done update is dropped.

        Args:
            arrays: as `export_state` gives them.
            keep_samples: keep what the present policy collected, for the next update, as well as the algorithm can use
                what another policy made; what an earlier policy made is dropped. Without it, all is.

        Raises:
            ProtocolError: if it does not fit this manifest, or holds what no peer would export. Nothing has changed.
        """
        ...

    def policy_arrays(self) -> Arrays:
        """What it takes to act, copied: for the digest and for checkpoints."""
        ...

    def evaluate(self, episodes: int, seed: int) -> list[float]:
        """Undiscounted returns of ``episodes`` greedy episodes in environments of their own; repeatable by ``seed``.

        Episodes whose environment failed are left out.

        Raises:
            TaskFailedError: if all failed, or too many environments did.
        """
        ...


@runtime_checkable
class Probing(Protocol):
    """A learner that finds more than returns when it evaluates."""

    @property
    def scores(self) -> Mapping[str, float]:
        """By name, of the last `Learner.evaluate`."""
        ...


@runtime_checkable
class Settled(Protocol):
    """A learner that has something of its own, which no state carries."""

    def settle_in(self, folder: Path) -> None:
        """Keep it in this folder from now on, and go on from what is there."""
        ...


@runtime_checkable
class Parted(Protocol):
    """A learner that is one part of what is learned together."""

    @property
    def part(self) -> str:
        """Its name; empty: none yet."""
        ...


@runtime_checkable
class Consulting(Protocol):
    """A learner whose plays may wait for other members, and which answers theirs."""

    def collecting(self, num_steps: int, is_over: Callable[[], bool]) -> Generator[Wanted, Any, Collected]:
        """As `Learner.collect`. What it asks is answered by acts, as `shoal.training.tasks.wire` writes them, or None.

        A `Fetch` is answered by a `Fetched`, or None.
        """
        ...

    def evaluating(self, episodes: int, seed: int) -> Generator[Wanted, Any, list[float]]:
        """As `Learner.evaluate`; likewise."""
        ...

    def answer(self, policy: str, takes: bytes | memoryview) -> bytes:
        """What a policy does where another member's takes stand, both as `shoal.training.tasks.wire` writes them.

        Raises:
            UsageError: if this node does not answer by this policy.
            ProtocolError: if these are no takes of this game.
        """
        ...


@runtime_checkable
class Hosting(Protocol):
    """A learner in whose plays a person may take part, at this node."""

    @property
    def seats_for_people(self) -> Mapping[str, Role]:
        """The roles that a person may play; none: there is no seat for anybody."""
        ...


class Algorithm(Protocol):
    """A way to learn."""

    name: str
    version: int
    """Raised when the same samples and merges would lead to other parameters, or its state has another form."""

    def learner(self, manifest: Manifest, task: Task, *, peer: PeerId, life: str = "", part: str = "") -> Learner:
        """A learner in its initial state, which is the same on every peer.

        What it meets in its environments depends on the peer and on ``life``, which is another one after each restart.
        A ``part`` is for recipes, where an empty one is for the swarm to say; elsewhere it is an error.

        Raises:
            UsageError: if the manifest's hyperparameters are unknown or out of range.
        """
        ...
