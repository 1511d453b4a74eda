"""What is pushed to a member in one call has room in it."""

from shoal.node.swarm.replica import SYNC_BYTES, in_parts
from shoal.node.wire.contracts import OpsPush
from shoal.protocol.codec import encode
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_HEADER_BYTES
from shoal.protocol.signing import Signer

SIGNER = Signer(bytes(32))
SWARM = SwarmId.of_manifest(b"a run")


def test_what_gathered_while_a_member_was_away_goes_in_several_calls():
    records = [SIGNER.seal("op/1", bytes([number % 256]) * (number * 37 % 900)) for number in range(1024)]
    parts = list(in_parts(records))
    assert [record for part in parts for record in part] == records
    assert len(parts) > 1
    assert all(len(encode(OpsPush(SWARM, part))) < MAX_HEADER_BYTES for part in parts)


def test_a_record_that_is_large_goes_alone_and_nothing_is_nothing():
    large = SIGNER.seal("op/1", bytes(SYNC_BYTES))
    small = SIGNER.seal("op/1", b"")
    assert list(in_parts([small, large, small])) == [(small,), (large,), (small,)]
    assert list(in_parts([])) == []
