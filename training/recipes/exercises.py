"""What is played in `cpmobius`: exercises on digits, and the coach's game, in which they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from shoal.training.tasks.games.text import Exact
from shoal.training.tasks.play import Ask, End, Play, Role, Text
from shoal.training.tasks.source import News, Plain, Posted, Scenario, seed_of

TASKS: Final = "tasks"
"""The topic of what coaches write: ``{"tasks": [text, …]}``,"""
SOLVED: Final = "solved"
"""and of what players say of them: ``{"posts": {cid: {number: rate}}}``."""
MAX_TASKS: Final = 64
"""Of one post."""
MAX_CHARS: Final = 8
"""Of one task."""
MAX_AGE: Final = 4
"""Epochs that tasks are played for."""
SHORTEST: Final = 2
LONGEST: Final = 5

KINDS: Final[Mapping[str, tuple[str, Callable[[str], str]]]] = {
    "c": ("copy", lambda digits: digits),
    "m": ("largest", max),
    "r": ("reverse", lambda digits: digits[::-1]),
    "s": ("sort", lambda digits: "".join(sorted(digits))),
    "d": (
        "steps",
        lambda digits: "".join(str((int(b) - int(a)) % 10) for a, b in pairwise(digits)),
    ),
    "a": ("sum", lambda digits: str(sum(map(int, digits)))),
}
"""By the letter that a task begins with: what it is called, and what it asks for of the digits after it."""


@dataclass(frozen=True, slots=True)
class Exercise(Exact):
    """A letter and some digits: ``s52917`` is 12579."""

    name = "exercises"

    def question(self, rng: np.random.Generator) -> str:
        """Of any kind and length."""
        return exercise(str(rng.choice(list(KINDS))), rng)

    def solve(self, question: str) -> str | None:
        """What is asked for."""
        is_one = len(question) <= MAX_CHARS and re.fullmatch(rf"[{''.join(KINDS)}][0-9]{{2,}}", question, re.ASCII)
        return KINDS[question[0]][1](question[1:]) if is_one else None


EXERCISE: Final = Exercise()


def exercise(kind: str, rng: np.random.Generator) -> str:
    """One of a kind, of any length."""
    return kind + "".join(map(str, rng.integers(10, size=rng.integers(SHORTEST, LONGEST + 1))))


# --- what is played ---


@dataclass(frozen=True, slots=True)
class Quiz:
    """The same exercises in every epoch and everywhere, as many of each kind.

    Attributes:
        per_epoch: how many.
        seed: another one gives others.
        kinds: letters of `KINDS`.
    """

    per_epoch: int
    seed: int
    kinds: str = "".join(KINDS)

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next."""
        if news.drawn >= self.per_epoch:
            return None
        seed = seed_of("quiz", self.seed, self.kinds, news.drawn)
        kind = self.kinds[news.drawn % len(self.kinds)]
        return Scenario(seed, {"prompt": exercise(kind, np.random.default_rng(seed))})


@dataclass(frozen=True, slots=True)
class Tasks:
    """What players play: tasks of coaches, and exercises by chance, other ones on every node.

    Attributes:
        per_epoch: how many.
        plays: of each, one after the other.
        share: of the tasks, that coaches write; all others are of any kind and length alike, and so are all while no
            coach has written anything.
    """

    per_epoch: int
    plays: int
    share: float = 0.75

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next play."""
        number = news.drawn // self.plays
        if number >= self.per_epoch:
            return None
        seed = seed_of("tasks", news.own, news.epoch, number)
        chance = np.random.default_rng(seed)
        posts = coached(news) if chance.random() < self.share else ()
        if not posts:
            return Scenario(seed, {"prompt": EXERCISE.question(chance)})
        post, tasks = posts[int(chance.integers(len(posts)))]
        index = int(chance.integers(len(tasks)))
        params = {"prompt": tasks[index][1], "post": str(post.cid), "number": tasks[index][0]}
        return Scenario(seed, params)


def coached(news: News) -> tuple[tuple[Posted, tuple[tuple[int, str], ...]], ...]:
    """The newest post of each coach that is of use, and its tasks."""
    found = {}
    for post in news.posts.get(TASKS, ()):
        if post.author not in found and 0 <= news.epoch - post.epoch <= MAX_AGE:
            tasks = read_tasks(post.meta)
            if tasks:
                found[post.author] = post, tasks
    return tuple(found.values())


def read_tasks(meta: Mapping[str, Plain]) -> tuple[tuple[int, str], ...]:
    """The tasks of a post, which may hold anything, with their numbers in it."""
    said = meta.get("tasks")
    if not isinstance(said, list) or len(said) > MAX_TASKS:
        return ()
    return tuple(
        (number, task)
        for number, task in enumerate(said)
        if isinstance(task, str) and len(task) <= MAX_CHARS and EXERCISE.solve(task) is not None
    )


class Coaching:
    """The coach's game: it sees the player's profile, and writes a task."""

    name = "coaching"
    roles: Final = {"coach": Role(Text(4 * len(KINDS)), Text(MAX_CHARS))}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One task; without a profile it is any."""
        profile = scenario.params.get("profile") or written({kind: float(rng.random()) for kind in KINDS})
        (task,) = yield (Ask("coach", str(profile), max_tokens=MAX_CHARS),)
        return End({"coach": 0.0}, scores={"valid": float(EXERCISE.solve(str(task)) is not None)})


@dataclass(frozen=True, slots=True)
class Profiles:
    """What coaches see, so many times an epoch: how often the player is right, by kind, as members signed it last."""

    per_epoch: int

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The same again."""
        if news.drawn >= self.per_epoch:
            return None
        rates = {}
        for kind, (name, _) in KINDS.items():
            said = news.evaluations.get(name, {})
            rates[kind] = said[max(said)] if said else 0.5
        return Scenario(seed_of("profiles", news.own, news.epoch, news.drawn), {"profile": written(rates)})


def written(rates: Mapping[str, float]) -> str:
    """A profile as a sight: ``c9m7r4…``, in tenths."""
    return "".join(f"{kind}{min(9, int(10 * min(1.0, max(0.0, rate))))}" for kind, rate in rates.items())
