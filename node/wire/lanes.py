"""Lanes: TLS 1.3 connections beside libp2p's, between peers that reach each other directly.

They share libp2p's port: a lane begins with a TLS ClientHello (first byte 0x16), libp2p with its multistream greeting
(0x13), and `peek_first_byte` tells which it is without taking the byte away.

A lane is bound to the peer ids of both ends as WebRTC binds DTLS to its signalling (RFC 8827, section 5.6.4). Over the
libp2p stream, which is authenticated already, the accepting side gives the dialing side a `LaneTicket`: the SHA-256
fingerprint of its certificate, self-signed and made afresh at each start, and a random token. The dialing side compares
the fingerprint with the certificate that it meets, and only then shows the token, inside TLS:

    dialing side: kind u8 | token 32 bytes        accepting side: 1 = welcome, or it closes

Whoever is in the middle has neither the certificate's key nor, therefore, ever sees a token. A token is good for one
lane of one kind, for ten seconds, and names the peer that it was given to.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any, Final, TypeVar

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shoal.node.wire.channel import StreamClosedError
from shoal.protocol.codec import Buffer
from shoal.protocol.errors import Fault, RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId

log = logging.getLogger(__name__)

T = TypeVar("T")
Socket = socket.socket | trio.socket.SocketType
Pace = Callable[[int], Awaitable[None]]

TOKEN_BYTES: Final = 32
FINGERPRINT_BYTES: Final = 32
TICKET_LIFE_S: Final = 10.0
MAX_TICKETS_PER_PEER: Final = 8
MAX_TICKETS: Final = 256
HANDSHAKE_S: Final = 5.0
"""From the first byte of a lane to its welcome."""
MAX_HANDSHAKES: Final = 64
MAX_HANDSHAKES_PER_IP: Final = 16
"""Lanes that may be on their way in at once; over that, one is closed as it comes."""
DEAD_PATH_S: Final = 15
"""Bytes that nobody has acknowledged for so long end the connection (TCP_USER_TIMEOUT, RFC 5482). On Linux this also
holds for a far side that is alive and does not read."""

RECORD_BYTES: Final = 16 * 1024
"""What SSL_read gives at most: one TLS record (RFC 8446, section 5.1)."""
READ_BYTES: Final = 256 * 1024
WRITE_BYTES: Final = 64 * 1024
TURNS: Final = 32
"""Reads or writes without waiting after which other tasks get their turn."""

TLS_HANDSHAKE: Final = b"\x16"
"""The first byte of a lane."""
_WELCOME: Final = b"\x01"


class LaneKind(IntEnum):
    """What a lane is for."""

    CALLS = 1
    BULK = 2
    """The dialing side pulls from the accepting side."""
    BULK_TO_ACCEPTOR = 3
    """The accepting side pulls from the dialing side, which it cannot dial itself."""


class LaneError(ShoalError):
    """A lane could not be had; calls go on by libp2p."""

    fault = Fault.REMOTE


@dataclass(frozen=True, slots=True)
class LaneTicket:
    """What the dialing side of a lane needs to know.

    Attributes:
        token: 32 random bytes, good for one lane.
        fingerprint: SHA-256 of the accepting side's certificate in DER form.
    """

    token: bytes
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class _Issued:
    """A ticket that was not shown yet; ``expires_at`` in trio time."""

    peer: PeerId
    kind: LaneKind
    expires_at: float


class LaneDoor:
    """The accepting side of all lanes: one certificate, and the tickets that are out."""

    def __init__(self) -> None:
        self._context, self._fingerprint = _server_context()
        self._issued: dict[bytes, _Issued] = {}
        self._handshakes: Counter[str] = Counter()  # by IP

    def ticket(self, peer: PeerId, kind: LaneKind) -> LaneTicket:
        """Let a peer dial one lane within `TICKET_LIFE_S`.

        Raises:
            RemoteError: RESOURCE_EXHAUSTED if too many tickets are out.
        """
        now = trio.current_time()
        self._issued = {token: issued for token, issued in self._issued.items() if issued.expires_at > now}
        num_of_peer = sum(issued.peer == peer for issued in self._issued.values())
        if num_of_peer >= MAX_TICKETS_PER_PEER or len(self._issued) >= MAX_TICKETS:
            raise RemoteError(
                Status.RESOURCE_EXHAUSTED, f"too many lane tickets are out; try again in {TICKET_LIFE_S:.0f} s"
            )
        token = secrets.token_bytes(TOKEN_BYTES)
        self._issued[token] = _Issued(peer, kind, now + TICKET_LIFE_S)
        return LaneTicket(token, self._fingerprint)

    async def accept(self, sock: Socket, ip: str) -> tuple[PeerId, LaneKind, ssl.SSLSocket] | None:
        """Take in a connection that began like TLS.

        Takes ``sock``, which came from ``ip``, over: afterwards it has no descriptor of its own, whatever came of it.
        None if what came was not a lane with a good ticket; that never raises. The lane is non-blocking.
        """
        plain = _take_over(sock)
        if self._handshakes[ip] >= MAX_HANDSHAKES_PER_IP or self._handshakes.total() >= MAX_HANDSHAKES:
            log.warning("too many lanes are on their way in; one of %s is closed", ip)
            plain.close()
            return None
        self._handshakes[ip] += 1
        welcomed, tls = None, None
        try:
            with trio.move_on_after(HANDSHAKE_S):
                _set_options(plain)
                tls = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                await _when_ready(tls, tls.do_handshake)
                issued = self._redeem(await _receive_exactly(tls, 1 + TOKEN_BYTES))
                if issued is not None:
                    await _when_ready(tls, functools.partial(tls.send, _WELCOME))
                    welcomed = issued.peer, issued.kind, tls
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            log.debug("a lane did not come in: %s", error)
        finally:
            self._handshakes[ip] -= 1
            if not self._handshakes[ip]:
                del self._handshakes[ip]
            if welcomed is None:
                (tls or plain).close()
        return welcomed

    def _redeem(self, hello: bytes) -> _Issued | None:
        issued = self._issued.pop(hello[1:], None)
        if issued is None or issued.kind != hello[0] or issued.expires_at <= trio.current_time():
            return None
        return issued


async def dial_lane(ip: str, port: int, ticket: LaneTicket, kind: LaneKind, *, timeout_s: float) -> ssl.SSLSocket:
    """Open a lane to whoever gave the ticket; non-blocking.

    Args:
        ip: numeric, IPv4 or IPv6.
        port: the one that libp2p listens on.
        ticket: from the far side, by an authenticated stream.
        kind: the one that the ticket was asked for.
        timeout_s: for all of it.

    Raises:
        LaneError: if nobody answers, somebody else does, or the ticket is not taken.
    """
    where = f"a lane to [{ip}]:{port}"
    if len(ticket.token) != TOKEN_BYTES or len(ticket.fingerprint) != FINGERPRINT_BYTES:
        raise LaneError(f"{where} cannot be opened: the ticket is malformed")
    tls, is_welcome = None, False
    try:
        with trio.fail_after(timeout_s):
            plain = await _connect(ip, port)
            try:
                _set_options(plain)
                tls = _client_context().wrap_socket(plain, do_handshake_on_connect=False)
            finally:
                if tls is None:
                    plain.close()
            await _when_ready(tls, tls.do_handshake)
            certificate = tls.getpeercert(binary_form=True) or b""
            if not hmac.compare_digest(hashlib.sha256(certificate).digest(), ticket.fingerprint):
                raise LaneError(f"{where} met another certificate than its ticket names: somebody is in between")
            await _when_ready(tls, functools.partial(tls.send, bytes([kind]) + ticket.token))
            is_welcome = await _receive_exactly(tls, 1) == _WELCOME
            if not is_welcome:
                raise LaneError(f"{where} was not welcome")
            return tls
    except trio.TooSlowError as error:
        raise LaneError(f"{where} did not stand within {timeout_s:g} s") from error
    except (OSError, ValueError) as error:
        raise LaneError(f"{where} failed: {error}") from error
    finally:
        if tls is not None and not is_welcome:
            tls.close()


async def peek_first_byte(sock: Socket, *, timeout_s: float) -> bytes:
    """What a fresh connection begins with, which stays where it is; empty if nothing came in time, or it broke."""
    first = b""
    with trio.move_on_after(timeout_s), contextlib.suppress(OSError, trio.ClosedResourceError):
        if isinstance(sock, socket.socket):
            await trio.lowlevel.wait_readable(sock.fileno())
            first = sock.recv(1, socket.MSG_PEEK)
        else:
            first = await sock.recv(1, socket.MSG_PEEK)
    return first


class TlsByteStream:
    """A `ByteStream` on a non-blocking lane, without tasks, buffers or copies of its own.

    One task may read while one other writes. A `write` that is cancelled leaves half a record behind, so nothing can be
    written afterwards: close the stream then. A `read` that is cancelled loses nothing.

    Args:
        sock: the lane.
        pace: waits, after so many bytes were read, until more may be; None: they may be at once.
    """

    __slots__ = ("_begun", "_is_writing", "_num_turns", "_pace", "_read_bytes", "_sock")

    def __init__(self, sock: ssl.SSLSocket, pace: Pace | None = None) -> None:
        self._sock = sock
        self._pace = pace
        self._read_bytes = 0  # at the last time
        self._num_turns = 0
        self._is_writing = False
        self._begun: Buffer | None = None  # OpenSSL holds a part of it, sealed, and wants the same again

    async def read(self) -> bytes:
        """What is there, at most about 256 KiB; waits if nothing is.

        Raises:
            StreamClosedError: at the end, or when the path is gone.
        """
        sock = self._sock
        if self._pace is not None:
            await self._pace(self._read_bytes)
            self._read_bytes = 0
        try:
            # Waiting first spares the usual read that finds nothing; it is also what lets others run.
            if sock.pending():
                await self._let_others_run()
            else:
                await trio.lowlevel.wait_readable(sock.fileno())
            while True:
                try:
                    data = sock.recv(RECORD_BYTES)
                    break
                except ssl.SSLWantReadError:
                    await trio.lowlevel.wait_readable(sock.fileno())
            if len(data) == RECORD_BYTES:
                data = self._gather(data)
        except (OSError, ValueError, trio.ClosedResourceError) as error:
            raise StreamClosedError(f"the lane broke: {error}") from error
        if not data:
            raise StreamClosedError("the far side closed the lane")
        self._read_bytes = len(data)
        return data

    async def write(self, data: Buffer) -> None:
        """Write all.

        Raises:
            StreamClosedError: when the path is gone, or an earlier write was cancelled.
        """
        self._begin_write()
        start = 0
        if self._begun is not None:
            start = len(self._begun)
            if data[:start] != self._begun:
                raise RuntimeError("what try_write could not write must be written next")
            await self._send(self._begun)
            self._begun = None
        if not start and len(data) <= WRITE_BYTES:
            await self._send(data)
        else:
            view = memoryview(data).cast("B")
            for first in range(start, len(view), WRITE_BYTES):
                await self._send(view[first : first + WRITE_BYTES])
        self._is_writing = False

    def try_write(self, data: Buffer) -> bool:
        """Write all of at most 64 KiB if the path takes it at once.

        If not, False, and the next `write` must begin with the same bytes.

        Raises:
            StreamClosedError: when the path is gone, or an earlier write was cancelled.
        """
        self._begin_write()
        if self._begun is None:
            try:
                self._sock.send(data)
            except ssl.SSLWantWriteError:
                self._begun = data
            except (OSError, ValueError) as error:
                raise StreamClosedError(f"the lane broke: {error}") from error
        self._is_writing = False
        return self._begun is None

    async def close(self) -> None:
        """Close both directions, and wake whoever waits on them; never raises."""
        if self._sock.fileno() != -1:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _begin_write(self) -> None:
        if self._is_writing:
            raise StreamClosedError("an earlier write was cut off, or is still under way")
        self._is_writing = True

    async def _send(self, data: Buffer) -> None:
        # SSL_write takes all of it or asks to be called again with the same.
        await self._let_others_run()
        try:
            while True:
                try:
                    self._sock.send(data)
                except ssl.SSLWantWriteError:
                    self._num_turns = 0
                    await trio.lowlevel.wait_writable(self._sock.fileno())
                else:
                    return
        except (OSError, ValueError, trio.ClosedResourceError) as error:
            raise StreamClosedError(f"the lane broke: {error}") from error

    def _gather(self, first: bytes) -> bytes:
        """A full record is seldom alone: all that has come with it, so that it is handled in one piece."""
        records, num_bytes = [first], len(first)
        try:
            while num_bytes < READ_BYTES and len(records[-1]) == RECORD_BYTES:
                records.append(self._sock.recv(RECORD_BYTES))
                num_bytes += len(records[-1])
        except OSError:  # there is no more yet, or the path broke, which the next read finds too
            pass
        return b"".join(records)

    async def _let_others_run(self) -> None:
        self._num_turns += 1
        if self._num_turns >= TURNS:
            self._num_turns = 0
            await trio.lowlevel.checkpoint()


class _LaneSocket(ssl.SSLSocket):
    """One that closes itself if the far side has gone before it is made, which `ssl.SSLSocket` leaves undone.

    It takes the descriptor over first, asks who the far side is, and raises; whoever wanted it has nothing to close.
    """

    def getpeername(self) -> Any:
        """The far end; closes the lane if there is none."""
        try:
            return super().getpeername()
        except OSError:
            self.close()
            raise


def _take_over(sock: Socket) -> socket.socket:
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_PATH_S // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_PATH_S // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PATH_S * 1000)


async def _connect(ip: str, port: int) -> socket.socket:
    family = socket.AF_INET if ipaddress.ip_address(ip).version == 4 else socket.AF_INET6
    with trio.socket.socket(family) as sock:
        await sock.connect((ip, port))
        return _take_over(sock)


async def _when_ready(tls: ssl.SSLSocket, act: Callable[[], T]) -> T:
    while True:
        try:
            return act()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(tls.fileno())
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(tls.fileno())


async def _receive_exactly(tls: ssl.SSLSocket, num_bytes: int) -> bytes:
    """So many bytes, and none that come after them; fewer at the end."""
    data = b""
    while len(data) < num_bytes:
        piece = await _when_ready(tls, functools.partial(tls.recv, num_bytes - len(data)))
        if not piece:
            raise ConnectionError("the far side closed it")
        data += piece
    return data


@functools.cache
def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _LaneSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the ticket's fingerprint says who it must be
    return context


def _server_context() -> tuple[ssl.SSLContext, bytes]:
    """A context with a fresh certificate, and the certificate's fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "shoal")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = _LaneSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no session is ever resumed
    # The context reads only files; this one is in memory, so that the key is never on a disk.
    with os.fdopen(os.memfd_create("lane"), "wb", buffering=0) as file:
        file.write(secret + certificate.public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context, hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
