"""What members tell each other of a run: signed ops, their Yjs updates, presence.

An input is a list of steps, each of which lets Alice, Bob or the node itself (somebody else with its key) say something
to one node. Some say it honestly, by the code that a node runs; some say anything at all, rightly signed, since a key
costs nothing. Nothing may raise but what is documented, and in the end whoever is told what was accepted holds the same
documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, Final

import msgpack

from shoal.crdt import oplog, presence, views
from shoal.crdt.document import MAX_REGISTERS, Document
from shoal.crdt.meeting import BUCKET_BYTES, ROW_BYTES, Differing, differing, lacking, summary
from shoal.crdt.oplog import NO_OP, Fork, Op, op_hash, open_op
from shoal.crdt.presence import Excess, Fresh, PresenceTable
from shoal.crdt.snapshots import NAME_BYTES, places
from shoal.crdt.sync import Head, SwarmDocs, Version
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.protocol.signing import Signed, Signer
from shoal.training.statements import TOPIC_OF, TOPIC_RULES, TOPICS, read_statement

from .harness import FindingError, MutateBytes, Target, check_text, refusing, require
from .identities import ALICE, BOB, OTHER_SWARM, OWN, SWARM
from .mutators import Step, mutate_packed, mutate_steps, pack_steps, read_steps
from .samples import sample

_SIGNERS: Final = (ALICE, BOB, OWN)
_TOPICS: Final = {topic: replace(rule, per_s=1, burst=4) for topic, rule in TOPIC_RULES.items()}
"""Those of a run, so slow that one input can be too fast."""
_TOPIC_NAMES: Final = tuple(_TOPICS)
_MAX_STEPS: Final = 16  # each costs a signature or two

# The first byte of a step's bytes says who speaks, and in what way it lies.
_LIE_SIGNATURE: Final = 0x80
_LIE_SWARM: Final = 0x40
_LIE_PREV: Final = 0x20
_LIE_GAP: Final = 0x10
_LIE_REWRITE: Final = 0x08
_LIE_LAMPORT: Final = 0x04


class _Scene:
    """One node, and what the others know."""

    def __init__(self) -> None:
        self.docs = SwarmDocs(SWARM, OWN.peer_id)
        self.authors = {signer.peer_id: SwarmDocs(SWARM, signer.peer_id) for signer in _SIGNERS}
        self.heads = {signer.peer_id: NO_OP for signer in _SIGNERS}
        self.accepted: list[Signed] = []
        self.forks: dict[PeerId, Fork] = {}
        self.table = PresenceTable(SWARM, OWN.peer_id, 1_000, _TOPICS)
        self.announcers = {signer.peer_id: PresenceTable(SWARM, signer.peer_id, 1, _TOPICS) for signer in _SIGNERS}
        self.now = 0.0

    def receive(self, *ops: Signed) -> None:
        """Offer ops to the node, and let their authors know what it took."""
        received = self.docs.receive(ops)
        for rejected in received.rejected:
            check_text(rejected.reason)
        for fork in received.forks:
            require(fork.author in self.authors, "a fork was shown of somebody who signed nothing")
            self.forks[fork.author] = fork
            self._cut(fork)
            self.authors[fork.author].receive([fork.one, fork.other])
        for sealed in received.accepted:
            require(sealed.author in self.authors, "an op was taken that nobody here signed")
            self.accepted.append(sealed)
            self.heads[sealed.author] = op_hash(sealed)
            again = self.authors[sealed.author].receive([sealed])
            is_astray = sealed.author in self.authors[sealed.author].frozen or sealed.author in self.forks
            require(sealed in again.accepted or not again.missing or is_astray, "one takes an op that another refuses")
        again = self.docs.receive([*received.accepted, *(op for f in received.forks for op in (f.one, f.other))])
        require(not again.accepted and not again.forks, "an op or a fork was taken twice")

    def _cut(self, fork: Fork) -> None:
        """What is before a fork stands, as far as it had not gone for a snapshot already."""
        own = [open_op(op) for op in self.accepted if op.author == fork.author]
        base = max((op.seq for op in own if op.trail is not None), default=0)
        self.accepted = [op for op in self.accepted if op.author != fork.author or base <= open_op(op).seq < fork.seq]

    def next_op(self, signer: Signer, lies: int, update: bytes, *, is_snapshot: bool = False) -> Signed:
        """The author's next op with any update, and with lies beside it."""
        author = signer.peer_id
        seq = self.docs.seqs().get(author, 0) + 1
        seq += (1 if lies & _LIE_GAP else 0) - (1 if lies & _LIE_REWRITE and seq > 1 else 0)
        log = self.docs._logs.get(author)
        trail = log.trail(seq) if log is not None and is_snapshot else b""
        names = NAME_BYTES * len(places(seq))
        op = Op(
            swarm=OTHER_SWARM if lies & _LIE_SWARM else SWARM,
            author=author,
            seq=seq,
            prev=NO_OP if lies & _LIE_PREV or seq == 1 else self.heads[author],
            lamport=1 if lies & _LIE_LAMPORT else self.docs.lamport + 1,
            update=update,
            trail=(trail + bytes(names))[:names] if is_snapshot else None,
        )
        return _seal(signer, oplog.KIND, encode(op), lies)


def _seal(signer: Signer, kind: str, payload: bytes, lies: int) -> Signed:
    return signer.seal("lie" if lies & _LIE_SIGNATURE else kind, payload)


def _run(data: bytes) -> None:
    scene = _Scene()
    for what, with_bytes in read_steps(data)[:_MAX_STEPS]:
        scene.now += 0.5
        lies = with_bytes[0] if with_bytes else 0
        signer = _SIGNERS[(lies & 3) % len(_SIGNERS)]
        _STEPS[what % len(_STEPS)](scene, signer, lies, with_bytes[1:])
    _check_documents(scene)


def _step_honest_write(scene: _Scene, signer: Signer, _: int, data: bytes) -> None:
    """Registers, in MessagePack, written as a node writes them."""
    registers = _unpacked(data)
    if not isinstance(registers, dict) or not all(isinstance(name, str) for name in registers):
        return
    author = scene.authors[signer.peer_id]
    if author.version().heads.get(signer.peer_id) != scene.docs.version().heads.get(signer.peer_id):
        return  # it wrote something that the node did not take
    with refusing(UsageError):  # a `FrozenLogError` among them
        sealed = author.write(signer, **{name: value for name, value in registers.items() if name != "signer"})
        scene.receive(sealed)
        require(sealed in scene.accepted, "an honest op was refused")


def _step_update(scene: _Scene, signer: Signer, lies: int, data: bytes) -> None:
    """Any bytes as a Yjs update."""
    scene.receive(scene.next_op(signer, lies, data))


def _step_registers(scene: _Scene, signer: Signer, lies: int, data: bytes) -> None:
    """Registers with any bytes for values, in a well-formed update; ``data`` is MessagePack, keys to byte strings."""
    registers = _unpacked(data)
    if isinstance(registers, dict):
        clock = _clock(scene, signer.peer_id)
        scene.receive(scene.next_op(signer, lies, _yjs_update(registers, clock)))


def _step_snapshot(scene: _Scene, signer: Signer, lies: int, data: bytes) -> None:
    """The same as a snapshot."""
    registers = _unpacked(data)
    if isinstance(registers, dict):
        scene.receive(scene.next_op(signer, lies, _yjs_update(registers, 0), is_snapshot=True))


def _step_op(scene: _Scene, signer: Signer, lies: int, data: bytes) -> None:
    """Any payload of an op."""
    scene.receive(_seal(signer, oplog.KIND, data, lies))


def _step_sealed(scene: _Scene, _: Signer, __: int, data: bytes) -> None:
    """Any sealed thing, as an op and as presence."""
    with refusing(ProtocolError):
        sealed = decode(Signed, data)
        scene.receive(sealed)
        _hear(scene, sealed)


def _step_presence(scene: _Scene, signer: Signer, lies: int, data: bytes) -> None:
    """Any payload of a presence record."""
    _hear(scene, _seal(signer, presence.KIND, data, lies))


def _step_announce(scene: _Scene, signer: Signer, lies: int, data: bytes) -> None:
    """Facts, in MessagePack, announced as a node announces them."""
    facts = _unpacked(data)
    topic = _TOPIC_NAMES[(lies >> 2) % len(_TOPIC_NAMES)]
    if isinstance(facts, dict):
        with refusing(UsageError):
            _hear(scene, scene.announcers[signer.peer_id].announce(signer, topic, facts, 1.0).sealed)


def _step_version(scene: _Scene, _: Signer, lies: int, data: bytes) -> None:
    """Somebody's version vector."""
    with refusing(ProtocolError, UsageError):
        heads = {PeerId.parse(author): head for author, head in decode(_VERSION, data).items()}
        version = Version(heads, is_full=bool(lies & 1))
        missing = scene.docs.missing(version, max_bytes=1000)
        require(len(missing) <= len(scene.accepted) + 2 * len(scene.forks), "more is missing than there is")
        require(bool(missing) == scene.docs.is_ahead(version), "is_ahead and missing disagree")
        scene.docs.is_behind(version)


def _step_compare(scene: _Scene, _: Signer, lies: int, data: bytes) -> None:
    """What somebody that meets the node says that it holds, as a summary and as an answer to one."""
    table = scene.table
    with refusing(ProtocolError):
        answer = differing(table, data)
        require(len(answer.rows) <= len(table.held()) * ROW_BYTES, "more is listed than there is")
    num_buckets = len(summary(table)) // BUCKET_BYTES
    with refusing(ProtocolError):
        lacks = lacking(table, num_buckets, Differing(data[: lies or 1], data[lies or 1 :]))
        require(len(lacks) <= len(table.held()), "more is sent than there is")


_VERSION: Final[Any] = dict[str, Head]

_STEPS: Final[tuple[Callable[[_Scene, Signer, int, bytes], None], ...]] = (
    *(_step_honest_write, _step_update, _step_registers, _step_op),
    *(_step_sealed, _step_presence, _step_announce, _step_version),
    *(_step_snapshot, _step_compare),
)


def _hear(scene: _Scene, sealed: Signed) -> None:
    with refusing(ProtocolError):
        heard = scene.table.receive(sealed, scene.now)
        again = scene.table.receive(sealed, scene.now)
        require(not isinstance(again, Fresh), "a record was news twice")
        if isinstance(heard, Fresh):
            author, topic = heard.presence.author, heard.presence.topic
            require(author in scene.table.live(scene.now), "who was just heard is not there")
            held = scene.table.statements(author, topic)
            require(len(held) <= _TOPICS[topic].keep, "more statements are held than are kept")
            require(heard.record_hash in [name for _, name in held], "what is news is not held")
            statement = read_statement(topic, heard.presence.facts)
            if statement is not None:
                require(TOPIC_OF[type(statement)] == topic, "a statement was read that another topic is for")
                again_read = read_statement(topic, decode(_FACTS, encode(statement)))
                require(again_read == statement, "what a member says is read differently when it is said again")
        elif isinstance(heard, Excess):
            require(isinstance(again, Excess), "what came too fast was taken a moment later")
    scene.table.expire(scene.now)
    bound = MAX_MEMBERS * sum(rule.keep for rule in _TOPICS.values())
    require(len(scene.table.held()) <= bound, "the table of presence is over its limit")


def _check_documents(scene: _Scene) -> None:
    documents = scene.docs.documents()
    for registers in documents.values():
        require(len(registers) <= MAX_REGISTERS, "a document is over its limit")
    try:
        rebuilt = SwarmDocs(SWARM, OWN.peer_id, reversed(scene.accepted), scene.forks.values())
    except ProtocolError as error:
        raise FindingError(f"what was accepted cannot be stored and read again: {error}") from error
    require(rebuilt.version() == scene.docs.version(), "what was accepted does not make the same version")
    require(encode(rebuilt.documents()) == encode(documents), "what was accepted does not make the same documents")
    views.members(documents)
    views.best_policy(documents)
    views.first_solved(documents, 1.0)
    views.contributions(documents)


def _clock(scene: _Scene, author: PeerId) -> int:
    """How many items the author's updates have made so far: the clock at which its next update starts."""
    clock = 0
    for sealed in scene.accepted:
        if sealed.author == author:
            op = decode(Op, sealed.payload, max_bytes=2**17)
            clock = (clock if op.trail is None else 0) + _varint_at(op.update, 1)
    return clock


def _varint_at(data: bytes, at: int) -> int:
    value = shift = 0
    while data[at] >= 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return int(value | data[at] << shift)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _yjs_update(registers: dict[Any, Any], clock: int) -> bytes:
    """Registers as a new key each (update format, version 1), whatever the values."""
    items = []
    for key, value in registers.items():
        name = str(key).encode(errors="surrogateescape")
        data = value if isinstance(value, bytes) else msgpack.packb(value, unicode_errors="surrogateescape")
        parent = b"\x28\x01\x09registers"  # of what follows, "a value with a key"; then a root by its name
        items.append(parent + _varint(len(name)) + name + b"\x01\x74" + _varint(len(data)) + data)
    return b"\x01" + _varint(len(items)) + b"\x01" + _varint(clock) + b"".join(items) + b"\x00"


def _unpacked(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, unicode_errors="surrogateescape")
    except (ValueError, TypeError, msgpack.UnpackException):
        return None


def _seeds() -> list[bytes]:
    cid = str(SWARM)
    registers: dict[str, Any] = {
        "member": {"role": "learner"},
        "policy": {"epoch": 3, "env_steps": 900, "cid": cid, "digest": "00"},
        "evaluations": {"3": {"cid": cid, "return": 475.0, "env_steps": 900, "episodes": 20}},
        "contributions": {"env_steps": 400, "rounds": 3},
    }
    raw = {"member": encode(registers["member"]), "evaluations/12": encode({"return": 1.0}), "odd": b"\xc1"}
    said = {topic: encode(sample(kind)) for topic, kind in TOPICS.items()}
    write = (0, b"\0" + encode(registers))
    update = Document().set(registers)
    bob = PresenceTable(SWARM, BOB.peer_id, 1, _TOPICS)
    heard = bob.announce(BOB, "facts", decode(_FACTS, said["facts"]), 1.0).sealed
    vote = bob.announce(BOB, "vote", decode(_FACTS, said["vote"]), 1.0).sealed
    first = SwarmDocs(SWARM, BOB.peer_id).write(BOB, **registers)
    version = encode({str(ALICE.peer_id): Head(), str(BOB.peer_id): Head(7, bytes(32), 9)})
    announced = [(6, bytes([1 | index << 2]) + said[topic]) for index, topic in enumerate(_TOPIC_NAMES)]
    scenes: list[list[Step]] = [
        [write, (0, b"\0" + encode({"member": {"left": True}})), (7, b"\0" + version)],
        [(1, b"\1" + update), (1, bytes([1 | _LIE_GAP]) + update)],
        [(2, b"\1" + encode(raw)), (2, b"\1" + encode({"member": b"\x80"}))],
        [(3, b"\1" + first.payload), (4, b"\0" + encode(first)), (5, b"\1" + heard.payload)],
        [*announced, (4, b"\0" + encode(heard))],
        [*announced, (9, b"\1" + summary(bob)), (9, b"\1\xff" + differing(bob, b"\1" * BUCKET_BYTES).rows)],
        [(4, b"\0" + encode(vote)), (4, b"\0" + encode(heard)), *[announced[0]] * 6],
        [write, (8, b"\0" + encode(raw)), (2, b"\0" + encode(raw)), (8, bytes([_LIE_GAP]) + encode(raw))],
        [write, write, write, *((8, bytes([lie]) + encode(raw)) for lie in (_LIE_PREV, _LIE_REWRITE, _LIE_SWARM))],
        [write, *((2, bytes([lie]) + encode(raw)) for lie in (_LIE_PREV, _LIE_REWRITE, _LIE_LAMPORT, _LIE_SIGNATURE))],
    ]
    return [pack_steps(scene) for scene in scenes]


_FACTS: Final[Any] = dict[str, Any]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    def mutate_step(step: Step) -> Step:
        what, with_bytes = step
        head, rest = with_bytes[:1] or b"\0", with_bytes[1:]
        if rng.random() < 0.3:
            head = bytes([rng.randrange(4) | rng.choice((0, 0, 0, 4, 8, 16, 32, 64, 128))])
        if what % len(_STEPS) in (1, 9) or rng.random() < 0.1:
            return what, head + mutate_bytes(rest, len(rest) + 64)
        return what, head + mutate_packed(rest, len(rest) + 512, rng, mutate_bytes)

    return mutate_steps(data, max_bytes, rng, mutate_bytes, mutate_step)


def _max_peak_bytes(length: int) -> int:
    # Every op is held several times here: by its author, by the node, by the node built anew, and by what checks it.
    return 2 * 1024 * 1024 + 2048 * length


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=_max_peak_bytes)
