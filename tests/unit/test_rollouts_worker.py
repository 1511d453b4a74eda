"""An actor's worker and a learner's, in one process: shards that are learned from, and those that are refused."""

from dataclasses import replace

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError, RemoteError, UsageError
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.rollouts.patches import digest_of, key_of
from shoal.training.rollouts.shard import signed
from shoal.training.worker import Worker
from shoal.training.worker_calls import Admit, Begin, Collect, CopyOf, Load, LoadCopy, Merge, Open, RollOut

LEARNER, ACTOR, OTHER = (Signer(bytes([number]) * 32) for number in range(1, 4))
SWARM = SwarmId(str(Cid.of_block(b"a swarm")))
SMALL = {"num_envs": 2, "hidden_sizes": [8], "num_minibatches": 2}


def manifest(**settings):
    return Manifest(
        owner=LEARNER.peer_id,
        task="gym:CartPole-v1",
        algorithm="vtrace",
        mode=Mode.ROLLOUTS,
        batch_per_learner=256,
        max_staleness=1,
        foreign_ratio=0.5,
        hyperparameters=SMALL,
        **settings,
    )


def learner(run=None):
    worker = Worker()
    opened = worker.open(Open(run or manifest(), LEARNER.peer_id, swarm=SWARM))
    return worker, bytes(opened.state), Cid.of_block(bytes(opened.state))


def actor(run=None, signer=ACTOR):
    worker = Worker()
    worker.open(Open(run or manifest(), signer.peer_id, role=Role.ACTOR, swarm=SWARM, stream=1))
    return worker


def make(worker, samples=64, before=None, signer=ACTOR):
    made = worker.roll_out(RollOut(samples, before))
    return made, *signed(signer, bytes(made.head), bytes(made.body))


def admit(worker, data, cid, state, *, author=ACTOR, version=0, is_checked=True, chance=None):
    return worker.admit(Admit(data, cid, author.peer_id, version, state, is_checked, chance))


@pytest.fixture
def pair():
    worker, state, name = learner()
    acting = actor()
    acting.load(Load(state, cid=name))
    return worker, acting, name


@pytest.mark.parametrize("samples", [1, 61, 64, 67])
def test_a_shard_is_no_larger_than_was_asked_for_so_that_as_many_fill_an_update_as_are_meant_to(pair, samples):
    _, acting, _ = pair
    num_envs = acting._actor._num_envs
    assert make(acting, samples)[0].samples == max(num_envs, samples // num_envs * num_envs)


def test_a_learner_learns_from_what_an_actor_made_which_is_true(pair):
    worker, acting, name = pair
    before = None
    for number in range(3):
        made, cid, data = make(acting, before=before)
        found = admit(worker, data, cid, name)
        assert found.verdict == "true", found.words
        assert found.samples == made.samples == 64
        assert found.waiting == 64 * (number + 1)
        before = cid
    assert found.total == 128, "no more than the half may be others'"
    worker.collect(Collect(128))
    answer = worker.begin(Begin(0, name, 0, {}))
    assert answer.weight == 256
    done = worker.merge(Merge(bytes(32), (LEARNER.peer_id,), (256,), (1.0,), (answer.contribution,)))
    assert [(each.author, each.version, each.samples) for each in done.learned_from] == [(ACTOR.peer_id, 0, 64)] * 2
    assert done.ahead.epoch_samples == done.waiting == 64, "what is left is for the next update"


def test_an_update_that_is_given_up_leaves_what_came_from_others(pair):
    worker, acting, name = pair
    _, cid, data = make(acting)
    admit(worker, data, cid, name)
    worker.collect(Collect(32))
    worker.begin(Begin(0, name, 0, {}))
    worker._drop_update(keep_samples=True)
    assert worker.learner.num_foreign == 64


@pytest.mark.parametrize(("reward", "taken"), [(9e8, 64), (3e38, 0)])
def test_a_lie_that_nobody_looked_at_costs_an_update_and_not_the_run(monkeypatch, reward, taken):
    worker, state, name = learner(replace(manifest(), check_rate=0.0))
    acting = actor()
    acting.load(Load(state, cid=name))
    rolled = acting._actor.roll_out

    def absurd(samples, before):
        made = rolled(samples, before)
        return replace(made, rows=replace(made.rows, rewards=made.rows.rewards + np.float32(reward)))

    monkeypatch.setattr(acting._actor, "roll_out", absurd)
    _, cid, data = make(acting)
    assert admit(worker, data, cid, name, is_checked=False).samples == taken
    for _ in range(2):
        worker.collect(Collect(64))
        with np.errstate(all="ignore"):
            answer = worker.begin(Begin(0, name, 0, {}))
            weight = int(answer.weight)
            merge = Merge(bytes(32), (LEARNER.peer_id,), (weight,), (1.0,), (answer.contribution,))
            try:
                done = worker.merge(merge)
            except RemoteError:
                continue
        assert done.state is not None
        return
    pytest.fail("the run cannot go on")


@pytest.mark.parametrize("column", ["rewards", "log_probs", "sights", "actions", "seeds"])
def test_what_was_edited_is_found_when_it_is_looked_at(pair, column, monkeypatch):
    worker, acting, name = pair
    rolled = acting._actor.roll_out

    def edited(samples, before):
        made = rolled(samples, before)
        array = getattr(made.rows, column).copy()
        array[tuple(0 for _ in array.shape)] = 1 - array.flat[0] if column == "actions" else array.flat[0] - 1
        return replace(made, rows=replace(made.rows, **{column: array}))

    monkeypatch.setattr(acting._actor, "roll_out", edited)
    _, cid, data = make(acting)
    found = admit(worker, data, cid, name)
    assert found.verdict == "false", found
    assert found.lie
    assert found.samples == found.waiting == 0


def test_rewards_beyond_all_that_were_found_true_are_looked_at_whether_it_was_to_be_or_not(pair, monkeypatch):
    worker, acting, name = pair
    made, before, data = make(acting)
    assert admit(worker, data, before, name, is_checked=False).is_checked, "nothing is known yet"
    _, before, data = make(acting, before=before)
    found = admit(worker, data, before, name, is_checked=False)
    assert (found.is_checked, found.samples) == (False, made.samples)
    rolled = acting._actor.roll_out

    def edited(samples, before):
        made = rolled(samples, before)
        made.rows.rewards[5, 1] += 0.5
        return made

    monkeypatch.setattr(acting._actor, "roll_out", edited)
    _, cid, data = make(acting, before=before)
    found = admit(worker, data, cid, name, is_checked=False)
    assert (found.is_checked, found.verdict, found.lie, found.step, found.part) == (True, "false", "rewards", 5, 1)


def test_who_looks_at_one_environment_finds_what_is_false_there(pair, monkeypatch):
    worker, acting, name = pair
    rolled = acting._actor.roll_out

    def edited(samples, before):
        made = rolled(samples, before)
        made.rows.rewards[5, 1] += 1
        return made

    monkeypatch.setattr(acting._actor, "roll_out", edited)
    _, cid, data = make(acting)
    found = admit(worker, data, cid, name, chance=2**32 - 1)
    assert (found.verdict, found.lie, found.step, found.part) == ("false", "rewards", 5, 1)
    assert admit(worker, data, cid, name, chance=2).samples == 64


def test_what_costs_more_to_look_at_than_an_honest_shard_is_not_looked_at():
    worker, state, name = learner()
    large, many, long = actor(), actor(replace(manifest(), hyperparameters=SMALL | {"num_envs": 32})), actor()
    for liar in (large, many, long):
        liar.load(Load(state, cid=name))
    _, cid, data = make(large, samples=256)  # true, and more than an update takes: it would wait for ever
    found = admit(worker, data, cid, name)
    assert (found.verdict, found.samples, found.waiting) == ("does not fit", 0, 0)
    assert "256 samples" in found.words
    long._actor._stream._max_lead = 10**6
    _, cid, data = make(many)
    assert "of 32 environments" in admit(worker, data, cid, name).words
    before = None
    for _ in range(18):
        _, before, data = make(long, samples=128, before=before)
    found = admit(worker, data, before, name)
    assert found.verdict == "does not fit", found
    assert "1088 steps" in found.words


def test_what_does_not_fit_is_no_lie_and_is_not_learned_from(pair):
    worker, acting, name = pair
    _, cid, data = make(acting)
    for words in (
        {"author": OTHER},  # named by who did not make it
        {"state": Cid.of_block(b"another line")},
    ):
        found = admit(worker, data, cid, **{"state": name} | words)
        assert found.verdict == "does not fit", found
    found = admit(worker, data, cid, None)
    assert found.verdict == "cannot be had", found
    assert worker.learner.num_foreign == 0


def test_bytes_that_are_no_shard_or_another_than_was_asked_for_are_false_in_form(pair):
    worker, acting, name = pair
    _, cid, data = make(acting)
    for bad in (b"", b"nonsense", data[:-1], data[:20] + b"x" + data[21:]):
        found = admit(worker, bad, cid, name)
        assert found.verdict in ("false", "does not fit"), found
        assert found.samples == 0


def test_what_is_too_old_is_dropped_when_the_policy_changes(pair):
    worker, acting, name = pair
    _, cid, data = make(acting)
    admit(worker, data, cid, name)
    for epoch in range(2):
        worker.collect(Collect(256))
        answer = worker.begin(Begin(epoch, name, 256 * epoch, {}))
        weight = int(answer.weight)
        worker.merge(Merge(bytes(32), (LEARNER.peer_id,), (weight,), (1.0,), (answer.contribution,)))
    found = admit(worker, data, cid, name)
    assert found.verdict == "does not fit"
    assert "too old" in found.words
    assert worker.learner.num_foreign == 0


def test_an_actor_needs_a_policy_and_one_that_is_of_its_run():
    acting = actor()
    with pytest.raises(UsageError, match="no policy"):
        make(acting)
    _, state, _ = learner(replace(manifest(), hyperparameters=SMALL | {"hidden_sizes": [4]}))
    with pytest.raises(Exception, match="shape"):
        acting.load(Load(state, cid=Cid.of_block(state)))


def test_an_actors_streams_follow_each_other_and_a_shard_that_came_to_nothing_begins_another(pair):
    worker, acting, name = pair
    _, first, data = make(acting)
    assert admit(worker, data, first, name).verdict == "true"
    _, second, data = make(acting, before=first)
    assert admit(worker, data, second, name).verdict == "true"
    stream = acting._actor._stream.stream
    _, third, data = make(acting)
    assert acting._actor._stream.stream > stream
    assert admit(worker, data, third, name).verdict == "true"


def test_there_are_actors_in_mode_rollouts_alone():
    with pytest.raises(UsageError, match="mode rollouts"):
        actor(replace(manifest(), mode=Mode.LOCAL))
    worker, _, name = learner()
    with pytest.raises(RemoteError):
        worker.roll_out(RollOut(1))
    local = Worker()
    local.open(Open(replace(manifest(), mode=Mode.LOCAL), LEARNER.peer_id, swarm=SWARM))
    with pytest.raises(RemoteError):
        admit(local, b"", name, name)


def test_returns_of_episodes_go_on_over_shards(pair):
    _, acting, _ = pair
    returns, before = [], None
    for _ in range(20):
        made, before, _ = make(acting, before=before)
        returns += made.episode_returns
    assert returns
    assert all(each >= 8 for each in returns), "no episode of CartPole is shorter"
    assert np.mean(returns) < 100


def test_an_actor_acts_by_copies_as_by_states_and_by_nothing_else(pair):
    worker, _, name = pair
    made = worker.copy(CopyOf(0))
    assert made.patch is None
    light = actor(signer=OTHER)
    light.load_copy(LoadCopy(bytes(made.key), 0, name, made.digest))
    _, cid, data = make(light, signer=OTHER)
    assert admit(worker, data, cid, name, author=OTHER).verdict == "true"
    with pytest.raises(ProtocolError, match="another copy"):
        light.load_copy(LoadCopy(bytes(made.key), 0, name, b"x" * 32))
    with pytest.raises(ProtocolError):
        light.load_copy(LoadCopy(b"no patch at all", 0, name, made.digest))
    _, cid, data = make(light, signer=OTHER, before=cid)  # nothing has changed
    assert admit(worker, data, cid, name, author=OTHER).verdict == "true"


def test_who_was_given_a_wrong_copy_is_no_liar(pair):
    worker, _, name = pair
    wrong = actor(signer=OTHER)
    words = wrong._actor.shape.num_words
    key = key_of(np.zeros(words, np.uint16), 0)
    wrong.load_copy(LoadCopy(key, 0, name, digest_of(np.zeros(words, np.uint16))))
    _, cid, data = make(wrong, signer=OTHER)
    found = admit(worker, data, cid, name, author=OTHER)
    assert found.verdict == "does not fit"
    assert "another copy" in found.words
