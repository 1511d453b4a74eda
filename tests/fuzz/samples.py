"""A valid value of any type that the codec reads, made from the type alone."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from shoal.crdt.gossip_messages import Ask, Control, Walk
from shoal.crdt.oplog import Op
from shoal.crdt.presence import Presence
from shoal.crdt.sync import Head
from shoal.dht.manifests import ContentManifest
from shoal.node.wire.bulk import ID_BYTES, BulkRef
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.limits import BLOCK_BYTES
from shoal.training.manifest import Manifest, Role
from shoal.training.statements import NO_BALLOT, Facts, GivenCopy, Phase, Proposal, Result, RoundKey, Vote, first_after

from .identities import ALICE, SWARM

_POLICY = Cid.of_block(b"policy")
_ROUND = RoundKey(epoch=1, step=0, after=first_after(_POLICY))
_PROPOSAL = Proposal(key=_ROUND, attempt=0, offers=(bytes([1] * 32), bytes([2] * 32)))

_WHOLE: tuple[object, ...] = (
    ALICE.seal("op/1", b"\x80"),
    Manifest(owner=ALICE.peer_id, task="gym:CartPole-v1", algorithm="ppo", hyperparameters={"gamma": 0.9}),
    ContentManifest(size=BLOCK_BYTES + 1, blocks=(Cid.of_block(b"a"), Cid.of_block(b"b"))),
    Op(swarm=SWARM, author=ALICE.peer_id, seq=1, prev=bytes(32), lamport=1, update=b"\0"),
    Op(swarm=SWARM, author=ALICE.peer_id, seq=4, prev=bytes(32), lamport=1, update=b"\0", trail=bytes(32)),
    Presence(
        swarm=SWARM, author=ALICE.peer_id, topic="facts", started_at=1, seq=1, every_s=1.0, facts={"role": "learner"}
    ),
    Head(seq=7, hash=bytes(32), fork=9),
    Walk(ALICE.peer_id, 3),
    Control(have=(bytes(16),), want=(bytes(16),), neighbour=Ask.JOIN, walks=(Walk(ALICE.peer_id, 3),)),
    BulkRef(bytes(ID_BYTES), 7),
    Facts(role=Role.LEARNER, phase=Phase.EXCHANGING, epoch=1, samples=256, speed=10.0),
    _ROUND,
    _PROPOSAL,
    Vote(key=_ROUND, ballot=_PROPOSAL.ballot, attempt=2, cast=1),
    Result(epoch=1, cid=_POLICY, parent=Cid.of_block(b"initial"), ballot=NO_BALLOT, env_steps=256),
    GivenCopy(version=1, state=_POLICY, digest=bytes([3] * 32), key=_POLICY, key_bytes=7),
)
"""Of types whose fields must fit together, one that does."""

_OF_KIND: dict[Any, Any] = {
    type(None): None,
    bool: True,
    int: 7,
    float: 0.5,
    str: "gym:CartPole-v1",
    bytes: b"bytes",
    PeerId: ALICE.peer_id,
    Cid: Cid.of_block(b"x"),
    SwarmId: SWARM,
    **{type(value): value for value in _WHOLE},
    Any: {"text": "é", "list": [1, -1, 0.5, None, True, b"\0"], "map": {"a": {}}},
}


def sample(kind: Any) -> Any:
    """One value of a type, with something in each list and map.

    Raises:
        TypeError: for a type that the codec does not read either.
    """
    if kind in _OF_KIND:
        return _OF_KIND[kind]
    arguments = typing.get_args(kind)
    match typing.get_origin(kind):
        case typing.Annotated:
            return sample(arguments[0])
        case typing.Union | types.UnionType:
            return sample(next(arm for arm in arguments if arm is not type(None)))
        case origin if origin in (tuple, list):
            return origin([sample(arguments[0])] * 2)
        case origin if origin is dict:
            return {"one": sample(arguments[1]), "two": sample(arguments[1])}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return typing.cast(Any, kind)(**{field.name: sample(hints[field.name]) for field in dataclasses.fields(kind)})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    raise TypeError(f"no sample of {kind!r}")
