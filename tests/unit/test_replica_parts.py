"""What is pushed to a member in one call has room in it, and what waits for one has bounds."""

from __future__ import annotations

import pytest

from shoal.crdt.gossip_messages import MAX_HAVE, Control
from shoal.crdt.presence import record_hash
from shoal.node.swarm import waiting as module
from shoal.node.swarm.waiting import PUSH_BYTES, Waiting, in_parts
from shoal.node.wire.contracts import GossipPush
from shoal.protocol.codec import decode, encode
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_HEADER_BYTES
from shoal.protocol.signing import Signer

SIGNER = Signer(bytes(32))
SWARM = SwarmId.of_manifest(b"a run")


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
