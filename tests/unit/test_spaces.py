"""Whatever space a Gymnasium environment has becomes what policies see and do; what lies outside of it is refused."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from shoal.protocol.errors import UsageError
from shoal.training.tasks import Box, Continuous, Discrete, MultiDiscrete, load_task
from shoal.training.tasks.failures import BadAnswerError, Failures, TaskFailedError
from shoal.training.tasks.games.gym import GymGame
from shoal.training.tasks.gym import GymVectorEnv
from shoal.training.tasks.spaces import MAX_OBSERVATION, ToEnv, action_space, shown_by

BYTES, HALF = np.uint8, np.float16


class Showing(gymnasium.Env[Any, Any]):
    """Shows whatever its space holds; remembers it, and what was done."""

    def __init__(self, observation_space: Any, actions: Any = None) -> None:
        self.observation_space, self.action_space = observation_space, actions or spaces.Discrete(2)
        self.shown, self.taken = list[Any](), list[Any]()
        self.instead: Any = None

    def _show(self) -> Any:
        self.shown.append(self.observation_space.sample() if self.instead is None else self.instead)
        return self.shown[-1]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.taken.append(action)
        return self._show(), 0.0, False, len(self.taken) % 3 == 0, {}


@pytest.mark.parametrize(
    ("space", "box"),
    [
        (spaces.Box(-1, 1, (3,)), Box(3)),
        (spaces.Box(-1, 1, (), np.float64), Box(1)),
        (spaces.Box(-1, 1, (2, 3), np.float64), Box(6)),
        (spaces.Box(-1, 1, (2, 3, 4), HALF), Box((2, 3, 4))),
        (spaces.Box(-9, 9, (2, 2, 2, 2), np.int32), Box(16)),
        (spaces.Box(0, 255, (5,), BYTES), Box(5, "uint8")),
        (spaces.Box(0, 255, (4, 5), BYTES), Box((4, 5), "uint8")),
        (spaces.Box(0, 9, (4, 5, 3), BYTES), Box((4, 5, 3), "uint8")),
        (spaces.Box(0, 255, (2, 4, 5, 3), BYTES), Box(120, "uint8")),
        (spaces.Discrete(4), Box(4)),
        (spaces.Discrete(3, start=-1), Box(3)),
        (spaces.MultiDiscrete([2, 3, 4]), Box(9)),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), Box(14)),
        (spaces.MultiBinary(4), Box(4)),
        (spaces.MultiBinary((2, 3)), Box(6)),
        (spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), spaces.Discrete(2)]), Box(45)),
        (
            spaces.Dict(b=spaces.Box(-1, 1, (2, 2)), a=spaces.Dict(c=spaces.MultiBinary(2), d=spaces.Discrete(3))),
            Box(9),
        ),
    ],
    ids=lambda each: str(each)[:60],
)
def test_every_space_of_a_fixed_size_becomes_one_array(space: Any, box: Box) -> None:
    """Numbers as Gymnasium itself flattens them; what was shown last too, and in a play."""
    env = Showing(space)
    vector = GymVectorEnv([env])
    seen = [vector.reset([1])[0]]
    finals = []
    for _ in range(6):
        step = vector.step(np.zeros(1, np.int64))
        finals += step.final_observations.values()
        seen.append(step.observations[0])
    shown = shown_by("a task", space, is_bounded=True)
    assert shown.box == box
    assert len(finals) == 2
    assert all(each.shape == box.shape and each.dtype == box.dtype for each in seen + finals)
    expected = [spaces.flatten(space, each) for each in env.shown]
    for found, at in zip([*seen, *finals], [0, 1, 2, 4, 5, 6, 8, 3, 7], strict=True):
        np.testing.assert_allclose(found.ravel(), expected[at].astype(np.float32), rtol=1e-3)
    flat = shown_by("a game", space, is_bounded=True, is_vector=True)
    assert flat.box == Box(box.size)
    scale = 255 if box.dtype == "uint8" else 1
    found = flat.copy(flat.read(env.shown[0]))
    flat.check(found)
    np.testing.assert_allclose(found * scale, expected[0].astype(np.float32), rtol=1e-3)


def test_bytes_within_other_spaces_are_seen_from_0_to_1() -> None:
    """As alone, where the network divides them."""
    space = spaces.Dict(image=spaces.Box(0, 255, (2, 2, 3), BYTES), way=spaces.Discrete(4))
    shown = shown_by("a task", space, is_bounded=True)
    found = shown.read({"image": np.full((2, 2, 3), 51, BYTES), "way": np.int64(2)})
    np.testing.assert_allclose(found, [0.2] * 12 + [0, 0, 1, 0])
    shown.check(found)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Dict(said=spaces.Text(5), seen=spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_space_of_no_fixed_size_is_refused_by_name(space: Any) -> None:
    with pytest.raises(UsageError, match=r"a task shows .*not always as many numbers; .*") as caught:
        shown_by("a task", space, is_bounded=True)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "space", [spaces.Box(0, 1, (0,)), spaces.Box(0, 1, (1 + MAX_OBSERVATION,)), spaces.Discrete(1 + MAX_OBSERVATION)]
)
def test_a_space_of_no_size_that_can_be_learned_from_is_refused(space: Any) -> None:
    with pytest.raises(UsageError, match=r"shows \d+ numbers at once; 1 to"):
        shown_by("a task", space, is_bounded=True)


PAIR = spaces.Dict(place=spaces.Box(-1, 1, (2,), np.float32), way=spaces.Discrete(4, start=1))
HERE = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("space", "answer", "words"),
    [
        (PAIR, {"place": HERE}, "not a mapping with the keys"),
        (PAIR, [HERE, 1], "not a mapping with the keys"),
        (PAIR, {"place": HERE, "way": 5}, "the number 5, not 1 to 4"),
        (PAIR, {"place": HERE, "way": 0}, "the number 0, not 1 to 4"),
        (PAIR, {"place": HERE, "way": 1.5}, "holds float64 and not whole numbers"),
        (PAIR, {"place": HERE, "way": np.array([1])}, r"of shape \(1,\) and not \(\)"),
        (PAIR, {"place": np.zeros(3, np.float32), "way": 1}, r"of shape \(3,\) and not \(2,\)"),
        (PAIR, {"place": np.array([0, np.nan], np.float32), "way": 1}, "number 1 of it is nan"),
        (PAIR, {"place": np.array([0, 3], np.float32), "way": 1}, "number 1 of it is 3, not -1 to 1"),
        (PAIR, {"place": np.array(["a", "b"]), "way": 1}, "holds <U1 and not float32"),
        (spaces.Tuple([spaces.Discrete(2)]), (1, 1), "2 values and not 1 values"),
        (spaces.MultiBinary(2), np.array([0, 2]), "other numbers than 0 and 1"),
        (spaces.MultiDiscrete([2, 3]), np.array([0, 3]), "the number 3, not 0 to 2"),
        (spaces.Box(0, 9, (4, 4), BYTES), np.full((4, 4), 10, BYTES), "number 0 of it is 10, not 0 to 9"),
        (spaces.Box(0, 255, (4, 4), BYTES), np.zeros((4, 4)), "holds float64 and not uint8"),
        (spaces.Box(-1, 1, (2, 2, 2)), np.full((2, 2, 2), np.inf, np.float32), "number 0 of it is inf"),
    ],
)
def test_what_lies_outside_of_its_space_is_a_failure_of_the_environment(space: Any, answer: Any, words: str) -> None:
    env = Showing(space)
    vector = GymVectorEnv([env], failures=Failures("bad"))
    vector.reset([0])
    env.instead = answer
    with pytest.raises(TaskFailedError, match=words) as caught:
        vector.step(np.zeros(1, np.int64))
    assert isinstance(caught.value.__cause__, BadAnswerError)


def test_bounds_are_forgiven_to_a_tenth_of_their_range() -> None:
    """Environments that people use leave theirs by some per cent, and nothing is wrong with what is learned."""
    shown = shown_by("a task", spaces.Box(0, 512, (2,)), is_bounded=True)
    shown.check(np.array([526, -40], np.float32))
    for wrong in (580, -60):
        with pytest.raises(BadAnswerError, match=f"number 1 of it is {wrong}, not 0 to 512"):
            shown.check(np.array([0, wrong], np.float32))


# --- actions ---


@pytest.mark.parametrize(
    ("space", "known", "given", "taken"),
    [
        (spaces.Discrete(3, start=5), Discrete(3), np.array([2]), 7),
        (spaces.Box(0, 4, (2,)), Continuous(2), np.array([[-1, 0.5]], np.float32), [0, 3]),
        (spaces.Box(0, 4, (2, 1)), Continuous(2), np.array([[-1, 9]], np.float32), [[0], [4]]),
        (spaces.Box(-2, 2, (), np.float64), Continuous(1), np.array([[0.5]], np.float32), 1.0),
        (spaces.MultiDiscrete([2, 3], start=[0, 4]), MultiDiscrete((2, 3)), np.array([[1, 2]]), [1, 6]),
        (spaces.MultiDiscrete([[2, 3]]), MultiDiscrete((2, 3)), np.array([[1, 2]]), [[1, 2]]),
        (spaces.MultiBinary(3), MultiDiscrete((2, 2, 2)), np.array([[1, 0, 1]]), [1, 0, 1]),
    ],
)
def test_actions_of_every_kind_reach_the_environment_as_its_own(space: Any, known: Any, given: Any, taken: Any) -> None:
    assert action_space("a task", space) == known
    (found,) = ToEnv(space)(given)
    assert np.asarray(found).tolist() == taken
    assert space.contains(found if isinstance(space, spaces.Discrete) else np.asarray(found))


TWO = spaces.Discrete(2)
ARM = spaces.Box(0, 4, (2,), np.float32)


@pytest.mark.parametrize(
    ("space", "known", "given", "taken"),
    [
        (spaces.Tuple([TWO, spaces.Discrete(3, start=5)]), MultiDiscrete((2, 3)), [1, 2], (1, 7)),
        (
            spaces.Dict(way=TWO, keys=spaces.MultiBinary((1, 2)), more=spaces.Tuple([spaces.MultiDiscrete([4, 5])])),
            MultiDiscrete((2, 2, 2, 4, 5)),
            [1, 1, 0, 3, 4],
            {"keys": [[1, 0]], "more": ([3, 4],), "way": 1},
        ),
        (
            spaces.Dict(arm=ARM, hand=spaces.Dict(grip=spaces.Box(-1, 1, (1, 1), np.float64), turn=ARM)),
            Continuous(5),
            [-1, 0.5, 0.25, 1, 9],
            {"arm": [0, 3], "hand": {"grip": [[0.25]], "turn": [4, 4]}},
        ),
        (spaces.Dict(only=TWO), MultiDiscrete((2,)), [1], {"only": 1}),
    ],
)
def test_several_actions_at_once_are_one_and_reach_the_environment_apart(
    space: Any, known: Any, given: Any, taken: Any
) -> None:
    """As its own space has them, for each of two environments, and alone."""
    assert action_space("a task", space) == known
    acts = np.array([given, given], np.float32 if isinstance(known, Continuous) else np.int64)
    for found in [*ToEnv(space)(acts), ToEnv(space).one(acts[0])]:
        assert space.contains(found)
        assert plain(found) == taken


def plain(action: Any) -> Any:
    """Arrays as lists."""
    match action:
        case dict():
            return {key: plain(each) for key, each in action.items()}
        case tuple():
            return tuple(plain(each) for each in action)
        case _:
            return np.asarray(action).tolist()


def test_an_environment_that_takes_several_actions_is_stepped() -> None:
    env = Showing(spaces.Discrete(2), spaces.Dict(arm=ARM, leg=spaces.Box(-1, 1, (1,), np.float32)))
    vector = GymVectorEnv([env])
    vector.reset([0])
    vector.step(np.array([[0, 1, -1]], np.float32))
    assert [plain(each) for each in env.taken] == [{"arm": [2, 4], "leg": [-1]}]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Text(3), "and Dict and Tuple of them can be learned"),
        (spaces.Dict(a=TWO, b=spaces.Text(3)), "a task acts in Text.* and Dict and Tuple of them can be learned"),
        (spaces.Dict(a=TWO, b=ARM), "by choices and by numbers at once, and a policy gives the one or the other"),
        (spaces.Tuple([spaces.Dict(a=TWO), ARM]), "by choices and by numbers at once"),
        (spaces.Dict(), "1 to 65536 numbers can be learned"),
        (spaces.Tuple([spaces.Discrete(40_000)] * 2), "1 to 65536 numbers can be learned"),
    ],
)
def test_actions_that_no_policy_has_are_refused(space: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        action_space("a task", space)
    assert len(str(caught.value)) < 400


# --- environments that exist ---


@pytest.mark.parametrize(
    ("name", "box", "actions"),
    [
        ("gym:FrozenLake-v1", Box(16), Discrete(4)),
        ("gym:Taxi-v4", Box(500), Discrete(6)),
        ("gym:Blackjack-v1", Box(45), Discrete(2)),
        ("gym:CliffWalking-v1", Box(48), Discrete(4)),
    ],
)
def test_gymnasiums_own_are_tasks_and_games(name: str, box: Box, actions: Discrete) -> None:
    task = load_task(name)
    assert (task.observation_space, task.action_space) == (box, actions)
    task.try_out(0)
    assert GymGame(name.removeprefix("gym:")).roles["agent"].sights == box


def test_an_atari_game_is_learned_by_lives_and_judged_whole() -> None:
    """Four grey frames of 84 by 84; the next life goes on in the same game, unless a seed begins another."""
    pytest.importorskip("ale_py", reason="the atari extra brings it")
    pytest.importorskip("cv2", reason="the atari extra brings it")
    task = load_task("gym:ALE/Breakout-v5")
    assert (task.observation_space, task.action_space) == (Box((4, 84, 84), "uint8"), Discrete(4))
    learned, judged = task.make(1), task.make_plain(1)
    (env,) = learned._envs
    first = learned.reset([3])
    assert first.dtype == np.uint8
    ends, lives = 0, [env.unwrapped.ale.lives()]
    for _ in range(400):
        step = learned.step(np.array([0]))
        assert set(step.rewards) <= {-1.0, 0.0, 1.0}
        ends += int(step.terminated[0])
        if step.terminated[0]:
            lives.append(env.unwrapped.ale.lives())
        if ends == 5:
            break
    assert (ends, lives) == (5, [5, 4, 3, 2, 1, 5])
    np.testing.assert_array_equal(learned.reset([3]), first)
    judged.reset([3])
    ends = sum(int(judged.step(np.array([0])).terminated[0]) for _ in range(100))
    assert ends == 0
    learned.close()
    judged.close()


def test_without_ale_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ale_py", None)
    with pytest.raises(UsageError, match=r"pip install 'shoal\[atari\]'"):
        load_task("gym:ALE/Pong-v5")
