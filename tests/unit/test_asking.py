"""One question over a Unix socket: what comes whole is given, and what does not is told as what it is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.node.api.asking import MAX_LINE_BYTES, Answer, GarbledError, connect

SOON_S = 0.05
LONG_S = 20.0


@contextmanager
def answering(
    folder: Path, answer: bytes, *, heard: list[bytes] | None = None
) -> Iterator[Callable[[float], socket.socket]]:
    """A server that reads one question and says what it is told to; gives connections to it."""
    path = str(folder / "socket")

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            (heard if heard is not None else []).append(connection.recv(65536))
            connection.sendall(answer)
            if answer:
                return
            over.wait(LONG_S)

    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield lambda timeout_s: connect(path, timeout_s)
        finally:
            over.set()
            server.join()


def test_an_answer_is_read_whole_with_its_status(tmp_path: Path) -> None:
    heard: list[bytes] = []
    with (
        answering(
            tmp_path, b"HTTP/1.1 422 Whatever\r\nConnection: close\r\nCONTENT-LENGTH: 4\r\n\r\n{\r\n}", heard=heard
        ) as to,
        Answer(to(LONG_S), "POST", "/v1/x", b"{}") as answer,
    ):
        assert (answer.status, answer.read()) == (422, b"{\r\n}")
    head, _, body = heard[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/x HTTP/1.0", b"Host: localhost", b"Content-Type: application/json", b"Content-Length: 2",
    ]  # fmt: skip
    assert body == b"{}"


def test_what_has_no_length_ends_with_its_connection(tmp_path: Path) -> None:
    with answering(tmp_path, b"HTTP/1.0 200 OK\n\n:\r\n\r\nevent: a\n") as to, Answer(to(LONG_S), "GET", "/") as answer:
        assert list(answer.lines()) == [b":", b"", b"event: a"]


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 2",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nHalf: a he",
        b"HTTP/1.1 200 OK\r\n" + b"x" * (MAX_LINE_BYTES + 1),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    ],
)
def test_what_is_no_answer_or_ends_within_one_is_said_to_be_so(tmp_path: Path, answer: bytes) -> None:
    with answering(tmp_path, answer) as to, pytest.raises(GarbledError), Answer(to(LONG_S), "GET", "/") as answer_:
        answer_.read()


def test_silence_ends_a_wait(tmp_path: Path) -> None:
    with answering(tmp_path, b"") as to, pytest.raises(TimeoutError):
        Answer(to(SOON_S), "GET", "/")


def test_nobody_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        connect(str(tmp_path / "socket"), SOON_S)
