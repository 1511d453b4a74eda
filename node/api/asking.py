"""One question to a node over its Unix socket, in HTTP/1.0 (RFC 1945), where an answer ends with its connection.

So there are no chunks to put together and nothing is kept open, and a command need not import the standard library's
client, which reads headers as e-mail.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

MAX_LINE_BYTES: Final = 64 * 1024
_LENGTH: Final = b"content-length"


class GarbledError(ValueError):
    """What came is no answer, or only the beginning of one."""


def connect(path: str, timeout_s: float) -> socket.socket:
    """To whoever listens; raises `OSError` if nobody does. No wait for bytes lasts longer than ``timeout_s``."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


class Answer:
    """The answer to one question; a context, which closes the connection.

    Args:
        connection: as `connect` gives it; closed with the answer, and if there is none.

    Raises:
        OSError: if the other side goes away or is silent; `TimeoutError` is one.
        GarbledError: if what comes is not HTTP.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, connection: socket.socket, method: str, target: str, body: bytes | None = None) -> None:
        lines = [f"{method} {target} HTTP/1.0", "Host: localhost"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        self._connection = connection
        self._file = connection.makefile("rb")
        try:
            connection.sendall("\r\n".join((*lines, "\r\n")).encode("ascii") + (body or b""))
            self.status = _status_in(self._line())
            self._length = _length_in(iter(self._line, b""))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Read the answer in the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._connection.close()

    def read(self) -> bytes:
        """All of it; raises as the class does."""
        content = self._file.read()
        if self._length is not None and len(content) != self._length:
            raise GarbledError(f"{len(content)} of {self._length} bytes came")
        return content

    def lines(self) -> Iterator[bytes]:
        """One line after another as they come, without their ends, until the other side closes; raises likewise."""
        for line in self._file:
            yield line.rstrip(b"\r\n")

    def _line(self) -> bytes:
        line = self._file.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise GarbledError("the answer ended, or went on for too long, within its head")
        return line.rstrip(b"\r\n")


def _status_in(line: bytes) -> int:
    version, _, rest = line.partition(b" ")
    status = rest[:3]
    if not version.startswith(b"HTTP/1.") or len(status) != 3 or not status.isdigit():
        raise GarbledError(f"{line[:80]!r} is no answer in HTTP")
    return int(status)


def _length_in(lines: Iterator[bytes]) -> int | None:
    length = None
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == _LENGTH and value.strip().isdigit():
            length = int(value)
    return length
