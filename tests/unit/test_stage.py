"""Many plays side by side are what each alone would be; none waits for ever, and one that fails fails alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import UsageError
from shoal.training import watch
from shoal.training.effects import Consult
from shoal.training.tasks.cast import Away, ByRole, Everyone, Fixed, Learned, Past, Person, Scripted, pair
from shoal.training.tasks.failures import TaskFailedError
from shoal.training.tasks.play import Ask, BadActError, BadScenarioError, Box, Discrete, End, Role, Text
from shoal.training.tasks.playing import difference
from shoal.training.tasks.source import FreshSeeds, Listed, News, Scenario, SharedPrompts
from shoal.training.tasks.stage import MAX_CONSULT, PATIENCE, TRIES, Stage, Staged, alone

from .plays import Count, Echo, Tangle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shoal.training.tasks.cast import Actor, Cast, Seat
    from shoal.training.tasks.play import Act, Play, Take
    from shoal.training.tasks.stage import Collecting

ALL = Everyone("all")


def stage_of(
    game: Any, source: Any, plays: int, cast: Cast = ALL, actors: dict[Seat, Actor] | None = None, **more: Any
) -> Stage:
    return Stage(game, source, cast, {Learned("all"): Echo()} if actors is None else actors, plays, **more)


def drive(collecting: Collecting, answer: Callable[[Consult], Sequence[Act] | None]) -> tuple[Staged, list[Consult]]:
    """Answer every consult; gives what came of it all, and the consults."""
    asked, given = [], None
    try:
        while True:
            consult = collecting.send(given)
            asked.append(consult)
            given = answer(consult)
    except StopIteration as stop:
        return stop.value, asked


def echo(consult: Consult) -> Sequence[Act]:
    return Echo().act(consult.takes, np.random.default_rng(0), greedy=False)[0]


def assert_same(some: Staged, others: Staged) -> None:
    assert [each.number for each in some.plays] == [each.number for each in others.plays]
    for mine, theirs in zip(some.plays, others.plays, strict=True):
        assert mine.scenario.seed == theirs.scenario.seed
        assert (mine.returns, mine.scores, mine.turns) == (theirs.returns, theirs.scores, theirs.turns)
        assert not [found for two in zip(mine.takes, theirs.takes, strict=True) if (found := difference(*two))]


# --- the same however many there are ---------------------------------------------------------------------------------


@given(kinds=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 1000), plays=st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_plays_side_by_side_are_those_one_after_the_other(kinds: list[int], seed: int, plays: int) -> None:
    game, source = Tangle(tuple(kinds)), SharedPrompts(6, 2, seed)
    one = alone(stage_of(game, source, 1, seed=seed).collect(News()))
    many = alone(stage_of(game, source, plays, seed=seed).collect(News()))
    assert_same(one, many)
    assert one.turns == many.turns == sum(each.turns for each in one.plays)
    assert one.is_exhausted
    assert many.is_exhausted


@given(seed=st.integers(0, 1000), chunk=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_a_collect_goes_on_where_the_last_left_off(seed: int, chunk: int) -> None:
    game, source = Tangle((0, 1)), SharedPrompts(8)
    whole = alone(stage_of(game, source, 3, seed=seed).collect(News()))
    stage, parts = stage_of(game, source, 3, seed=seed), []
    while not parts or not parts[-1].is_exhausted:
        parts.append(alone(stage.collect(News(), chunk)))
    plays = sorted((each for part in parts for each in part.plays), key=lambda each: each.number)
    assert sum(part.turns for part in parts) == whole.turns
    assert_same(whole, replace(whole, plays=tuple(plays)))


@given(seed=st.integers(0, 1000), script=st.sampled_from(["random", "first"]))
@settings(max_examples=20, deadline=None)
def test_a_seed_gives_the_same_again_and_another_seed_something_else(seed: int, script: str) -> None:
    def collect(with_seed: int) -> Staged:
        stage = stage_of(Tangle((0, 1, 3)), FreshSeeds(), 4, Everyone(Scripted(script)), seed=with_seed)
        return alone(stage.collect(News(), 40))

    assert_same(collect(seed), collect(seed))
    assert [each.scenario.seed for each in collect(seed).plays] != [
        each.scenario.seed for each in collect(seed + 1).plays
    ]


def test_members_that_know_the_same_play_the_same_scenarios() -> None:
    mine = alone(stage_of(Count(), SharedPrompts(3, 4), 5, seed=1).collect(News(epoch=7)))
    theirs = alone(stage_of(Count(), SharedPrompts(3, 4), 2, seed=2).collect(News(epoch=7)))
    seeds = [each.scenario.seed for each in mine.plays]
    assert seeds == [each.scenario.seed for each in theirs.plays]
    assert [seeds.count(seed) for seed in dict.fromkeys(seeds)] == [4, 4, 4]


# --- asking ----------------------------------------------------------------------------------------------------------


def test_each_actor_is_called_once_a_step_for_all_its_asks() -> None:
    class Both:
        """Two at once."""

        name = "both"

        def __init__(self) -> None:
            self.roles = {"a": Role(Box(1), Discrete(2)), "b": Role(Box(1), Discrete(2)), "c": Role(Text(), Text())}

        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            sight = np.zeros(1, np.float32)
            for _ in range(3):
                yield (Ask("a", sight), Ask("b", sight), Ask("c", "?"))
            return End()

    shared, other = Echo(), Echo()
    actors: dict[Seat, Actor] = {Learned("x"): shared, Past("x", 0): shared, Fixed("x", "bafy"): other}  # type: ignore[arg-type]
    cast = ByRole(a="x", b=Past("x", 0), c=Fixed("x", "bafy"))  # type: ignore[arg-type]
    alone(stage_of(Both(), SharedPrompts(4), 4, cast, actors).collect(News()))
    assert shared.calls == [8] * 3  # one actor, whatever its seats are called
    assert other.calls == [4] * 3


def test_log_probs_seats_and_versions_are_recorded() -> None:
    (one,) = alone(stage_of(Count(), SharedPrompts(1), 1).collect(News(epoch=5))).plays
    (take,) = one.takes
    assert (take.log_probs, take.version, take.seat, take.proven) == ([-1.0] * 3, 5, Learned("all"), True)
    assert take.scenario is one.scenario


def test_actors_are_looked_for_anew_with_every_collect() -> None:
    first, second = Echo(), Echo()
    actors: dict[Seat, Actor] = {Learned("all"): first}
    stage = stage_of(Count(50), FreshSeeds(), 2, actors=actors)
    alone(stage.collect(News(), 4))
    actors[Learned("all")] = second
    alone(stage.collect(News(epoch=1), 4))
    assert (first.calls, second.calls) == ([2, 2], [2, 2])


class Acts:
    """An actor that answers one thing."""

    def __init__(self, acts: Any, log_probs: Any = None) -> None:
        self.acts, self.log_probs = acts, log_probs

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> Any:
        return self.acts, np.zeros(len(self.acts), np.float32) if self.log_probs is None else self.log_probs


@pytest.mark.parametrize(
    ("actor", "words"),
    [
        (Acts([0]), "1 acts for 2 asks"),
        (Acts(np.array([0, 3])), "an act is 3, not 0 to 2"),
        (Acts(np.array([0, -1])), "an act is -1"),
        (Acts(np.array([0.0, 1.0])), "an act is a float64 and not a whole number"),
        (Acts(["left", "right"]), "an act is a str"),
        (Acts([0, 0], np.zeros(3, np.float32)), r"log-probabilities \(3,\) for 2 asks"),
        (Acts([0, 0], np.array([0, np.nan], np.float32)), "log-probability of nan"),
        (Acts([0, 0], np.array([0, np.inf], np.float32)), "log-probability of inf"),
    ],
)
def test_an_actor_that_cannot_be_is_nobody_elses_fault(actor: Actor, words: str) -> None:
    stage = stage_of(Count(), FreshSeeds(), 2, actors={Learned("all"): actor})
    with pytest.raises(BadActError, match=words) as caught:
        alone(stage.collect(News(), 10))
    assert "Learned(policy='all')" in str(caught.value)
    assert (stage.failures.count, stage.running) == (0, 0)


def test_seats_that_nobody_can_take_say_so() -> None:
    with pytest.raises(UsageError, match=r"nobody here can take the seat Learned\(policy='al'\)"):
        alone(stage_of(Count(), FreshSeeds(), 1, Everyone("al")).collect(News(), 1))
    with pytest.raises(UsageError, match="did you mean random"):
        alone(stage_of(Count(), FreshSeeds(), 1, Everyone(Scripted("rand"))).collect(News(), 1))
    with pytest.raises(UsageError, match="2 seats for 1 roles"):
        alone(stage_of(Count(), FreshSeeds(), 1, pair("all", "all")).collect(News(), 1))
    with pytest.raises(UsageError, match="1 to 4096"):
        stage_of(Count(), FreshSeeds(), 0)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_a_play_without_end_is_cut_and_a_collect_ends_after_its_turns() -> None:
    stage = stage_of(Count(10**9), FreshSeeds(), 4, max_turns=5)
    staged = alone(stage.collect(News(), 42))
    assert staged.turns == 44
    assert {len(each.takes[0]) for each in staged.plays} == {5}
    assert all(each.takes[0].cut for each in staged.plays)
    assert (stage.running, staged.is_exhausted) == (4, False)
    assert alone(stage.collect(News(), 1000, is_over=lambda: True)).turns == 4  # at least one step
    stage.close()
    assert stage.running == 0


def test_what_games_hold_is_let_go_of() -> None:
    held = []

    class Holds(Count):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            held.append(scenario.seed)
            try:
                return (yield from super().play(scenario, rng))
            finally:
                held.remove(scenario.seed)

    stage = stage_of(Holds(3), FreshSeeds(), 4, max_turns=2)
    alone(stage.collect(News(), 9))
    assert len(held) == 4
    stage.close()
    assert held == []


def test_a_take_of_large_sights_keeps_its_own_alone() -> None:
    class Large(Count):
        def __post_init__(self) -> None:
            self.roles = {"agent": Role(Box(1000), Discrete(3))}

        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            for turn in range(3):
                yield (Ask("agent", np.full(1000, turn, np.float32)),)
            return End()

    staged = alone(stage_of(Large(), SharedPrompts(8), 8).collect(News()))
    assert {sight.nbytes if sight.base is None else 0 for take in staged.takes for sight in take.sights} == {4000}
    assert not any(sight.flags.writeable for take in staged.takes for sight in take.sights)


# --- failures --------------------------------------------------------------------------------------------------------


class Fails(Count):
    """Does so in the plays of odd seeds, at their second turn."""

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        inner = super().play(scenario, rng)
        (acts,) = ((yield next(inner)),)
        if scenario.seed % 2:
            raise ZeroDivisionError("by chance")
        asks = inner.send(acts)
        while True:
            try:
                asks = inner.send((yield asks))
            except StopIteration as stop:
                return stop.value


def test_a_play_that_raises_is_dropped_and_the_others_are_as_ever() -> None:
    seeds = [2, 3, 4, 6, 7, 8]
    source = Listed([Scenario(seed) for seed in seeds])
    stage = stage_of(Fails(4), source, 3)
    staged = alone(stage.collect(News()))
    assert [each.scenario.seed for each in staged.plays] == [2, 4, 6, 8]
    assert (dict(staged.dropped), stage.failures.count) == ({"failed": 2}, 2)
    assert stage.failures.last.endswith("of count failed in step: ZeroDivisionError: by chance")
    even = alone(stage_of(Count(4), Listed([Scenario(seed) for seed in (2, 4, 6, 8)]), 1).collect(News()))
    for mine, theirs in zip(staged.plays, even.plays, strict=True):
        assert not difference(mine.takes[0], theirs.takes[0])


def test_a_sight_that_is_not_finite_costs_its_own_play_only() -> None:
    class Shows(Count):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            for turn in range(4):
                shown = np.nan if scenario.seed == 1 and turn == 2 else float(turn)
                yield (Ask("agent", np.array([shown], np.float32)),)
            return End()

    actor = Echo()
    stage = stage_of(Shows(), Listed([Scenario(0), Scenario(1), Scenario(2)]), 3, actors={Learned("all"): actor})
    staged = alone(stage.collect(News()))
    assert [each.scenario.seed for each in staged.plays] == [0, 2]
    assert actor.calls == [3, 3, 2, 2]
    assert "the game count, role 'agent': a sight is not finite" in stage.failures.last


def test_a_game_that_never_works_is_given_up_with_the_reason() -> None:
    class Broken(Count):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            raise OSError("no such map")
            yield

    stage = stage_of(Broken(), FreshSeeds(), 4)
    with pytest.raises(TaskFailedError, match="failed in reset: OSError: no such map"):
        alone(stage.collect(News(), 10))
    assert stage.running == 0


def test_start_states_that_do_not_fit_are_played_from_the_beginning() -> None:
    bad = [Scenario(0, acts=(7,)), Scenario(1, acts=(0, 0, 0)), Scenario(2, acts=("x",))]
    staged = alone(stage_of(Count(3), Listed(bad), 2).collect(News()))
    assert [(each.scenario.seed, each.replayed, each.turns) for each in staged.plays] == [
        (0, 0, 3),
        (1, 0, 3),
        (2, 0, 3),
    ]
    assert dict(staged.dropped) == {"scenario": 3}
    assert staged.turns == 12
    assert staged.replayed == 3  # what was replayed in vain was played too


def test_a_source_of_scenarios_that_nobody_can_play_ends_the_collect() -> None:
    class Picky(Count):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            raise BadScenarioError("no question of mine")
            yield

    stage = stage_of(Picky(), FreshSeeds(), 4)
    staged = alone(stage.collect(News(), 100))
    assert (staged.turns, dict(staged.dropped), stage.failures.count) == (0, {"scenario": TRIES}, 0)


def test_a_start_that_leaves_no_turn_to_play_is_none() -> None:
    scenarios = [Scenario(0, acts=(1,) * turns) for turns in (2, 3, 4)]
    staged = alone(stage_of(Count(9), Listed(scenarios), 1, max_turns=4).collect(News()))
    assert [(each.replayed, len(each.takes[0])) for each in staged.plays] == [(2, 2), (3, 1), (0, 4)]
    assert dict(staged.dropped) == {"scenario": 1}


def test_replayed_steps_count_as_steps() -> None:
    staged = alone(stage_of(Count(5), Listed([Scenario(0, acts=(1, 2, 0))]), 1).collect(News()))
    assert (staged.turns, staged.replayed, len(staged.takes[0])) == (5, 3, 2)


def test_the_watchdog_knows_whose_code_runs() -> None:
    places = []

    class Looks(Count):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            for turn in range(2):
                places.append(watch.place_of(watch.page[watch.Slot.PLACE]))
                yield (Ask("agent", np.array([turn], np.float32)),)
            places.append(watch.place_of(watch.page[watch.Slot.PLACE]))
            raise watch.HungError("did not come back in 4 s")

    stage = stage_of(Looks(), Listed([Scenario(0)]), 3)
    staged = alone(stage.collect(News()))
    assert places == [(watch.Act.MAKE, 0), (watch.Act.STEP, 0), (watch.Act.STEP, 0)]
    assert watch.page[watch.Slot.PLACE] == 0
    assert dict(staged.dropped) == {"failed": 1}
    assert stage.failures.last == "environment 0 of count failed in step: did not come back in 4 s"


# --- others ----------------------------------------------------------------------------------------------------------


class Turns:
    """``here`` and ``there`` in turn, three times."""

    name = "turns"

    def __init__(self) -> None:
        self.roles = {"here": Role(Box(1), Discrete(3)), "there": Role(Text(), Discrete(3))}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        total = 0
        for turn in range(3):
            (act,) = yield (Ask("here", np.array([turn], np.float32)),)
            (other,) = yield (Ask("there", f"{scenario.seed} {turn} {act}"),)
            total += 10 * int(act) + int(other)
        return End(scores={"total": total})


AWAY = ByRole(here="all", there=Away("strong", "big"))


def test_asks_of_others_cross_in_one_consult_and_change_nothing_else() -> None:
    source = SharedPrompts(5)
    here = alone(stage_of(Turns(), source, 5).collect(News()))
    staged, asked = drive(stage_of(Turns(), source, 5, AWAY).collect(News()), echo)
    assert_same(here, staged)
    assert [(each.part, each.policy, len(each.takes)) for each in asked] == [("strong", "big", 5)] * 3
    for one in staged.plays:
        mine, theirs = one.takes
        assert (mine.proven, theirs.proven) == (True, False)
        assert np.isnan(theirs.log_probs).all()
    assert staged.unanswered == 0


def test_plays_of_others_go_on_while_one_waits() -> None:
    def cast(news: News, scenario: Scenario, rng: np.random.Generator) -> Any:
        return (Person("guide"),) if scenario.seed == 0 else (Learned("all"),)

    actor, called = Echo(), []

    def answer(consult: Consult) -> Sequence[Act] | None:
        assert (consult.part, consult.policy, len(consult.takes)) == ("guide", None, 1)
        called.append(len(actor.calls))
        return echo(consult)

    source = Listed([Scenario(seed) for seed in range(40)])
    stage = stage_of(Count(3), source, 2, cast, {Learned("all"): actor})
    staged, _ = drive(stage.collect(News()), answer)
    assert len(staged.plays) == 40
    assert called == [PATIENCE + 1, 2 * (PATIENCE + 1), 3 * (PATIENCE + 1)]


def test_who_does_not_answer_is_replaced_for_the_rest_of_the_play() -> None:
    substitute = Echo()
    cast = ByRole(here="all", there=Away("strong", "big", otherwise=Learned("small")))
    actors: dict[Seat, Actor] = {Learned("all"): Echo(), Learned("small"): substitute}
    source = SharedPrompts(4)
    staged, asked = drive(stage_of(Turns(), source, 4, cast, actors).collect(News()), lambda consult: None)
    assert_same(alone(stage_of(Turns(), source, 4).collect(News())), staged)
    assert len(asked) == 1  # not again for these plays: each would wait for the deadline again
    assert substitute.calls == [4, 4, 4]
    assert (staged.unanswered, dict(staged.dropped)) == (4, {})
    assert not any(take.proven for take in staged.takes if take.role == "there")


def test_without_a_substitute_a_play_that_nobody_answers_is_dropped() -> None:
    stage = stage_of(Turns(), SharedPrompts(4), 2, AWAY)
    staged = alone(stage.collect(News()))
    assert (staged.plays, dict(staged.dropped), staged.unanswered, staged.is_exhausted) == (
        (),
        {"unanswered": 4},
        4,
        True,
    )
    assert stage.failures.count == 0


@pytest.mark.parametrize("lie", [[9, 0, 0, 0], ["0", 0, 0, 0], [None, 0, 0, 0], [1.5, 0, 0, 0], [[], 0, 0, 0]])
def test_an_act_that_cannot_be_from_another_member_is_no_answer(lie: list[Any]) -> None:
    staged, _ = drive(
        stage_of(Turns(), SharedPrompts(4), 4, AWAY).collect(News()), lambda consult: lie[: len(consult.takes)]
    )
    assert staged.unanswered >= 1
    assert staged.dropped["unanswered"] == staged.unanswered


def test_a_member_that_answers_another_number_of_acts_has_answered_nothing() -> None:
    staged, _ = drive(stage_of(Turns(), SharedPrompts(3), 3, AWAY).collect(News()), lambda consult: [0] * 2)
    assert dict(staged.dropped) == {"unanswered": 3}


def test_a_collect_that_is_closed_where_it_asks_loses_nothing() -> None:
    source = SharedPrompts(5)
    whole, _ = drive(stage_of(Turns(), source, 5, AWAY).collect(News()), echo)
    stage = stage_of(Turns(), source, 5, AWAY)
    left = stage.collect(News())
    next(left)
    with pytest.raises(UsageError, match="collecting already"):
        next(stage.collect(News()))
    left.close()
    assert stage.running == 5
    staged, _ = drive(stage.collect(News()), echo)
    assert_same(whole, staged)


def test_no_consult_is_larger_than_its_bound() -> None:
    count = MAX_CONSULT + 3
    stage = stage_of(Turns(), SharedPrompts(count), count, AWAY)
    staged, asked = drive(stage.collect(News()), echo)
    assert [len(each.takes) for each in asked] == [MAX_CONSULT, 3] * 3
    assert len(staged.plays) == count


@given(
    kinds=st.lists(st.integers(0, 4), min_size=2, max_size=4),
    seed=st.integers(0, 100),
    plays=st.integers(1, 6),
    answers=st.lists(st.sampled_from(["yes", "no", "half", "wrong"]), min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_no_play_hangs_whatever_others_do(kinds: list[int], seed: int, plays: int, answers: list[str]) -> None:
    game = Tangle(tuple(kinds))
    seats: dict[str, Seat] = {"role_0": Away("p", "q"), "role_1": Away("p", "r", otherwise=Learned("all"))}
    cast = ByRole(**({role: Learned("all") for role in game.roles} | seats))
    turn = iter(range(10**6))

    def answer(consult: Consult) -> Sequence[Act] | None:
        acts = echo(consult)
        match answers[next(turn) % len(answers)]:
            case "yes":
                return acts
            case "no":
                return None
            case "half":
                return acts[: len(acts) // 2]
            case _:
                return [-1] * len(acts)

    stage = stage_of(game, SharedPrompts(8, seed=seed), plays, cast)
    staged, _ = drive(stage.collect(News()), answer)
    assert len(staged.plays) + staged.dropped.get("unanswered", 0) == 8
    assert (staged.is_exhausted, stage.running, stage.failures.count) == (True, 0, 0)
