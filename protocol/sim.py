"""A seeded network of many peers in one process: latency, rate, loss, churn, partitions, clocks.

Cores are driven on it as shells drive them on the wire, only that the clock is a heap of events, so the same seed
gives the same run to the last event. It knows nothing of what is sent: a message is a number of bytes and a function
that is called when it arrives. The model is iroh-gossip's simulator
(https://github.com/n0-computer/iroh-gossip, ``src/proto/sim.rs``), shipped as product like it.

A message leaves when its sender's uplink is free, takes the latency of its pair (drawn once, the same both ways) and
some jitter, and never overtakes another on its link. What is on its way when its receiver dies, or its sender is parted
from it before it was sent, is lost. Whoever is killed loses its timers too.

It must carry tens of millions of events, so an event is a bare tuple in a heap, and a link a short list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import Any, Final

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId

FETCH_RESEND_S: Final = 1.0
"""How much later a fetched part comes that was lost, where the links themselves send nothing again."""

_Act = Callable[..., object]
_Event = tuple[float, int, _Act, tuple[Any, ...], "_Host | None", int]
"""When, in what order, what to call with what, and whose it is in which life of its."""


@dataclass(frozen=True, slots=True)
class Links:
    """What the links between peers are like.

    Attributes:
        latency_s: one way, of the fastest pair.
        latency_spread_s: how much more the slowest pair takes; a pair keeps its latency.
        jitter_s: how much longer than its pair's latency a message may take.
        loss: the share of messages that are lost.
        resend_s: None: what is lost never comes, as in datagrams. Otherwise it comes so much later (again with that
            chance of loss), and what was sent after it on the same link waits for it, as in a stream.
    """

    latency_s: float = 0.05
    latency_spread_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    resend_s: float | None = None

    def __post_init__(self) -> None:
        if min(self.latency_s, self.latency_spread_s, self.jitter_s) < 0 or not 0 <= self.loss < 1:
            raise UsageError("latencies are not negative and loss is at least 0 and below 1")
        if self.resend_s is not None and self.resend_s <= 0:
            raise UsageError("resend_s is more than 0; leave it out if what is lost never comes")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a peer sent, or all peers together.

    Attributes:
        messages: handed to the network.
        num_bytes: of these messages.
        lost: of them, by loss, or because the receiver was dead or parted from the sender when they were sent.
    """

    messages: int
    num_bytes: int
    lost: int


class _Link:
    """One direction of a pair."""

    __slots__ = ("host", "latency_s", "quiet_at")

    def __init__(self, host: _Host, latency_s: float) -> None:
        self.host = host  # the receiver
        self.latency_s = latency_s
        self.quiet_at = 0.0  # when the last message sent so far arrives


class _Host:
    """A peer's end of all of its links."""

    __slots__ = (
        "bulk_free_at",
        "clock_offset_s",
        "clock_rate",
        "free_at",
        "group",
        "is_alive",
        "life",
        "links",
        "lost",
        "messages",
        "num_bytes",
        "peer",
        "s_per_byte",
    )

    def __init__(self, peer: PeerId, uplink_bytes_per_s: float, clock_offset_s: float, clock_rate: float) -> None:
        self.peer = peer
        self.s_per_byte = 1.0 / uplink_bytes_per_s
        self.clock_offset_s = clock_offset_s
        self.clock_rate = clock_rate
        self.free_at = 0.0
        self.bulk_free_at = 0.0
        self.group = 0
        self.is_alive = True
        self.life = 0
        self.links: dict[PeerId, _Link] = {}
        self.messages = 0
        self.num_bytes = 0
        self.lost = 0


class Network:
    """Peers, what is on its way between them, and the time.

    Attributes:
        now: seconds since the start.
        rng: all chance of the run; use it for everything random outside the network too.
        num_events: how many were carried out.
    """

    __slots__ = ("_hosts", "_links", "_order", "_queue", "_seed", "now", "num_events", "rng")

    def __init__(self, seed: int, links: Links | None = None) -> None:
        self.now = 0.0
        self.rng = Random(seed)  # noqa: S311 - a simulation is to be repeatable, not secret
        self.num_events = 0
        self._seed = seed
        self._links = links or Links()
        self._hosts: dict[PeerId, _Host] = {}
        self._queue: list[_Event] = []
        self._order = 0

    # --- peers -------------------------------------------------------------------------------------------------------

    def add(
        self,
        peer: PeerId,
        *,
        uplink_bytes_per_s: float = inf,
        clock_offset_s: float = 0.0,
        clock_rate: float = 1.0,
    ) -> None:
        """A new peer, alive and connected to nobody in particular.

        Args:
            peer: its name.
            uplink_bytes_per_s: how fast it sends, over all of its links together.
            clock_offset_s: what its clock shows at time 0.
            clock_rate: seconds that its clock goes on in one.

        Raises:
            UsageError: if there is one of this name, or a rate is not positive.
        """
        if peer in self._hosts:
            raise UsageError(f"{peer} is in the network already; revive it if it was killed")
        if uplink_bytes_per_s <= 0 or clock_rate <= 0:
            raise UsageError("an uplink and a clock have rates above 0")
        self._hosts[peer] = _Host(peer, uplink_bytes_per_s, clock_offset_s, clock_rate)

    def kill(self, peer: PeerId) -> None:
        """End a peer without a word: its timers and what is on its way to it are gone. Dead ones stay dead."""
        host = self._hosts[peer]
        host.is_alive = False
        host.life += 1

    def revive(self, peer: PeerId) -> None:
        """Let a killed peer send and receive again; its timers are for the caller to set anew."""
        host = self._hosts[peer]
        host.is_alive = True
        host.free_at = host.bulk_free_at = self.now

    def is_alive(self, peer: PeerId) -> bool:
        """Whether a peer is in the network and was not killed."""
        host = self._hosts.get(peer)
        return host is not None and host.is_alive

    def can_reach(self, source: PeerId, target: PeerId) -> bool:
        """Whether both are alive and not parted."""
        one, other = self._hosts[source], self._hosts[target]
        return one.is_alive and other.is_alive and one.group == other.group

    def partition(self, groups: Iterable[Iterable[PeerId]]) -> None:
        """Part the network: messages are lost between these groups; whoever is in none is in one more with the rest."""
        self.heal()
        for number, group in enumerate(groups, start=1):
            for peer in group:
                self._hosts[peer].group = number

    def heal(self) -> None:
        """End the partition."""
        for host in self._hosts.values():
            host.group = 0

    def latency_s(self, source: PeerId, target: PeerId) -> float:
        """One way, without jitter and queues; the same both ways."""
        spread = self._links.latency_spread_s
        if not spread:
            return self._links.latency_s
        pair = f"{self._seed} {min(source, target)} {max(source, target)}".encode()
        draw = int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest(), "big") / 2**64
        return self._links.latency_s + spread * draw

    # --- time --------------------------------------------------------------------------------------------------------

    def clock(self, peer: PeerId) -> float:
        """What this peer's own clock shows now, in seconds."""
        host = self._hosts[peer]
        return host.clock_offset_s + self.now * host.clock_rate

    def at(self, delay_s: float, act: _Act, *args: Any, of: PeerId | None = None) -> None:
        """Call ``act(*args)`` after so many seconds; if it is a timer ``of`` a peer, only while that peer lives on."""
        host = None if of is None else self._hosts[of]
        life = 0
        if host is not None:
            if not host.is_alive:
                return
            life = host.life
        self._order = order = self._order + 1
        heappush(self._queue, (self.now + max(0.0, delay_s), order, act, args, host, life))

    def wake(self, peer: PeerId, at: float, act: _Act, *args: Any) -> None:
        """Call ``act(*args)`` when this peer's own clock shows ``at``, if it lives on until then."""
        host = self._hosts[peer]
        if host.is_alive:
            due = (at - host.clock_offset_s) / host.clock_rate
            self._order = order = self._order + 1
            heappush(self._queue, (max(self.now, due), order, act, args, host, host.life))

    def send(self, source: PeerId, target: PeerId, num_bytes: int, deliver: _Act, *args: Any) -> None:
        """Send a message: ``deliver(*args)`` is called when it arrives, if it does. Nobody is told if it does not."""
        host = self._hosts[source]
        if not host.is_alive:
            return
        host.messages += 1
        host.num_bytes += num_bytes
        link = host.links.get(target)
        if link is None:
            link = host.links[target] = _Link(self._hosts[target], self.latency_s(source, target))
        receiver = link.host
        links = self._links
        now = self.now
        leaves_at = host.free_at
        if leaves_at < now:
            leaves_at = now
        host.free_at = leaves_at = leaves_at + num_bytes * host.s_per_byte
        if receiver.group != host.group or not receiver.is_alive:
            host.lost += 1
            return
        arrives_at = leaves_at + link.latency_s
        if links.jitter_s:
            arrives_at += links.jitter_s * self.rng.random()
        loss = links.loss
        if loss:
            random = self.rng.random
            while random() < loss:
                if links.resend_s is None:
                    host.lost += 1
                    return
                arrives_at += links.resend_s
        if arrives_at < link.quiet_at:
            arrives_at = link.quiet_at
        else:
            link.quiet_at = arrives_at
        self._order = order = self._order + 1
        heappush(self._queue, (arrives_at, order, deliver, args, receiver, receiver.life))

    def fetch(
        self, target: PeerId, source: PeerId, ask_bytes: int, num_bytes: int, deliver: _Act, *args: Any
    ) -> float | None:
        """Ask for bytes and get them, as one event: ``deliver(*args)`` is called when they are here.

        What one peer gives in this way goes out one after the other at its uplink's rate, beside its messages, which
        are small and need not wait for it.

        Returns:
            in how many seconds they come; None if they never do, because one is dead or parted from the other.
        """
        asker, host = self._hosts[target], self._hosts[source]
        if not asker.is_alive or not host.is_alive or asker.group != host.group:
            return None
        link = host.links.get(target)
        if link is None:
            link = host.links[target] = _Link(asker, self.latency_s(source, target))
        asker.messages += 1
        asker.num_bytes += ask_bytes
        host.messages += 1
        host.num_bytes += num_bytes
        leaves_at = self.now + link.latency_s
        if leaves_at < host.bulk_free_at:
            leaves_at = host.bulk_free_at
        host.bulk_free_at = leaves_at = leaves_at + num_bytes * host.s_per_byte
        arrives_at = leaves_at + link.latency_s
        links, random = self._links, self.rng.random
        if links.jitter_s:
            arrives_at += links.jitter_s * random()
        if links.loss:
            while random() < links.loss:
                arrives_at += FETCH_RESEND_S if links.resend_s is None else links.resend_s
        self._order = order = self._order + 1
        heappush(self._queue, (arrives_at, order, deliver, args, asker, asker.life))
        return arrives_at - self.now

    def step(self) -> bool:
        """Carry out the next event; False if there is none."""
        if not self._queue:
            return False
        self.now, _, act, args, host, life = heappop(self._queue)
        if host is None or host.life == life:
            self.num_events += 1
            act(*args)
        return True

    def run(self, until: float) -> None:
        """Carry out every event up to this time, its own included; then it is that time."""
        queue, pop = self._queue, heappop
        done = 0
        while queue and queue[0][0] <= until:
            self.now, _, act, args, host, life = pop(queue)
            if host is None or host.life == life:
                done += 1
                act(*args)
        self.num_events += done
        self.now = max(self.now, until)

    # --- counters ----------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Events in the queue: timers and messages on their way."""
        return len(self._queue)

    def traffic(self, peer: PeerId | None = None) -> Traffic:
        """What one peer sent so far, or all together."""
        hosts = self._hosts.values() if peer is None else [self._hosts[peer]]
        return Traffic(
            messages=sum(host.messages for host in hosts),
            num_bytes=sum(host.num_bytes for host in hosts),
            lost=sum(host.lost for host in hosts),
        )
