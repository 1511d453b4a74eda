"""Calls over a real pair of sockets: whatever a handler does, each has its outcome and nobody else is harmed."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from shoal.protocol.errors import (
    LimitError,
    RefusedError,
    RemoteError,
    ResourceError,
    ShoalError,
    Status,
    TooLargeError,
    UsageError,
)
from shoal.protocol.limits import MAX_ANSWER_BYTES, MAX_ATTACHMENT_BYTES, MAX_CALLS_IN_FLIGHT, MAX_MESSAGE_BYTES
from shoal.protocol.services import (
    Call,
    Empty,
    Service,
    bidirectional,
    client,
    client_streaming,
    current_call,
    server_streaming,
    unary,
)

from .channels import (
    ANN,
    KIB,
    MIB,
    PARCEL_BYTES,
    SEED,
    Asked,
    Gate,
    Parcel,
    Probe,
    Question,
    Reply,
    aiter_of,
    ask,
    cancelled_once,
    failure,
    pair_of_channels,
    parcels,
    still_works,
)

pytestmark = pytest.mark.trio


# --- what a call brings ---


async def test_a_typed_call_is_answered_in_either_direction() -> None:
    async with pair_of_channels() as pair:
        assert await pair.to_bob.double(Question(21)) == Reply(42)
        assert await pair.to_ann.double(Question(5)) == Reply(10)


@pytest.mark.parametrize("is_eager", [False, True], ids=["queued writes", "eager writes"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
async def test_many_calls_at_once_get_each_its_own_answer(is_eager: bool, compress: bool) -> None:
    echoes: dict[int, bytes] = {}

    async def echo(probe: Probe, number: int) -> None:
        parcel = await probe.echo(Parcel(number.to_bytes(2, "big") * 5_000))
        echoes[number] = bytes(parcel.content)

    async with (
        pair_of_channels(is_eager=is_eager, compress=compress) as pair,
        trio.open_nursery() as nursery,
    ):
        for number in range(200):
            nursery.start_soon(echo, pair.to_bob if number % 2 else pair.to_ann, number)
    assert echoes == {number: number.to_bytes(2, "big") * 5_000 for number in range(200)}


async def test_a_caller_waits_for_its_turn_rather_than_have_more_calls_open_than_are_let_in() -> None:
    statuses: list[Status] = []
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(MAX_CALLS_IN_FLIGHT + 50):
            nursery.start_soon(ask, pair.to_bob, statuses)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.num_waiting == pair.ann.num_calls == MAX_CALLS_IN_FLIGHT
        gate.release.set()
    assert statuses == [Status.OK] * (MAX_CALLS_IN_FLIGHT + 50)


async def test_a_caller_whose_turn_does_not_come_in_time_is_told_so(autojump_clock: trio.testing.MockClock) -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(MAX_CALLS_IN_FLIGHT):
            nursery.start_soon(ask, pair.to_bob)
        await trio.testing.wait_all_tasks_blocked()
        error = await failure(client(Probe, pair.ann, timeout_s=1).double(Question(1)))
        assert error.status is Status.DEADLINE_EXCEEDED
        assert gate.num_started == MAX_CALLS_IN_FLIGHT
        gate.release.set()


class Urgent(Service, name="probe"):
    @unary(is_urgent=True)
    async def double(self, request: Question) -> Reply:
        raise NotImplementedError


async def test_an_urgent_call_does_not_wait_for_its_turn(autojump_clock: trio.testing.MockClock) -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(MAX_CALLS_IN_FLIGHT + 1):
            nursery.start_soon(ask, pair.to_bob)
        await trio.testing.wait_all_tasks_blocked()
        error = await failure(client(Urgent, pair.ann, timeout_s=1).double(Question(1)))
        assert error.status is Status.RESOURCE_EXHAUSTED, "the far side has said so, and lives"
        gate.release.set()


async def test_calls_made_at_once_leave_in_few_writes_and_so_do_their_answers() -> None:
    async with pair_of_channels() as pair:
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(still_works, pair.to_bob)
        asked, answered = (stream.num_writes for stream in pair.streams)
        assert asked <= 4
        assert answered <= 10


async def test_a_big_answer_and_small_calls_arrive_whole_beside_each_other() -> None:
    content = random.Random(SEED).randbytes(8 * MIB)
    async with pair_of_channels() as pair:

        async def fetch() -> None:
            assert (await pair.to_bob.echo(Parcel(content))).content == content, f"seed {SEED}"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            nursery.start_soon(fetch)
            for _ in range(100):
                await still_works(pair.to_bob)
                await still_works(pair.to_ann)


async def test_each_side_counts_the_calls_that_it_made_or_served() -> None:
    async def fail() -> None:
        raise RefusedError("no")

    async with pair_of_channels(Asked(fail)) as pair:
        await pair.to_bob.echo(Parcel(bytes(1000)))
        await ask(pair.to_bob)
        await pair.to_bob.collect(aiter_of(parcels(3)))
        assert [parcel async for parcel in pair.to_bob.send(Question(2))]
        assert [parcel async for parcel in pair.to_bob.pass_back(aiter_of(parcels(2)))]
        for side in (pair.metrics.called, pair.metrics.served):
            assert {name: method.calls for name, method in side.items()} == dict.fromkeys(
                ["probe.echo", "probe.ask", "probe.collect", "probe.send", "probe.pass_back"], 1
            )
            assert side["probe.ask"].errors == {Status.PERMISSION_DENIED: 1}
            assert side["probe.send"].errors == side["probe.echo"].errors == {}
            assert side["probe.echo"].request_bytes >= 1000
            assert side["probe.echo"].answer_bytes >= 1000
            streamed = side["probe.collect"], side["probe.send"], side["probe.pass_back"]
            assert [method.request_bytes // PARCEL_BYTES for method in streamed] == [3, 0, 2]
            assert [method.answer_bytes // PARCEL_BYTES for method in streamed] == [0, 2, 2]


@pytest.mark.parametrize("size", [KIB, 200 * KIB, 8 * MIB])
async def test_memory_that_was_sent_is_the_callers_own_again_when_its_call_has_returned(size: int) -> None:
    class Taking(Probe):
        async def bulky(self, request: Parcel) -> Empty:
            return Empty()

    async with pair_of_channels(Taking()) as pair:
        memory = bytearray(size)
        await pair.to_bob.bulky(Parcel(memoryview(memory)))
        memory.clear()  # a BufferError, as long as anybody has a view of it


@pytest.mark.parametrize("kind", ["request", "answer", "streamed answer"])
async def test_what_was_received_is_kept_by_nobody_who_waits_for_more(kind: str) -> None:
    received: list[weakref.ref[object]] = []

    class Noting(Probe):
        async def bulky(self, request: Parcel) -> Empty:
            received.append(weakref.ref(request.content))
            return Empty()

    async with pair_of_channels(Noting()) as pair:
        match kind:
            case "request":
                await pair.to_bob.bulky(Parcel(bytes(MIB)))
            case "answer":
                received.append(weakref.ref((await pair.to_bob.echo(Parcel(bytes(MIB)))).content))
            case _:
                received += [weakref.ref(parcel.content) async for parcel in pair.to_bob.send(Question(1))]
        await trio.testing.wait_all_tasks_blocked()
        assert [kept() for kept in received] == [None]


# --- how a call fails ---


class Unserved(Service, name="unserved"):
    @unary()
    async def ask(self, request: Empty) -> Empty:
        raise NotImplementedError


class Misasked(Service, name="probe"):
    """What somebody takes Probe for who has another version of it."""

    @unary()
    async def double(self, request: Empty) -> Reply:
        raise NotImplementedError

    @bidirectional()
    def pass_back(self, requests: AsyncIterator[Question]) -> AsyncIterator[Parcel]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Other:
    words: str


class Misanswered(Service, name="probe"):
    @unary()
    async def double(self, request: Question) -> Other:
        raise NotImplementedError

    @server_streaming()
    def send(self, request: Question) -> AsyncIterator[Other]:
        raise NotImplementedError


class OtherKind(Service, name="probe"):
    @server_streaming()
    def double(self, request: Question) -> AsyncIterator[Reply]:
        raise NotImplementedError


async def endless() -> AsyncGenerator[Parcel]:
    while True:
        yield Parcel(bytes(KIB))


async def test_a_method_that_nobody_serves_is_unimplemented() -> None:
    async with pair_of_channels() as pair:
        error = await failure(client(Unserved, pair.ann).ask(Empty()))
        assert error.status is Status.UNIMPLEMENTED
        assert "unserved.ask" in error.message
        assert "unserved.ask" not in pair.metrics.served, "a stranger could grow it"
        await still_works(pair.to_bob)


async def test_a_method_of_another_kind_is_an_invalid_argument() -> None:
    async with pair_of_channels() as pair:
        with pytest.raises(RemoteError, match="UNARY") as caught:
            await anext(aiter(client(OtherKind, pair.ann).double(Question(1))))
        assert caught.value.status is Status.INVALID_ARGUMENT
        await still_works(pair.to_bob)


async def test_a_request_of_the_wrong_type_is_an_invalid_argument() -> None:
    async with pair_of_channels() as pair:
        error = await failure(client(Misasked, pair.ann).double(Empty()))
        assert error.status is Status.INVALID_ARGUMENT
        assert "Question.number is missing" in error.message
        with pytest.raises(RemoteError, match=r"Parcel\.content is missing") as caught:
            await anext(aiter(client(Misasked, pair.ann).pass_back(aiter_of([Question(1)]))))
        assert caught.value.status is Status.INVALID_ARGUMENT
        await still_works(pair.to_bob)


async def test_an_answer_of_the_wrong_type_fails_the_call_and_nothing_else() -> None:
    async with pair_of_channels() as pair:
        stub = client(Misanswered, pair.ann)
        error = await failure(stub.double(Question(1)))
        assert error.status is Status.INTERNAL
        assert "nonsense" in error.message
        with pytest.raises(RemoteError, match="nonsense") as caught:
            await anext(aiter(stub.send(Question(1))))
        assert caught.value.status is Status.INTERNAL
        await still_works(pair.to_bob)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RemoteError(Status.NOT_FOUND, "its words"), Status.NOT_FOUND),
        (LimitError("its words"), Status.RESOURCE_EXHAUSTED),
        (TooLargeError("its words"), Status.RESOURCE_EXHAUSTED),
        (ResourceError("its words"), Status.RESOURCE_EXHAUSTED),
        (RefusedError("its words"), Status.PERMISSION_DENIED),
        (UsageError("its words"), Status.INVALID_ARGUMENT),
        (ShoalError("its words"), Status.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_on_purpose_tells_the_caller_its_status_and_words_once(error: Exception, status: Status) -> None:
    class Failing(Probe):
        async def ask(self, request: Empty) -> Empty:
            raise error

        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            yield Parcel(b"the first")
            raise error

        async def collect(self, requests: AsyncIterator[Parcel]) -> Reply:
            raise error

        async def pass_back(self, requests: AsyncIterator[Parcel]) -> AsyncIterator[Parcel]:
            yield await anext(requests)
            raise error

    async with pair_of_channels(Failing()) as pair:
        told = await failure(pair.to_bob.ask(Empty()))
        assert (told.status, told.message) == (status, "its words")
        told = await failure(pair.to_bob.collect(endless()))
        assert (told.status, told.message) == (status, "its words")
        for stream in (pair.to_bob.send(Question(1)), pair.to_bob.pass_back(endless())):
            answers = aiter(stream)
            await anext(answers)
            told = await failure(anext(answers))
            assert (told.status, told.message) == (status, "its words")
        await still_works(pair.to_bob)


async def test_an_error_on_purpose_in_a_nursery_of_the_handler_keeps_its_status_and_words() -> None:
    async def fail() -> None:
        async def miss() -> None:
            raise RemoteError(Status.NOT_FOUND, "its words")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(miss)

    async with pair_of_channels(Asked(fail)) as pair:
        told = await failure(pair.to_bob.ask(Empty()))
        assert (told.status, told.message) == (Status.NOT_FOUND, "its words")
        assert pair.metrics.served["probe.ask"].errors == {Status.NOT_FOUND: 1}


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("secret path"), ExceptionGroup("secret", [OSError("secret")])],
    ids=["exception", "group"],
)
async def test_a_handler_that_breaks_is_an_internal_error_without_details_and_the_node_lives_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise error

    async with pair_of_channels(Asked(fail)) as pair:
        told = await failure(pair.to_bob.ask(Empty()))
        assert told.status is Status.INTERNAL
        assert "secret" not in told.message
        assert "the handler of probe.ask failed" in caplog.text
        await still_works(pair.to_bob)
        await still_works(pair.to_ann)


async def test_a_handler_that_breaks_while_it_is_cancelled_leaves_the_node_alive(
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = trio.Event()

    async def break_when_cancelled() -> None:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError("in its cleanup")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
            started.set()

    async with pair_of_channels(Asked(break_when_cancelled)) as pair:
        for _ in range(2):
            await cancelled_once(started, ask, pair.to_bob)
            await still_works(pair.to_bob)
            started = trio.Event()
        assert "failed when it was cancelled" in caplog.text
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, pair.to_bob)
            await started.wait()
            pair.bob.stop()


async def test_an_answer_that_cannot_be_sent_is_an_error_not_a_silence() -> None:
    class TooMuch(Probe):
        async def echo(self, request: Parcel) -> Parcel:
            return Parcel(bytes(MAX_ATTACHMENT_BYTES + 1))

        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            yield Parcel(bytes(MAX_MESSAGE_BYTES))

    async with pair_of_channels(TooMuch()) as pair:
        error = await failure(pair.to_bob.echo(Parcel(b"")))
        assert error.status is Status.RESOURCE_EXHAUSTED
        error = await failure(anext(aiter(pair.to_bob.send(Question(1)))))
        assert error.status is Status.RESOURCE_EXHAUSTED


async def test_an_answer_is_not_larger_than_its_method_says() -> None:
    class Talker(Probe, name="talker"):
        @unary()
        async def talk(self, request: Question) -> Parcel:
            return Parcel(bytes(request.number))

        @client_streaming(max_answer_bytes=1000)
        async def sum_up(self, requests: AsyncIterator[Question]) -> Parcel:
            return Parcel(bytes((await anext(requests)).number))

    async with pair_of_channels(Talker()) as pair:
        stub = client(Talker, pair.ann)
        assert len((await stub.talk(Question(MAX_ANSWER_BYTES - 100))).content) == MAX_ANSWER_BYTES - 100
        error = await failure(stub.talk(Question(MAX_ANSWER_BYTES + 1)))
        assert error.status is Status.INTERNAL
        assert "talker.talk" in error.message
        assert len((await stub.sum_up(aiter_of([Question(900)]))).content) == 900
        error = await failure(stub.sum_up(aiter_of([Question(1001)])))
        assert error.status is Status.INTERNAL


async def test_a_request_that_is_too_big_is_the_callers_own_error_and_reaches_nobody() -> None:
    async with pair_of_channels() as pair:
        with pytest.raises(TooLargeError):
            await pair.to_bob.echo(Parcel(bytes(MAX_ATTACHMENT_BYTES + 1)))
        with pytest.raises(TooLargeError):
            await pair.to_bob.collect(aiter_of([Parcel(bytes(MAX_MESSAGE_BYTES))]))
        with pytest.raises(TooLargeError):
            await anext(aiter(pair.to_bob.pass_back(aiter_of([Parcel(bytes(MAX_MESSAGE_BYTES))]))))
        assert pair.ann.num_calls == 0
        await still_works(pair.to_bob)


# --- what a handler knows ---


async def test_a_handler_knows_who_calls_what_until_when_before_and_after_it_waited() -> None:
    seen: list[Call] = []
    arrived = 0
    all_here = trio.Event()

    async def note() -> None:
        nonlocal arrived
        before = current_call()
        arrived += 1
        if arrived == 3:
            all_here.set()
        await all_here.wait()
        assert current_call() is before
        seen.append(before)

    class Noting(Asked):
        async def send(self, request: Question) -> AsyncIterator[Parcel]:
            await note()
            yield Parcel(b"")
            assert current_call().method == "probe.send"

    async with pair_of_channels(Noting(note)) as pair:

        async def receive() -> None:
            assert len([parcel async for parcel in pair.to_bob.send(Question(1))]) == 1

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, client(Probe, pair.ann, timeout_s=5))
            nursery.start_soon(ask, client(Probe, pair.ann, timeout_s=500))
            nursery.start_soon(receive)
    assert {call.peer for call in seen} == {ANN}
    assert sorted(call.method for call in seen) == ["probe.ask", "probe.ask", "probe.send"]
    deadlines = sorted(call.deadline - began for call in seen)
    assert deadlines == [pytest.approx(5, abs=2), pytest.approx(500, abs=2), float("inf")]


_mood: ContextVar[str] = ContextVar("mood", default="none")


@pytest.mark.parametrize("how", ["at once", "waiting", "failing", "cancelled"])
async def test_context_variables_do_not_leak_from_call_to_call(how: str) -> None:
    seen: list[str] = []
    started = trio.Event()

    class Moody(Probe):
        async def ask(self, request: Empty) -> Empty:
            seen.append(_mood.get())
            _mood.set("of an earlier call")
            started.set()
            match how:
                case "waiting":
                    await trio.lowlevel.checkpoint()
                case "failing":
                    raise RefusedError("no")
                case "cancelled":
                    await trio.sleep_forever()
            return request

        async def double(self, request: Question) -> Reply:
            seen.append(_mood.get())
            return Reply(2 * request.number)

    _mood.set("of the caller")
    async with pair_of_channels(Moody()) as pair:
        _mood.set("of a later caller")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask, pair.to_bob)
                nursery.start_soon(still_works, pair.to_bob)
            if how == "cancelled":
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        for _ in range(6):
            await still_works(pair.to_bob)
    assert seen == ["of the caller"] * 26, "that of the task which made the channel"


# --- fairness ---


async def test_a_slow_handler_does_not_hold_up_other_calls() -> None:
    gate = Gate()
    async with pair_of_channels(gate) as pair, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask, pair.to_bob)
            await gate.started.wait()
            await still_works(pair.to_bob)
            await still_works(pair.to_ann)
        assert gate.num_waiting == 10
        gate.release.set()


async def test_many_short_calls_let_other_tasks_run_in_between() -> None:
    turns = 0
    in_turn: dict[int, int] = {}

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def work() -> None:
        in_turn[turns] = in_turn.get(turns, 0) + 1
        end = time.perf_counter() + 0.0005
        while time.perf_counter() < end:
            pass

    async with pair_of_channels(Asked(work)) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        async with trio.open_nursery() as callers:
            for _ in range(200):
                callers.start_soon(ask, pair.to_bob)
        nursery.cancel_scope.cancel()
    assert sum(in_turn.values()) == 200
    assert max(in_turn.values()) <= 10, "calls of half a millisecond each in one turn of the loop"
