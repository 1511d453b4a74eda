"""CPMöbius (arXiv 2602.02979): a coach writes tasks and is paid for the player's progress; the player has no labels.

The coach's nodes see a profile, how often the player is right by kind of task, and write tasks, which are posted. The
player's nodes play each task several times; what most of these plays answer is the label (GRPO). They post how many
agreed: the solve rate. The coach's reward for a task is the change of the player's accuracy on held-out tasks over the
update that the task went into, times its solve rate. So it comes late: a task written in epoch e is played in e + 1 and
paid for in the update of e + 2, by what members signed of the player of e + 1 and of e + 2 (`News.evaluations`). What
was written and is not paid for yet, the coach's objective remembers in its node's own file.

Deviations: small transformers from scratch, and exercises on digits, in place of pretrained models and mathematics. The
coach is taught to write tasks of all kinds alike before it begins, and has that many of every epoch's tasks written by
chance that `Tasks.share` leaves; its rewards are compared with those of the last epochs, and tasks of no form count as
the worst of these. With ``is_by_kind`` the change of accuracy is that of the task's own kind, not of all.

Whom one has to believe: a post is its author's word. At most `MAX_TASKS` tasks of `MAX_CHARS` are read of one, those
that are no tasks are passed over, and each of several coaches has as many tasks as every other. So a coach that lies
has its part of ``share`` of the player's samples, and nothing else. An evaluator that lies moves a median; a player
that lies moves the median of solve rates, between 0 and 1. Both reach the coach alone, which changes by its learning
rate whatever it is paid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from shoal.training.recipes.recipe import Part, Policy, Probe, Recipe, Report, Verdict, Warm
from shoal.training.tasks.cast import Everyone
from shoal.training.tasks.games.text import Exact, TextTask
from shoal.training.tasks.play import Ask, End, Play, Role, Take, Text
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
HELD_OUT: Final = 96

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


# --- how it begins, and what is held to be so ---


def write_any(take: Take) -> str:
    """What a coach is taught: tasks of all kinds and lengths alike."""
    return EXERCISE.question(np.random.default_rng(take.scenario.seed))


def solve(take: Take) -> str:
    """What a player is taught: right answers."""
    return EXERCISE.solve(take.sights[-1]) or ""


def objectives() -> tuple[type[Any], ...]:
    """Of this recipe."""
    from shoal.training.recipes.coaching import CoachObjective, OwnMajority  # torch; see `Recipe`

    return CoachObjective, OwnMajority


def judge(run: Report, baseline: Report) -> Verdict:
    """It gains, and more than by tasks of chance."""
    gained, by_chance = (each.last("test", of=5) - each.first("test") for each in (run, baseline))
    text = (
        f"the player's greedy accuracy on held-out tasks went from {run.first('test'):.3f} by {gained:+.3f} with a "
        f"coach, and by {by_chance:+.3f} with as many tasks drawn evenly"
    )
    return Verdict(gained > max(by_chance, 0.0), gained, by_chance, text)


RECIPE: Final = Recipe(
    name="cpmobius",
    summary="a coach writes tasks, and is paid for the player's progress; no labels",
    paper="arXiv 2602.02979",
    claim="a coach that is paid for the player's progress beats tasks that are drawn evenly, at equal player samples",
    game=TextTask(EXERCISE, max_tokens=LONGEST),
    source=Tasks(32, 8),
    cast=Everyone("player"),
    policies={
        "coach": Policy(
            model="tokens",
            sizes={"width": 48, "layers": 2, "context": 32},
            objective="coach",
            settings={"learning_rate": 1.5e-3},
            warm=Warm(write_any, until=0.95, settings={"learning_rate": 3e-3}, score="valid"),
        ),
        "player": Policy(
            model="tokens",
            sizes={"width": 64, "layers": 2, "context": 24},
            objective="own-majority",
            settings={"learning_rate": 1e-4},
            warm=Warm(solve, until=0.4, settings={"learning_rate": 2e-3}, takes=128),
        ),
    },
    parts={
        "player": Part(trains=("player",), share=2),
        "coach": Part(trains=("coach",), game=Coaching(), source=Profiles(32), cast=Everyone("coach")),
    },
    topics=(TASKS, SOLVED),
    heard=("accuracy", *(name for name, _ in KINDS.values())),
    probes=(
        Probe("accuracy", Quiz(HELD_OUT, seed=1)),
        Probe("test", Quiz(2 * HELD_OUT, seed=2)),
        *(Probe(name, Quiz(24, seed=3, kinds=kind)) for kind, (name, _) in KINDS.items()),
    ),
    verdict=judge,
    baseline={"source.share": 0.0},
    objectives=objectives,
    epochs=80,
    turns=256,
    plays=256,
    eval_interval=1,
)
