"""What is pushed to a member in one call has room in it, and what waits for one has bounds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest

from shoal.crdt.gossip_messages import MAX_HAVE, Control
from shoal.crdt.presence import record_hash
from shoal.node.swarm import waiting as module
from shoal.node.swarm.members import DIAL_AGAIN_MAX_S, MAX_ADDRESSES, SMALL, Members
from shoal.node.swarm.waiting import PUSH_BYTES, Waiting, in_parts
from shoal.node.wire.contracts import GossipPush
from shoal.protocol.codec import decode, encode
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_HEADER_BYTES
from shoal.protocol.signing import Signer

SIGNER = Signer(bytes(32))
SWARM = SwarmId.of_manifest(b"a run")
PEERS = [Signer(bytes([n]) * 32).peer_id for n in range(1, 60)]


def test_what_gathered_while_a_member_was_away_goes_in_several_calls() -> None:
    records = [SIGNER.seal("presence/2", bytes([number % 256]) * (number * 37 % 900)) for number in range(1024)]
    ops = [SIGNER.seal("op/1", bytes([number % 256]) * (number * 41 % 900)) for number in range(500)]
    controls = [Control(have=(bytes(16),) * MAX_HAVE)] * 40
    parts = list(in_parts(SWARM, records, ops, controls))
    assert [record for part in parts for record in part.records] == records
    assert [op for part in parts for op in part.ops] == ops
    assert [control for part in parts for control in part.control] == controls
    assert len(parts) > 1
    assert all(len(encode(part)) < MAX_HEADER_BYTES for part in parts)
    assert decode(GossipPush, encode(parts[-1])) == parts[-1]


def test_a_record_that_is_large_goes_alone_and_nothing_is_nothing() -> None:
    large = SIGNER.seal("op/1", bytes(PUSH_BYTES))
    small = SIGNER.seal("op/1", b"")
    assert [part.ops for part in in_parts(SWARM, [], [small, large, small])] == [(small,), (large,), (small,)]
    assert list(in_parts(SWARM, [], [])) == []


@pytest.mark.trio
async def test_what_waits_is_taken_at_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("MAX_RECORDS", "MAX_OPS", "MAX_CONTROLS"):
        monkeypatch.setattr(module, bound, 2)
    waiting = Waiting()
    ops = [SIGNER.seal("op/1", bytes([n])) for n in range(3)]
    waiting.add(records=[b"a", b"b", b"a", b"c"], ops=[(record_hash(op), op) for op in ops])
    waiting.add(controls=[Control(prune=(bytes(16),)), Control(), Control(graft=(bytes(16),))])
    assert await waiting.take() == ([b"b", b"c"], ops[1:], [Control(), Control(graft=(bytes(16),))])
    assert waiting.num_dropped == 3
    waiting.close()
    assert await waiting.take() == ([], [], [])


class Host:
    """Enough of a host to ask whom to dial."""

    def __init__(self) -> None:
        self.wanted: dict[PeerId, set[str]] = {}

    def unwant(self, peer: PeerId, why: str) -> None:
        self.wanted.pop(peer, None)


def members() -> Members:
    return Members(SWARM, SIGNER.peer_id, Host())  # type: ignore[arg-type]


def live(peers: Iterable[PeerId]) -> dict[PeerId, Any]:
    return dict.fromkeys(peers)


def test_everybody_in_a_small_swarm_is_dialed_and_in_a_large_one_nobody_unless_alone() -> None:
    table = members()
    assert table.due(live(PEERS[:SMALL]), {PEERS[0]}, {}, 0.0) == PEERS[1:SMALL]
    assert table.due(live(PEERS[:SMALL]), {PEERS[0]}, {}, 0.0) == []
    table = members()
    table.lost(PEERS[1], 0.0)
    assert table.due(live(PEERS), {PEERS[0]}, {}, 0.0) == []
    assert table.due(live(PEERS), set(), {}, 0.0) == [PEERS[1]]


def test_a_lost_member_is_dialed_for_ever_but_less_and_less_often_until_it_left() -> None:
    table = members()
    table.lost(PEERS[0], 0.0)
    tried = []
    for now in range(3600):
        if table.due({}, set(), {}, now):
            tried.append(now)
            table.tried(PEERS[0], now)
    assert [later - earlier for earlier, later in pairwise(tried)][:6] == [1, 2, 4, 8, 16, 32]
    assert tried[-1] - tried[-2] == DIAL_AGAIN_MAX_S
    left = {PEERS[0]: {"member": {"role": "learner", "left": True}}}
    assert table.due({}, set(), left, 10_000) == []
    assert table.due({}, set(), {}, 20_000) == []


def test_only_its_own_addresses_are_dialed_and_not_too_many() -> None:
    table = members()
    own = [f"/ip4/10.0.0.{n}/tcp/1/p2p/{PEERS[0]}" for n in range(MAX_ADDRESSES + 5)]
    wrong = [f"/ip4/10.0.0.1/tcp/1/p2p/{PEERS[1]}", "/ip4/10.0.0.1/tcp/1", "x" * 5000 + f"/p2p/{PEERS[0]}", 7, None]
    table.told(PEERS[0], {"addresses": [*wrong, *own]})
    assert table.addresses(PEERS[0]) == tuple(own[:MAX_ADDRESSES])
    for nonsense in (None, "text", 7, {"a": 1}):
        table.told(PEERS[1], {"addresses": nonsense})
        assert table.addresses(PEERS[1]) == ()
