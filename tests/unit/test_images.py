"""Networks that see images: the same at first everywhere, gradients as they should be, and what is learned by them."""

from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from shoal.protocol.errors import UsageError
from shoal.training.algorithms import load_algorithm
from shoal.training.manifest import Manifest, Mode
from shoal.training.models.cnn import Impala, Nature
from shoal.training.models.networks import ImagePolicy
from shoal.training.tasks import load_task
from shoal.training.tasks.base import Box, Continuous, Discrete, MultiDiscrete

from .learning import PEERS, assert_close, update

SIDE = 12


class Where(gymnasium.Env):  # type: ignore[type-arg]
    """A light is at the left or at the right, anywhere up or down; whoever says where it is, earns 1."""

    def __init__(self, side: int = SIDE) -> None:
        self.observation_space = spaces.Box(0, 255, (side, side, 1), np.uint8)
        self.action_space = spaces.Discrete(2)
        self._side = side

    def _show(self) -> np.ndarray:
        picture = self.np_random.integers(0, 60, (self._side, self._side, 1)).astype(np.uint8)
        self._answer = int(self.np_random.integers(2))
        row, half = int(self.np_random.integers(self._side - 3)), self._side // 2
        column = self._answer * half + int(self.np_random.integers(half - 3))
        picture[row : row + 3, column : column + 3] = 255
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._left = 8
        return self._show(), {}

    def step(self, action):
        reward = float(action == self._answer)
        self._left -= 1
        return self._show(), reward, self._left == 0, False, {}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    gymnasium.register("Where-v0", Where)
    gymnasium.register("WhereLarge-v0", Where, kwargs={"side": 36})
    yield
    for name in ("Where-v0", "WhereLarge-v0"):
        del gymnasium.registry[name]


def manifest(task: str, algorithm: str = "ppo", mode: Mode = Mode.LOCAL, **settings: object) -> Manifest:
    return Manifest(
        owner=PEERS[0],
        task=task,
        algorithm=algorithm,
        seed=7,
        mode=mode,
        hyperparameters=settings,
        batch_per_learner=256,
    )


def learner(run: Manifest, peer=PEERS[0], **more):
    return load_algorithm(run.algorithm).learner(run, load_task(run.task), peer=peer, **more)


@pytest.mark.parametrize("space", [Discrete(3), Continuous(2), MultiDiscrete((2, 3))], ids=str)
@pytest.mark.parametrize(("network", "side"), [(Nature, 36), (Impala, 12)])
def test_initial_parameters_follow_from_the_seed_alone(network, side, space) -> None:
    def made(seed: int) -> bytes:
        box = Box((side, side, 1), "uint8")
        return ImagePolicy(network(box), space, initial_log_std=0.0, seed=seed).flat.tobytes()

    assert made(3) == made(3)
    assert made(3) != made(4)


@pytest.mark.parametrize("space", [Discrete(3), Continuous(2), MultiDiscrete((2, 3))], ids=str)
def test_the_gradient_is_that_of_small_differences(space) -> None:
    """Of a sum of log-probabilities, values and the entropy, along random directions."""
    rng = np.random.default_rng(1)
    model = ImagePolicy(Impala(Box((10, 10, 1), "uint8")), space, initial_log_std=-0.5, seed=2)
    model.flat[:] += rng.normal(0, 0.02, model.flat.size).astype(np.float32)
    shown = rng.integers(0, 256, (6, 10, 10, 1)).astype(np.uint8)
    actions = model.act(shown, rng)
    actions = actions if actions.ndim == 1 else actions.T
    passes = model.passes(6)
    weights = rng.normal(size=(2, 6)).astype(np.float32)

    def total() -> float:
        log_probs = passes.judge(shown, actions).astype(np.float64)
        return float(log_probs @ weights[0] + passes.values.astype(np.float64) @ weights[1] + 6 * 0.3 * passes.entropy)

    total()
    passes.backward(weights[0], weights[1], 0.3)
    gradient, start = model.gradient.astype(np.float64).copy(), model.flat.copy()
    for _ in range(4):
        way = rng.normal(size=start.size)
        way /= np.linalg.norm(way)
        ends = []
        for sign in (1, -1):
            model.flat[:] = start + (sign * 1e-2 * way).astype(np.float32)
            ends.append(total())
        model.flat[:] = start
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(gradient @ way, abs=0.05 + 0.05 * abs(gradient @ way))


@pytest.mark.parametrize(
    ("network", "task", "count"), [("nature", "gym:WhereLarge-v0", 3), ("impala", "gym:Where-v0", 2)]
)
def test_peers_end_where_one_process_with_all_their_streams_does(network: str, task: str, count: int) -> None:
    settings = {"network": network, "num_envs": 2, "update_epochs": 1, "num_minibatches": 2}
    run = manifest(task, mode=Mode.GRADIENT, **settings)
    peers = [learner(run, peer) for peer in PEERS[:count]]
    alone = learner(run, streams=PEERS[:count])
    assert peers[0]._streams[0]._columns[0].dtype == np.uint8
    for _ in range(2):
        for peer in peers:
            peer.collect(16)
        alone.collect(16 * count)
        update(peers)
        update([alone])
    assert_close(peers[0].policy_arrays(), alone.policy_arrays(), 1e-5)


def test_where_the_light_is_is_learned() -> None:
    run = manifest("gym:Where-v0", network="impala", learning_rate=1e-3, num_minibatches=8)
    one = learner(run)
    assert np.mean(one.evaluate(20, 0)) < 6
    for _ in range(20):
        one.collect(256)
        update([one])
        if np.mean(one.evaluate(20, 0)) > 7.5:
            return
    pytest.fail(f"it earns {np.mean(one.evaluate(20, 0))} of 8")


def test_an_image_that_is_too_small_is_refused_with_what_to_take() -> None:
    with pytest.raises(UsageError, match="impala"):
        learner(manifest("gym:Where-v0", network="nature"))
    for name in ("dqn", "sac"):
        with pytest.raises(UsageError, match="take"):
            learner(manifest("gym:Where-v0", name))
