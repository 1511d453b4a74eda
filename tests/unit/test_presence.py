"""Who is there: only what is newer counts, and only for a while."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.crdt import presence as module
from shoal.crdt.presence import KIND, Presence, PresenceTable
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, SignatureError, TooLargeError, UsageError
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_PRESENCE_BYTES
from shoal.protocol.signing import Signed, Signer

ANN, BOB, CAT = Signer(b"a" * 32), Signer(b"b" * 32), Signer(b"c" * 32)
SWARM, OTHER = SwarmId.of_manifest(b"one"), SwarmId.of_manifest(b"two")


def table(signer: Signer = ANN, started_at: int = 1000) -> PresenceTable:
    return PresenceTable(SWARM, signer.peer_id, started_at, ttl_s=3.0)


def seal(signer: Signer = BOB, **changes: Any) -> Signed:
    fields = {"swarm": SWARM, "author": signer.peer_id, "started_at": 1000, "seq": 1, "facts": {}} | changes
    return signer.seal(KIND, encode(fields))


def test_what_is_announced_is_heard_for_its_time() -> None:
    ann, bob = table(ANN), table(BOB)
    heard = ann.receive(bob.announce(BOB, {"phase": "collecting", "samples": 3}), now=10.0)
    assert heard is not None
    assert heard.facts == {"phase": "collecting", "samples": 3}
    assert list(ann.live(10.0)) == [BOB.peer_id]
    assert ann.next_expiry() == 13.0
    assert ann.expire(12.9) == []
    assert list(ann.live(13.0)) == []
    assert ann.expire(13.0) == [BOB.peer_id]
    assert ann.expire(13.0) == []
    assert ann.next_expiry() is None
    assert ann.newest() == []


def test_only_newer_records_are_news() -> None:
    ann, bob = table(ANN), table(BOB)
    first, second = bob.announce(BOB, {"n": 1}), bob.announce(BOB, {"n": 2})
    assert ann.receive(second, 0.0) is not None
    assert ann.receive(first, 1.0) is None
    assert ann.receive(second, 1.0) is None
    assert ann.live(1.0)[BOB.peer_id].facts == {"n": 2}
    assert ann.next_expiry() == 3.0


def test_a_replay_does_not_bring_back_who_expired() -> None:
    ann, record = table(ANN), seal()
    ann.receive(record, 0.0)
    ann.expire(5.0)
    assert ann.receive(record, 6.0) is None
    assert ann.live(6.0) == {}
    assert ann.receive(seal(seq=2), 6.0) is not None
    assert BOB.peer_id in ann.live(6.0)


def test_an_old_incarnation_never_wins() -> None:
    ann = table(ANN)
    assert ann.receive(seal(started_at=2000, seq=1), 0.0) is not None
    assert ann.receive(seal(started_at=1999, seq=500), 0.0) is None
    assert ann.receive(seal(started_at=2001, seq=1), 0.0) is not None


def test_a_dropped_peer_is_gone_until_heard_newer() -> None:
    ann = table(ANN)
    ann.receive(seal(), 0.0)
    assert ann.drop(BOB.peer_id)
    assert not ann.drop(BOB.peer_id)
    assert not ann.drop(CAT.peer_id)
    assert ann.live(0.0) == {}
    assert ann.expire(9.0) == []
    assert ann.receive(seal(), 1.0) is None
    ann.receive(seal(seq=2), 1.0)
    assert list(ann.live(1.0)) == [BOB.peer_id]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (seal(swarm=OTHER), ProtocolError),
        (seal(author=CAT.peer_id), ProtocolError),
        (Signed(CAT.peer_id, seal(CAT).payload, seal().signature), SignatureError),
        (BOB.seal("op/1", seal().payload), SignatureError),
        (seal(facts={"x": "x" * MAX_PRESENCE_BYTES}), LimitError),
        (seal(facts="text"), ProtocolError),
        (seal(seq=0), ProtocolError),
        (seal(seq=2**60), ProtocolError),
        (seal(started_at=-1), ProtocolError),
        (seal(started_at=2**60), ProtocolError),
        (BOB.seal(KIND, b"\xc1"), ProtocolError),
    ],
)
def test_forged_foreign_and_malformed_records_are_refused(record: Signed, error: type[Exception]) -> None:
    ann = table(ANN)
    with pytest.raises(error):
        ann.receive(record, 0.0)
    assert ann.live(0.0) == {}


def test_the_node_itself_is_there_once_it_announced() -> None:
    ann = table(ANN)
    assert ann.live(0.0) == {}
    record = ann.announce(ANN, {"n": 1})
    assert ann.live(1e9)[ANN.peer_id].facts == {"n": 1}
    assert ann.receive(record, 0.0) is None
    assert ann.expire(1e9) == []
    ann.receive(seal(), 0.0)
    assert ann.newest() == [record, seal()]


def test_a_clock_that_was_set_back_is_outdone() -> None:
    bob = table(BOB)
    before = table(ANN, started_at=9000).announce(ANN, {})
    bob.receive(before, 0.0)
    after = table(ANN, started_at=100)
    assert bob.receive(after.announce(ANN, {}), 1.0) is None
    assert after.receive(before, 1.0) is None
    heard = bob.receive(after.announce(ANN, {"n": 1}), 1.0)
    assert heard is not None
    assert (heard.started_at, heard.seq) == (9001, 1)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    ann = table(ANN)
    peers = [Signer(bytes([n]) * 32) for n in range(4)]
    ann.receive(seal(peers[0]), 0.0)
    ann.receive(seal(peers[1]), 1.0)
    with pytest.raises(LimitError):
        ann.receive(seal(peers[2]), 2.0)
    assert ann.receive(seal(peers[0], seq=2), 2.0) is not None  # who has a place keeps it
    assert ann.receive(seal(peers[2]), 4.5) is not None  # the place of one that expired
    assert set(ann.live(4.5)) == {peers[0].peer_id, peers[2].peer_id}


def test_only_the_own_key_announces_and_only_plain_data() -> None:
    ann = table(ANN)
    with pytest.raises(UsageError):
        ann.announce(BOB, {})
    with pytest.raises(UsageError):
        ann.announce(ANN, {"x": object()})
    with pytest.raises(UsageError):
        ann.announce(ANN, {"x": 2**64})
    with pytest.raises(TooLargeError):
        ann.announce(ANN, {"x": "x" * MAX_PRESENCE_BYTES})
    assert ann.own_presence is None
    ann.announce(ANN, {"x": 1})
    assert isinstance(ann.own_presence, Presence)
    assert ann.own_presence.seq == 1
