"""Who is there, and what each says by topic: only what is newer counts, only for a while, and only so often."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.crdt import presence as module
from shoal.crdt.presence import (
    ID_BYTES,
    KIND,
    MAX_EVERY_S,
    Excess,
    Fresh,
    Known,
    Outdone,
    PresenceTable,
    Stale,
    TopicRule,
    open_record,
    record_hash,
)
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError, SignatureError, UsageError
from shoal.protocol.ids import SwarmId
from shoal.protocol.limits import MAX_PRESENCE_BYTES
from shoal.protocol.signing import Signed, Signer

ANN, BOB, CAT = Signer(b"a" * 32), Signer(b"b" * 32), Signer(b"c" * 32)
SWARM, OTHER = SwarmId.of_manifest(b"one"), SwarmId.of_manifest(b"two")
TOPICS = {
    "facts": TopicRule(max_bytes=4096, per_s=20, burst=20),
    "vote": TopicRule(max_bytes=1024, keep=3, per_s=1, burst=4),
}


def table(signer: Signer = ANN, started_at: int = 1000, **changes: Any) -> PresenceTable:
    return PresenceTable(SWARM, signer.peer_id, started_at, TOPICS, **changes)


def seal(signer: Signer = BOB, **changes: Any) -> Signed:
    fields = {"swarm": SWARM, "author": signer.peer_id, "topic": "facts", "started_at": 1000, "seq": 1, "facts": {}}
    return signer.seal(KIND, encode(fields | {"every_s": 1.0} | changes))


def told(table: PresenceTable) -> list[Signed]:
    """What a newcomer hears of it."""
    return [opened.sealed for opened in table.held(with_gone=False)]


def test_what_is_announced_is_heard_for_three_times_its_interval() -> None:
    ann, bob = table(ANN), table(BOB)
    sealed = bob.announce(BOB, "facts", {"phase": "collecting", "samples": 3}, every_s=1.0).sealed
    heard = ann.receive(sealed, now=10.0)
    assert isinstance(heard, Fresh)
    assert heard.record_hash == record_hash(sealed)
    assert ann.live(10.0) == {BOB.peer_id: {"facts": {"phase": "collecting", "samples": 3}}}
    assert ann.next_expiry() == 13.0
    assert ann.expire(12.9) == []
    assert ann.live(13.0) == {}
    assert ann.expire(13.0) == [BOB.peer_id]
    assert ann.expire(13.0) == []
    assert ann.next_expiry() is None
    assert told(ann) == []


def test_nobody_is_believed_for_longer_than_the_cap() -> None:
    ann = table(ANN)
    ann.receive(seal(every_s=1e9), 0.0)
    assert ann.expire(3 * MAX_EVERY_S) == [BOB.peer_id]


def test_any_topic_keeps_an_author_alive() -> None:
    ann = table(ANN)
    ann.receive(seal(), 0.0)
    ann.receive(seal(seq=2, topic="vote", facts={"for": 1}), 2.0)
    assert ann.expire(4.0) == []
    assert ann.live(4.0) == {BOB.peer_id: {"facts": {}, "vote": {"for": 1}}}
    assert ann.expire(5.0) == [BOB.peer_id]


def test_only_newer_records_are_news() -> None:
    ann, bob = table(ANN), table(BOB)
    first, second = (bob.announce(BOB, "facts", {"n": n}, 1.0).sealed for n in (1, 2))
    assert isinstance(ann.receive(second, 0.0), Fresh)
    assert ann.receive(first, 1.0) == Stale(record_hash(first), (second,))
    assert ann.receive(second, 1.0) == Known(record_hash(second))
    assert ann.live(1.0)[BOB.peer_id]["facts"] == {"n": 2}
    assert ann.next_expiry() == 3.0


def test_statements_are_kept_up_to_a_number_whatever_their_order() -> None:
    ann = table(ANN)
    records = {seq: seal(seq=seq, topic="vote", facts={"n": seq}) for seq in range(1, 5)}
    assert isinstance(ann.receive(records[4], 0.0), Fresh)
    assert isinstance(ann.receive(records[2], 0.0), Fresh)
    assert isinstance(ann.receive(records[3], 0.0), Fresh)
    assert isinstance(ann.receive(records[1], 0.0), Stale)
    assert [facts["n"] for facts, _ in ann.statements(BOB.peer_id, "vote")] == [2, 3, 4]
    assert ann.live(0.0)[BOB.peer_id]["vote"] == {"n": 4}
    assert told(ann) == [records[2], records[3], records[4]]
    assert ann.find(record_hash(records[3])[:ID_BYTES]) == records[3]
    assert ann.find(record_hash(records[1])[:ID_BYTES]) is None


def test_a_replay_does_not_bring_back_who_expired() -> None:
    ann, record = table(ANN), seal(seq=2)
    ann.receive(record, 0.0)
    ann.expire(5.0)
    assert isinstance(ann.receive(record, 6.0), Known)
    assert isinstance(ann.receive(seal(seq=1, topic="vote"), 6.0), Stale)
    assert ann.live(6.0) == {}
    assert isinstance(ann.receive(seal(seq=3), 6.0), Fresh)
    assert BOB.peer_id in ann.live(6.0)


def test_an_old_incarnation_never_wins_and_a_new_one_begins_with_nothing() -> None:
    ann = table(ANN)
    assert isinstance(ann.receive(seal(started_at=2000, seq=1, topic="vote"), 0.0), Fresh)
    assert isinstance(ann.receive(seal(started_at=1999, seq=500), 0.0), Stale)
    assert isinstance(ann.receive(seal(started_at=2001, seq=1), 0.0), Fresh)
    assert ann.live(0.0) == {BOB.peer_id: {"facts": {}}}
    assert ann.statements(BOB.peer_id, "vote") == []


def test_a_dropped_peer_is_gone_until_heard_newer() -> None:
    ann = table(ANN)
    ann.receive(seal(), 0.0)
    assert ann.drop(BOB.peer_id)
    assert not ann.drop(BOB.peer_id)
    assert not ann.drop(CAT.peer_id)
    assert ann.live(0.0) == {}
    assert ann.knows(BOB.peer_id)
    assert not ann.knows(CAT.peer_id)
    assert ann.expire(9.0) == []
    assert isinstance(ann.receive(seal(), 1.0), Known)
    ann.receive(seal(seq=2), 1.0)
    assert list(ann.live(1.0)) == [BOB.peer_id]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (seal(swarm=OTHER), ProtocolError),
        (seal(author=CAT.peer_id), ProtocolError),
        (Signed(CAT.peer_id, seal(CAT).payload, seal().signature), SignatureError),
        (BOB.seal("op/1", seal().payload), SignatureError),
        (seal(topic="weather"), ProtocolError),
        (seal(facts={"x": "x" * 4096}), LimitError),
        (seal(facts={"x": "x" * MAX_PRESENCE_BYTES}), LimitError),
        (seal(facts="text"), ProtocolError),
        (seal(seq=0), ProtocolError),
        (seal(seq=2**60), ProtocolError),
        (seal(started_at=-1), ProtocolError),
        (seal(started_at=2**60), ProtocolError),
        (seal(every_s=0), ProtocolError),
        (seal(every_s=-1), ProtocolError),
        (BOB.seal(KIND, b"\xc1"), ProtocolError),
    ],
)
def test_forged_foreign_and_malformed_records_are_refused(record: Signed, error: type[Exception]) -> None:
    ann = table(ANN)
    with pytest.raises(error):
        ann.receive(record, 0.0)
    assert ann.live(0.0) == {}
    assert isinstance(ann.receive(seal(), 0.0), Fresh)


def test_what_comes_faster_than_its_topic_allows_is_no_news() -> None:
    ann = table(ANN)
    heard = [ann.receive(seal(seq=seq, topic="vote"), 0.0) for seq in range(1, 101)]
    assert [type(each) for each in heard] == [Fresh] * 4 + [Excess] * 96
    assert ann.num_excess == 96
    assert [len(ann.statements(BOB.peer_id, topic)) for topic in ("vote", "facts")] == [3, 0]
    assert isinstance(ann.receive(seal(seq=101), 0.0), Fresh)  # another topic has its own bucket
    assert isinstance(ann.receive(seal(seq=102, topic="vote"), 1.0), Fresh)
    assert isinstance(ann.receive(seal(seq=103, topic="vote"), 1.0), Excess)
    assert isinstance(ann.receive(seal(CAT, topic="vote"), 1.0), Fresh)


def test_nobody_uses_up_what_another_may_say() -> None:
    ann = table(ANN)
    ann.receive(seal(), 0.0)
    for seq in range(2, 40):
        with pytest.raises(SignatureError):
            ann.receive(Signed(BOB.peer_id, seal(seq=seq).payload, bytes(64)), 0.0)
    assert isinstance(ann.receive(seal(seq=2), 0.0), Fresh)


def test_a_record_is_read_and_checked_once() -> None:
    read: list[Signed] = []
    checked: list[Signed] = []

    def reads(sealed: Signed) -> module.Opened:
        read.append(sealed)
        return open_record(sealed)

    ann = table(ANN, read=reads, check=lambda sealed, _: checked.append(sealed))
    sealed, copy, older = seal(seq=2), seal(seq=2), seal(seq=1)
    assert [type(ann.receive(each, 0.0)) for each in (sealed, copy, sealed)] == [Fresh, Known, Known]
    assert read == checked == [sealed]
    ann.receive(older, 0.0)
    assert checked == [sealed]


def test_what_is_live_is_not_computed_anew_for_each_record() -> None:
    ann = table(ANN)
    ann.receive(seal(facts={"n": 1}), 0.0)
    ann.receive(seal(CAT, facts={"n": 2}), 0.0)
    before = ann.live(0.0)
    of_cat = before[CAT.peer_id]
    ann.receive(seal(seq=2, facts={"n": 3}), 1.0)
    assert before[BOB.peer_id] == {"facts": {"n": 3}}
    assert ann.live(1.0)[CAT.peer_id] is of_cat


def test_the_node_itself_is_not_echoed_but_told_to_others() -> None:
    ann = table(ANN)
    record = ann.announce(ANN, "facts", {"n": 1}, 1.0).sealed
    assert ann.live(0.0) == {}
    assert ann.own_facts == {"facts": {"n": 1}}
    assert isinstance(ann.receive(record, 0.0), Known)
    ann.receive(seal(), 0.0)
    assert told(ann) == [record, seal()]
    later = ann.announce(ANN, "facts", {"n": 2}, 1.0).sealed
    assert told(ann) == [later, seal()]


def test_a_clock_that_was_set_back_is_outdone() -> None:
    bob = table(BOB)
    before = table(ANN, started_at=9000).announce(ANN, "facts", {}, 1.0).sealed
    bob.receive(before, 0.0)
    after = table(ANN, started_at=100)
    told = bob.receive(after.announce(ANN, "facts", {"n": 1}, 1.0).sealed, 1.0)
    assert isinstance(told, Stale)
    assert told.newest == (before,)
    assert isinstance(after.receive(before, 1.0), Outdone)
    assert isinstance(after.receive(before, 1.0), Known)
    after.announce(ANN, "vote", {"for": 1}, 1.0)
    (again,) = after.reannounce(ANN, 1.0)
    heard = bob.receive(again.sealed, 1.0)
    assert isinstance(heard, Fresh)
    assert (heard.presence.started_at, heard.presence.facts) == (9001, {"n": 1})
    assert after.num_outdone == 1


def test_who_spoke_on_another_topic_in_an_earlier_life_is_told_too() -> None:
    bob = table(BOB)
    before = table(ANN, started_at=9000).announce(ANN, "vote", {}, 1.0).sealed
    bob.receive(before, 0.0)
    told = bob.receive(table(ANN, started_at=100).announce(ANN, "facts", {}, 1.0).sealed, 1.0)
    assert isinstance(told, Stale)
    assert told.newest == (before,)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    ann = table(ANN)
    peers = [Signer(bytes([n]) * 32) for n in range(4)]
    ann.receive(seal(peers[0]), 0.0)
    ann.receive(seal(peers[1]), 1.0)
    with pytest.raises(LimitError):
        ann.receive(seal(peers[2]), 2.0)
    assert isinstance(ann.receive(seal(peers[0], seq=2), 2.0), Fresh)  # who has a place keeps it
    assert isinstance(ann.receive(seal(peers[2]), 4.5), Fresh)  # the place of one that expired
    assert set(ann.live(4.5)) == {peers[0].peer_id, peers[2].peer_id}
    assert ann.find(record_hash(seal(peers[1]))[:ID_BYTES]) is None


def test_in_a_full_table_whoever_is_worth_more_takes_the_place_of_one_who_is_worth_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    topics = TOPICS | {"vote": TopicRule(max_bytes=1024, per_s=1, burst=4, worth=lambda _: 1)}
    ann = PresenceTable(SWARM, ANN.peer_id, 1000, topics)
    peers = [Signer(bytes([n]) * 32) for n in range(5)]
    ann.receive(seal(peers[0]), 0.0)
    ann.receive(seal(peers[1], topic="vote"), 1.0)
    assert isinstance(ann.receive(seal(peers[2], topic="vote"), 2.0), Fresh)
    assert set(ann.live(2.0)) == {peers[1].peer_id, peers[2].peer_id}
    assert ann.expire(2.0) == [peers[0].peer_id]  # who had to go is told of as gone, once
    assert ann.expire(2.0) == []
    for topic in ("facts", "vote"):
        with pytest.raises(LimitError):
            ann.receive(seal(peers[3], topic=topic), 2.0)


def test_whose_place_another_took_after_it_expired_is_told_of_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    ann = table(ANN)
    peers = [Signer(bytes([n]) * 32) for n in range(4)]
    ann.receive(seal(peers[0]), 0.0)
    ann.receive(seal(peers[1]), 1.0)
    ann.receive(seal(peers[2]), 3.5)
    assert ann.expire(3.5) == [peers[0].peer_id]


def test_what_was_seen_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SEEN", 3)
    ann = table(ANN)
    for seq in range(1, 10):
        ann.receive(seal(seq=seq), 0.0)
    assert isinstance(ann.receive(seal(seq=9), 0.0), Known)
    assert isinstance(ann.receive(seal(seq=2), 0.0), Stale)


def test_only_the_newest_of_a_topic_is_worth_sending_unless_several_are_kept() -> None:
    ann = table(ANN)
    records = [open_record(seal(seq=seq, topic=topic)).presence for seq in (1, 2) for topic in ("facts", "vote")]
    assert len({ann.key_of(each) for each in records}) == 3


def test_only_the_own_key_announces_and_only_plain_data_on_known_topics() -> None:
    ann = table(ANN)
    with pytest.raises(UsageError):
        ann.announce(BOB, "facts", {}, 1.0)
    with pytest.raises(UsageError):
        ann.announce(ANN, "weather", {}, 1.0)
    for value in (object(), 2**64, "x" * 4096, "x" * MAX_PRESENCE_BYTES):
        with pytest.raises(UsageError):
            ann.announce(ANN, "facts", {"x": value}, 1.0)
    assert ann.own_facts == {}
    assert open_record(ann.announce(ANN, "facts", {"x": 1}, 1.0).sealed).presence.seq == 1
