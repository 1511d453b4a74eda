"""Tasks are found by name, refuse what cannot be learned, and tell an end from a cut."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.training.algorithms import load_algorithm
from shoal.training.tasks import Box, Continuous, Discrete, load_task
from shoal.training.tasks.gym import GymVectorEnv


def test_spaces_are_read_from_the_environment() -> None:
    cart_pole, pendulum = load_task("gym:CartPole-v1"), load_task("gym:Pendulum-v1")
    assert (cart_pole.name, cart_pole.observation_space) == ("gym:CartPole-v1", Box(4))
    assert cart_pole.action_space == Discrete(2)
    assert (pendulum.observation_space, pendulum.action_space) == (Box(3), Continuous(1))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("CartPole-v1", "scheme"),
        ("gym:", "scheme"),
        ("gim:CartPole-v1", "did you mean gym"),
        ("gym:CartPole-v9", "did you mean .*CartPole-v1"),
        ("gym:cartpole", "did you mean .*CartPole-v1"),
        ("gym:os:CartPole-v1", "is no installed package that needs Gymnasium"),
        ("gym:" + "x" * 10_000, "no Gymnasium environment"),
    ],
)
def test_an_unknown_task_is_one_clear_line(name: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer) as caught:
        load_task(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_missing_dependencies_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise gymnasium.error.DependencyNotInstalled("run pip install something")

    entry = gymnasium.envs.registration.EnvSpec("Broken-v0", entry_point=broken)
    monkeypatch.setitem(gymnasium.registry, "Broken-v0", entry)
    with pytest.raises(UsageError, match="pip install something"):
        load_task("gym:Broken-v0")


def test_an_unknown_algorithm_is_one_clear_line() -> None:
    assert load_algorithm("ppo").name == "ppo"
    with pytest.raises(UsageError, match="did you mean ppo"):
        load_algorithm("pppo")


class Counter(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shows how many steps its episode has; ends or is cut after three; remembers its actions."""

    def __init__(self, *, cut: bool, actions: gymnasium.Space) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 10, (1,), np.float64)
        self.action_space = actions
        self.cut, self.taken, self.steps = cut, [], 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.array([0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.taken.append(action)
        self.steps += 1
        over = self.steps == 3
        return np.array([float(self.steps)]), 1.0, over and not self.cut, over and self.cut, {}


def test_an_end_and_a_cut_are_told_apart_and_no_step_is_spent_on_resets() -> None:
    actions = gymnasium.spaces.Discrete(2, start=5)
    envs = [Counter(cut=False, actions=actions), Counter(cut=True, actions=actions)]
    vector = GymVectorEnv(envs)
    assert vector.reset([1, 2]).tolist() == [[0.0], [0.0]]
    for _ in range(2):
        step = vector.step(np.array([0, 1]))
        assert not step.final_observations
    step = vector.step(np.array([0, 1]))
    assert step.terminated.tolist() == [True, False]
    assert step.truncated.tolist() == [False, True]
    assert {index: final.tolist() for index, final in step.final_observations.items()} == {0: [3.0], 1: [3.0]}
    assert step.observations.tolist() == [[0.0], [0.0]]
    assert vector.step(np.array([0, 1])).observations.tolist() == [[1.0], [1.0]]
    assert envs[0].taken == [5] * 4
    assert envs[1].taken == [6] * 4


def test_continuous_actions_span_the_box_and_are_clipped() -> None:
    box = gymnasium.spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([4.0, np.inf], np.float32))
    env = Counter(cut=False, actions=box)
    vector = GymVectorEnv([env])
    vector.reset([0])
    for action in ([-1.0, 7.0], [0.5, -7.0], [9.0, 0.0]):
        vector.step(np.array([action], np.float32))
    assert [taken.tolist() for taken in env.taken] == [[0.0, 7.0], [3.0, -7.0], [4.0, 0.0]]


def test_the_same_seeds_give_the_same_episodes() -> None:
    task = load_task("gym:CartPole-v1")
    first, second = task.make(2), task.make(2)
    assert first.reset([3, 4]).tolist() == second.reset([3, 4]).tolist()
    for _ in range(100):
        actions = np.array([1, 0])
        assert first.step(actions).observations.tolist() == second.step(actions).observations.tolist()
    first.close()
    second.close()
