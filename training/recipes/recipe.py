"""What a way of learning together is: a game, who plays it, which policies learn how, and the claim that it is held to.

A recipe is data, in one short file each. A manifest names it (``recipe:NAME``) and may override some of its settings;
everything else about the run, who is in it and what is averaged when, is as for every other run.

*Policies* are named. One may be everybody's (averaged), or each node's own (averaged with nobody's), in part or frozen.
*Probes* measure: plays of a cast at a source, whose mean score is signed into the shared state. The *verdict* is the
claim, as a function of what probes said: of this run, and of the baseline that it is held against.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from shoal.protocol.errors import UsageError
from shoal.training.manifest import Mode
from shoal.training.statements import MAX_PART_CHARS
from shoal.training.tasks.cast import Actor, Cast
from shoal.training.tasks.play import Game, Role
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import Source

if TYPE_CHECKING:
    from shoal.training.algorithms.takes import Trainee  # torch, which whoever lists recipes may not have

EARNED: Final = "earned"
"""The score that every play has: the mean of what its roles earned."""
MAX_PROBES: Final = 16
MAX_POLICIES: Final = 32
MAX_SHARE: Final = 1024

Owner = Literal["all", "own"]


@dataclass(frozen=True, slots=True)
class Warm:
    """How a policy is taught before the run, each node's by itself.

    Attributes:
        objective: that teaches it, of takes that ``act`` makes.
        act: what a role does well, given its take, whose last sight waits for an act.
        until: the score to stop at.
        roles: that it is taught; all, if none is named. The others are played by what shows it.
        settings: of the objective.
        takes: in one step.
        max_steps: after which it stops however good it is.
        score: that counts.
    """

    act: Callable[[Any], Any]
    until: float
    roles: tuple[str, ...] = ()
    objective: str = "clone"
    settings: Mapping[str, Any] = field(default_factory=dict)
    takes: int = 64
    max_steps: int = 1000
    score: str = EARNED


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy.

    Attributes:
        model: its kind, see `shoal.training.recipes.makers.MODELS`.
        objective: how it learns; a name of the recipe's own objectives or of
            `shoal.training.recipes.makers.OBJECTIVES`.
        sizes: of the model.
        settings: of the objective.
        owner: ``all``: everybody's, averaged; ``own``: each node its own.
        shared: patterns of the parameters that are averaged, where it is everybody's.
        is_frozen: whether it never learns.
        is_varied: whether each node's begins with other parameters; only where it is each node's own.
        warm: how it is taught first.
        roles: patterns of those that it plays, from which a model of a body has its sizes; none: those that the cast
            gives it.
    """

    model: str
    objective: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    owner: Owner = "all"
    shared: tuple[str, ...] = ("*",)
    is_frozen: bool = False
    is_varied: bool = False
    warm: Warm | None = None
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.owner == "own" and self.shared != ("*",):
            raise UsageError("a policy that is each node's own is shared with nobody; leave shared out")
        if self.is_varied and self.owner != "own":
            raise UsageError("a policy that is averaged begins alike everywhere; leave is_varied out")


@dataclass(frozen=True, slots=True)
class Probe:
    """What is measured of the policies.

    Attributes:
        name: what its score is called.
        source: of what is played; it ends by itself in an epoch (`SharedPrompts`, `Listed`).
        cast: who plays; the recipe's, if None.
        score: of `End.scores`, or what the roles earned.
        greedy: whether the likeliest acts are taken.
        measure: of all plays together, in place of a score: given these, and the trainees by policy.
    """

    name: str
    source: Source
    cast: Cast | None = None
    score: str = EARNED
    greedy: bool = True
    measure: Callable[[Sequence[Played], Mapping[str, Trainee]], float] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run.

    Attributes:
        scores: by probe, the mean over the nodes at each epoch that was probed: (epoch, score), ascending.
        epochs: that were made.
        env_steps: by all nodes together.
        seconds: from the first epoch to the end; 0, if nobody looked at a clock.
        peers: how many nodes.
    """

    scores: Mapping[str, tuple[tuple[int, float], ...]]
    epochs: int
    env_steps: int
    seconds: float
    peers: int

    def first(self, probe: str) -> float:
        """What the probe said first.

        Raises:
            UsageError: if it said nothing.
        """
        return self._points(probe)[0][1]

    def last(self, probe: str, of: int = 1) -> float:
        """The mean of the last ``of`` values of a probe.

        Raises:
            UsageError: if it said nothing.
        """
        return statistics.fmean(score for _, score in self._points(probe)[-of:])

    def _points(self, probe: str) -> tuple[tuple[int, float], ...]:
        points = self.scores.get(probe, ())
        if not points:
            raise UsageError(f"the probe {probe!r} said nothing in this run; let it last longer")
        return points


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a claim holds.

    Attributes:
        holds: whether it does.
        figure: what the run came to.
        baseline: what it is held against.
        text: both in words.
    """

    holds: bool
    figure: float
    baseline: float
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """What some of the nodes do in a run.

    Attributes:
        trains: patterns of the policies that they train; of the others they only hold what is everybody's.
        acts: whether they play.
        answers: the policies by which they answer the others' asks (`shoal.training.tasks.cast.Away`).
        game: that they play; the recipe's, if None.
        source: of what they play; likewise.
        cast: who plays there; likewise.
        share: of the nodes that were not told what they are, so many take this part for one that takes a part of 1; 0:
            none do, as for a part that is a person's.
        shows: whether what they play first, an epoch's worth, is posted for all to learn from, and they play no more.
    """

    trains: tuple[str, ...] = ("*",)
    acts: bool = True
    answers: tuple[str, ...] = ()
    game: Game | None = None
    source: Source | None = None
    cast: Cast | None = None
    share: int = 1
    shows: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= MAX_SHARE:
            raise UsageError(f"the share of a part is 0 to {MAX_SHARE}, not {self.share}")


@dataclass(frozen=True, slots=True)
class Scene:
    """What is played, from where it begins, and by whom."""

    game: Game
    source: Source
    cast: Cast


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way of learning together.

    Attributes:
        name: by which a manifest names it.
        version: raised when the same run would lead to something else.
        summary: half a sentence for people.
        paper: its source.
        claim: what is held to be so, in a sentence.
        game: that is played.
        source: of what is played.
        cast: who plays.
        policies: by name.
        parts: by name, what nodes may be. A node that is not told becomes what is wanted most, with the first update:
            see `shoal.training.recipes.placing`.
        scripts: actors that `Scripted` seats name, beside those that there are; each is made for the recipe's game.
        topics: of posts that sources and objectives read from `News.posts`.
        heard: probes whose scores, as members sign them, sources and objectives read from `News.evaluations`. Where
            there are such, every node probes.
        probes: the first is what the run's curve shows.
        verdict: of this run, of the baseline, and of each further one.
        baseline: what the baseline overrides, by paths as `shoal.training.recipes.overriding` says.
        further: what other baselines override, each after the first; of as many epochs.
        objectives: gives classes of its own, which its policies name by their ``name``. It imports them only then, so
            that torch, which most need, is not loaded by who lists recipes.
        epochs: of a run.
        baseline_epochs: of the run that it is held against, if that needs others: one that learns nothing is probed
            and done. No more than the run's.
        turns: that a node collects per epoch; a source that ends in an epoch ends it earlier.
        plays: that go on side by side.
        eval_interval: epochs between probes.
        mode: what is averaged when, unless the manifest says otherwise.
        is_placed: whether nodes have places, by which a source may give each its own (`News.place`).
    """

    name: str
    version: int = 1
    summary: str
    paper: str
    claim: str
    game: Game
    source: Source
    cast: Cast
    policies: Mapping[str, Policy]
    probes: tuple[Probe, ...]
    verdict: Callable[..., Verdict]
    baseline: Mapping[str, Any] = field(default_factory=dict)
    further: tuple[Mapping[str, Any], ...] = ()
    objectives: Callable[[], tuple[type[Any], ...]] = tuple
    parts: Mapping[str, Part] = field(default_factory=lambda: {"peer": Part()})
    scripts: Mapping[str, Callable[[Any], Actor]] = field(default_factory=dict)
    topics: tuple[str, ...] = ()
    heard: tuple[str, ...] = ()
    epochs: int = 50
    baseline_epochs: int | None = None
    turns: int = 256
    plays: int = 64
    eval_interval: int = 10
    mode: Mode = Mode.LOCAL
    is_placed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.policies) <= MAX_POLICIES or not 1 <= len(self.probes) <= MAX_PROBES:
            raise UsageError(f"a recipe has 1 to {MAX_POLICIES} policies and 1 to {MAX_PROBES} probes")
        if not any(part.share for part in self.parts.values()):
            raise UsageError("a recipe has a part that nodes take untold; leave parts out for one that does everything")
        if len({probe.name for probe in self.probes}) < len(self.probes):
            raise UsageError("two probes of a recipe are called alike")
        if any(not 1 <= len(name) <= MAX_PART_CHARS for name in self.parts):
            raise UsageError(f"the name of a part has 1 to {MAX_PART_CHARS} characters")
        for name in self.heard:
            if name not in {probe.name for probe in self.probes}:
                raise UsageError(f"the recipe wants to hear of {name!r:.80}, which is none of its probes")

    @property
    def is_shown(self) -> bool:
        """Whether policies learn from what a part shows, beside what they play themselves."""
        return any(part.shows for part in self.parts.values())

    def epochs_of_baseline(self, epochs: int) -> int:
        """How many the baseline of a run of so many has."""
        return epochs if self.baseline_epochs is None else min(epochs, self.baseline_epochs)

    @property
    def is_by_all(self) -> bool:
        """Whether every node has to probe, and at the first epoch too.

        A policy is each one's own, if only in part; or one's word is too little; or a policy was taught first, and what
        it was when it began to learn by itself is what claims are held against.
        """
        return bool(self.heard) or any(
            policy.owner == "own" or policy.shared != ("*",) or policy.warm is not None
            for policy in self.policies.values()
        )

    def scene(self, part: str) -> Scene:
        """What nodes of a part play."""
        own = self.parts[part]
        return Scene(
            self.game if own.game is None else own.game,
            self.source if own.source is None else own.source,
            self.cast if own.cast is None else own.cast,
        )

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The recipe's own, and those of its parts."""
        return (Scene(self.game, self.source, self.cast), *map(self.scene, self.parts))

    @property
    def roles(self) -> dict[str, Role]:
        """Of all games.

        Raises:
            UsageError: if two games have a role of one name that sees or acts otherwise.
        """
        found: dict[str, Role] = {}
        for scene in self.scenes:
            for name, role in scene.game.roles.items():
                if found.setdefault(name, role) != role:
                    raise UsageError(
                        f"two games of a recipe have a role {name!r:.80}, each of another kind; rename one"
                    )
        return found
