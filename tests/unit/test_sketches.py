"""What the sketches of recipes need of plays, sources and casts, each in a few lines: they run as they were meant."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from shoal.protocol.ids import Cid, PeerId
from shoal.training.tasks.cast import Away, Everyone, Learned, pair
from shoal.training.tasks.games.text import TextTask, entry_of, multi_step_sums, sort_digits
from shoal.training.tasks.play import Ask, End, Role, Text
from shoal.training.tasks.source import Listed, News, Posted, Scenario, SharedPrompts, outcomes
from shoal.training.tasks.stage import Stage, alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.training.tasks.play import Act, Play, Take


class Model:
    """It sorts digits, adds, hints; and errs as often as it is told."""

    def __init__(self, errs: float = 0.0) -> None:
        self.errs, self.calls = errs, 0

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[Act], np.ndarray]:
        self.calls += 1
        acts: list[Act] = []
        for take in takes:
            question = take.sights[-1].split("|")[0]
            right = multi_step_sums.solve(question) or sort_digits.solve(question) or "8"
            acts.append(f"{right}{rng.integers(9)}" if rng.random() < self.errs else right)
        return acts, np.zeros(len(takes), np.float32)


def test_ballots_of_three_members_line_up_and_their_vote_is_better_than_each() -> None:
    """RLCCF: the same prompts on every member, G plays of each one after the other."""
    prompts, plays = 12, 8
    ballots, shares = [], []
    for member in range(3):
        actors = {Learned("own"): Model(0.4)}
        stage = Stage(TextTask(sort_digits), SharedPrompts(prompts, plays), Everyone("own"), actors, 32, seed=member)
        takes = alone(stage.collect(News(epoch=3))).takes
        ballots.append(np.array([take.acts[0] for take in takes]).reshape(prompts, plays))
        shares.append(np.mean([take.earned for take in takes]))
        questions = [take.sights[0] for take in takes[::plays]]
    votes = [Counter(np.concatenate([own[p] for own in ballots])).most_common(1)[0][0] for p in range(prompts)]
    assert votes == ["".join(sorted(question)) for question in questions]
    assert max(shares) < 0.8


def test_a_coachs_tasks_are_what_players_play_and_their_outcomes_come_back() -> None:
    """CPMöbius: one part writes tasks, another plays them; outcomes are merged by tag."""

    class Coach:
        roles = {"coach": Role(Text(), Text())}  # noqa: RUF012  as a recipe writes it

        def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
            (task,) = yield (Ask("coach", scenario.params["profile"], max_tokens=8),)
            return End({"coach": 0.0}, scores={"valid": float(str(task).isdecimal())})

    class CoachTasks:
        def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
            post = news.posts["tasks"][int(rng.integers(len(news.posts["tasks"][:4])))]
            number = int(rng.integers(len(post.meta["tasks"])))
            return Scenario(number, {"prompt": post.meta["tasks"][number]}, tag=f"coach/{post.epoch}")

    class Writes(Model):
        def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> Any:
            return [str(rng.integers(10**4)) for _ in takes], np.zeros(len(takes), np.float32)

    coach = Stage(Coach(), Listed([Scenario(n, {"profile": "0.3"}) for n in range(6)]), Everyone("coach"),
                  {Learned("coach"): Writes()}, 6)  # fmt: skip
    written = alone(coach.collect(News(epoch=2)))
    post = Posted(PeerId("12D3"), Cid("bafy"), 2, meta={"tasks": [take.acts[0] for take in written.takes]})
    player = Stage(TextTask(sort_digits), CoachTasks(), Everyone("player"), {Learned("player"): Model(0.5)}, 8)
    played = alone(player.collect(News(epoch=3, posts={"tasks": (post,)}), 64))
    solved = outcomes(played.plays, "right")
    assert set(solved) == {"coach/2"}
    assert 0.2 < float(solved["coach/2"].mean) < 0.8
    assert {take.sights[0] for take in played.takes} <= set(post.meta["tasks"])


class Guided:
    """Hawkeye: a large model hints, a small one answers."""

    roles = {"large": Role(Text(), Text()), "small": Role(Text(), Text())}  # noqa: RUF012  as a recipe writes it
    budget, price = 4, 0.01

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        entry = entry_of(multi_step_sums, scenario)
        (hint,) = yield (Ask("large", entry["question"], max_tokens=self.budget),)
        (answer,) = yield (Ask("small", f"{entry['question']}|{hint}|", max_tokens=8),)
        right, length = multi_step_sums.score(str(answer), entry), len(str(hint))
        rewards = {"large": right - self.price * length, "small": right}
        return End(rewards, scores={"right": right, "tokens": float(length)})


def test_two_members_models_play_one_play_and_only_text_crosses() -> None:
    """Hawkeye: one batch of texts per turn, however many plays there are; the other member answers by its own actor."""
    large, small = Model(), Model()
    stage = Stage(
        Guided(),
        SharedPrompts(24),
        lambda news, scenario, rng: {"large": Learned("large"), "small": Away("small", "small")},
        {Learned("large"): large},
        24,
    )
    collecting, crossed = stage.collect(News()), []
    given = None
    while True:
        try:
            consult = collecting.send(given)
        except StopIteration as stop:
            staged = stop.value
            break
        crossed.append([take.sights[-1] for take in consult.takes])
        given = small.act(consult.takes, np.random.default_rng(0), greedy=False)[0]
    assert [len(texts) for texts in crossed] == [24]
    assert all(text.endswith("|") for text in crossed[0])
    assert (large.calls, small.calls) == (1, 1)
    assert {played.scores["right"] for played in staged.plays} == {1.0}
    assert {take.proven for take in staged.takes if take.role == "small"} == {False}
    assert all(take.earned == pytest.approx(1 - 0.01 * len(take.acts[0])) for take in staged.takes if take.proven)


def test_the_cells_of_a_matrix_differ_by_their_cast_alone() -> None:
    """The Collaboration Gap: every pair of models plays the same scenarios."""
    actors = {Learned("good"): Model(), Learned("bad"): Model(1.0)}
    cells = {}
    for first in ("good", "bad"):
        for second in ("good", "bad"):
            stage = Stage(Guided(), SharedPrompts(8, is_fixed=True), pair(first, second), actors, 4)
            staged = alone(stage.collect(News(), greedy=True))
            cells[first, second] = np.mean([played.scores["right"] for played in staged.plays])
            seeds = [played.scenario.seed for played in staged.plays]
    assert cells == {("good", "good"): 1, ("good", "bad"): 0, ("bad", "good"): 1, ("bad", "bad"): 0}
    source = SharedPrompts(8, is_fixed=True)
    drawn = (source.draw(News(drawn=number), np.random.default_rng(0)) for number in range(8))
    assert seeds == [scenario.seed for scenario in drawn if scenario is not None]


def test_a_growing_horizon_is_a_source_of_three_lines() -> None:
    """AgentGym-RL: short plays first, longer ones later; a pure function of the epoch."""

    class Growing:
        def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
            return replace(Scenario(int(rng.integers(2**32))), max_turns=2 + news.epoch)

    from .plays import Count, Echo

    stage = Stage(Count(9), Growing(), Everyone("a"), {Learned("a"): Echo()}, 2)
    lengths = {}
    for epoch in range(3):
        staged = alone(stage.collect(News(epoch=epoch), 40))
        lengths[epoch] = {len(take) for take in staged.takes if take.version == epoch}
    assert lengths == {0: {2}, 1: {3}, 2: {4}}
