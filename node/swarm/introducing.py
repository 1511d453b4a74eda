"""The manifest of a run that this node joins: asked of the member that answered first, then of all that can be found.

The member that a ticket leads to first may be the one that everybody else comes to as well, or have left, or be gone by
now. So nobody depends on it: when it has given nothing for `OTHERS_S`, or says that it cannot, the other members are
asked beside it, and again after a pause that doubles.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from shoal.dht.fetch import Lack
from shoal.node.supervise import open_plain_nursery
from shoal.node.swarm.content import UnavailableError
from shoal.protocol.errors import NoPeersError
from shoal.protocol.ids import PeerId, SwarmId

log = logging.getLogger(__name__)

OTHERS_S: Final = 2.0
"""After which others are asked beside the first."""
PATIENCE_S: Final = 30.0
"""Without a byte, after which one try has failed: three silences of one member."""
TRIES: Final = 3
FIRST_PAUSE_S: Final = 1.0
LIMIT_S: Final = 90.0
"""In all; a command that joins waits for two minutes."""


async def fetch_manifest(
    swarm: SwarmId,
    first: Sequence[PeerId],
    find_others: Callable[[], Awaitable[Sequence[PeerId]]],
    get: Callable[[Sequence[PeerId], float], Awaitable[bytes]],
) -> bytes:
    """The signed manifest of a run; it is what the swarm is named by, but nothing is checked beyond that.

    Args:
        swarm: the run.
        first: the members that answered first.
        find_others: connects to whom a ticket and the DHT name, and gives who is connected then.
        get: asks members for it, with the patience for them; those of several calls at once are asked for one answer.

    Raises:
        NoPeersError: if nobody gives it.
    """
    found: list[bytes] = []
    asked = dict.fromkeys(first)
    last = "nobody was asked"
    has_failed = trio.Event()
    began = trio.current_time()

    async def ask(nursery: trio.Nursery, members: Sequence[PeerId]) -> bool:
        nonlocal last
        try:
            found.append(await get(members, PATIENCE_S))
        except UnavailableError as error:
            if error.lack is Lack.UNFIT:
                raise
            last = str(error)
            return False
        nursery.cancel_scope.cancel()
        return True

    async def ask_first(nursery: trio.Nursery) -> None:
        if not await ask(nursery, first):
            has_failed.set()

    async def ask_others(nursery: trio.Nursery) -> None:
        with trio.move_on_after(OTHERS_S):
            await has_failed.wait()
        for number in range(TRIES):
            if number:
                await trio.sleep(FIRST_PAUSE_S * 2 ** (number - 1))
            waited_s = trio.current_time() - began
            text = "the manifest of %s has not come for %.0f s: asking others beside the %d members asked so far (%s)"
            log.warning(text, swarm, waited_s, len(asked), last if has_failed.is_set() else "no answer yet")
            asked.update(dict.fromkeys(await find_others()))
            if asked and await ask(nursery, tuple(asked)):
                return

    with trio.move_on_after(LIMIT_S) as limit:
        async with open_plain_nursery() as nursery:
            nursery.start_soon(ask_first, nursery)
            nursery.start_soon(ask_others, nursery)
    if found:
        return found[0]
    waited_s = trio.current_time() - began
    how = "no answer within" if limit.cancelled_caught else "none gave it within"
    raise NoPeersError(
        f"{len(asked)} member(s) of {swarm} were asked for its manifest, {how} {waited_s:.0f} s ({last}); "
        "they may be busy or have left: try again, or ask for a fresh ticket"
    )
