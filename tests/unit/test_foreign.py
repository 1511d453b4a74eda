"""Seats of other frameworks: the same plays come from whoever sits where, and one that fails costs its plays alone.

Real processes, of what `foreign_seats` has.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.training.effects import Consult
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import manifest_of, peers
from shoal.training.recipes.recipe import Part, Policy, Probe, Recipe, Verdict
from shoal.training.tasks.cast import Actor, Away, ByRole, Everyone, Foreign, Learned, Scripted, Seat
from shoal.training.tasks.failures import Failures, TaskFailedError
from shoal.training.tasks.foreign import MAX_LOST, ForeignActor
from shoal.training.tasks.play import AbsentError, Act, Ask, Box, Discrete, End, Play, Role, Take
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import FreshSeeds, News, OwnPrompts, Scenario, SharedPrompts
from shoal.training.tasks.stage import Stage, Staged, alone
from shoal.training.tasks.wire import encode_acts, encode_takes

from .plays import Echo, Tangle

SEATS = [
    "echo",
    "random",
    "ends_once",
    "broken",
    "sleeps",
    "ends",
    "odd",
    "few",
    "program",
    "nonsense",
    "missing",
    "neither",
]
GAME = Tangle((0, 0, 1, 3))


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package is, for this process and for those that it starts."""
    site, here = tmp_path_factory.mktemp("site"), Path(__file__).parent
    (site / "foreign_seats.py").write_text((here / "foreign_seats.py").read_text())
    (site / "foreign_plays.py").write_text((here / "plays.py").read_text())
    about = site / "foreign_seats-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign_seats\nVersion: 1\n")
    offered = "".join(f"{name} = foreign_seats:{name}\n" for name in SEATS)
    (about / "entry_points.txt").write_text(f"[shoal.seats]\n{offered}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        yield


@pytest.fixture
def sit() -> Iterator[Any]:
    """Makes actors, and ends them."""
    made: list[ForeignActor] = []

    def make(name: str, game: Any = GAME, **seat: Any) -> tuple[Foreign, ForeignActor]:
        wanted = Foreign(name, **seat)
        made.append(ForeignActor(wanted, game.roles))
        return wanted, made[-1]

    yield make
    for each in made:
        each.close()


def trace(staged: Staged) -> bytes:
    """All that was seen, done and earned, in bytes."""
    return b"".join(_trace(played) for played in staged.plays)


def _trace(played: Played) -> bytes:
    ended = [
        Take(**{name: getattr(take, name) for name in ("role", "spaces", "seat", "scenario", "play")})
        for take in played.takes
    ]
    for there, take in zip(ended, played.takes, strict=True):
        there.sights, there.acts = take.sights, take.acts
    rewards = [np.array(take.rewards, np.float64).tobytes() for take in played.takes]
    return encode_takes(ended) + encode_acts(played.acts) + b"".join(rewards)


def stage(seats: Sequence[Seat], actors: Mapping[Seat, Actor], plays: int = 4, seed: int = 5) -> Stage:
    """Of four roles."""
    return Stage(GAME, SharedPrompts(9), lambda *_: tuple(seats), actors, plays, seed=seed)


def run(made: Stage, answer: Any = None) -> Staged:
    """To the end, with somebody to answer consults."""
    collecting, given = made.collect(News()), None
    try:
        while True:
            asked: Consult = collecting.send(given)
            given = None if answer is None else answer(asked)
    except StopIteration as end:
        staged: Staged = end.value
        return staged


def echo(asked: Consult) -> list[Act]:
    """Another node's."""
    return Echo().act(asked.takes, np.random.default_rng(0), False)[0]


def test_one_who_acts_alike_leaves_the_same_trace_from_every_kind_of_seat(sit: Any) -> None:
    """As a policy, a script, a process, a foreign program, and at another node (MOSAIC, recipe 29)."""
    seat, actor = sit("echo")
    program, other = sit("program")
    seats = (Learned("x"), Scripted("x"), seat, program, Away("there", "x"))
    actors: dict[Seat, Actor] = {Learned("x"): Echo(), Scripted("x"): Echo(), seat: actor, program: other}
    traces = {trace(run(stage([each] * 4, actors), echo)) for each in seats}
    mixed = [Learned("x"), Scripted("x"), seat, Away("there", "x")]
    traces |= {
        trace(run(stage(mixed[turn:] + mixed[:turn], actors, plays), echo)) for turn in range(4) for plays in (1, 9)
    }
    assert len(traces) == 1
    assert len(traces.pop()) > 1000
    assert actor.num_started == other.num_started == 1


def test_what_does_not_come_of_this_process_is_not_proven(sit: Any) -> None:
    """And nobody says how likely it was."""
    seat, actor = sit("echo")
    staged = run(stage([Learned("x"), seat, seat, seat], {Learned("x"): Echo(), seat: actor}))
    for take in staged.takes:
        assert take.proven == (take.role == "role_0")
        assert np.isnan(take.log_probs).all() == (take.role != "role_0")


class Quartet:
    """Everybody sees what all did, and acts."""

    name = "quartet"
    roles = {f"player_{number}": Role(Box(4), Discrete(5)) for number in range(4)}  # noqa: RUF012  a game's are fixed

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """Six turns."""
        seen = rng.random(4).astype(np.float32)
        for _ in range(6):
            acts: Any = yield tuple(Ask(role, seen) for role in self.roles)
            seen = (seen + np.array(acts, np.float32) + rng.random(4).astype(np.float32)) % 7
        return End({role: float(seen[index]) for index, role in enumerate(self.roles)})


def quartet(cast: Any) -> Recipe:
    """A policy, a script, another framework, and another node."""
    return Recipe(
        **dict.fromkeys(("name", "summary", "paper", "claim"), "quartet"),
        game=Quartet(),
        source=OwnPrompts(8),
        cast=cast,
        policies={"agent": Policy(model="mlp", objective="ppo", sizes={"hidden_sizes": (8,)})},
        probes=(Probe("earned", SharedPrompts(2, seed=1, is_fixed=True)),),
        parts={"peer": Part(), "other": Part(answers=("agent",))},
        verdict=lambda run, baseline: Verdict(True, 0, 0, ""),
        turns=24,
        plays=3,
    )


def test_the_same_seeds_give_the_same_bytes_with_a_policy_a_script_a_process_and_a_node() -> None:
    """All of which draw; recipe 29, MOSAIC: paired seeds."""
    cast = ByRole(
        player_0="agent", player_1=Scripted("random"), player_2=Foreign("random"), player_3=Away("other", "agent")
    )
    recipe = quartet(cast)
    traces = []
    for seed in (1, 1, 2):
        here, there = (
            RecipeLearner(recipe, manifest_of(recipe, name, seed), Failures("x"), peer=name, life="0", part=part)
            for name, part in zip(peers(2), ("peer", "other"), strict=True)
        )
        collecting, answer = here.collecting(24), None
        try:
            while True:
                asked = collecting.send(answer)
                answer = there.answer(asked.policy or "", encode_takes(asked.takes))
        except StopIteration:
            pass
        assert len(here._plays) >= 3
        assert here._stage.failures.count == 0
        acts = [take.acts for played in here._plays for take in played.takes if take.role == "player_2"]
        assert len(set(map(tuple, acts))) > 1
        traces.append(b"".join(map(_trace, here._plays)))
        here.close()
    assert traces[0] == traces[1] != traces[2]


@pytest.mark.parametrize("name", ["ends", "few", "broken", "nonsense", "missing", "neither"])
def test_who_does_not_answer_is_stood_in_for_or_its_plays_are_dropped(sit: Any, name: str) -> None:
    """However that happens; the plays of the others end as they would have."""
    substitute = Echo()
    seat, actor = sit(name, otherwise=Scripted("x"))
    actors: dict[Seat, Actor] = {Learned("x"): Echo(), seat: actor, Scripted("x"): substitute}
    mixed = [Learned("x"), seat, Learned("x"), Learned("x")]
    staged = run(stage(mixed, actors))
    assert len(staged.plays) == 9
    assert trace(staged) == trace(run(stage([Learned("x")] * 4, actors)))
    assert staged.unanswered
    assert substitute.calls
    assert actor.num_started <= 9
    alone_seat, alone_actor = sit(name)
    staged = run(stage([Learned("x"), alone_seat, Learned("x"), Learned("x")], {**actors, alone_seat: alone_actor}))
    assert staged.dropped["unanswered"] == 9 - len(staged.plays) > 0


def test_an_act_that_is_not_legal_costs_its_own_play_and_nobody_elses(sit: Any) -> None:
    """The process that says it goes on."""
    seat, actor = sit("odd")
    staged = run(stage([seat] + [Learned("x")] * 3, {Learned("x"): Echo(), seat: actor}))
    assert 0 < len(staged.plays) < 9
    assert staged.dropped == {"unanswered": 9 - len(staged.plays)}
    assert (actor.num_started, actor.num_lost) == (1, 0)


def test_one_that_thinks_for_ever_is_killed_and_given_up_after_a_few(sit: Any) -> None:
    """Nothing hangs; there is nothing left of it."""
    seat, actor = sit("sleeps", seconds=0.3, otherwise=Scripted("first"))
    pids = set()
    real, started = actor._start, []

    def start() -> Any:
        started.append(real())
        pids.add(actor.pid)
        return started[-1]

    actor._start = start
    staged = run(stage([seat] + [Learned("x")] * 3, {Learned("x"): Echo(), seat: actor}, plays=1))
    assert len(staged.plays) == 9
    assert actor.num_started == MAX_LOST == len(pids)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_that_is_killed_is_started_anew(sit: Any) -> None:
    """At the next ask; it counts as lost until it answers."""
    seat, actor = sit("echo")
    take = Take("role_0", GAME.roles["role_0"], seat, Scenario(1), 0, proven=False)
    take.sights.append(np.zeros(3, np.float32))
    before, _ = actor.act([take], np.random.default_rng(0), False)
    os.kill(actor.pid, signal.SIGKILL)
    with pytest.raises(AbsentError, match=r"ended|reset|pipe"):
        actor.act([take], np.random.default_rng(0), False)
    assert actor.num_lost == 1
    assert actor.act([take], np.random.default_rng(0), False)[0] == before
    assert (actor.num_started, actor.num_lost) == (2, 0)


def test_a_seat_that_nobody_offers_is_refused_before_anything_is_played() -> None:
    """With what there is."""
    with pytest.raises(UsageError, match="no seat is called 'ecko'; did you mean echo"):
        ForeignActor(Foreign("ecko"), GAME.roles)
    recipe = quartet(ByRole(player_0="agent", player=Foreign("ecko")))
    name = peers(1)[0]
    with pytest.raises(UsageError, match="did you mean echo"):
        RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name)
    with pytest.raises(UsageError, match="up to 120"):
        Foreign("echo", seconds=1e9)


def test_a_probe_in_which_a_seat_dies_is_played_again_and_one_that_never_answers_says_so() -> None:
    """A process that is killed in an evaluation is no reason to end a run."""
    name = peers(1)[0]
    for seat, holds in (("ends_once", True), ("broken", False)):
        cast = ByRole(player_0="agent", player=Foreign(seat))
        recipe = replace(quartet(Everyone("agent")), probes=(Probe("earned", SharedPrompts(2, seed=1), cast),))
        learner = RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, part="peer")
        if holds:
            assert len(learner.evaluate(1, 1)) == 2
        else:
            with pytest.raises(TaskFailedError, match="give its seats of others an otherwise"):
                learner.evaluate(1, 1)
        learner.close()


def test_a_policy_does_not_train_on_what_another_framework_did() -> None:
    """Nor on what stood in for it."""
    recipe = quartet(ByRole(player_0="agent", player=Foreign("echo", otherwise=Learned("agent"))))
    name = peers(1)[0]
    learner = RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, part="peer")
    learner.collect(24)
    assert {take.role for take in learner._takes("agent")} == {"player_0"}
    learner.close()
    assert alone(Stage(Quartet(), FreshSeeds(), recipe.cast, learner._actors, 2).collect(News(), 12)).plays
    learner.close()
