"""Actors act as the policy does, from committed chance, without torch; rounding is bounded and not guessed."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.rollouts.acting import Acting, ActorShape, Noise, copy_of
from shoal.training.tasks.base import ActionSpace, Continuous, Discrete

SPACES = [Discrete(2), Discrete(7), Continuous(1), Continuous(5)]


def a_pair(space: ActionSpace, hidden: tuple[int, ...] = (64, 64), size: int = 6) -> tuple[ActorCritic, Acting]:
    """A model whose weights are bfloat16 already, and the actor of its copy."""
    model = ActorCritic(size, space, hidden, initial_log_std=-0.5, seed=3)
    model.flat += np.random.default_rng(3).normal(0, 0.3, model.flat.size).astype(np.float32)
    model.flat[:] = (model.flat.view(np.uint32) & 0xFFFF0000).view(np.float32)
    shape = ActorShape(size, space, hidden, False)
    return model, Acting(shape, copy_of(shape, {f"parameters/{name}": each for name, each in model.parameters.items()}))


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("hidden", [(), (16,), (64, 64), (256, 256)])
def test_log_probabilities_are_the_models(space: ActionSpace, hidden: tuple[int, ...]) -> None:
    model, acting = a_pair(space, hidden)
    sights = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    actions, said = acting.act(sights, Noise(1))
    judged, _ = model.judge(sights, actions.T)
    expected = acting.expected(sights, actions, Noise(1))
    assert (np.abs(judged - said) <= expected.slack + 1e-5).all()
    assert said == pytest.approx(judged, rel=1e-4, abs=1e-4)
    assert (expected.missed <= expected.allowed).all()
    assert expected.slack.max() < 0.05 or hidden == (256, 256)


@pytest.mark.parametrize("space", SPACES[:2], ids=str)
def test_actions_are_drawn_as_often_as_the_policy_says(space: ActionSpace) -> None:
    _, acting = a_pair(space)
    sights = np.tile(np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32), (20_000, 1))
    actions, said = acting.act(sights, Noise(1))
    for action in np.unique(actions):
        often = float((actions == action).mean())
        assert often == pytest.approx(float(np.exp(said[actions == action][0])), abs=0.015)


def test_continuous_actions_are_normal_about_the_mean() -> None:
    model, acting = a_pair(Continuous(3))
    sights = np.tile(np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32), (20_000, 1))
    actions, _ = acting.act(sights, Noise(1))
    assert actions.dtype == np.float32
    assert actions.std(axis=0) == pytest.approx(np.exp(model.parameters["actor/log_std"]), rel=0.03)
    assert actions.mean(axis=0) == pytest.approx(model.act_greedily(sights)[0], abs=0.02)


@given(st.integers(0, 2**128 - 1), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.booleans())
@settings(deadline=None)
def test_noise_is_the_same_whether_it_is_asked_for_at_once_or_in_parts(
    seed: int, parts: list[int], is_normal: bool
) -> None:
    def numbers(noise: Noise, rows: int) -> np.ndarray:
        return noise.normal((rows, 3)) if is_normal else noise.gumbel((rows, 3))

    noise = Noise(seed)
    whole = numbers(Noise(seed), sum(parts))
    assert np.isfinite(whole).all()
    assert np.concatenate([numbers(noise, rows) for rows in parts]).tobytes() == whole.tobytes()


def test_noise_is_what_it_has_always_been() -> None:
    """Whoever checks a shard next year draws as its author did; the last bits are a logarithm's."""
    gumbel = [-0.39293768717623306, -0.13942808763503003, 1.4852657128269806]
    normal = [-0.7009952098424479, -0.30078410965936464, -0.6812395778671976]
    assert Noise(12345).gumbel((3,)) == pytest.approx(gumbel, rel=1e-13)
    assert Noise(12345).normal((3,)) == pytest.approx(normal, rel=1e-13)


def test_noise_is_distributed_as_it_should_be() -> None:
    gumbel, normal = Noise(1).gumbel((200_000,)), Noise(2).normal((200_000,))
    assert gumbel.mean() == pytest.approx(0.5772, abs=0.01)
    assert gumbel.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert normal.mean() == pytest.approx(0, abs=0.01)
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 0.01


@given(st.integers(0, 2**32), st.sampled_from(SPACES), st.sampled_from([(), (8,), (64, 64), (128, 32)]))
@settings(max_examples=40, deadline=None)
def test_what_float32_gives_is_within_the_bound_of_what_is_exact(
    seed: int, space: ActionSpace, hidden: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    shape = ActorShape(9, space, hidden, False)
    scale = rng.choice([0.03, 0.3, 3])
    words = ((rng.normal(size=shape.num_parameters) * scale).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    acting = Acting(shape, words)
    sights = (rng.normal(size=(64, 9)) * rng.choice([0.1, 10])).astype(np.float32)
    exact = sights.astype(np.longdouble)
    for number, (weight, bias) in enumerate(acting._layers):
        exact = np.tanh(exact) if number else exact
        exact = exact @ weight.T.astype(np.longdouble) + bias
    away = np.abs(acting._outputs(sights) - exact).astype(np.float64)
    near, error = acting._exact(sights)
    assert np.abs(near - exact).max() < 1e-9
    assert (away <= error).all()


def test_a_copy_from_anybody_is_held_to_its_shape() -> None:
    _, acting = a_pair(Discrete(2))
    shape = acting.shape
    good = np.zeros(shape.num_words, np.uint16)
    Acting(shape, good)
    infinite = good.copy()
    infinite[3] = 0x7F80
    for bad in (good[:-1], good.astype(np.int64), infinite):
        with pytest.raises(ProtocolError, match="take another"):
            Acting(shape, bad)


ACTOR = """
import json, sys
from pathlib import Path
from shoal.protocol.ids import SwarmId, Cid
from shoal.protocol.signing import Signer
from shoal.training.rollouts import acting, patches, replaying, rows, shard, streams
from shoal.training.tasks import load_task
import numpy as np
me, swarm = Signer(b"a" * 32), SwarmId.of_manifest(b"swarm")
task = load_task("gym:CartPole-v1")
form = acting.ActorShape(task.observation_space.size, task.action_space, (64, 64), True)
words = patches.apply(None, patches.key_of(np.zeros(form.num_words, np.uint16), 0), form.num_words)
stream = streams.RowStream(
    task, 4, author=me.peer_id, swarm=swarm, surroundings=replaying.surroundings(task), stream=0
)
head, played = stream.collect(acting.Acting(form, words), 0, Cid.of_block(b"policy"), 512)
cid, data = shard.seal(me, head, played.columns(task.action_space))
stream.sealed(cid)
status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with what the parent had
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
print(json.dumps({"torch": "torch" in sys.modules, "peak_mb": peak, "bytes": len(data), "samples": played.samples}))
"""


def test_an_actor_loads_no_torch_and_little_else() -> None:
    done = subprocess.run([sys.executable, "-c", ACTOR], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"an actor of CartPole: {found['peak_mb']:.0f} MB at most, {found['bytes'] / found['samples']:.2f} B a step")
    assert not found["torch"]
    assert found["samples"] == 2048
    assert found["peak_mb"] < 120


def test_hidden_layers_are_told_by_their_sizes() -> None:
    shape = ActorShape(6, Continuous(2), (5, 4), True)
    weights = [each for name, each in shape.shapes().items() if name.endswith("weight")]
    assert all(first[0] == second[1] for first, second in pairwise(weights))
    assert shape.num_parameters == 6 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2 + 2
    assert shape.num_words == shape.num_parameters + 2 * 2 * 6
