"""What a WebRTC connection does in the asyncio thread: negotiate, send, deliver, and hold the far side to its bounds.

See `shoal.node.reach.webrtc` for the picture; that module alone imports this one, when the first connection is made.

aiortc is made for far sides that one trusts as much as oneself. Here the far side is anybody, so each session
description is checked before aiortc reads it, and each SCTP chunk before aiortc handles it (`_breach_of_sctp`). And
aioice asks one STUN server, waits 5 s for it, and leaves things behind (`_repair_ice`). All this reaches for inner
names of aiortc 1.16 and aioice 0.13, and the tests fail with a version that has others.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from aioice import stun as stun_wire
from aioice.candidate import Candidate, candidate_foundation, candidate_priority
from aioice.ice import Connection as IceConnection
from aioice.ice import StunProtocol
from aiortc import RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSctpTransport, RTCSessionDescription
from aiortc import rtcsctptransport as wire
from aiortc.sdp import SessionDescription

from shoal.node.reach.webrtc_pipe import (
    GRANT_BYTES,
    MESSAGE_BYTES,
    MESSAGE_COST,
    WINDOW_BYTES,
    CreditGranted,
    PipeEnded,
    PipeNews,
    PipeOpened,
    StunServer,
    WebRtcError,
)

log = logging.getLogger(__name__)

MAX_CHUNKS: Final = 2048
"""SCTP chunks on their way in one direction; the credit lets an honest end have less than 1100."""
MIN_FRAGMENT_BYTES: Final = 512
"""No path makes shorter pieces of a message necessary, but for its last one: IPv6 carries 1280 bytes everywhere."""
MAX_DATAGRAMS: Final = 4096
MAX_SDP_BYTES: Final = 16 * 1024
MAX_CANDIDATES: Final = 32
MAX_ADDRESSES: Final = 16
MAX_STUN_SERVERS: Final = 4
MAX_ENDS: Final = 64
STUN_GRACE_S: Final = 0.05
"""The last STUN answers are awaited for so much longer than twice the time of the first."""
MAX_PENDING_S: Final = 60.0
"""From an offer or answer until somebody takes its pipe."""
LINGER_S: Final = 2.0
"""For what was written before a close to arrive."""
FIRST_RTO_S: Final = 1.0
"""Until a round trip is measured, as in TCP (RFC 6298); aiortc would wait 3 s to repeat a lost greeting."""
# SCTP's own minimum of 1 s (RFC 9260) allows for receivers that delay acknowledgements. aiortc does not delay them,
# and each second is one in which a loss at the end of a burst holds up everything.
wire.SCTP_RTO_MIN = 0.2  # type: ignore[assignment]  # made of an integer there

_CHANNEL: Final = 0
_CREDIT: Final = re.compile(r"[0-9]{1,20}", re.ASCII)
_ICE_NAME: Final = re.compile(r"[A-Za-z0-9+/]{4,256}", re.ASCII)
_ICE_PASSWORD: Final = re.compile(r"[A-Za-z0-9+/]{22,256}", re.ASCII)


class End:
    """One end of a connection.

    Attributes:
        loop: that of the thread.
        granted: the sum of costs that the far end may send up to; written by the trio side alone.
        is_taken: whether somebody has the pipe and will close it; written by the trio side alone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ends: set[End],
        addresses: Callable[[], Sequence[str]],
        tell: Callable[[PipeNews], None],
    ) -> None:
        self.loop = loop
        self.granted = WINDOW_BYTES
        self.is_taken = False
        self._ends = ends
        self._addresses = addresses
        self._tell = tell
        self._received = self._sent = 0
        self._allowed = WINDOW_BYTES
        self._is_over = self._is_cut_off = False
        self._is_channel_closed = asyncio.Event()
        self._negotiation: asyncio.Task[Any] | None = None
        self._connection: RTCPeerConnection | None = None
        self._channel: RTCDataChannel
        self._sctp: RTCSctpTransport
        self._ice: IceConnection

    # Called in trio.

    def close_soon(self) -> None:
        """End the connection; harmless when it has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.finish, "closed here")

    # Run in the thread.

    async def offer(self, stun: Sequence[StunServer], gather_s: float) -> str:
        """The SDP of an offer."""
        connection = self._open(stun, gather_s)
        return await self._describe(connection)

    async def answer(self, sdp: str, stun: Sequence[StunServer], gather_s: float) -> str:
        """The SDP of the answer to an offer."""
        _check_description(sdp)
        connection = self._open(stun, gather_s)
        await connection.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        return await self._describe(connection)

    async def _describe(self, connection: RTCPeerConnection) -> str:
        await connection.setLocalDescription()
        if not self._ice.local_candidates:
            raise WebRtcError("this machine has no IP address on which a peer could reach it")
        return connection.localDescription.sdp

    async def accept(self, sdp: str) -> None:
        """Take in an answer."""
        _check_description(sdp)
        if self._is_over or self._connection is None:
            raise WebRtcError("this offer is over")
        self._negotiation = asyncio.current_task()
        await self._connection.setRemoteDescription(RTCSessionDescription(sdp, "answer"))

    def _open(self, stun: Sequence[StunServer], gather_s: float) -> RTCPeerConnection:
        if self._is_over:
            raise WebRtcError("given up")
        if len(self._ends) >= MAX_ENDS:
            raise WebRtcError(f"more than {MAX_ENDS} WebRTC connections at once")
        self._ends.add(self)
        self._negotiation = asyncio.current_task()
        # An explicit list, because aiortc's default is the server of a company.
        self._connection = connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._channel = channel = connection.createDataChannel("shoal", negotiated=True, id=_CHANNEL)
        self._sctp = channel.transport
        self._ice = self._sctp.transport.transport.iceGatherer._connection
        _repair_ice(self._ice, self._addresses(), stun, gather_s)
        self._sctp._rto = FIRST_RTO_S
        self._watch_sctp(self._sctp)
        channel.on("open", self._channel_opened)
        channel.on("message", self._message)
        channel.on("close", self._channel_closed)
        connection.on("connectionstatechange", partial(self._state_changed, connection))
        self._patience = self.loop.call_later(MAX_PENDING_S, self._end_unless_taken)
        return connection

    def _watch_sctp(self, sctp: RTCSctpTransport) -> None:
        receive = sctp._receive_chunk

        async def receive_unless_hostile(chunk: wire.Chunk) -> None:
            breach = _breach_of_sctp(sctp, chunk)
            if breach:
                self._cut_off(breach)
            elif not self._is_cut_off:
                await receive(chunk)

        sctp._receive_chunk = receive_unless_hostile  # type: ignore[method-assign]  # aiortc has no hook for it

    def _channel_opened(self) -> None:
        pair = self._ice._nominated.get(1)
        self._tell(PipeOpened(pair.remote_addr if pair else None))

    def _channel_closed(self) -> None:
        self._is_channel_closed.set()
        self.finish("the far end closed, or no longer answers", linger_s=0)

    def _state_changed(self, connection: RTCPeerConnection) -> None:
        if connection.connectionState == "failed":
            self.finish("no pair of addresses works", linger_s=0)
        elif connection.connectionState == "closed":
            self.finish("the path is gone", linger_s=0)

    def _message(self, message: bytes | str) -> None:
        if self._is_over:
            return
        if isinstance(message, bytes):
            self._received += len(message) + MESSAGE_COST
            if self._received > self.granted:
                self._cut_off("more bytes than granted")
            else:
                self._tell(message)
            return
        granted = int(message) if _CREDIT.fullmatch(message) else 0
        if not self._allowed + GRANT_BYTES <= granted <= self._sent + WINDOW_BYTES:
            self._cut_off("a grant that cannot be")
        else:
            self._allowed = granted
            self._tell(CreditGranted(granted))

    def send(self, message: bytes | str) -> None:
        """Send bytes or a grant."""
        if self._is_over:
            return
        if isinstance(message, bytes):
            self._sent += len(message) + MESSAGE_COST
        try:
            self._channel.send(message)
        except Exception as error:  # its state changed meanwhile, or aiortc finds the message too long for the far side
            self.finish(f"cannot send: {type(error).__name__}", linger_s=0)
        if self._channel.bufferedAmount > 2 * WINDOW_BYTES:
            self._cut_off("grants for what it has not acknowledged")

    def _cut_off(self, breach: str) -> None:
        if not self._is_cut_off:
            self._is_cut_off = True
            log.warning("WebRTC: a peer is cut off; it sent %s", breach)
            self.finish(f"the far end sent {breach}", linger_s=0)

    def _end_unless_taken(self) -> None:
        if not self.is_taken:
            self.finish(f"nobody took the pipe within {MAX_PENDING_S:g} s", linger_s=0)

    def finish(self, reason: str, linger_s: float = LINGER_S) -> None:
        """End the connection, once; what was sent has so long to arrive."""
        if not self._is_over:
            self._is_over = True
            self._tell(PipeEnded(reason))
            self._closing = self.loop.create_task(self._close(linger_s))  # kept, or it might be collected

    async def _close(self, linger_s: float) -> None:
        try:
            if self._negotiation is not None and not self._negotiation.done():
                self._negotiation.cancel()
                await asyncio.wait([self._negotiation])
            if self._connection is None:
                return
            if linger_s and self._channel.readyState == "open":
                self._channel.close()  # in order: after all that was sent
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_channel_closed.wait(), linger_s)
        finally:
            if self._connection is not None:
                self._patience.cancel()
                try:
                    await self._connection.close()
                finally:
                    await self._ice.close()  # the sockets, whatever aiortc stumbled over
            self._ends.discard(self)


def _breach_of_sctp(sctp: RTCSctpTransport, chunk: wire.Chunk) -> str:
    """What makes a chunk one that no honest end sends here; empty if nothing does.

    aiortc takes every chunk in: streams, messages without end and sets of gaps grow as a peer likes.
    """
    match chunk:
        case wire.DataChunk():
            if chunk.stream_id != _CHANNEL or chunk.protocol not in (wire.WEBRTC_STRING, wire.WEBRTC_BINARY):
                return "to a channel that was not agreed on"
            if chunk.flags & wire.SCTP_DATA_UNORDERED or not chunk.user_data:
                return "chunks that are empty or out of order"
            if len(chunk.user_data) < MIN_FRAGMENT_BYTES and not chunk.flags & wire.SCTP_DATA_LAST_FRAG:
                return "crumbs of a message"
            # aiortc tells the far side this window, yet does not hold it to that.
            if sctp._advertised_rwnd < 0 or max(len(sctp._sack_misordered), _num_waiting(sctp)) > MAX_CHUNKS:
                return "more than its window"
        case wire.ForwardTsnChunk():
            return "a skip on a reliable channel"
        case wire.SackChunk():
            num_acknowledged = sum(last - first + 1 for first, last in chunk.gaps)
            if num_acknowledged > MAX_CHUNKS or len(sctp._sent_queue) > MAX_CHUNKS:
                return "acknowledgements that cannot be"
    return ""


def _num_waiting(sctp: RTCSctpTransport) -> int:
    stream = sctp._inbound_streams.get(_CHANNEL)
    return len(stream.reassembly) if stream else 0


def _check_description(sdp: str) -> None:
    """Raise `WebRtcError` unless this offers or accepts one data channel, and nothing else."""
    if len(sdp) > MAX_SDP_BYTES or not sdp.isascii():
        raise WebRtcError("the session description is longer than 16 KiB, or no ASCII text")
    try:
        description = SessionDescription.parse(sdp)
        (media,) = description.media
        candidates = [(ipaddress.ip_address(known.ip), known) for known in media.ice_candidates]
        limit = media.sctpCapabilities.maxMessageSize if media.sctpCapabilities else MESSAGE_BYTES
        is_sound = (
            (media.kind, media.profile) == ("application", "UDP/DTLS/SCTP")
            and 0 < (media.sctp_port or 0) < 1 << 16
            and (not limit or limit >= MESSAGE_BYTES)
            and media.dtls is not None
            and 0 < len(media.dtls.fingerprints) <= 8
            and media.ice is not None
            and not media.ice.iceLite
            and _ICE_NAME.fullmatch(media.ice.usernameFragment or "")
            and _ICE_PASSWORD.fullmatch(media.ice.password or "")
            and all(group.items == [media.rtp.muxId] for group in description.group)
            and len(candidates) <= MAX_CANDIDATES
            and all(known.component == 1 and _can_be_reached(address, known.port) for address, known in candidates)
        )
    except Exception as error:  # the parser raises whatever a malformed line leads it to
        raise WebRtcError(f"the session description is malformed: {type(error).__name__}") from error
    if not is_sound:
        raise WebRtcError("the session description is not that of one data channel by ICE")


def _can_be_reached(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> bool:
    return 0 < port < 1 << 16 and not address.is_multicast and not address.is_unspecified


def _repair_ice(ice: IceConnection, addresses: Sequence[str], stun: Sequence[StunServer], gather_s: float) -> None:
    """Gather on these addresses, from several STUN servers at once, for this long; and end what aioice forgets."""
    bind = ice.get_component_candidates

    async def gather(component: int, **_: Any) -> list[Candidate]:
        binding = asyncio.ensure_future(bind(component, list(addresses[:MAX_ADDRESSES])))
        try:
            hosts = await asyncio.shield(binding)
        except asyncio.CancelledError:
            await binding  # the sockets are known to the connection, which closes them, only when all are there
            raise
        return hosts + await _reflexive_candidates(ice._protocols, stun, gather_s)

    def take_datagram(data: bytes, component: int) -> None:
        # An empty one, from anybody, would end aiortc's reader; and its queue has no bound.
        if data and ice._queue.qsize() < MAX_DATAGRAMS:
            ice._queue.put_nowait((data, component))

    async def query_consent_while_open() -> None:
        # A connection closed while its checks succeed would else ask for consent for ever, of nobody.
        if not ice._closing:
            await query_consent()

    query_consent = ice.query_consent
    ice.get_component_candidates = gather  # type: ignore[method-assign, assignment]  # aioice has no option for it
    ice.query_consent = query_consent_while_open  # type: ignore[method-assign]  # as above
    ice.data_received = take_datagram  # type: ignore[method-assign]  # as above


async def _reflexive_candidates(
    protocols: Sequence[StunProtocol], stun: Sequence[StunServer], gather_s: float
) -> list[Candidate]:
    """Under which addresses the outside sees these sockets (RFC 8445, section 5.1.1.2); the first answer for each.

    IPv4 alone: where there is IPv6 there is no translation, and the sockets' own addresses are candidates already.
    """

    async def ask(protocol: StunProtocol, server: StunServer) -> Candidate:
        question = stun_wire.Message(message_method=stun_wire.Method.BINDING, message_class=stun_wire.Class.REQUEST)
        answer, _ = await protocol.request(question, server)
        host, port = answer.attributes["XOR-MAPPED-ADDRESS"]
        if not _can_be_reached(ipaddress.IPv4Address(host), port):
            raise ValueError("an answer that the far side would refuse")
        base = protocol.local_candidate
        return Candidate(
            foundation=candidate_foundation("srflx", "udp", base.host),
            component=base.component,
            transport="udp",
            priority=candidate_priority(base.component, "srflx"),
            host=host,
            port=port,
            type="srflx",
            related_address=base.host,
            related_port=base.port,
        )

    asking = [protocol for protocol in protocols if ":" not in protocol.local_candidate.host]
    servers = [server for server in stun if _is_ipv4(server[0])][:MAX_STUN_SERVERS]
    waiting = {asyncio.ensure_future(ask(protocol, server)) for protocol in asking for server in servers}
    found: dict[int, Candidate] = {}  # by the port of the socket
    now = asyncio.get_running_loop().time
    began = now()
    deadline = began + gather_s
    try:
        while waiting and len(found) < len(asking) and now() < deadline:
            done, waiting = await asyncio.wait(waiting, timeout=deadline - now(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    candidate = task.result()
                    found.setdefault(candidate.related_port or 0, candidate)
                    # A socket on a network without a way out gets no answer, which must not cost the full time.
                    deadline = min(deadline, now() + (now() - began) + STUN_GRACE_S)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return [
        known for known in found.values() if (known.host, known.port) != (known.related_address, known.related_port)
    ]


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
