"""A play is held to what its game promises, is recorded as it was, and can be had again bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import UsageError
from shoal.training.tasks.cast import Everyone, Learned
from shoal.training.tasks.play import (
    Act,
    Ask,
    BadPlayError,
    BadScenarioError,
    Box,
    Continuous,
    Discrete,
    End,
    Play,
    Role,
    Text,
    newest,
    read_act,
)
from shoal.training.tasks.playing import MAX_TURNS, Played, Playing, difference, replay
from shoal.training.tasks.source import Listed, News, Scenario
from shoal.training.tasks.stage import Stage, alone

from .plays import Count, Echo, Tangle

if TYPE_CHECKING:
    from collections.abc import Callable

SIGHT = np.zeros(2, np.float32)


class Says:
    """A game that yields one thing, and returns another."""

    name = "says"

    def __init__(self, asks: Any, end: Any = None) -> None:
        self.roles = {"a": Role(Box(2), Discrete(2)), "b": Role(Text(10), Text(10))}
        self.asks, self.end = asks, end

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Any:
        yield self.asks
        return self.end


def played(game: Any, scenario: Scenario, max_turns: int = MAX_TURNS) -> Played:
    stage = Stage(game, Listed([scenario]), Everyone("all"), {Learned("all"): Echo()}, 1, max_turns=max_turns)
    (one,) = alone(stage.collect(News())).plays
    return one


def begin(game: Any) -> Playing:
    playing = Playing(game, Scenario(0), dict.fromkeys(game.roles, Learned("all")))
    playing.begin()
    for position in range(len(playing.asks)):
        playing.record(position)
    return playing


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        (None, "yielded nothing and not a tuple of asks"),
        ((), "no asks"),
        ([Ask("a", SIGHT)], "a list and not a tuple"),
        (("a",), "a str among its asks"),
        ((Ask("c", SIGHT),), "asked 'c', which is no role of it; it has a, b"),
        ((Ask("a", np.zeros(3, np.float32)),), r"role 'a': a sight is of shape \(3,\) and not \(2,\)"),
        ((Ask("a", np.zeros(2)),), "role 'a': a sight is an array of float64 of shape .* not an array of float32"),
        ((Ask("a", [0.0, 0.0]),), "role 'a': a sight is a list"),
        ((Ask("a", np.array([0, np.nan], np.float32)),), "role 'a': a sight is not finite: number 1 of it is nan"),
        ((Ask("a", SIGHT, np.inf),), "role 'a': a reward is inf, which is not finite"),
        ((Ask("a", SIGHT, "1"),), "role 'a': a reward is a str and not a number"),
        ((Ask("a", SIGHT, legal=np.ones(3, np.bool_)),), "role 'a': legal is .* and not 2 bool"),
        ((Ask("a", SIGHT, legal=np.ones(2)),), "role 'a': legal is an array of float64"),
        ((Ask("a", SIGHT, legal=np.zeros(2, np.bool_)),), "role 'a': no act is legal"),
        ((Ask("b", "hi", legal=np.ones(2, np.bool_)),), "role 'b': only acts of a Discrete role"),
        ((Ask("b", SIGHT),), "role 'b': a sight is an array .* and not text"),
        ((Ask("b", "x" * 11),), "role 'b': a sight has 11 characters, more than 10"),
        ((Ask("a", SIGHT, central=np.array([np.inf], np.float32)),), "role 'a': central is not finite"),
        ((Ask("a", SIGHT), Ask("a", SIGHT)), "asked 2 at once; .* every role once"),
    ],
)
def test_what_a_bad_game_asks_is_one_clear_error(asks: Any, words: str) -> None:
    with pytest.raises(BadPlayError, match=words) as caught:
        begin(Says(asks))
    assert "the game says" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (None, "returned nothing and not an End"),
        (End({"c": 1.0}), "rewards of its End name 'c'"),
        (End({"a": np.nan}), "of 'a' in its End a reward is nan"),
        (End([1.0]), "rewards of its End are a list"),
        (End(cut={"a": np.zeros(3, np.float32)}), r"of 'a' in its End a sight is of shape \(3,\)"),
        (End(scores={"x" * 100: 1.0}), "other scores than"),
        (End(scores={"x": "good"}), "of 'x' in its End a reward is a str"),
    ],
)
def test_what_a_bad_game_returns_is_one_clear_error(end: Any, words: str) -> None:
    playing = begin(Says((Ask("a", SIGHT),), end))
    with pytest.raises(BadPlayError, match=words):
        playing.resume([0])


def test_a_game_that_is_no_generator_or_asks_nobody_says_so() -> None:
    class Plain(Says):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Any:
            return End()

    class Silent(Says):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Any:
            return End()
            yield

    with pytest.raises(BadPlayError, match="gave a End and not a generator"):
        begin(Plain(()))
    with pytest.raises(BadPlayError, match="ended before it asked anybody"):
        begin(Silent(()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Role(Text, Text()),  # type: ignore[arg-type]
        lambda: Role(Box(2), Box(2)),  # type: ignore[arg-type]
        lambda: Role(Box(0), Discrete(2)),
        lambda: Role(Box(2), Discrete(10**9)),
        lambda: Scenario(-1),
        lambda: Scenario(0, max_turns=0),
        lambda: Scenario(0, tag="x" * 81),
    ],
)
def test_spaces_and_scenarios_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


class Earns:
    """Two roles in turn, with rewards of every time: 1, 2, 4, … so that each sum tells which."""

    name = "earns"

    def __init__(self) -> None:
        numbers = Role(Box(2), Discrete(2))
        self.roles = {"a": numbers, "b": numbers, "never": Role(Text(), Text())}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        same = np.zeros(2, np.float32)  # used again for every sight, as many an environment does
        yield (Ask("a", same, 1.0, central=np.full(1, 7, np.float32)),)
        same += 1
        yield (Ask("a", same, 2.0, central=np.full(1, 8, np.float32)), Ask("b", same, 4.0))
        same += 1
        yield (Ask("b", same, 8.0, np.array([False, True])),)
        same += 1
        return End({"a": 16.0, "b": 32.0, "never": 64.0}, cut={"b": same})


def test_each_act_gets_what_it_earned_until_the_next_and_sights_are_copies() -> None:
    one = played(Earns(), Scenario(0))
    a, b = one.takes
    assert (a.rewards, a.early, a.cut, a.final) == ([2.0, 16.0], 1.0, False, None)
    assert (b.rewards, b.early, b.cut) == ([8.0, 32.0], 4.0, True)
    assert b.final is not None
    assert not isinstance(b.final, str)
    assert b.final.tolist() == [3, 3]
    assert [sight.tolist() for sight in a.sights + b.sights] == [[0, 0], [1, 1], [1, 1], [2, 2]]
    assert one.returns == {"a": 19.0, "b": 44.0, "never": 64.0}
    arrays = a.arrays() | {"legal": b.arrays()["legal"]}
    assert arrays["central"].tolist() == [[7], [8]]
    assert arrays["legal"].tolist() == [[True, True], [False, True]]
    assert arrays["sights"].dtype == np.float32
    assert arrays["acts"].dtype == np.int64
    assert arrays["log_probs"].shape == arrays["rewards"].shape == (2,)
    assert newest([a, b]).tolist() == [[1, 1], [2, 2]]
    with pytest.raises(ValueError, match="read-only"):
        a.sights[0][0] = 1


@given(
    kinds=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    limit=st.one_of(st.none(), st.integers(1, 4)),
    stage_limit=st.integers(1, 6),
)
@settings(max_examples=50, deadline=None)
def test_a_play_is_its_scenario_and_its_acts(kinds: list[int], seed: int, limit: int | None, stage_limit: int) -> None:
    game = Tangle(tuple(kinds))
    scenario = Scenario(seed, {"map": "m"}, max_turns=limit)
    one = played(game, scenario, stage_limit)
    again = replay(game, scenario, one.acts)
    assert not [found for pair in zip(one.takes, again.takes, strict=True) if (found := difference(*pair))]
    assert (again.returns, again.scores, again.turns) == (one.returns, one.scores, one.turns)
    assert all(np.isnan(take.log_probs).all() for take in again.takes)


@given(kinds=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=st.integers(0, 1000), share=st.floats(0, 0.99))
@settings(max_examples=50, deadline=None)
def test_what_follows_replayed_acts_is_the_end_of_the_same_play(kinds: list[int], seed: int, share: float) -> None:
    game, scenario = Tangle(tuple(kinds)), Scenario(seed)
    one = played(game, scenario)
    probe = Playing(game, scenario, dict.fromkeys(game.roles, Learned("all")))
    probe.begin()
    goes_on, starts = True, [0]
    while goes_on:
        ahead = one.acts[starts[-1] : starts[-1] + len(probe.asks)]
        starts.append(starts[-1] + len(ahead))
        goes_on = probe.resume([probe.answer(index, act) for index, act in enumerate(ahead)])
    turn = int(share * (len(starts) - 1))
    later = played(game, replace(scenario, acts=one.acts[: starts[turn]]))
    assert later.replayed == turn
    whole = replay(game, scenario, (*one.acts[: starts[turn]], *later.acts))
    assert (later.scores, later.returns.keys()) == (whole.scores, whole.returns.keys())
    for take in later.takes:
        longer = next(each for each in whole.takes if each.role == take.role)
        assert all(map(np.array_equal, take.sights, longer.sights[-len(take) :]))
        assert take.rewards == longer.rewards[-len(take) :]
        assert take.early == 0 or not turn


def test_a_horizon_shows_the_last_sights_and_replayed_turns_do_not_count_for_it() -> None:
    one = played(Count(9), Scenario(0, max_turns=3))
    (take,) = one.takes
    assert (len(take), take.cut, one.turns) == (3, True, 3)
    assert take.final is not None
    assert not isinstance(take.final, str)
    assert take.final.tolist() == [3]
    later = played(Count(9), Scenario(0, acts=(1, 2), max_turns=3))
    assert (later.turns, later.replayed, len(later.takes[0])) == (5, 2, 3)
    assert later.takes[0].sights[0].tolist() == [2]
    assert later.returns["agent"] == later.takes[0].earned  # what the replayed acts earned is another's
    whole = played(Count(9), Scenario(0))
    assert not whole.takes[0].cut


@pytest.mark.parametrize(
    ("acts", "words"),
    [
        ((5,), "an act is 5, not 0 to 2"),
        (("up",), "a str and not a whole"),
        ((1, 1, 1), "ends within"),
        ((True,), "bool"),
    ],
)
def test_acts_that_do_not_fit_the_game_are_no_start(acts: tuple[Act, ...], words: str) -> None:
    with pytest.raises(BadScenarioError, match=words):
        replay(Count(3), Scenario(0, acts=acts), ())


def test_acts_of_another_play_are_no_replay() -> None:
    one = played(Count(3), Scenario(0))
    with pytest.raises(BadScenarioError, match="ends after 3 of 4 acts"):
        replay(Count(3), Scenario(0), (*one.acts, 1))
    with pytest.raises(BadScenarioError, match="turn 0: an act is 9"):
        replay(Count(3), Scenario(0), (9,))
    with pytest.raises(BadScenarioError, match="middle of a turn"):
        replay(Earns(), Scenario(0), (0, 0))
    other = replay(Count(3), Scenario(0), (2, 2, 2))
    assert "acts differ at act" in difference(one.takes[0], other.takes[0])
    short = replay(Count(3), Scenario(0), one.acts[:2])
    assert short.takes[0].cut
    assert "cut is" in difference(one.takes[0], short.takes[0])


@pytest.mark.parametrize("forge", ["sights", "rewards", "final", "early", "legal"])
def test_a_forged_take_is_told_from_its_replay(forge: str) -> None:
    one = played(Earns(), Scenario(0))
    claimed, honest = one.takes[1], replay(Earns(), Scenario(0), one.acts).takes[1]
    assert difference(claimed, honest) == ""
    match forge:
        case "sights":
            claimed.sights[1] = claimed.sights[1] + np.float32(1e-6)
        case "rewards":
            claimed.rewards[0] = 8.5
        case "final":
            claimed.final = None
        case "early":
            claimed.early = 5.0
        case _:
            claimed.legal.pop()
    assert difference(claimed, honest) != ""


@pytest.mark.parametrize(
    ("act", "kept"),
    [(1, 1), (np.int64(1), 1), (np.array(1), 1), (np.uint8(0), 0)],
)
def test_whole_numbers_of_any_kind_are_acts(act: Any, kept: int) -> None:
    found = read_act(Discrete(2), act, None)
    assert found == kept
    assert type(found) is int


@pytest.mark.parametrize(
    ("space", "act"),
    [
        (Discrete(2), 1.0),
        (Discrete(2), True),
        (Discrete(2), None),
        (Continuous(2), np.zeros(2)),
        (Continuous(2), np.zeros(3, np.float32)),
        (Continuous(2), np.full(2, np.nan, np.float32)),
        (Text(3), "four"),
        (Text(3), b"abc"),
    ],
)
def test_what_is_no_act_of_a_space_is_refused(space: Any, act: Any) -> None:
    from shoal.training.tasks.play import BadActError

    with pytest.raises(BadActError):
        read_act(space, act, None)
