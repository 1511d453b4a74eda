"""Wrapped games are the games themselves: the same sights, rewards and ends, from a closed table."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.training.tasks import load_task
from shoal.training.tasks.cast import ByRole, Everyone, Learned, Scripted
from shoal.training.tasks.games import openspiel, pettingzoo, reasoning
from shoal.training.tasks.games.gym import GymGame
from shoal.training.tasks.games.messenger import MESSENGER, Messenger
from shoal.training.tasks.games.oneof import OneOf
from shoal.training.tasks.games.openspiel import OpenSpielGame
from shoal.training.tasks.games.pettingzoo import PettingZooGame
from shoal.training.tasks.games.reasoning import ReasoningGym
from shoal.training.tasks.games.spread import PUSHES, Spread, moved
from shoal.training.tasks.games.takeover import EXPERT, TakeOver, go_on
from shoal.training.tasks.games.text import (
    Products,
    SortDigits,
    Sums,
    TextTask,
    multi_step_sums,
    products,
    sort_digits,
    sums,
)
from shoal.training.tasks.play import Ask, Box, Continuous, Discrete, End, Role, Text
from shoal.training.tasks.playing import difference, replay
from shoal.training.tasks.source import FreshSeeds, Listed, News, Scenario, SharedPrompts
from shoal.training.tasks.stage import Stage, Staged, alone

from .plays import Count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shoal.training.tasks.cast import Cast
    from shoal.training.tasks.play import Act, Game, Play, Take


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'shoal[games]'")


RANDOM = Everyone(Scripted("random"))


class Says:
    """An actor that is a function of one take."""

    def __init__(self, function: Callable[[Take], Act]) -> None:
        self.function = function

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[Act], np.ndarray]:
        return [self.function(take) for take in takes], np.zeros(len(takes), np.float32)


def played(game: Game, plays: int = 3, cast: Cast = RANDOM, actors: Any = None) -> Staged:
    """Random plays of a game; each is its replay."""
    stage = Stage(game, SharedPrompts(plays), cast, actors or {}, plays)
    staged = alone(stage.collect(News()))
    assert (stage.failures.last, dict(staged.dropped), len(staged.plays)) == ("", {}, plays)
    for one in staged.plays:
        again = replay(game, one.scenario, one.acts)
        assert not [found for two in zip(one.takes, again.takes, strict=True) if (found := difference(*two))]
        assert again.scores == one.scores
    return staged


# --- Gymnasium -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0"])
def test_a_gym_game_is_what_its_vector_env_is(env_id: str) -> None:
    staged = played(GymGame(env_id), 2)
    vector = load_task(f"gym:{env_id}").make(1)
    for one in staged.plays:
        (take,) = one.takes
        shown = vector.reset([one.scenario.seed])
        for turn, act in enumerate(take.acts):
            assert np.array_equal(shown[0], take.sights[turn])
            step = vector.step(np.array([act]))
            assert step.rewards[0] == np.float32(take.rewards[turn])
            shown = step.observations
        assert bool(step.truncated[0]) == take.cut
        assert bool(step.terminated[0]) != take.cut
        if take.cut:
            assert take.final is not None
            assert np.array_equal(step.final_observations[0], take.final)
    vector.close()


def test_a_gym_game_uses_its_environments_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = gymnasium.make
    monkeypatch.setattr(gymnasium, "make", lambda *args, **more: made.append(args) or make(*args, **more))
    game = GymGame("CartPole-v1")
    alone(Stage(game, SharedPrompts(20), RANDOM, {}, 4).collect(News()))
    assert len(made) == 1 + 4


@pytest.mark.parametrize(("name", "words"), [("CartPole-v9", "did you mean"), ("ALE/None-v5", "no Gymnasium|atari")])
def test_gym_games_are_those_that_can_be_learned(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GymGame(name)


def test_an_environment_that_lies_is_dropped_with_its_play(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(gymnasium.Env[np.ndarray, np.int64]):
        def __init__(self) -> None:
            self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
            self.action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            self.seed, self.steps = seed or 0, 0
            return np.zeros(2, np.float32), {}

        def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
            self.steps += 1
            shown = 5.0 if self.seed % 4 == 0 else 0.5
            return np.full(2, shown, np.float32), 1.0, self.steps == 3, False, {}

    monkeypatch.setitem(gymnasium.registry, "Liar-v0", gymnasium.envs.registration.EnvSpec("Liar-v0", entry_point=Liar))
    stage = Stage(GymGame("Liar-v0"), Listed([Scenario(seed) for seed in range(1, 8)]), RANDOM, {}, 2)
    staged = alone(stage.collect(News()))
    assert [one.scenario.seed for one in staged.plays] == [1, 2, 3, 5, 6, 7]
    assert "an observation is outside of its space: number 0 of it is 5, not -1 to 1" in stage.failures.last


# --- PettingZoo ------------------------------------------------------------------------------------------------------

MPE = sorted(name for name in pettingzoo.TABLE if name.startswith("mpe2:"))


@needs("mpe2")
@pytest.mark.parametrize("name", MPE)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_every_game_of_the_table_can_be_played_and_replayed(name: str, is_parallel: bool) -> None:
    game = PettingZooGame(name, is_parallel=is_parallel, max_cycles=6)
    staged = played(game, 2)
    roles = len(game.roles)
    assert {len(one.takes) for one in staged.plays} == {roles}
    assert {one.turns for one in staged.plays} == {6 if is_parallel else 6 * roles}
    assert all(take.cut for take in staged.takes)  # it has a horizon and no end


@needs("mpe2")
def test_a_parallel_game_is_the_environment_itself() -> None:
    from mpe2 import simple_tag_v3

    game = PettingZooGame("mpe2:simple_tag_v3", max_cycles=8, continuous_actions=True)
    (one,) = played(game, 1).plays
    env = simple_tag_v3.parallel_env(max_cycles=8, continuous_actions=True)
    shown, _ = env.reset(seed=one.scenario.seed)
    takes = {take.role: take for take in one.takes}
    for turn in range(8):
        assert all(np.array_equal(shown[role], take.sights[turn]) for role, take in takes.items())
        acts = {role: ((take.acts[turn] + 1) / 2).astype(np.float32) for role, take in takes.items()}
        shown, rewards, _, _, _ = env.step(acts)
        assert all(rewards[role] == take.rewards[turn] for role, take in takes.items())
    assert all(np.array_equal(shown[role], take.final) for role, take in takes.items())  # type: ignore[arg-type]


@needs("mpe2")
def test_turns_and_parallel_pay_the_same() -> None:
    cast = Everyone(Scripted("first"))
    both = [
        played(PettingZooGame("mpe2:simple_speaker_listener_v4", is_parallel=each), 2, cast) for each in (True, False)
    ]
    for mine, theirs in zip(both[0].plays, both[1].plays, strict=True):
        assert mine.returns == pytest.approx(theirs.returns)


@needs("mpe2")
def test_an_agents_own_sight_leaves_the_others_out() -> None:
    whole = PettingZooGame("mpe2:simple_spread_v3")
    own = PettingZooGame("mpe2:simple_spread_v3", local_sight=True)
    assert (whole.roles["agent_0"].sights, own.roles["agent_0"].sights) == (Box(18), Box(10))
    mine, all_of_it = (played(game, 1, Everyone(Scripted("first"))).takes[0] for game in (own, whole))
    assert all(np.array_equal(few, many[:10]) for few, many in zip(mine.sights, all_of_it.sights, strict=True))


@pytest.mark.parametrize("name", ["os:system", "mpe2:simple_spread_v9", "mpe2.simple_spread_v3", "", "x" * 1000])
def test_nothing_is_imported_by_name_that_the_table_does_not_name(name: str) -> None:
    with pytest.raises(UsageError, match="no PettingZoo game is called"):
        PettingZooGame(name)
    with pytest.raises(UsageError, match="no OpenSpiel game is called"):
        OpenSpielGame(name)


def test_a_game_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pettingzoo.TABLE, "mpe2:simple_v3", ("no_such_package.simple_v3", "shoal[games]"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"not installed .*no_such_package.*pip install 'shoal\[games\]'"):
        PettingZooGame("mpe2:simple_v3")


@needs("mpe2")
def test_options_that_a_game_does_not_know_are_one_clear_line() -> None:
    with pytest.raises(UsageError, match="does not know one of these options"):
        PettingZooGame("mpe2:simple_v3", colour="red")


# --- OpenSpiel -------------------------------------------------------------------------------------------------------


@needs("pyspiel")
@pytest.mark.parametrize("name", sorted(openspiel.TABLE))
def test_every_open_spiel_game_can_be_played_and_replayed(name: str) -> None:
    staged = played(OpenSpielGame(name), 2)
    assert staged.turns >= 2
    for take in staged.takes:
        assert all(legal is None or legal[act] for legal, act in zip(take.legal, take.acts, strict=True))


@needs("pyspiel")
@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker", "hanabi", "goofspiel", "tic_tac_toe"])
def test_what_players_earn_adds_up_to_the_games_returns(name: str) -> None:
    import pyspiel

    chance = 0
    for one in played(OpenSpielGame(name), 4).plays:
        state, acts = pyspiel.load_game(name).new_initial_state(), list(one.acts)
        rng = np.random.default_rng(one.scenario.seed)
        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, shares = zip(*state.chance_outcomes(), strict=True)
                drawn = int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side="right"))
                state.apply_action(outcomes[min(drawn, len(outcomes) - 1)])
                chance += 1
            elif state.is_simultaneous_node():
                state.apply_actions([acts.pop(0) for _ in range(2)])
            else:
                state.apply_action(acts.pop(0))
        assert list(one.returns.values()) == pytest.approx(state.returns())
    assert chance or name == "tic_tac_toe"


@needs("pyspiel")
def test_parameters_of_open_spiel_are_its_own() -> None:
    assert len(OpenSpielGame("kuhn_poker", players=3).roles) == 3
    with pytest.raises(UsageError, match="does not take"):
        OpenSpielGame("kuhn_poker", colour=3)


# --- text ------------------------------------------------------------------------------------------------------------


def solve(take: Take) -> str:
    question = take.sights[-1]
    if question.endswith("="):
        return _count(question[:-1])
    return "".join(sorted(question))


def _count(question: str) -> str:
    if "*" in question:
        return str(int(question.split("*")[0]) * int(question.split("*")[1]))
    return str(sum(int(term) for term in question.split("+")))


@pytest.mark.parametrize(
    "puzzle", [sort_digits, sums, multi_step_sums, products, SortDigits(3), Sums(4, 3), Products(3)]
)
def test_exact_tasks_have_one_right_answer_that_the_seed_decides(puzzle: Any) -> None:
    game = TextTask(puzzle, max_tokens=9)
    cast = Everyone("model")
    right = played(game, 20, cast, {Learned("model"): Says(solve)})
    assert {one.scores["right"] for one in right.plays} == {1.0}
    wrong = played(game, 20, cast, {Learned("model"): Says(lambda take: solve(take) + " ")})
    assert {one.returns["solver"] for one in wrong.plays} == {0.0}
    assert [take.sights for take in right.takes] == [take.sights for take in wrong.takes]
    assert len({take.sights[0] for take in right.takes}) > 10
    assert {take.max_tokens for take in right.takes} == {9}


@pytest.mark.parametrize("prompt", ["3+x=", "", "1+1", "9" * 65, 5, None, "1+1=2", "3*4=\n"])
def test_a_prompt_that_is_no_question_is_no_scenario(prompt: object) -> None:
    source = Listed([Scenario(0, {"prompt": prompt}), Scenario(0, {"prompt": "17+4="})])
    stage = Stage(TextTask(sums), source, Everyone("m"), {Learned("m"): Says(solve)}, 2)
    staged = alone(stage.collect(News()))
    asked = [take.sights[0] for take in staged.takes]
    assert asked[-1] == "17+4="
    assert (len(asked) == 2) == (prompt is None)
    assert stage.failures.count == 0


@needs("reasoning_gym")
def test_reasoning_gyms_tasks_are_scored_by_their_own_scorers() -> None:
    puzzle = ReasoningGym("leg_counting", max_animals=3)
    known = {puzzle.entry(seed)["question"]: puzzle.entry(seed)["answer"] for seed in range(5)}
    assert len(known) == 5
    assert [puzzle.entry(3)["question"], puzzle.score(puzzle.entry(3)["answer"], puzzle.entry(3))] == [
        puzzle.entry(3)["question"],
        1.0,
    ]
    game = TextTask(puzzle)
    staged = played(
        game, 3, Everyone("m"), {Learned("m"): Says(lambda take: puzzle.entry(take.scenario.seed)["answer"])}
    )
    assert {one.scores["right"] for one in staged.plays} == {1.0}
    with pytest.raises(UsageError, match="did you mean"):
        ReasoningGym("leg_countin")
    with pytest.raises(UsageError, match="does not take"):
        ReasoningGym("leg_counting", colour=3)


@needs("reasoning_gym")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of NumPy, over answers that are no matrices
def test_no_scorer_of_the_table_runs_what_an_answer_says(tmp_path: Path) -> None:
    code = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    for name in sorted(reasoning.TABLE):
        puzzle = ReasoningGym(name)
        entry = puzzle.entry(5)
        assert entry == puzzle.entry(5), name
        assert puzzle.score(entry["answer"], entry) == 1, name
        for answer in (code, f"[{code}]", f"({code})", f"{{{code}}}", "", "9" * 5000, "[[1]]", "1/0"):
            assert 0 <= puzzle.score(answer, entry) < 1, name
            assert not (tmp_path / "ran").exists(), f"{name} runs code"


@pytest.mark.parametrize("name", ["countdown", "puzzle24", "n_queens", "simple_integration", "codeio", "composite"])
def test_tasks_whose_scorers_evaluate_answers_are_not_made(name: str) -> None:
    with pytest.raises(UsageError, match="no task of reasoning-gym is called"):
        ReasoningGym(name)


# --- wrappers of wrappers --------------------------------------------------------------------------------------------


@needs("mpe2")
def test_a_messenger_sees_all_and_its_words_reach_each() -> None:
    inner = PettingZooGame("mpe2:simple_spread_v3", local_sight=True, max_cycles=5)
    game = Messenger(inner, 2)
    assert game.roles[MESSENGER] == Role(Box(30), Continuous(6))
    assert game.roles["agent_1"] == Role(Box(12), inner.roles["agent_1"].acts)
    (one,) = played(game, 1, ByRole(messenger=Scripted("random"), agent=Scripted("random"))).plays
    messenger, *agents = one.takes
    for turn in range(5):
        assert np.array_equal(messenger.sights[turn], np.concatenate([agent.sights[turn][:10] for agent in agents]))
        words = np.tanh(messenger.acts[turn]).reshape(3, 2)
        assert all(np.array_equal(agent.sights[turn][10:], word) for agent, word in zip(agents, words, strict=True))
    earned = np.mean([agent.rewards for agent in agents], axis=0)
    assert messenger.rewards == pytest.approx(earned)
    assert messenger.cut
    assert isinstance(messenger.final, np.ndarray)
    silent = Messenger(inner, 0)
    assert silent.roles == inner.roles
    played(silent, 1)


@needs("mpe2")
@pytest.mark.parametrize("near", [1.0, 0.2])
def test_spread_is_mpe2s_step_by_step(near: float) -> None:
    """Places, motions, sights and rewards; once with agents that bump."""
    simple_spread = importlib.import_module("mpe2.simple_spread_v3")
    game, rng, bumps = Spread(sees_others=True), np.random.default_rng(3), 0
    for seed in range(5):
        env = simple_spread.parallel_env()
        env.reset(seed=seed)
        world = env.unwrapped.world
        for agent in world.agents:
            agent.state.p_pos *= near
        places, landmarks = ([tuple(each.state.p_pos) for each in own] for own in (world.agents, world.landmarks))
        motions = [(0.0, 0.0)] * 3
        for _ in range(25):
            acts = rng.integers(5, size=3)
            shown, earned, *_ = env.step({f"agent_{number}": int(act) for number, act in enumerate(acts)})
            places, motions = moved(places, motions, [PUSHES[act] for act in acts])
            sights, rewards = game.sights(places, motions, landmarks), game.rewards(places, landmarks)
            for number, role in enumerate(game.roles):
                np.testing.assert_allclose(sights[number], shown[role][:14], atol=1e-5)
                assert rewards[number] == pytest.approx(earned[role], abs=1e-9)
            bumps += len(set(rewards)) > 1
        env.close()
    assert bumps or near == 1


def test_spread_is_played_and_cut_off_at_its_end() -> None:
    (one,) = played(Spread(turns=4), 1).plays
    assert one.turns == 4
    assert all(take.cut and take.final is not None and len(take.final) == 10 for take in one.takes)
    with pytest.raises(UsageError, match="16 agents"):
        Spread(17)


@needs("mpe2")
def test_a_messenger_sees_what_those_do_not_that_it_talks_to() -> None:
    inner = PettingZooGame("mpe2:simple_spread_v3", local_sight=True, max_cycles=5)
    game = Messenger(inner, 2, local=4)
    assert game.roles[MESSENGER] == Role(Box(30), Continuous(6))
    assert game.roles["agent_1"] == Role(Box(6), inner.roles["agent_1"].acts)
    (one,) = played(game, 1, ByRole(messenger=Scripted("random"), agent=Scripted("random"))).plays
    messenger, *agents = one.takes
    shown = np.stack(messenger.sights).reshape(5, 3, 10)
    for number, agent in enumerate(agents):
        assert np.array_equal(np.stack(agent.sights)[:, :4], shown[:, number, :4])
        assert agent.final is not None
        assert len(agent.final) == 6


def test_who_is_told_nothing_sees_all() -> None:
    with pytest.raises(UsageError, match="sees all"):
        Messenger(TextTask(sums), 0, local=4)
    with pytest.raises(UsageError, match="local"):
        Messenger(TextTask(sums), 2, local=-1)


def test_a_messenger_needs_numbers() -> None:
    with pytest.raises(UsageError, match="reads text"):
        _ = Messenger(TextTask(sums), 2).roles


def test_with_a_share_the_expert_labels_every_sight_and_acts_as_often() -> None:
    game = TakeOver(GymGame("Pendulum-v1"), share=0.3)
    assert game.roles[EXPERT] == game.roles["agent"]
    cast = ByRole(agent=Scripted("random"), expert=Scripted("first"))
    (one,) = played(game, 1, cast).plays
    agent, expert = one.takes
    assert all(map(np.array_equal, agent.sights, expert.sights))
    assert 30 < one.scores["taken_over"] < 90  # of 200
    assert agent.cut
    assert expert.cut
    all_of_it = TakeOver(GymGame("Pendulum-v1"), share=1.0)
    (mine,) = played(all_of_it, 1, cast).plays
    (theirs,) = played(GymGame("Pendulum-v1"), 1, Everyone(Scripted("first"))).plays
    assert mine.returns["agent"] == theirs.returns["agent"]
    none_of_it = TakeOver(GymGame("Pendulum-v1"), share=0.0)
    (alone_,) = played(none_of_it, 1, ByRole(agent=Scripted("first"), expert=Scripted("random"))).plays
    assert alone_.returns["agent"] == theirs.returns["agent"]


class Notes(Count):
    """Counts, and notes what was done."""

    def __init__(self, space: Any) -> None:
        super().__init__()
        self.roles = {"agent": Role(Box(1), space)}
        self.done: list[Any] = []

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        for _ in range(3):
            self.done += yield (Ask("agent", np.zeros(1, np.float32)),)
        return End()


@pytest.mark.parametrize(
    ("space", "own", "instead", "said"),
    [
        (Discrete(3), 1, 2, 2),
        (Continuous(2), np.zeros(2, np.float32), np.ones(2, np.float32), np.ones(3, np.float32)),
        (Text(), "mine", "yours", "yours"),
    ],
)
def test_an_expert_that_does_not_want_to_leaves_the_role_to_itself(
    space: Any, own: Any, instead: Any, said: Any
) -> None:
    def expert(take: Take) -> Act:
        return said if len(take) == 1 else go_on(space)

    game = Notes(space)
    actors: Any = {Learned("own"): Says(lambda take: own), Learned("expert"): Says(expert)}
    stage = Stage(TakeOver(game), Listed([Scenario(0)]), ByRole(agent="own", expert="expert"), actors, 1)
    (one,) = alone(stage.collect(News())).plays
    assert one.scores["taken_over"] == 1
    assert all(map(np.array_equal, game.done, [own, instead, own]))


@needs("pyspiel")
def test_an_expert_may_do_what_the_role_may_and_leave_it_be() -> None:
    game = TakeOver(OpenSpielGame("tic_tac_toe"), role="player_1")
    staged = played(game, 4)
    for one in staged.plays:
        own, expert = (next(take for take in one.takes if take.role == role) for role in ("player_1", EXPERT))
        assert [legal.tolist() for legal in own.legal] == [legal[:-1].tolist() for legal in expert.legal]  # type: ignore[union-attr, index]
        assert all(legal[-1] for legal in expert.legal)  # type: ignore[index]
        assert one.scores["taken_over"] == sum(act < 9 for act in expert.acts)


def test_one_of_several_games_is_chosen_by_the_scenario() -> None:
    game = OneOf(short=Count(2), long=Count(5))
    assert list(game.roles) == ["short/agent", "long/agent"]
    source = Listed([Scenario(0, {"game": "long"}), Scenario(1, {"game": "short"}), Scenario(2, {"game": "chess"})])
    stage = Stage(game, source, RANDOM, {}, 2)
    staged = alone(stage.collect(News()))
    assert [[take.role for take in one.takes] for one in staged.plays] == [["long/agent"], ["short/agent"]]
    assert [one.turns for one in staged.plays] == [5, 2]
    assert (dict(staged.dropped), stage.failures.count) == ({"scenario": 1}, 0)
    mixed = alone(Stage(game, FreshSeeds(), RANDOM, {}, 8).collect(News(), 200))
    assert {one.takes[0].role for one in mixed.plays} == set(game.roles)
