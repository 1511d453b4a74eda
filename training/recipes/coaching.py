"""How `cpmobius` learns: the player by what most of its plays answer, the coach by what the player gains."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ProtocolError
from shoal.training.algorithms.grpo import GRPO, GRPOBatch, GRPOSettings
from shoal.training.algorithms.settings import setting
from shoal.training.effects import Effect, Post
from shoal.training.models.text import TextModel
from shoal.training.recipes.exercises import EXERCISE, KINDS, MAX_AGE, MAX_TASKS, SOLVED, TASKS, Coaching
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News, Plain, Posted, Scenario

MAX_WAITING: Final = 8
"""Epochs that a coach waits for what it wrote to be paid for,"""
MAX_PAST: Final = 8
"""and whose rewards it compares new ones with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayerSettings(GRPOSettings):
    """What can be set of it."""

    agreement: float = setting(
        0.5, "share of a task's plays that have to answer the same for it to be a label", 0.0, 1.0
    )


class OwnMajority(GRPO):
    """The player: GRPO whose label is what most plays of a task answer. What it posts is how many did."""

    name = "own-majority"
    settings_type: type[Any] = PlayerSettings
    settings: PlayerSettings

    def prepare(self, takes: Sequence[Take], model: TextModel, news: News) -> Generator[Effect, Any, GRPOBatch | None]:
        """Vote, tell the coaches, and reward who agrees."""
        if not takes:
            return None
        said: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for take in takes:
            said[take.scenario.seed][take.acts[-1]] += 1
        label, rate = {}, {}
        for seed, answers in said.items():
            most = max((answer for answer in answers if answer), key=lambda each: (answers[each], each), default="")
            rate[seed] = answers[most] / answers.total() if most else 0.0
            label[seed] = most if answers[most] > 1 and rate[seed] >= self.settings.agreement else ""
        posts: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for take in takes:
            if "post" in take.scenario.params:
                number = str(take.scenario.params["number"])
                posts[take.scenario.params["post"]][number] = rate[take.scenario.seed]
        if posts:
            yield Post(SOLVED, {}, {"posts": dict(posts)})
        rewards = [float(take.acts[-1] == label[take.scenario.seed] != "") for take in takes]
        return self.batch(takes, np.array(rewards, np.float32), model)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoachSettings(GRPOSettings):
    """What can be set of it."""

    is_by_kind: bool = setting(False, "pay for the change of accuracy on tasks of the same kind, not of all kinds")


class CoachObjective(GRPO):
    """REINFORCE on what the player gained; see the head of this module."""

    name = "coach"
    settings_type: type[Any] = CoachSettings
    settings: CoachSettings

    def __init__(self, settings: CoachSettings) -> None:
        super().__init__(settings)
        self._waiting: list[dict[str, Plain]] = []  # what was written, oldest first: cid, epoch, sights, tasks
        self._past: list[list[float]] = []  # the rewards of what was paid for last

    def memory(self) -> dict[str, Plain]:
        """What waits, and what was paid before."""
        return {"waiting": [dict(each) for each in self._waiting], "past": [list(each) for each in self._past]}

    def remember(self, memory: Mapping[str, Plain]) -> None:
        """Go on from what `memory` gave.

        Raises:
            ProtocolError: if it is none.
        """
        waiting, past = memory.get("waiting", []), memory.get("past", [])
        if not (isinstance(waiting, list) and len(waiting) <= MAX_WAITING and all(map(_is_written, waiting))):
            raise ProtocolError("what a coach wrote and is not paid for is of no form; it begins anew")
        if not (isinstance(past, list) and len(past) <= MAX_PAST and all(map(_are_rewards, past))):
            raise ProtocolError("what a coach was paid is of no form; it begins anew")
        self._waiting, self._past = [dict(each) for each in waiting], [list(each) for each in past]

    def prepare(self, takes: Sequence[Take], model: TextModel, news: News) -> Generator[Effect, Any, GRPOBatch | None]:
        """Post what was written, and learn from what can be paid for by now."""
        takes = takes[:MAX_TASKS]
        if takes:
            tasks = [str(take.acts[-1]) for take in takes]
            cid = yield Post(TASKS, {}, {"tasks": tasks, "epoch": news.epoch})
            sights = [str(take.sights[-1]) for take in takes]
            if cid is not None:
                written = {"cid": str(cid), "epoch": news.epoch, "sights": sights, "tasks": tasks}
                self._waiting = [*self._waiting, written][-MAX_WAITING:]
        paid: list[tuple[dict[str, Plain], list[float | None]]] = []
        left = []
        for each in self._waiting:
            rewards = self._rewards(each, news)
            if rewards is not None:
                paid.append((each, rewards))
            elif news.epoch - each["epoch"] < MAX_WAITING:
                left.append(each)
        self._waiting = left
        return self._learn(paid, model) if paid else None

    def _rewards(self, each: Mapping[str, Plain], news: News) -> list[float | None] | None:
        """Of each task that was written; None of one that is none or that nobody played. Altogether None: not yet."""
        played = reports(news.posts.get(SOLVED, ()), each["cid"], each["epoch"], len(each["tasks"]))
        if not played:
            return None
        rewards: list[float | None] = []
        for number, task in enumerate(each["tasks"]):
            if EXERCISE.solve(task) is None:
                rewards.append(-math.inf)
                continue
            said = [(epoch, rates[number]) for epoch, rates in played if number in rates]
            if not said:
                rewards.append(None)
                continue
            name = KINDS[task[0]][0] if self.settings.is_by_kind else "accuracy"
            gains = [gain(news.evaluations.get(name, {}), epoch) for epoch, _ in said]
            known = [each for each in gains if each is not None]
            if len(known) < len(gains):
                return None
            rewards.append(statistics.median_low(known) * statistics.median_low(rate for _, rate in said))
        return rewards

    def _learn(
        self, paid: Sequence[tuple[Mapping[str, Plain], Sequence[float | None]]], model: TextModel
    ) -> GRPOBatch | None:
        """What is better than usual becomes likelier."""
        new = [[each for each in rewards if each is not None and math.isfinite(each)] for _, rewards in paid]
        self._past = [*self._past, *(each for each in new if each)][-MAX_PAST:]
        usual = [each for rewards in self._past for each in rewards] or [0.0]
        mean, deviation, worst = statistics.fmean(usual), statistics.pstdev(usual), min(usual)
        takes, advantages = [], []
        for written, rewards in paid:
            for sight, task, reward in zip(written["sights"], written["tasks"], rewards, strict=True):
                if reward is not None:
                    takes.append(take_of(sight, task))
                    advantages.append((max(reward, worst) - mean) / (deviation + 1e-6) - float(reward < worst))
        clipped: Floats = np.clip(np.array(advantages, np.float32), -3, 3)
        return self.advised(takes, clipped, model)


def reports(posts: Iterable[Posted], cid: str, epoch: int, count: int) -> list[tuple[int, dict[int, float]]]:
    """What players say of one post with so many tasks, each once: the epoch in which they played it, and rates."""
    found: dict[str, tuple[int, dict[int, float]]] = {}
    for post in posts:
        said = post.meta.get("posts")
        rates = said.get(cid) if isinstance(said, dict) else None
        if post.author in found or not isinstance(rates, dict) or not epoch < post.epoch <= epoch + MAX_AGE:
            continue
        read = {}
        for number in range(count):
            rate = rates.get(str(number))
            if isinstance(rate, int | float) and 0 <= rate <= 1:
                read[number] = float(rate)
        if read:
            found[post.author] = post.epoch, read
    return list(found.values())


def gain(scores: Mapping[int, float], epoch: int) -> float | None:
    """How much better the policy of the next epoch is than that of this one; None, if either is not known yet."""
    before, after = scores.get(epoch), scores.get(epoch + 1)
    if before is None or after is None:
        return None
    return min(1.0, max(0.0, after)) - min(1.0, max(0.0, before))


def take_of(sight: str, task: str) -> Take:
    """What a coach wrote, for its model to judge again."""
    take = Take("coach", Coaching.roles["coach"], Learned("coach"), Scenario(0), 0)
    take.sights, take.acts = [sight], [task]
    return take


def _is_written(each: Plain) -> bool:
    if not isinstance(each, dict) or each.keys() != {"cid", "epoch", "sights", "tasks"}:
        return False
    texts = [each["sights"], each["tasks"]]
    are_texts = all(isinstance(of, list) and all(isinstance(text, str) for text in of) for of in texts)
    is_named = isinstance(each["cid"], str) and type(each["epoch"]) is int
    return are_texts and is_named and len(texts[0]) == len(texts[1]) <= MAX_TASKS


def _are_rewards(each: Plain) -> bool:
    return isinstance(each, list) and all(isinstance(reward, float) and -1 <= reward <= 1 for reward in each)
