"""Which acting copy an actor takes: what most learners say, the smallest way there, and one actor at a learner."""

import pytest

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.rollouts.copies import KEEPERS, LEAST_TURN_S, agreed, is_keeper, turn_s, way_to
from shoal.training.statements import GivenCopy

ME, A, B, C, LEARNER, OTHER, LIAR = (PeerId.of_public_key(bytes([n]) * 32) for n in range(7))
STATE, BEFORE = Cid.of_block(b"state"), Cid.of_block(b"the state before")
GOOD, BAD, OLD = b"g" * 32, b"b" * 32, b"o" * 32
KEY, PATCH = Cid.of_block(b"key"), Cid.of_block(b"patch")


def given(digest=GOOD, state=STATE, key=KEY, patch=PATCH, base=OLD):
    return GivenCopy(
        version=3,
        state=state,
        digest=digest,
        key=key,
        key_bytes=0 if key is None else 100,
        patch=patch,
        patch_bytes=0 if patch is None else 40,
        base=base,
    )


def test_one_learner_is_believed_and_of_several_most_that_say_the_same():
    assert agreed({LEARNER: given()}, [LEARNER], STATE) == GOOD
    assert agreed({LEARNER: given()}, [LEARNER, OTHER], STATE) is None
    assert agreed({LEARNER: given(), OTHER: given()}, [LEARNER, OTHER], STATE) == GOOD
    assert agreed({LEARNER: given(), OTHER: given()}, [LEARNER, OTHER, LIAR], STATE) == GOOD
    assert agreed({LEARNER: given(), OTHER: given(), LIAR: given(BAD)}, [LEARNER, OTHER, LIAR], STATE) is None


def test_what_is_said_of_another_policy_or_by_no_learner_counts_for_nothing():
    assert agreed({LEARNER: given(state=BEFORE)}, [LEARNER], STATE) is None
    assert agreed({A: given(BAD), B: given(BAD)}, [LEARNER], STATE) is None
    assert way_to({A: given()}, [LEARNER], STATE, OLD) is None


def test_the_smallest_way_from_what_is_held_is_taken():
    way = way_to({LEARNER: given()}, [LEARNER], STATE, OLD)
    assert (way.cid, way.num_bytes, way.base) == (PATCH, 40, OLD)
    for held in (None, BAD):
        way = way_to({LEARNER: given()}, [LEARNER], STATE, held)
        assert (way.cid, way.num_bytes, way.base) == (KEY, 100, None)


def test_actors_that_have_it_come_before_learners_and_only_those_that_have_the_same():
    said = {LEARNER: given(), A: given(key=None), B: given(patch=None), C: given(BAD, key=None)}
    way = way_to(said, [LEARNER], STATE, OLD)
    assert way.holders == (A, LEARNER)
    assert way.of_actors == 1
    assert way_to(said, [LEARNER], STATE, None).holders == (B, LEARNER)


def test_one_actor_asks_a_learner_at_once_and_each_other_a_little_later():
    actors = [ME, A, B, C]
    turns = sorted(turn_s(each, [peer for peer in actors if peer != each], STATE, 0.0) for each in actors)
    assert turns == [0, LEAST_TURN_S, 2 * LEAST_TURN_S, 3 * LEAST_TURN_S]
    first = [min(actors, key=lambda each: turn_s(each, actors, Cid.of_block(bytes([n])), 0.0)) for n in range(32)]
    assert len(set(first)) > 1  # another one each time


def test_a_few_of_many_actors_hold_whole_states_and_a_single_one_does():
    actors = [ME, A, B, C, LEARNER, OTHER]
    assert sum(is_keeper(each, actors) for each in actors) == KEEPERS
    assert is_keeper(ME, [])


@pytest.mark.parametrize("field", [{"digest": b"short"}, {"key_bytes": 2**40}, {"base": b""}, {"version": -1}])
def test_what_no_member_can_mean_is_refused(field):
    with pytest.raises(ProtocolError):
        GivenCopy(**({"version": 1, "state": STATE, "digest": GOOD} | field))
