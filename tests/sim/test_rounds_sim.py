"""Many learners, one round, a network that delays and loses presence, and learners that die: everybody who lives on
decides, soon, and nearly always the same."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest

from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.exchange.rounds import Decide, Fetch, LearnerView, Offer, Proposal, Propose, Round, RoundKey

SWARM = SwarmId.of_manifest(b"simulated")
KEY = RoundKey(0, 0)
HEARTBEAT_S = 1.0  # as in node/swarm/replica.py
TTL_S = 3.0  # as in crdt/presence.py
PATIENCE_S = 1.0
END_S = 60.0


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to a round.

    Attributes:
        delay_s: the longest that one presence update or one fetch takes.
        loss: the share of presence updates that one receiver never gets; the next heartbeat repeats what they said.
        crashes: how many learners die, each at some instant.
        kill_proposer: the first to propose dies within the time that its proposal takes to travel.
        spread_s: within which time the learners come to the round with their offers.
        silent: how many learners never offer anything, though they are alive.
        unnoticed: the share of deaths that a learner hears of only when presence expires.
    """

    delay_s: float = 0.05
    loss: float = 0.0
    crashes: int = 0
    kill_proposer: bool = False
    spread_s: float = 0.3
    silent: int = 0
    unnoticed: float = 0.0


@dataclass(slots=True)
class Heard:
    seq: int
    view: LearnerView
    expires_at: float
    is_live: bool = True


class Learner:
    """A stand-in for node/swarm/learner.py and node/swarm/replica.py."""

    def __init__(self, sim: Simulation, peer: PeerId) -> None:
        self.sim = sim
        self.peer = peer
        self.own = Offer(peer, Cid.of_block(f"what {peer} learned".encode()), 100)
        self.holds = {self.own.cid}
        self.says = LearnerView(KEY)
        self.seq = 0
        self.heard: dict[PeerId, Heard] = {}
        self.round: Round | None = None
        self.decided: Proposal | None = None
        self.decided_at = 0.0
        self.alive = True

    def say(self, view: LearnerView) -> None:
        self.says = view
        self.seq += 1
        self.sim.broadcast(self)

    def heartbeat(self) -> None:
        if self.alive:
            self.say(self.says)
            self.sim.at(HEARTBEAT_S, self.heartbeat)

    def hear(self, peer: PeerId, seq: int, view: LearnerView) -> None:
        heard = self.heard.get(peer)
        if self.alive and (heard is None or seq > heard.seq):
            self.heard[peer] = Heard(seq, view, self.sim.now + TTL_S)
            self.step()

    def miss(self, peer: PeerId) -> None:
        if peer in self.heard:
            self.heard[peer].is_live = False
            self.step()

    def live(self) -> dict[PeerId, LearnerView]:
        return {peer: h.view for peer, h in self.heard.items() if h.is_live and self.sim.now < h.expires_at}

    def begin(self) -> None:
        if self.alive:
            self.round = Round(SWARM, self.peer, KEY, self.own, PATIENCE_S, self.sim.now)
            self.say(replace(self.says, is_ready=True, offer=self.own))
            self.step()
            self.sim.at(0.01, self.tick)

    def tick(self) -> None:
        if self.alive and self.decided is None and self.round is not None:
            self.step()
            self.sim.at(max(0.01, min(0.25, self.round.next_wake - self.sim.now)), self.tick)

    def step(self) -> None:
        if self.round is None or self.decided is not None or not self.alive:
            return
        for output in self.round.update(self.live(), self.sim.now):
            match output:
                case Fetch(offer, sources):
                    self.sim.fetch(self, offer, sources)
                case Propose(proposal):
                    self.say(replace(self.says, proposal=proposal))
                    self.sim.proposed(self)
                case Decide(proposal):
                    self.decided, self.decided_at = proposal, self.sim.now
                    self.says = LearnerView(RoundKey(1, 0), proposal=self.says.proposal)
                    self.sim.at(self.sim.delay(), lambda: self.say(self.says) if self.alive else None)

    def got(self, offer: Offer) -> None:
        assert self.round is not None
        self.holds.add(offer.cid)
        self.round.hold(offer.cid)
        self.step()


class Simulation:
    """One round of ``size`` learners; all that is random comes from the seed."""

    def __init__(self, seed: int, size: int, weather: Weather) -> None:
        self.rng = random.Random(seed)
        self.weather = weather
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self.learners = {
            peer: Learner(self, peer) for peer in (PeerId.of_public_key(self.rng.randbytes(32)) for _ in range(size))
        }
        self._arrival: dict[tuple[PeerId, PeerId], float] = {}
        self._cut: set[tuple[PeerId, PeerId]] = set()
        self._may_kill_proposer = weather.kill_proposer

    def at(self, delay_s: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), act))

    def delay(self) -> float:
        return self.rng.uniform(0.1, 1.0) * self.weather.delay_s

    def broadcast(self, source: Learner) -> None:
        peer, seq, view = source.peer, source.seq, source.says
        for other in self.learners.values():
            if other is not source and self.rng.random() >= self.weather.loss:
                self.send(source, other, partial(other.hear, peer, seq, view))

    def send(self, source: Learner, target: Learner, act: Callable[[], object]) -> None:
        """What one says to another arrives in order; what is on its way when the speaker dies may be cut off."""
        link = source.peer, target.peer
        self._arrival[link] = max(self._arrival.get(link, 0.0), self.now + self.delay())
        self.at(self._arrival[link] - self.now, lambda: act() if link not in self._cut else None)

    def fetch(self, learner: Learner, offer: Offer, sources: tuple[PeerId, ...]) -> None:
        assert learner.round is not None

        def arrive() -> None:
            asked = [self.learners[peer] for peer in (offer.author, *sources)]
            if any(other.alive and offer.cid in other.holds for other in asked):
                learner.got(offer)
            else:
                self.at(0.05, spoil)

        def spoil() -> None:
            assert learner.round is not None
            learner.round.spoil(offer.cid)
            learner.step()

        self.at(self.delay(), arrive)

    def crash(self, learner: Learner) -> None:
        learner.alive = False
        for other in self.learners.values():
            if other is learner:
                continue
            if self.rng.random() < 0.5:
                self._cut.add((learner.peer, other.peer))
            if self.rng.random() >= self.weather.unnoticed:
                arrival = max(self._arrival.get((learner.peer, other.peer), 0.0), self.now + self.delay())
                self.at(arrival - self.now, partial(other.miss, learner.peer))

    def proposed(self, learner: Learner) -> None:
        if self._may_kill_proposer:
            self._may_kill_proposer = False
            self.at(self.rng.uniform(0, self.weather.delay_s), partial(self.crash, learner))

    def run(self) -> list[Learner]:
        """Those who lived to the end and offered something."""
        everybody = list(self.learners.values())
        silent = set(self.rng.sample(everybody, self.weather.silent))
        for learner in everybody:  # they know each other from before
            for other in everybody:
                if other is not learner:
                    learner.heard[other.peer] = Heard(0, other.says, TTL_S)
            self.at(self.rng.uniform(0, HEARTBEAT_S), learner.heartbeat)
            if learner not in silent:
                self.at(self.rng.uniform(0, self.weather.spread_s), learner.begin)
        for learner in self.rng.sample(everybody, self.weather.crashes):
            self.at(self.rng.uniform(0, 1.5 * self.weather.spread_s), partial(self.crash, learner))
        while self._events and self._events[0][0] < END_S:
            self.now, _, act = heapq.heappop(self._events)
            act()
            if all(one.decided is not None or not one.alive for one in everybody if one not in silent):
                break
        return [learner for learner in everybody if learner.alive and learner not in silent]


def outcome(seed: int, weather: Weather) -> tuple[bool, float]:
    """Whether the survivors of one round agree, and after how long the last of them decided."""
    simulation = Simulation(seed, 3 + seed % 14, weather)
    survivors = simulation.run()
    undecided = [one.peer for one in survivors if one.decided is None]
    assert not undecided, f"seed {seed}, {weather}: {undecided} never decided"
    for one in survivors:
        assert one.decided is not None
        lacks = {offer.cid for offer in one.decided.offers} - one.holds
        assert not lacks, f"seed {seed}, {weather}: {one.peer} decided without holding {lacks}"
    last = max((one.decided_at for one in survivors), default=0.0)
    return len({one.decided for one in survivors}) <= 1, last


STILL = {
    "calm": (Weather(), 0.3 + 0.2),
    "slow network": (Weather(delay_s=0.3), 0.3 + 4 * 0.3),
    "one dies": (Weather(crashes=1), 3 * PATIENCE_S),
    "two die on a slow network": (Weather(crashes=2, delay_s=0.3), 4 * PATIENCE_S),
    "one is silent": (Weather(silent=1), 0.3 + 3 * PATIENCE_S),
    "a death is not noticed by all": (Weather(crashes=1, unnoticed=0.5), 4 * PATIENCE_S),
}
LOSSY = {
    "1 in 20 lost": (Weather(loss=0.05), 3 * PATIENCE_S, 0.99),
    "1 in 5 lost": (Weather(loss=0.2), 3 * PATIENCE_S, 0.98),
    "learners come three waits apart": (Weather(spread_s=3 * PATIENCE_S), 3 * PATIENCE_S + 0.5, 0.95),
    "the proposer dies as it proposes": (Weather(kill_proposer=True), 4 * PATIENCE_S, 0.93),
    "all of it": (Weather(loss=0.05, crashes=1, kill_proposer=True, unnoticed=0.2), 5 * PATIENCE_S, 0.9),
}


@pytest.mark.parametrize("name", STILL)
def test_where_nothing_is_lost_the_survivors_decide_soon_and_the_same(name: str) -> None:
    weather, bound_s = STILL[name]
    outcomes = {seed: outcome(seed, weather) for seed in range(140)}
    late = {seed: last for seed, (_, last) in outcomes.items() if last > bound_s}
    assert not late, f"{name}: later than {bound_s} s, by seed: {late}"
    differ = [seed for seed, (agree, _) in outcomes.items() if not agree]
    assert len(differ) <= 0.01 * len(outcomes), f"{name}: survivors differ in seeds {differ}"


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_lost_may_part_the_survivors_but_seldom_does(name: str) -> None:
    weather, bound_s, least_agreement = LOSSY[name]
    outcomes = {seed: outcome(seed, weather) for seed in range(140)}
    late = {seed: last for seed, (_, last) in outcomes.items() if last > bound_s}
    assert not late, f"{name}: later than {bound_s} s, by seed: {late}"
    differ = [seed for seed, (agree, _) in outcomes.items() if not agree]
    assert len(differ) <= (1 - least_agreement) * len(outcomes), f"{name}: survivors differ in seeds {differ}"


def test_learners_who_hear_each_other_average_what_everybody_offered() -> None:
    for seed in range(70):
        survivors = Simulation(seed, 3 + seed % 14, Weather()).run()
        numbers = Counter(len(one.decided.offers) for one in survivors if one.decided is not None)
        assert numbers == {len(survivors): len(survivors)}, f"seed {seed}: {numbers}"


def test_the_same_seed_gives_the_same_round() -> None:
    weather = Weather(loss=0.1, crashes=1, kill_proposer=True, unnoticed=0.3)
    one, other = Simulation(7, 10, weather).run(), Simulation(7, 10, weather).run()
    assert [(a.peer, a.decided, a.decided_at) for a in one] == [(b.peer, b.decided, b.decided_at) for b in other]
