"""A service is a class whose annotations are its schema, checked when it is made, and by the type checker after."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_ANSWER_BYTES, MAX_STREAM_HELD_BYTES
from shoal.protocol.services import (
    TIMEOUT_S,
    Call,
    CallKind,
    Empty,
    Method,
    Service,
    bidirectional,
    client,
    client_streaming,
    current_call,
    server_streaming,
    set_current_call,
    unary,
    unimplemented,
)
from shoal.protocol.signing import Signer

ROOT = Path(__file__).resolve().parents[2]
ANN = Signer(bytes(32)).peer_id

Request = TypeVar("Request")
Answer = TypeVar("Answer")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    name: str


@dataclass(frozen=True, slots=True)
class Report:
    text: str


class Weather(Service, name="weather"):
    """A method of each kind."""

    @unary(idempotent=True, timeout_s=3.0, max_answer_bytes=500, max_calls_per_s=7.0)
    async def report(self, request: Place) -> Report:
        raise NotImplementedError

    @server_streaming()
    def watch(self, request: Place) -> AsyncIterator[Report]:
        raise NotImplementedError

    @client_streaming(max_answer_bytes=100)
    async def compare(self, requests: AsyncIterator[Place]) -> Report:
        raise NotImplementedError

    @bidirectional(timeout_s=60.0)
    def follow(self, requests: AsyncIterator[Place]) -> AsyncIterator[Report]:
        raise NotImplementedError

    def helper(self) -> None:
        """Not a method that can be called from elsewhere."""


class Station(Weather):
    """Serves them."""

    async def report(self, request: Place) -> Report:
        return Report(f"rain in {request.name}")

    async def watch(self, request: Place) -> AsyncIterator[Report]:
        yield Report(f"rain in {request.name}")
        yield Report(f"sun in {request.name}")

    async def compare(self, requests: AsyncIterator[Place]) -> Report:
        return Report(" < ".join([place.name async for place in requests]))

    async def follow(self, requests: AsyncIterator[Place]) -> AsyncIterator[Report]:
        async for place in requests:
            yield Report(f"rain in {place.name}")


class Loopback:
    """A `Caller` whose far side is a service in the same process; it keeps what it was asked for."""

    def __init__(self, service: Service) -> None:
        self.asked: list[tuple[str, float | None]] = []
        self._service = service

    def _handler(self, method: Method[Any, Any], timeout_s: float | None) -> Callable[[Any], Any]:
        self.asked.append((method.name, timeout_s))
        for attribute, known in self._service.methods.items():
            if known is method:
                return getattr(self._service, attribute)  # type: ignore[no-any-return]
        raise unimplemented(method.name)

    async def call(
        self, method: Method[Request, Answer], request: Request, *, timeout_s: float | None = None
    ) -> Answer:
        answer = await self._handler(method, timeout_s)(request)
        assert isinstance(answer, method.answer)
        return answer

    async def call_with_stream(
        self, method: Method[Request, Answer], requests: AsyncIterator[Request], *, timeout_s: float | None = None
    ) -> Answer:
        answer = await self._handler(method, timeout_s)(requests)
        assert isinstance(answer, method.answer)
        return answer

    async def call_for_stream(
        self,
        method: Method[Request, Answer],
        request: Request | AsyncIterator[Request],
        *,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        async for answer in self._handler(method, timeout_s)(request):
            assert isinstance(answer, method.answer)
            yield answer


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run what waits for nothing, without a loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError("it waits for something")


async def every(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


async def some(*items: T) -> AsyncIterator[T]:
    for item in items:
        yield item


# --- what a class declares -------------------------------------------------------------------------------------------


def test_a_service_knows_its_methods_by_their_annotations() -> None:
    assert Weather.methods == {
        "report": Method("weather.report", Place, Report, CallKind.UNARY, True, 3.0, 500, 7.0),
        "watch": Method(
            "weather.watch", Place, Report, CallKind.SERVER_STREAMING, False, None, MAX_STREAM_HELD_BYTES, None
        ),
        "compare": Method("weather.compare", Place, Report, CallKind.CLIENT_STREAMING, False, None, 100, None),
        "follow": Method(
            "weather.follow", Place, Report, CallKind.BIDIRECTIONAL, False, 60.0, MAX_STREAM_HELD_BYTES, None
        ),
    }


def test_a_method_that_says_nothing_more_is_tried_once_and_waited_for_a_while() -> None:
    class Plain(Service, name="plain"):
        @unary()
        async def ask(self, request: Place) -> Empty:
            raise NotImplementedError

    assert Plain.methods["ask"] == Method("plain.ask", Place, Empty)
    assert Plain.methods["ask"].idempotent is False
    assert (Plain.methods["ask"].timeout_s, Plain.methods["ask"].max_answer_bytes) == (TIMEOUT_S, MAX_ANSWER_BYTES)


@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        (CallKind.UNARY, (False, False)),
        (CallKind.SERVER_STREAMING, (False, True)),
        (CallKind.CLIENT_STREAMING, (True, False)),
        (CallKind.BIDIRECTIONAL, (True, True)),
    ],
)
def test_a_kind_says_which_sides_are_streams(kind: CallKind, streams: tuple[bool, bool]) -> None:
    assert (kind.streams_requests, kind.streams_answers) == streams


def test_an_implementation_has_the_methods_of_what_it_implements_and_no_others() -> None:
    assert Station.methods is Weather.methods
    assert "helper" not in Station.methods


def test_a_service_may_extend_another_and_each_name_stays_as_it_was_declared() -> None:
    class MoreWeather(Weather, name="more-weather"):
        @unary()
        async def forecast(self, request: Place) -> Report:
            raise NotImplementedError

    assert MoreWeather.methods["forecast"].name == "more-weather.forecast"
    assert MoreWeather.methods["report"] is Weather.methods["report"]
    assert "forecast" not in Weather.methods


def test_a_service_with_another_name_is_another_service() -> None:
    class Other(Service, name="other"):
        @unary()
        async def report(self, request: Place) -> Report:
            raise NotImplementedError

    assert Other.methods["report"].name == "other.report"
    assert Service.methods == {}


def declared(declare: Callable[[], Callable[[Any], Any]], signature: str) -> Method[Any, Any]:
    """The method that a class would get which declares a function of this signature."""
    scope: dict[str, Any] = {}
    exec(f"def ask{signature}: raise NotImplementedError", globals(), scope)
    service: type[Service] = type("Planted", (Service,), {"ask": declare()(scope["ask"])}, name="planted")
    return service.methods["ask"]


ONE, MANY = "(self, request: Place)", "(self, requests: AsyncIterator[Place])"


@pytest.mark.parametrize(
    ("declare", "signature"),
    [
        (unary, f"{ONE} -> Report"),
        (server_streaming, f"{ONE} -> AsyncIterator[Report]"),
        (client_streaming, f"{MANY} -> Report"),
        (bidirectional, f"{MANY} -> AsyncIterator[Report]"),
    ],
)
def test_annotations_that_are_those_of_the_kind_are_let_through(
    declare: Callable[[], Callable[[Any], Any]], signature: str
) -> None:
    method = declared(declare, signature)
    assert (method.name, method.request, method.answer) == ("planted.ask", Place, Report)


@pytest.mark.parametrize(
    ("declare", "signature"),
    [
        (unary, "(self) -> Report"),
        (unary, "(self, request) -> Report"),
        (unary, ONE),
        (unary, "(self, request: Place, again: Place) -> Report"),
        (unary, "(self, request: str) -> Report"),
        (unary, f"{ONE} -> str"),
        (unary, f"{ONE} -> None"),
        (unary, f"{ONE} -> Report | None"),
        (unary, f"{ONE} -> AsyncIterator[Report]"),
        (unary, f"{MANY} -> Report"),
        (server_streaming, f"{ONE} -> Report"),
        (server_streaming, f"{ONE} -> list[Report]"),
        (server_streaming, f"{ONE} -> AsyncIterator"),
        (server_streaming, f"{ONE} -> AsyncIterator[str]"),
        (server_streaming, f"{MANY} -> AsyncIterator[Report]"),
        (client_streaming, f"{ONE} -> Report"),
        (client_streaming, "(self, requests: AsyncIterator[str]) -> Report"),
        (client_streaming, f"{MANY} -> AsyncIterator[Report]"),
        (bidirectional, f"{ONE} -> AsyncIterator[Report]"),
        (bidirectional, f"{MANY} -> Report"),
    ],
)
def test_annotations_that_are_not_those_of_the_kind_are_type_errors_when_the_class_is_made(
    declare: Callable[[], Callable[[Any], Any]], signature: str
) -> None:
    with pytest.raises(TypeError, match=r"planted\.ask"):
        declared(declare, signature)


# --- what calls it ---------------------------------------------------------------------------------------------------


def test_a_stub_calls_each_kind_through_its_caller() -> None:
    caller = Loopback(Station())
    stub = client(Weather, caller)
    assert finish(stub.report(Place("Bergen"))) == Report("rain in Bergen")
    assert finish(every(stub.watch(Place("Oslo")))) == [Report("rain in Oslo"), Report("sun in Oslo")]
    assert finish(stub.compare(some(Place("Bergen"), Place("Oslo")))) == Report("Bergen < Oslo")
    assert finish(every(stub.follow(some(Place("Bergen"), Place("Oslo"))))) == [
        Report("rain in Bergen"),
        Report("rain in Oslo"),
    ]
    names = ["weather.report", "weather.watch", "weather.compare", "weather.follow"]
    assert caller.asked == [(name, None) for name in names]


def test_a_stub_passes_its_time_on_with_every_call() -> None:
    caller = Loopback(Station())
    hasty, patient = client(Weather, caller, timeout_s=0.5), client(Weather, caller, timeout_s=90.0)
    finish(hasty.report(Place("Bergen")))
    finish(every(hasty.watch(Place("Bergen"))))
    finish(patient.compare(some(Place("Bergen"))))
    finish(every(patient.follow(some())))
    assert [timeout_s for _, timeout_s in caller.asked] == [0.5, 0.5, 90.0, 90.0]


def test_a_stub_of_an_implementation_is_one_of_its_service() -> None:
    assert finish(client(Station, Loopback(Station())).report(Place("Bergen"))) == Report("rain in Bergen")


def test_a_stub_has_nothing_but_the_methods_that_can_be_called() -> None:
    assert not hasattr(client(Weather, Loopback(Station())), "helper")


def test_a_stub_does_not_run_what_its_service_does_when_it_is_made() -> None:
    class Heavy(Weather):
        def __init__(self) -> None:
            raise AssertionError("a stub is not the service")

    client(Heavy, Loopback(Station()))


def test_a_stub_raises_what_its_caller_raises() -> None:
    class Nobody(Service, name="nobody"):
        pass

    with pytest.raises(RemoteError, match=r"weather\.report") as caught:
        finish(client(Weather, Loopback(Nobody())).report(Place("Bergen")))
    assert caught.value.status is Status.UNIMPLEMENTED


def test_the_name_of_an_unknown_method_is_cut_before_it_is_repeated() -> None:
    assert len(unimplemented("x" * 10_000).message) < 150


def test_a_handler_knows_who_calls() -> None:
    class Curious(Weather):
        async def report(self, request: Place) -> Report:
            call = current_call()
            return Report(f"{call.method} until {call.deadline} for {call.peer == ANN}")

    token = set_current_call(Call(PeerId(ANN), "weather.report", 12.5))
    try:
        answer = finish(client(Weather, Loopback(Curious())).report(Place("Bergen")))
    finally:
        token.var.reset(token)
    assert answer == Report("weather.report until 12.5 for True")


# --- what the type checker sees --------------------------------------------------------------------------------------


PRELUDE = """
    from collections.abc import AsyncIterator
    from dataclasses import dataclass
    from typing import assert_type

    from shoal.protocol.services import (
        Caller, Service, bidirectional, client, client_streaming, server_streaming, unary
    )

    @dataclass(frozen=True, slots=True)
    class Place:
        name: str

    @dataclass(frozen=True, slots=True)
    class Report:
        text: str

    class Weather(Service, name="weather"):
        @unary()
        async def report(self, request: Place) -> Report:
            raise NotImplementedError

        @server_streaming()
        def watch(self, request: Place) -> AsyncIterator[Report]:
            raise NotImplementedError

        @client_streaming()
        async def compare(self, requests: AsyncIterator[Place]) -> Report:
            raise NotImplementedError

        @bidirectional()
        def follow(self, requests: AsyncIterator[Place]) -> AsyncIterator[Report]:
            raise NotImplementedError

    async def places() -> AsyncIterator[Place]:
        yield Place("Bergen")

    async def reports() -> AsyncIterator[Report]:
        yield Report("rain")
"""

RIGHT = """
    class Station(Weather):
        async def report(self, request: Place) -> Report:
            return Report(request.name)

        async def watch(self, request: Place) -> AsyncIterator[Report]:
            yield Report(request.name)

        async def compare(self, requests: AsyncIterator[Place]) -> Report:
            return Report(" ".join([place.name async for place in requests]))

        async def follow(self, requests: AsyncIterator[Place]) -> AsyncIterator[Report]:
            async for place in requests:
                yield Report(place.name)

    async def use(caller: Caller) -> None:
        stub = client(Weather, caller, timeout_s=2.0)
        assert_type(await stub.report(Place("Bergen")), Report)
        assert_type(await stub.compare(places()), Report)
        async for report in stub.watch(Place("Bergen")):
            assert_type(report, Report)
        async for report in stub.follow(places()):
            assert_type(report, Report)
"""

WRONG = """
    async def misuse(caller: Caller) -> None:
        stub = client(Weather, caller)
        await stub.report(Report("rain"))  # arg-type
        await stub.report("Bergen")  # arg-type
        await stub.report()  # call-arg
        place: Place = await stub.report(Place("Bergen"))  # assignment
        stub.watch(places())  # arg-type
        async for place in stub.watch(Place("Bergen")):  # assignment
            pass
        await stub.compare(reports())  # arg-type
        await stub.compare(Place("Bergen"))  # arg-type
        stub.follow(reports())  # arg-type
        stub.forecast(Place("Bergen"))  # attr-defined
        client(Weather, "caller")  # arg-type

    class WrongArgument(Weather):
        async def report(self, request: Report) -> Report:  # override
            return request

    class WrongResult(Weather):
        async def report(self, request: Place) -> Place:  # override
            return request

    class WrongAnswer(Weather):
        async def report(self, request: Place) -> Report:
            return request  # return-value

    class WrongMessage(Weather):
        async def watch(self, request: Place) -> AsyncIterator[Report]:
            yield request  # misc

    class WrongField(Weather):
        async def compare(self, requests: AsyncIterator[Place]) -> Report:
            return Report(" ".join([place.text async for place in requests]))  # attr-defined

    class WrongKinds(Service, name="wrong-kinds"):
        @unary()  # type-var
        def report(self, request: Place) -> Report:
            raise NotImplementedError

        @server_streaming()  # type-var
        async def watch(self, request: Place) -> Report:
            raise NotImplementedError
"""


def mypy_errors(path: Path, source: str) -> set[str]:
    """What mypy, configured as for the product, has against a source: its lines, each with the error's code."""
    path.write_text(source, encoding="utf-8")
    cache = str(path.parent / ".cache")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", cache, "--config-file"]
    command += [str(ROOT / "pyproject.toml"), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    lines = source.splitlines()
    found = re.findall(r"^(.+?):(\d+): error:.*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    assert all(Path(file).name == path.name for file, _, _ in found), done.stdout
    return {f"{number}: {lines[int(number) - 1].split('  #')[0].strip()}  # {code}" for _, number, code in found}


def test_mypy_lets_right_uses_through_and_sees_every_wrong_one(tmp_path: Path) -> None:
    source = "".join(textwrap.dedent(part) for part in (PRELUDE, RIGHT, WRONG))
    wrong = {f"{n}: {line.strip()}" for n, line in enumerate(source.splitlines(), start=1) if "  # " in line}
    assert len(wrong) == WRONG.count("  # ")
    assert mypy_errors(tmp_path / "planted.py", source) == wrong


def test_a_class_that_declares_methods_without_a_name_is_an_error_and_not_a_service_without_methods() -> None:
    with pytest.raises(TypeError, match="needs a name"):

        class Nameless(Service):
            @unary()
            async def ask(self, request: Empty) -> Empty:
                return request
