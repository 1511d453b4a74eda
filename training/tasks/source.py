"""What is played next: scenarios, and the sources that draw them.

A source is a function of what its member knows of the swarm (`News`) and of a seeded generator, so members that know
the same draw from the same; it holds nothing that changes. How many scenarios a member has drawn in this epoch is part
of what it knows (`News.drawn`).

Start states travel as acts: a scenario's ``acts`` are played again before anybody is asked, so that any member can
check such a start and nobody has to trust the bytes of a foreign simulator. Replayed steps cost what steps cost, and
count.

- `FreshSeeds`: another seed every time.
- `SharedPrompts`: the same scenarios on every member, several plays of each, as group-relative advantages (GRPO, arXiv
  2402.03300) and votes over answers (RLCCF, arXiv 2508.12338) need them.
- `OwnPrompts`: likewise, and other ones on every member.
- `Listed`: these, one after the other, once an epoch.
- `ByPlace`: to each member another source: a task per node.
- `ByOutcome`: a curriculum. Levels are drawn by how much their outcomes still vary, p (1 - p) for a share p of success,
  which is what Rutherford et al. call learnability (arXiv 2408.15099). Deviation: whole levels, no single scenarios.
- `Starts`: early in training, plays begin in states of trajectories that somebody posted (SnapshotRL, S3RL). Deviation:
  the state is drawn evenly from the trajectory and not by a classification of states; `Starts.state` is there to be
  overridden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.tasks.play import Act

if TYPE_CHECKING:
    from shoal.training.tasks.playing import Played

MAX_SEED: Final = 2**63 - 1
MAX_ACTS: Final = 100_000
"""That one scenario may have replayed."""
MAX_TAG: Final = 80
_SEEDS: Final = 2**32
_ACT_NAME: Final = "acts"

Plain: TypeAlias = Any
"""None, bool, int, float, str, or a list or a dict with text keys of such: what JSON says."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to play.

    Attributes:
        seed: of all chance in the play; 0 to 2**63 - 1.
        params: map, level, prompt, profile, …, which the game knows.
        acts: of all roles, in the order in which they were asked; replayed before anybody is asked.
        max_turns: after which the play is cut off, the replayed ones not counted; none: as the stage says.
        tag: under which the outcomes of such plays are merged.

    Raises:
        UsageError: if one is out of range.
    """

    seed: int
    params: Mapping[str, Plain] = field(default_factory=dict)
    acts: tuple[Act, ...] = ()
    max_turns: int | None = None
    tag: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"a scenario's seed is {self.seed}; take one from 0 to 2**63 - 1")
        if self.max_turns is not None and self.max_turns < 1:
            raise UsageError(f"a scenario's max_turns is {self.max_turns}; at least 1 turn is played")
        if len(self.acts) > MAX_ACTS or len(self.tag) > MAX_TAG:
            raise UsageError(f"a scenario has at most {MAX_ACTS} acts and a tag of at most {MAX_TAG} characters")


@dataclass(frozen=True, slots=True)
class Posted:
    """What a member posted under a topic. Its author may have written anything into it.

    Attributes:
        author: whose word it is.
        cid: of its content.
        epoch: in which it was posted.
        arrays: by name.
        meta: what describes them.
    """

    author: PeerId
    cid: Cid
    epoch: int
    arrays: Arrays = field(default_factory=dict)
    meta: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What a member knows at this epoch; equal, but for ``drawn``, ``own`` and ``place``, where documents are equal.

    Attributes:
        epoch: of the policies.
        env_steps: by all members together until then.
        outcomes: by tag, of the plays of all members.
        evaluations: by probe and epoch, the median of what members have signed, of probes that the recipe wants heard
            (`shoal.training.scored`); as this member has heard of it, which may be more or less than others have.
        posts: by topic, newest first.
        drawn: how many scenarios this member has drawn in this epoch.
        own: a number that is another for each member.
        place: this member's number among all, where a recipe gives them such, for good; -1: it has none yet.
    """

    epoch: int = 0
    env_steps: int = 0
    outcomes: Mapping[str, Moments] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    posts: Mapping[str, tuple[Posted, ...]] = field(default_factory=dict)
    drawn: int = 0
    own: int = 0
    place: int = -1


class Source(Protocol):
    """Where scenarios come from."""

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next to play; None: no more in this epoch."""
        ...


@dataclass(frozen=True, slots=True)
class FreshSeeds:
    """Another seed every time.

    Attributes:
        params: of every scenario.
        max_turns: likewise.
        tag: likewise.
    """

    params: Mapping[str, Plain] = field(default_factory=dict)
    max_turns: int | None = None
    tag: str = ""

    def draw(self, news: News, rng: np.random.Generator) -> Scenario:
        """One with a seed of its own."""
        return Scenario(int(rng.integers(_SEEDS)), self.params, (), self.max_turns, self.tag)


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """The same on every member: in each epoch so many new scenarios, and so many plays of each, one after the other.

    Attributes:
        per_epoch: how many scenarios.
        plays: of each.
        seed: another one gives other scenarios.
        is_fixed: the same scenarios in every epoch.
        params: of every scenario.
        tag: likewise.
    """

    per_epoch: int
    plays: int = 1
    seed: int = 0
    is_fixed: bool = False
    params: Mapping[str, Plain] = field(default_factory=dict)
    tag: str = ""

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next of this epoch's."""
        number = news.drawn // self.plays
        if number >= self.per_epoch:
            return None
        return Scenario(self._seed(news, number), self.params, tag=self.tag)

    def _seed(self, news: News, number: int) -> int:
        return seed_of("shared prompts", self.seed, 0 if self.is_fixed else news.epoch, number)


class OwnPrompts(SharedPrompts):
    """Other ones on every member: in each epoch so many new scenarios, and so many plays of each, as above."""

    __slots__ = ()

    def _seed(self, news: News, number: int) -> int:
        return seed_of("own prompts", self.seed, news.own, 0 if self.is_fixed else news.epoch, number)


@dataclass(frozen=True, slots=True)
class Listed:
    """These, one after the other, once an epoch."""

    scenarios: Sequence[Scenario]

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next of the list."""
        return self.scenarios[news.drawn] if news.drawn < len(self.scenarios) else None


@dataclass(frozen=True, slots=True)
class ByPlace:
    """To each member a source of its own, by its place; members of a recipe that gives no places draw nothing.

    Attributes:
        sources: by name. Places beyond their number begin anew.
    """

    sources: Mapping[str, Source]

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next of the one's."""
        if news.place < 0:
            return None
        return list(self.sources.values())[news.place % len(self.sources)].draw(news, rng)


@dataclass(frozen=True, slots=True)
class ByOutcome:
    """Fresh seeds of levels, the more often the less settled their outcomes are.

    Attributes:
        levels: by name, their params. A level's outcomes, 0 to 1, are merged under ``<tag>/<name>``.
        floor: what every level weighs at least; p (1 - p) is 0.25 at most. One without outcomes weighs that.
        tag: what tags begin with.
    """

    levels: Mapping[str, Mapping[str, Plain]]
    floor: float = 0.02
    tag: str = "level"

    def draw(self, news: News, rng: np.random.Generator) -> Scenario:
        """One of some level."""
        weights = np.array([self._weight(news, name) for name in self.levels])
        number = int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))
        name = list(self.levels)[min(number, len(weights) - 1)]
        return Scenario(int(rng.integers(_SEEDS)), self.levels[name], tag=f"{self.tag}/{name}")

    def _weight(self, news: News, name: str) -> float:
        seen = news.outcomes.get(f"{self.tag}/{name}")
        share = float(np.clip(seen.mean, 0, 1)) if seen is not None and seen.count else 0.5
        return max(share * (1 - share), self.floor)


@dataclass(frozen=True, slots=True)
class Starts:
    """While the swarm is young, plays begin in states of posted trajectories.

    A post is one trajectory: ``meta`` has the ``seed`` of its scenario, ``arrays["acts"]`` its acts, ``[T]`` int64 or
    ``[T, size]`` float32, as `trajectory` makes it. One that is anything else is passed over; one that fits and leads
    nowhere is played from its beginning (`shoal.training.tasks.stage`).

    Attributes:
        budget: environment steps of the swarm, from when on all plays begin where plays begin.
        share: of the plays, that begin in such a state.
        max_turns: from there on.
        topic: under which trajectories are posted.
        params: of their scenarios, all of which have the same.
        otherwise: where the other scenarios come from.
    """

    budget: int
    share: float = 1.0
    max_turns: int | None = None
    topic: str = "trajectories"
    params: Mapping[str, Plain] = field(default_factory=dict)
    otherwise: Source = field(default_factory=FreshSeeds)

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """A start, or another scenario."""
        posts = news.posts.get(self.topic, ())
        if news.env_steps >= self.budget or not posts or rng.random() >= self.share:
            return self.otherwise.draw(news, rng)
        start = _read_trajectory(posts[int(rng.integers(len(posts)))])
        if start is None:
            return self.otherwise.draw(news, rng)
        return Scenario(start.seed, self.params, start.acts[: self.state(start, rng)], self.max_turns)

    def state(self, start: Scenario, rng: np.random.Generator) -> int:
        """After how many of its acts a trajectory is taken up."""
        return int(rng.integers(len(start.acts)))


def trajectory(played: Played) -> tuple[Arrays, dict[str, Plain]]:
    """A play as `Starts` reads it from a post: arrays and meta.

    Raises:
        UsageError: if its acts are text, or the play itself did not begin at its beginning.
    """
    if played.scenario.acts or not played.acts or isinstance(played.acts[0], str):
        raise UsageError("a trajectory is posted from its beginning and acts in numbers; choose another play")
    number = type(played.acts[0]) is int
    return {_ACT_NAME: np.array(played.acts, np.int64 if number else np.float32)}, {"seed": played.scenario.seed}


def _read_trajectory(post: Posted) -> Scenario | None:
    acts, seed = post.arrays.get(_ACT_NAME), post.meta.get("seed")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED or acts is None:
        return None
    if not 1 <= len(acts.shape) <= 2 or not 1 <= len(acts) <= MAX_ACTS:
        return None
    if acts.dtype == np.int64 and acts.ndim == 1:
        return Scenario(seed, acts=tuple(acts.tolist()))
    if acts.dtype == np.float32 and acts.ndim == 2:
        return Scenario(seed, acts=tuple(acts))
    return None


def outcomes(plays: Iterable[Played], score: str) -> dict[str, Moments]:
    """By tag, the moments of one of the scores of plays; of plays that do not have it, nothing.

    Args:
        plays: that are over.
        score: its name in `End.scores`.
    """
    found: dict[str, list[float]] = {}
    for played in plays:
        if score in played.scores:
            found.setdefault(played.scenario.tag, []).append(played.scores[score])
    return {tag: Moments.of(np.array(values)) for tag, values in sorted(found.items())}


def seed_of(*parts: object) -> int:
    """A seed of 32 bits that differs with every part, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:4], "big")
