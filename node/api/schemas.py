"""What the local API gives: the models that the node fills in, the server writes and the client reads.

A field that JSON calls by a Python keyword or by ``self`` has another name here (`mean_return`, `is_self`) and is
written under JSON's. What the API takes is in `requests`: it knows what a run is, which most commands do without.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)

from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import Cid, PeerId, SwarmId

Name = TypeVar("Name", PeerId, Cid, SwarmId)


def _reads(kind: type[Name]) -> PlainValidator:
    def read(value: object) -> Name:
        if isinstance(value, kind):
            return value
        if not isinstance(value, str):
            raise ValueError("should be text")  # noqa: TRY004  pydantic turns ValueErrors into its report
        try:
            return kind.parse(value)
        except ShoalError as error:
            raise ValueError(str(error)) from error

    return PlainValidator(read)


_TEXT: Final = (PlainSerializer(str), WithJsonSchema({"type": "string"}))
PeerName = Annotated[PeerId, _reads(PeerId), *_TEXT]
CidName = Annotated[Cid, _reads(Cid), *_TEXT]
SwarmName = Annotated[SwarmId, _reads(SwarmId), *_TEXT]


def _named(name: str, json_name: str, default: Any = ...) -> Any:
    """A field that JSON calls ``json_name``; both names are understood."""
    return Field(default, validation_alias=AliasChoices(json_name, name), serialization_alias=json_name)


class Model(BaseModel):
    """Frozen; unknown fields are ignored, so that an older client can ask a newer node.

    Built when it is first used: a command uses one or two, and all together take longer than it does.
    """

    model_config = ConfigDict(defer_build=True, frozen=True, extra="ignore", serialize_by_alias=True)


class BenchReduceResult(Model):
    """How it went at this node.

    Attributes:
        seconds: of each round.
        num_bytes: of the array, as the codec writes it.
        digests: hex SHA-256 over the digests of each round's parts.
        num_left_out: members' parts that came too late, and are in no result.
        max_error: the largest distance of a result from the mean in float64 of those that are in it.
        raw_seconds: in which the same peers gave as many bytes, with nothing else done; a median.
    """

    seconds: list[float]
    num_bytes: int
    digests: list[str]
    num_left_out: int
    max_error: float
    raw_seconds: float | None


class BenchDhtResult(Model):
    """What came of one thing done in the DHT.

    Attributes:
        ms: that it took.
        num_kept: peers that keep what was put or provided.
        found: the CID that a name stands for, or the peers that hold a content.
        contacts: peers that this node knows to take part.
    """

    ms: float
    num_kept: int
    found: list[str]
    contacts: int


class BenchResult(Model):
    """What was measured. MB are 10^6 bytes; calls echo, so their bytes count there and back; transfers go one way.

    Attributes:
        cpu_s_per_gb: CPU seconds of both nodes per 10^9 bytes.
        path: how the peer is reached.
        transport: what carried it: ``lane`` (TLS connections beside libp2p's) or ``libp2p``.
        secure: whether it was encrypted and both ends proved who they are; no part of the wire goes without.
        security: how.
        idle_p99_ms: of small calls with nothing else going on.
        loaded_p99_ms: of small calls while a transfer is under way.
        ratio_p99: the latter by the former.
        sender_memory_mb: by how much the sender's memory rose, beyond the buffer itself.
        receiver_memory_mb: likewise of the receiver.
    """

    kind: str
    size: int
    path: str
    transport: str
    secure: bool
    security: str
    calls: int | None = None
    calls_per_s: float | None = None
    mb_per_s: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_s_per_gb: float | None = None
    idle_p50_ms: float | None = None
    idle_p99_ms: float | None = None
    loaded_p50_ms: float | None = None
    loaded_p99_ms: float | None = None
    ratio_p99: float | None = None
    transfer_mb_per_s: float | None = None
    sender_memory_mb: float | None = None
    receiver_memory_mb: float | None = None


class MethodInfo(Model):
    """One method's counters.

    Attributes:
        calls: that are over.
        errors: those of them that failed, by status.
        request_bytes: of all requests, before compression.
        answer_bytes: of all answers.
        p50_ms: half of the calls took at most so long.
        p99_ms: likewise of 99 in 100; both to within a fifth.
    """

    calls: int
    errors: dict[str, int]
    request_bytes: int
    answer_bytes: int
    p50_ms: float
    p99_ms: float


class FailureInfo(Model):
    """How often a task failed in one way.

    Attributes:
        domain: what it belongs to: ``node``, ``swarm bafy…``, or ``peer``, which stands for all peers.
        task: its name.
        fault: whose fault it was: ``own`` (this program's), ``remote`` (a peer's) or ``resource`` (the machine's).
        count: since the node started.
    """

    domain: str
    task: str
    fault: str
    count: int


class MetricsInfo(Model):
    """What happened since the node started.

    Attributes:
        served: calls that peers made here, by method.
        called: calls that this node made, by method.
        failures: tasks that failed; the log has the reasons.
    """

    served: dict[str, MethodInfo]
    called: dict[str, MethodInfo]
    failures: list[FailureInfo] = []


class UseInfo(Model):
    """What a node has taken of its machine, and may take."""

    disk_bytes: int
    """Its file with blocks and logs, and contents that lie in files."""
    max_disk_bytes: int
    upload_bytes: int
    """Of contents, since it started; likewise below."""
    max_upload_bytes_per_s: float | None = None
    """None: as many as there are."""
    refused_uploads: int = 0
    """Blocks that peers were told to ask for again, since too much waited."""
    download_bytes: int
    max_download_bytes_per_s: float | None = None


class NodeInfo(Model):
    """This node."""

    peer_id: PeerName
    addresses: list[str]
    """Full multiaddrs, ``/p2p/…`` included, at which others can reach it."""
    profile: str
    pid: int
    version: str
    uptime_s: float
    num_peers: int
    """Other nodes that it is connected to now."""
    alone: bool
    """Nobody else is there: no other node is connected."""
    swarms: list[SwarmName] = []
    can_train: bool = True
    """Whether the ``train`` extra is installed."""
    api: str = ""
    """The API's URL on loopback TCP."""
    listen: list[str] = []
    """The multiaddrs that it was told to listen on."""
    use: UseInfo | None = None
    """Not told with events."""


class TriedInfo(Model):
    """What came of trying to reach a peer by a better path."""

    rung: str
    """``direct``, ``hole punching (TCP)`` or ``WebRTC (UDP)``."""
    failure: str | None = None
    """Why it failed, in one line; none if it led to a path."""
    ago_s: float = 0.0


class PeerInfo(Model):
    """Another node that this one is connected to."""

    peer_id: PeerName
    path: str
    """How it is reached now: ``direct``, ``punched``, ``webrtc``, ``relayed``."""
    address: str
    rtt_ms: float | None = None
    connected_s: float = 0.0
    direction: str = ""
    """``inbound`` or ``outbound``: who dialled."""
    swarms: list[SwarmName] = []
    """The swarms that both are in."""
    relayed_by: PeerName | None = None
    """The relay, if the path leads through one."""
    reachability: str = ""
    """What the peer says of itself: ``public``, ``private`` or ``unknown``; empty if it says nothing."""
    nat: str = ""
    """What the peer says that it is behind, for UDP."""
    relays: bool = False
    """Whether the peer relays for others."""
    tried: list[TriedInfo] = []
    """What was tried to reach it better."""


class MeshNode(Model):
    """A node in the picture of the mesh."""

    peer_id: PeerName
    is_self: bool = _named("is_self", "self", default=False)
    addresses: list[str] = []
    swarms: list[SwarmName] = []


class MeshLink(Model):
    """A connection between two nodes, as far as this one knows."""

    a: PeerName
    b: PeerName
    path: str
    rtt_ms: float | None = None
    relayed_by: PeerName | None = None
    tried: list[TriedInfo] = []


class FamilyInfo(Model):
    """What a node is behind for one IP family."""

    family: str
    """``IPv4`` or ``IPv6``."""
    reachability: str
    """``public``, ``private`` or ``unknown``: whether those who never heard from this node can dial it."""
    udp: str
    """The NAT type for UDP, ``none``, ``UDP blocked`` or ``unknown``."""
    tcp_mapping: str
    """How TCP ports are mapped: ``none``, ``endpoint-independent``, ``endpoint-dependent`` or ``unknown``."""
    public_addresses: list[str] = []
    """External TCP endpoints, best attested first."""
    evidence: list[str] = []
    """How it is known: sentences for people."""


class NatInfo(Model):
    """How this node is reached, and how it knows."""

    reachability: str
    udp: str
    families: list[FamilyInfo] = []
    addresses: list[str] = []
    """Full multiaddrs at which others reach it, circuits among them."""
    held_relays: list[PeerName] = []
    """Relays that it is reached through."""
    relaying: bool = False
    """Whether it relays for others."""
    num_reservations: int = 0
    """Nodes that are reached through it."""
    num_circuits: int = 0
    relayed_bytes: int = 0
    port_mapping: str | None = None
    """What the router forwards, and by which protocol it was asked."""
    port_mapping_attempts: list[str] = []


class MeshInfo(Model):
    """The nodes and connections that this node knows of."""

    nodes: list[MeshNode]
    links: list[MeshLink]
    nat: NatInfo | None = None
    """How this node is reached."""


class FindingInfo(Model):
    """Something that stands between this node and its peers, or does not."""

    level: str
    """``good``, ``note`` or ``problem``."""
    what: str
    advice: str = ""
    """What the person can do about it; empty if there is nothing to do."""


class DoctorInfo(Model):
    """What this node is behind, how each peer is reached and why not better, and what to do about it."""

    findings: list[FindingInfo]
    nat: NatInfo
    peers: list[PeerInfo] = []


class PingResult(Model):
    """How a peer answered."""

    peer: PeerName
    path: str
    address: str
    rtt_ms: float
    """From the call to its answer."""
    first_byte_s: float
    """From the request to the answer, with connecting."""


class SwarmSummary(Model):
    """One swarm that this node is in, on a line."""

    swarm: SwarmName
    name: str | None = None
    task: str
    algorithm: str
    role: str
    """What this node does in it now: ``learner``, ``actor``, ``evaluator`` or ``storage``."""
    phase: str
    """``starting waiting fetching collecting updating exchanging evaluating storing done failed left``."""
    waits: str = ""
    """While it waits: what for."""
    epoch: int
    mean_return: float | None = _named("mean_return", "return", default=None)
    """Of the newest evaluation."""
    target_return: float | None = None
    env_steps: int = 0
    """By all members together, over the whole run."""
    num_members: int = 0
    alone: bool = False
    solved: bool = False
    error: str | None = None
    """What is wrong, while it is; of a run that has failed, why."""


class MemberInfo(Model):
    """What one member does and has put in."""

    peer_id: PeerName
    role: str
    is_self: bool = _named("is_self", "self", default=False)
    live: bool = True
    epoch: int = 0
    phase: str = ""
    waits: str = ""
    """While it waits: what for."""
    env_steps: int = 0
    """Over the whole run."""
    samples: int = 0
    """In this epoch."""
    steps_per_s: float = 0.0
    rounds: int = 0
    """Exchanges that its contribution went into."""
    share: float = 0.0
    """Of all environment steps of the run, between 0 and 1."""
    shards_made: int = 0
    """In mode rollouts, here and below: that it made, or that this node heard of."""
    shards_used: int = 0
    """That this node learned from."""
    samples_used: int = 0
    """Environment steps of these."""
    shards_checked: int = 0
    """That this node replayed before."""
    shards_refused: int = 0
    """That this node found to be false, too old, or not of this run's kind."""
    shards_share: float = 0.0
    """Of all samples of others that this node learned from, between 0 and 1."""
    mean_staleness: float = 0.0
    """Policy versions, of the samples that this node learned from."""


class CurvePoint(Model):
    """One evaluation."""

    epoch: int
    env_steps: int
    mean_return: float = _named("mean_return", "return")


class Scores(Model):
    """What a member found of the policies of an epoch, by name; its word."""

    epoch: int
    author: PeerName
    scores: dict[str, float]


class EvidenceInfo(Model):
    """What a member signed against another; its word, which every node looks into before it acts on it."""

    against: str
    kind: str
    """``reduce``: a result that does not follow from what it was made of; else what is false about a shard."""
    by: PeerName
    epoch: int


class ConsultInfo(Model):
    """What came of this node's asks of one part, since it started."""

    asked: int = 0
    """Acts that its plays asked other members, or people, for."""
    answered: int = 0
    unanswered: int = 0
    fell_back: int = 0
    """Of these, those where the seat's stand-in played on; the other plays were dropped."""
    seconds: float = 0.0
    """That its plays waited."""


class SwarmDetail(SwarmSummary):
    """Everything about one swarm."""

    env_arguments: dict[str, Any] = {}
    """What the task's environments are made with."""
    mode: str
    aggregator: str = "mean"
    codec: str = "fp32"
    owner: PeerName
    training_return: float | None = None
    """Of recent training episodes, smoothed."""
    max_env_steps: int = 0
    batch_per_learner: int = 0
    """What the fastest learner collects per epoch."""
    batch_size: int | None = None
    """What all collect together at most."""
    steps_per_s: float = 0.0
    """Of all live members together."""
    members: list[MemberInfo] = []
    shunned: list[PeerName] = []
    """Members that this node found to lie in an exchange, and averages nothing with."""
    copies: int = 0
    """Of policies, that this node acted by; the others it took as a whole."""
    copy_bytes: int = 0
    """That came for them."""
    evidence: list[EvidenceInfo] = []
    """What members signed against each other."""
    digest: str | None = None
    """Hex; of the parameters that this node holds."""
    policy_cid: CidName | None = None
    alone_since: float | None = None
    """Unix seconds."""
    trained_alone: bool = False
    """Nobody but this node has put anything into the run."""
    metrics: dict[str, float] = {}
    """Of this node's last update, by the names that the algorithm gives them: losses, entropy, lengths of gradients."""
    curve: list[CurvePoint] = []
    scores: list[Scores] = []
    """What recipes' probes found, by epoch and author; the newest, if they are very many."""
    consults: dict[str, ConsultInfo] = {}
    """By the part that was asked."""
    num_asks: int = 0
    """What waits for the person at this node: ``GET /v1/swarms/ID/asks``."""
    results: str | None = None
    """The folder with curve.png, policy.safetensors and result.json, once the run is done."""
    loop_socket: str | None = None
    """Where a training loop of this user attaches (`shoal.training.exchange.Averager`), if this swarm is of such."""
    ticket: str = ""
    started_at: float | None = None
    """Unix seconds."""
    elapsed_s: float = 0.0


class StateInfo(Model):
    """The shared state of one swarm, as this node holds it."""

    version: dict[str, int]
    """How many ops of each author are held."""
    documents: dict[str, dict[str, Any]]


class ActsInfo(Model):
    """How a role acts.

    Attributes:
        kind: ``discrete`` (a whole number, from 0), ``continuous`` (a list of numbers) or ``text``.
        size: how many acts, numbers or, at most, characters.
    """

    kind: str
    size: int


class AskInfo(Model):
    """What a person at this node is asked: what to do where a play of another member stands.

    Attributes:
        id: by which it is answered; of this swarm at this node.
        peer: whose play it is.
        role: that the person plays.
        tag: of the scenario; may be empty.
        turn: how often the role has acted in this play.
        sight: what it sees: a text or numbers.
        acts: how it acts.
        legal: which acts are legal, where acts are numbers.
        seconds_left: for the answer.
    """

    id: int
    peer: PeerName
    role: str
    tag: str = ""
    turn: int = 0
    sight: str | list[float]
    acts: ActsInfo
    legal: list[int] | None = None
    seconds_left: float


class CreatedSwarm(Model):
    """The new swarm, and what to hand to others."""

    swarm: SwarmName
    ticket: str


class JoinedSwarm(Model):
    """The swarm, and what this node does in it."""

    swarm: SwarmName
    role: str


class Event(Model):
    """Something changed: ``node`` or ``swarm``, with the whole of it as it is now, or ``left`` with ``{"swarm": id}``.

    Losing one does no harm, as the next has all that it had.
    """

    name: str
    data: dict[str, Any] = {}


class ErrorBody(Model):
    """Why a request failed."""

    code: int
    """The exit code that the command line ends with."""
    message: str


class ErrorAnswer(Model):
    """The body of every answer that is not a success."""

    error: ErrorBody


class ModelInfo(Model):
    """A folder that this node has published or fetched, is fetching, or has heard of.

    Attributes:
        name: what it is called here, or by its owner.
        version: of the owner's name; null if it has none.
        owner: whose name it is.
        num_bytes: of its files; 0 before they are known.
        stored_on: nodes that have all of it: this one, and those that say so in the DHT if that was asked.
        num_told: other nodes that keep its name, right after it was published; else null.
    """

    name: str
    version: int | None = None
    owner: PeerName | None = None
    cid: CidName
    num_bytes: int
    num_files: int
    tags: list[str] = []
    is_pinned: bool = False
    is_whole: bool = False
    stored_on: list[PeerName] = []
    num_told: int | None = None


class VersionInfo(Model):
    """A version of a model, and its content."""

    version: int
    cid: CidName


class FileInfo(Model):
    """A file of a model; an empty folder's path ends in a slash."""

    path: str
    num_bytes: int


class ModelDetail(ModelInfo):
    """A model with its first files.

    Attributes:
        files: of a model that is here.
        versions: that can be had by its owner's name, the newest first.
        disputed: contents that its owner signed for a version for which it signed another one, too.
    """

    files: list[FileInfo] = []
    versions: list[VersionInfo] = []
    disputed: list[VersionInfo] = []


class FetchInfo(Model):
    """How far a fetch is, or how it went.

    Attributes:
        model: the name and version that was asked for, when it is over; empty if it was a CID.
        sources: bytes that came of each peer.
    """

    cid: CidName
    model: str = ""
    num_bytes: int
    of_bytes: int
    seconds: float
    mb_per_s: float
    sources: dict[str, int] = {}


class ContentInfo(Model):
    """What contents take on disk.

    Attributes:
        disk_bytes: of all that this node keeps; it may be ``max_disk_bytes``.
        run_bytes: blocks of runs.
        model_bytes: blocks of models.
        freed_bytes: by what was asked for, if it frees something.
        num_damaged: blocks that were found damaged since the node started.
        fetching: what is on its way.
    """

    disk_bytes: int
    max_disk_bytes: int
    run_bytes: int
    model_bytes: int
    freed_bytes: int = 0
    num_damaged: int = 0
    fetching: list[FetchInfo] = []
