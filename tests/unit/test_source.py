"""Sources draw the same from the same; a hostile post leads nowhere; a curriculum follows what was achieved."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.tasks.cast import (
    SCRIPTS,
    Away,
    ByRole,
    Everyone,
    Learned,
    Person,
    Scripted,
    Seats,
    kind_of_role,
    pair,
    scripted,
    seated,
)
from shoal.training.tasks.play import Box, Continuous, Discrete, Role, Take, Text
from shoal.training.tasks.source import (
    ByOutcome,
    FreshSeeds,
    Listed,
    News,
    OwnPrompts,
    Posted,
    Scenario,
    SharedPrompts,
    Source,
    Starts,
    outcomes,
    trajectory,
)
from shoal.training.tasks.stage import Stage, alone

from .plays import Count, Echo, Tangle

RNG = np.random.default_rng


def draws(source: Source, news: News, count: int, seed: int = 0) -> list[Scenario | None]:
    rng = RNG(seed)
    return [source.draw(News(news.epoch, news.env_steps, news.outcomes, {}, news.posts, n), rng) for n in range(count)]


@settings(deadline=None)
@given(per_epoch=st.integers(1, 5), plays=st.integers(1, 4), epoch=st.integers(0, 99))
def test_shared_prompts_are_so_many_and_hang_on_the_epoch_alone(per_epoch: int, plays: int, epoch: int) -> None:
    source = SharedPrompts(per_epoch, plays)
    drawn = draws(source, News(epoch), per_epoch * plays + 2)
    assert drawn[-2:] == [None, None]
    seeds = [each.seed for each in drawn if each is not None]
    assert Counter(Counter(seeds).values()) == {plays: per_epoch}
    assert seeds == [each.seed for each in draws(source, News(epoch), per_epoch * plays, seed=9) if each is not None]
    assert seeds[0] != draws(source, News(epoch + 1), 1)[0].seed  # type: ignore[union-attr]
    fixed = SharedPrompts(per_epoch, plays, is_fixed=True)
    assert draws(fixed, News(epoch), 3) == draws(fixed, News(epoch + 1), 3)


def test_a_list_is_played_once_an_epoch() -> None:
    scenarios = [Scenario(5), Scenario(3)]
    assert draws(Listed(scenarios), News(), 3) == [*scenarios, None]


def test_fresh_seeds_are_fresh() -> None:
    drawn = draws(FreshSeeds({"map": 1}, 7, "t"), News(), 50)
    assert len({each.seed for each in drawn if each is not None}) == 50
    assert drawn[0] is not None
    assert (drawn[0].params, drawn[0].max_turns, drawn[0].tag) == ({"map": 1}, 7, "t")


def test_a_curriculum_goes_where_outcomes_are_open() -> None:
    source = ByOutcome({"easy": {"n": 1}, "even": {"n": 2}, "hard": {"n": 3}, "new": {"n": 4}}, floor=0.01)
    seen = {"level/easy": 1.0, "level/even": 0.5, "level/hard": 0.0}
    news = News(outcomes={tag: Moments(10.0, np.array(mean), np.array(0.0)) for tag, mean in seen.items()})
    counts = Counter(each.tag for each in draws(source, news, 2000) if each is not None)
    share = {name: counts[f"level/{name}"] / 2000 for name in source.levels}
    assert share["easy"] + share["hard"] < 0.08
    assert abs(share["even"] - share["new"]) < 0.06
    assert share["easy"] > 0


def post(arrays: Arrays, meta: dict[str, object]) -> Posted:
    return Posted(PeerId("12D3KooW"), Cid("bafy"), 0, arrays, meta)


def test_starts_are_states_of_what_was_posted_until_the_budget_is_used() -> None:
    stage = Stage(Count(6), FreshSeeds(), Everyone("a"), {Learned("a"): Echo()}, 1)
    (one,) = alone(stage.collect(News(), 6)).plays
    arrays, meta = trajectory(one)
    posts = {"trajectories": (post(arrays, meta),)}
    source = Starts(budget=100, max_turns=2)
    drawn = [each for each in draws(source, News(env_steps=99, posts=posts), 60) if each is not None]
    assert {each.seed for each in drawn} == {one.scenario.seed}
    assert {len(each.acts) for each in drawn} == set(range(6))
    assert all(each.acts == one.acts[: len(each.acts)] for each in drawn)
    after = [each for each in draws(source, News(env_steps=100, posts=posts), 20) if each is not None]
    assert not any(each.acts for each in after)
    staged = alone(Stage(Count(6), Listed(drawn), Everyone("a"), {Learned("a"): Echo()}, 8).collect(News()))
    assert len(staged.plays) == 60
    assert {played.replayed for played in staged.plays} == set(range(6))
    assert dict(staged.dropped) == {}


@pytest.mark.parametrize(
    ("arrays", "meta"),
    [
        ({}, {"seed": 1}),
        ({"acts": np.zeros(3, np.int64)}, {}),
        ({"acts": np.zeros(3, np.int64)}, {"seed": "1"}),
        ({"acts": np.zeros(3, np.int64)}, {"seed": -1}),
        ({"acts": np.zeros(3, np.int64)}, {"seed": True}),
        ({"acts": np.zeros(3, np.float64)}, {"seed": 1}),
        ({"acts": np.zeros((3, 2), np.int64)}, {"seed": 1}),
        ({"acts": np.zeros((3, 2, 2), np.float32)}, {"seed": 1}),
        ({"acts": np.zeros(0, np.int64)}, {"seed": 1}),
        ({"acts": np.array(5)}, {"seed": 1}),
        ({"acts": np.zeros(100_001, np.int64)}, {"seed": 1}),
    ],
)
def test_a_post_that_is_no_trajectory_is_passed_over(arrays: Arrays, meta: dict[str, object]) -> None:
    news = News(posts={"trajectories": (post(arrays, meta),)})
    assert all(each is not None and each.acts == () for each in draws(Starts(budget=100), news, 5))


def test_a_trajectory_of_words_is_not_posted() -> None:
    stage = Stage(Tangle((2,)), FreshSeeds(), Everyone("a"), {Learned("a"): Echo()}, 1)
    with pytest.raises(UsageError, match="choose another play"):
        trajectory(alone(stage.collect(News(), 6)).plays[0])


def test_outcomes_are_moments_of_a_score_by_tag() -> None:
    scenarios = [Scenario(number, tag="even" if number % 2 == 0 else "odd") for number in range(10)]
    staged = alone(Stage(Count(2), Listed(scenarios), Everyone("a"), {Learned("a"): Echo()}, 3).collect(News()))
    found = outcomes(staged.plays, "said")
    assert {tag: each.count for tag, each in found.items()} == {"even": 5, "odd": 5}
    said = [played.scores["said"] for played in staged.plays if played.scenario.tag == "odd"]
    assert float(found["odd"].mean) == pytest.approx(np.mean(said))
    assert outcomes(staged.plays, "unheard") == {}


# --- casts -----------------------------------------------------------------------------------------------------------

ROLES = {name: Role(Box(1), Discrete(2)) for name in ("agent_0", "agent_1", "guide")}


def cast_of(cast: object) -> Seats:
    return cast(News(), Scenario(0), RNG(0))  # type: ignore[operator, no-any-return]


def test_seats_go_by_role_by_kind_of_role_or_by_order() -> None:
    by_kind = ByRole(agent="weak", guide=Person("human"))
    assert seated(ROLES, cast_of(by_kind)) == {
        "agent_0": Learned("weak"),
        "agent_1": Learned("weak"),
        "guide": Person("human"),
    }
    mixed = ByRole(agent="weak", agent_1=Scripted("random"), guide=Away("p", "q"))
    assert seated(ROLES, cast_of(mixed))["agent_1"] == Scripted("random")
    assert set(seated(ROLES, cast_of(Everyone("one"))).values()) == {Learned("one")}
    two = {name: ROLES[name] for name in ("agent_1", "guide")}
    assert seated(two, cast_of(pair("a", "b"))) == {"agent_1": Learned("a"), "guide": Learned("b")}
    assert kind_of_role("simple_agent_12") == "simple_agent"
    assert kind_of_role("agent") == "agent"


@pytest.mark.parametrize(
    ("cast", "words"),
    [
        (pair("a", "b"), "2 seats for 3 roles"),
        (ByRole(agent="a"), "no seat for the role 'guide'; it has some for agent"),
        (ByRole(agent="a", guide="a", gide="b"), "'gide', which the game has no role for; did you mean guide"),
    ],
)
def test_a_cast_that_does_not_fit_the_game_says_so(cast: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        seated(ROLES, cast_of(cast))


def take_of(spaces: Role, legal: list[bool] | None = None) -> Take:
    take = Take("a", spaces, Scripted("random"), Scenario(0), 0)
    take.legal = [] if legal is None else [np.array(legal)]
    return take


def test_the_random_script_is_even_over_what_is_legal_and_knows_its_chances() -> None:
    takes = [take_of(Role(Box(1), Discrete(4)), [True, False, True, False])] * 400
    acts, log_probs = scripted("random").act(takes, RNG(0), greedy=False)
    assert set(map(int, acts)) == {0, 2}  # type: ignore[call-overload]
    assert abs(list(acts).count(0) - 200) < 50
    assert np.exp(log_probs) == pytest.approx(0.5)
    (numbers,), (density,) = scripted("random").act([take_of(Role(Box(1), Continuous(3)))], RNG(0), greedy=False)
    assert isinstance(numbers, np.ndarray)
    assert np.exp(density) == pytest.approx(1 / 8)
    with pytest.raises(UsageError, match="cannot talk"):
        scripted("random").act([take_of(Role(Text(), Text()))], RNG(0), greedy=False)


def test_the_first_script_does_the_first_legal_thing() -> None:
    takes = [take_of(Role(Box(1), Discrete(3)), [False, False, True]), take_of(Role(Box(1), Text()))]
    acts, log_probs = scripted("first").act(takes, RNG(0), greedy=False)
    assert (list(acts), log_probs.tolist()) == ([2, ""], [0, 0])
    assert set(SCRIPTS) == {"first", "random"}


def test_own_prompts_are_others_on_every_member_and_the_same_again() -> None:
    """In groups of plays of one scenario."""
    rng = np.random.default_rng(0)

    def seeds(own: int) -> list[int]:
        drawn = (OwnPrompts(3, 2).draw(News(epoch=1, drawn=number, own=own), rng) for number in range(7))
        return [each.seed for each in drawn if each is not None]

    assert len(seeds(1)) == 6
    assert len(set(seeds(1))) == 3
    assert seeds(1) == seeds(1)
    assert not set(seeds(1)) & set(seeds(2))


def test_what_a_stage_tells_a_source_is_all_that_it_was_told_and_how_many_were_drawn() -> None:
    """Every field of the news, whatever is added to them."""
    heard: list[News] = []

    class Listening:
        def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
            heard.append(news)
            return None

    told = News(3, 4, {"a": Moments.none()}, {"b": 1.0}, {"c": ()}, own=5, place=6)
    alone(Stage(Count(2), Listening(), Everyone(Scripted("first")), {}, 1).collect(told))
    assert heard == [told]
    assert all(getattr(told, each.name) != each.default for each in fields(News) if each.name != "drawn")
