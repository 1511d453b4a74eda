"""Which role a node takes by itself: of what it measured and what others say, and what no claim can do."""

from pathlib import Path

import pytest

from shoal.node.store.database import Storage
from shoal.node.swarm.memory import memory_limit
from shoal.node.swarm.numbering import AHEAD, Numbering
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training import run_events as events
from shoal.training.electorate import Electorate, Standing
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.roles import (
    EVALUATOR_FROM,
    LACK_S,
    LEAST_ACTING_BYTES,
    LEAST_LEARNING_BYTES,
    STAY_S,
    TURN_S,
    Choosing,
    Machine,
    View,
    first_role,
)
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.statements import MAX_RATE, NO_BALLOT, Facts, Phase, Wait

ME, A, B, C, D, E = (PeerId.of_public_key(bytes([n]) * 32) for n in range(6))
LARGE = 2**40


def said(role=Role.LEARNER, phase=Phase.COLLECTING, *, speed=100.0, stands_by=False, wait=Wait.NOTHING):
    return Facts(role=role, phase=phase, speed=speed, stands_by=stands_by, wait=wait)


def view(live, own, *, rates=None, epoch=3, min_learners=1, uplink=0.0, state_bytes=0):
    electorate = Electorate({peer: Standing(1000.0, rate) for peer, rate in (rates or {}).items()})
    return View(live, electorate, own, epoch, min_learners, uplink, state_bytes)


def after(choosing, seen, seconds, since=0.0, step=0.5):
    """The first choice within so many seconds, and when."""
    now = since
    while now <= since + seconds:
        chosen = choosing.look(seen, now)
        if chosen is not None:
            return chosen[0], now - since
        now += step
    return None


@pytest.mark.parametrize(
    ("machine", "mode", "role"),
    [
        (Machine(True, True, LARGE), Mode.ROLLOUTS, Role.LEARNER),
        (Machine(True, True, LARGE), Mode.LOCAL, Role.LEARNER),
        (Machine(False, True, LARGE), Mode.ROLLOUTS, Role.ACTOR),
        (Machine(False, True, LARGE), Mode.LOCAL, Role.STORAGE),
        (Machine(True, True, LEAST_LEARNING_BYTES - 1), Mode.ROLLOUTS, Role.ACTOR),
        (Machine(True, True, LEAST_ACTING_BYTES - 1), Mode.ROLLOUTS, Role.STORAGE),
        (Machine(False, False, LARGE), Mode.ROLLOUTS, Role.STORAGE),
    ],
)
def test_a_node_begins_with_what_its_machine_can_do(machine, mode, role):
    assert first_role(machine, mode) is role


def test_an_actor_learns_when_the_only_learner_is_gone_and_not_before():
    own = said(Role.ACTOR)
    choosing = Choosing(ME, Role.ACTOR, 0.0)
    assert after(choosing, view({A: said()}, own), 20) is None
    assert after(choosing, view({}, own), 20, since=21) == (Role.LEARNER, LACK_S)


def test_a_learner_that_comes_back_at_once_is_not_replaced():
    own = said(Role.ACTOR)
    choosing = Choosing(ME, Role.ACTOR, 0.0)
    assert choosing.look(view({}, own), 1.0) is None
    assert choosing.look(view({A: said(phase=Phase.STARTING)}, own), 1.5) is None
    assert choosing.look(view({}, own), 2.5) is None


def test_of_several_the_fastest_steps_in_first_and_the_others_only_if_it_does_not():
    fast, slow = said(Role.ACTOR, speed=500.0, stands_by=True), said(Role.ACTOR, speed=100.0, stands_by=True)
    assert after(Choosing(ME, Role.ACTOR, 0.0), view({A: slow}, fast), 20) == (Role.LEARNER, LACK_S)
    assert after(Choosing(ME, Role.ACTOR, 0.0), view({A: fast}, slow), 20) == (Role.LEARNER, LACK_S + TURN_S)


def test_as_many_step_in_as_are_missing():
    fast, slow = said(Role.ACTOR, speed=500.0, stands_by=True), said(Role.ACTOR, speed=100.0, stands_by=True)
    assert after(Choosing(ME, Role.ACTOR, 0.0), view({A: fast}, slow, min_learners=2), 20) == (Role.LEARNER, LACK_S)


def test_whoever_claims_to_be_fastest_and_does_nothing_holds_nobody_up_for_long():
    boast = said(Role.ACTOR, speed=MAX_RATE, stands_by=True)
    chosen = after(Choosing(ME, Role.ACTOR, 0.0), view({A: boast, B: boast}, said(Role.ACTOR)), 20)
    assert chosen == (Role.LEARNER, LACK_S + 2 * TURN_S)


def test_an_actor_that_cannot_learn_is_not_waited_for():
    other = said(Role.ACTOR, speed=500.0)
    assert after(Choosing(ME, Role.ACTOR, 0.0), view({A: other}, said(Role.ACTOR)), 20) == (Role.LEARNER, LACK_S)


def test_an_actor_that_outruns_its_learners_learns_and_one_that_does_not_stays():
    waits = said(Role.ACTOR, Phase.WAITING, wait=Wait.OUTRUN)
    assert after(Choosing(ME, Role.ACTOR, 0.0), view({A: said()}, waits), 60) == (Role.LEARNER, STAY_S)
    assert after(Choosing(ME, Role.ACTOR, 0.0), view({A: said()}, said(Role.ACTOR)), 60) is None


def test_a_learner_that_is_far_slower_than_rounds_show_others_to_be_acts():
    own = said(phase=Phase.WAITING)
    slow = view({A: said(), B: said()}, own, rates={ME: 10.0, A: 100.0, B: 120.0})
    assert after(Choosing(ME, Role.LEARNER, 0.0), slow, 60) == (Role.ACTOR, STAY_S)
    usual = view({A: said(), B: said()}, own, rates={ME: 50.0, A: 100.0, B: 120.0})
    assert after(Choosing(ME, Role.LEARNER, 0.0), usual, 60) is None


def test_the_only_learner_stays_however_slow_it_is():
    own = said(phase=Phase.WAITING)
    assert after(Choosing(ME, Role.LEARNER, 0.0), view({A: said(Role.ACTOR)}, own, rates={ME: 1.0}), 60) is None


def test_nobody_is_moved_away_from_learning_by_a_claim():
    boast = said(speed=MAX_RATE)
    seen = view({A: boast, B: boast, C: boast}, said(phase=Phase.WAITING), rates={ME: 10.0})
    assert after(Choosing(ME, Role.LEARNER, 0.0), seen, 60) is None


def test_a_learner_whose_link_is_too_slow_for_its_policies_acts():
    choosing = Choosing(ME, Role.LEARNER, 0.0)
    found = None
    for epoch in range(30):
        seen = view({A: said()}, said(), rates={ME: 100.0, A: 100.0}, epoch=epoch, uplink=1e5, state_bytes=10**6)
        found = found or choosing.look(seen, 2.0 * epoch)
    assert found is not None
    assert found[0] is Role.ACTOR


def test_among_many_learners_the_slowest_evaluates_and_goes_back_when_they_are_few():
    others = (A, B, C, D)[: EVALUATOR_FROM - 1]
    live = {peer: said(stands_by=True) for peer in others}
    rates = {ME: 50.0} | dict.fromkeys(others, 100.0)
    own = said(phase=Phase.WAITING, stands_by=True)
    assert after(Choosing(ME, Role.LEARNER, 0.0), view(live, own, rates=rates), 60) == (Role.EVALUATOR, STAY_S)
    there = live | {E: said(Role.EVALUATOR)}
    assert after(Choosing(ME, Role.LEARNER, 0.0), view(there, own, rates=rates), 60) is None
    evaluates = said(Role.EVALUATOR, Phase.WAITING)
    assert after(Choosing(ME, Role.EVALUATOR, 0.0), view(live, evaluates), 60) is None
    few = {A: said(), B: said()}
    assert after(Choosing(ME, Role.EVALUATOR, 0.0), view(few, evaluates), 60) == (Role.LEARNER, STAY_S)


def test_a_learner_is_not_taken_out_of_a_round():
    seen = view({A: said(), B: said()}, said(phase=Phase.EXCHANGING), rates={ME: 10.0, A: 100.0, B: 120.0})
    assert after(Choosing(ME, Role.LEARNER, 0.0), seen, 60) is None


MANIFEST = Manifest(owner=A, task="gym:CartPole-v1", algorithm="vtrace", mode=Mode.ROLLOUTS, batch_per_learner=1024)
POLICY = Policy(7, Cid.of_block(b"seven"), "", 7000, Cid.of_block(b"six"), NO_BALLOT, Electorate())


def acting(*, is_chosen):
    run = Run(MANIFEST, SwarmId.of_manifest(b"a run"), ME, Role.ACTOR, 0.0, is_chosen=is_chosen)
    run.handle(events.Opened(None), 0.0)
    run.jobs.in_worker = POLICY
    run._hold(POLICY, 0.0, [])
    return run


def play(run, until):
    found, now = [], 0.0
    while now < until:
        now += 0.5
        waiting = run.handle(events.Tick(), now)
        while waiting:
            output = waiting.pop(0)
            found.append(output)
            if isinstance(output, events.Rollout):
                waiting += run.handle(events.RolledOut(output.samples, 0.01), now)
    return found


def test_an_actor_that_is_left_writes_what_it_holds_and_takes_the_learners_place_once():
    found = play(acting(is_chosen=True), 10)
    taken = [each for each in found if isinstance(each, events.TakeRole)]
    assert [each.role for each in taken] == [Role.LEARNER]
    kept = [each.policy for each in found[: found.index(taken[0])] if isinstance(each, events.Write | events.Keep)]
    assert POLICY in kept


def test_a_role_that_a_person_chose_is_kept_and_the_reason_it_waits_is_said():
    run = acting(is_chosen=False)
    assert not [each for each in play(run, 60) if isinstance(each, events.TakeRole)]
    assert run.facts().wait is Wait.LEARNERS
    run.handle(events.Heard(A, said(), b""), 61.0)
    run.handle(events.Tick(), 62.0)
    assert run.facts().wait is Wait.OUTRUN
    assert "outruns" in run.facts().wait.words


def test_every_reason_to_wait_has_words():
    assert all(bool(each.words) == (each is not Wait.NOTHING) for each in Wait)


def test_streams_are_never_begun_again_though_the_clock_is_set_back(tmp_path, monkeypatch):
    swarm = SwarmId.of_manifest(b"a run")
    storage = Storage(tmp_path / "a.db")
    first = Numbering(storage, swarm)
    began = first.begin()
    used = began + 3 * AHEAD
    first.used(used)
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    again = Numbering(storage, swarm)
    assert again.begin() > used
    assert again.begin() > used + 1  # a worker that ended before it made anything
    assert Numbering(storage, SwarmId.of_manifest(b"another")).begin() == 0
    storage.close()


def test_memory_is_what_the_least_control_group_leaves(tmp_path: Path):
    assert memory_limit(tmp_path) > 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/node\n")
    folder = tmp_path / "sys/fs/cgroup/user/node"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    (folder.parent / "memory.max").write_text("300000000\n")
    assert memory_limit(tmp_path) == 300_000_000
    (tmp_path / "proc/self/cgroup").write_text("5:cpu:/a\n7:memory:/b\n")
    old = tmp_path / "sys/fs/cgroup/memory/b"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("200000000\n")
    assert memory_limit(tmp_path) == 200_000_000
