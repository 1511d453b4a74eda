"""The real gossip core on the seeded network: everybody hears everything, and it costs no more where more are."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from shoal.crdt.gossip import Gossip
from shoal.crdt.gossip_messages import (
    MAX_HAVE,
    MAX_SAMPLE,
    MAX_STEPS,
    MAX_WANT,
    Ask,
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Event,
    GossipConfig,
    Item,
    ItemId,
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
from shoal.protocol.ids import PeerId
from shoal.protocol.sim import Links, Network

LINKS = Links(latency_s=0.05, latency_spread_s=0.02, jitter_s=0.005, loss=0.05)
ITEM_BYTES = 300
CONTROL_BYTES = 60
DIAL_S = 0.1


class Node:
    """A shell as small as it gets: it holds payloads by id, judges what is news, and carries the core's outputs."""

    def __init__(self, swarm: Swarm, peer: PeerId) -> None:
        self.swarm = swarm
        self.peer = peer
        self.connected: set[PeerId] = set()
        self.held: dict[ItemId, Item] = {}
        self.core = Gossip(peer, swarm.network.rng, swarm.config)
        self.censor: Callable[[list[Output]], list[Output]] | None = None
        """What a liar does with what its core tells it to do."""

    def handle(self, event: Event) -> None:
        outputs = self.core.handle(event, self.swarm.network.now)
        if self.censor is not None:
            outputs = self.censor(outputs)
        for output in outputs:
            match output:
                case Push(peer, ids):
                    self.swarm.push(self, peer, ids)
                case Tell(peer, message):
                    self.swarm.tell(self, peer, message)
                case Wake(at):
                    self.swarm.network.wake(self.peer, at, self.handle, Tick())
                case Dial(peer):
                    self.swarm.network.at(DIAL_S, self.swarm.dialed, self, peer, of=self.peer)

    def publish(self, item: Item) -> None:
        self.held[item.id] = item
        self.handle(Published((item,)))

    def receive_push(self, source: PeerId, items: tuple[Item, ...]) -> None:
        held = self.held
        fresh, known = [], []
        for item in items:
            if item.id in held:
                known.append(item.id)
            else:
                held[item.id] = item
                fresh.append(item)
                self.swarm.heard(item)
        self.handle(Pushed(source, tuple(fresh), tuple(known)))

    def receive_tell(self, source: PeerId, message: Control) -> None:
        self.handle(Told(source, message))


class Swarm:
    """Nodes on a network, and what they spend."""

    def __init__(self, size: int, seed: int, links: Links = LINKS, config: GossipConfig | None = None) -> None:
        print(f"seed {seed}")  # pytest shows it when the test fails
        self.network = Network(seed, links)
        self.config = config
        self.nodes: dict[PeerId, Node] = {}
        self.spent: Counter[str] = Counter()
        self.num_items = 0
        self.published_at: dict[ItemId, float] = {}
        self.slowest_s = 0.0
        self.failed_dials = 0
        self.gives_all = False
        """Whether whoever meets somebody sends it all that it holds, as the product's shell does."""
        for number in range(size):
            self.add(PeerId(f"peer{number}"))

    def add(self, peer: PeerId) -> Node:
        self.network.add(peer)
        node = self.nodes[peer] = Node(self, peer)
        return node

    def gather(self, num_known: int = 3, within_s: float = 2.0) -> None:
        """Everybody comes within some time and knows a few of the others."""
        peers = list(self.nodes)
        for number, peer in enumerate(peers[1:], start=1):
            known = self.network.rng.sample(peers[:number], min(num_known, number))
            when = within_s * number / len(peers)
            self.network.at(when, self.nodes[peer].handle, Known(tuple(known)), of=peer)

    def run(self, seconds: float) -> None:
        self.network.run(self.network.now + seconds)

    # --- messages and connections ---

    def push(self, node: Node, target: PeerId, ids: tuple[ItemId, ...]) -> None:
        if target in node.connected:
            items = tuple([node.held[item_id] for item_id in ids if item_id in node.held])
            self.spent["pushes"] += 1
            self.spent["payloads"] += len(items)
            receive = self.nodes[target].receive_push
            self.network.send(node.peer, target, ITEM_BYTES * len(items), receive, node.peer, items)

    def tell(self, node: Node, target: PeerId, message: Control) -> None:
        if target in node.connected:
            self.spent["tells"] += 1
            self.network.send(node.peer, target, CONTROL_BYTES, self.nodes[target].receive_tell, node.peer, message)

    def dialed(self, node: Node, target: PeerId) -> None:
        if target not in self.nodes or not self.network.can_reach(node.peer, target):
            self.failed_dials += 1
            node.handle(ContactDown(target))
        elif target not in node.connected:
            other = self.nodes[target]
            for one, two in ((other, node), (node, other)):
                one.connected.add(two.peer)
                one.handle(ContactUp(two.peer))
                if self.gives_all and one.held:
                    self.push(one, two.peer, tuple(one.held))

    def parted(self, one: PeerId, other: PeerId) -> None:
        for node, peer in ((self.nodes[one], other), (self.nodes[other], one)):
            if peer in node.connected:
                node.connected.discard(peer)
                if self.network.is_alive(node.peer):
                    node.handle(ContactDown(peer))

    def kill(self, peer: PeerId, noticed_after_s: float) -> None:
        """A node dies; whoever was connected to it learns of it after some time."""
        self.network.kill(peer)
        for other in sorted(self.nodes[peer].connected):
            self.network.at(noticed_after_s, self.parted, peer, other)

    # --- what is measured ---

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if self.network.is_alive(node.peer)]

    def publish(self, peer: PeerId) -> Item:
        self.num_items += 1
        item = Item(self.num_items.to_bytes(16, "big"), f"{peer}/facts", peer)
        self.published_at[item.id] = self.network.now
        self.nodes[peer].publish(item)
        return item

    def heard(self, item: Item) -> None:
        self.slowest_s = max(self.slowest_s, self.network.now - self.published_at[item.id])

    def missed(self, items: list[Item], nodes: list[Node]) -> int:
        """Of these, with what replaced them: what is said anew of a key while the old waits, goes in its place."""
        count = 0
        for node in nodes:
            newest: dict[str, ItemId] = {}
            for item in node.held.values():
                newest[item.key] = max(item.id, newest.get(item.key, b""))
            count += sum(newest.get(item.key, b"") < item.id for item in items)
        return count

    @property
    def messages(self) -> int:
        return self.spent["pushes"] + self.spent["tells"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one announcement cost one node, on average."""

    messages: float
    payloads: float


def announce(swarm: Swarm, num_items: int, every_s: float) -> tuple[list[Item], Cost]:
    """Let random living nodes announce something, one after the other, and give all of it time to arrive."""
    before, payloads = swarm.messages, swarm.spent["payloads"]
    items = []
    for _ in range(num_items):
        items.append(swarm.publish(swarm.network.rng.choice(swarm.living).peer))
        swarm.run(every_s)
    swarm.run(5.0)
    share = num_items * len(swarm.living)
    return items, Cost((swarm.messages - before) / share, (swarm.spent["payloads"] - payloads) / share)


# --- everybody hears everything, and what that costs -----------------------------------------------------------------


def costs(size: int, seed: int, kills: int, num_items: int = 40) -> Cost:
    """A lossy swarm in which some die while news is on its way, half of them silently: nobody else misses anything."""
    swarm = Swarm(size, seed)
    swarm.gather()
    swarm.run(20.0)
    victims = swarm.network.rng.sample(sorted(swarm.nodes), kills)
    for number, victim in enumerate(victims):
        swarm.network.at(1.0 + number, swarm.kill, victim, 0.1 if number % 2 else 8.0)
    publishers = [node for node in swarm.living if node.peer not in victims]
    before, payloads = swarm.messages, swarm.spent["payloads"]
    items = []
    for _ in range(num_items):
        items.append(swarm.publish(swarm.network.rng.choice(publishers).peer))
        swarm.run(0.25)
    swarm.run(5.0)
    assert swarm.missed(items, swarm.living) == 0, f"seed {seed}"
    share = num_items * len(swarm.living)
    cost = Cost((swarm.messages - before) / share, (swarm.spent["payloads"] - payloads) / share)
    print(f"{size:6} peers: {cost.messages:5.1f} messages, {cost.payloads:4.1f} payloads, {swarm.slowest_s:4.1f} s")
    return cost


def test_nobody_misses_anything_at_a_cost_that_does_not_grow_with_the_swarm() -> None:
    messages = {size: costs(size, seed=size, kills=max(1, size // 16)).messages for size in (8, 32, 128, 256)}
    assert max(messages.values()) <= 16
    assert messages[256] <= 1.15 * messages[128]


@pytest.mark.parametrize("size", range(2, 8))
def test_a_small_swarm_is_a_full_mesh_in_which_news_is_there_after_one_latency(size: int) -> None:
    swarm = Swarm(size, size, replace(LINKS, loss=0.0))
    swarm.gather(num_known=size)
    swarm.run(20.0)
    assert all(len(node.core.neighbours) == size - 1 for node in swarm.living)
    items = []
    for peer in list(swarm.nodes) * 2:
        items.append(swarm.publish(peer))
        swarm.run(0.08)  # the longest latency with jitter
        assert swarm.missed(items, swarm.living) == 0
        swarm.run(0.5)


def test_the_trees_of_a_settled_swarm_carry_hardly_anything_twice() -> None:
    swarm = Swarm(32, 7, replace(LINKS, loss=0.0))
    swarm.gather()
    swarm.run(20.0)
    for _ in range(3):
        for peer in swarm.nodes:
            swarm.publish(peer)
            swarm.run(0.2)
    items, cost = announce(swarm, 40, 0.25)
    assert swarm.missed(items, swarm.living) == 0
    assert cost.payloads < 1.4
    assert cost.messages < 5


# --- deaths, and parts that come together again ----------------------------------------------------------------------


@pytest.mark.parametrize(("noticed_after_s", "most_s"), [(0.05, 0.6), (60.0, 2.0)])
def test_a_death_is_routed_around(noticed_after_s: float, most_s: float) -> None:
    """At once where the connection ends with it; after the wait for a graft where it dies silently."""
    swarm = Swarm(32, 3, replace(LINKS, loss=0.0))
    swarm.gather()
    swarm.run(20.0)
    author = PeerId("peer0")
    for _ in range(3):
        swarm.publish(author)
        swarm.run(1.0)
    victims = sorted(swarm.nodes[author].core.neighbours)[:3]
    for victim in victims:
        swarm.kill(victim, noticed_after_s)
    swarm.run(0.2)
    swarm.slowest_s = 0.0
    item = swarm.publish(author)
    swarm.run(5.0)
    assert swarm.missed([item], swarm.living) == 0
    assert swarm.slowest_s < most_s


@pytest.mark.parametrize("size", [8, 32, 64])
def test_parted_halves_that_meet_again_are_one_swarm(size: int) -> None:
    swarm = Swarm(size, size)
    swarm.gives_all = True
    swarm.gather()
    swarm.run(20.0)
    peers = list(swarm.nodes)
    swarm.network.partition([peers[::2]])
    for node in swarm.living:
        for other in [peer for peer in node.connected if not swarm.network.can_reach(node.peer, peer)]:
            swarm.network.at(3.0, swarm.parted, node.peer, other)
    items, _ = announce(swarm, 20, 0.5)
    swarm.run(60.0)  # both halves close up: every view is full of members of its own half
    assert swarm.missed(items, swarm.living) > 0

    swarm.network.heal()
    swarm.run(120.0)
    assert swarm.missed(items, swarm.living) == 0
    items, cost = announce(swarm, 20, 0.5)
    assert swarm.missed(items, swarm.living) == 0
    assert cost.messages <= 16


# --- liars -----------------------------------------------------------------------------------------------------------


def invented_id(swarm: Swarm) -> ItemId:
    return b"\xff" + swarm.network.rng.randbytes(15)


def invented_peers(swarm: Swarm, count: int) -> tuple[PeerId, ...]:
    return tuple([PeerId(f"invented{swarm.network.rng.randrange(10**9)}") for _ in range(count)])


def announces_what_never_comes(swarm: Swarm, liar: Node, target: PeerId) -> Control:
    real = list(liar.held)[-8:]
    return Control(have=(*[invented_id(swarm) for _ in range(MAX_HAVE // 8)], *real))


def invents_members(swarm: Swarm, liar: Node, target: PeerId) -> Control:
    walks = tuple([Walk(peer, MAX_STEPS) for peer in invented_peers(swarm, 4)])
    sample = invented_peers(swarm, MAX_SAMPLE)
    return Control(walks=walks, shuffle=sample, shuffle_reply=invented_peers(swarm, MAX_SAMPLE))


def prunes_everybody(swarm: Swarm, liar: Node, target: PeerId) -> Control:
    return Control(prune=tuple(liar.held)[-MAX_WANT:])


def wants_everything(swarm: Swarm, liar: Node, target: PeerId) -> Control:
    return Control(want=tuple(liar.held)[-MAX_WANT:])


def grafts_everything(swarm: Swarm, liar: Node, target: PeerId) -> Control:
    return Control(graft=tuple(liar.held)[-MAX_WANT:])


def comes_and_goes(swarm: Swarm, liar: Node, target: PeerId) -> Control:
    is_neighbour = liar.peer in swarm.nodes[target].core.neighbours
    return Control(disconnect=True) if is_neighbour else Control(neighbour=Ask.JOIN)


def keeps_all_to_itself(outputs: list[Output]) -> list[Output]:
    return [output for output in outputs if not isinstance(output, Push)]


@pytest.mark.parametrize(
    "lie",
    [
        announces_what_never_comes,
        invents_members,
        prunes_everybody,
        wants_everything,
        grafts_everything,
        comes_and_goes,
    ],
)
def test_a_tenth_of_liars_keeps_nobody_from_hearing_news(lie: Callable[[Swarm, Node, PeerId], Control]) -> None:
    """The liars also pass nothing on."""
    swarm = Swarm(40, 11)
    swarm.gather()
    swarm.run(10.0)
    liars = [swarm.nodes[PeerId(f"peer{number}")] for number in range(5, 40, 10)]
    honest = [node for node in swarm.living if node not in liars]

    def tell_lies(liar: Node) -> None:
        for target in sorted(liar.connected):
            swarm.network.send(
                liar.peer, target, 1, swarm.nodes[target].receive_tell, liar.peer, lie(swarm, liar, target)
            )
        swarm.network.at(0.2, tell_lies, liar)

    for liar in liars:
        liar.censor = keeps_all_to_itself
        tell_lies(liar)
    items = []
    for number in range(60):
        items.append(swarm.publish(honest[number % len(honest)].peer))
        swarm.run(0.25)
    swarm.run(5.0)
    assert swarm.missed(items, honest) == 0
    assert swarm.slowest_s < 3.0
    for node in honest:
        statistics = node.core.statistics()
        assert statistics.missing <= 6 * 512
        assert statistics.passive <= 45
        assert statistics.neighbours >= 3
    # An honest node that nobody troubles spends 11 messages; what is said to liars comes on top, and is bounded too.
    assert swarm.messages / (len(items) * len(swarm.nodes)) <= 40
    assert swarm.failed_dials <= 12 * len(honest)


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("SHOAL_SIM_PEERS" not in os.environ, reason="by hand: SHOAL_SIM_PEERS=1000,10000 pytest -s …")
def test_thousands_of_peers() -> None:
    for size in map(int, os.environ.get("SHOAL_SIM_PEERS", "").split(",")):
        began = time.process_time()
        swarm = Swarm(size, size)
        swarm.gather(within_s=20.0)
        swarm.run(40.0)
        before, events = time.process_time(), swarm.network.num_events
        items, cost = announce(swarm, 40, 0.25)
        took = time.process_time() - before
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = (swarm.network.num_events - events) / took
        print(
            f"{size} peers: missed {swarm.missed(items, swarm.living)}, {cost.messages:.1f} messages and "
            f"{cost.payloads:.1f} payloads per announcement and node, slowest {swarm.slowest_s:.2f} s; processor time "
            f"{before - began:.0f} s to gather, {took:.0f} s for the rest at {rate:,.0f} events/s, {memory:.2f} GiB"
        )
        assert swarm.missed(items, swarm.living) == 0
        assert cost.messages <= 16
