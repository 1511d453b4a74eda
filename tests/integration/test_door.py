"""The node's one TCP port: what comes in by it besides libp2p and lanes, and dialing out from it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from shoal.node.mesh import door as door_module
from shoal.node.mesh.door import KNOCK, MAX_SILENT_PER_IP, NONCE_BYTES, QUESTION, knock
from shoal.node.mesh.host import Host, open_host
from shoal.node.wire.channel import Router

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 20.0
GARBAGE = bytes(range(256)) * 4
A_MOMENT_S = 0.1
"""Long enough on loopback for what should not happen to happen."""


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@asynccontextmanager
async def host(number: int, *listen: str) -> AsyncIterator[Host]:
    with trio.fail_after(GENEROUS_S):
        async with open_host(
            secret=bytes([number]) * 32, listen=listen or [LOOPBACK], bootstrap=[], mdns=False, router=Router()
        ) as opened:
            yield opened


def port_of(one: Host, ip: str = "127.0.0.1") -> int:
    port = one.door.port(ip)
    assert port is not None
    return port


async def is_shut(stream: trio.SocketStream) -> bool:
    """Read until the far end has closed it."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some():
            pass
    return True


@asynccontextmanager
async def listening(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """Somebody else at a port of its own."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


# --- knocks ---


async def test_a_knock_with_the_nonce_tells_whoever_expects_it() -> None:
    async with host(1) as one:
        with one.door.expect_knock() as (nonce, came):
            assert len(nonce) == NONCE_BYTES
            assert await knock("127.0.0.1", port_of(one), nonce, timeout_s=GENEROUS_S)
            await came.wait()


async def test_a_knock_tells_nobody_but_the_one_whose_nonce_it_shows() -> None:
    async with host(1) as one:
        with one.door.expect_knock() as (nonce, came), one.door.expect_knock() as (other_nonce, other_came):
            assert nonce != other_nonce
            for wrong in (os.urandom(NONCE_BYTES), nonce[:-1], nonce[1:] + nonce[:1], b""):
                assert await knock("127.0.0.1", port_of(one), wrong, timeout_s=GENEROUS_S)
            assert await knock("127.0.0.1", port_of(one), other_nonce, timeout_s=GENEROUS_S)
            await other_came.wait()
            assert not came.is_set()


async def test_a_nonce_counts_no_more_when_nobody_expects_it() -> None:
    async with host(1) as one:
        with one.door.expect_knock() as (nonce, came):
            pass
        assert await knock("127.0.0.1", port_of(one), nonce, timeout_s=GENEROUS_S)
        assert not came.is_set()


async def test_a_knock_at_a_closed_port_or_on_one_who_never_answers_is_none() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert not await knock("127.0.0.1", closed.getsockname()[1], bytes(NONCE_BYTES), timeout_s=GENEROUS_S)

    async def hold(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with listening(hold) as port:
        assert not await knock("127.0.0.1", port, bytes(NONCE_BYTES), timeout_s=A_MOMENT_S)


# --- how another node sees this one's port ---


async def test_another_node_says_from_where_it_sees_this_ones_port() -> None:
    async with host(1) as one, host(2) as other, one.door.seen_by("127.0.0.1", port_of(other)) as (local, seen):
        assert local == seen == ("127.0.0.1", port_of(one))


async def test_those_who_ask_at_the_same_time_share_one_question_and_it_stays_open_for_the_last() -> None:
    async with host(1) as one, host(2) as other:
        asked = ("127.0.0.1", port_of(other))
        answers = []
        is_first_out, may_last_go = trio.Event(), trio.Event()

        async def first() -> None:
            async with one.door.seen_by(*asked) as answer:
                answers.append(answer)
            is_first_out.set()

        async def last() -> None:
            async with one.door.seen_by(*asked) as answer:
                answers.append(answer)
                await may_last_go.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(last)
            nursery.start_soon(first)
            await is_first_out.wait()
            with pytest.raises(OSError, match="assign"):  # the same two ends once more
                await one.door.dial(*asked, from_port=True)
            may_last_go.set()
        assert answers == 2 * [(("127.0.0.1", port_of(one)),) * 2]
        with trio.fail_after(GENEROUS_S):
            async with one.door.seen_by(*asked):  # which waits until the last one's end is confirmed
                pass


async def test_a_question_that_fails_leaves_the_next_one_to_ask_for_itself() -> None:
    num_asked = 0

    async def answer_the_second(stream: trio.SocketStream) -> None:
        nonlocal num_asked
        num_asked += 1
        await stream.receive_some()
        await stream.send_all(b"nonsense\n" if num_asked == 1 else b"192.0.2.1 80\n")
        await stream.receive_some()

    async with host(1) as one, listening(answer_the_second) as port:
        outcomes: list[object] = []

        async def ask_once() -> None:
            try:
                async with one.door.seen_by("127.0.0.1", port) as (_, seen):
                    outcomes.append(seen)
            except OSError as error:
                outcomes.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_once)
            nursery.start_soon(ask_once)
        assert outcomes == ["it answered nonsense", ("192.0.2.1", 80)]


async def test_a_question_that_the_other_node_has_ended_is_asked_anew() -> None:
    num_asked = 0

    async def end_at_once(stream: trio.SocketStream) -> None:
        nonlocal num_asked
        num_asked += 1
        await stream.receive_some()
        await stream.send_all(b"192.0.2.1 80\n")

    async with host(1) as one, listening(end_at_once) as port:
        async with one.door.seen_by("127.0.0.1", port):
            await trio.sleep(A_MOMENT_S)
            with trio.move_on_after(A_MOMENT_S):  # the old one's ends are taken until it is let go
                async with one.door.seen_by("127.0.0.1", port):
                    pytest.fail("what is over was shared")
        async with one.door.seen_by("127.0.0.1", port):
            assert num_asked == 2


async def test_a_spare_port_is_asked_about_and_dialed_from_beside_the_one_listened_on() -> None:
    async with host(1) as one, host(2) as other:
        asked = ("127.0.0.1", port_of(other))
        with one.door.spare_port() as spare:
            assert spare != port_of(one)
            async with one.door.seen_by(*asked), one.door.seen_by(*asked, spare_port=spare) as (local, seen):
                assert local == seen == ("127.0.0.1", spare)


async def test_a_question_is_not_kept_open_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "QUESTION_S", 0.05)
    async with host(1) as one, await trio.open_tcp_stream("127.0.0.1", port_of(one)) as asker:
        await asker.send_all(QUESTION)
        line = await asker.receive_some()
        assert line == f"127.0.0.1 {asker.socket.getsockname()[1]}\n".encode()
        assert await is_shut(asker)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\n",
        b"127.0.0.1",
        b"127.0.0.1\n",
        b"127.0.0.1 \n",
        b"127.0.0.1 0\n",
        b"127.0.0.1 65536\n",
        b"127.0.0.1 -5\n",
        b"127.0.0.1 5 6\n",
        b"example.org 80\n",
        b" 80\n",
        b"\xff\xfe\xfd 80\n",
        "127.0.0.1 ٣\n".encode(),
        b"x" * 100_000,
        b"127.0.0.1 " + b"0" * 1000 + b"80\n",
    ],
)
async def test_an_answer_that_is_no_endpoint_is_an_error_and_nothing_else(answer: bytes) -> None:
    async def lie(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.receive_some()
            await stream.send_all(answer)

    async with host(1) as one, listening(lie) as port:
        with pytest.raises(OSError, match=r"."):
            async with one.door.seen_by("127.0.0.1", port):
                pytest.fail("it was believed")


@needs_ipv6
async def test_a_node_that_listens_on_both_families_asks_each_from_its_own_port() -> None:
    listen = (LOOPBACK, "/ip6/::1/tcp/0")
    async with host(1, *listen) as one, host(2, *listen) as other:
        assert port_of(one, "::1") != port_of(one)
        async with one.door.seen_by("::1", port_of(other, "::1")) as (local, seen):
            assert local == seen == ("::1", port_of(one, "::1"))


# --- dialing ---


async def test_a_dial_from_the_port_comes_from_the_port_and_any_other_does_not() -> None:
    seen: list[int] = []

    async def look(stream: trio.SocketStream) -> None:
        seen.append(stream.socket.getpeername()[1])

    async with host(1) as one, listening(look) as port:
        for from_port in (True, False):
            async with await one.door.dial("127.0.0.1", port, from_port=from_port) as stream:
                assert await is_shut(stream)
        assert seen[0] == port_of(one)
        assert seen[1] != port_of(one)


async def test_there_is_no_dialing_from_a_port_in_a_family_that_is_not_listened_on() -> None:
    async with host(1) as one:
        assert one.door.port("::1") is None
        with pytest.raises(OSError, match="does not listen on AF_INET6"):
            await one.door.dial("::1", 1, from_port=True)


async def test_a_dial_that_is_given_up_leaves_no_socket_open() -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  counted only

    async with host(1) as one:
        before = num_open()
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            for from_port in (True, False):
                with pytest.raises(OSError, match="refused"):
                    await one.door.dial("127.0.0.1", closed.getsockname()[1], from_port=from_port)
            with trio.CancelScope() as scope:
                scope.cancel()
                await one.door.dial("127.0.0.1", closed.getsockname()[1])
            assert scope.cancelled_caught
        assert num_open() == before


async def test_what_is_no_ip_is_not_looked_up() -> None:
    async with host(1) as one:
        for name in ("localhost", "example.org", ""):
            with pytest.raises(ValueError, match="not an IP"):
                await one.door.dial(name, 1)


# --- hostile first bytes ---


def hello(one: Host) -> Awaitable[Any]:
    """Whether the port still serves: a question is answered."""
    return ask(port_of(one))


async def ask(port: int) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(QUESTION)
        assert (await stream.receive_some()).startswith(b"127.0.0.1 ")


@pytest.mark.parametrize(
    "first",
    [
        b"\x00",
        b"\xff" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        KNOCK,
        KNOCK + bytes(NONCE_BYTES - 1),
        KNOCK + 100 * GARBAGE,
        QUESTION * 100_000,
        QUESTION + KNOCK,
        b"\x16" + GARBAGE,
        b"\x13" + GARBAGE,
        b"\x13/multistream/1.0.0\n" + b"\xff" * 1000,
    ],
    ids=lambda first: first[:4].hex(),
)
async def test_whatever_comes_first_only_ends_its_own_connection(first: bytes) -> None:
    async with host(1) as one:
        with one.door.expect_knock() as (_, came):
            async with await trio.open_tcp_stream("127.0.0.1", port_of(one)) as stranger:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stranger.send_all(first)
                    await stranger.send_eof()
                assert await is_shut(stranger)
            assert not came.is_set()
        await hello(one)
        async with host(2) as other:
            await other.connect(one.addresses())


async def test_a_connection_that_is_reset_at_once_does_no_harm() -> None:
    async with host(1) as one:
        for _ in range(20):
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(one))
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            await stream.aclose()
        await hello(one)


async def test_questions_of_one_address_are_bounded_and_those_of_others_are_answered() -> None:
    """An open question costs a socket, so it counts as a connection that has not said anything yet."""
    async with host(1) as one, AsyncExitStack() as stack:

        async def answered(ip: str) -> bool:
            sock = trio.socket.socket()
            await sock.bind((ip, 0))
            await sock.connect(("127.0.0.1", port_of(one)))
            stream = await stack.enter_async_context(trio.SocketStream(sock))
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(QUESTION)
                return await stream.receive_some() != b""
            return False

        assert [await answered("127.0.0.2") for _ in range(MAX_SILENT_PER_IP + 3)] == (
            MAX_SILENT_PER_IP * [True] + 3 * [False]
        )
        assert await answered("127.0.0.3")
