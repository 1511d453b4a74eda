"""The one error tree. Every message says what is wrong and what to do next.

Each class carries the exit code that the command line ends with (``docs/cli.md``), so that no caller has
to translate, and whose fault it tells of, so that what a peer says can never be taken for a mistake of this node
(after h11's split of LocalProtocolError and RemoteProtocolError). A fault on the far side of a call is a `RemoteError`
with one of gRPC's status codes (https://grpc.io/docs/guides/status-codes/).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import ClassVar, Final


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


class Fault(StrEnum):
    """Whose fault an error is.

    OWN: of whoever asked on this side, or of the program itself.
    REMOTE: of a peer: it broke the protocol, answered with an error, or could not be reached.
    RESOURCE: of nobody: this machine has no disk space, descriptors or memory left; trying again later may help.
    """

    OWN = "own"
    REMOTE = "remote"
    RESOURCE = "resource"


class ShoalError(Exception):
    """Root of everything that Shoal raises on purpose."""

    exit_code: ClassVar[int] = 1
    fault: ClassVar[Fault] = Fault.OWN


class UsageError(ShoalError):
    """The caller asked for something malformed or unknown; nothing was changed."""

    exit_code = 2


class TooLargeError(UsageError):
    """This side asks to say, send or keep more than a limit allows; nothing was changed."""


class ResourceError(ShoalError):
    """This machine has too little of something; free some, and what failed can be tried again."""

    fault = Fault.RESOURCE


class NoDaemonError(ShoalError):
    """No node is running under this profile."""

    exit_code = 3


class NoPeersError(ShoalError):
    """Nobody could be reached, or a run was trained alone."""

    exit_code = 4
    fault = Fault.REMOTE


class RefusedError(ShoalError):
    """The node, or a peer, understood and said no."""

    exit_code = 5
    fault = Fault.REMOTE


class ProtocolError(ShoalError):
    """A peer sent bytes that break the protocol; what it sent is dropped."""

    fault = Fault.REMOTE


class LimitError(ProtocolError):
    """A peer sent more than a limit allows; when this side would, that is a `TooLargeError`."""


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

    fault = Fault.REMOTE

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status.name}: {message}")
        self.status = status
        self.message = message


def unwrap(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of Shoal inside an exception group, or the group itself."""
    found = group.subgroup(ShoalError)
    return group if found is None else next(leaves(found))


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside an exception group and the groups in it, from left to right; of another error, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


_SCARCE: Final = {
    errno.EMFILE: "this process has no file descriptors left; raise its limit (`ulimit -n`)",
    errno.ENFILE: "this machine has no file descriptors left; raise its limit (fs.file-max)",
    errno.ENOSPC: "no space is left on the disk; free some",
    errno.EDQUOT: "this user's quota of disk space is used up; free some",
    errno.ENOMEM: "this machine has no memory left; free some",
}


def resource_error(error: BaseException) -> ResourceError | None:
    """The same as an error of Shoal, if it says that this machine has too little of something."""
    if isinstance(error, ResourceError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError(_SCARCE[errno.ENOMEM])
    if isinstance(error, OSError) and error.errno in _SCARCE:
        return ResourceError(_SCARCE[error.errno])
    return None


def fault_of(error: BaseException, *, remote: tuple[type[BaseException], ...] = (ConnectionError,)) -> Fault:
    """Whose fault an error is. Of a group, the fault that says most about this node: own, then resource, then remote.

    Args:
        error: of any kind. What is no error of Shoal is this program's own fault, unless the system says that something
            is used up.
        remote: what else says that the far side of a connection ended it.
    """
    faults = set()
    for each in leaves(error):
        if isinstance(each, ShoalError):
            faults.add(each.fault)
        elif resource_error(each) is not None:
            faults.add(Fault.RESOURCE)
        else:
            faults.add(Fault.REMOTE if isinstance(each, remote) else Fault.OWN)
    return next(fault for fault in (Fault.OWN, Fault.RESOURCE, Fault.REMOTE) if fault in faults)
