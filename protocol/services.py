"""Services: ordinary classes whose typed methods can be called from another node.

    class Weather(Service, name="weather"):
        @unary(idempotent=True)
        async def report(self, request: Place) -> Report: ...

        @server_streaming()
        def watch(self, request: Place) -> AsyncIterator[Report]: ...

The class is the schema: the names on the wire, the message types (read off the annotations, and checked when the
class is made) and each method's policy. What serves is an instance of it or of a subclass; what calls is
`client(Weather, caller)`, which has the same methods with the same types, so that the type checker sees a wrong
argument on either side. Who calls is asked of `current_call`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from shoal.protocol.errors import RemoteError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_ANSWER_BYTES, MAX_STREAM_HELD_BYTES

Request = TypeVar("Request")
Answer = TypeVar("Answer")
S = TypeVar("S", bound="Service")
UnaryFunction = TypeVar("UnaryFunction", bound=Callable[[Any, Any], Awaitable[Any]])
StreamFunction = TypeVar("StreamFunction", bound=Callable[[Any, Any], AsyncIterator[Any]])

TIMEOUT_S = 10.0


class CallKind(IntEnum):
    """Which sides of a call are streams of messages (gRPC's four kinds)."""

    UNARY = 0
    SERVER_STREAMING = 1
    CLIENT_STREAMING = 2
    BIDIRECTIONAL = 3

    @property
    def streams_requests(self) -> bool:
        """Whether the caller sends a stream."""
        return self >= CallKind.CLIENT_STREAMING

    @property
    def streams_answers(self) -> bool:
        """Whether the caller receives a stream."""
        return self in (CallKind.SERVER_STREAMING, CallKind.BIDIRECTIONAL)

    @property
    def num_streams(self) -> int:
        """How many of the two directions are streams."""
        return self.streams_requests + self.streams_answers


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Answer]):
    """One method, as both sides know it.

    Attributes:
        name: ``service.method`` on the wire.
        request: the dataclass of its request, or of each message of a stream of requests.
        answer: the dataclass of its answer, or of each message of a stream of answers.
        kind: which sides are streams.
        idempotent: whether doing it twice is as good as once; only then is a lost call tried again.
        timeout_s: how long a caller waits that does not say; None waits for ever.
        max_answer_bytes: memory that is set aside for the answer, or for a stream of them, before the handler starts.
        max_calls_per_s: what one peer may ask for, over a few seconds; None: no such limit.
        is_urgent: whether it is called even while as many calls are open as may be.
        answer_lag_s: for how long its answer may wait for something else that is written, and goes with it then; an
            error does not wait.
    """

    name: str
    request: type[Request]
    answer: type[Answer]
    kind: CallKind = CallKind.UNARY
    idempotent: bool = False
    timeout_s: float | None = TIMEOUT_S
    max_answer_bytes: int = MAX_ANSWER_BYTES
    max_calls_per_s: float | None = None
    is_urgent: bool = False
    answer_lag_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Empty:
    """A request or an answer that says nothing but that it happened."""


class Call(NamedTuple):
    """What a handler may know of the call that it serves, beside the request.

    Attributes:
        peer: who calls; proven by the connection.
        method: ``service.method``.
        deadline: by the clock of the loop that runs the handler; infinite if the caller waits for ever.
    """

    peer: PeerId
    method: str
    deadline: float


_current_call: ContextVar[Call] = ContextVar("shoal_current_call")
set_current_call = _current_call.set


def current_call() -> Call:
    """The call that is being served; only for handlers."""
    return _current_call.get()


@dataclass(frozen=True, slots=True)
class _Policy:
    kind: CallKind
    idempotent: bool
    timeout_s: float | None
    max_answer_bytes: int
    max_calls_per_s: float | None
    is_urgent: bool = False
    answer_lag_s: float = 0.0


def unary(
    *,
    idempotent: bool = False,
    timeout_s: float | None = TIMEOUT_S,
    max_answer_bytes: int = MAX_ANSWER_BYTES,
    max_calls_per_s: float | None = None,
    is_urgent: bool = False,
    answer_lag_s: float = 0.0,
) -> Callable[[UnaryFunction], UnaryFunction]:
    """A method with one request and one answer: ``async def method(self, request: Q) -> A``."""
    policy = (idempotent, timeout_s, max_answer_bytes, max_calls_per_s, is_urgent, answer_lag_s)
    return _mark(_Policy(CallKind.UNARY, *policy))


def server_streaming(
    *,
    timeout_s: float | None = None,
    max_calls_per_s: float | None = None,
) -> Callable[[StreamFunction], StreamFunction]:
    """A method with one request and a stream of answers: ``def method(self, request: Q) -> AsyncIterator[A]``."""
    return _mark(_Policy(CallKind.SERVER_STREAMING, False, timeout_s, MAX_STREAM_HELD_BYTES, max_calls_per_s))


def client_streaming(
    *,
    timeout_s: float | None = None,
    max_answer_bytes: int = MAX_ANSWER_BYTES,
    max_calls_per_s: float | None = None,
) -> Callable[[UnaryFunction], UnaryFunction]:
    """A method that takes a stream: ``async def method(self, requests: AsyncIterator[Q]) -> A``."""
    return _mark(_Policy(CallKind.CLIENT_STREAMING, False, timeout_s, max_answer_bytes, max_calls_per_s))


def bidirectional(
    *,
    timeout_s: float | None = None,
    max_calls_per_s: float | None = None,
) -> Callable[[StreamFunction], StreamFunction]:
    """Streams both ways: ``def method(self, requests: AsyncIterator[Q]) -> AsyncIterator[A]``."""
    return _mark(_Policy(CallKind.BIDIRECTIONAL, False, timeout_s, MAX_STREAM_HELD_BYTES, max_calls_per_s))


def _mark(policy: _Policy) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function.shoal_policy = policy
        return function

    return mark


class Service:
    """Base of all services; ``name`` is the service's name on the wire."""

    methods: ClassVar[dict[str, Method[Any, Any]]] = {}
    """By the name of the Python method."""

    def __init_subclass__(cls, *, name: str | None = None, **more: Any) -> None:
        """Read the methods that this class declares.

        Raises:
            TypeError: if a declared method's annotations are not those of its kind.
        """
        super().__init_subclass__(**more)
        if name is None:  # an implementation
            if any(hasattr(function, "shoal_policy") for function in vars(cls).values()):
                raise TypeError(f"{cls.__name__} declares methods, so it needs a name: class …(Service, name=…)")
            return
        declared = {
            attribute: _method(f"{name}.{attribute}", function, function.shoal_policy)
            for attribute, function in vars(cls).items()
            if hasattr(function, "shoal_policy")
        }
        cls.methods = {**cls.methods, **declared}


def _method(name: str, function: Callable[..., Any], policy: _Policy) -> Method[Any, Any]:
    hints = typing.get_type_hints(function)
    parameters = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    if len(parameters) != 1 or parameters[0] not in hints or "return" not in hints:
        raise TypeError(f"{name} must take one annotated argument beside self, and have an annotated result")
    request, answer = hints[parameters[0]], hints["return"]
    return Method(
        name,
        _message(name, _item(name, request) if policy.kind.streams_requests else request),
        _message(name, _item(name, answer) if policy.kind.streams_answers else answer),
        policy.kind,
        policy.idempotent,
        policy.timeout_s,
        policy.max_answer_bytes,
        policy.max_calls_per_s,
        policy.is_urgent,
        policy.answer_lag_s,
    )


def _item(name: str, hint: Any) -> Any:
    if typing.get_origin(hint) is not AsyncIterator:
        raise TypeError(f"a stream of {name} must be annotated as AsyncIterator[…], not {hint}")
    return typing.get_args(hint)[0]


def _message(name: str, hint: Any) -> Any:
    if not (isinstance(hint, type) and is_dataclass(hint)):
        raise TypeError(f"a message of {name} must be annotated as a dataclass, not {hint}")
    return hint


class Caller(Protocol):
    """Whatever carries calls to one far side."""

    def call(
        self, method: Method[Request, Answer], request: Request, *, timeout_s: float | None = None
    ) -> Coroutine[Any, Any, Answer]:
        """Make a unary call; ``timeout_s`` None: the method's own."""

    async def call_with_stream(
        self, method: Method[Request, Answer], requests: AsyncIterator[Request], *, timeout_s: float | None = None
    ) -> Answer:
        """Make a client-streaming call."""

    def call_for_stream(
        self,
        method: Method[Request, Answer],
        request: Request | AsyncIterator[Request],
        *,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Make a server-streaming or, with an iterator of requests, a bidirectional call."""


def client(service: type[S], caller: Caller, *, timeout_s: float | None = None) -> S:
    """A stub: the service's methods, each of which makes the call.

    Args:
        service: whose methods.
        caller: what carries the calls.
        timeout_s: how long each waits; None: as its method says.

    The methods raise `RemoteError` with the far side's status; UNAVAILABLE if it cannot be reached,
    DEADLINE_EXCEEDED if it does not answer in time.
    """
    stub = object.__new__(_stub_class(service))
    vars(stub).update(_caller=caller, _timeout_s=timeout_s)
    return typing.cast(S, stub)


_stub_classes: dict[type[Service], type[Any]] = {}


def _stub_class(service: type[Service]) -> type[Any]:
    if service not in _stub_classes:
        body = {attribute: _stub_method(method) for attribute, method in service.methods.items()}
        _stub_classes[service] = type(f"{service.__name__}Client", (), body)
    return _stub_classes[service]


def _stub_method(method: Method[Any, Any]) -> Callable[[Any, Any], Any]:
    if method.kind is CallKind.UNARY:
        return lambda stub, request: stub._caller.call(method, request, timeout_s=stub._timeout_s)
    if method.kind is CallKind.CLIENT_STREAMING:
        return lambda stub, requests: stub._caller.call_with_stream(method, requests, timeout_s=stub._timeout_s)
    return lambda stub, request: stub._caller.call_for_stream(method, request, timeout_s=stub._timeout_s)


def unimplemented(method: str) -> RemoteError:
    """What a call of a method fails with that nobody serves."""
    return RemoteError(Status.UNIMPLEMENTED, f"this node does not know the method {method[:80]!r}")
