"""The one error tree. Every message says what is wrong and what to do next.

Each class carries the exit code that the command line ends with (``docs/cli.md``), so that no caller has
to translate. A fault on the far side of a call is a `RemoteError` with one of gRPC's status codes
(https://grpc.io/docs/guides/status-codes/).
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Status(IntEnum):
    """gRPC's status codes, by their numbers."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ShoalError(Exception):
    """Root of everything that Shoal raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(ShoalError):
    """The caller asked for something malformed or unknown; nothing was changed."""

    exit_code = 2


class NoDaemonError(ShoalError):
    """No node is running under this profile."""

    exit_code = 3


class NoPeersError(ShoalError):
    """Nobody could be reached, or a run was trained alone."""

    exit_code = 4


class RefusedError(ShoalError):
    """The node, or a peer, understood and said no."""

    exit_code = 5


class ProtocolError(ShoalError):
    """A peer sent bytes that break the protocol; what it sent is dropped."""


class LimitError(ProtocolError):
    """A peer sent, or a caller asked to send, more than a limit allows."""


class UnknownFieldError(ProtocolError):
    """What must be understood whole has a field that this version does not know."""


class SignatureError(ProtocolError):
    """A signature does not match its author and content."""


class RemoteError(ShoalError):
    """The far side of a call answered with a status other than OK, or could not be reached.

    Attributes:
        status: what kind of failure it was.
        message: the far side's own words, at most `limits.MAX_ERROR_CHARS` characters.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status.name}: {message}")
        self.status = status
        self.message = message


def unwrap(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of Shoal inside an exception group, or the group itself."""
    found = group.subgroup(ShoalError)
    inner: BaseException = group if found is None else found
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner if found is not None else group
