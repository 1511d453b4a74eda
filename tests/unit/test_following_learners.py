"""An actor that holds a copy to act by follows its learners: whoever else holds what, and wherever they begin again."""

from __future__ import annotations

import pytest

from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training import run_events as events
from shoal.training.electorate import Electorate
from shoal.training.lineage import FORK_S
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.statements import NO_BALLOT, Facts, Phase, Result
from shoal.training.taking import HEAR_OUT_S, LOOK_S

ME, LEARNER, EVALUATOR, KEEPER, LATE = (PeerId.of_public_key(bytes([n]) * 32) for n in range(5))
MANIFEST = Manifest(
    owner=LEARNER, task="gym:CartPole-v1", algorithm="vtrace", mode=Mode.ROLLOUTS, batch_per_learner=1024
)
SWARM = SwarmId.of_manifest(b"a run")


def version(number: int, line: str = "", parent: Cid | None = None) -> Result:
    before = Cid.of_block(f"{number - 1}{line}".encode()) if parent is None else parent
    cid = Cid.of_block(f"{number}{line}".encode())
    return Result(epoch=number, cid=cid, parent=before, ballot=NO_BALLOT, env_steps=1000 * number)


class Actor:
    """Its run, and around it a shell that has every copy that is asked for at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.run = Run(MANIFEST, SWARM, ME, Role.ACTOR, self.now)
        self.give(events.Opened(None))

    def give(self, *given: events.Event) -> None:
        waiting = list(given)
        while waiting:
            for output in self.run.handle(waiting.pop(0), self.now):
                match output:
                    case events.Fetch(cid):
                        waiting.append(events.Fetched(cid, is_whole=False))
                    case events.Load(result):
                        held = Policy(
                            result.epoch, result.cid, "", result.env_steps, result.parent, result.ballot, Electorate()
                        )
                        waiting.append(events.Loaded(held, 0))
                    case events.Rollout(samples):
                        waiting.append(events.RolledOut(samples, 0.01))

    def hear(self, author: PeerId, result: Result, role: Role) -> None:
        facts = Facts(role=role, phase=Phase.COLLECTING, epoch=result.epoch)
        self.give(events.Heard(author, facts, b""), events.Heard(author, result, b""))

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.05)
            self.give(events.Tick())

    @property
    def held(self) -> Cid | None:
        return None if self.run.policy is None else self.run.policy.cid


def test_each_version_is_taken_when_learners_have_it_although_others_are_behind():
    actor = Actor()
    for author, role in ((LEARNER, Role.LEARNER), (EVALUATOR, Role.EVALUATOR), (KEEPER, Role.ACTOR)):
        actor.hear(author, version(1), role)
    actor.wait(LOOK_S + HEAR_OUT_S)
    assert actor.held == version(1).cid
    for number in range(2, 12):
        actor.hear(LEARNER, version(number), Role.LEARNER)
        actor.wait(2 * HEAR_OUT_S)
        assert actor.held == version(number).cid


@pytest.mark.parametrize("others", [(), ((EVALUATOR, Role.EVALUATOR), (KEEPER, Role.ACTOR))])
def test_a_learner_that_begins_again_further_back_is_followed_there(others):
    actor = Actor()
    for author, role in ((LEARNER, Role.LEARNER), *others):
        actor.hear(author, version(9), role)
    actor.wait(LOOK_S + HEAR_OUT_S)
    assert actor.held == version(9).cid
    actor.give(events.Gone(LEARNER))
    actor.wait(60.0)
    assert actor.held == version(9).cid
    actor.hear(LATE, version(4), Role.LEARNER)
    actor.wait(1.0)
    actor.hear(LATE, version(5, "again", version(4).cid), Role.LEARNER)
    actor.wait(FORK_S + 2 * LOOK_S)
    assert actor.held == version(5, "again").cid
    actor.hear(LATE, version(6, "again"), Role.LEARNER)
    actor.wait(2 * HEAR_OUT_S)
    assert actor.held == version(6, "again").cid
    assert actor.run.progress.lost_env_steps == 0


def test_what_others_than_learners_say_moves_no_actor_while_there_is_a_learner():
    actor = Actor()
    actor.hear(LEARNER, version(3), Role.LEARNER)
    actor.wait(LOOK_S + HEAR_OUT_S)
    for liar in (EVALUATOR, KEEPER, LATE):
        actor.hear(liar, version(50, "invented"), Role.EVALUATOR)
    actor.wait(10.0)
    assert actor.held == version(3).cid
