"""The services that nodes are to each other: names, messages and policies. Who serves them is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shoal.crdt.gossip_messages import Control
from shoal.crdt.meeting import Differing
from shoal.crdt.sync import Head, Version
from shoal.dht.messages import MAX_ANSWER_BYTES as MAX_FOUND_BYTES
from shoal.dht.messages import FindAnswer, FindRequest, StoreAnswer, StoreRequest
from shoal.dht.records import MAX_RECORD_BYTES
from shoal.node.wire.bulk import BulkRef
from shoal.node.wire.lanes import LaneKind, LaneTicket
from shoal.protocol.codec import Attachment, decode, encode
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.limits import BLOCK_BYTES, MAX_MEMBERS
from shoal.protocol.services import Empty, Service, unary
from shoal.protocol.signing import Signed
from shoal.training.exchange.audits import SignedOutcome

CONSULT_S: Final = 10.0
"""How long a play waits for another member."""
MAX_CONSULT_BYTES: Final = 4 * 1024 * 1024 + 4096
"""Of one question or answer."""


MAX_HELD_TREE_BYTES: Final = 160 * 1024
"""A bit for each block of the largest tree, and some."""


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Asks for one block."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class Block:
    """One block; whether it is the right one, its CID says."""

    data: Attachment


GOSSIP_LAG_S: Final = 2.4
"""The answer to gossip waits so long for something to go with, or for some more of its kind."""
GIVE_LAG_S: Final = 1.0
"""The answer to a part of a step goes with this node's own part of the next one."""
MAX_HEAD_BYTES: Final = 128
"""One author and its head, as they are encoded; 121 at most."""

_HEADS: Final[Any] = dict[str, Head]


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Asks for the ops that the caller lacks.

    Attributes:
        swarm: of which.
        version: how far the caller is, by author: `plain_version`.
        is_full: whether it has a place for no more authors.
    """

    swarm: SwarmId
    version: bytes
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class SyncAnswer:
    """Ops that the caller lacks, in order (maybe not all of them), and how far the answerer is itself."""

    ops: tuple[Signed, ...]
    version: bytes
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class PresenceSummary:
    """Asks what of presence the callee holds where the caller holds something else.

    Attributes:
        swarm: of which.
        buckets: what the caller holds: `shoal.crdt.meeting.summary`.
    """

    swarm: SwarmId
    buckets: bytes


@dataclass(frozen=True, slots=True)
class GossipPush:
    """Everything that waits for one member.

    Attributes:
        swarm: of which.
        records: presence.
        ops: of documents; those of a fork side by side.
        control: for the receiver's gossip, in order.
    """

    swarm: SwarmId
    records: tuple[Signed, ...] = ()
    ops: tuple[Signed, ...] = ()
    control: tuple[Control, ...] = ()


@dataclass(frozen=True, slots=True)
class ConsultRequest:
    """The caller's plays wait for one of the callee's policies, or its person (`shoal.training.effects.Consult`).

    Attributes:
        swarm: of which.
        policy: by which; empty: the person who sits there.
        takes: as `shoal.training.tasks.wire` writes them.
    """

    swarm: SwarmId
    policy: str
    takes: Attachment


@dataclass(frozen=True, slots=True)
class ConsultAnswer:
    """What the policy or the person does, as `shoal.training.tasks.wire` writes acts."""

    acts: Attachment


@dataclass(frozen=True, slots=True)
class StepPart:
    """What the caller gives at one step of an update that is exchanged directly (`shoal.training.exchange.direct`).

    Attributes:
        swarm: of which.
        epoch: of the policy that is updated.
        step: which exchange of the update.
        after: what the step follows from, 32 bytes.
        weight: in samples; 0 if the caller has nothing to give.
        data: the part; absent if there is none.
    """

    swarm: SwarmId
    epoch: int
    step: int
    after: bytes
    weight: int
    data: Attachment | None = None


def typed_version(message: SyncRequest | SyncAnswer) -> Version:
    """How far a peer says it is, checked. What names more authors than there can be is refused unread.

    Raises:
        ProtocolError: if it is no version, or an author is not a peer id.
    """
    heads = decode(_HEADS, message.version, max_bytes=MAX_MEMBERS * MAX_HEAD_BYTES)
    try:
        return Version({PeerId.parse(author): head for author, head in heads.items()}, message.is_full)
    except UsageError as error:
        raise ProtocolError(str(error)) from error


def plain_version(version: Version) -> bytes:
    """The heads as they go into a message: MessagePack, from author to head."""
    return encode({str(author): head for author, head in version.heads.items()})


class NodeService(Service, name="node"):
    """What every node is."""

    @unary(idempotent=True, is_urgent=True)
    async def ping(self, request: Empty) -> Empty:
        """Answer, at once."""
        raise NotImplementedError


class ContentService(Service, name="content"):
    """Blocks by CID."""

    @unary(idempotent=True, max_answer_bytes=BLOCK_BYTES + 4096)
    async def block(self, request: BlockRequest) -> Block:
        """Give a block; NOT_FOUND if it is not here."""
        raise NotImplementedError


class DhtService(Service, name="dht"):
    """The distributed hash table (`shoal.dht.core`). A call that fails is not made again: another peer is asked."""

    @unary(max_answer_bytes=MAX_FOUND_BYTES, max_calls_per_s=50)
    async def find(self, request: FindRequest) -> FindAnswer:
        """Name the peers nearest to a key, and give the records that are kept there."""
        raise NotImplementedError

    @unary(max_answer_bytes=2 * MAX_RECORD_BYTES, max_calls_per_s=50)
    async def store(self, request: StoreRequest) -> StoreAnswer:
        """Keep a record; INVALID_ARGUMENT if it is none that anybody may keep."""
        raise NotImplementedError


class SwarmService(Service, name="swarm"):
    """State that the members of a swarm share; NOT_FOUND if this node is not one."""

    @unary(idempotent=True)
    async def sync(self, request: SyncRequest) -> SyncAnswer:
        """Give the ops that the caller lacks."""
        raise NotImplementedError

    @unary(idempotent=True, max_calls_per_s=20)
    async def compare(self, request: PresenceSummary) -> Differing:
        """Say what is held of presence where the caller holds something else, so that it gives what is lacking."""
        raise NotImplementedError

    @unary(idempotent=True, max_answer_bytes=64, answer_lag_s=GOSSIP_LAG_S)
    async def gossip(self, request: GossipPush) -> Empty:
        """Take news, and hear what the caller's gossip has to say."""
        raise NotImplementedError

    @unary(idempotent=True, max_answer_bytes=64, answer_lag_s=GIVE_LAG_S)
    async def give(self, request: StepPart) -> Empty:
        """Take the caller's part of a step; FAILED_PRECONDITION if this node learns nothing with the caller."""
        raise NotImplementedError

    @unary(idempotent=True, timeout_s=CONSULT_S, max_answer_bytes=MAX_CONSULT_BYTES, max_calls_per_s=50)
    async def consult(self, request: ConsultRequest) -> ConsultAnswer:
        """Say what a policy of this node does, or the person who sits here.

        What the person does not answer by the call's deadline is left out. FAILED_PRECONDITION if this node does not
        answer the caller, or not by this policy.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ArrayOffered:
    """The caller takes part in an all-reduce (`shoal.training.exchange.allreduce`).

    Attributes:
        key: names it, 16 bytes.
        arrays: what the caller gives.
        results: where what came of each part lies, once it was announced.
    """

    key: bytes
    arrays: BulkRef
    results: BulkRef


@dataclass(frozen=True, slots=True)
class ReduceEnded:
    """The caller holds everything, and pulls no more."""

    key: bytes


@dataclass(frozen=True, slots=True)
class PartAsked:
    """Asks whether the callee holds what came of a part, whose owner gives nothing; ``heir`` is to own it."""

    key: bytes
    part: int
    heir: PeerId


@dataclass(frozen=True, slots=True)
class PartHeld:
    """What the answerer holds of it; without it: nothing, and it takes it of nobody but the heir from now on."""

    said: SignedOutcome | None = None


@dataclass(frozen=True, slots=True)
class ResultAsked:
    """Asks for what came of a part: the caller is no member of this all-reduce, and does as its members do.

    Attributes:
        key: of the all-reduce, 16 bytes.
        part: which.
        is_data_wanted: or only what its owner signed.
    """

    key: bytes
    part: int
    is_data_wanted: bool = True


@dataclass(frozen=True, slots=True)
class ResultGiven:
    """What came of it, as its owner signed it, and its bytes, if they were asked for."""

    said: SignedOutcome
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class LieFound:
    """The caller found that what an owner signed does not follow from the parts that it names; look for yourself."""

    said: SignedOutcome


class ExchangeService(Service, name="exchange"):
    """What members of an all-reduce say to each other; the bytes go in bulk."""

    @unary(idempotent=True)
    async def array(self, request: ArrayOffered) -> Empty:
        """Hear that the caller's buffers can be pulled from."""
        raise NotImplementedError

    @unary(idempotent=True)
    async def outcome(self, request: SignedOutcome) -> Empty:
        """Hear that the caller holds what came of a part."""
        raise NotImplementedError

    @unary(idempotent=True)
    async def lie(self, request: LieFound) -> Empty:
        """Hear that an owner lied."""
        raise NotImplementedError

    @unary(idempotent=True)
    async def held(self, request: PartAsked) -> PartHeld:
        """Say whether this node holds it; NOT_FOUND if it is in no such all-reduce."""
        raise NotImplementedError

    @unary(idempotent=True)
    async def result(self, request: ResultAsked) -> ResultGiven:
        """Give what came of a part, once it is here; NOT_FOUND if this node is in no such all-reduce, or no more."""
        raise NotImplementedError

    @unary(idempotent=True)
    async def ended(self, request: ReduceEnded) -> Empty:
        """Hear that the caller needs nothing more."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LaneRequest:
    """Asks to be let in by a lane of this kind."""

    kind: LaneKind


@dataclass(frozen=True, slots=True)
class LaneInvitation:
    """Asks the far side to dial a lane of this kind, with this ticket."""

    kind: LaneKind
    ticket: LaneTicket


class LaneService(Service, name="lane"):
    """Extra connections between two peers; `shoal.node.wire.lanes` has the how and why."""

    @unary(max_calls_per_s=20)
    async def ticket(self, request: LaneRequest) -> LaneTicket:
        """Let the caller dial a lane to this node."""
        raise NotImplementedError

    @unary(max_calls_per_s=20)
    async def dial(self, request: LaneInvitation) -> Empty:
        """Dial a lane to the caller, because this node once dialed it and it may not be able to dial back."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a node tells a peer of how it is reached; told anew when it changes.

    Attributes:
        addresses: full multiaddrs, circuits among them.
        relays: whether it relays for others.
        load: how full it is as a relay, between 0 and 1.
        stun_port: the UDP port at which it answers STUN; 0 if it does not.
        reachability: as of `shoal.node.reach.nat.Reachability`.
        udp: as of `shoal.node.reach.nat.NatType`.
        tcp_mapping: as of `shoal.node.reach.nat.Mapping`.
    """

    addresses: tuple[str, ...]
    relays: bool
    load: float
    stun_port: int
    reachability: str
    udp: str
    tcp_mapping: str


@dataclass(frozen=True, slots=True)
class DialBack:
    """Asks for a TCP connection to the address that the caller is seen at, and to show a nonce there.

    Attributes:
        is_ipv6: which of its addresses, if it is connected by both IPs.
    """

    port: int
    nonce: bytes
    is_ipv6: bool


@dataclass(frozen=True, slots=True)
class SeenAt:
    """The IP address that the caller is seen at."""

    ip: str


@dataclass(frozen=True, slots=True)
class Poke:
    """Asks for a UDP packet to the address that the caller is seen at, with a token in it.

    Attributes:
        other_port: from another port than the one that answers STUN.
        is_ipv6: which of its addresses, if it is connected by both IPs.
    """

    port: int
    token: bytes
    other_port: bool
    is_ipv6: bool


@dataclass(frozen=True, slots=True)
class SessionDescription:
    """A session description of WebRTC (SDP, RFC 8866)."""

    sdp: str


class ReachService(Service, name="reach"):
    """How nodes help each other to be reached; `shoal.node.reach.reach` has the how and why."""

    @unary(idempotent=True, max_calls_per_s=20)
    async def hello(self, request: Introduction) -> Introduction:
        """Tell each other how to be reached."""
        raise NotImplementedError

    @unary(max_calls_per_s=4)
    async def dial_back(self, request: DialBack) -> SeenAt:
        """Dial the caller; FAILED_PRECONDITION if it is not connected directly."""
        raise NotImplementedError

    @unary(max_calls_per_s=4)
    async def poke(self, request: Poke) -> Empty:
        """Send a packet to the caller; FAILED_PRECONDITION if it is not connected directly."""
        raise NotImplementedError

    @unary(max_calls_per_s=4)
    async def webrtc(self, request: SessionDescription) -> SessionDescription:
        """Answer an offer of WebRTC; UNIMPLEMENTED if this node has none."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TreeAsked:
    """Asks what of a tree (`shoal.dht.trees`) is there."""

    cid: Cid


@dataclass(frozen=True, slots=True)
class TreeHeld:
    """What of it is: bit n, from the lowest of the first byte on, is block n, equal ones counted once.

    Attributes:
        is_whole: whether it is all of them; then ``blocks`` may be empty.
        ref: by which they are pulled, one after the other as one range of bytes.
    """

    is_whole: bool
    blocks: bytes = b""
    ref: BulkRef | None = None


@dataclass(frozen=True, slots=True)
class NameAsked:
    """Asks for what is known of a model (`shoal.dht.registry`)."""

    owner: PeerId
    name: str


@dataclass(frozen=True, slots=True)
class NameHeld:
    """What is: the newest record, and two that contradict each other, if its owner signed such."""

    records: tuple[Signed, ...]


class NameService(Service, name="names"):
    """Names of models, as nodes remember them."""

    @unary(idempotent=True, max_answer_bytes=4 * MAX_RECORD_BYTES, max_calls_per_s=50)
    async def named(self, request: NameAsked) -> NameHeld:
        """Give the records of a model; NOT_FOUND if this node knows none."""
        raise NotImplementedError


class TreeService(Service, name="tree"):
    """Who has what of a tree, and whence it can be pulled."""

    @unary(idempotent=True, max_answer_bytes=MAX_HELD_TREE_BYTES, max_calls_per_s=50)
    async def held(self, request: TreeAsked) -> TreeHeld:
        """Say which blocks are there; NOT_FOUND if this node does not know the tree."""
        raise NotImplementedError
