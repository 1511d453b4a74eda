"""Many `TreeFetch`es and links of unlike rates between them, in one seeded simulation.

A link serves what is asked for in order, a block at a time: a block takes the sender's uplink, then the receiver's
downlink, then the latency. Whoever leaves says nothing; those that asked it notice after `LOST_S`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from shoal.dht import tree_fetch as core
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import BLOCK_BYTES

LATENCY_S = 0.03
LOST_S = 2.0


@dataclass(slots=True, eq=False)
class Peer:
    name: PeerId
    up: float  # bytes per second
    down: float
    fetch: core.TreeFetch
    up_free_at: float = 0.0
    down_free_at: float = 0.0
    is_there: bool = True
    done_at: float | None = None
    wake: int = 0
    sent: int = 0
    called_off: set[tuple[PeerId, int]] = field(default_factory=set)


class Swarm:
    def __init__(self, seed: int, num_peers: int, num_blocks: int, *, degree: int = 12, leave: float = 0.0) -> None:
        self.rng = Random(seed)
        self.num_blocks = num_blocks
        self.now = 0.0
        self.num_events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        names = [PeerId(f"peer{number}") for number in range(num_peers)]
        known: dict[PeerId, set[PeerId]] = {name: set() for name in names}
        for name in names:
            for other in self.rng.sample(names, degree // 2):
                if other != name:
                    known[name].add(other)
                    known[other].add(name)
        self.peers: dict[PeerId, Peer] = {}
        for number, name in enumerate(names):
            up = 10e6 if number == 0 else 1e6 * 10 ** self.rng.random()
            here = (1 << num_blocks) - 1 if number == 0 else 0
            fetch = core.TreeFetch(num_blocks, here, sorted(known[name]), Random(self.rng.random()))
            self.peers[name] = Peer(name, up, 4 * up, fetch)
        self.leavers = self.rng.sample(names[1:], int(leave * num_peers))
        for peer in self.peers.values():
            self._at(self.rng.random(), lambda peer=peer: self._tell(peer, core.Tick()))

    def bound_s(self) -> float:
        """What the links allow at best (Kumar and Ross, "Peer-Assisted File Distribution", 2006), of those who stay."""
        stay = [peer for peer in self.peers.values() if peer.name not in self.leavers]
        size = self.num_blocks * BLOCK_BYTES
        up = sum(peer.up for peer in stay)
        return max(size / stay[0].up, size / min(peer.down for peer in stay[1:]), (len(stay) - 1) * size / up)

    def run(self, until: float = 1e5) -> float:
        """When the last one of those who stay has all of it."""
        bound = self.bound_s()
        for name in self.leavers:
            self._at(self.rng.uniform(0.1, 0.9) * bound, lambda name=name: self._leave(name))
        left = {name for name in self.peers if name not in self.leavers}
        while self._queue and self.now < until and left:
            self.now, _, act = heapq.heappop(self._queue)
            self.num_events += 1
            act()
            if self.num_events % 256 == 0:
                left = {name for name in left if self.peers[name].done_at is None}
        return max(self.peers[name].done_at or float("inf") for name in self.peers if name not in self.leavers)

    def _at(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(at, self.now), next(self._order), act))

    def _leave(self, name: PeerId) -> None:
        self.peers[name].is_there = False
        for peer in self.peers.values():
            self._at(self.now + LOST_S, lambda peer=peer: self._tell(peer, core.SourceLost(name)))

    def _tell(self, peer: Peer, event: core.Event) -> None:
        if not peer.is_there:
            return
        for output in peer.fetch.handle(event, self.now):
            match output:
                case core.AskHave(source):
                    self._at(self.now + LATENCY_S, lambda peer=peer, source=source: self._say_have(peer, source))
                case core.Request():
                    peer.called_off.discard((output.source, output.start))
                    self._at(self.now + LATENCY_S, lambda peer=peer, output=output: self._serve(peer, output))
                case core.CallOff(source, start):
                    peer.called_off.add((source, start))
                case core.Wake(at):
                    peer.wake += 1
                    self._at(at, lambda peer=peer, number=peer.wake: self._wake(peer, number))
                case core.Done():
                    peer.done_at = self.now
                case core.Drop() | core.Failed():
                    raise AssertionError(output)

    def _wake(self, peer: Peer, number: int) -> None:
        if number == peer.wake:
            self._tell(peer, core.Tick())

    def _say_have(self, peer: Peer, source: PeerId) -> None:
        other = self.peers[source]
        if other.is_there:
            event = core.HaveArrived(source, other.fetch.here)
            self._at(self.now + LATENCY_S, lambda: self._tell(peer, event))

    def _serve(self, peer: Peer, request: core.Request, number: int = 0) -> None:
        """Send the next block of a request, then go on."""
        source = self.peers[request.source]
        if not source.is_there:
            return
        if (request.source, request.start) in peer.called_off or number == request.count:
            came = tuple(range(request.start, request.start + number))
            failure = "" if number == request.count else "called off"
            event = core.Answered(request.source, request.start, came, failure)
            self._at(max(self.now, peer.down_free_at), lambda: self._tell(peer, event))
            return
        sent_at = max(self.now, source.up_free_at) + BLOCK_BYTES / source.up
        source.up_free_at = sent_at
        source.sent += 1
        peer.down_free_at = max(sent_at, peer.down_free_at + BLOCK_BYTES / peer.down)
        self._at(sent_at, lambda: self._serve(peer, request, number + 1))
