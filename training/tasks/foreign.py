"""Seats of other frameworks: a process of its own that is asked what to do, over a socket and in our frames.

A package offers a seat by an entry point of the group ``shoal.seats``: a function of the game's roles and a seed that
gives an `shoal.training.tasks.cast.Actor`, or a `Program`, a command that speaks the frames itself, for what needs
another Python, or none. Neither is imported here: `shoal.training.tasks.seat_host` loads it in the other process. Code
never travels: a recipe names what is installed.

Two methods are called on it, as on a worker (`shoal.protocol.rpc`): ``seat.sit``, once, with the game's roles, and
``seat.act`` with takes as `shoal.training.tasks.wire` writes them, which it answers with as many acts. All chance that
it may use comes from the seed of each call, so that the same plays come again.

It is other people's code, in every respect. An answer has until the seat's deadline, and a process that misses that,
ends or answers with what is none is killed with its group, and started anew at the next ask; after ``MAX_LOST`` in a
row that answered nothing it is not started any more. Whoever is not answered finds that out by `AbsentError`: the stage
has the seat's ``otherwise`` play on, or drops the play. An act that is not legal
where it is done costs that play alone.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.protocol.codec import Attachment, decode_message, encode_message
from shoal.protocol.errors import RemoteError, ShoalError, Status
from shoal.protocol.rpc import Answered, Failed, RpcConnection
from shoal.protocol.services import Empty, Method
from shoal.training import watch
from shoal.training.plain_roles import PlainRole
from shoal.training.plugins import check_plugin
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Foreign
from shoal.training.tasks.plain import plain_roles
from shoal.training.tasks.play import (
    AbsentError,
    Act,
    BadActError,
    Role,
    Take,
    read_act,
)
from shoal.training.tasks.wire import MAX_TAKES, decode_acts, encode_takes
from shoal.training.watch import Slot

log = logging.getLogger(__name__)

GROUP: Final = "shoal.seats"
START_S: Final = 60.0
"""For a process to load what it is made of."""
MAX_LOST: Final = 3
"""Processes in a row that answer nothing before a seat is given up."""


@dataclass(frozen=True, slots=True)
class Program:
    """A command that speaks the frames itself.

    Attributes:
        argv: its words; the number of the socket's descriptor is added as the last.
    """

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sit:
    """Take a seat.

    Attributes:
        seat: its name.
        roles: of the game.
        seed: of what does not change from act to act.
    """

    seat: str
    roles: tuple[PlainRole, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class SeatAct:
    """Say what to do.

    Attributes:
        takes: as `shoal.training.tasks.wire` writes them.
        seed: of all chance.
        greedy: the likeliest act.
    """

    takes: Attachment
    seed: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class SeatActed:
    """What is done, as `shoal.training.tasks.wire` writes acts."""

    acts: Attachment


SIT: Final = Method("seat.sit", Sit, Empty, timeout_s=START_S)
ACT: Final = Method("seat.act", SeatAct, SeatActed)


def check_seat(seat: Foreign) -> None:
    """Check that an installed package offers a seat.

    Raises:
        UsageError: if none does.
    """
    check_plugin(GROUP, "seat", seat.name)


class ForeignActor:
    """Who sits in a `Foreign` seat, started when it is first asked.

    Attributes:
        num_started: processes.
        num_lost: processes in a row that answered nothing.
    """

    def __init__(self, seat: Foreign, roles: Mapping[str, Role], *, seed: int = 0) -> None:
        """Start nothing yet.

        Raises:
            UsageError: if no installed package offers it.
        """
        check_seat(seat)
        self.num_started = self.num_lost = 0
        self._seat, self._roles, self._seed = seat, roles, seed
        self._running: _Running | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while one is there."""
        return None if self._running is None else self._running.process.pid

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[Act | None], Floats]:
        """Ask it; None where it does what a role cannot do. Its log-probabilities are not known.

        Raises:
            AbsentError: if it does not answer.
        """
        acts: list[Act | None] = []
        try:
            for first in range(0, len(takes), MAX_TAKES):
                acts += self._ask(takes[first : first + MAX_TAKES], int(rng.integers(2**63)), greedy)
        except (OSError, ShoalError) as error:
            self._lose(error)
            raise AbsentError(f"the seat {self._seat.name} does not answer: {error}") from error
        finally:
            watch.page[Slot.CALLS] += 1  # to wait for somebody is not to hang
        return acts, np.full(len(takes), np.nan, np.float32)

    def _ask(self, takes: Sequence[Take], seed: int, greedy: bool) -> list[Act | None]:
        running = self._running
        if running is None:
            running = self._start()
        request = SeatAct(encode_takes(takes), seed, greedy)
        answer: SeatActed = running.call(ACT, request, self._seat.seconds)
        acts = decode_acts(bytes(answer.acts), [take.spaces.acts for take in takes])
        self.num_lost = 0
        return [as_said(take, act) for take, act in zip(takes, acts, strict=True)]

    def _start(self) -> _Running:
        if self.num_lost >= MAX_LOST:
            raise ShoalError(f"{MAX_LOST} of its processes in a row answered nothing; see what they print in the log")
        self.num_started += 1
        self._running = running = _Running(self._seat.name)
        running.call(SIT, Sit(self._seat.name, plain_roles(self._roles), self._seed), START_S)
        return running

    def _lose(self, error: Exception) -> None:
        if self._running is None:
            return
        self.num_lost += 1
        log.warning("the seat %s is lost (%s); it is started anew when it is next asked", self._seat.name, error)
        self.close()

    def close(self) -> None:
        """End its process; the next ask starts another."""
        if self._running is not None:
            self._running.close()
            self._running = None


def as_said(take: Take, act: Act | None) -> Act | None:
    """An act, if the role can do it now."""
    with suppress(BadActError):
        return None if act is None else read_act(take.spaces.acts, act, take.asked_legal)
    return None


class _Running:
    """One process, and the socket to it."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(  # noqa: S603  this Python, and the name of an entry point as one word
                [sys.executable, "-P", "-m", "shoal.training.tasks.seat_host", name, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket, self._rpc = ours, RpcConnection()
        self.close = weakref.finalize(self, _end, self.process, ours)

    def call(self, method: Method[Any, Any], request: object, timeout_s: float) -> Any:
        """Call it, and wait for the answer.

        Raises:
            OSError: if it has ended.
            RemoteError: if it fails, or does not answer in time.
            ProtocolError: if what it says makes no sense.
        """
        ends = time.monotonic() + timeout_s
        body, attachments = encode_message(request)
        call_id = self._rpc.call(method.name, body, attachments, timeout_s=timeout_s, now=time.monotonic())
        for piece in self._rpc.data_to_send():
            self._socket.settimeout(max(0.001, ends - time.monotonic()))
            self._socket.sendall(piece)
        while True:
            left_s = ends - time.monotonic()
            if left_s <= 0 or not select.select([self._socket], [], [], left_s)[0]:
                raise RemoteError(Status.DEADLINE_EXCEEDED, f"it gave no answer in {timeout_s:g} s")
            data = self._socket.recv(1 << 20)
            if not data:
                raise ConnectionError("its process has ended")
            for event in self._rpc.receive_data(data, time.monotonic()):
                match event:
                    case Answered(answered, answer, attached) if answered == call_id:
                        return decode_message(method.answer, answer, attached)
                    case Failed(failed, error) if failed == call_id:
                        raise error


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """It and all of its group are killed; until it is waited for, its number is nobody else's."""
    connection.close()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
