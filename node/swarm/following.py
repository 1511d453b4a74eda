"""What comes of an all-reduce, for a member of its run that takes no part in it: it came too late, or had nothing.

Without this it could only take over the state that the others make, and would be late again with the next epoch. A part
may come from anybody who has it, and is held to what its owner signed; as any member may own a part in the end, and one
that lies could sign something of its own for whoever comes late, two members have to say the same of it.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import deque
from collections.abc import Sequence, Set
from typing import Final

import trio

from shoal.node.swarm.content import UnavailableError
from shoal.node.wire.contracts import ExchangeService, ResultAsked, ResultGiven
from shoal.node.wire.links import Links
from shoal.protocol.errors import RemoteError
from shoal.protocol.ids import PeerId
from shoal.protocol.services import client
from shoal.training.exchange.allreduce import Outcome
from shoal.training.exchange.audits import Parts

log = logging.getLogger(__name__)

AT_A_TIME: Final = 4
"""Parts that are asked for."""
AGAIN_S: Final = 0.05
"""Until all are asked again: they may be about to begin."""
WITNESSES: Final = 2
"""Members who have to say the same, where there are so many."""
OVER_S: Final = 1.0
"""When for so long nobody has given anything, they have gone on."""


async def follow(
    links: Links,
    key: bytes,
    members: Sequence[PeerId],
    parts: Parts,
    into: memoryview,
    *,
    patience_s: float,
    shunned: Set[PeerId],
) -> dict[int, Outcome]:
    """Get what comes of every part.

    Args:
        links: to them.
        key: of the all-reduce.
        members: who take part in it.
        parts: the layout.
        into: where it goes.
        patience_s: for which one of them may take to have it.
        shunned: members whose results are not taken.

    Returns:
        Whose parts are in each.

    Raises:
        UnavailableError: if nobody gives a part.
    """
    believed = [peer for peer in members if peer not in shunned]
    outcomes: dict[int, Outcome] = {}
    todo = deque(range(parts.num_parts))
    came_at = trio.current_time()
    lacking: int | None = None

    async def ask(holder: PeerId, part: int, *, is_data_wanted: bool) -> ResultGiven | None:
        service = client(ExchangeService, links.at(holder), timeout_s=patience_s)
        try:
            given = await service.result(ResultAsked(key, part, is_data_wanted))
        except RemoteError as error:
            log.debug("%s does not give what came of part %d: %s", holder, part, error)
            return None
        said = given.said
        is_of_it = (said.key, said.part) == (key, part) and said.owner in believed
        return given if is_of_it and set(said.authors) <= set(members) and said.is_signed() else None

    async def take(holder: PeerId, part: int, outcome: Outcome) -> bool:
        given, place = await ask(holder, part, is_data_wanted=True), parts.place(part)
        if given is None or len(given.data) != place.stop - place.start:
            return False
        if hashlib.sha256(given.data).digest() != outcome.digest:
            return False
        into[place] = given.data
        outcomes[part] = outcome
        return True

    async def get(part: int) -> bool:
        nonlocal came_at
        while True:
            witnesses: dict[Outcome, list[PeerId]] = {}
            for holder in random.sample(believed, len(believed)):
                given = await ask(holder, part, is_data_wanted=False)
                if given is None:
                    continue
                found = witnesses.setdefault(given.said.outcome, [])
                found.append(holder)
                if len(found) < min(WITNESSES, len(believed)):
                    continue
                for each in found:
                    if await take(each, part, given.said.outcome):
                        came_at = trio.current_time()
                        return True
            if trio.current_time() >= came_at + OVER_S:
                return False
            await trio.sleep(AGAIN_S)

    async def get_some(scope: trio.CancelScope) -> None:
        nonlocal lacking
        while todo:
            part = todo.popleft()
            if not await get(part):
                lacking = part
                scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(AT_A_TIME):
            nursery.start_soon(get_some, nursery.cancel_scope)
    if lacking is not None:
        raise UnavailableError(f"none of {len(believed)} members gives what came of part {lacking}")
    return outcomes
