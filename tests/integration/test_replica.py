"""Replicas on real hosts: what one says, the others hear, whatever else is in the same message; forks; who is kept."""

from __future__ import annotations

import sqlite3

import pytest
import trio
import trio.testing

from shoal.crdt import oplog
from shoal.crdt.document import Document
from shoal.crdt.meeting import BUCKET_BYTES, Differing, differing
from shoal.crdt.oplog import KIND, NO_OP, Op
from shoal.crdt.presence import KIND as PRESENCE
from shoal.crdt.presence import PresenceTable, open_record, record_hash
from shoal.crdt.sync import Head, SwarmDocs, Version
from shoal.node import supervise
from shoal.node.store.errors import StorageError
from shoal.node.swarm import own_log
from shoal.node.swarm.journal import SLICE_OPS
from shoal.node.swarm.telling import MAX_UNANSWERED
from shoal.node.wire.contracts import (
    GossipPush,
    PresenceSummary,
    SwarmService,
    SyncRequest,
    plain_version,
    typed_version,
)
from shoal.protocol.codec import encode
from shoal.protocol.errors import Fault, LimitError, RemoteError, Status
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.protocol.services import Empty, client
from shoal.protocol.signing import Signed

from .replicas import GENEROUS_S, SWARM, TOPICS, Listener, a_host, a_node, signer_of, together

pytestmark = pytest.mark.trio


async def test_three_hear_each_other_though_two_of_them_were_never_introduced() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2), a_node(3)) as (one, two, three):
            await one.host.connect(two.host.addresses())
            await three.host.connect(two.host.addresses())
            await one.knows(two, three)
            await two.knows(one, three)
            await three.knows(one, two)
            name = one.replica.publish("vote", {"for": 7})
            for node in (two, three):
                await node.until(lambda node=node: (one.me, "vote", {"for": 7}, name) in node.heard)  # type: ignore[misc]
                assert node.replica.live[one.me]["vote"] == {"for": 7}
                assert node.replica.statements(one.me, "vote") == [({"for": 7}, name)]
            assert await one.replica.write(policy={"epoch": 1})
            for node in (two, three):
                await node.until(lambda node=node: node.replica.documents().get(one.me) == {"policy": {"epoch": 1}})  # type: ignore[misc]
                assert node.storage.load_ops(SWARM)
            assert not [news for news in one.heard if news[0] == one.me]
            assert set(one.replica.live[two.me]["addresses"]["addresses"]) == set(two.host.addresses())
            for node in (one, two, three):  # each member's news has a tree of its own
                assert node.replica.gossip_statistics().sources == 3


async def test_who_says_nothing_new_is_repeated_until_it_is_gone() -> None:
    with trio.fail_after(GENEROUS_S):
        async with a_node(1) as one:
            async with a_node(2) as two:
                two.replica.publish("facts", {"n": 1})
                await one.host.connect(two.host.addresses())
                await one.knows(two)
                await one.until(lambda: len([news for news in one.heard if news[1] == "facts"]) >= 3)
            await one.until(lambda: one.gone == [two.me])
            assert one.replica.live == {}
            assert one.replica.neighbours == frozenset()


class Holder(Listener):
    """Keeps what it is told, and says so when it is asked."""

    def __init__(self) -> None:
        self.table = PresenceTable(SWARM, signer_of(3).peer_id, 1, TOPICS)
        self.votes: list[int] = []

    async def compare(self, request: PresenceSummary) -> Differing:
        return differing(self.table, request.buckets)

    async def gossip(self, request: GossipPush) -> Empty:
        for sealed in request.records:
            self.table.receive(sealed, trio.current_time())
            presence = open_record(sealed).presence
            if presence.topic == "vote":
                self.votes.append(presence.facts["for"])
        return Empty()

    async def heard(self, count: int) -> None:
        while len(self.votes) < count:  # noqa: ASYNC110  nothing else tells of it
            await trio.sleep(0.02)


async def test_who_is_met_again_is_sent_only_what_it_lacks() -> None:
    holder = Holder()
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_host(3, holder)) as (one, host):
            for number in range(3):
                one.replica.publish("vote", {"for": number})
            await host.connect(one.host.addresses())
            await holder.heard(3)
            # Answers come in order: those to the votes are here when this one is, and so none is told again.
            await client(SwarmService, one.host.at(host.peer_id)).compare(PresenceSummary(SWARM, bytes(BUCKET_BYTES)))
            await host.disconnect(one.me)
            await one.until(lambda: host.peer_id not in one.host.connected)
            one.replica.publish("vote", {"for": 3})
            await host.connect(one.host.addresses())
            await holder.heard(4)
            assert holder.votes == [0, 1, 2, 3]


async def test_news_does_not_wait_for_the_answer_to_earlier_news_nor_are_many_unanswered() -> None:
    class Mute(Holder):
        num_open = most_open = 0

        async def gossip(self, request: GossipPush) -> Empty:
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
            try:
                await super().gossip(request)
                await trio.sleep_forever()
            finally:
                self.num_open -= 1

    mute = Mute()
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_host(3, mute)) as (one, host):
            await host.connect(one.host.addresses())
            for number in range(MAX_UNANSWERED // 2):
                one.replica.publish("vote", {"for": number})
                await mute.heard(number + 1)
            assert mute.votes == list(range(MAX_UNANSWERED // 2))
            while mute.num_open < MAX_UNANSWERED:
                one.replica.publish("vote", {"for": 99})
                await trio.sleep(0.1)
            one.replica.publish("vote", {"for": 99})
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert mute.most_open == MAX_UNANSWERED


async def test_whose_answer_to_a_summary_is_none_is_told_what_comes_later() -> None:
    class Nonsense(Holder):
        async def compare(self, request: PresenceSummary) -> Differing:
            return Differing(b"", b"x")

    nonsense = Nonsense()
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_host(3, nonsense)) as (one, host):
            one.replica.publish("vote", {"for": 0})
            await host.connect(one.host.addresses())
            await one.until(lambda: one.replica.counters.refused_answers == 1)
            one.replica.publish("vote", {"for": 1})
            await nonsense.heard(1)
            assert nonsense.votes == [1]


async def test_a_bad_record_is_refused_alone() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2), a_host(3, Listener())) as (one, two, liar):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            await liar.connect(two.host.addresses())
            key, other = signer_of(3), signer_of(4)
            table = PresenceTable(SWARM, key.peer_id, 1, TOPICS)
            elsewhere = PresenceTable(SwarmId.of_manifest(b"other"), other.peer_id, 1, TOPICS)
            good = [table.announce(key, "vote", {"n": n}, 1.0).sealed for n in range(2)]
            bad = [
                Signed(other.peer_id, good[0].payload, good[0].signature[:-1] + b"x"),
                key.seal(PRESENCE, b"\xc1"),
                elsewhere.announce(other, "vote", {}, 1.0).sealed,
                Signed(key.peer_id, good[0].payload, bytes(64)),
            ]
            op = SwarmDocs(SWARM, key.peer_id).write(key, policy=3)
            ops = (Signed(key.peer_id, b"", b""), op, Signed(other.peer_id, op.payload, op.signature))
            calls = client(SwarmService, liar.at(two.me), timeout_s=5)
            await calls.gossip(GossipPush(SWARM, (bad[0], good[0], *bad[1:], good[1]), ops))
            for node in (two, one):
                await node.until(lambda node=node: len(node.replica.statements(key.peer_id, "vote")) == 2)  # type: ignore[misc]
                await node.until(lambda node=node: node.replica.documents().get(key.peer_id) == {"policy": 3})  # type: ignore[misc]
            assert two.replica.counters.refused_records == 3
            assert two.replica.counters.stale == 1
            assert two.replica.counters.refused_ops == 2
            assert one.replica.counters.refused_records == 0


async def test_a_stranger_is_answered_but_not_kept_until_it_has_signed_something() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_host(3, Listener())) as (one, stranger):
            await stranger.connect(one.host.addresses())
            calls = client(SwarmService, stranger.at(one.me), timeout_s=5)
            await calls.sync(SyncRequest(SWARM, encode({})))
            await calls.gossip(GossipPush(SWARM))
            assert one.replica.neighbours == frozenset()
            assert stranger.peer_id not in one.host.wanted
            key = signer_of(3)
            record = PresenceTable(SWARM, key.peer_id, 1, TOPICS).announce(key, "facts", {}, 1.0).sealed
            await calls.gossip(GossipPush(SWARM, (record,)))
            assert one.replica.neighbours == {stranger.peer_id}
            assert stranger.peer_id in one.host.wanted


async def test_nothing_that_a_peer_sends_is_told_as_a_fault_of_the_node() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_host(3, Listener())) as (one, liar):
            await liar.connect(one.host.addresses())
            calls = client(SwarmService, liar.at(one.me), timeout_s=5)
            with pytest.raises(RemoteError) as told:
                await calls.sync(SyncRequest(SWARM, encode({"nobody": Head()})))
            assert told.value.status is Status.INVALID_ARGUMENT
            huge = Head(2**53, bytes(32), 2**53)
            await calls.sync(SyncRequest(SWARM, encode({str(one.me): huge, str(liar.peer_id): huge})))
            one.replica.on_heard = lambda *_: 1 // 0
            key = signer_of(3)
            record = PresenceTable(SWARM, key.peer_id, 1, TOPICS).announce(key, "facts", {}, 1.0).sealed
            await calls.gossip(GossipPush(SWARM, (record,)))
            assert liar.peer_id in one.replica.live
            assert one.domain.failures == {("telling news", Fault.OWN): 1}


async def test_a_node_whose_clock_was_set_back_is_heard_at_once() -> None:
    with trio.fail_after(GENEROUS_S):
        async with a_node(1) as one:
            async with a_node(2, started_at=9_000_000) as before:
                await before.host.connect(one.host.addresses())
                await one.knows(before)
            async with a_node(2, started_at=1_000) as after:
                after.replica.publish("facts", {"life": 2})
                await after.host.connect(one.host.addresses())
                await one.until(lambda: one.replica.live.get(after.me, {}).get("facts") == {"life": 2})


async def test_a_copied_profile_ends_the_same_everywhere_and_others_go_on() -> None:
    key = signer_of(1)
    original = SwarmDocs(SWARM, key.peer_id)
    common = [original.write(key, policy=n) for n in range(3)]
    copy = SwarmDocs(SWARM, key.peer_id, common)
    theirs = [*common, *(original.write(key, policy=f"original {n}") for n in range(60))]
    ours = [*common, *(copy.write(key, policy=f"copy {n}") for n in range(3))]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1, stored=ours), a_node(2, stored=theirs), a_node(3, stored=common)) as (
            one,
            two,
            three,
        ):
            await one.host.connect(two.host.addresses())
            await three.host.connect(two.host.addresses())
            for node in (one, two, three):
                await node.until(lambda node=node: key.peer_id in node.replica.frozen)  # type: ignore[misc]
            await one.until(lambda: one.replica.documents() == two.replica.documents() == three.replica.documents())
            assert one.replica.is_frozen
            assert not await one.replica.write(policy=9)
            assert not two.replica.is_frozen
            assert await two.replica.write(policy="goes on")
            for node in (one, two, three):
                await node.until(lambda node=node: node.replica.documents().get(two.me) == {"policy": "goes on"})  # type: ignore[misc]
            for node in (one, two, three):
                again = SwarmDocs(SWARM, node.me, node.storage.load_ops(SWARM), node.storage.load_forks(SWARM))
                assert again.documents() == node.replica.documents()


async def test_one_who_keeps_two_logs_stops_nobody_from_catching_up() -> None:
    """Twelve large ops with early Lamport times come first in every answer, and are refused by who holds another."""
    liar = signer_of(9)

    def log_of(tag: str, count: int) -> list[Signed]:
        docs = SwarmDocs(SWARM, liar.peer_id)
        return [docs.write(liar, policy=tag + "x" * 25_000) for _ in range(count)]

    op = Op(swarm=SWARM, author=liar.peer_id, seq=1, prev=NO_OP, lamport=1, update=Document().set({"policy": 1}))
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1, stored=log_of("a", 12)), a_node(2, stored=[liar.seal(KIND, encode(op))])) as (
            one,
            two,
        ):
            for n in range(40):
                await one.replica.write(policy=n)
            await two.host.connect(one.host.addresses())
            await two.until(lambda: two.replica.version().get(one.me) == 40)
            await two.until(lambda: one.replica.documents() == two.replica.documents())


async def test_a_lost_member_is_met_again() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            await two.knows(one)
            for node in (one, two):
                await node.until(lambda: bool(one.replica.addresses(two.me) and two.replica.addresses(one.me)))
            await one.host.disconnect(two.me)
            await one.until(lambda: two.me in one.gone)
            await one.knows(two)
            await two.knows(one)


async def test_a_member_that_left_is_not_called_any_more() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            two.calls.replica = None
            one.replica.publish("vote", {})
            await one.until(lambda: two.me not in one.replica.neighbours)
            assert two.me not in one.host.wanted


async def test_a_disk_that_fails_costs_nothing_that_was_told_and_is_got_over() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            assert await one.replica.write(policy=1)
            one.storage._db.execute("PRAGMA query_only = ON")
            with pytest.raises(Exception, match="cannot be written"):
                await one.replica.write(policy=2)
            await two.replica.write(policy="from two")
            await one.until(lambda: one.replica.counters.not_stored > 0)
            assert one.replica.documents() == {one.me: {"policy": 1}}
            one.storage._db.execute("PRAGMA query_only = OFF")
            assert await one.replica.write(policy=3)
            await one.until(lambda: one.replica.documents().get(two.me) == {"policy": "from two"})
            await two.until(lambda: two.replica.documents().get(one.me) == {"policy": 3})
            assert two.replica.frozen == {}


async def test_a_task_that_fails_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_WAIT_S", 0.01)
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            addresses = one.host.addresses
            failing = [True]

            def fails() -> tuple[str, ...]:
                if failing.pop() if failing else False:
                    raise sqlite3.OperationalError("anything")
                return addresses()

            one.host.addresses = fails  # type: ignore[method-assign]
            # Whichever of those that ask for the addresses was the first to.
            await one.until(lambda: list(one.domain.failures.values()) == [1])
            assert all(fault is Fault.OWN for _, fault in one.domain.failures)
            await one.host.connect(two.host.addresses())
            name = one.replica.publish("vote", {})
            await two.until(lambda: any(news[3] == name for news in two.heard))


async def test_a_record_that_was_overtaken_while_it_waited_is_not_sent() -> None:
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            await two.knows(one)
            for n in range(90):
                last = one.replica.publish("facts", {"n": n})
            await two.until(lambda: any(news[3] == last for news in two.heard))
            assert len([news for news in two.heard if news[1] == "facts"]) < 10
            assert last == record_hash(one.replica._presence.find(last[:16]))  # type: ignore[arg-type]


async def test_a_profile_restored_from_a_backup_goes_on_from_what_the_others_hold_of_its_log() -> None:
    key = signer_of(1)
    docs = SwarmDocs(SWARM, key.peer_id)
    ops = [docs.write(key, policy=n, evaluations={str(n): n}) for n in range(9)]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1, stored=ops[:4]), a_node(2, stored=ops)) as (one, two):
            assert await one.replica.write(policy="after the backup")
            assert one.replica.documents()[key.peer_id]["policy"] == "after the backup"  # here, and nowhere else yet
            assert one.replica.version() == {key.peer_id: 4}
            await one.host.connect(two.host.addresses())
            await two.until(lambda: two.replica.version() == {key.peer_id: 10})
            await one.until(lambda: one.replica.documents() == two.replica.documents())
            assert two.replica.documents()[key.peer_id]["policy"] == "after the backup"
            assert two.replica.documents()[key.peer_id]["evaluations"].keys() == {str(n) for n in range(9)}
            assert one.replica.frozen == two.replica.frozen == {}
            assert one.replica.problem is None


async def test_a_profile_whose_disk_is_gone_goes_on_from_what_the_others_hold_of_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oplog, "COMPACT_OPS", 10)
    key = signer_of(1)
    docs = SwarmDocs(SWARM, key.peer_id)
    stored = [docs.write(key, policy=n) for n in range(35)][30:]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1, is_new=False), a_node(2, stored=stored)) as (one, two):
            assert await one.replica.write(policy="again")
            await one.host.connect(two.host.addresses())
            await two.until(lambda: two.replica.version() == {key.peer_id: 36})
            assert two.replica.frozen == {}


async def test_a_node_that_nobody_can_be_asked_about_writes_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_log, "HEAD_ALONE_S", 0.05)
    key = signer_of(1)
    stored = [SwarmDocs(SWARM, key.peer_id).write(key, policy=1)]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1, stored=stored)) as (one,):
            assert await one.replica.write(policy=2)
            assert await one.replica.write(policy=3)
            await one.until(
                lambda: SwarmDocs(SWARM, one.me, one.storage.load_ops(SWARM)).documents() == {one.me: {"policy": 3}}
            )


async def test_what_was_held_back_survives_a_disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_log, "HEAD_ALONE_S", 3600.0)
    key = signer_of(1)
    stored = [SwarmDocs(SWARM, key.peer_id).write(key, policy=1)]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1, stored=stored)) as (one,):
            assert await one.replica.write(policy=2)
            one.storage._db.execute("PRAGMA query_only = ON")
            with pytest.raises(StorageError):
                await one.replica.write_held()
            one.storage._db.execute("PRAGMA query_only = OFF")
            assert one.replica.documents() == {key.peer_id: {"policy": 2}}
            assert one.replica.version() == {key.peer_id: 1}
            await one.replica.write_held()
            assert await one.replica.write(other=3)
            assert one.replica.version() == {key.peer_id: 3}
            assert one.replica.documents() == {key.peer_id: {"policy": 2, "other": 3}}


async def test_an_identity_that_runs_twice_is_told_to_its_user() -> None:
    """The copy has written what the original hears in its own name, and then both write."""
    key = signer_of(1)
    copy = SwarmDocs(SWARM, key.peer_id)
    ops = [copy.write(key, policy="copy")]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1), a_node(2)) as (one, two):
            await one.host.connect(two.host.addresses())
            await one.knows(two)
            await two.knows(one)
            calls = client(SwarmService, two.host.at(one.me), timeout_s=5)
            await calls.gossip(GossipPush(SWARM, ops=tuple(ops)))
            await one.until(lambda: one.replica.problem is not None)
            assert "its profile was copied. Stop one of the two" in str(one.replica.problem)
            assert await one.replica.write(policy="original")
            forked = copy.write(key, policy="copy again")
            await calls.gossip(GossipPush(SWARM, ops=(forked,)))
            await one.until(lambda: one.replica.is_frozen)
            assert "join it again with a new profile" in str(one.replica.problem)
            assert not await one.replica.write(policy="more")


async def test_a_sync_that_names_thousands_of_authors_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    monkeypatch.setattr(PeerId, "parse", lambda text: parsed.append(text) or signer_of(1).peer_id)
    heads = {f"{n:052}": Head(7, bytes(32)) for n in range(4500)}
    with pytest.raises(LimitError):
        typed_version(SyncRequest(SWARM, encode(heads)))
    assert parsed == []
    monkeypatch.undo()
    most = Version({signer.peer_id: Head(2**32, bytes(32), 2**32) for signer in map(signer_of, range(MAX_MEMBERS))})
    assert typed_version(SyncRequest(SWARM, plain_version(most))) == most


async def test_seven_hundred_forged_ops_in_one_push_leave_others_their_turns() -> None:
    """And the good one among them is taken."""
    key = signer_of(3)
    docs = SwarmDocs(SWARM, key.peer_id)
    good = docs.write(key, policy="good")
    forged = [Signed(key.peer_id, good.payload[:-1] + bytes([n % 256]), bytes(64)) for n in range(350)]
    with trio.fail_after(GENEROUS_S):
        async with together(a_node(1)) as (one,):
            steps = 0

            async def count() -> None:
                nonlocal steps
                while True:
                    steps += 1
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                await one.replica.serve_gossip(signer_of(2).peer_id, GossipPush(SWARM, ops=(*forged, good, *forged)))
                nursery.cancel_scope.cancel()
            assert one.replica.documents() == {key.peer_id: {"policy": "good"}}
            assert steps > len(forged) // SLICE_OPS
