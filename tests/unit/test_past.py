"""Policies as they were: which are kept, which plays, and what is left of them after a restart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.training.recipes import past
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import Company, manifest_of, peers
from shoal.training.recipes.past import FOLDER, MAX_VERSIONS, Pasts
from shoal.training.recipes.recipe import Policy, Probe, Recipe, Verdict
from shoal.training.tasks.cast import AgainstPast, Everyone, Learned, Past, Scripted, named, pair, seated
from shoal.training.tasks.failures import Failures
from shoal.training.tasks.play import Ask, Box, Discrete, End, Play, Role
from shoal.training.tasks.source import FreshSeeds, News, Scenario, SharedPrompts


class Guess:
    """Who names the other's number wins; both at once, three times."""

    name = "guess"
    roles = {name: Role(Box(2), Discrete(3)) for name in ("player_0", "player_1")}  # noqa: RUF012  a game's are fixed

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """Three turns."""
        won = 0.0
        for turn in range(3):
            sight = np.array([turn, rng.random()], np.float32)
            first, second = yield tuple(Ask(role, sight, won) for role in self.roles)
            won = float(first == second)
        return End(dict.fromkeys(self.roles, won))


class Named:
    """A model of one number that says which it is."""

    def __init__(self, flat: float = 0.0, size: int = 4) -> None:
        self.flat = np.full(size, flat, np.float32)


def recipe(cast: Any, **changed: Any) -> Recipe:
    """Of two who guess."""
    made = Recipe(
        name="guess",
        summary="",
        paper="",
        claim="",
        game=Guess(),
        source=FreshSeeds(),
        cast=cast,
        policies={"agent": Policy(model="mlp", objective="ppo", sizes={"hidden_sizes": (8,)})},
        probes=(Probe("won", SharedPrompts(2, seed=1, is_fixed=True)),),
        verdict=lambda run, baseline: Verdict(True, 0, 0, ""),
        turns=24,
        plays=8,
    )
    return replace(made, **changed)


def pasts(*ages: int, model: Named | None = None) -> tuple[Pasts, Named]:
    """Of one policy whose number is its epoch."""
    now = model or Named()
    return Pasts([Past("agent", age) for age in ages], {"agent": now}, lambda name: Named(size=now.flat.size)), now  # type: ignore[dict-item]  # it has what is used


def grow(kept: Pasts, model: Named, epochs: range) -> None:
    """Each epoch is played in."""
    for epoch in epochs:
        model.flat[:] = epoch
        kept.keep(epoch)


def who(kept: Pasts, age: int, epoch: int) -> float:
    """The epoch of who plays."""
    return float(kept.actor(Past("agent", age), epoch).flat[0])  # type: ignore[attr-defined]


def test_a_past_policy_is_the_one_of_so_many_epochs_ago_and_the_oldest_where_none_is_as_old() -> None:
    """From the first epoch on."""
    kept, model = pasts(1, 5)
    for epoch in range(40):
        grow(kept, model, range(epoch, epoch + 1))
        assert who(kept, 5, epoch) == max(0, epoch - 5)
        assert who(kept, 1, epoch) == max(0, epoch - 1)
        assert who(kept, 0, epoch) == epoch
        assert len(kept.epochs("agent")) <= 6


def test_where_nothing_is_kept_the_policy_as_it_is_plays() -> None:
    """A newcomer's."""
    kept, model = pasts(3)
    model.flat[:] = 50
    assert kept.actor(Past("agent", 3), 50) is model  # type: ignore[comparison-overlap]
    grow(kept, model, range(50, 53))
    assert who(kept, 3, 52) == 50


def test_what_lies_far_back_is_kept_at_every_kth_epoch_and_is_never_younger_than_was_asked_for() -> None:
    """Within the bound, whatever the age."""
    kept, model = pasts(1000)
    for epoch in range(3000):
        grow(kept, model, range(epoch, epoch + 1))
        assert len(kept.epochs("agent")) <= MAX_VERSIONS
        if epoch >= 1040:
            assert 1000 <= epoch - who(kept, 1000, epoch) <= 1000 + 1000 // 30


def test_the_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer versions of a large policy, and none of one that is too large."""
    monkeypatch.setattr(past, "MAX_BYTES", 5 * 4000)
    kept, model = pasts(20, model=Named(size=1000))
    grow(kept, model, range(100))
    assert len(kept.epochs("agent")) <= 5
    assert 20 <= 99 - who(kept, 20, 99) <= 20 + 6
    with pytest.raises(UsageError, match="too large for its past"):
        pasts(20, model=Named(size=3000))


def test_what_a_cast_does_not_name_or_the_recipe_has_not_is_refused() -> None:
    """With what to do."""
    kept, _ = pasts(3)
    with pytest.raises(UsageError, match="attribute named"):
        kept.actor(Past("agent", 4), 10)
    with pytest.raises(UsageError, match="no policy of the recipe"):
        Pasts([Past("agnet", 1)], {"agent": Named()}, lambda name: Named())  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="age is -1"):
        Past("agent", -1)


def test_the_past_outlives_its_worker_and_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """A file for each epoch, and no more files than versions."""
    kept, model = pasts(3)
    kept.settle_in(tmp_path)
    grow(kept, model, range(10))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [f"{n}.safetensors" for n in (6, 7, 8, 9)]
    (tmp_path / FOLDER / "7.safetensors").write_bytes(b"\x00" * 30)
    (tmp_path / FOLDER / "9.safetensors.part").write_bytes(b"")
    again, model = pasts(3)
    again.settle_in(tmp_path)
    assert again.epochs("agent") == (6, 8, 9)
    grow(again, model, range(10, 11))
    assert who(again, 3, 10) == 6
    assert who(again, 2, 10) == 8
    other, _ = pasts(3, model=Named(size=5))
    other.settle_in(tmp_path)
    assert other.epochs("agent") == ()


def test_a_pool_of_ages_gives_one_role_to_the_present_and_all_ages_their_turn() -> None:
    """Drawn by the generator that is given, and by nothing else."""
    cast = AgainstPast("agent", (1, 2, 4), share=0.5)
    assert named(cast) == (Learned("agent"), Past("agent", 1), Past("agent", 2), Past("agent", 4))
    drawn = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        drawn.append([cast(News(), Scenario(0), rng) for _ in range(600)])
    assert drawn[0] == drawn[1]
    assert all(isinstance(seats, tuple) and Learned("agent") in seats for seats in drawn[0])
    counts = Counter(drawn[0])
    assert len(counts) == 1 + 2 * 3
    assert 240 <= counts[Learned("agent"), Learned("agent")] <= 360
    assert seated(Guess.roles, drawn[0][0]).keys() == Guess.roles.keys()
    with pytest.raises(UsageError, match="ages"):
        AgainstPast("agent", ())


def test_what_is_named_has_those_who_stand_in_and_each_once() -> None:
    """Of a plain function too."""
    assert named(Everyone("agent")) == (Learned("agent"),)
    assert named(pair("a", Scripted("first"))) == (Learned("a"), Scripted("first"))


def test_a_recipe_plays_against_its_past_and_learns_from_the_present_alone(tmp_path: Path) -> None:
    """On every node alike, and on after a worker was killed."""
    made = recipe(AgainstPast("agent", (1, 3), share=1.0))
    company = Company(made, peers(2))
    name, learner = next(iter(company.learners.items()))
    learner.settle_in(tmp_path)
    seen = []
    for _ in range(5):
        company.collect()
        seen.append(learner._trainees["agent"].model.flat.copy())
        trained = learner._takes("agent")
        assert trained
        assert {take.seat for take in trained} == {Learned("agent")}
        assert {type(take.seat) for played in learner._plays for take in played.takes} == {Learned, Past}
        company.update()
    actor = learner._actors[Past("agent", 3)]
    np.testing.assert_array_equal(actor.flat, seen[2])  # type: ignore[attr-defined]
    both = [each._pasts.epochs("agent") for each in company.learners.values()]
    assert both[0] == both[1]
    again = RecipeLearner(made, manifest_of(made, name), Failures("x"), peer=name, life="1")
    again.settle_in(tmp_path)
    again.import_state(learner.export_state())
    np.testing.assert_array_equal(again._actors[Past("agent", 3)].flat, seen[2])  # type: ignore[attr-defined]
    again.collect(8)
    assert again._pasts.epochs("agent") == (2, 3, 4, 5)
