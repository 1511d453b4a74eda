"""Which shards a learner takes, how much an actor makes, and what an update is made from."""

from collections import Counter

import numpy as np
import pytest

from shoal.protocol.ids import Cid, PeerId
from shoal.training.algorithms.foreign import Foreign, Pool
from shoal.training.algorithms.rollouts import Rollout
from shoal.training.rationing import MARGIN, MIN_SAMPLES, Rationing
from shoal.training.rollouts import intake
from shoal.training.rollouts.intake import Intake
from shoal.training.statements import MAX_SHARD_BYTES, GivenShard

ME, OTHER, ACTOR, LIAR = (PeerId.of_public_key(bytes([number]) * 32) for number in range(4))


def shard(number, version=5, samples=100, num_bytes=1000):
    return GivenShard(Cid.of_block(b"%d" % number), version, samples, num_bytes)


def test_two_learners_share_the_shards_and_neither_takes_the_others():
    shards = [shard(number) for number in range(intake.MAX_COMING_OF_ONE)]
    mine, others = Intake(ME, 2), Intake(OTHER, 2)
    for each in (mine, others):
        each.named(ACTOR, shards)
    taken = {given.cid for _, given in mine.next(5, [OTHER])}, {given.cid for _, given in others.next(5, [ME])}
    assert taken[0] | taken[1] == {each.cid for each in shards}
    assert not taken[0] & taken[1]


def test_who_is_left_takes_what_would_have_been_the_others():
    shards = [shard(number) for number in range(4)]
    mine = Intake(ME, 2)
    mine.named(ACTOR, shards)
    mine.next(5, [OTHER])
    mine.next(5, [])
    assert {given.cid for given in shards} == set(mine._coming)


def test_what_a_learner_that_has_begun_again_cannot_look_at_is_not_fetched():
    mine = Intake(ME, 4, oldest=5)
    mine.named(ACTOR, [shard(number, version=number) for number in range(2, 7)])
    assert [given.version for _, given in mine.next(5, [])] == [5]
    assert mine.tally(ACTOR).stale == 3


def test_what_is_too_old_is_counted_and_taken_by_nobody_and_what_is_from_the_future_waits():
    mine = Intake(ME, 2)
    mine.named(ACTOR, [shard(0, version=2), shard(1, version=3), shard(2, version=6)])
    assert [given.version for _, given in mine.next(5, [])] == [3]
    assert mine.tally(ACTOR).stale == 1
    assert not mine.next(5, [])
    assert [given.version for _, given in mine.next(6, [])] == [6]
    assert mine.tally(ACTOR).stale == 1


def test_no_shard_is_taken_twice_and_none_of_who_was_found_out():
    mine = Intake(ME, 2)
    mine.named(ACTOR, [shard(0)])
    (taken,) = mine.next(5, [])
    mine.came(taken[1].cid)
    mine.named(ACTOR, [shard(0)])
    assert not mine.next(5, [])
    mine.shunned.add(LIAR)
    mine.named(LIAR, [shard(1)])
    assert not mine.next(5, [])


def test_what_is_more_than_an_update_takes_is_refused_before_it_is_fetched():
    mine = Intake(ME, 2, most_samples=100)
    mine.named(LIAR, [shard(0, samples=101), shard(1, samples=2**31)])
    mine.named(ACTOR, [shard(2, samples=100)])
    assert [author for author, _ in mine.next(5, [])] == [ACTOR]
    assert mine.tally(LIAR).refused == 2
    assert not mine.next(5, [])
    assert mine.tally(LIAR).refused == 2


def test_what_is_on_its_way_is_bounded_of_one_actor_and_of_all():
    mine = Intake(ME, 2, most_waiting=10**9)
    for number in range(32):
        author = PeerId.of_public_key(bytes([number + 10]) * 32)
        mine.named(author, [shard(100 * number + each) for each in range(16)])
    taken = mine.next(5, [])
    assert len(taken) == intake.MAX_COMING
    assert max(sum(author == each for each, _ in taken) for author, _ in taken) <= intake.MAX_COMING_OF_ONE
    huge = Intake(ME, 2)
    for number in range(intake.MAX_COMING_BYTES // MAX_SHARD_BYTES + 1):
        huge.named(PeerId.of_public_key(bytes([number + 10]) * 32), [shard(number, num_bytes=MAX_SHARD_BYTES)])
    assert len(huge.next(5, [])) == intake.MAX_COMING_BYTES // MAX_SHARD_BYTES


def test_nothing_is_fetched_while_enough_waits():
    mine = Intake(ME, 2, most_waiting=250)
    mine.named(ACTOR, [shard(number) for number in range(4)])
    assert len(mine.next(5, [])) == 3
    mine.waiting = 250
    for number in range(4):
        mine.came(shard(number).cid)
    mine.named(ACTOR, [shard(9)])
    assert not mine.next(5, [])
    mine.waiting = 100
    assert len(mine.next(5, [])) == 1


def test_where_all_draw_from_all_no_more_of_a_version_is_taken_than_there_is_use_for():
    takes = Intake(PeerId("me"), 2, most_of_version=150)
    other = PeerId("other")
    given = [shard(number, version) for version in (5, 4) for number in range(10 * version, 10 * version + 4)]
    takes.named(ACTOR, given)
    first = takes.next(5, [other])
    assert Counter(each.version for _, each in first) == {5: 2, 4: 2}
    wrong, right = [each for _, each in first if each.version == 5]
    takes.came(wrong.cid)  # it was no good, and does not count
    takes.took(5, right.samples)
    takes.came(right.cid)
    assert [each.version for _, each in takes.next(5, [other])] == [5]
    assert {each.version for _, each in takes.next(8, [other])} == set(), "all are too old by now"


def test_what_never_came_takes_no_room_once_it_would_be_too_old():
    mine = Intake(ME, 2)
    mine.named(ACTOR, [shard(number) for number in range(intake.MAX_COMING_OF_ONE)])
    assert len(mine.next(5, [])) == intake.MAX_COMING_OF_ONE
    mine.named(ACTOR, [shard(number, version=8) for number in range(20, 24)])
    assert not mine.next(7, [])
    assert len(mine.next(8, [])) == intake.MAX_COMING_OF_ONE


def test_accounts_are_of_so_many_actors_at_most():
    mine = Intake(ME, 2)
    for number in range(intake.MAX_TALLIES + 10):
        mine.tally(PeerId.of_public_key(number.to_bytes(32, "big")))
    assert len(mine.tallies) == intake.MAX_TALLIES


def test_names_that_are_remembered_are_bounded():
    mine = Intake(ME, 2)
    for number in range(intake.MAX_REMEMBERED + 50):
        mine.came(shard(number).cid)
    assert len(mine._seen) == intake.MAX_REMEMBERED


def test_an_actor_makes_what_is_used_of_a_version_and_then_waits_for_the_next():
    rationing, made = Rationing(1000), 0
    while samples := rationing.next(3, 400.0, 2, 4):
        rationing.made(3, samples)
        made += samples
    assert MARGIN * 1000 * 2 / 4 <= made < MARGIN * 1000 * 2 / 4 + 500
    assert rationing.next(4, 400.0, 2, 4)


@pytest.mark.parametrize(("speed", "samples"), [(0.0, 128), (1.0, MIN_SAMPLES), (400.0, 400), (1e6, 500)])
def test_a_shard_is_a_seconds_work_and_no_more_than_a_part_of_an_update(speed, samples):
    assert Rationing(1000).next(0, speed, 1, 1) == samples


@pytest.mark.parametrize(("learners", "actors", "parts"), [(1, 1, 2), (1, 2, 2), (1, 5, 5), (4, 5, 2), (1, 100, 8)])
def test_as_many_shards_as_there_are_actors_fill_an_update(learners, actors, parts):
    assert Rationing(1000).next(0, 1e6, learners, actors) == 1000 // parts


def rollout(steps, envs=1):
    shape = (steps, envs)
    ends = np.zeros(shape, np.bool_)
    zeros = np.zeros(shape, np.float32)
    return Rollout(
        np.zeros((steps + 1, envs, 3), np.float32), zeros.astype(np.int64), zeros, ends, ends, zeros, zeros[:0]
    )


def foreign(steps, version):
    return Foreign(ACTOR, rollout(steps), np.zeros((steps, 1), np.float32), version, np.random.default_rng(0))


def test_an_update_is_made_from_the_newest_and_no_more_than_it_may():
    pool = Pool(100, 1000)
    for version in (3, 5, 4):
        pool.add(foreign(40, version))
    assert pool.samples == 80
    assert [each.version for each in pool.use()] == [5, 4]
    assert [each.version for each in pool.used()] == [5, 4]
    assert pool.waiting == 40


def test_an_update_that_fails_leaves_all_for_the_next_and_what_comes_meanwhile_too():
    pool = Pool(100, 1000)
    pool.add(foreign(60, 3))
    assert len(pool.use()) == 1
    pool.add(foreign(60, 4))
    assert [each.version for each in pool.use()] == [4]  # again, after it failed
    pool.used()
    assert [each.version for each in pool.use()] == [3]


def test_the_oldest_go_first_when_there_is_no_room_and_what_is_too_old_goes():
    pool = Pool(100, 100)
    for version in (1, 2, 3):
        pool.add(foreign(50, version))
    assert [each.version for each in pool.use()] == [3, 2]
    assert pool.at(5, oldest=3) == 50
    assert pool.waiting == 50
