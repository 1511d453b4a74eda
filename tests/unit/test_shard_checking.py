"""A shard that is true is never called false, one that is false always is, and what cannot be told is called that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, SignatureError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.rollouts.acting import Acting
from shoal.training.rollouts.checking import check_rows
from shoal.training.rollouts.evidence import (
    Finding,
    Lie,
    Verdict,
    disproved,
    forked,
    hear,
    say,
    who_checks,
)
from shoal.training.rollouts.replaying import is_deterministic, nondeterminism, surroundings, with_sights
from shoal.training.rollouts.rows import Rows
from shoal.training.rollouts.shard import Shard, seeds_of
from shoal.training.tasks import load_task
from shoal.training.tasks.base import Discrete, Following, Task
from shoal.training.tasks.gym import GymTask, GymVectorEnv

from .shards import (
    ALICE,
    BOB,
    CAROL,
    STATE,
    SWARM,
    a_shard,
    a_stream,
    a_task,
    an_actor,
    here,
    made,
    signed,
)

TASKS = ["gym:CartPole-v1", "gym:Pendulum-v1"]


def looked_into(shard: Shard, task: Task, acting: Acting | None = None, **others: Any) -> Finding:
    return check_rows(shard, task, here(task.name), acting or an_actor(task), **others)


# --- honest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("is_shown", [False, True])
def test_an_honest_shard_is_true(name: str, is_shown: bool) -> None:
    task = a_task(name)
    found = looked_into(a_shard(task, steps=260, num_envs=3, is_shown=is_shown), task)
    assert found.verdict is Verdict.TRUE, found
    assert found.seen == 260
    assert found.looked == frozenset(Lie) - {Lie.DRAWS}


@pytest.mark.parametrize("name", TASKS)
def test_every_shard_of_an_honest_stream_is_true_and_follows_the_one_before(name: str) -> None:
    task, stream = a_task(name), a_stream(a_task(name))
    before: Rows | None = None
    for version in range(4):
        acting = an_actor(task, seed=version)
        head, rows = stream.collect(acting, version, Cid.of_block(bytes([version])), 60)
        shard = signed(task, head, rows)
        stream.sealed(shard.cid)
        assert looked_into(shard, task, acting, before=before).verdict is Verdict.TRUE
        if version:
            believed = looked_into(shard, task, acting)
            assert believed.verdict is Verdict.TRUE
            assert Lie.LEAD not in believed.looked
        before = rows
    stream.close()


def test_sights_that_a_shard_leaves_out_are_those_that_were_seen() -> None:
    task = a_task()
    _, shown = made(task, is_shown=True, steps=100)
    _, bare = made(task, steps=100)
    again = with_sights(bare, task.make)
    assert again.sights is not None
    assert again.finals is not None
    assert shown.sights is not None
    assert again.sights.tobytes() == shown.sights.tobytes()
    assert with_sights(shown, task.make) is shown


HONEST = """
import json, sys
import numpy as np
from shoal.protocol.ids import Cid
from shoal.training.rollouts.acting import Acting, ActorShape, Noise
from shoal.training.tasks.base import Continuous, Discrete
order, out = sys.argv[1], sys.argv[2]
checks = accused = 0
nearest = 0.0
for seed in range(40):
    rng = np.random.default_rng(seed)
    size, units = int(rng.integers(2, 40)), int(rng.choice([32, 64, 256]))
    space = Discrete(int(rng.integers(2, 8))) if seed % 2 else Continuous(int(rng.integers(1, 6)))
    shape = ActorShape(size, space, (units, units), False)
    flat = (rng.standard_normal(shape.num_parameters) * rng.choice([0.05, 0.2, 0.6])).astype(np.float32)
    words = (flat.view(np.uint32) >> 16).astype(np.uint16)
    acting = Acting(shape, words)
    sights = (rng.standard_normal((256, size)) * rng.choice([0.1, 1, 8])).astype(np.float32)
    if order == "other":                    # units and inputs in another order: sums are of the same numbers
        ins, mids = rng.permutation(size), rng.permutation(units)
        (a, b), (c, d), (e, f) = acting._layers
        acting._layers = [(a[mids][:, ins].copy(), b[mids].copy()), (c[:, mids].copy(), d), (e, f)]
        given = sights[:, ins].copy()
    else:
        rng.permutation(size), rng.permutation(units)
        given = sights
    path = f"{out}/{seed}.npz"
    if order == "first":
        noise = Noise(seed)
        parts = [acting.act(given[start : start + 4], noise) for start in range(0, 256, 4)]
        np.savez(path, actions=np.concatenate([p[0] for p in parts]), log_probs=np.concatenate([p[1] for p in parts]))
        continue
    said = np.load(path)
    expected = acting.expected(given, said["actions"], Noise(seed))
    away = np.abs(said["log_probs"] - expected.log_probs)
    accused += int((away > expected.slack).sum() + (expected.missed > expected.allowed).sum())
    nearest = max(nearest, float((away / expected.slack).max()))
    checks += 256
print(json.dumps({"checks": checks, "accused": accused, "nearest": nearest}))
"""


def test_ten_thousand_honest_steps_are_never_called_false_whatever_order_a_machine_adds_in(tmp_path: Path) -> None:
    def run(order: str, threads: int) -> dict[str, float]:
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-c", HONEST, order, str(tmp_path)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout else {}

    run("first", 1)
    for order, threads in (("second", 2), ("other", 1)):
        found = run(order, threads)
        print(order, threads, found)
        assert found["checks"] > 10_000
        assert found["accused"] == 0
        assert found["nearest"] < 1


@pytest.mark.parametrize("name", ["gym:CartPole-v1", "gym:Pendulum-v1", "gym:Acrobot-v1"])
def test_being_led_through_many_steps_leads_where_the_same_steps_one_by_one_do(name: str) -> None:
    task = load_task(name)
    rng = np.random.default_rng(3)
    size = getattr(task.action_space, "size", None)
    steps: Any = rng.integers(0, 2, (400, 3)) if size is None else rng.normal(0, 1, (400, 3, size)).astype(np.float32)
    one, other = task.make(3), task.make(3)
    assert isinstance(other, Following)
    for env in (one, other):
        env.reset([1, 2, 3])
    for acts in steps[:-100]:
        one.step(acts)
    other.follow(steps[:-100])
    for acts in steps[-100:]:
        left, right = one.step(acts), other.step(acts)
        assert left.observations.tobytes() == right.observations.tobytes()
        assert left.rewards.tobytes() == right.rewards.tobytes()
        assert left.terminated.tolist() == right.terminated.tolist()
        assert left.truncated.tolist() == right.truncated.tolist()


# --- liars -----------------------------------------------------------------------------------------------------------


def edited(noun: str, change: Callable[[Any], Any], step: int = 17, env: int = 1) -> Callable[[Rows], Rows]:
    def edit(rows: Rows) -> Rows:
        column = getattr(rows, noun).copy()
        column[step, env] = change(column[step, env])
        return replace(rows, **{noun: column})

    return edit


POISONS: list[tuple[str, Callable[[Rows], Rows], Lie]] = [
    ("a reward raised", edited("rewards", lambda x: x + 1), Lie.REWARDS),
    ("a reward raised by a hair", edited("rewards", lambda x: np.nextafter(x, np.float32(9))), Lie.REWARDS),
    ("an end left out or made up", edited("terminated", lambda x: not x), Lie.ENDS),
    ("an action that was not drawn", edited("actions", lambda x: 1 - x), Lie.ACTS),
    ("a log-probability lowered", edited("log_probs", lambda x: x - 0.01), Lie.LOG_PROBS),
    ("a log-probability of certainty", edited("log_probs", lambda _: 0.0), Lie.LOG_PROBS),
    ("other seeds", lambda rows: replace(rows, seeds=rows.seeds + 1), Lie.SEEDS),
    ("all rewards doubled", lambda rows: replace(rows, rewards=rows.rewards * 2), Lie.REWARDS),
    ("an action that there is not", edited("actions", lambda _: 2), Lie.FORM),
    ("a reward that is no number", edited("rewards", lambda _: np.nan), Lie.FORM),
    ("a probability above 1", edited("log_probs", lambda _: 0.5), Lie.FORM),
]


@pytest.mark.parametrize(("poison", "lie"), [(each[1], each[2]) for each in POISONS], ids=[each[0] for each in POISONS])
def test_a_shard_that_was_edited_is_false(poison: Callable[[Rows], Rows], lie: Lie) -> None:
    task = a_task()
    head, rows = made(task)
    found = looked_into(signed(task, head, poison(rows)), task)
    assert found.verdict is Verdict.FALSE
    # Another action leads elsewhere, so what was earned and shown there may be what differs first.
    assert found.lie is lie or (lie is Lie.ACTS and found.lie in (Lie.ENDS, Lie.REWARDS)), found


@given(st.integers(0, 49), st.integers(0, 1), st.floats(0.003, 5))
@settings(max_examples=25, deadline=None)
def test_a_log_probability_that_was_edited_is_found_where_it_is(step: int, env: int, change: float) -> None:
    task = a_task()
    head, rows = made(task)
    found = looked_into(signed(task, head, edited("log_probs", lambda x: x - change, step, env)(rows)), task)
    assert (found.verdict, found.lie, found.step, found.part) == (Verdict.FALSE, Lie.LOG_PROBS, step, env)


@pytest.mark.parametrize("name", TASKS)
def test_one_environment_of_an_honest_shard_is_true_and_nothing_is_known_of_the_others(name: str) -> None:
    task = a_task(name)
    shard = a_shard(task, steps=120, num_envs=3)
    for env in range(3):
        found = looked_into(shard, task, env=env)
        assert found.verdict is Verdict.TRUE, found
        assert not found.looked
        assert not found.seen


@pytest.mark.parametrize(("poison", "lie"), [(each[1], each[2]) for each in POISONS], ids=[each[0] for each in POISONS])
def test_what_is_false_in_one_environment_is_found_by_who_looks_there(poison: Callable[[Rows], Rows], lie: Lie) -> None:
    task = a_task()
    head, rows = made(task)
    shard = signed(task, head, poison(rows))
    whole, there, elsewhere = (looked_into(shard, task, env=env) for env in (None, 1, 0))
    assert there.verdict is Verdict.FALSE
    if whole.part == 1:
        assert (there.lie, there.step, there.part) == (whole.lie, whole.step, 1)
        assert elsewhere.verdict is Verdict.TRUE
    else:  # it is false in all of them, or as a whole
        assert elsewhere.verdict is Verdict.FALSE


def test_a_copied_shard_is_false_under_another_name() -> None:
    task = a_task()
    head, rows = made(task, ALICE)
    assert looked_into(signed(task, head, rows, ALICE), task).verdict is Verdict.TRUE
    copied = looked_into(signed(task, head, rows, BOB), task)
    assert (copied.verdict, copied.lie) == (Verdict.FALSE, Lie.SEEDS)
    # With Bob's seeds in it, what it earned is another's.
    seeds = np.array(seeds_of(SWARM, BOB.peer_id, "", 0, rows.num_envs))
    assert looked_into(signed(task, head, replace(rows, seeds=seeds), BOB), task).verdict is Verdict.FALSE


def test_a_shard_that_is_sold_again_as_another_is_false() -> None:
    task = a_task()
    head, rows = made(task)
    for other in (
        replace(head, stream=1),
        replace(head, state=Cid.of_block(b"a newer policy")),
        replace(head, number=1, before=STATE),
    ):
        found = looked_into(signed(task, other, rows), task)
        assert found.verdict is Verdict.FALSE, other


@pytest.mark.parametrize("name", TASKS)
def test_another_policy_than_claimed_is_found(name: str) -> None:
    task = a_task(name)
    shard = a_shard(task, acting=an_actor(task, seed=2))
    found = looked_into(shard, task, an_actor(task, seed=1))
    assert found.verdict is Verdict.FALSE
    assert found.lie in (Lie.ACTS, Lie.LOG_PROBS)
    assert looked_into(shard, task, an_actor(task, seed=2)).verdict is Verdict.TRUE


def test_the_claimed_policy_with_better_luck_is_found() -> None:
    """Who draws again until it likes what came, has acts that the noise does not ask for."""
    task = a_task()
    head, _ = made(task)
    stream = a_stream(task)
    _, lucky = stream.collect(an_actor(task), 7, Cid.of_block(b"other noise"), 50)
    stream.close()
    found = looked_into(signed(task, head, lucky), task)
    assert (found.verdict, found.lie) == (Verdict.FALSE, Lie.ACTS)


def test_an_invented_lead_is_found_if_the_shard_before_is_here() -> None:
    task = a_task()
    stream = a_stream(task)
    head, first = stream.collect(an_actor(task), 7, STATE, 30)
    shard = signed(task, head, first)
    stream.sealed(shard.cid)
    other = replace(first, actions=1 - first.actions)
    head, second = stream.collect(an_actor(task), 7, STATE, 30)
    stream.close()
    found = looked_into(signed(task, head, second), task, before=other)
    assert (found.verdict, found.lie) == (Verdict.FALSE, Lie.LEAD)
    first_with_lead = replace(second, lead=second.lead)
    found = looked_into(signed(task, replace(head, number=0, before=None), first_with_lead), task)
    assert (found.verdict, found.lie) == (Verdict.FALSE, Lie.LEAD)


def test_sights_that_were_edited_are_false() -> None:
    task = a_task()
    head, rows = made(task, is_shown=True)
    assert rows.sights is not None
    sights = rows.sights.copy()
    sights[9, 0, 2] += 1e-6
    found = looked_into(signed(task, head, replace(rows, sights=sights)), task)
    assert (found.verdict, found.lie, found.step, found.part) == (Verdict.FALSE, Lie.SIGHTS, 9, 0)


# --- what is neither --------------------------------------------------------------------------------------------------


def test_what_cannot_be_told_is_not_called_false() -> None:
    task = a_task()
    shard = a_shard(task)
    absent = check_rows(shard, task, here(), None)
    assert absent.verdict is Verdict.CANNOT_BE_HAD
    assert say(BOB, shard, absent) is None
    for there in (
        check_rows(shard, task, bytes(16), an_actor(task)),
        check_rows(shard, a_task(TASKS[1]), here(), None),
    ):
        assert there.verdict is Verdict.DOES_NOT_FIT
        assert say(BOB, shard, there) is None
    head, rows = made(task)
    many = replace(rows, lead=np.zeros((2**19, 2), np.int64))
    assert looked_into(signed(task, replace(head, number=1, before=STATE), many), task).verdict is Verdict.DOES_NOT_FIT


class Breaking(GymTask):
    """Its environments fail at the third step of this life."""

    def make(self, num_envs: int) -> Any:
        env = super().make(num_envs)
        for one in env._envs:  # type: ignore[attr-defined]
            one.step = lambda _: 1 / 0
        return env


def test_an_environment_that_fails_here_says_nothing_of_the_shard() -> None:
    shard = a_shard(a_task())
    found = check_rows(shard, Breaking("CartPole-v1"), here(), an_actor(a_task()))
    assert found.verdict is Verdict.CANNOT_BE_HAD


# --- environments ----------------------------------------------------------------------------------------------------


class Odd(gymnasium.Env[Any, Any]):
    """Counts, and is not repeatable in one way."""

    observation_space = gymnasium.spaces.Box(-1e6, 1e6, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    made = 0

    def __init__(self, how: str) -> None:
        self.how = how
        Odd.made += 1
        self.number, self.kept = Odd.made, 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = 0.0
        return np.array([self.at], np.float32), {}

    def step(self, action: Any) -> Any:
        self.at += 1
        self.kept += 1
        extra = {
            "none": float(self.np_random.random()),
            "global": float(np.random.random()),
            "kept": self.kept,
            "counted": float(self.number),
        }[self.how]
        return np.array([self.at], np.float32), extra, self.at >= 20, False, {}


@pytest.mark.parametrize("how", ["none", "global", "kept", "counted"])
def test_an_environment_that_cannot_be_had_again_is_found(how: str) -> None:
    def make(count: int) -> GymVectorEnv:
        return GymVectorEnv([Odd(how) for _ in range(count)])

    words = nondeterminism(make, Discrete(2))
    assert is_deterministic(make, Discrete(2)) == (how == "none") == (not words)
    assert not words or "rewards from step" in words


@pytest.mark.parametrize("name", [*TASKS, "gym:Acrobot-v1", "gym:MountainCarContinuous-v0"])
def test_gymnasiums_own_can_be_had_again(name: str) -> None:
    task = a_task(name)
    assert nondeterminism(task.make, task.action_space) == ""
    assert surroundings(task) == here(name)
    assert surroundings(task) != here("gym:CartPole-v1") or name == "gym:CartPole-v1"


# --- evidence --------------------------------------------------------------------------------------------------------


def a_false_shard(task: Task) -> Shard:
    head, rows = made(task)
    return signed(task, head, edited("rewards", lambda x: x + 1)(rows))


def test_who_hears_that_a_shard_is_false_can_look_there_and_knows_who_lied() -> None:
    task = a_task()
    shard = a_false_shard(task)
    found = looked_into(shard, task)
    told = say(BOB, shard, found)
    assert told is not None
    said = hear(told, SWARM)
    assert (said.by, said.author, said.head) == (BOB.peer_id, ALICE.peer_id, shard.head)
    there = looked_into(shard, task, until=said.checked.step + 1)
    assert there.verdict is Verdict.FALSE
    assert disproved(said, shard, there) == (ALICE.peer_id,)


def test_a_false_accuser_is_named_itself() -> None:
    task = a_task()
    shard = a_shard(task)
    told = say(BOB, shard, Finding(Verdict.FALSE, "", Lie.REWARDS, 17, 1))
    assert told is not None
    said = hear(told, SWARM)
    own = looked_into(shard, task, until=18)
    assert disproved(said, shard, own) == (BOB.peer_id,)


def test_an_accuser_is_not_named_by_who_has_not_looked_at_the_same() -> None:
    task = a_task()
    shard = a_shard(task)
    for lie, step, until in ((Lie.LOG_PROBS, 30, 20), (Lie.DRAWS, 0, None)):
        told = say(BOB, shard, Finding(Verdict.FALSE, "", lie, step, 0))
        assert told is not None
        assert disproved(hear(told, SWARM), shard, looked_into(shard, task, until=until)) == ()
    unknown = check_rows(shard, task, here(), None)
    told = say(BOB, shard, Finding(Verdict.FALSE, "", Lie.ACTS, 0, 0))
    assert told is not None
    assert disproved(hear(told, SWARM), shard, unknown) == ()


def test_who_says_that_a_false_shard_is_true_is_named_with_its_author() -> None:
    task = a_task()
    shard = a_false_shard(task)
    told = say(BOB, shard, Finding(Verdict.TRUE))
    assert told is not None
    assert disproved(hear(told, SWARM), shard, looked_into(shard, task)) == (ALICE.peer_id, BOB.peer_id)
    assert disproved(hear(told, SWARM), shard, check_rows(shard, task, bytes(16), None)) == ()


def test_nobody_is_accused_of_what_it_did_not_sign() -> None:
    task = a_task()
    shard = a_shard(task)
    forged = replace(shard, proof=shard.proof[:-1] + bytes([shard.proof[-1] ^ 1]))
    told = say(CAROL, forged, Finding(Verdict.FALSE, "", Lie.REWARDS))
    assert told is not None
    with pytest.raises(SignatureError):
        hear(told, SWARM)
    # Another shard's head is the word of its author, and not of this one's.
    told = say(CAROL, replace(shard, proof=a_shard(task, BOB).proof), Finding(Verdict.FALSE, "", Lie.REWARDS))
    assert told is not None
    with pytest.raises(ProtocolError, match="not the shard"):
        disproved(hear(told, SWARM), shard, looked_into(shard, task))
    with pytest.raises(ProtocolError, match="another swarm"):
        hear(told, SwarmId.of_manifest(b"another"))


def test_two_shards_in_one_place_of_a_stream_convict_their_author_by_themselves() -> None:
    task = a_task()
    head, rows = made(task)
    one = signed(task, head, rows)
    other = signed(task, head, edited("rewards", lambda x: x + 1)(rows))
    assert forked(one.proof, other.proof) == ALICE.peer_id
    assert forked(one.proof, one.proof) is None
    assert forked(one.proof, signed(task, replace(head, stream=1), rows).proof) is None
    assert forked(one.proof, signed(task, head, rows, BOB).proof) is None
    with pytest.raises(ProtocolError):
        forked(one.proof, other.proof[:-1])


# --- who looks -------------------------------------------------------------------------------------------------------

MEMBERS = [Signer(bytes([number]) * 32).peer_id for number in range(1, 9)]


@given(st.binary(min_size=1, max_size=8), st.sampled_from(MEMBERS), st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_all_agree_on_who_looks_and_nobody_looks_at_itself(name: bytes, author: PeerId, beacon: bytes) -> None:
    shard = Cid.of_block(name)
    found = who_checks(shard, author, MEMBERS, beacon, 1.0, checkers=2)
    assert found == who_checks(shard, author, reversed(MEMBERS), beacon, 1.0, checkers=2)
    assert len(set(found)) == 2
    assert author not in found
    assert who_checks(shard, author, MEMBERS, beacon, 0.0) == ()
    assert who_checks(shard, author, [author], beacon, 1.0) == ()


def test_as_many_shards_are_looked_into_as_the_rate_says_by_all_alike() -> None:
    shards = [Cid.of_block(bytes([high, low])) for high in range(16) for low in range(256)]
    looked = [who_checks(shard, MEMBERS[0], MEMBERS, b"beacon", 0.25) for shard in shards]
    count = sum(map(bool, looked))
    assert abs(count / len(shards) - 0.25) < 0.03
    by = [sum(each == (member,) for each in looked) for member in MEMBERS[1:]]
    assert min(by) > 0.6 * count / len(by)
    other = [who_checks(shard, MEMBERS[0], MEMBERS, b"another", 0.25) for shard in shards]
    assert looked != other, "whoever does not know the beacon does not know who looks"
