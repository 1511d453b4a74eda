"""The methods by which a node drives the worker of a swarm. No torch here: the node imports this module.

States and contributions have the form of `training.state`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from shoal.protocol.codec import Attachment
from shoal.protocol.errors import Status
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import Empty, Method
from shoal.training.manifest import Manifest, Role
from shoal.training.plain_roles import PlainRole
from shoal.training.scored import Scored
from shoal.training.statements import NO_BALLOT


@dataclass(frozen=True, slots=True)
class Open:
    """Set up a run: task, algorithm and the initial state, which the manifest's seed fixes for everybody.

    Attributes:
        folder: of the run on this machine; training metrics go into its ``tensorboard``, and what fails in environments
            into `shoal.training.tasks.failures.FILE`. Empty: nowhere.
        life: another text for every worker, so that none meets the episodes of the one before it.
        part: what this node is in a recipe; empty: what the swarm makes it.
        role: learner or actor.
        swarm: the run's name; only mode ``rollouts`` needs it.
        stream: an actor's: higher than in any worker of this node in this run before.
    """

    manifest: Manifest
    peer: PeerId
    folder: str = ""
    life: str = ""
    part: str = ""
    role: Role = Role.LEARNER
    swarm: SwarmId | None = None
    stream: int = 0


@dataclass(frozen=True, slots=True)
class StateAnswer:
    """A policy version.

    Attributes:
        epoch: of the state.
        env_steps: by all learners together until then.
        digest: hex sha256 of the parameters now in the worker.
        parent: CID of the state that it was made from; None for the initial one.
        ballot: name of the one that was averaged first on the way, 32 bytes.
        electorate: who counts in what follows, as `shoal.training.electorate.Electorate.to_plain` gives it.
        state: the learner's whole state, if it is new to the node and small.
        state_bytes: of it, if it is large and lies in the arena.
        part: what this node is in a recipe by now; empty: nothing yet.
        epoch_samples: environment steps that wait for the next update, kept from the policy before.
        copy: of an actor's: digest of the copy that it acts by.
        roles: that a person at this node may play; none: there is no seat for anybody.
    """

    epoch: int
    env_steps: int
    digest: str
    parent: Cid | None = None
    ballot: bytes = NO_BALLOT
    electorate: dict[str, Any] = field(default_factory=dict)
    state: Attachment | None = None
    epoch_samples: int = 0
    state_bytes: int = 0
    part: str = ""
    copy: bytes = b""
    roles: tuple[PlainRole, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Replace the learner's state. A state that is refused (INVALID_ARGUMENT) changes nothing.

    Attributes:
        state: that some learner exported, if it is small.
        state_bytes: of it, if it is large and lies in the arena.
        keep_samples: keep what was collected in the epoch under way, if the state is of the epoch after it: so what a
            slow member makes counts an epoch later. What is older is dropped. `StateAnswer.epoch_samples` says how
            much was kept.
        cid: its name.
    """

    state: Attachment | None
    keep_samples: bool = False
    state_bytes: int = 0
    cid: Cid | None = None


@dataclass(frozen=True, slots=True)
class Collect:
    """Collect experience.

    Attributes:
        num_steps: environment steps to take, rounded up to whole vector steps.
        max_seconds: stop after the first vector step that ends later than this, be there more steps to take or not.
    """

    num_steps: int
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ConsultAsked:
    """Plays wait for another member; see `shoal.training.effects.Consult`.

    Attributes:
        part: that the member plays.
        policy: by which it is to answer; None: a person.
        takes: as `shoal.training.tasks.wire` writes them.
        num_takes: how many.
        seconds: for the answer; None: as long as a policy of another member has.
        falls_back: whether somebody else plays on where none comes.
    """

    part: str
    policy: str | None
    takes: Attachment
    num_takes: int
    seconds: float | None = None
    falls_back: bool = False


@dataclass(frozen=True, slots=True)
class FetchAsked:
    """Plays wait for a content; see `shoal.training.effects.Fetch`."""

    cid: Cid
    max_bytes: int
    waits: bool


@dataclass(frozen=True, slots=True)
class PlayOn:
    """What plays waited for.

    Attributes:
        data: acts as `shoal.training.tasks.wire` writes them, or a content; None if nobody gave any.
        refusal: of a content, why it can never be had; empty: it can.
    """

    data: Attachment | None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Act:
    """Another member's plays wait for this one: say what a policy does.

    Attributes:
        policy: by which, of those that this node's part answers by.
        takes: as in `ConsultAsked`.
    """

    policy: str
    takes: Attachment


@dataclass(frozen=True, slots=True)
class Acted:
    """What it does, as in `PlayOn`."""

    acts: Attachment


@dataclass(frozen=True, slots=True)
class Collected:
    """What came of it.

    Attributes:
        samples: environment steps of this call.
        epoch_samples: since the last update.
        episode_returns: of the episodes that ended in this call.
        seconds: that it took.
        failures: environments that have failed since the worker was opened.
        failure: the last of them, in one line.
        consult: nothing is collected yet: plays wait for another member; `COLLECT_ON` answers.
        fetch: likewise, for a content.
    """

    samples: int
    epoch_samples: int
    episode_returns: tuple[float, ...]
    seconds: float = 0.0
    failures: int = 0
    failure: str = ""
    consult: ConsultAsked | None = None
    fetch: FetchAsked | None = None


@dataclass(frozen=True, slots=True)
class CopyOf:
    """Say what leads to the acting copy of the policy of this epoch; only a learner's worker of mode rollouts does."""

    epoch: int


@dataclass(frozen=True, slots=True)
class CopyAnswer:
    """What leads there (`shoal.training.rollouts.patches`).

    Attributes:
        digest: of the copy.
        key: a keyframe.
        patch: from the copy of the epoch before, if that is smaller.
        base: digest of that one.
    """

    digest: bytes
    key: Attachment
    patch: Attachment | None = None
    base: bytes = bytes(32)


@dataclass(frozen=True, slots=True)
class LoadCopy:
    """Act by what a keyframe, or a patch of the copy that is here, leads to. What is refused changes nothing.

    Attributes:
        copy: its bytes.
        epoch: of the policy.
        cid: by which its state is known.
        digest: of the copy that is wanted.
    """

    copy: Attachment
    epoch: int
    cid: Cid
    digest: bytes


@dataclass(frozen=True, slots=True)
class RollOut:
    """Make a shard; only an actor's worker does.

    Attributes:
        samples: about so many environment steps.
        before: what the shard before was named; None: it came to nothing, or there was none.
    """

    samples: int
    before: Cid | None = None


@dataclass(frozen=True, slots=True)
class RolledOut:
    """A shard, but for its author's signature.

    Attributes:
        head: what is to be signed, see `shoal.training.rollouts.shard.signed`.
        body: what follows it.
        samples: environment steps.
        episode_returns: of the episodes that ended in it.
        seconds: that it took.
        failures: as in `Collected`.
        failure: likewise.
        stream: that it is of.
    """

    head: Attachment
    body: Attachment
    samples: int
    episode_returns: tuple[float, ...] = ()
    seconds: float = 0.0
    failures: int = 0
    failure: str = ""
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Admit:
    """Learn from a shard that another member made.

    Attributes:
        shard: its bytes.
        cid: by which it was asked for.
        author: who named it.
        version: of the policy, as its author said when it named it.
        state: what this node calls that policy; None, if it does not know.
        is_checked: whether it is to be replayed first:
        chance: one of its environments, by this number; None: all.
    """

    shard: Attachment
    cid: Cid
    author: PeerId
    version: int
    state: Cid | None
    is_checked: bool = False
    chance: int | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """What came of it.

    Attributes:
        verdict: one of `shoal.training.rollouts.evidence.Verdict`.
        words: why, if it is not used.
        lie: of what kind, if it is false.
        step: where, likewise.
        part: likewise.
        samples: that are learned from; 0 if none are.
        seconds: that looking into it took.
        total: samples since the last update.
        waiting: samples of others that wait, for this update or a later one.
        proof: its author's signed head, if it is false.
        is_checked: whether it was looked into, as it was to be or because of what it says.
    """

    verdict: str
    words: str
    lie: str
    step: int
    part: int
    samples: int
    seconds: float
    total: int
    waiting: int = 0
    proof: bytes = b""
    is_checked: bool = False


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the update of the policy that the worker holds; answered as `Merge` is.

    Attributes:
        epoch: of the policy.
        parent: its CID.
        env_steps: by all learners together, that went into it.
        electorate: of the policy, as `shoal.training.electorate.Electorate.to_plain` gives it.
    """

    epoch: int
    parent: Cid
    env_steps: int
    electorate: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Merge:
    """Go on with the update: average what a ballot lists.

    If what was merged leads to numbers that are not finite, or to a state that nobody would take, the update is taken
    back, samples and all, and the call fails with `MERGE_FAILED`; another one may be started, without whoever it was.
    If no contribution is of any use, it fails with FAILED_PRECONDITION and the update still waits.

    Where the arrays are large (`MergeAnswer.layout`), what came of them lies in the arena.

    Attributes:
        ballot: its name, 32 bytes.
        authors: of the contributions.
        weights: of the contributions, in samples.
        seconds: of work that went into each.
        contributions: to be averaged, in this order.
        absent: authors of whose large arrays too little is in what came of them.
    """

    ballot: bytes
    authors: tuple[PeerId, ...]
    weights: tuple[int, ...]
    seconds: tuple[float, ...]
    contributions: tuple[Attachment, ...]
    absent: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class LargeArray:
    """One of those that are reduced part by part; as `shoal.training.exchange.layout.Segment`."""

    name: str
    numel: int
    codec: str
    bound: float


@dataclass(frozen=True, slots=True)
class PostAsked:
    """Let all members have this; see `shoal.training.effects.Post`.

    Attributes:
        topic: under which they ask for it.
        data: arrays and what describes them, in the form of `training.state`.
    """

    topic: str
    data: Attachment


@dataclass(frozen=True, slots=True)
class LatestAsked:
    """Find what members have posted; see `shoal.training.effects.Latest`."""

    topic: str
    count: int
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class ScoresAsked:
    """Find what members have signed of their probes; see `shoal.training.effects.Scores`."""

    probes: tuple[str, ...]
    since: int


@dataclass(frozen=True, slots=True)
class FoundPost:
    """What a member posted, as it came."""

    author: PeerId
    cid: Cid
    epoch: int
    data: Attachment


@dataclass(frozen=True, slots=True)
class GoOn:
    """Go on with the update, which asked for something.

    Attributes:
        cid: of what was posted or given; None if there was no room for it.
        posts: that were found, newest first.
        scores: that members signed: of at most `shoal.training.scored.MAX_PROBES` probes and ``MAX_EPOCHS`` epochs.
    """

    cid: Cid | None = None
    posts: tuple[FoundPost, ...] = ()
    scores: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give up the update under way, if one is.

    Attributes:
        keep_samples: keep what was collected.
    """

    keep_samples: bool = False


@dataclass(frozen=True, slots=True)
class LearnedFrom:
    """A shard that an update was made from.

    Attributes:
        author: who collected it.
        version: epoch of the policy that acted.
        samples: environment steps.
    """

    author: PeerId
    version: int
    samples: int


@dataclass(frozen=True, slots=True)
class MergeAnswer:
    """Either the next thing to be averaged, or the new state.

    Attributes:
        weight: of what is to be averaged, in samples; 0 if this learner has nothing to give.
        contribution: what is to be averaged; absent if this learner has nothing to give, or it lies in the arena.
        contribution_bytes: of it, where it lies in the arena.
        state: says that the update is done.
        stats: of the update, by name.
        rejected: authors whose contributions were left out, as malformed or as none that an honest learner makes. The
            same at every member that merges the same contributions from the same state.
        is_last: whether the update is done after what is to be averaged now.
        layout: what is large of it, and lies in the arena; empty if nothing is.
        ahead: with ``state``: what was collected for the next update while this one waited.
        post: nothing is to be averaged now, but this is to be posted; `GO_ON` answers.
        latest: likewise, what was posted is to be found.
        scores: likewise, what members have signed.
        learned_from: with ``state``: what of others' the update was made from.
        waiting: likewise, samples of others that wait for a later one.
        given: nothing is to be averaged now, but this shard is to be signed and given to the others; `GO_ON` answers.
    """

    weight: float = 0.0
    contribution: Attachment | None = None
    state: StateAnswer | None = None
    stats: dict[str, float] = field(default_factory=dict)
    rejected: tuple[PeerId, ...] = ()
    is_last: bool = True
    layout: tuple[LargeArray, ...] = ()
    ahead: Collected | None = None
    contribution_bytes: int = 0
    post: PostAsked | None = None
    latest: LatestAsked | None = None
    scores: ScoresAsked | None = None
    learned_from: tuple[LearnedFrom, ...] = ()
    waiting: int = 0
    given: RolledOut | None = None


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Run whole episodes with the present policy, greedily, from fixed seeds."""

    episodes: int
    seed: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The undiscounted return of each episode, but for those whose environment failed.

    Attributes:
        failures: as in `Collected`.
        failure: likewise.
        scores: what else was found, by name; finite.
        consult: as in `Collected`; `EVALUATE_ON` answers.
        fetch: likewise.
    """

    returns: tuple[float, ...]
    failures: int = 0
    failure: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    consult: ConsultAsked | None = None
    fetch: FetchAsked | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """Note numbers that the node knows beside the training metrics, which the worker notes by itself.

    Attributes:
        env_steps: by all learners together: where in the run the numbers belong.
        values: by name, for example ``evaluation/return``; finite.
    """

    env_steps: int
    values: dict[str, float]


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


MERGE_FAILED: Final = Status.ABORTED
"""How `MERGE` fails if the update was taken back; the message names the authors that were merged."""

TASK_FAILED: Final = Status.UNKNOWN
"""How any method fails if too many environments of the task did: other people's code, of which nobody knows what to
expect. The message says why; another worker would hardly come further."""

LARGE_STATE_BYTES: Final = 1024 * 1024
"""From here on a state, or a contribution, goes by the arena between the node and its worker."""

MAX_COUNT: Final = 2**53
"""More epochs or environment steps than this are refused wherever they are given."""

# No time is too long for these: the node watches what the worker does (`shoal.training.watch`).
OPEN: Final = Method("worker.open", Open, StateAnswer, timeout_s=None)
COPY: Final = Method("worker.copy", CopyOf, CopyAnswer, timeout_s=None)
LOAD_COPY: Final = Method("worker.load_copy", LoadCopy, Empty, timeout_s=None)
LOAD: Final = Method("worker.load", Load, StateAnswer, timeout_s=None)
COLLECT: Final = Method("worker.collect", Collect, Collected, timeout_s=None)
COLLECT_ON: Final = Method("worker.collect_on", PlayOn, Collected, timeout_s=None)
ACT: Final = Method("worker.act", Act, Acted, timeout_s=None)
ROLL_OUT: Final = Method("worker.roll_out", RollOut, RolledOut, timeout_s=None)
ADMIT: Final = Method("worker.admit", Admit, Admitted, timeout_s=None)
BEGIN: Final = Method("worker.begin", Begin, MergeAnswer, timeout_s=None)
MERGE: Final = Method("worker.merge", Merge, MergeAnswer, timeout_s=None)
GO_ON: Final = Method("worker.go_on", GoOn, MergeAnswer, timeout_s=None)
ABANDON: Final = Method("worker.abandon", Abandon, Empty, timeout_s=None)
EVALUATE: Final = Method("worker.evaluate", Evaluate, Evaluated, timeout_s=None)
EVALUATE_ON: Final = Method("worker.evaluate_on", PlayOn, Evaluated, timeout_s=None)
LOG: Final = Method("worker.log", Log, Empty, timeout_s=None)
FINISH: Final = Method("worker.finish", Finish, Empty, timeout_s=None)
