"""The methods by which a node drives the worker of a swarm. No torch here: the node imports this module.

State, contributions and merged arrays travel as attachments in the form of `training.state`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

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
    """A policy version; its state is the attachment.

    Attributes:
        epoch: of the state.
        env_steps: by all learners together until then.
        digest: hex sha256 of the parameters now in the worker.
    """

    epoch: int
    env_steps: int
    digest: str


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
    """Go on with the update. Without contributions: start it. The attachments are the contributions, in this order.

    Attributes:
        epoch: the epoch that this update leads to.
        env_steps: by all learners together, this update included.
    """

    epoch: int
    env_steps: int
    authors: tuple[PeerId, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MergeAnswer:
    """Either the next thing to be averaged (the attachment), or the new state (the attachment).

    Attributes:
        weight: of what is to be averaged, in samples; 0 if this learner has nothing to give.
        state: says that the update is done.
        stats: of the update, by name.
        rejected: authors whose contributions were malformed and left out.
    """

    weight: float = 0.0
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
LOAD: Final = Method("worker.load", Empty, StateAnswer)
COLLECT: Final = Method("worker.collect", Collect, Collected)
MERGE: Final = Method("worker.merge", Merge, MergeAnswer)
ABANDON: Final = Method("worker.abandon", Empty, Empty)
EVALUATE: Final = Method("worker.evaluate", Evaluate, Evaluated)
FINISH: Final = Method("worker.finish", Finish, Empty)
