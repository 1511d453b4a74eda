"""The node's TCP port: everything that comes in by it, told apart by its first byte, and dialing out from it.

    0x13  libp2p (the length of its multistream greeting)
    0x16  a lane (a TLS ClientHello), see `shoal.node.wire.lanes`
    0x02  a knock: 16 bytes that this node gave to a peer which it asked to dial back; whoever shows them proves that
          this node can be reached by those who did not hear from it before (as in libp2p's AutoNAT v2)
    0x03  a question: from which address do you see me? Answered with one line, ``IP PORT``; the connection stays open
          until the asker ends it, so that its NAT keeps the mapping that it asked about

The last is STUN (RFC 8489) for TCP: asked *from* this node's port, it tells where its NAT puts that port, which is
where a peer has to dial to punch a hole (RFC 5128, section 3.4). From one port there can be one connection to another
one, so those who ask the same node at the same time share one question.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from libp2p.abc import INetworkService
from multiaddr import Multiaddr

from shoal.node.budgets import NodeBudgets, user_of
from shoal.node.mesh.interfaces import local_ips
from shoal.node.mesh.turns import Queue
from shoal.node.wire.lanes import TLS_HANDSHAKE, peek_first_byte
from shoal.protocol.errors import ShoalError

log = logging.getLogger(__name__)

FIRST_BYTE_S: Final = 10.0
MAX_SILENT: Final = 512
MAX_SILENT_PER_IP: Final = 32
"""Connections that have not sent a byte yet; over that, a new one is closed."""
TURN_S: Final = 6.0
"""How long a connection waits for its turn to prove who is at its other end."""
QUESTION_S: Final = 30.0
"""How long an answered question stays open at most."""
ASK_AGAIN_S: Final = 0.05
NONCE_BYTES: Final = 16
MAX_ANSWER_BYTES: Final = 64

KNOCK: Final = b"\x02"
QUESTION: Final = b"\x03"

AcceptLane = Callable[[trio.socket.SocketType, str], Awaitable[None]]


class ListenError(ShoalError):
    """An address to listen on cannot be had."""


@dataclass(slots=True, eq=False)
class _Question:
    """How one node sees one port of this node, asked once for all who want to know it at the same time.

    Attributes:
        answer: the local end, and the end as the other node sees it.
    """

    num_askers: int = 0
    is_asking: trio.Lock = field(default_factory=trio.Lock)
    stream: trio.SocketStream | None = None
    answer: tuple[tuple[str, int], tuple[str, int]] | None = None

    def is_over(self) -> bool:
        """Whether the other node has ended it, or it was asked from an address that is not this machine's any more."""
        if self.stream is None or self.answer is None:
            return False
        return self.stream.socket.is_readable() or self.answer[0][0] not in local_ips()


class Door:
    """Listens, and hands on what comes in. `run` must run for anything to be handed on.

    Args:
        accept_lane: takes what is no connection of libp2p's.
        budgets: of which handshakes, sockets and dials are.
        is_wanted_at: whether a peer that this node wants is connected by an IP, whose connections do not wait then.
    """

    def __init__(self, accept_lane: AcceptLane, budgets: NodeBudgets, is_wanted_at: Callable[[str], bool]) -> None:
        self._accept_lane = accept_lane
        self._budgets = budgets
        self._is_wanted_at = is_wanted_at
        self._dialing = trio.CapacityLimiter(budgets.max_dialing)
        self._handshakes = Queue(budgets.handshakes, TURN_S)
        self._silent: Counter[str] = Counter()  # by IP
        self._knocks: dict[bytes, trio.Event] = {}
        self._ports: dict[socket.AddressFamily, int] = {}
        self._questions: dict[tuple[str, int, int | None], _Question] = {}  # to IP and port, from a spare port

    async def listen(self, network: INetworkService, address: str, kept_port: int = 0) -> int:
        """Listen on a multiaddr.

        Args:
            network: libp2p's.
            address: the multiaddr.
            kept_port: to be had rather than any other where the multiaddr leaves the port to the system.

        Returns:
            The port.

        Raises:
            ListenError: if it cannot be had.
        """
        before = set(network.listeners)
        for wanted in dict.fromkeys((_with_port(address, kept_port), address)):
            try:
                _check_free(wanted)
            except ListenError:
                if wanted == address:
                    raise
                log.warning(
                    "port %d, at which others know this node, is taken by another program: it listens on another one, "
                    "and whoever was not connected meanwhile has to find it anew; stop that program and restart the "
                    "node to have the port back",
                    kept_port,
                )
                continue
            if await network.listen(Multiaddr(wanted)):
                break
        else:
            raise ListenError(f"cannot listen on {address}; choose another address with --listen")
        opened = [accepting for name in network.listeners.keys() - before for accepting in _sockets(network, name)]
        return int(opened[0].getsockname()[1]) if opened else 0

    def open(self, network: Any) -> None:
        """Begin to tell apart what comes in by the listeners of libp2p."""
        for listener in network.listeners.values():
            self._share(listener)
            for accepting in listener.listeners:
                self._ports.setdefault(accepting.socket.family, accepting.socket.getsockname()[1])

    async def run(self) -> None:
        """Give those that came in their turns to prove who they are."""
        await self._handshakes.run()

    async def _turn(self, ip: str) -> bool:
        """Wait until a connection from this IP may cost a handshake; False if that takes too long."""
        return self._is_wanted_at(ip) or await self._handshakes.turn(user_of(ip))

    def port(self, ip: str) -> int | None:
        """The first port that this node listens on in the family of an address; None if it does not."""
        return self._ports.get(_family(ip))

    @contextmanager
    def expect_knock(self) -> Iterator[tuple[bytes, trio.Event]]:
        """A nonce for a peer that is to dial back, and what happens when it is shown."""
        nonce, came = secrets.token_bytes(NONCE_BYTES), trio.Event()
        self._knocks[nonce] = came
        try:
            yield nonce, came
        finally:
            del self._knocks[nonce]

    @contextmanager
    def spare_port(self) -> Iterator[int]:
        """A free local port that nobody else gets meanwhile, to dial from as from the one that this node listens on.

        Raises:
            OSError: if there is none.
        """
        with socket.socket(next(iter(self._ports), socket.AF_INET)) as holder:
            _share_port(holder)
            holder.bind(("", 0))
            yield holder.getsockname()[1]

    async def dial(
        self, ip: str, port: int, *, from_port: bool = False, spare_port: int | None = None
    ) -> trio.SocketStream:
        """A TCP connection to a numeric address.

        Args:
            ip: of the far end.
            port: of the far end.
            from_port: dial from the port that this node listens on, or not at all.
            spare_port: dial from this port of `spare_port`.

        Raises:
            OSError: if it does not come to be.
        """
        family = _family(ip)
        own = self.port(ip) if from_port else spare_port
        if from_port and own is None:
            raise OSError(f"this node does not listen on {family.name}")
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if own is not None:
                _share_port(sock)
                await sock.bind(("::" if family is socket.AF_INET6 else "0.0.0.0", own))  # noqa: S104  the route decides
            async with self._dialing:
                await sock.connect((ip, port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    @asynccontextmanager
    async def seen_by(
        self, ip: str, port: int, *, spare_port: int | None = None
    ) -> AsyncIterator[tuple[tuple[str, int], tuple[str, int]]]:
        """How another node sees this node's port, or a spare one.

        An earlier question may be just ending, for which this waits: the caller sets a limit.

        Returns:
            The local end, and the end as the other node sees it; the mapping is kept in use as long as inside.

        Raises:
            OSError: if it cannot be asked, or answers nonsense.
        """
        key = ip, port, spare_port
        question = self._questions.get(key)
        if question is None or question.is_over():
            question = self._questions[key] = _Question()
        question.num_askers += 1
        try:
            async with question.is_asking:
                if question.answer is None:
                    question.stream = await self._dial_to_ask(ip, port, spare_port)
                    try:
                        question.answer = await _ask(question.stream)
                    except BaseException:
                        await trio.aclose_forcefully(question.stream)
                        raise
            yield question.answer
        finally:
            question.num_askers -= 1
            if not question.num_askers:
                if self._questions.get(key) is question:
                    del self._questions[key]
                if question.stream is not None:
                    await question.stream.aclose()

    async def _dial_to_ask(self, ip: str, port: int, spare_port: int | None) -> trio.SocketStream:
        while True:
            try:
                return await self.dial(ip, port, from_port=spare_port is None, spare_port=spare_port)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
            await trio.sleep(ASK_AGAIN_S)  # a connection between the same two ends is there until its end is confirmed

    def _share(self, listener: Any) -> None:
        libp2p = listener.handler

        async def take(stream: Any) -> None:
            sock = stream.stream.socket
            try:
                ip = sock.getpeername()[0].removeprefix("::ffff:")  # IPv4 that came in by a socket for both
            except OSError:
                ip = ""  # it is gone already
            if not ip or self._silent[ip] >= MAX_SILENT_PER_IP or self._silent.total() >= MAX_SILENT:
                await stream.close()
                return
            user = user_of(ip)
            if not self._is_wanted_at(ip) and self._budgets.is_shut_out(user, trio.current_time()):
                await stream.close()
                return
            if not self._budgets.sockets.take(user, 1):
                log.debug("too many connections of %s; one is closed", user)
                await stream.close()
                return
            try:
                await self._take_in(stream, sock, ip, libp2p)
            finally:
                self._budgets.sockets.hold(user, -1)

        listener.handler = take

    async def _take_in(self, stream: Any, sock: Any, ip: str, libp2p: Callable[[Any], Awaitable[None]]) -> None:
        self._silent[ip] += 1
        try:
            first = await peek_first_byte(sock, timeout_s=FIRST_BYTE_S)
            if first in (KNOCK, QUESTION):
                await self._answer(sock)  # counts as silent: it says no more
        finally:
            self._silent[ip] -= 1
            if not self._silent[ip]:
                del self._silent[ip]
        if first in (b"", KNOCK, QUESTION) or not await self._turn(ip):
            await stream.close()
        elif first == TLS_HANDSHAKE:
            await self._accept_lane(sock, ip)
        else:
            await _until_closed(libp2p, stream)

    async def _answer(self, sock: trio.socket.SocketType) -> None:
        with trio.move_on_after(QUESTION_S), contextlib.suppress(OSError):
            data = await sock.recv(1 + NONCE_BYTES)
            if data[:1] == QUESTION:
                await sock.send(_answer(sock))
                await sock.recv(1)
            elif (came := self._knocks.get(data[1:])) is not None:
                came.set()


async def _until_closed(serve: Callable[[Any], Awaitable[None]], stream: Any) -> None:
    """Serve a connection, and no longer than it stands.

    libp2p's handler waits until the whole node ends and so holds one of the places that it has for connections that
    come in, long after the connection has ended; when all are taken, nobody comes in any more.
    """
    close = stream.close

    async def close_and_end() -> None:
        try:
            await close()
        finally:
            scope.cancel()

    with trio.CancelScope() as scope:
        stream.close = close_and_end
        await serve(stream)


async def knock(ip: str, port: int, nonce: bytes, *, timeout_s: float) -> bool:
    """Dial back; whether a connection came to be."""
    with trio.move_on_after(timeout_s):
        try:
            async with await trio.open_tcp_stream(ip, port) as stream:
                await stream.send_all(KNOCK + nonce)
                await stream.send_eof()
                await stream.receive_some(1)  # it closes when it has read
        except (OSError, trio.BrokenResourceError) as error:
            log.debug("dialing back to [%s]:%d failed: %s", ip, port, error)
        else:
            return True
    return False


async def _ask(stream: trio.SocketStream) -> tuple[tuple[str, int], tuple[str, int]]:
    try:
        await stream.send_all(QUESTION)
        line = await _read_line(stream)
        if line.startswith(QUESTION.decode()):
            # The far side asked at the same moment from the same port: both questions share one connection.
            await stream.send_all(_answer(stream.socket))
            line = line[1:] or await _read_line(stream)
    except trio.BrokenResourceError as error:
        raise OSError("it broke off") from error
    return stream.socket.getsockname()[:2], _read_endpoint(line)


def _with_port(address: str, port: int) -> str:
    """A multiaddr that leaves its port to the system, with this one if there is one."""
    return f"{address.removesuffix('0')}{port}" if port and address.endswith("/tcp/0") else address


def _sockets(network: Any, listener: str) -> list[trio.socket.SocketType]:
    return [accepting.socket for accepting in network.listeners[listener].listeners]


def _share_port(sock: Any) -> None:
    """Let a socket use a port that others of this process use too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _answer(sock: trio.socket.SocketType) -> bytes:
    ip, port = sock.getpeername()[:2]
    return f"{ip.removeprefix('::ffff:')} {port}\n".encode()


async def _read_line(stream: trio.SocketStream) -> str:
    """A line, or a question that came instead of it."""
    data = b""
    while not data.endswith((b"\n", QUESTION)):
        part = await stream.receive_some(MAX_ANSWER_BYTES - len(data)) if len(data) < MAX_ANSWER_BYTES else b""
        if not part:
            raise OSError("it does not answer")
        data += part
    return data.decode("ascii", errors="replace").removesuffix("\n")


def _read_endpoint(line: str) -> tuple[str, int]:
    ip, _, port = line.partition(" ")
    try:
        _family(ip)
        if port.isdecimal() and 0 < int(port) < 65536:
            return ip, int(port)
    except ValueError as error:
        raise OSError("it answered nonsense") from error
    raise OSError("it answered nonsense")


def _family(ip: str) -> socket.AddressFamily:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, ip)
            return family
    raise ValueError(f"{ip[:60]!r} is not an IP address")


def _check_free(address: str) -> None:
    """Libp2p shares ports (SO_REUSEPORT), so it would listen beside another node and get half of its connections."""
    _, family, ip, _, port = address.split("/")
    try:
        with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == "ip6":
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((ip, int(port)))
            probe.listen()
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror}; choose another with --listen, "
            f"for example /{family}/{ip}/tcp/0 for any free port"
        ) from error
