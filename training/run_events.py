"""What happens to a run, and what is to be done about it: the events and outputs of `shoal.training.run`.

Every job of the worker (`Job`) ends in one event of those under *the worker's*, or in `WorkerGone`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shoal.crdt.views import Contributed, Evaluation
from shoal.dht.fetch import Lack
from shoal.protocol.ids import Cid, PeerId
from shoal.training.electorate import Electorate
from shoal.training.exchange.ballots import Ballot
from shoal.training.exchange.direct import Part
from shoal.training.manifest import Role
from shoal.training.statements import Result, RoundKey, Statement


@dataclass(frozen=True, slots=True)
class Policy:
    """A training state and where it comes from.

    Attributes:
        epoch: how many outer updates made it.
        cid: of its bytes.
        digest: of its parameters.
        env_steps: by all learners together, that went into it.
        parent: the state it was made from.
        ballot: of the first exchange of the update that made it.
        electorate: who counts in what follows.
    """

    epoch: int
    cid: Cid
    digest: str
    env_steps: int
    parent: Cid | None
    ballot: bytes
    electorate: Electorate

    @property
    def result(self) -> Result:
        """What its holder signs."""
        return Result(epoch=self.epoch, cid=self.cid, parent=self.parent, ballot=self.ballot, env_steps=self.env_steps)


# What happens.


# The worker's.


@dataclass(frozen=True, slots=True)
class Opened:
    """The worker is there, with the run's initial state; also after a restart of the worker.

    ``state_bytes``: of a policy. No ``policy``: it is an actor's, which has none until it loads one. ``part``: what
    this node is in a recipe; empty, if it is nothing yet.
    """

    policy: Policy | None
    part: str = ""
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """The worker is gone; another is being started."""

    reason: str


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The environments of the task do not work on this node: it learns no more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A member signed something. ``name`` is the hash of the record."""

    author: PeerId
    statement: Statement
    name: bytes


@dataclass(frozen=True, slots=True)
class Given:
    """A member gave this node its part of one step, and its bytes are here."""

    author: PeerId
    part: Part


@dataclass(frozen=True, slots=True)
class NotGiven:
    """A member could not be given this node's part of a step."""

    author: PeerId
    key: RoundKey
    reason: str


@dataclass(frozen=True, slots=True)
class Lied:
    """A member signed a result that does not follow from what it was made of; ``said`` is what it signed.

    Empty, if it gave another part of a contribution than it had signed: that proves nothing to anybody else.
    """

    owner: PeerId
    said: bytes


@dataclass(frozen=True, slots=True)
class Said:
    """This node's own statement was signed."""

    statement: Statement
    name: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """A member is no longer heard of."""

    author: PeerId


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents changed: every evaluation in them that can matter, and what this node's own says it put in."""

    evaluations: tuple[Evaluation, ...]
    own: Contributed | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """The worker collected: in all since the last update, and in this call."""

    total: int
    samples: int
    seconds: float
    episode_returns: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RolledOut:
    """The worker made a shard of so many samples, and it was given to the others; 0: it came to nothing."""

    samples: int
    seconds: float
    episode_returns: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """The worker took what another member collected: samples since the last update, in all."""

    total: int


@dataclass(frozen=True, slots=True)
class Yielded:
    """The update wants this averaged; no CID and weight 0 where this learner has nothing to give.

    ``is_last``: after this it is done. ``uplink``: bytes per second that this node can send; 0 if it does not know.
    """

    cid: Cid | None
    weight: int
    rejected: tuple[PeerId, ...] = ()
    is_last: bool = True
    uplink: int = 0


@dataclass(frozen=True, slots=True)
class Updated:
    """The update is done; ``ahead``: what was collected for the next one while it waited for the others.

    ``part``: as in `Opened`.
    """

    policy: Policy
    rejected: tuple[PeerId, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    ahead: Collected | None = None
    part: str = ""


@dataclass(frozen=True, slots=True)
class MergeFailed:
    """What was decided on cannot be merged, or gives no sound policy; the worker is as it was before the update."""

    reason: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The worker holds the state that it was told to load."""

    policy: Policy
    num_kept: int = 0


@dataclass(frozen=True, slots=True)
class LoadRefused:
    """The worker could not load it, and is as it was before."""

    reason: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The mean return of a policy, and what else was found of it, by name."""

    mean_return: float
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """The results are written."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """These bytes are here; not ``is_whole``: the acting copy of this policy is, which is all that an actor needs."""

    cid: Cid
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Coming:
    """These bytes are on their way, and some more of them are here."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class NotFetched:
    """These bytes were not had; ``lack`` says whether they may be later."""

    cid: Cid
    reason: str
    lack: Lack = Lack.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = (
    Opened
    | WorkerGone
    | TaskFailed
    | Heard
    | Given
    | NotGiven
    | Lied
    | Said
    | Gone
    | Documents
    | Collected
    | RolledOut
    | Admitted
    | Yielded
    | Updated
    | MergeFailed
    | Loaded
    | LoadRefused
    | Evaluated
    | Finished
    | Fetched
    | Coming
    | NotFetched
    | Tick
)

# What to do.


@dataclass(frozen=True, slots=True)
class Say:
    """Sign this and tell everybody; then hand in `Said`."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class Give:
    """Give this part to each of these members directly, and say `NotGiven` of each that does not take it."""

    part: Part
    members: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Collect:
    """Collect up to this many samples, for ``max_seconds`` at most."""

    samples: int
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """Make a shard of about so many samples by the policy that the worker holds, and give it to the others."""

    samples: int


@dataclass(frozen=True, slots=True)
class Update:
    """Start the update of this policy."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Merge:
    """Go on with the update: the average of what a ballot lists."""

    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Load:
    """Load this state in place of the worker's, and keep what was collected if ``keep_samples``."""

    result: Result
    keep_samples: bool


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give up the update under way; samples are kept if ``keep_samples``. No event follows."""

    keep_samples: bool


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate the policy that the worker holds."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Write the results of the run."""

    final: Evaluation | None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get these bytes, and say `Fetched` or `NotFetched`, before that `Coming` once in a while.

    ``keep``: they are a policy, not what is needed for a round only.
    """

    cid: Cid
    sources: tuple[PeerId, ...]
    keep: bool


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep this policy on disk, to start from it again."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Write:
    """Write the policy and what this node put in into its document."""

    policy: Policy
    env_steps: int
    rounds: int


@dataclass(frozen=True, slots=True)
class WriteEvaluation:
    """Write an evaluation into the document."""

    policy: Policy
    mean_return: float
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WriteLie:
    """Write into the document what a member signed that is not so."""

    owner: PeerId
    epoch: int
    said: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    text: str
    is_warning: bool = True


@dataclass(frozen=True, slots=True)
class TakeRole:
    """Begin the run anew in another role, from what is written; nothing that follows from this one is of use."""

    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Hand in a `Tick` at this time at the latest; a later `Wake` replaces this one."""

    at: float


Job: TypeAlias = Collect | Rollout | Update | Merge | Load | Evaluate | Finish
Output: TypeAlias = (
    Say
    | Give
    | Collect
    | Rollout
    | Update
    | Merge
    | Load
    | Abandon
    | Evaluate
    | Finish
    | Fetch
    | Keep
    | Write
    | WriteEvaluation
    | WriteLie
    | Note
    | TakeRole
    | Wake
)
