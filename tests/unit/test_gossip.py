"""The gossip core between objects: who is told what, and what a stranger's messages can and cannot do."""

from __future__ import annotations

import random

import pytest

from shoal.crdt.gossip import Gossip
from shoal.crdt.gossip_messages import (
    MAX_HAVE,
    MAX_SAMPLE,
    MAX_STEPS,
    MAX_WALKS,
    MAX_WANT,
    Ask,
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Event,
    GossipConfig,
    Item,
    Known,
    Output,
    Published,
    Push,
    Pushed,
    Tell,
    Tick,
    Told,
    Wake,
    Walk,
)
from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import Signer

ME = PeerId("me")
PEERS = [PeerId(f"peer{number}") for number in range(20)]
A, B, C = PEERS[:3]
LATE_S = GossipConfig().have_late_s


def item(number: int, key: str = "", source: str = "author") -> Item:
    return Item(number.to_bytes(16, "big"), key or f"key{number}", source)


class Core:
    """One core and a clock; what it said by kind."""

    def __init__(self, *contacts: PeerId, config: GossipConfig | None = None) -> None:
        self.core = Gossip(ME, random.Random(1), config)
        self.now = 100.0
        self.outputs: list[Output] = []
        for peer in contacts:
            self.handle(ContactUp(peer))
        self.outputs.clear()

    def handle(self, event: Event) -> list[Output]:
        outputs = self.core.handle(event, self.now)
        self.outputs += outputs
        return outputs

    def wait(self, seconds: float) -> None:
        """Let time pass, with a tick at every wake; a core that asks for none gets none."""
        end = self.now + seconds
        while True:
            wakes = [output.at for output in self.outputs if isinstance(output, Wake) and output.at > self.now]
            at = min(wakes, default=end)
            if at >= end:
                break
            self.now = at
            self.handle(Tick())
        self.now = end
        self.handle(Tick())

    def pushed(self) -> list[tuple[PeerId, int]]:
        """Who was pushed which items since this was last asked."""
        taken = [output for output in self.outputs if isinstance(output, Push)]
        self.outputs = [output for output in self.outputs if not isinstance(output, Push)]
        return [(push.peer, int.from_bytes(item_id, "big")) for push in taken for item_id in push.ids]

    def told(self) -> list[Tell]:
        taken = [output for output in self.outputs if isinstance(output, Tell)]
        self.outputs = [output for output in self.outputs if not isinstance(output, Tell)]
        return taken

    def publish(self, *items: Item) -> None:
        self.handle(Published(items))

    def receive(self, peer: PeerId, *items: Item) -> None:
        self.handle(Pushed(peer, items, ()))

    def receive_known(self, peer: PeerId, *items: Item) -> None:
        self.handle(Pushed(peer, (), tuple([one.id for one in items])))


# --- pushing ---------------------------------------------------------------------------------------------------------


def test_the_first_item_after_quiet_goes_at_once_and_what_follows_goes_together() -> None:
    core = Core(A)
    core.publish(item(1))
    assert core.pushed() == [(A, 1)]
    core.publish(item(2))
    core.publish(item(3))
    assert core.pushed() == []
    core.wait(0.02)
    assert core.pushed() == [(A, 2), (A, 3)]


def test_a_newer_item_replaces_an_older_one_of_its_key_that_still_waits() -> None:
    core = Core(A)
    core.publish(item(1))
    core.publish(item(2, "facts"), item(3, "other"))
    core.publish(item(4, "facts"))
    core.wait(0.02)
    assert core.pushed() == [(A, 1), (A, 4), (A, 3)]
    assert core.core.statistics().replaced == 1


def test_news_goes_to_all_neighbours_but_the_one_it_came_from_and_what_was_seen_is_not_published_again() -> None:
    core = Core(A, B, C)
    core.receive(A, item(1))
    assert core.pushed() == [(B, 1), (C, 1)]
    core.publish(item(1))
    assert core.pushed() == []


def test_a_duplicate_prunes_the_link_for_its_source_and_for_no_other() -> None:
    core = Core(A, B)
    core.receive(A, item(1))
    core.receive_known(B, item(1))
    assert core.told() == [Tell(B, Control(prune=(item(1).id,)))]
    core.wait(1.0)
    core.pushed()
    core.receive(A, item(2))
    core.receive(A, item(3, source="another"))
    core.wait(0.05)
    assert core.pushed() == [(B, 3)]


def pruned_by_b() -> Core:
    """A core whose neighbour B has pruned the only source."""
    core = Core(A, B)
    core.receive(A, item(1))
    core.handle(Told(B, Control(prune=(item(1).id,))))
    core.wait(1.0)
    core.told()
    core.pushed()
    return core


def test_whoever_is_pruned_is_told_later_that_there_is_news() -> None:
    core = pruned_by_b()
    core.receive(A, item(2))
    core.wait(0.49 * LATE_S)
    core.receive(A, item(3))
    assert core.told() == []
    core.wait(0.51 * LATE_S)
    assert core.pushed() == []
    assert core.told() == [Tell(B, Control(have=(item(2).id, item(3).id)))]
    core.wait(LATE_S)
    assert core.told() == []


def test_whoever_is_pruned_is_told_that_there_is_news_with_the_next_push() -> None:
    core = pruned_by_b()
    core.receive(A, item(2))
    core.receive(A, item(3, source="another"))
    core.told()
    assert core.pushed() == [(B, 3)]
    core.receive(A, item(4))
    core.wait(0.15)
    core.receive(A, item(5, source="another"))
    assert core.pushed() == [(B, 5)]
    assert core.told() == [Tell(B, Control(have=(item(4).id,)))]
    core.wait(LATE_S)
    assert core.told() == []


def test_what_a_neighbour_has_announced_itself_is_not_announced_to_it() -> None:
    core = pruned_by_b()
    core.receive(A, item(2))
    core.handle(Told(B, Control(have=(item(2).id,))))
    core.handle(Told(B, Control(have=(item(3).id,))))
    core.receive(A, item(3))
    core.wait(LATE_S)
    assert core.told() == []


def test_of_two_that_have_all_of_a_third_one_tells_the_other() -> None:
    cores = {peer: Gossip(peer, random.Random(number)) for number, peer in enumerate((A, B))}
    now, num_told, num_items = 0.0, 0, 20
    for peer, other in ((A, B), (B, A)):
        for contact in (other, C):
            cores[peer].handle(ContactUp(contact), now)
        cores[peer].handle(Pushed(C, (item(0, "key", C),), ()), now)
        cores[peer].handle(Told(other, Control(prune=(item(0).id,))), now)
    for number in range(1, num_items + 1):
        for core in cores.values():
            core.handle(Pushed(C, (item(number, "key", C),), ()), now)
        for _ in range(100):
            now += 0.012 * LATE_S
            for peer, other in ((A, B), (B, A)):
                for output in cores[peer].handle(Tick(), now):
                    if isinstance(output, Tell) and output.message.have and output.peer == other:
                        num_told += 1
                        cores[other].handle(Told(peer, output.message), now)
    assert num_items - 1 <= num_told <= num_items + 1


def test_the_last_link_into_a_tree_is_not_pruned() -> None:
    core = Core(A)
    core.receive(A, item(1))
    core.receive_known(A, item(1))
    assert core.told() == []


def test_what_everybody_has_pruned_is_published_to_everybody_all_the_same() -> None:
    core = Core(A, B)
    core.publish(item(1, source=ME))
    for peer in (A, B):
        core.handle(Told(peer, Control(prune=(item(1).id,))))
    core.wait(1.0)
    core.pushed()
    core.publish(item(2, source=ME))
    assert sorted(core.pushed()) == [(A, 2), (B, 2)]


# --- what was announced and does not come ----------------------------------------------------------------------------


def test_an_announced_item_is_asked_of_its_announcers_one_after_the_other() -> None:
    core = Core(A, B)
    core.handle(Told(A, Control(have=(item(1).id,))))
    core.handle(Told(B, Control(have=(item(1).id,))))
    core.wait(0.24)
    assert core.told() == []
    core.wait(0.02)
    assert core.told() == [Tell(A, Control(want=(item(1).id,)))]
    core.wait(0.16)
    assert core.told() == [Tell(B, Control(want=(item(1).id,)))]
    core.receive(B, item(1))
    core.wait(2.0)
    assert core.told() == []
    assert core.core.statistics().missing == 0


def test_what_comes_by_itself_is_not_asked_for() -> None:
    core = Core(A, B)
    core.handle(Told(A, Control(have=(item(1).id,))))
    core.receive(B, item(1))
    core.wait(2.0)
    assert not any(tell.message.want for tell in core.told())


def test_hardly_any_wake_is_for_what_has_come_by_itself() -> None:
    core = Core(A)
    for number in range(100):
        core.handle(Told(A, Control(have=(item(number).id,))))
        core.wait(0.005)
        core.receive(A, item(number))
        core.wait(0.005)
    wakes = [output for output in core.outputs if isinstance(output, Wake)]
    assert len(wakes) <= 10  # two for each of four waits of 0.25 s, not one for each item


def test_who_breaks_its_promises_is_asked_last() -> None:
    core = Core(A, B)
    core.handle(Told(A, Control(have=(item(1).id,))))
    core.wait(2.0)
    assert core.core.statistics().never_came == 1
    core.told()
    core.handle(Told(A, Control(have=(item(2).id,))))
    core.handle(Told(B, Control(have=(item(2).id,))))
    core.wait(0.26)
    assert core.told() == [Tell(B, Control(want=(item(2).id,)))]


def test_who_asks_is_given_what_was_seen_and_is_in_the_tree_again() -> None:
    core = Core(A, B)
    core.receive(A, item(1))
    core.handle(Told(B, Control(prune=(item(1).id,))))
    core.wait(1.0)
    core.pushed()
    core.handle(Told(B, Control(want=(item(1).id, item(77).id))))
    assert core.pushed() == [(B, 1)]
    core.receive(A, item(2))
    assert core.pushed() == [(B, 2)]


def test_what_was_to_be_announced_to_one_that_grafts_is_pushed_to_it() -> None:
    core = Core(A, B)
    core.receive(A, item(1))
    core.handle(Told(B, Control(prune=(item(1).id,))))
    core.wait(1.0)
    core.pushed()
    core.receive(A, item(2))
    core.handle(Told(B, Control(graft=(item(1).id,))))
    core.wait(0.2)
    assert core.pushed() == [(B, 2)]


def test_a_neighbour_that_is_lost_is_replaced_in_its_trees_at_once() -> None:
    core = Core(A, B, C)
    core.receive(A, item(1))
    for peer in (B, C):
        core.receive_known(peer, item(1))
    core.handle(Told(B, Control(have=(item(2).id,))))
    core.told()
    core.handle(ContactDown(A))
    tells = core.told()
    assert Tell(B, Control(want=(item(2).id,))) in tells
    assert {tell.peer for tell in tells if tell.message.graft == (item(1).id,)} == {B, C}


# --- neighbours ------------------------------------------------------------------------------------------------------


def test_whoever_is_connected_is_a_neighbour_without_a_round_trip_while_there_is_room() -> None:
    core = Core()
    assert Tell(A, Control(neighbour=Ask.JOIN)) in core.handle(ContactUp(A))
    core.publish(item(1))
    assert core.pushed() == [(A, 1)]
    for peer in PEERS[1:]:
        core.handle(ContactUp(peer))
    assert len(core.core.neighbours) == 6
    assert [tell.message.neighbour for tell in core.told()] == [Ask.JOIN, *[Ask.URGENT] * 3, *[Ask.ROOM] * 2]


def test_a_full_view_refuses_who_wants_room_and_names_others() -> None:
    core = Core(*PEERS[:7])
    stranger = next(peer for peer in PEERS[:7] if peer not in core.core.neighbours)
    core.handle(Told(stranger, Control(neighbour=Ask.ROOM)))
    (tell,) = core.told()
    assert tell.peer == stranger
    assert tell.message.disconnect
    assert set(tell.message.shuffle_reply) <= core.core.neighbours


@pytest.mark.parametrize("ask", [Ask.MIX, Ask.URGENT, Ask.JOIN])
def test_a_full_view_makes_room_for_who_needs_it_and_names_it_to_who_is_dropped(ask: Ask) -> None:
    core = Core(*PEERS[:7])
    before = core.core.neighbours
    stranger = next(peer for peer in PEERS[:7] if peer not in before)
    core.handle(Told(stranger, Control(neighbour=ask)))
    (dropped,) = before - core.core.neighbours
    assert stranger in core.core.neighbours
    tells = core.told()
    assert Tell(dropped, Control(disconnect=True, shuffle_reply=(stranger,))) in tells
    walked = [tell for tell in tells if tell.message.walks]
    assert len(walked) == (5 if ask is Ask.JOIN else 0)


def test_one_peer_makes_another_drop_somebody_only_now_and_then() -> None:
    core = Core(*PEERS[:7])
    stranger = next(peer for peer in PEERS[:7] if peer not in core.core.neighbours)
    core.handle(Told(stranger, Control(neighbour=Ask.JOIN)))
    before = core.core.neighbours
    core.handle(Told(stranger, Control(disconnect=True)))  # whoever comes now takes its place
    for _ in range(10):
        core.handle(Told(stranger, Control(neighbour=Ask.JOIN)))
    assert len(before - core.core.neighbours) <= 1


def test_a_lost_neighbour_is_replaced_by_dialing_those_vouched_for_before_those_heard_of() -> None:
    core = Core(*PEERS[:6])
    core.handle(Told(A, Control(shuffle_reply=tuple(PEERS[10:18]))))
    core.handle(Known((PEERS[7],)))
    assert not [output for output in core.outputs if isinstance(output, Dial)]
    outputs = core.handle(ContactDown(B))
    assert Dial(PEERS[7]) in outputs
    assert len([output for output in outputs if isinstance(output, Dial)]) == 1


def test_who_could_not_be_dialed_is_left_alone_for_a_while() -> None:
    core = Core()
    assert Dial(A) in core.handle(Known((A,)))
    core.handle(ContactDown(A))
    core.outputs.clear()
    assert not [output for output in core.handle(Known((A,))) if isinstance(output, Dial)]
    core.now += 25.0
    assert Dial(A) in core.handle(Tick())


def test_who_speaks_as_a_neighbour_and_is_none_is_told_so_once() -> None:
    core = Core(*PEERS[:7])
    stranger = next(peer for peer in PEERS[:7] if peer not in core.core.neighbours)
    for number in range(20):
        core.handle(Told(stranger, Control(have=(item(number).id,))))
        core.receive(stranger, item(100 + number))
    assert [tell for tell in core.told() if tell.peer == stranger] == [Tell(stranger, Control(disconnect=True))]


def test_one_that_is_not_connected_is_not_listened_to() -> None:
    core = Core(A)
    control = Control(have=(item(1).id,), want=(item(2).id,), neighbour=Ask.JOIN, shuffle=(B,))
    core.handle(Told(C, control))
    core.wait(1.0)
    assert core.told() == []
    assert core.core.neighbours == {A}


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_a_control_message_travels_by_the_codec() -> None:
    peers = tuple([Signer(bytes([number]) * 32).peer_id for number in (1, 2)])
    control = Control(
        have=(item(1).id,),
        want=(item(2).id,),
        graft=(item(3).id,),
        prune=(item(4).id,),
        neighbour=Ask.JOIN,
        disconnect=True,
        walks=(Walk(peers[0], 3),),
        shuffle=peers,
        shuffle_reply=peers[:1],
    )
    assert decode(Control, encode(control)) == control
    assert decode(Control, encode({})) == Control()


@pytest.mark.parametrize(
    "parts",
    [
        {"have": (b"x" * 16,) * (MAX_HAVE + 1)},
        {"want": (b"x" * 16,) * (MAX_WANT + 1)},
        {"graft": (b"x" * 16,) * (MAX_WANT + 1)},
        {"prune": (b"x" * 16,) * (MAX_WANT + 1)},
        {"have": (b"short",)},
        {"want": (b"x" * 17,)},
        {"prune": (b"",)},
        {"walks": ({"peer": str(Signer(bytes([1]) * 32).peer_id), "steps": 1},) * (MAX_WALKS + 1)},
        {"walks": ({"peer": str(Signer(bytes([1]) * 32).peer_id), "steps": MAX_STEPS + 1},)},
        {"walks": ({"peer": str(Signer(bytes([1]) * 32).peer_id), "steps": -1},)},
        {"shuffle": (str(Signer(bytes([1]) * 32).peer_id),) * (MAX_SAMPLE + 1)},
        {"shuffle_reply": ("not a peer",)},
        {"neighbour": 9},
    ],
)
def test_a_control_message_out_of_bounds_is_refused(parts: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        decode(Control, encode(parts))


def test_endless_announcements_fill_only_their_senders_part() -> None:
    core = Core(A, B)
    rng = random.Random(3)
    for _ in range(50):
        core.handle(Told(A, Control(have=tuple([rng.randbytes(16) for _ in range(MAX_HAVE)]))))
    assert core.core.statistics().missing == 512
    core.handle(Told(B, Control(have=(item(1).id,))))
    core.wait(0.26)
    assert Tell(B, Control(want=(item(1).id,))) in core.told()
    core.wait(2.0)  # after so many broken promises hardly anything of it is waited for
    core.handle(Told(A, Control(have=tuple([rng.randbytes(16) for _ in range(MAX_HAVE)]))))
    assert core.core.statistics().missing == 8


def test_endless_wishes_are_granted_at_a_bounded_rate() -> None:
    core = Core(A, B)
    items = [item(number) for number in range(MAX_WANT)]
    core.publish(*items)
    core.pushed()
    for _ in range(100):
        core.handle(Told(A, Control(want=tuple([one.id for one in items]))))
    assert len(core.pushed()) == MAX_WANT
    core.now += 1.0
    core.handle(Told(A, Control(want=tuple([one.id for one in items]))))
    assert len([peer for peer, _ in core.pushed() if peer == A]) <= 200


def test_inventions_fill_only_the_part_for_hearsay_and_are_dialed_ever_less_often() -> None:
    core = Core(A)
    core.handle(Known(tuple(PEERS[5:8])))
    for number in range(300):
        sample = tuple([PeerId(f"invented{number}.{part}") for part in range(MAX_SAMPLE)])
        walks = tuple([Walk(peer, 0) for peer in sample[:MAX_WALKS]])
        core.handle(Told(A, Control(shuffle=sample, shuffle_reply=sample, walks=walks)))
        for dial in [output for output in core.outputs if isinstance(output, Dial)][-3:]:
            if dial.peer.startswith("invented"):
                core.handle(ContactDown(dial.peer))
        core.now += 0.1
    assert core.core.statistics().passive <= 30 + 15
    dials = [output.peer for output in core.outputs if isinstance(output, Dial)]
    assert set(PEERS[5:8]) <= set(dials)
    assert len(dials) < 40


def test_what_is_remembered_is_bounded_and_counted() -> None:
    config = GossipConfig(max_seen=100, max_waiting=50, max_sources=20, max_contacts=10)
    core = Core(*PEERS, config=config)
    for number in range(1000):
        core.receive(A, item(number, source=f"source{number}"))
        core.receive_known(B, item(number))
    statistics = core.core.statistics()
    assert statistics.seen <= 100
    assert statistics.sources <= 20
    assert statistics.contacts == 10
    assert statistics.lazy <= 6 * 20
    assert statistics.fresh == statistics.duplicates == 1000
    assert statistics.dropped > 0
    core.outputs.clear()
    core.wait(0.3)
    assert len(core.pushed()) <= 6 * 50


def test_early_and_needless_ticks_do_no_harm() -> None:
    core = Core(A)
    core.publish(item(1))
    core.publish(item(2))
    for _ in range(100):
        assert [output for output in core.handle(Tick()) if isinstance(output, Wake)] == []
    core.wait(0.02)
    assert core.pushed() == [(A, 1), (A, 2)]
