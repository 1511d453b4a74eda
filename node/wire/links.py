"""Which stream carries what, to every connected peer.

Unary calls of a pair share one stream: the calls lane where it stands, else a libp2p stream. Each streaming call has a
libp2p stream of its own, so that it never blocks a small call. Large transfers go by bulk lanes or, without a direct
path, by a libp2p stream (`shoal.node.wire.bulk`). Whoever uses this sees none of that: the same calls work either way.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import trio

from shoal.node.budgets import Memory
from shoal.node.metrics import Metrics
from shoal.node.supervise import Domain, Policy
from shoal.node.wire.bulk import Bulk
from shoal.node.wire.channel import Account, ByteStream, Channel, Router, StreamClosedError, UnknownProtocolError
from shoal.node.wire.contracts import LaneInvitation, LaneRequest, LaneService
from shoal.node.wire.lanes import LaneDoor, LaneError, LaneKind, LaneTicket, Pace, Socket, TlsByteStream, dial_lane
from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_STREAMS
from shoal.protocol.retry import wait_before_retry
from shoal.protocol.services import Caller, Empty, Method, client, current_call

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")

RPC_PROTOCOL: Final = "/shoal/rpc/2"
STREAM_PROTOCOL: Final = "/shoal/stream/1"
BULK_PROTOCOL: Final = "/shoal/bulk/1"

LANE_TIMEOUT_S: Final = 5.0
LANE_RETRY_MIN_S: Final = 1.0
LANE_RETRY_MAX_S: Final = 60.0
FAR_AWAY_S: Final = 0.002
"""A round trip above which several bulk lanes are better than one: a lone flow gets less of a long or a shared link."""
MAX_BULK_LANES: Final = 4
DRAIN_S: Final = 1.0
LET_GO_S: Final = 600.0
"""How long a call may take that is under way when a better path comes."""

_chance = random.Random()  # noqa: S311  jitter, not a secret


class Paths(Protocol):
    """What the links need of the host."""

    def is_connected(self, peer: PeerId) -> bool:
        """Whether any connection stands."""

    def dialed_address(self, peer: PeerId) -> tuple[str, int] | None:
        """IP and TCP port of a peer that this node reaches directly; None if the peer dialed, or by way of others."""

    def rtt_s(self, peer: PeerId) -> float | None:
        """The last measured round trip."""

    def is_local(self, peer: PeerId) -> bool:
        """Whether the peer is on this machine, where compressing costs more than it saves."""

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        """A new libp2p stream, or `StreamClosedError`."""

    def lost_by_its_relay(self, peer: PeerId) -> bool:
        """Whether a peer is gone only because the relay in between is."""

    async def come_back(self, peer: PeerId, deadline: float) -> bool:
        """Reach such a peer again; whether it is back."""


@dataclass(slots=True)
class _Link:
    """One peer."""

    domain: Domain
    account: Account
    opening: trio.Lock = field(default_factory=trio.Lock)
    stream: Channel | None = None
    lane: Channel | None = None
    num_streams: int = 0
    has_lane_keeper: bool = False
    channels: set[Channel] = field(default_factory=set)
    awaited_lanes: deque[trio.MemorySendChannel[ssl.SSLSocket]] = field(default_factory=deque)

    def channel(self) -> Channel | None:
        """What carries unary calls now."""
        if self.lane is not None and self.lane.is_open:
            return self.lane
        if self.stream is not None and self.stream.is_open:
            return self.stream
        return None


class Links:
    """The streams to all peers. `close` ends them."""

    def __init__(
        self,
        paths: Paths,
        router: Router,
        domain: Domain,
        *,
        lanes: bool = True,
        memory: Memory | None = None,
        pace: Callable[[PeerId], Pace] | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.bulk = Bulk(self)
        self._paths = paths
        self._router = router
        self._domain = domain
        self._lanes = lanes
        self._memory = memory
        self._pace = pace
        self._is_draining = False
        self._door = LaneDoor()
        self._links: dict[PeerId, _Link] = {}
        router.add(_LaneCalls(self))
        domain.start_soon("closing idle lanes", self.bulk.reap, policy=Policy.RESTART)
        domain.start_soon("measuring the uplink", self.bulk.uplink.watch, policy=Policy.RESTART)

    def at(self, peer: PeerId) -> Caller:
        """What carries calls to a peer."""
        return _PeerCaller(self, peer)

    def is_connected(self, peer: PeerId | None) -> bool:
        """Whether there is any way to a peer now."""
        return peer in self._links

    async def comes_back(self, peer: PeerId, deadline: float) -> bool:
        """Wait for a peer that is gone with its relay; False if that is not why, or it is not back in time."""
        return self._paths.lost_by_its_relay(peer) and await self._paths.come_back(peer, deadline)

    def is_moving(self, peer: PeerId, since: float) -> bool:
        """Whether calls brought anything from a peer since then, or it still takes what waited then."""
        link = self._links.get(peer)
        return link is not None and any(channel.is_moving(since) for channel in link.channels)

    def heard_at(self, peer: PeerId) -> float:
        """When calls brought anything from a peer last; minus infinity if they have not."""
        link = self._links.get(peer)
        return -math.inf if link is None else max((channel.read_at for channel in link.channels), default=-math.inf)

    def transport(self, peer: PeerId) -> str:
        """What carries unary calls to a peer now: ``lane``, ``libp2p`` or nothing yet (empty)."""
        link = self._links.get(peer)
        if link is None or link.channel() is None:
            return ""
        return "lane" if link.channel() is link.lane else "libp2p"

    def peer_up(self, peer: PeerId) -> None:
        """A first connection stands."""
        link = self._link_of(peer)
        if self._lanes and self._paths.dialed_address(peer) is not None:
            link.domain.start_soon("keeping a lane", self._keep_calls_lane, peer, link, policy=Policy.RESTART)

    def path_changed(self, peer: PeerId) -> None:
        """Another connection is the best now: what begins goes by it, what is under way ends where it is."""
        link = self._links.get(peer)
        if link is None:
            return
        old, link.stream = link.stream, None
        if old is not None:
            link.domain.start_soon("letting a stream go", self._let_go, old, policy=Policy.DROP)
        if self._lanes and not link.has_lane_keeper and self._paths.dialed_address(peer) is not None:
            link.domain.start_soon("keeping a lane", self._keep_calls_lane, peer, link, policy=Policy.RESTART)

    async def _let_go(self, channel: Channel) -> None:
        """Stop a channel when the calls that are under way on it are over."""
        with trio.move_on_after(LET_GO_S):
            await channel.retire()
        channel.stop()

    def peer_down(self, peer: PeerId) -> None:
        """The last connection is gone."""
        link = self._links.pop(peer, None)
        if link is not None:
            for channel in list(link.channels):
                channel.stop()
            link.domain.cancel()
            self.bulk.drop_peer(peer)

    async def close(self) -> None:
        """Let the calls under way be answered, then end everything; takes at most about `DRAIN_S`."""
        self._is_draining = True
        with trio.move_on_after(DRAIN_S):
            async with trio.open_nursery() as nursery:
                for link in self._links.values():
                    for channel in list(link.channels):
                        nursery.start_soon(channel.drain)
        for peer in list(self._links):
            self.peer_down(peer)
        await self.bulk.aclose()

    # --- streams ---

    def open_channel(self, peer: PeerId) -> Channel | None:
        """The channel for unary calls, if there is one already."""
        link = self._links.get(peer)
        return None if link is None else link.channel()

    async def channel(self, peer: PeerId) -> Channel:
        """The channel for unary calls.

        Raises:
            RemoteError: UNAVAILABLE if the peer is not connected.
        """
        link = self._link(peer)
        async with link.opening:
            channel = link.channel()
            if channel is None:
                channel = link.stream = await self._dial_stream(peer, link, RPC_PROTOCOL)
            return channel

    async def dedicated_channel(self, peer: PeerId) -> Channel:
        """A channel for one streaming call; stop it afterwards.

        Raises:
            RemoteError: UNAVAILABLE if the peer is not connected.
        """
        return await self._dial_stream(peer, self._link(peer), STREAM_PROTOCOL)

    async def serve_stream(self, peer: PeerId, protocol: str, stream: ByteStream) -> None:
        """Run a stream that a peer opened, until it ends."""
        if self._is_draining or not self._paths.is_connected(peer):
            await stream.close()
            return
        link = self._link_of(peer)
        if link.num_streams >= MAX_STREAMS:
            log.warning("%s opens more than %d streams; one is closed", peer, MAX_STREAMS)
            await stream.close()
            return
        link.num_streams += 1
        try:
            if protocol == BULK_PROTOCOL:
                await self.bulk.serve_stream(peer, stream)
                return
            channel = self._new_channel(peer, link, stream)
            if protocol == RPC_PROTOCOL:
                link.stream = channel
            await self._run(link, channel)
        finally:
            link.num_streams -= 1

    def _link(self, peer: PeerId) -> _Link:
        if not self._paths.is_connected(peer):
            raise RemoteError(Status.UNAVAILABLE, f"{peer} is not connected")
        return self._link_of(peer)

    def _link_of(self, peer: PeerId) -> _Link:
        link = self._links.get(peer)
        if link is None:
            purse = None if self._memory is None else self._memory.purse(peer)
            link = self._links[peer] = _Link(self._domain.inside("peer", peer), Account(purse=purse))
        return link

    async def _dial_stream(self, peer: PeerId, link: _Link, protocol: str) -> Channel:
        try:
            stream = await self._paths.open_stream(peer, protocol)
        except UnknownProtocolError as error:
            raise RemoteError(Status.UNIMPLEMENTED, str(error)) from error
        except StreamClosedError as error:
            raise RemoteError(Status.UNAVAILABLE, f"no stream to {peer}: {error}") from error
        if link.domain.is_over:
            await stream.close()
            raise RemoteError(Status.UNAVAILABLE, f"{peer} went away while a stream to it was opened")
        channel = self._new_channel(peer, link, stream)
        link.domain.start_soon("running a stream", self._run, link, channel, policy=Policy.DROP)
        return channel

    def _new_channel(self, peer: PeerId, link: _Link, stream: ByteStream) -> Channel:
        compress = not self._paths.is_local(peer)
        return Channel(stream, peer, self._router, account=link.account, metrics=self.metrics, compress=compress)

    async def _run(self, link: _Link, channel: Channel) -> None:
        link.channels.add(channel)
        try:
            await channel.run()
        finally:
            link.channels.discard(channel)

    # --- lanes ---

    async def accept_lane(self, sock: Socket, ip: str) -> None:
        """Take in a TLS connection to this node's port, from this address."""
        accepted = await self._door.accept(sock, ip)
        if accepted is None:
            return
        peer, kind, tls = accepted
        link = self._links.get(peer)
        if link is None:
            tls.close()
        elif kind is LaneKind.CALLS:
            await self._run_calls_lane(peer, link, tls)
        elif kind is LaneKind.BULK:
            await self.bulk.serve_lane(peer, tls)
        elif link.awaited_lanes:
            link.awaited_lanes.popleft().send_nowait(tls)
        else:
            tls.close()

    async def _keep_calls_lane(self, peer: PeerId, link: _Link) -> None:
        """Have a calls lane to a peer that this node reaches directly, as long as it does."""
        if link.has_lane_keeper:
            return
        link.has_lane_keeper = True
        wait_s = LANE_RETRY_MIN_S
        try:
            while self._links.get(peer) is link and self._paths.dialed_address(peer) is not None:
                began = trio.current_time()
                try:
                    tls = await self._dial_lane(peer, LaneKind.CALLS)
                    await self._run_calls_lane(peer, link, tls)
                except (RemoteError, LaneError) as error:
                    log.debug("no lane to %s: %s", peer, error)
                    if isinstance(error, RemoteError) and error.status is Status.UNIMPLEMENTED:
                        return
                has_stood = trio.current_time() - began > LANE_RETRY_MAX_S
                wait_s = LANE_RETRY_MIN_S if has_stood else min(2 * wait_s, LANE_RETRY_MAX_S)
                await trio.sleep(wait_s * _chance.uniform(0.5, 1))
        finally:
            link.has_lane_keeper = False

    async def _run_calls_lane(self, peer: PeerId, link: _Link, tls: ssl.SSLSocket) -> None:
        if self._is_draining or self._links.get(peer) is not link:
            tls.close()  # the peer went away while the lane was dialed
            return
        if link.num_streams >= MAX_STREAMS:
            log.warning("%s opens more than %d streams and lanes; one is closed", peer, MAX_STREAMS)
            tls.close()
            return
        link.num_streams += 1
        lane = TlsByteStream(tls, None if self._pace is None else self._pace(peer))
        channel = link.lane = self._new_channel(peer, link, lane)
        try:
            await self._run(link, channel)
        finally:
            link.num_streams -= 1
            if link.lane is channel:
                link.lane = None

    async def _dial_lane(self, peer: PeerId, kind: LaneKind) -> ssl.SSLSocket:
        address = self._paths.dialed_address(peer)
        if address is None:
            raise LaneError(f"{peer} is not reached directly")
        ticket = await client(LaneService, self.at(peer), timeout_s=LANE_TIMEOUT_S).ticket(LaneRequest(kind))
        return await dial_lane(*address, ticket, kind, timeout_s=LANE_TIMEOUT_S)

    # What the bulk transfers need, and what peers ask for.

    def num_lanes(self, peer: PeerId) -> int:
        """How many bulk lanes to use at most."""
        rtt_s = self._paths.rtt_s(peer)
        return 1 if rtt_s is not None and rtt_s < FAR_AWAY_S else MAX_BULK_LANES

    async def dial_bulk_lane(self, peer: PeerId) -> ssl.SSLSocket | None:
        """A lane by which to pull from a peer; None if there is no direct path."""
        link = self._links.get(peer)
        if link is None or not self._lanes:
            return None
        try:
            if self._paths.dialed_address(peer) is not None:
                return await self._dial_lane(peer, LaneKind.BULK)
            return await self._invite_lane(peer, link)
        except (RemoteError, LaneError) as error:
            log.debug("no bulk lane to %s: %s", peer, error)
            return None

    async def open_bulk_stream(self, peer: PeerId) -> ByteStream:
        """A libp2p stream by which to pull."""
        return await self._paths.open_stream(peer, BULK_PROTOCOL)

    async def _invite_lane(self, peer: PeerId, link: _Link) -> ssl.SSLSocket:
        """Let a peer that dialed this node dial a lane, by which this node then pulls."""
        arrival, lane = trio.open_memory_channel[ssl.SSLSocket](1)
        link.awaited_lanes.append(arrival)
        try:
            with trio.fail_after(LANE_TIMEOUT_S):
                ticket = self._door.ticket(peer, LaneKind.BULK_TO_ACCEPTOR)
                invitation = LaneInvitation(LaneKind.BULK_TO_ACCEPTOR, ticket)
                await client(LaneService, self.at(peer), timeout_s=LANE_TIMEOUT_S).dial(invitation)
                return await lane.receive()
        except trio.TooSlowError as error:
            raise LaneError(f"{peer} did not dial the lane that it was asked for") from error
        finally:
            with contextlib.suppress(ValueError):
                link.awaited_lanes.remove(arrival)
            with contextlib.suppress(trio.WouldBlock):
                lane.receive_nowait().close()  # it came just when the time was over

    def sell_ticket(self, peer: PeerId, kind: LaneKind) -> LaneTicket:
        """Let a peer dial a lane."""
        if not self._lanes:
            raise RemoteError(Status.UNIMPLEMENTED, "this node has no lanes")
        return self._door.ticket(peer, kind)

    async def dial_as_asked(self, peer: PeerId, invitation: LaneInvitation) -> None:
        """Dial the lane by which a peer wants to pull."""
        if not self._lanes:
            raise RemoteError(Status.UNIMPLEMENTED, "this node has no lanes")
        address = self._paths.dialed_address(peer)
        if address is None or invitation.kind is not LaneKind.BULK_TO_ACCEPTOR:
            raise RemoteError(Status.FAILED_PRECONDITION, "there is no address to dial")
        try:
            tls = await dial_lane(*address, invitation.ticket, invitation.kind, timeout_s=LANE_TIMEOUT_S)
        except LaneError as error:
            raise RemoteError(Status.UNAVAILABLE, str(error)) from error
        link = self._links.get(peer)
        if link is None:
            tls.close()
            raise RemoteError(Status.UNAVAILABLE, "the last connection has ended")
        if not link.domain.start_soon("serving a bulk lane", self.bulk.serve_lane, peer, tls, policy=Policy.DROP):
            tls.close()


class _LaneCalls(LaneService):
    """What peers ask of the links."""

    def __init__(self, links: Links) -> None:
        self._links = links

    async def ticket(self, request: LaneRequest) -> LaneTicket:
        return self._links.sell_ticket(current_call().peer, request.kind)

    async def dial(self, request: LaneInvitation) -> Empty:
        await self._links.dial_as_asked(current_call().peer, request)
        return Empty()


class _PeerCaller:
    """Calls to one peer, by whatever stream there is; idempotent ones are tried again."""

    __slots__ = ("_links", "_peer")

    def __init__(self, links: Links, peer: PeerId) -> None:
        self._links = links
        self._peer = peer

    def call(
        self, method: Method[Request, Answer], request: Request, *, timeout_s: float | None = None
    ) -> Coroutine[Any, Any, Answer]:
        channel = self._links.open_channel(self._peer)
        if channel is not None and not method.idempotent:
            return channel.call(method, request, timeout_s=timeout_s)
        return self._call(channel, method, request, method.timeout_s if timeout_s is None else timeout_s)

    async def _call(
        self,
        channel: Channel | None,
        method: Method[Request, Answer],
        request: Request,
        timeout_s: float | None,
    ) -> Answer:
        tries, left_s = 0, timeout_s
        deadline = trio.current_time() + (math.inf if timeout_s is None else timeout_s)
        while True:
            tries += 1
            try:
                if channel is None:
                    channel, left_s = await self._open(self._links.channel, method, left_s)
                return await channel.call(method, request, timeout_s=left_s)
            except RemoteError as error:
                if not method.idempotent:
                    raise
                if error.status is Status.UNAVAILABLE and await self._links.comes_back(self._peer, deadline):
                    tries = 0
                wait_s = wait_before_retry(error.status, tries, deadline - trio.current_time(), _chance)
                if wait_s is None:
                    raise
            await trio.sleep(wait_s)
            channel = self._links.open_channel(self._peer)
            left_s = None if timeout_s is None else deadline - trio.current_time()

    async def call_with_stream(
        self, method: Method[Request, Answer], requests: AsyncIterator[Request], *, timeout_s: float | None = None
    ) -> Answer:
        channel, left_s = await self._open(self._links.dedicated_channel, method, timeout_s)
        try:
            return await channel.call_with_stream(method, requests, timeout_s=left_s)
        finally:
            channel.stop()

    async def call_for_stream(
        self,
        method: Method[Request, Answer],
        request: Request | AsyncIterator[Request],
        *,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        channel, left_s = await self._open(self._links.dedicated_channel, method, timeout_s)
        try:
            async with aclosing(channel.call_for_stream(method, request, timeout_s=left_s)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            channel.stop()

    async def _open(
        self, dial: Callable[[PeerId], Awaitable[Channel]], method: Method[Any, Any], timeout_s: float | None
    ) -> tuple[Channel, float]:
        """A channel, and how much time is left to call by it."""
        if timeout_s is None:
            timeout_s = math.inf if method.timeout_s is None else method.timeout_s
        deadline = trio.current_time() + timeout_s
        with trio.move_on_at(deadline):
            channel = await dial(self._peer)
            return channel, deadline - trio.current_time()
        raise RemoteError(Status.DEADLINE_EXCEEDED, f"no stream to {self._peer} for {method.name} in time")
