"""The cores of the distributed hash table, between a few objects: what is kept, what is refused, what is found."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.core import (
    MAX_PUTS_AT_ONCE,
    Answered,
    Ask,
    Dht,
    Failed,
    Get,
    GetDone,
    Here,
    Met,
    Output,
    Publish,
    PutDone,
    Tick,
    Wake,
)
from shoal.dht.keyspace import Key, key_of_peer, key_to_bytes
from shoal.dht.lookup import MAX_ASKED, PATHS, Lookup
from shoal.dht.messages import FindAnswer, FindRequest, StoreRequest
from shoal.dht.record_store import MAX_PER_AUTHOR, MAX_PER_KEY, RecordStore
from shoal.dht.records import (
    HOUR_S,
    MAX_EARLIER,
    Addresses,
    Kind,
    Model,
    Profile,
    Record,
    key_of,
    open_record,
    sign_record,
)
from shoal.dht.registry import Known, ModelName, check_name, check_tags, history, learn, next_version, resolve
from shoal.dht.routing import MAX_OF_NETWORK, Contact, K, RoutingTable, network_of, usable
from shoal.protocol.errors import NoPeersError, ProtocolError, RefusedError, SignatureError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signed, Signer

NOW = 1_800_000_000.0
ME = Signer(bytes(32))
OTHER = Signer(bytes([1] * 32))
AT = Addresses(("/ip4/127.0.0.1/tcp/1",))


def cid(number: int) -> Cid:
    return Cid.of_block(number.to_bytes(8, "big"))


def model(seq: int, manifest: int, signer: Signer = ME, earlier: tuple[Cid, ...] = (), now: float = NOW) -> Record:
    return sign_record(signer, Kind.MODEL, "cart", Model(cid(manifest), 9, earlier=earlier), seq=seq, now=now)


def contact(number: int, ip: str = "127.0.0.1") -> Contact:
    peer = Signer(number.to_bytes(32, "big")).peer_id
    return Contact(peer, (f"/ip4/{ip}/tcp/{number + 1}/p2p/{peer}",))


# --- records ---


def test_a_record_is_read_as_it_was_signed() -> None:
    made = model(1, 1)
    assert open_record(made.signed) == made
    assert made.is_current(NOW)
    assert not made.is_current(NOW + 31 * 24 * HOUR_S)


def test_what_somebody_else_signed_or_changed_is_no_record() -> None:
    made = model(1, 1)
    with pytest.raises(SignatureError):
        open_record(replace(made.signed, author=OTHER.peer_id))
    with pytest.raises(ProtocolError):
        open_record(replace(made.signed, payload=made.signed.payload + b"\0"))


def test_a_record_that_would_live_for_ever_is_not_current() -> None:
    far = sign_record(ME, Kind.PROVIDER, str(cid(1)), AT, seq=1, now=NOW + 24 * HOUR_S)
    assert not far.is_current(NOW)


@given(st.binary(max_size=200))
def test_bytes_that_nobody_signed_are_refused_and_nothing_else_fails(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        open_record(Signed(ME.peer_id, payload, bytes(64)))


@pytest.mark.parametrize(
    "body", [Addresses(()), Addresses(("/x",) * 9), Addresses(("y" * 300,)), Addresses(("\x1b[2J",))]
)
def test_addresses_are_few_short_and_can_be_printed(body: Addresses) -> None:
    with pytest.raises(ProtocolError):
        sign_record(ME, Kind.PROVIDER, str(cid(1)), body, seq=1, now=NOW)


def test_the_higher_number_wins_and_of_one_number_the_lower_hash_on_every_node() -> None:
    old, new, fork = model(1, 1), model(2, 2), model(2, 3)
    assert new.beats(old)
    assert not old.beats(new)
    assert new.beats(fork) != fork.beats(new)


def test_two_records_of_one_version_that_differ_prove_a_fork_and_a_renewed_one_does_not() -> None:
    assert model(2, 2).contradicts(model(2, 3))
    assert not model(2, 2).contradicts(model(2, 2, now=NOW + 60))
    assert not model(2, 2).contradicts(model(2, 3, OTHER))
    assert model(2, 2, now=NOW + 60).beats(model(2, 2))


def test_a_history_that_is_written_anew_is_a_fork() -> None:
    assert model(3, 3, earlier=(cid(9), cid(1))).contradicts(model(2, 2, earlier=(cid(1),)))
    assert not model(3, 3, earlier=(cid(2), cid(1))).contradicts(model(2, 2, earlier=(cid(1),)))


# --- what is kept ---


def test_an_older_record_never_displaces_a_newer_one() -> None:
    store = RecordStore()
    new, old = model(2, 2), model(1, 1)
    store.put(new, "a", NOW)
    kept = store.put(old, "a", NOW)
    assert kept is not None
    assert kept.record == new
    assert [each.record for each in store.get(new.key, NOW)] == [new]


def test_both_sides_of_a_fork_are_kept_in_whatever_order_they_come() -> None:
    sides = model(2, 2), model(2, 3)
    for order in (sides, sides[::-1]):
        store = RecordStore()
        for each in order:
            store.put(each, "a", NOW)
        (kept,) = store.get(sides[0].key, NOW)
        assert kept.fork is not None
        assert {kept.record.digest, kept.fork.digest} == {each.digest for each in sides}
        assert kept.record.beats(kept.fork)


def test_whoever_floods_a_key_pushes_out_its_own() -> None:
    store = RecordStore()
    mine = sign_record(ME, Kind.PROVIDER, str(cid(1)), AT, seq=1, now=NOW)
    store.put(mine, "my network", NOW)
    for number in range(3 * MAX_PER_KEY):
        liar = Signer(number.to_bytes(32, "little"))
        if liar.peer_id != ME.peer_id:
            store.put(sign_record(liar, Kind.PROVIDER, str(cid(1)), AT, seq=1, now=NOW), "theirs", NOW)
    here = [each.record for each in store.get(mine.key, NOW)]
    assert len(here) == MAX_PER_KEY
    assert mine in here


def test_one_author_and_all_together_have_bounds() -> None:
    store = RecordStore(max_records=300)
    for number in range(MAX_PER_AUTHOR + 10):
        store.put(sign_record(ME, Kind.PROVIDER, str(cid(number)), AT, seq=1, now=NOW), "a", NOW)
    assert len(store) == MAX_PER_AUTHOR
    for number in range(100):
        store.put(sign_record(OTHER, Kind.PROVIDER, str(cid(number)), AT, seq=1, now=NOW), "b", NOW)
    assert len(store) == 300


def test_what_expired_is_gone() -> None:
    store = RecordStore()
    record = sign_record(ME, Kind.PROVIDER, str(cid(1)), AT, seq=1, now=NOW)
    store.put(record, "a", NOW)
    assert not store.get(record.key, NOW + 2 * HOUR_S)
    assert len(store) == 0


# --- whom to ask ---


@given(st.sets(st.integers(0, 400), min_size=1, max_size=120), st.integers(0, 2**256 - 1))
def test_the_closest_are_the_closest(numbers: set[int], target: int) -> None:
    table = RoutingTable(contact(1000).peer)
    for number in numbers:
        table.heard(contact(number))
    known = sorted(table, key=lambda each: key_of_peer(each.peer) ^ target)
    assert table.closest(Key(target), 20) == known[:20]


def test_whoever_answers_keeps_its_place_and_whoever_does_not_loses_it() -> None:
    table = RoutingTable(contact(1000).peer)
    for number in range(500):
        table.heard(contact(number))
    full = len(table)
    known = next(iter(table))
    table.heard(known)
    table.failed(known.peer)
    table.failed(known.peer)
    assert table.get(known.peer) is None
    assert full - 1 <= len(table) <= full


def test_one_network_does_not_fill_a_bucket() -> None:
    table = RoutingTable(contact(1000).peer)
    for number in range(200):
        table.heard(contact(number, "8.8.1.1"))
    assert 0 < len(table) <= 12 * MAX_OF_NETWORK
    assert network_of("/ip4/8.8.4.4/tcp/1") == "8.8.0.0/16"
    assert network_of("/ip4/192.168.1.1/tcp/1") == ""


def test_no_peer_is_asked_by_two_paths_and_none_leads_a_look_up_around_for_ever() -> None:
    lookup = Lookup(Key(0), [contact(number) for number in range(PATHS)], ME.peer_id, 1.0)
    asked: list[PeerId] = []
    number = PATHS
    while (batch := lookup.next(0.0)) and len(asked) < 1000:
        for each in batch:
            asked.append(each.peer)
            lookup.answered(each.peer, [contact(number + more) for more in range(5)])
            number += 5
    assert len(asked) == len(set(asked)) <= MAX_ASKED


def test_whoever_is_slow_is_not_waited_for_and_counts_if_it_answers_after_all() -> None:
    lookup = Lookup(Key(0), [contact(1)], ME.peer_id, 0.5)
    assert lookup.next(0.0) == [contact(1)]
    assert lookup.wake_at == 0.5
    assert not lookup.is_over
    lookup.next(0.5)
    assert lookup.is_over
    lookup.answered(contact(1).peer, [])
    assert lookup.closest() == [contact(1)]


def test_names_of_nobody_stop_being_asked_soon() -> None:
    liar, honest = contact(1), contact(2)
    lookup = Lookup(Key(0), [liar, honest], ME.peer_id, 0.5, paths=1)
    lookup.next(0.0)
    lookup.answered(liar.peer, [contact(number) for number in range(10, 30)])
    lookup.answered(honest.peer, [])
    num_failed = 0
    while batch := lookup.next(0.0):
        for each in batch:
            lookup.failed(each.peer)
            num_failed += 1
    assert num_failed <= 6


# --- nodes together ---


class Lan:
    """Nodes that answer at once, unless they are away."""

    def __init__(self, size: int) -> None:
        self.now = NOW
        self.nodes: dict[PeerId, Dht] = {}
        self.away: set[PeerId] = set()
        self.done: list[Output] = []
        for number in range(size):
            signer = Signer(number.to_bytes(32, "big"))
            node = self.nodes[signer.peer_id] = Dht(signer, Random(number))
            self.tell(node, Here(contact(number).addresses, is_server=True))
        peers = list(self.nodes)
        for number, peer in enumerate(peers[1:], start=1):
            self.tell(self.nodes[peer], Met(contact(0).peer))
            self.tell(self.nodes[peer], Met(contact(number // 2).peer))
        for _ in range(4):
            self.now += 3
            for node in self.nodes.values():
                self.tell(node, Tick())

    def tell(self, node: Dht, *events: object) -> None:
        waiting = list(events)
        while waiting:
            for output in node.handle(waiting.pop(0), self.now):  # type: ignore[arg-type]
                match output:
                    case Ask(query, asked, request):
                        waiting.append(self.answer(node, query, asked, request))
                    case PutDone() | GetDone():
                        self.done.append(output)
                    case Wake(at):
                        assert at > self.now

    def answer(self, node: Dht, query: int, asked: Contact, request: FindRequest | StoreRequest) -> object:
        other = self.nodes.get(asked.peer)
        if other is None or asked.peer in self.away:
            return Failed(query)
        try:
            if isinstance(request, StoreRequest):
                return Answered(query, other.serve_store(node.me, node.me, request, self.now))
            return Answered(query, other.serve_find(node.me, request, self.now))
        except ProtocolError:
            return Failed(query)

    def do(self, peer: PeerId, event: Publish | Get) -> PutDone | GetDone:
        self.done.clear()
        self.tell(self.nodes[peer], event)
        found = [each for each in self.done if isinstance(each, PutDone | GetDone) and each.op == event.op]
        assert len(found) == 1
        return found[0]

    def newest(self, peer: PeerId, owner: PeerId) -> Record:
        done = self.do(peer, Get(7, Kind.MODEL, "cart", owner))
        assert isinstance(done, GetDone)
        assert len(done.records) == 1
        return done.records[0]


def test_what_one_says_another_finds_and_the_count_of_who_keeps_it_is_true() -> None:
    lan = Lan(40)
    peers = list(lan.nodes)
    put = lan.do(peers[3], Publish(1, Kind.MODEL, "cart", seq=1, body=Model(cid(1), 9)))
    assert isinstance(put, PutDone)
    key = key_of(Kind.MODEL, "cart", peers[3])
    kept = [peer for peer, node in lan.nodes.items() if node.store.get(key, lan.now) and peer != peers[3]]
    assert 0 < put.num_kept <= len(kept) < 2 * K
    for peer in peers:
        assert lan.newest(peer, peers[3]).body.manifest == cid(1)


def test_nobody_kept_it_where_nobody_is() -> None:
    lan = Lan(1)
    put = lan.do(next(iter(lan.nodes)), Publish(1, Kind.PROVIDER, str(cid(1))))
    assert isinstance(put, PutDone)
    assert put.num_kept == put.num_asked == 0


def test_a_name_that_changed_twice_while_a_third_was_away_is_the_newest_for_all_who_return() -> None:
    lan = Lan(45)
    peers = list(lan.nodes)
    owner = peers[1]
    lan.do(owner, Publish(1, Kind.MODEL, "cart", seq=1, body=Model(cid(1), 9)))
    lan.away = set(peers[2::3])
    for version in (2, 3):
        lan.do(owner, Publish(version, Kind.MODEL, "cart", seq=version, body=Model(cid(version), 9)))
    back, lan.away = lan.away, set()
    for peer in back:
        assert lan.newest(peer, owner).body.manifest == cid(3)


def test_whoever_asks_gives_the_newest_to_those_who_had_less() -> None:
    lan = Lan(30)
    peers = list(lan.nodes)
    lan.do(peers[0], Publish(1, Kind.MODEL, "cart", seq=1, body=Model(cid(1), 9)))
    lan.away = set(peers[5:15])
    lan.do(peers[0], Publish(2, Kind.MODEL, "cart", seq=2, body=Model(cid(2), 9)))
    lan.away = set()
    for peer in peers[20:]:
        lan.newest(peer, peers[0])
    key = key_of(Kind.MODEL, "cart", peers[0])
    near = sorted(peers, key=lambda peer: key_of_peer(peer) ^ key)[:5]
    for peer in near:
        assert lan.nodes[peer].store.get(key, lan.now)[0].record.statement.seq == 2


def test_two_records_with_one_number_are_shown_to_whoever_asks() -> None:
    lan = Lan(30)
    peers = list(lan.nodes)
    owner = Signer((4).to_bytes(32, "big"))
    lan.do(owner.peer_id, Publish(1, Kind.MODEL, "cart", seq=1, body=Model(cid(1), 9)))
    other = StoreRequest(model(1, 2, owner, now=lan.now).signed)
    for peer in peers[:15]:
        lan.nodes[peer].serve_store(peers[0], "x", other, lan.now)
    found = lan.do(peers[20], Get(1, Kind.MODEL, "cart", owner.peer_id))
    assert isinstance(found, GetDone)
    assert len(found.forks) == 1


def test_holders_say_where_they_are_and_nobody_says_it_for_them() -> None:
    lan = Lan(30)
    peers = list(lan.nodes)
    for number in (3, 9):
        lan.do(peers[number], Publish(1, Kind.PROVIDER, str(cid(5))))
    found = lan.do(peers[20], Get(1, Kind.PROVIDER, str(cid(5))))
    assert isinstance(found, GetDone)
    assert {record.author: record.body.addresses for record in found.records} == {
        peers[number]: contact(number).addresses for number in (3, 9)
    }
    stolen = StoreRequest(found.records[0].signed)
    with pytest.raises(ProtocolError, match="from its author alone"):
        lan.nodes[peers[1]].serve_store(peers[2], "x", stolen, lan.now)


def test_a_false_record_costs_whoever_gave_it_its_place() -> None:
    lan = Lan(3)
    node, liar = list(lan.nodes.values())[:2]
    outputs = node.handle(Get(1, Kind.MODEL, "cart", ME.peer_id), lan.now)
    for output in outputs:
        if isinstance(output, Ask):
            forged = (Signed(ME.peer_id, model(1, 1).signed.payload, bytes(64)),)
            node.handle(Answered(output.query, FindAnswer((), forged, output.contact.addresses)), lan.now)
    assert node.num_lies > 0
    assert node.table.get(liar.me) is None


def test_a_client_is_not_asked_and_finds_all_the_same() -> None:
    lan = Lan(20)
    signer = Signer(bytes([9] * 32))
    node = lan.nodes[signer.peer_id] = Dht(signer, Random(9))
    lan.tell(node, Here(("/ip4/10.0.0.1/tcp/1",), is_server=False), Met(contact(0).peer))
    lan.now += 1
    lan.tell(node, Tick())
    owner = list(lan.nodes)[2]
    lan.do(owner, Publish(1, Kind.MODEL, "cart", seq=1, body=Model(cid(1), 9)))
    assert lan.newest(signer.peer_id, owner).body.manifest == cid(1)
    assert all(other.table.get(signer.peer_id) is None for other in lan.nodes.values())


def test_that_there_is_nothing_is_remembered_for_a_while() -> None:
    lan = Lan(10)
    peer = next(iter(lan.nodes))
    first = lan.do(peer, Get(1, Kind.MODEL, "none", peer))
    again = lan.do(peer, Get(2, Kind.MODEL, "none", peer))
    assert isinstance(first, GetDone)
    assert isinstance(again, GetDone)
    assert first.num_answered > 0
    assert again.num_answered == 0
    lan.now += 6
    later = lan.do(peer, Get(3, Kind.MODEL, "none", peer))
    assert isinstance(later, GetDone)
    assert later.num_answered > 0


def test_what_a_node_says_is_renewed_before_it_expires_and_when_it_moves() -> None:
    lan = Lan(10)
    peer, asker = list(lan.nodes)[:2]
    lan.do(peer, Publish(1, Kind.PROVIDER, str(cid(5))))
    for _ in range(8):
        lan.now += 900
        lan.tell(lan.nodes[peer], Tick())
    found = lan.do(asker, Get(1, Kind.PROVIDER, str(cid(5))))
    assert isinstance(found, GetDone)
    assert [record.author for record in found.records] == [peer]
    lan.tell(lan.nodes[peer], Here(("/ip4/10.1.1.1/tcp/2",), is_server=True))
    moved = lan.do(asker, Get(2, Kind.PROVIDER, str(cid(5))))
    assert isinstance(moved, GetDone)
    assert moved.records[0].body.addresses == ("/ip4/10.1.1.1/tcp/2",)


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33)])
def test_a_key_of_another_length_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        Dht(ME, Random(0)).serve_find(OTHER.peer_id, FindRequest(raw), NOW)


def test_a_node_asks_itself_nothing() -> None:
    node = Dht(ME, Random(0))
    node.serve_find(ME.peer_id, FindRequest(key_to_bytes(Key(1)), addresses=("/ip4/127.0.0.1/tcp/1",)), NOW)
    assert len(node.table) == 0


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/127.0.0.1/tcp/0/p2p/{peer}",
        "/ip4/127.0.0.1/tcp/99999/p2p/{peer}",
        "/ip4/127.0.0.1/tcp/\u0663/p2p/{peer}",
        "/ip4/::1/tcp/1/p2p/{peer}",
        "/ip6/::1%lo/tcp/1/p2p/{peer}",
        "/ip4/not-an-ip/tcp/1/p2p/{peer}",
        "/dns4/example.com/tcp/1/p2p/{peer}",
        "/ip4/127.0.0.1/udp/1/quic-v1/p2p/{peer}",
        "/ip4/127.0.0.1/tcp/1/p2p/{other}",
        "/ip4/127.0.0.1/tcp/1/p2p/{other}/p2p-circuit/p2p/{peer}",
        "/ip4/127.0.0.1/tcp/" + "9" * 5000 + "/p2p/{peer}",
    ],
)
def test_only_addresses_that_lead_to_the_peer_itself_count(address: str) -> None:
    bad = address.format(peer=OTHER.peer_id, other=ME.peer_id)
    good = f"/ip4/192.0.2.1/tcp/4001/p2p/{OTHER.peer_id}"
    assert usable(Contact(OTHER.peer_id, (bad,))) is None
    assert usable(Contact(OTHER.peer_id, (bad, good))) == Contact(OTHER.peer_id, (good,))
    node = Dht(ME, Random(0))
    node.serve_find(OTHER.peer_id, FindRequest(key_to_bytes(Key(1)), addresses=(bad,)), NOW)
    assert len(node.table) == 0
    lookup = Lookup(Key(1), [contact(3)], ME.peer_id, 1.0)
    lookup.next(0.0)
    lookup.answered(contact(3).peer, [Contact(OTHER.peer_id, (bad,))])
    assert lookup.next(0.0) == []


def test_whom_this_node_had_no_leave_to_dial_keeps_its_place() -> None:
    lan = Lan(2)
    node, other = lan.nodes.values()
    for was_tried, stays in ((False, True), (True, False)):
        for _ in range(3):
            for output in node.handle(Met(other.me), lan.now):
                if isinstance(output, Ask):
                    node.handle(Failed(output.query, was_tried), lan.now)
        assert (node.table.get(other.me) is not None) is stays


def test_who_is_at_no_address_is_told_at_once_that_nobody_keeps_what_it_says() -> None:
    node = Dht(ME, Random(0))
    assert PutDone(1, 0, 0) in node.handle(Publish(1, Kind.PROVIDER, str(cid(1))), NOW)


def test_what_is_due_at_once_is_said_a_few_at_a_time() -> None:
    lan = Lan(5)
    node = next(iter(lan.nodes.values()))
    for number in range(40):
        lan.do(node.me, Publish(1, Kind.PROVIDER, str(cid(number))))
    outputs = node.handle(Here((f"/ip4/10.0.0.1/tcp/1/p2p/{node.me}",), is_server=True), lan.now)
    assert 0 < sum(isinstance(each, Ask) for each in outputs) <= MAX_PUTS_AT_ONCE * len(lan.nodes)


def test_what_nobody_waits_for_is_said_a_few_at_a_time_from_the_start() -> None:
    lan = Lan(5)
    node = next(iter(lan.nodes.values()))
    outputs = []
    for number in range(100):
        outputs += node.handle(Publish(0, Kind.PROVIDER, str(cid(number))), lan.now)
    assert 0 < sum(isinstance(each, Ask) for each in outputs) <= MAX_PUTS_AT_ONCE * len(lan.nodes)
    assert not any(isinstance(each, PutDone) for each in node.handle(Tick(), lan.now))


# --- names ---


def test_names_are_read_and_written() -> None:
    name = ModelName.parse(f"{ME.peer_id}/cart-pole.1@3")
    assert (name.owner, name.name, name.version) == (ME.peer_id, "cart-pole.1", 3)
    assert ModelName.parse(str(name)) == name
    assert check_tags(["PPO", "ppo", "gym:CartPole-v1"]) == ("ppo", "gym:cartpole-v1")


@pytest.mark.parametrize(
    "text", ["x", "/", "me/x", f"{ME.peer_id}/", f"{ME.peer_id}/a@0", f"{ME.peer_id}/a@", "a/../b"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        ModelName.parse(text)
    with pytest.raises(UsageError):
        check_name("../x")


def test_every_version_keeps_its_manifest() -> None:
    newest = None
    for version in range(1, 41):
        number, body = next_version(newest, cid(version), 9)
        assert number == version
        newest = sign_record(ME, Kind.MODEL, "cart", body, seq=number, now=NOW)
    assert newest is not None
    assert history(newest) == {version: cid(version) for version in range(40, 39 - MAX_EARLIER, -1)}
    assert resolve(ModelName(ME.peer_id, "cart"), Known(newest)) == (40, cid(40))
    assert resolve(ModelName(ME.peer_id, "cart", 20), Known(newest)) == (20, cid(20))
    with pytest.raises(UsageError, match="versions 8 to 40"):
        resolve(ModelName(ME.peer_id, "cart", 2), Known(newest))
    with pytest.raises(NoPeersError):
        resolve(ModelName(ME.peer_id, "cart"), None)


def test_what_is_known_of_a_model_only_grows_in_whatever_order_it_is_heard() -> None:
    one, two, three = model(1, 1), model(2, 2, earlier=(cid(1),)), model(3, 3, earlier=(cid(2), cid(1)))
    for order in permutations([one, two, three]):
        assert learn(None, order) == Known(three)
    known = learn(None, [three])
    assert learn(known, [one, two, model(3, 3, earlier=(cid(2), cid(1)), now=NOW + 60)]) == known
    assert learn(None, []) is None


def test_a_version_with_two_contents_is_had_by_neither_also_when_newer_ones_came() -> None:
    name, lie = ModelName(ME.peer_id, "cart"), model(2, 9, earlier=(cid(1),))
    records = [model(2, 2, earlier=(cid(1),)), lie, model(3, 3, earlier=(cid(2), cid(1)))]
    for order in permutations(records):
        known = learn(None, order)
        assert known is not None
        assert {version: set(both) for version, both in known.disputed().items()} == {2: {cid(2), cid(9)}}
        assert resolve(name, known) == (3, cid(3))
        assert resolve(replace(name, version=1), known) == (1, cid(1))
        with pytest.raises(RefusedError, match="two contents for version 2"):
            resolve(replace(name, version=2), known)
        assert learn(None, known.records()) is not None
        assert learn(known, [lie]) == known


def test_a_profile_is_a_claim_that_everybody_may_make() -> None:
    assert key_of(Kind.PROFILE, "ann") == sign_record(ME, Kind.PROFILE, "ann", Profile(), seq=1, now=NOW).key
    with pytest.raises(UsageError):
        key_of(Kind.MODEL, "cart")
