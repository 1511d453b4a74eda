"""Which blocks are asked of whom: between the core and an event list; and many cores in one seeded simulation."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from tests.unit.tree_swarm import Swarm

from shoal.dht import tree_fetch as module
from shoal.dht.fetch import Done, Drop, Failed, Lack, SourceFound, SourceLost, Tick, Wake
from shoal.dht.tree_fetch import Answered, AskHave, CallOff, Event, HaveArrived, HaveFailed, Output, Request, TreeFetch
from shoal.protocol.ids import PeerId

ANN, BOB, EVE = PeerId("ann"), PeerId("bob"), PeerId("eve")


class Scene:
    """A fetch, what it asked for, and a clock."""

    def __init__(self, num_blocks: int, *sources: PeerId, here: int = 0) -> None:
        self.fetch = TreeFetch(num_blocks, here, sources, Random(7))
        self.now = 0.0
        self.open: list[Request] = []
        self.said: list[Output] = []

    def tell(self, event: Event) -> list[Output]:
        outputs = self.fetch.handle(event, self.now)
        self.open += [output for output in outputs if isinstance(output, Request)]
        self.said = outputs
        return outputs

    def has(self, source: PeerId, blocks: int) -> None:
        self.tell(HaveArrived(source, blocks))

    def answer(self, request: Request, **how: object) -> list[Output]:
        self.open.remove(request)
        came = tuple(range(request.start, request.start + request.count))
        return self.tell(Answered(request.source, request.start, came if not how else (), **how))  # type: ignore[arg-type]

    def of(self, source: PeerId) -> list[Request]:
        return [request for request in self.open if request.source == source]

    def asked(self) -> set[int]:
        return {n for request in self.open for n in range(request.start, request.start + request.count)}

    def finish(self, *honest: PeerId) -> None:
        for _ in range(1000):
            if any(isinstance(output, Done) for output in self.said):
                return
            request = next(request for request in self.open if request.source in honest)
            self.now += 0.01
            self.answer(request)
        raise AssertionError("it does not end")


def test_a_lone_source_is_asked_first_what_it_has_and_then_for_all_in_order() -> None:
    scene = Scene(40, ANN)
    assert scene.tell(Tick())[0] == AskHave(ANN)
    scene.has(ANN, (1 << 40) - 1)
    asked: list[int] = []
    while not any(isinstance(output, Done) for output in scene.said):
        request = scene.open[0]
        asked += range(request.start, request.start + request.count)
        scene.now += 0.01 * request.count
        scene.answer(request)
    assert sorted(asked) == list(range(40))  # each once
    assert sum(b != a + 1 for a, b in itertools.pairwise(asked)) <= 1  # it goes round the end once
    assert scene.fetch.came_from == {ANN: 40}


def test_what_is_here_is_not_asked_for() -> None:
    scene = Scene(16, ANN, here=0xFF00)
    scene.tell(Tick())
    scene.has(ANN, 0xFFFF)
    scene.finish(ANN)
    assert scene.fetch.came_from == {ANN: 8}
    everything = Scene(16, ANN, here=0xFFFF)
    assert everything.tell(Tick()) == [Done()]


def test_what_few_have_is_asked_for_first() -> None:
    scene = Scene(64, ANN, BOB, EVE)
    scene.tell(Tick())
    common = (1 << 64) - 1 & ~(1 << 37)
    scene.fetch.max_open_blocks = 0
    scene.has(BOB, common)
    scene.has(EVE, common)
    scene.has(ANN, (1 << 64) - 1)
    scene.fetch.max_open_blocks = 24
    scene.tell(Tick())
    assert [request.start for request in scene.of(ANN)] == [37]


def test_a_liar_is_dropped_for_good_and_its_blocks_are_asked_elsewhere() -> None:
    scene = Scene(4, ANN, EVE)
    scene.tell(Tick())
    scene.has(EVE, 15)
    lie = scene.of(EVE)[0]
    outputs = scene.answer(lie, failure="", is_lie=True)
    assert any(isinstance(output, Drop) and output.source == EVE for output in outputs)
    scene.tell(SourceFound(EVE))
    scene.has(EVE, 15)
    assert not scene.of(EVE)
    scene.has(ANN, 15)
    scene.finish(ANN)
    assert scene.fetch.came_from == {ANN: 4}


def test_a_source_that_has_less_than_it_said_is_asked_again_what_it_has() -> None:
    scene = Scene(2, ANN)
    scene.tell(Tick())
    scene.has(ANN, 3)
    (request,) = scene.open
    scene.answer(request, failure="not here")
    assert not scene.open
    scene.now += 1
    assert AskHave(ANN) in scene.tell(Tick())
    scene.has(ANN, 3)
    scene.finish(ANN)


def test_a_fetch_fails_for_lack_of_blocks_and_never_of_time() -> None:
    scene = Scene(100, ANN)
    scene.tell(Tick())
    scene.has(ANN, (1 << 100) - 1)
    for _ in range(20):  # forty minutes
        scene.now += module.PATIENCE_S - 1
        scene.answer(scene.open[0])
    scene.now += module.PATIENCE_S
    (failed,) = (output for output in scene.tell(Tick()) if isinstance(output, Failed))
    assert failed.lack is Lack.STALLED
    assert scene.tell(Tick()) == []


def test_without_a_source_it_fails_soon_but_waits_for_one_to_come_back() -> None:
    scene = Scene(4, ANN)
    scene.tell(Tick())
    scene.tell(SourceLost(ANN))
    scene.now += module.LONELY_S - 1
    scene.tell(SourceFound(BOB))
    scene.now += module.LONELY_S
    assert not any(isinstance(output, Failed) for output in scene.tell(Tick()))
    scene.tell(SourceLost(BOB))
    scene.now += module.LONELY_S
    (failed,) = (output for output in scene.tell(Tick()) if isinstance(output, Failed))
    assert failed.lack is Lack.UNAVAILABLE


def test_a_source_that_says_nothing_is_given_up() -> None:
    scene = Scene(4, EVE)
    scene.tell(Tick())
    for _ in range(module.MAX_FAILURES):
        scene.tell(HaveFailed(EVE, "no"))
        scene.now += module.MAX_BACKOFF_S
    assert scene.fetch.num_sources == 0


def test_a_trickle_is_called_off_if_somebody_else_has_it() -> None:
    scene = Scene(1, EVE, ANN)
    scene.tell(Tick())
    scene.has(EVE, 1)
    scene.now += module.TRICKLE_S
    assert CallOff(EVE, 0) not in scene.tell(Tick())  # nobody else has it: slow is better than nothing
    scene.now += 1
    scene.has(ANN, 1)
    assert scene.of(ANN)
    assert CallOff(EVE, 0) in scene.said


def test_at_the_end_what_is_late_is_asked_of_who_is_quick_and_the_other_is_called_off() -> None:
    scene = Scene(8, ANN, EVE)
    scene.tell(Tick())
    scene.has(EVE, 0xFF)
    scene.has(ANN, 0xFF)
    (late,) = scene.of(EVE)
    said: list[Output] = []
    for _ in range(2):
        while mine := scene.of(ANN):
            scene.now += 0.01
            said += scene.answer(mine[0])
        scene.now += module.LATE_S
        said += scene.tell(Tick())
    assert {Done(), CallOff(EVE, late.start)} <= set(said)
    assert scene.fetch.came_from == {ANN: 8}


def test_no_more_is_asked_for_at_once_than_there_is_room_for() -> None:
    sources = [PeerId(f"peer{n}") for n in range(100)]
    scene = Scene(1000, *sources)
    scene.tell(Tick())
    for source in sources:
        scene.has(source, (1 << 1000) - 1)
    for _ in range(500):
        scene.now += 0.001
        scene.answer(scene.open[0])
        assert len(scene.asked()) <= module.MAX_OPEN_BLOCKS


def test_wakes_are_ahead_and_seldom() -> None:
    """A core that is woken and does nothing would be woken for ever."""
    scene = Scene(8, ANN, BOB)
    scene.tell(Tick())
    scene.has(ANN, 0xFF)
    scene.has(BOB, 0x0F)
    for _ in range(200):
        wakes = [output.at for output in scene.said if isinstance(output, Wake)]
        if not wakes:
            break
        assert wakes[-1] > scene.now
        scene.now = wakes[-1]
        scene.tell(Tick())
    assert scene.now >= module.PATIENCE_S - 1


@pytest.mark.parametrize("seed", range(2))
def test_all_who_stay_get_all_of_it_while_a_fifth_leave(seed: int) -> None:
    swarm = Swarm(seed, 30, 24, leave=0.2)
    took_s = swarm.run(until=1000)
    sent = sum(peer.sent for peer in swarm.peers.values())
    assert took_s < 1000, seed
    assert sent < 1.3 * 24 * 30, seed
    assert swarm.peers[PeerId("peer0")].sent < 0.6 * sent  # they give to each other
