"""The process in which another framework sits: loads what is installed as a seat, and does what it is asked.

    python -P -m shoal.training.tasks.seat_host NAME SOCKET

It ends when its socket does. See `shoal.training.tasks.foreign`, which starts it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from typing import Any

import numpy as np

from shoal.protocol.codec import decode_message, encode_message
from shoal.protocol.errors import RemoteError, ShoalError, Status, UsageError
from shoal.protocol.rpc import Called, RpcConnection
from shoal.protocol.services import Empty
from shoal.training.plugins import load_plugin
from shoal.training.tasks.cast import Actor, Foreign
from shoal.training.tasks.foreign import ACT, GROUP, SIT, Program, SeatAct, SeatActed, Sit
from shoal.training.tasks.plain import read_roles
from shoal.training.tasks.play import Role, Table
from shoal.training.tasks.wire import decode_takes, encode_acts

log = logging.getLogger(__name__)


class Host:
    """One seat behind its two methods."""

    def __init__(self, make: Any) -> None:
        """Hold what makes an actor of roles and a seed."""
        self._make = make
        self._actor: Actor | None = None
        self._roles: dict[str, Role] = {}
        self._seat = Foreign("")

    def do(self, called: Called) -> object:
        """Do one call.

        Raises:
            RemoteError: if there is no such method, or nobody sits here yet.
        """
        if called.method == SIT.name:
            return self._sit(decode_message(Sit, called.body, called.attachments))
        if called.method == ACT.name:
            return self._act(decode_message(SeatAct, called.body, called.attachments))
        raise RemoteError(Status.UNIMPLEMENTED, f"a seat has no method {called.method}")

    def _sit(self, request: Sit) -> Empty:
        self._roles, self._seat = read_roles(request.roles), Foreign(request.seat)
        self._actor = self._make(self._roles, request.seed)
        return Empty()

    def _act(self, request: SeatAct) -> SeatActed:
        if self._actor is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "nobody sits here yet; seat.sit comes first")
        takes = decode_takes(request.takes, self._roles, self._seat)
        acts, _ = self._actor.act(Table(takes), np.random.default_rng(request.seed), request.greedy)
        return SeatActed(encode_acts(list(acts)))


def serve(connection: socket.socket, host: Host) -> None:
    """Do calls until the far side closes the socket. What fails is told to it, and it decides what that means."""
    rpc = RpcConnection()
    while data := connection.recv(1 << 20):
        for event in rpc.receive_data(data, time.monotonic()):
            if not isinstance(event, Called):
                continue
            try:
                body, attachments = encode_message(host.do(event))
                rpc.answer(event.call_id, body, attachments)
            except RemoteError as error:
                rpc.fail(event.call_id, error.status, error.message)
            except Exception as error:  # other people's code: any type
                log.exception("%s failed", event.method)
                rpc.fail(event.call_id, Status.INTERNAL, f"{type(error).__name__}: {error}")
            for piece in rpc.data_to_send():
                connection.sendall(piece)


def main() -> None:
    """Load the seat that the first argument names, and serve the socket that the second does."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    name, descriptor = sys.argv[1], int(sys.argv[2])
    try:
        made = load_plugin(GROUP, "seat", name)
        if isinstance(made, Program):
            os.set_inheritable(descriptor, True)
            os.execvp(made.argv[0], [*made.argv, str(descriptor)])  # noqa: S606  the words of an installed package
        if not callable(made):
            raise UsageError(f"what is installed as the seat {name!r} is neither a Program nor makes an actor")
        serve(socket.socket(fileno=descriptor), Host(made))
    except (ShoalError, OSError) as error:
        sys.exit(f"the seat {name}: {error}")


if __name__ == "__main__":
    main()
