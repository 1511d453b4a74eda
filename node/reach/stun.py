"""One UDP socket per family, by which a node learns how others see it, and tells others how it sees them.

STUN's Binding request and its success response (RFC 8489), nothing else of it: no third party's server is asked, any
public node answers at the UDP port whose number is that of its TCP port. Beside that, **pokes**: datagrams that are
nothing but a token of 16 bytes, sent at somebody's request to see whether its NAT lets them in (as RFC 5780 does with
servers of two addresses). `shoal.node.reach.nat` draws the conclusions.

Nobody gains from a false source address: an answer is longer than its request by one attribute only (on the wire 25 %
with IPv4, 36 % with IPv6), is sent once, and no more than a few a second to each user. Deviation from RFC 8489, 6.3.1:
a request with an attribute that must be understood, and is not, is dropped instead of being answered with error 420.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import secrets
import socket
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Final

import trio

from shoal.node.budgets import Bucket, user_of
from shoal.node.mesh.endpoint import Endpoint, Family
from shoal.node.supervise import Domain, Policy, Supervisor
from shoal.protocol.errors import UsageError

log = logging.getLogger(__name__)

TOKEN_BYTES: Final = 16
"""Fewer than a STUN header has, so that the two are told apart."""
FIRST_RETRY_S: Final = 0.2
"""Then twice that, and so on (RFC 8489, 6.2.1, which begins with 0.5 s)."""
NUM_POKES: Final = 3
POKE_GAP_S: Final = 0.05
CONTACT_S: Final = 300.0
"""How long a NAT may keep a hole open after a datagram (RFC 4787, REQ-5: 5 minutes or more are recommended)."""
MAX_ASKING: Final = 64
MAX_EXPECTED: Final = 64
MAX_CONTACTS: Final = 4096
MAX_USERS: Final = 4096
ANSWERS_PER_S: Final = 5.0
ANSWERS_BURST: Final = 20.0
ALL_ANSWERS_PER_S: Final = 1000.0

_MAX_DATAGRAM_BYTES: Final = 548  # RFC 8489, 6.1: what fits any path
_HEADER: Final = struct.Struct("!HHI12s")
_ATTRIBUTE: Final = struct.Struct("!HH")
_COOKIE: Final = 0x2112A442
_BINDING_REQUEST: Final = 0x0001
_BINDING_SUCCESS: Final = 0x0101
_XOR_MAPPED_ADDRESS: Final = 0x0020
_OPTIONAL: Final = 0x8000  # attributes from here on may be ignored
_FAMILY_CODES: Final = {0x01: 4, 0x02: 16}  # of STUN, and the length of such an address
_NO_SUCH_FAMILY: Final = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}
_PORT_IS_TAKEN: Final = {errno.EADDRINUSE, errno.EACCES}


class StunError(Exception):
    """This node cannot do that; it says nothing about peers or NATs."""


# --- the messages ---


@dataclass(frozen=True, slots=True)
class StunRequest:
    """A Binding request.

    Attributes:
        transaction: 12 random bytes, which the answer repeats.
    """

    transaction: bytes


@dataclass(frozen=True, slots=True)
class StunAnswer:
    """A Binding success response: where the request came from, as its receiver saw it."""

    transaction: bytes
    mapped: Endpoint


def encode_stun(message: StunRequest | StunAnswer) -> bytes:
    """The bytes of a message."""
    if isinstance(message, StunRequest):
        return _HEADER.pack(_BINDING_REQUEST, 0, _COOKIE, message.transaction)
    address = ipaddress.ip_address(message.mapped.ip).packed
    code = next(code for code, length in _FAMILY_CODES.items() if length == len(address))
    value = struct.pack("!BBH", 0, code, message.mapped.port ^ _COOKIE >> 16) + _masked(address, message.transaction)
    attribute = _ATTRIBUTE.pack(_XOR_MAPPED_ADDRESS, len(value)) + value
    return _HEADER.pack(_BINDING_SUCCESS, len(attribute), _COOKIE, message.transaction) + attribute


def decode_stun(data: bytes) -> StunRequest | StunAnswer | None:
    """The message in a datagram; None if it is no such message, or not one for this node."""
    if not _HEADER.size <= len(data) <= _MAX_DATAGRAM_BYTES:
        return None
    kind, length, cookie, transaction = _HEADER.unpack_from(data)
    if cookie != _COOKIE or length != len(data) - _HEADER.size:
        return None
    attributes = _attributes(data[_HEADER.size :])
    if attributes is None:
        return None
    if kind == _BINDING_REQUEST and all(number >= _OPTIONAL for number in attributes):
        return StunRequest(transaction)
    if kind == _BINDING_SUCCESS and _XOR_MAPPED_ADDRESS in attributes:
        mapped = _mapped(attributes[_XOR_MAPPED_ADDRESS], transaction)
        return None if mapped is None else StunAnswer(transaction, mapped)
    return None


def _attributes(body: bytes) -> dict[int, bytes] | None:
    """Values by type, the first of each (RFC 8489, 14); None if they do not add up."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(body):
        if len(body) - at < _ATTRIBUTE.size:
            return None
        number, length = _ATTRIBUTE.unpack_from(body, at)
        at += _ATTRIBUTE.size
        padded = -(-length // 4) * 4
        if len(body) - at < padded:
            return None
        found.setdefault(number, body[at : at + length])
        at += padded
    return found


def _mapped(value: bytes, transaction: bytes) -> Endpoint | None:
    if len(value) < 4 or len(value) - 4 != _FAMILY_CODES.get(value[1]):
        return None
    port = int.from_bytes(value[2:4]) ^ _COOKIE >> 16
    try:
        return Endpoint.parse(str(ipaddress.ip_address(_masked(value[4:], transaction))), port)
    except UsageError:
        return None


def _masked(address: bytes, transaction: bytes) -> bytes:
    mask = _COOKIE.to_bytes(4) + transaction
    return bytes(byte ^ other for byte, other in zip(address, mask, strict=False))


# --- limits ---


class AnswerLimits:
    """How many requests are answered: `ANSWERS_PER_S` for each user (an IPv4 address, an IPv6 /64), and in all."""

    def __init__(self) -> None:
        self._all = Bucket(ALL_ANSWERS_PER_S, ALL_ANSWERS_PER_S)
        self._users: OrderedDict[str, Bucket] = OrderedDict()

    def allow(self, ip: str, now: float) -> bool:
        """Whether to answer a request from there."""
        user = user_of(ip)
        bucket = self._users.setdefault(user, Bucket(ANSWERS_PER_S, ANSWERS_BURST))
        self._users.move_to_end(user)
        if len(self._users) > MAX_USERS:
            self._users.popitem(last=False)
        return bucket.take(now) and self._all.take(now)


# --- the socket ---


@dataclass(slots=True)
class StunStatistics:
    """What came in so far."""

    num_answered: int = 0
    num_refused: int = 0
    """Requests over the limits, or while this node does not answer."""
    num_ignored: int = 0
    """Datagrams that nobody here waits for."""


@dataclass(slots=True)
class _Question:
    server: Endpoint
    answered: trio.Event = field(default_factory=trio.Event)
    mapped: Endpoint | None = None


class Arrival:
    """A poke that is waited for."""

    def __init__(self, source_ip: str) -> None:
        self._source_ip = source_ip
        self._source: Endpoint | None = None
        self._arrived = trio.Event()

    async def wait(self, timeout_s: float) -> Endpoint | None:
        """Where it came from; None if it did not come in time."""
        with trio.move_on_after(timeout_s):
            await self._arrived.wait()
        return self._source

    def _take(self, source: Endpoint) -> bool:
        if source.ip != self._source_ip:
            return False
        self._source = source
        self._arrived.set()
        return True


class Stun:
    """A node's UDP sockets; made by `open_stun`.

    Attributes:
        answers: whether Binding requests are answered; may be set at any time.
        statistics: counters.
    """

    def __init__(self, sockets: dict[Family, trio.socket.SocketType], *, answers: bool) -> None:
        self.answers = answers
        self.statistics = StunStatistics()
        self._sockets = sockets
        self._limits = AnswerLimits()
        self._asking = trio.CapacityLimiter(MAX_ASKING)
        self._questions: dict[bytes, _Question] = {}
        self._expected: dict[bytes, Arrival] = {}
        self._contacts: OrderedDict[str, float] = OrderedDict()

    @property
    def port(self) -> int:
        """The UDP port for IPv4, or that for IPv6 where there is no IPv4."""
        return next(local.port for local in map(self.local, Family) if local is not None)

    def local(self, family: Family) -> Endpoint | None:
        """What the socket of a family is bound to (usually all addresses); None if there is no such socket."""
        sock = self._sockets.get(family)
        return None if sock is None else Endpoint(*sock.getsockname()[:2])

    async def ask(self, server: Endpoint, *, timeout_s: float = 1.0) -> Endpoint | None:
        """Ask how a peer sees this socket.

        Returns:
            This node's endpoint as the peer sees it; None if there was no answer, however often it was asked, in time.

        Raises:
            StunError: if this node has no socket for such an address.
        """
        server = _checked(server)
        sock = self._socket(server.family)
        request = StunRequest(secrets.token_bytes(12))
        question = _Question(server)
        async with self._asking:
            self._questions[request.transaction] = question
            try:
                with trio.move_on_after(timeout_s):
                    wait_s = FIRST_RETRY_S
                    while not question.answered.is_set():
                        await self._send(sock, encode_stun(request), server)
                        with trio.move_on_after(wait_s):
                            await question.answered.wait()
                        wait_s *= 2
            finally:
                del self._questions[request.transaction]
        return question.mapped

    async def poke(self, target: Endpoint, token: bytes, *, other_port: bool) -> None:
        """Send a token of `TOKEN_BYTES` somewhere, `NUM_POKES` times, from this socket or from a new one.

        Whoever does so at a peer's request has to make sure that the address is that peer's.

        Raises:
            StunError: if this node has no socket for such an address.
        """
        if len(token) != TOKEN_BYTES:
            raise StunError(f"a token has {TOKEN_BYTES} bytes, not {len(token)}")
        target = _checked(target)
        sock = self._socket(target.family)
        with contextlib.ExitStack() as stack:
            if other_port:
                try:
                    other = await _bind(target.family, sock.getsockname()[0], 0)
                except OSError as error:
                    raise StunError(f"no other port to poke from: {error}") from error
                sock = stack.enter_context(other)
            for number in range(NUM_POKES):
                if number:
                    await trio.sleep(POKE_GAP_S)
                await self._send(sock, token, target, is_contact=not other_port)

    @contextlib.contextmanager
    def expect(self, token: bytes, source_ip: str) -> Iterator[Arrival]:
        """Let a poke with this token be waited for inside the block, from this address only.

        Raises:
            StunError: if it is no token, or too many are waited for.
        """
        if len(token) != TOKEN_BYTES or token in self._expected or len(self._expected) >= MAX_EXPECTED:
            raise StunError(f"{len(token)} bytes are no new token, or {MAX_EXPECTED} are waited for")
        arrival = self._expected[token] = Arrival(_checked(Endpoint(source_ip, 1)).ip)
        try:
            yield arrival
        finally:
            del self._expected[token]

    def is_stranger(self, ip: str) -> bool:
        """Whether nothing went from here to an address of late, so that no NAT has a hole for it."""
        sent_at = self._contacts.get(ip)
        return sent_at is None or trio.current_time() - sent_at > CONTACT_S

    def _socket(self, family: Family) -> trio.socket.SocketType:
        try:
            return self._sockets[family]
        except KeyError:
            raise StunError(f"this node has no UDP socket for IPv{family.value}") from None

    async def _send(
        self, sock: trio.socket.SocketType, data: bytes, target: Endpoint, *, is_contact: bool = True
    ) -> None:
        if is_contact:
            self._contacts[target.ip] = trio.current_time()
            self._contacts.move_to_end(target.ip)
            if len(self._contacts) > MAX_CONTACTS:
                self._contacts.popitem(last=False)
        try:
            await sock.sendto(data, (target.ip, target.port))
        except OSError as error:  # no route now, or a firewall here: the same as a datagram that is lost further on
            log.debug("no datagram to %s: %s", target, error)

    async def _receive(self, sock: trio.socket.SocketType) -> None:
        while True:
            try:
                data, address = await sock.recvfrom(_MAX_DATAGRAM_BYTES + 1)
            except OSError as error:  # an interface went down
                log.debug("no datagram: %s", error)
                await trio.sleep(FIRST_RETRY_S)
                continue
            with contextlib.suppress(UsageError):  # from port 0, or from a link without global addresses
                await self._take(sock, data, Endpoint.parse(address[0], address[1]))

    async def _take(self, sock: trio.socket.SocketType, data: bytes, source: Endpoint) -> None:
        if len(data) == TOKEN_BYTES:
            arrival = self._expected.get(data)
            if arrival is None or not arrival._take(source):
                self.statistics.num_ignored += 1
            return
        match decode_stun(data):
            case StunRequest(transaction):
                if not self.answers or not self._limits.allow(source.ip, trio.current_time()):
                    self.statistics.num_refused += 1
                    return
                await self._send(sock, encode_stun(StunAnswer(transaction, source)), source)
                self.statistics.num_answered += 1
            case StunAnswer(transaction, mapped):
                question = self._questions.get(transaction)
                if question is None or question.server != source or question.answered.is_set():
                    self.statistics.num_ignored += 1
                    return
                question.mapped = mapped
                question.answered.set()
            case None:
                self.statistics.num_ignored += 1


@contextlib.asynccontextmanager
async def open_stun(
    port_v4: int | None,
    port_v6: int | None,
    *,
    answers: bool,
    ip_v4: str = "0.0.0.0",  # noqa: S104  a node listens on all its addresses, as it does for TCP
    ip_v6: str = "::",
    domain: Domain | None = None,
) -> AsyncIterator[Stun]:
    """The sockets of a node, open inside the block.

    Args:
        port_v4: the port for IPv4, 0 for any, None for none; if it is taken, another one is.
        port_v6: the same for IPv6; there is no socket either if this machine has no IPv6.
        answers: whether Binding requests are answered.
        ip_v4: the address to bind.
        ip_v6: the address to bind.
        domain: in which its tasks may fail; by default one of its own.

    Raises:
        StunError: if there is no socket at all.
    """
    with contextlib.ExitStack() as stack:
        sockets: dict[Family, trio.socket.SocketType] = {}
        for family, ip, port in ((Family.IPV4, ip_v4, port_v4), (Family.IPV6, ip_v6, port_v6)):
            if port is None:
                continue
            try:
                sockets[family] = stack.enter_context(await _bind_or_other(family, ip, port))
            except OSError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise StunError(f"no UDP socket at {ip} port {port}: {error}") from error
                log.debug("no UDP over IPv%d: %s", family, error)
        if not sockets:
            raise StunError("there is no address for a UDP socket; is the network up?")
        stun = Stun(sockets, answers=answers)
        async with contextlib.AsyncExitStack() as outer:
            if domain is None:
                domain = await outer.enter_async_context(Supervisor().open("node"))
            hearing = domain.inside("node", "STUN")
            for sock in sockets.values():
                hearing.start_soon("hearing datagrams", stun._receive, sock, policy=Policy.RESTART)
            try:
                yield stun
            finally:
                hearing.cancel()
                with trio.CancelScope(shield=True):
                    await hearing.wait_gone()


async def _bind_or_other(family: Family, ip: str, port: int) -> trio.socket.SocketType:
    try:
        return await _bind(family, ip, port)
    except OSError as error:
        if error.errno not in _PORT_IS_TAKEN:
            raise
        log.info("UDP port %d is taken; how others see this node is asked from another one", port)
        return await _bind(family, ip, 0)


async def _bind(family: Family, ip: str, port: int) -> trio.socket.SocketType:
    is_v6 = family is Family.IPV6
    sock = trio.socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        if is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((ip, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _checked(endpoint: Endpoint) -> Endpoint:
    """As it is written in the one way, so that no name is ever looked up."""
    try:
        return Endpoint.parse(endpoint.ip, endpoint.port)
    except UsageError as error:
        raise StunError(str(error)) from error
