"""CPMöbius: a coach that is paid late, goes on after a kill, and whose lies and those of others stay small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.crdt.views import Evaluation
from shoal.node.swarm.posting import MAX_AHEAD, newest
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.algorithms.base import Joint
from shoal.training.effects import Scores
from shoal.training.recipes import exercises
from shoal.training.recipes.coaching import CoachObjective, CoachSettings, gain, reports
from shoal.training.recipes.cpmobius import RECIPE
from shoal.training.recipes.exercises import EXERCISE, MAX_TASKS, Tasks, coached
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import Company, manifest_of, peers, play_locally
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.placing import NOWHERE, part_of, parts_of
from shoal.training.recipes.recipe import Part, Recipe, Report
from shoal.training.scored import MAX_EPOCHS, medians
from shoal.training.statements import Posting
from shoal.training.tasks.failures import Failures
from shoal.training.tasks.source import News, Posted, Scenario

TINY: Mapping[str, Any] = {
    "policies.coach.sizes.width": 16,
    "policies.coach.sizes.layers": 1,
    "policies.coach.warm.max_steps": 2,
    "policies.player.sizes.width": 16,
    "policies.player.sizes.layers": 1,
    "policies.player.warm.max_steps": 2,
    "parts.coach.source.per_epoch": 6,
    "source.per_epoch": 4,
    "source.plays": 3,
    "probes.accuracy.source.per_epoch": 6,
    "probes.test.source.per_epoch": 6,
    "turns": 12,
    "plays": 12,
}
NAMES = peers(4)


def tiny() -> Recipe:
    """All of it in seconds."""
    return overridden(RECIPE, TINY)


def coach_of(company: Company) -> RecipeLearner:
    """The one that writes."""
    return next(each for each in company.learners.values() if each.part == "coach")


def epoch(company: Company) -> None:
    """One, with its probes."""
    company.collect()
    company.update()
    company.probe()


def waiting(learner: RecipeLearner) -> list[int]:
    """In which epochs it wrote what it is not paid for."""
    return [each["epoch"] for each in learner._trainees["coach"].memory()["waiting"]]


def posted(meta: Mapping[str, Any], author: PeerId = NAMES[0], epoch: int = 1) -> Posted:
    """A post of anything."""
    return Posted(author, Cid.of_block(repr((meta, author)).encode()), epoch, {}, meta)


# --- between learners ---


def test_a_coach_writes_players_play_it_and_it_is_paid_two_updates_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote in an epoch waits until what came of it is signed; and players play what it wrote."""
    monkeypatch.setattr(exercises, "read_tasks", lambda meta: tuple(enumerate(["s21", "c12"])))
    company = Company(tiny(), peers(3))
    assert [each.part for each in company.learners.values()] == ["player", "coach", "player"]
    coach = coach_of(company)
    seen = []
    for _ in range(6):
        epoch(company)
        seen.append(waiting(coach))
    assert seen == [[], [1], [1, 2], [2, 3], [3, 4], [4, 5]]
    player = company.learners[peers(3)[0]]
    solved = [each for topic, each in company.board._posted if topic == exercises.SOLVED]
    assert {each.author for each in solved} == set(peers(3)) - {peers(3)[1]}
    assert set(player._news.evaluations["accuracy"]) == {1, 2, 3, 4, 5}


def test_a_coach_that_is_killed_is_paid_for_what_it_wrote_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, that has what it remembered from its file."""
    monkeypatch.setattr(exercises, "read_tasks", lambda meta: tuple(enumerate(["s21", "c12"])))
    company = Company(tiny(), peers(3))
    coach = coach_of(company)
    coach.settle_in(tmp_path)
    for _ in range(4):
        epoch(company)
    before = coach._trainees["coach"].memory()
    assert len(before["waiting"]) > 0
    name = peers(3)[1]
    again = RecipeLearner(tiny(), manifest_of(tiny(), name), Failures("x"), peer=name, life="2", part="coach")
    again.settle_in(tmp_path)
    again.import_state(coach.export_state())
    assert again._trainees["coach"].memory() == before
    company.learners[name] = again
    epoch(company)
    assert len({each._trainees["coach"].model.flat.tobytes() for each in company.learners.values()}) == 1
    assert [each["epoch"] for each in before["waiting"]] == [2, 3]
    assert waiting(again) == [2, 3, 4], "what players said of it is heard with its first update"
    epoch(company)
    assert waiting(again) == [4, 5]


def test_an_update_that_fails_leaves_what_is_remembered() -> None:
    """What would have been written twice is written once."""
    company = Company(tiny(), peers(3))
    for _ in range(3):
        epoch(company)
    company.collect()
    coach = coach_of(company)
    before = coach._trainees["coach"].memory()
    update = coach.update()
    asked = next(update)
    while not isinstance(asked, Joint):
        asked = update.send(company.board.answer(peers(3)[1], 3, asked))
    assert coach._trainees["coach"].memory() != before
    update.close()
    assert coach._trainees["coach"].memory() == before


def test_a_whole_run_and_its_baseline_in_one_process_report_their_probes() -> None:
    """In seconds; what came of the claim at full size is in benchmarks/results/recipes.md."""
    reports = [play_locally(overridden(tiny(), settings), 3, epochs=3) for settings in ({}, RECIPE.baseline)]
    verdict = RECIPE.verdict(*reports)
    assert math.isfinite(verdict.figure)
    assert [each for each, _ in reports[0].scores["test"]] == [1, 2, 3]
    assert reports[0].env_steps == reports[1].env_steps


def test_the_verdict_is_the_claim() -> None:
    """A gain, and more than by chance."""

    def report(last: float) -> Report:
        return Report({"test": ((1, 0.4), *((epoch, last) for epoch in range(2, 7)))}, 6, 1, 1.0, 3)

    assert RECIPE.verdict(report(0.6), report(0.5)).holds
    assert not RECIPE.verdict(report(0.5), report(0.6)).holds
    assert not RECIPE.verdict(report(0.3), report(0.2)).holds


# --- parts ---


def test_nodes_that_were_not_told_spread_over_the_parts_with_their_first_update() -> None:
    """All at once; one that was told is counted, and a newcomer takes what is wanted most."""
    parts = {"player": Part(share=2), "coach": Part()}
    assert parts_of(6, parts) == ["player", "coach", "player", "player", "coach", "player"]
    said = np.array([[7, NOWHERE], [3, NOWHERE], [5, NOWHERE], [9, 1]])
    assert [part_of(number, said, parts) for number in (3, 5, 7, 9)] == ["player", "player", "player", ""]
    company = Company(tiny(), peers(3))
    for name in company.learners:
        company.learners[name] = RecipeLearner(tiny(), manifest_of(tiny(), name), Failures("x"), peer=name, life="0")
    assert {each.part for each in company.learners.values()} == {""}
    epoch(company)
    assert sorted(each.part for each in company.learners.values()) == ["coach", "player", "player"]


def test_a_part_that_was_agreed_on_is_kept_in_another_life(tmp_path: Path) -> None:
    """Unless the node is told another."""
    company = Company(tiny(), peers(1))
    name = peers(1)[0]
    learner = company.learners[name] = RecipeLearner(tiny(), manifest_of(tiny(), name), Failures("x"), peer=name)
    learner.settle_in(tmp_path)
    epoch(company)
    for told, part in (("", "player"), ("coach", "coach")):
        again = RecipeLearner(tiny(), manifest_of(tiny(), name), Failures("x"), peer=name, part=told)
        again.settle_in(tmp_path)
        assert again.part == part


# --- what members sign ---


def signed(author: PeerId, epoch: int, score: float, probe: str = "accuracy") -> Evaluation:
    """An evaluation."""
    return Evaluation(epoch, Cid.of_block(b""), 0.0, 0, 1, author, ((probe, score),))


def test_one_liar_among_three_evaluators_moves_a_score_nowhere_but_between_honest_ones() -> None:
    """The median; who is out does not count, nor what is of no epoch that was asked for."""
    told = [signed(NAMES[0], 1, 0.5), signed(NAMES[1], 1, 0.6), signed(NAMES[2], 1, 1e300), signed(NAMES[2], 9, 1.0)]
    (found,) = medians(told, ("accuracy",), 0, 5, set(NAMES))
    assert (found.epoch, found.score, found.members) == (1, 0.6, 3)
    assert medians(told, ("accuracy",), 0, 5, {NAMES[0]})[0].score == 0.5
    assert medians(told[1:3], ("accuracy",), 0, 5, set(NAMES))[0].score == 0.6, "of two, the lower"
    assert medians(told, ("else",), 0, 5, set(NAMES)) == ()


def test_what_is_told_of_scores_is_bounded() -> None:
    """In epochs, in names and in their lengths."""
    told = [signed(NAMES[0], epoch, 0.5) for epoch in range(1000)]
    assert len(medians(told, ("accuracy",), 0, 999, set(NAMES))) == MAX_EPOCHS
    for probes in ((), ("x" * 100,), tuple(map(str, range(17)))):
        with pytest.raises(UsageError, match="probes"):
            Scores(probes)


def test_a_gain_is_of_two_scores_that_are_known_and_no_larger_than_can_be() -> None:
    """Whatever an evaluator says."""
    assert gain({1: 0.25, 2: 0.5}, 1) == 0.25
    assert gain({1: 0.25}, 1) is None
    assert gain({1: -1e300, 2: 1e300}, 1) == 1.0


# --- hostile posts ---


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"tasks": "s21"},
        {"tasks": {"0": "s21"}},
        {"tasks": ["s21"] * (MAX_TASKS + 1)},
        {"tasks": [1, None, ["s21"], {"s21": 1}]},
        {"tasks": ["s" + "1" * 10_000, "x12", "s1", "s²³", "", "s12\n"]},
    ],
)
def test_what_a_lying_coach_writes_is_passed_over(meta: dict[str, Any]) -> None:
    """And the players play what chance gives."""
    news = News(2, posts={exercises.TASKS: (posted(meta),)})
    assert coached(news) == ()
    drawn = Tasks(4, 2, share=1.0).draw(news, np.random.default_rng(0))
    assert drawn is not None
    assert "post" not in drawn.params
    assert EXERCISE.solve(drawn.params["prompt"]) is not None


def test_a_coach_has_no_more_than_its_part_of_the_tasks_however_much_it_posts() -> None:
    """Of two coaches each has half of the share, and what is of another time counts for nothing."""
    flood = [posted({"tasks": ["m11"] * 9}, NAMES[0], epoch) for epoch in (5, 4, 3, 2)]
    future = posted({"tasks": ["a99"]}, NAMES[2], 2**40)
    honest = posted({"tasks": ["s21", "r12"]}, NAMES[1], 4)
    source, rng = Tasks(400, 1, share=0.75), np.random.default_rng(0)
    posts = {exercises.TASKS: (future, *flood, honest)}
    drawn = [source.draw(News(5, posts=posts, drawn=number), rng) for number in range(400)]
    of = [each.params.get("post") for each in drawn if isinstance(each, Scenario)]
    assert 100 < of.count(str(flood[0].cid)) < 200
    assert 100 < of.count(str(honest.cid)) < 200
    assert 60 < of.count(None) < 140
    assert str(future.cid) not in of


def test_what_a_lying_player_says_of_tasks_is_no_rate_or_one_among_others() -> None:
    """Between 0 and 1, once for each player, of an epoch in which it can have played them."""
    cid = "b1"
    said: list[tuple[dict[str, Any], PeerId, int]] = [
        ({"posts": {cid: {"0": 0.5, "1": 7.0, "9": 1.0, "x": 1.0}}}, NAMES[0], 2),
        ({"posts": {cid: {"0": 1.0}}}, NAMES[0], 2),
        ({"posts": {cid: {"0": 1.0}}}, NAMES[1], 2**40),
        ({"posts": [cid]}, NAMES[2], 2),
        ({"posts": {cid: {"0": math.nan, "1": "1"}}}, NAMES[3], 2),
    ]
    assert reports([posted(*each) for each in said], cid, 1, 2) == [(2, {0: 0.5})]


@pytest.mark.parametrize(
    "memory",
    [
        {"waiting": "no"},
        {"waiting": [{"cid": "b"}]},
        {"waiting": [{"cid": "b", "epoch": 1, "sights": ["a"], "tasks": []}]},
        {"past": [[math.nan]]},
        {"past": [[0.0]] * 99},
    ],
)
def test_a_memory_that_no_coach_has_is_refused(memory: dict[str, Any]) -> None:
    """And the coach has the one that it had."""
    objective = CoachObjective(CoachSettings())
    with pytest.raises(ProtocolError, match="begins anew"):
        objective.remember(memory)
    assert objective.memory() == {"waiting": [], "past": []}


def test_one_that_posts_without_end_takes_nobody_elses_place() -> None:
    """The newest of each comes first, and what is of an epoch to come does not count."""

    def of(author: PeerId, epoch: int) -> tuple[Posting, PeerId]:
        return Posting("tasks", Cid.of_block(f"{author}{epoch}".encode()), epoch, 1), author

    flood = [of(NAMES[0], epoch) for epoch in range(4, 8)]
    chosen = newest([*flood, of(NAMES[1], 1), of(NAMES[2], 8 + MAX_AHEAD)], 3, 7)
    assert [(each.epoch, author) for each, author in chosen] == [(7, NAMES[0]), (6, NAMES[0]), (1, NAMES[1])]
