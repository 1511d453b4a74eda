"""Takes and acts on their way between nodes, posts, and parts: what comes is held to what it can be."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.clone import Clone
from shoal.training.effects import Latest, Post
from shoal.training.recipes.hawkeye import RECIPE as HAWKEYE
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import Company, manifest_of, peers
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.recipe import Recipe
from shoal.training.recipes.rlccf import RECIPE as RLCCF
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.failures import Failures
from shoal.training.tasks.play import Box, Continuous, Discrete, Role, Take, Text
from shoal.training.tasks.source import News, Posted, Scenario
from shoal.training.tasks.wire import MAX_TAKES, decode_acts, decode_takes, encode_acts, encode_takes

ROLES = {
    "talker": Role(Text(20), Text(20)),
    "walker": Role(Box(3), Continuous(2)),
    "chooser": Role(Box(2), Discrete(4)),
}
TINY = {
    "policies.own.sizes.width": 16,
    "policies.own.sizes.layers": 1,
    "policies.own.owner": "all",
    "policies.own.is_varied": False,
    "policies.own.warm.max_steps": 1,
    "source.per_epoch": 2,
    "source.plays": 2,
    "probes.accuracy.source.per_epoch": 2,
    "plays": 4,
    "turns": 4,
}


def take(role: str, sights: Sequence[Any], acts: Sequence[Any], legal: Any = None) -> Take:
    """One that waits for an act."""
    made = Take(role, ROLES[role], Learned("own"), Scenario(7, tag="t"), 0)
    made.sights, made.acts = list(sights), list(acts)
    if legal is not None:
        made.legal = [None] * len(acts) + [legal]
    made.max_tokens = 5
    return made


def test_takes_and_acts_come_as_they_went() -> None:
    """Text, numbers, choices with what is legal."""
    legal = np.array([True, False, True, False])
    waiting = [
        take("talker", ["hello", "again"], ["yes"]),
        take("walker", [np.arange(3, dtype=np.float32), np.ones(3, np.float32)], [np.zeros(2, np.float32)]),
        take("chooser", [np.zeros(2, np.float32)], [], legal),
    ]
    came = decode_takes(encode_takes(waiting), ROLES, Learned("small"))
    for before, after in zip(waiting, came, strict=True):
        assert (after.role, after.max_tokens, after.scenario.seed, after.proven) == (before.role, 5, 7, False)
        for mine, theirs in zip(before.sights + before.acts, after.sights + after.acts, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(came[2].asked_legal, legal)
    acts = ("yes", np.array([0.5, -1], np.float32), 2)
    for one, other in zip(acts, decode_acts(encode_acts(acts), [each.acts for each in ROLES.values()]), strict=True):
        np.testing.assert_array_equal(one, other)


@given(st.binary(max_size=300))
def test_bytes_from_anybody_are_takes_or_refused(data: bytes) -> None:
    """And acts likewise."""
    for read in (lambda: decode_takes(data, ROLES, Learned("x")), lambda: decode_acts(data, [Text(20)])):
        try:
            read()
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [
        (take("talker", ["a" * 21], []), "characters"),
        (take("talker", ["a"], ["b"]), "waits for no act"),
        (take("walker", [np.full(3, np.nan, np.float32)], []), "walker|numbers|finite"),
        (take("walker", [np.zeros(4, np.float32)], []), "take 0"),
        (take("chooser", [np.zeros(2, np.float32), np.zeros(2, np.float32)], [9]), "not 0 to 3"),
        (take("chooser", [np.zeros(2, np.float32)], [], np.zeros(4, np.bool_)), "no act is legal"),
    ],
)
def test_takes_that_no_game_shows_are_refused(waiting: Take, reason: str) -> None:
    """Before any policy sees them."""
    with pytest.raises(ProtocolError, match=reason):
        decode_takes(encode_takes([waiting]), ROLES, Learned("small"))


def test_too_much_for_one_question_is_not_asked() -> None:
    """Nor is an answer of another number taken."""
    with pytest.raises(UsageError, match="play fewer"):
        encode_takes([take("talker", ["a"], [])] * (MAX_TAKES + 1))
    with pytest.raises(ProtocolError, match="1 acts answer 2"):
        decode_acts(encode_acts(["a"]), [Text(20), Text(20)])
    with pytest.raises(ProtocolError, match="no act"):
        decode_acts(encode_acts([5]), [Discrete(3)])


def learner(recipe: Recipe, part: str) -> RecipeLearner:
    """One node's."""
    name = peers(1)[0]
    return RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, part=part)


def test_a_part_answers_by_its_policies_and_by_no_others() -> None:
    """And not with takes of another game."""
    sizes = {f"policies.{name}.sizes.{size}": value for name in ("large", "small") for size, value in (("width", 16),)}
    recipe = overridden(HAWKEYE, sizes)
    small, large = learner(recipe, "small"), learner(recipe, "large")
    asked = Take("small", recipe.game.roles["small"], Learned("small"), Scenario(1), 0)
    asked.sights, asked.max_tokens = ["1+2+3|6"], 2
    (answer,) = decode_acts(small.answer("small", encode_takes([asked])), [Text(64)])
    assert isinstance(answer, str)
    assert len(answer) <= 2
    for who, policy in ((small, "large"), (large, "small"), (small, "nobody")):
        with pytest.raises(UsageError, match="does not answer"):
            who.answer(policy, encode_takes([asked]))
    with pytest.raises(ProtocolError, match="no role"):
        small.answer("small", encode_takes([take("talker", ["a"], [])]))
    with pytest.raises(UsageError, match="large"):
        learner(recipe, "lrage")


def test_who_plays_a_part_that_does_not_play_takes_part_with_nothing_to_give() -> None:
    """Its share is done at once."""
    recipe = overridden(HAWKEYE, {"policies.large.sizes.width": 16, "policies.large.warm.max_steps": 1})
    idle = learner(overridden(recipe, {"policies.small.warm.max_steps": 1}), "small")
    assert idle.collect(8).samples == 0
    assert idle.samples >= recipe.turns


class Poster(Clone):
    """Clones, posts what it saw, and asks for what the others did."""

    name = "poster"
    heard: ClassVar[list[tuple[Posted, ...]]] = []

    def prepare(self, takes: Sequence[Take], model: Any, news: News) -> Generator[Any, Any, Any]:
        """Post, ask, learn."""
        yield Post("seen", {"count": np.asarray(len(takes))}, {"epoch": news.epoch})
        self.heard.append((yield Latest("seen", count=2)))
        return (yield from super().prepare(takes, model, news))


def test_what_is_posted_is_read_by_all_newest_first() -> None:
    """By an objective between its exchanges, and by sources from the news."""
    recipe = replace(overridden(RLCCF, TINY), objectives=lambda: (Poster,), topics=("seen",))
    own = replace(recipe.policies["own"], objective="poster", settings={})
    company = Company(replace(recipe, policies={"own": own}), peers(2))
    Poster.heard.clear()
    for _ in range(3):
        company.collect()
        company.update()
    assert {len(each) for each in Poster.heard} <= {1, 2}
    newest = next(iter(company.learners.values()))._news.posts["seen"]
    assert [post.epoch for post in newest] == [2, 2, 1, 1]
    assert newest[0].meta == {"epoch": 2}
    assert int(newest[0].arrays["count"]) == 4


def test_a_topic_that_can_be_none_is_refused() -> None:
    """Before anything is asked."""
    for topic in ("", "a" * 41, "a\nb"):
        with pytest.raises(UsageError, match="topic"):
            Latest(topic)
