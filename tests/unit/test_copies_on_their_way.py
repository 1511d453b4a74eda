"""Many actors behind a learner's slow link: it carries a version once, whatever their workers are doing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from shoal.node.swarm.copying import Copying
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.rollouts.copies import LEAST_TURN_S
from shoal.training.statements import GivenCopy

pytestmark = pytest.mark.trio

LEARNER, *ACTORS = (PeerId.of_public_key(bytes([n]) * 32) for n in range(9))
SWARM = SwarmId.of_manifest(b"a run")
FAST_S = 0.02
HEARD_S = 0.03


@dataclass
class Place:
    """What lies around one actor's copies: its links, and everybody that hears it."""

    me: PeerId
    slow_s: float
    asked: Counter[PeerId] = field(default_factory=Counter)
    others: list[Copying] = field(default_factory=list)
    nursery: trio.Nursery | None = None

    async def get(self, cid: Cid, sources: tuple[PeerId, ...], **_: Any) -> bytes:
        self.asked[sources[0]] += 1
        await trio.sleep(self.slow_s if sources[0] == LEARNER else FAST_S)
        return b"a copy"

    def hold(self, owner: str, cids: object) -> None:
        pass

    def publish(self, topic: str, facts: dict[str, Any]) -> None:
        said = GivenCopy(**facts)
        assert self.nursery is not None
        self.nursery.start_soon(self._tell, said)

    async def _tell(self, said: GivenCopy) -> None:
        await trio.sleep(HEARD_S)
        for other in self.others:
            other.heard(self.me, said)


async def reachable(peers: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
    return peers


async def test_a_version_crosses_a_slow_link_once_and_reaches_all_soon_after(
    autojump_clock: trio.testing.MockClock,
) -> None:
    slow_s = 4 * LEAST_TURN_S
    places = [Place(peer, slow_s) for peer in ACTORS]
    copyings = [Copying(SWARM, each.me, each, each, reachable) for each in places]  # type: ignore[arg-type]  # its part
    for copying in copyings:
        copying.loaded_whole(b"")  # lately, so that nobody wants a whole state
    async with trio.open_nursery() as nursery:
        for place, copying in zip(places, copyings, strict=True):
            place.nursery = nursery
            place.others = [each for each in copyings if each is not copying]
        took, asked = [], []
        for version in range(1, 9):
            state, before = Cid.of_block(b"%d" % version), sum(each.asked[LEARNER] for each in places)
            key = Cid.of_block(b"key of %d" % version)
            said = GivenCopy(version=version, state=state, digest=bytes([version]) * 32, key=key, key_bytes=6)
            began = trio.current_time()
            async with trio.open_nursery() as fetching:
                for place, copying in zip(places, copyings, strict=True):
                    copying.heard(LEARNER, said)
                    others = [peer for peer in ACTORS if peer != place.me]
                    fetching.start_soon(copying.fetch, state, lambda: [LEARNER], others)
            took.append(trio.current_time() - began)
            asked.append(sum(each.asked[LEARNER] for each in places) - before)
            await trio.sleep(1.0)
    assert asked[-6:] == [1] * 6, "but for the first, of which nobody knows how long it takes"
    assert max(took[-6:]) < 1.5 * slow_s
