#!/usr/bin/env python
"""A member of a swarm that only listens: what every other says in it, as lines of JSON, the moment that it is heard.

    python tests/lab/observer.py SWARM ADDRESS [ADDRESS …]

It is made of the project's own library, says of itself that it only stores, and so changes nothing for those who learn.
``at`` is the machine's monotonic clock, which all processes share. Whoever of the addresses is not connected is dialed
again, so that one who was killed is heard as soon as it speaks.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile.members import Liar, a_liar

from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.training.manifest import Role
from shoal.training.statements import Facts, GivenCopy, Offer, Phase, Proposal, Result, Vote, read_statement

DIAL_S: Final = 0.5


def line_of(author: PeerId, statement: object, name: bytes) -> dict[str, Any] | None:
    """What matters of a statement; None if nothing does."""
    match statement:
        case Facts():
            told = {"phase": str(statement.phase), "epoch": statement.epoch, "step": statement.step}
        case Offer():
            told = {"epoch": statement.key.epoch, "step": statement.key.step, "weight": statement.weight}
        case Proposal():
            offers = [each.hex() for each in statement.offers]
            told = {"epoch": statement.key.epoch, "step": statement.key.step, "offers": offers}
            told |= {"ballot": statement.ballot.hex(), "attempt": statement.attempt}
        case Vote():
            told = {"epoch": statement.key.epoch, "step": statement.key.step, "ballot": statement.ballot.hex()}
        case Result():
            told = {"epoch": statement.epoch, "env_steps": statement.env_steps, "ballot": statement.ballot.hex()}
        case GivenCopy():
            parts = [each for each in (statement.key_bytes, statement.patch_bytes) if each]
            told = {"epoch": statement.version, "bytes": min(parts, default=0)}
        case _:
            return None
    topic = type(statement).__name__.lower()
    return {"at": time.monotonic(), "author": str(author), "topic": topic, "name": name.hex(), **told}


def say(line: Mapping[str, Any] | None) -> None:
    """Tell whoever started this."""
    if line is not None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


async def listen(swarm: SwarmId, addresses: list[str]) -> None:
    """Until the standard input ends."""
    facts = Facts(role=Role.STORAGE, phase=Phase.STORING)
    async with a_liar(swarm, addresses[0], says=facts) as member, trio.open_nursery() as nursery:

        def heard(author: PeerId, topic: str, said: Mapping[str, Any], name: bytes) -> None:
            say(line_of(author, read_statement(topic, dict(said)), name))

        member.replica.on_heard = heard
        member.replica.on_gone = lambda peer: say({"at": time.monotonic(), "author": str(peer), "topic": "gone"})
        for address in addresses:
            nursery.start_soon(stay_connected, member, address)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


async def stay_connected(member: Liar, address: str) -> None:
    """Dial one whenever it is not there."""
    peer = PeerId.parse(address.rpartition("/")[2])
    while True:
        if peer not in member.host.connected:
            try:
                await member.host.connect([address])
            except ShoalError as error:
                logging.getLogger(__name__).debug("%s: %s", address, error)
        await trio.sleep(DIAL_S)


if __name__ == "__main__":
    trio.run(listen, SwarmId.parse(sys.argv[1]), sys.argv[2:])
