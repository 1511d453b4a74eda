"""The real gossip core on the seeded network: everybody hears all, at a cost that does not grow with the swarm."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from shoal.crdt.gossip import (
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Event,
    Gossip,
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
        self.refuses: Callable[[list[Output]], list[Output]] | None = None

    def handle(self, event: Event) -> None:
        outputs = self.core.handle(event, self.swarm.network.now)
        if self.refuses is not None:
            outputs = self.refuses(outputs)
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
        for other in list(self.nodes[peer].connected):
            self.network.at(noticed_after_s, self.parted, peer, other)

    # --- what is measured ---

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if self.network.is_alive(node.peer)]

    def publish(self, peer: PeerId) -> Item:
        self.num_items += 1
        item = Item(self.num_items.to_bytes(16, "big"), f"{peer}/facts", peer)
        self.nodes[peer].publish(item)
        return item

    def missed(self, items: list[Item], nodes: list[Node]) -> int:
        return sum(item.id not in node.held for node in nodes for item in items)

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


if __name__ == "__main__":
    for n in (2, 3, 5, 7, 8, 32, 128, 256):
        t0 = time.time()
        swarm = Swarm(n, 1)
        swarm.gather()
        swarm.run(20.0)
        gathered = swarm.messages
        degrees = Counter(len(node.core.neighbours) for node in swarm.nodes.values())
        asym = sum(node.peer not in swarm.nodes[p].core.neighbours for node in swarm.nodes.values() for p in node.core.neighbours)
        items, cost = announce(swarm, 40, 0.5)
        print(n, "missed", swarm.missed(items, swarm.living), cost, "gather", gathered / n, sorted(degrees.items()), "asym", asym, "ev", swarm.network.num_events, round(time.time() - t0, 2))
