"""The methods by which a node drives the worker of a swarm. No torch here: the node imports this module.

States and contributions have the form of `training.state`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from shoal.protocol.codec import Attachment
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Empty, Method
from shoal.training.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Open:
    """Set up a run: task, algorithm and the initial state, which the manifest's seed fixes for everybody."""

    manifest: Manifest
    peer: PeerId


@dataclass(frozen=True, slots=True)
class StateAnswer:
    """A policy version.

    Attributes:
        epoch: of the state.
        env_steps: by all learners together until then.
        digest: hex sha256 of the parameters now in the worker.
        state: the learner's whole state, if it is new to the node.
    """

    epoch: int
    env_steps: int
    digest: str
    state: Attachment | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Replace the learner's state."""

    state: Attachment


@dataclass(frozen=True, slots=True)
class Collect:
    """Collect experience for about this many environment steps."""

    num_steps: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What came of it.

    Attributes:
        samples: environment steps of this call.
        epoch_samples: since the last update.
        episode_returns: of the episodes that ended in this call.
    """

    samples: int
    epoch_samples: int
    episode_returns: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """Go on with the update. Without contributions: start it.

    Attributes:
        epoch: the epoch that this update leads to.
        env_steps: by all learners together, this update included.
        authors: of the contributions.
        weights: of the contributions, in samples.
        contributions: to be averaged, in this order.
    """

    epoch: int
    env_steps: int
    authors: tuple[PeerId, ...] = ()
    weights: tuple[float, ...] = ()
    contributions: tuple[Attachment, ...] = ()


@dataclass(frozen=True, slots=True)
class MergeAnswer:
    """Either the next thing to be averaged, or the new state.

    Attributes:
        weight: of what is to be averaged, in samples; 0 if this learner has nothing to give.
        contribution: what is to be averaged; absent if this learner has nothing to give.
        state: says that the update is done.
        stats: of the update, by name.
        rejected: authors whose contributions were malformed and left out.
    """

    weight: float = 0.0
    contribution: Attachment | None = None
    state: StateAnswer | None = None
    stats: dict[str, float] = field(default_factory=dict)
    rejected: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Run whole episodes with the present policy, greedily, from fixed seeds."""

    episodes: int
    seed: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The undiscounted return of each episode."""

    returns: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Write the results of a run into a folder: checkpoint, curve and ``result.json``.

    Attributes:
        curve: (epoch, environment steps, return) of each evaluation.
        result: goes into ``result.json`` as it is.
    """

    folder: str
    curve: tuple[tuple[float, ...], ...]
    result: dict[str, Any]


OPEN: Final = Method("worker.open", Open, StateAnswer)
LOAD: Final = Method("worker.load", Load, StateAnswer)
COLLECT: Final = Method("worker.collect", Collect, Collected)
MERGE: Final = Method("worker.merge", Merge, MergeAnswer)
ABANDON: Final = Method("worker.abandon", Empty, Empty)
EVALUATE: Final = Method("worker.evaluate", Evaluate, Evaluated)
FINISH: Final = Method("worker.finish", Finish, Empty)
