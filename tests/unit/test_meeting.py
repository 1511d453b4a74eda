"""Two members that meet tell each other what the other lacks or has older, and hardly anything beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shoal.crdt import presence
from shoal.crdt.meeting import (
    BUCKET_BYTES,
    MAX_BUCKETS,
    MAX_ROWS,
    ROW_BYTES,
    Differing,
    differing,
    lacking,
    summary,
)
from shoal.crdt.presence import Outdone, PresenceTable, TopicRule
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed, Signer

SWARM = SwarmId.of_manifest(b"one")
TOPICS = {
    "facts": TopicRule(max_bytes=4096, per_s=20, burst=20),
    "vote": TopicRule(max_bytes=1024, keep=3, per_s=20, burst=20),
}
ME, YOU = Signer(b"m" * 32), Signer(b"y" * 32)


def table(signer: Signer = ME, started_at: int = 1000) -> PresenceTable:
    """One that takes every signature for good: what is signed is tested elsewhere, and thousands take long."""
    return PresenceTable(SWARM, signer.peer_id, started_at, TOPICS, check=lambda *_: None)


def said(author: PeerId, seq: int = 1, topic: str = "facts", started_at: int = 1000, **facts: Any) -> Signed:
    fields = {"swarm": SWARM, "author": author, "topic": topic, "started_at": started_at, "seq": seq, "facts": facts}
    payload = encode(fields | {"every_s": 60.0})
    return Signed(author, payload, random.Random(payload).randbytes(64))


def peers(count: int, start: int = 0) -> list[PeerId]:
    return [PeerId.of_public_key(number.to_bytes(32, "big")) for number in range(start, start + count)]


def hear(listener: PresenceTable, *records: Signed) -> None:
    for record in records:
        listener.receive(record, 0.0)


def told(one: PresenceTable, other: PresenceTable) -> list[Signed]:
    """What the one gives the other."""
    ours = summary(one)
    return lacking(one, len(ours) // BUCKET_BYTES, differing(other, ours))


def held(one: PresenceTable) -> list[Signed]:
    return [opened.sealed for opened in one.held()]


def test_of_two_tables_of_a_thousand_that_differ_in_three_only_these_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_MEMBERS", 2048)
    mine, yours = table(ME), table(YOU)
    authors = peers(1000)
    both = [said(author) for author in authors[:997]]
    older, newer = said(authors[997]), said(authors[997], seq=2)
    only_mine, only_yours = said(authors[998]), said(authors[999])
    hear(mine, *both, older, only_mine)
    hear(yours, *both, newer, only_yours)
    assert told(mine, yours) == [only_mine]
    assert sorted(told(yours, mine), key=lambda each: each.author) == sorted(
        (newer, only_yours), key=lambda each: each.author
    )
    answer = differing(yours, summary(mine))
    assert len(summary(mine)) + len(answer.buckets) + len(answer.rows) < 4096
    hear(mine, *told(yours, mine))
    hear(yours, *told(mine, yours))
    assert told(mine, yours) == told(yours, mine) == []


def test_of_ten_thousand_records_that_are_nearly_the_same_a_few_kilobytes_tell_which_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "MAX_MEMBERS", 10_000)
    mine, yours = table(ME), table(YOU)
    authors = peers(2500)
    records = [said(author) for author in authors]
    records += [said(author, seq, "vote") for author in authors for seq in (2, 3, 4)]
    hear(mine, *records[3:])
    hear(yours, *records[:-3])
    assert set(told(mine, yours)) == set(records[-3:])
    assert set(told(yours, mine)) == set(records[:3])
    answer = differing(yours, summary(mine))
    assert len(summary(mine)) + len(answer.buckets) + len(answer.rows) < 20_000


def test_a_newcomer_is_told_of_everybody_there_and_asked_for_nothing_in_return() -> None:
    mine, newcomer = table(ME), table(YOU)
    hear(mine, *(said(author) for author in peers(50)))
    own = mine.announce(ME, "facts", {}, 1.0).sealed
    assert told(newcomer, mine) == []
    assert differing(mine, summary(newcomer)).rows == b""
    newcomers = newcomer.announce(YOU, "facts", {}, 1.0).sealed
    given = told(mine, newcomer)
    assert given[0] == own
    assert sorted(given, key=lambda each: each.author) == sorted(held(mine), key=lambda each: each.author)
    assert told(newcomer, mine) == [newcomers]


def test_who_is_gone_is_not_told_of_but_known_not_to_be_lacking() -> None:
    mine, yours = table(ME), table(YOU)
    author = peers(1)[0]
    hear(mine, said(author))
    hear(yours, said(author))
    assert mine.drop(author)
    assert told(mine, yours) == told(yours, mine) == []
    hear(yours, said(author, seq=2))
    assert told(mine, yours) == []
    assert told(yours, mine) == [said(author, seq=2)]


def test_of_a_topic_that_keeps_several_those_that_are_missing_cross_and_none_that_would_not_be_kept() -> None:
    mine, yours = table(ME), table(YOU)
    author = peers(1)[0]
    votes = [said(author, seq, "vote") for seq in range(1, 7)]
    hear(mine, votes[0], votes[1], votes[2])
    hear(yours, votes[2])
    assert told(mine, yours) == votes[:2]
    hear(yours, *votes[3:])
    assert told(mine, yours) == []
    assert told(yours, mine) == votes[3:]


def test_a_later_life_is_told_to_those_who_know_an_earlier_one_and_not_the_other_way_round() -> None:
    mine, yours = table(ME), table(YOU)
    author = peers(1)[0]
    hear(mine, said(author, seq=9))
    hear(yours, said(author, seq=1, started_at=2000))
    assert told(mine, yours) == []
    assert told(yours, mine) == [said(author, seq=1, started_at=2000)]


def test_a_node_whose_clock_was_set_back_is_told_of_its_earlier_life() -> None:
    before, now, yours = table(ME, started_at=9_000), table(ME, started_at=1_000), table(YOU)
    hear(yours, before.announce(ME, "facts", {}, 1.0).sealed)
    own = now.announce(ME, "facts", {}, 1.0).sealed
    assert told(now, yours) == [own]  # so that it is answered with the newer one
    assert [type(now.receive(record, 0.0)) for record in told(yours, now)] == [Outdone]


@pytest.mark.parametrize(
    "theirs", [b"", b"1234567", bytes(3 * BUCKET_BYTES), bytes(2 * MAX_BUCKETS * BUCKET_BYTES), bytes(9)]
)
def test_what_is_no_summary_is_refused(theirs: bytes) -> None:
    with pytest.raises(ProtocolError, match="summary"):
        differing(table(), theirs)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Differing(b"", b""), ProtocolError),
        (Differing(bytes(2), b""), ProtocolError),
        (Differing(b"\xff", b"x"), ProtocolError),
        (Differing(b"\xff", bytes(ROW_BYTES * (MAX_ROWS + 1))), LimitError),
    ],
)
def test_what_is_no_answer_is_refused(answer: Differing, error: type[Exception]) -> None:
    with pytest.raises(error):
        lacking(table(), 8, answer)


def test_a_liar_is_given_what_is_held_once_a_time_and_costs_no_more_than_it_says() -> None:
    mine = table(ME)
    hear(mine, *(said(author) for author in peers(100)))
    num_buckets = len(summary(mine)) // BUCKET_BYTES
    all_differ = b"\xff" * -(-num_buckets // 8)
    assert lacking(mine, num_buckets, Differing(all_differ, b"")) == held(mine)
    assert lacking(mine, num_buckets, Differing(bytes(len(all_differ)), b"")) == []
    far_ahead = b"".join(each.subject + b"\xff" * 16 for each in mine.held())
    assert lacking(mine, num_buckets, Differing(all_differ, far_ahead)) == []
    rng = random.Random(1)
    for num_rows in (1, 100, MAX_ROWS):
        lie = Differing(all_differ, rng.randbytes(num_rows * ROW_BYTES))
        assert lacking(mine, num_buckets, lie) == held(mine)
    for num_buckets in (1, 64, MAX_BUCKETS):
        answer = differing(mine, rng.randbytes(num_buckets * BUCKET_BYTES))
        assert len(answer.rows) == 100 * ROW_BYTES


def test_an_answer_lists_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.crdt.meeting.MAX_ROWS", 40)
    mine, yours = table(ME), table(YOU)
    hear(mine, *(said(author) for author in peers(100)))
    hear(yours, *(said(author) for author in peers(100, start=1000)))
    answer = differing(yours, summary(mine))
    assert 0 < len(answer.rows) <= 40 * ROW_BYTES
    assert set(told(mine, yours)) < set(held(mine))
