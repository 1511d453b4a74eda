"""Mode ``gradient``: many exchanges in each update, which go directly while nothing fails, and by votes otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from shoal.protocol.ids import PeerId
from shoal.training import sim, sim_liars
from shoal.training.exchange.direct import PATIENCE_S, Part
from shoal.training.manifest import Mode
from shoal.training.sim import SimConfig, SimReport, Swarm, limit_s
from shoal.training.sim_member import Member

from .test_phases_sim import MODES, copied, die_and_go_on, epoch_of

EXCHANGES = 12
VOTED_S = 0.25
"""One exchange by votes, over these links."""
LIARS = (*sim_liars.KINDS, *sim_liars.OF_STEPS)


def swarm_of(**settings: object) -> Swarm:
    chosen = {"exchanges": EXCHANGES, "contribution_bytes": 20_000, "loss": 0.02} | settings
    return Swarm(SimConfig(mode=Mode.GRADIENT, **chosen))  # type: ignore[arg-type]


def played(**settings: object) -> tuple[Swarm, SimReport]:
    swarm = swarm_of(**settings)
    swarm.play(limit_s(swarm.config))
    return swarm, swarm.report()


def test_an_update_takes_two_votes_however_many_exchanges_it_has() -> None:
    few, many = (played(peers=4, epochs=12, seed=1, exchanges=number)[0] for number in (3, 24))
    assert many.num_announcements < 1.3 * few.num_announcements
    assert min(few.median_epoch(), many.median_epoch()) >= 12


@pytest.mark.parametrize("seed", range(4))
def test_members_that_die_and_come_back_leave_all_with_the_same_policies(seed: int) -> None:
    _, report = played(peers=5, epochs=25, kills_per_hour=200, seed=seed)
    assert (report.agreed, report.stopped) == (1.0, 0), report


@pytest.mark.parametrize("kind", LIARS, ids=lambda kind: kind.__name__)
def test_one_liar_of_each_kind_bends_nothing_and_stops_nobody(
    kind: type[sim_liars.Liar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim, "KINDS", (kind,))
    _, report = played(peers=7, epochs=20, liars=1 / 7, seed=2)
    assert report.epochs >= 20, report
    assert (report.agreed, report.stopped) == (1.0, 0), report


def test_one_that_cannot_be_given_anything_costs_the_others_the_directness_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two members have no path to each other but by gossip: each says so at the first step, before all wait for it."""
    give = Member.give_part

    def not_to_the_last(self: Member, part: Part, members: Iterable[PeerId]) -> None:
        last = max(self.swarm.members)
        for peer in members:
            if last in (peer, self.peer):
                self.not_given(peer, part.key)
            else:
                give(self, part, (peer,))

    monkeypatch.setattr(Member, "give_part", not_to_the_last)
    _, report = played(peers=4, epochs=12, seed=1)
    assert (report.agreed, report.stopped) == (1.0, 0), report
    assert report.epochs >= 12, report


@pytest.mark.parametrize("peers", [2, 3])
def test_whoever_lives_goes_on_whatever_step_a_member_dies_at(peers: int) -> None:
    """Each combination of steps at which members are seen, each way to die, in turns."""
    ways = itertools.cycle(itertools.product(range(peers), MODES))
    swarm = swarm_of(peers=peers, epochs=10_000, seed=3)
    seen: set[tuple[object, ...]] = set()
    while swarm.network.now < 20 and swarm.network.step():
        if min(map(epoch_of, swarm.honest)) < 4:
            continue
        moment = tuple((step_of(each), type(each.run.jobs.job)) for each in swarm.honest)
        if moment in seen or not any(each.run.epoch.direct for each in swarm.honest):
            continue
        seen.add(moment)
        victim, mode = next(ways)
        for took_s, bound_s in die_and_go_on(copied(swarm), victim, mode):
            bound_s += PATIENCE_S + EXCHANGES * VOTED_S  # to see it, and to settle the update anew
            assert took_s <= bound_s, f"{moment}, member {victim} died, {mode}"
    assert {step for moment in seen for step, _ in moment if step} >= set(range(1, EXCHANGES - 1))


def step_of(member: Member) -> int:
    """Of the direct exchange that it is at; 0 if it is at none."""
    return member.run.epoch.direct.key.step if member.run.epoch.direct is not None else 0
