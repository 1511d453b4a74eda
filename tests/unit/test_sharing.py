"""Plays that nodes share: used by the others at the run's ratio, drawn again, and held to what was to be played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.effects import Give
from shoal.training.manifest import Mode
from shoal.training.recipes import sharing
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import Company
from shoal.training.recipes.recipe import Policy, Probe, Recipe, Verdict
from shoal.training.rollouts import evidence
from shoal.training.rollouts.evidence import Lie
from shoal.training.rollouts.sampler import Sampler, Unit
from shoal.training.rollouts.shard import open_shard, seal
from shoal.training.tasks.cast import Everyone, Learned
from shoal.training.tasks.games.text import SortDigits, TextTask
from shoal.training.tasks.play import Role, Take, Text
from shoal.training.tasks.source import FreshSeeds, OwnPrompts, Scenario, SharedPrompts
from shoal.training.worker_calls import Admit

KEYS = sorted((Signer(bytes([number]) * 32) for number in (1, 2, 3)), key=lambda key: key.peer_id)
NAMES = [key.peer_id for key in KEYS]
GROUPS, PLAYS = 4, 4
SHARE = GROUPS * PLAYS


class Odd(SortDigits):
    """Scored by something that differs from play to play."""

    def score(self, answer: str, entry: Any) -> float:
        return float(sum(map(ord, answer)) % 7)


def a_recipe(**changes: Any) -> Recipe:
    made = Recipe(
        name="sharing",
        summary="",
        paper="",
        claim="",
        game=TextTask(Odd(3), max_tokens=6),
        source=OwnPrompts(GROUPS, PLAYS),
        cast=Everyone("solver"),
        policies={
            "solver": Policy(model="tokens", objective="grpo", sizes={"width": 16, "layers": 1, "context": 20}),
        },
        probes=(Probe("sampled", SharedPrompts(4, seed=1, is_fixed=True), greedy=False),),
        verdict=lambda run, baseline: Verdict(True, 0, 0, ""),
        turns=SHARE,
        plays=SHARE,
        mode=Mode.ROLLOUTS,
    )
    return replace(made, **changes)


def own(recipe: Recipe) -> Recipe:
    (policy,) = recipe.policies.values()
    return replace(recipe, policies={"solver": replace(policy, owner="own", is_varied=True)})


def run(company: Company, epochs: int) -> list[int]:
    turns = []
    for _ in range(epochs):
        turns.append(company.collect())
        company.update()
    return turns


@pytest.mark.parametrize("is_own", [False, True])
def test_others_plays_are_found_true_and_learned_from_at_the_runs_ratio(is_own: bool) -> None:
    recipe = own(a_recipe()) if is_own else a_recipe()
    company = Company(recipe, NAMES, keys=KEYS, foreign_ratio=0.5, check_rate=1.0)
    turns = run(company, 4)
    assert {found.verdict for _, _, found in company.findings} == {evidence.Verdict.TRUE}
    looked = Counter(name for name, _, _ in company.findings)
    assert all(looked[name] == 7 for name in NAMES), "what there is no use for is not looked into"
    assert turns[0] == 3 * SHARE
    assert turns[-1] == 3 * SHARE // 2, "half of an update is others', and not played by oneself"
    for name, learner in company.learners.items():
        used = Counter[PeerId]()
        for author, version, samples in learner.learned_from:
            assert author != name
            assert version == 2
            used[author] += samples
        assert used.total() == SHARE // 2
        assert max(used.values()) <= SHARE // 4, "nobody gives more than half of it"
    policies = [learner.policy_arrays() for learner in company.learners.values()]
    assert is_own == all(not each for each in policies)


def test_nobody_shares_at_a_ratio_of_nothing() -> None:
    company = Company(a_recipe(), NAMES, keys=KEYS, foreign_ratio=0.0)
    assert run(company, 3) == [3 * SHARE] * 3
    assert not any(learner.learned_from for learner in company.learners.values())
    assert not company.findings


def columns(**edits: Callable[[np.ndarray], np.ndarray]) -> Callable[[Give], Give]:
    def edit(given: Give) -> Give:
        changed = {name: array.copy() for name, array in given.columns.items()}
        return replace(given, columns=changed | {name: make(changed[name]) for name, make in edits.items()})

    return edit


def _another_token(tokens: np.ndarray) -> np.ndarray:
    """The letter "Q" first in all, whatever the model asked for."""
    tokens[0] = 2 + 1 + ord("Q") - 32
    return tokens


def _another_letter(acts: np.ndarray) -> np.ndarray:
    acts[0] = ord("Q")
    return acts


LIES: dict[str, tuple[Callable[[Give], Give], Lie]] = {
    "reward": (columns(rewards=lambda rewards: rewards + 1), Lie.REWARDS),
    "scenario": (columns(scenarios=lambda data: _edited(data)), Lie.SEEDS),
    "draws": (columns(draws=lambda draws: draws - np.float32(0.5)), Lie.LOG_PROBS),
    "token": (columns(tokens=_another_token, acts=_another_letter), Lie.DRAWS),
}


def _edited(data: np.ndarray) -> np.ndarray:
    raw = data.tobytes()
    place = raw.index(b"seed") + 6
    data[place] ^= 1
    return data


@pytest.mark.parametrize("lie", sorted(LIES))
def test_what_is_false_is_found_in_the_first_shard_and_its_author_taken_from_no_more(lie: str) -> None:
    edit, kind = LIES[lie]
    liar = NAMES[1]
    company = Company(
        a_recipe(), NAMES, keys=KEYS, check_rate=1.0, tamper=lambda name, given: edit(given) if name == liar else given
    )
    run(company, 3)
    of_liar = [found for _, author, found in company.findings if author == liar]
    assert [(found.verdict, found.lie) for found in of_liar] == [(evidence.Verdict.FALSE, kind)] * 2
    assert {f.verdict for _, author, f in company.findings if author != liar} == {evidence.Verdict.TRUE}
    for name, learner in company.learners.items():
        assert name == liar or {author for author, _, _ in learner.learned_from} == set(NAMES) - {liar, name}


def test_false_rewards_are_found_without_the_policy_and_at_no_check_rate() -> None:
    edit, _ = LIES["reward"]
    company = Company(
        own(a_recipe()),
        NAMES,
        keys=KEYS,
        check_rate=0.0,
        tamper=lambda name, given: edit(given) if name == NAMES[0] else given,
    )
    run(company, 2)
    assert {found.lie for _, author, found in company.findings if author == NAMES[0]} == {Lie.REWARDS}


def test_an_update_that_is_given_up_leaves_what_others_played() -> None:
    company = Company(a_recipe(), NAMES, keys=KEYS, foreign_ratio=0.5)
    run(company, 2)
    learner = company.learners[NAMES[0]]
    before = learner.num_foreign
    assert before
    learner.collect(SHARE)
    update = learner.update()
    next(update)
    update.close()
    assert learner.num_foreign == before


def test_what_cannot_be_shared_is_refused_with_what_to_take() -> None:
    for recipe, said in (
        (a_recipe(source=FreshSeeds()), "OwnPrompts"),
        (a_recipe(cast=Everyone(Learned("solver")), policies=a_recipe().policies | {"b": _other()}), "mode local"),
    ):
        with pytest.raises(UsageError, match=said):
            Company(recipe, NAMES, keys=KEYS)


def _other() -> Policy:
    return Policy(model="tokens", objective="grpo")


# --- the sampler -----------------------------------------------------------------------------------------------------

TALK = Role(Text(), Text())


def a_unit(author: PeerId, version: int = 5, plays: int = 4, *, earned: tuple[float, ...] = (0, 1)) -> Unit:
    takes = []
    for number in range(plays):
        take = Take("solver", TALK, Learned("solver"), Scenario(0), number, version)
        take.sights, take.acts, take.rewards = ["1"], ["1"], [earned[number % len(earned)]]
        takes.append(take)
    return Unit(author, version, tuple(takes))


def test_what_teaches_nothing_does_not_wait() -> None:
    sampler = Sampler(8, 32, np.random.default_rng(0))
    assert sampler.add([a_unit(NAMES[0], earned=(1.0,)), a_unit(NAMES[0])]) == 4
    assert sampler.waiting == 4


def test_who_makes_much_pushes_out_nobody_and_has_no_more_to_say() -> None:
    sampler = Sampler(16, 64, np.random.default_rng(0))
    sampler.add([a_unit(NAMES[1]), a_unit(NAMES[2]), a_unit(NAMES[2])])
    sampler.add([a_unit(NAMES[0], version) for version in range(100)])
    assert sampler.waiting == 64
    drawn = sampler.draw()
    given = Counter[PeerId]()
    for unit in drawn:
        given[unit.author] += unit.samples
    assert given.total() == 16
    assert given[NAMES[0]] <= 8
    assert all(unit.version >= 80 for unit in drawn if unit.author == NAMES[0]), "its oldest went first"
    used = sampler.used()
    assert sum(samples for _, _, samples in used) == 16
    assert sampler.waiting == 48
    again = sampler.draw()
    assert not {id(unit) for unit in again} & {id(unit) for unit in drawn}


def test_what_is_too_old_or_of_a_liar_is_gone() -> None:
    sampler = Sampler(16, 64, np.random.default_rng(0))
    sampler.add([a_unit(NAMES[0], 3), a_unit(NAMES[1], 5)])
    sampler.forget_older(4)
    assert sampler.waiting == 4
    sampler.forget(NAMES[1])
    assert not sampler.waiting
    assert sampler.draw() == []


def given_by(company: Company) -> list[tuple[PeerId, Cid, bytes]]:
    """What each gives in the next epoch, which nobody is handed."""
    company.collect()
    caught: list[tuple[PeerId, Cid, bytes]] = []
    company._hand_on = lambda state: caught.extend(company._coming)  # type: ignore[method-assign]
    company.update()
    return caught


def another_than(company: Company, author: PeerId) -> RecipeLearner:
    return next(learner for name, learner in company.learners.items() if name != author)


def admit(
    learner: RecipeLearner, data: bytes, cid: Cid, author: PeerId, state: Cid | None
) -> tuple[evidence.Finding, int, bool]:
    """Give it, in the first epoch, to be checked."""
    looked = learner.admit(Admit(data, cid, author, 1, state, is_checked=True), 1)
    return looked.finding, looked.samples, looked.is_checked


def test_shards_of_another_swarm_or_author_are_not_used() -> None:
    company = Company(a_recipe(), NAMES, keys=KEYS)
    author, cid, data = given_by(company)[0]
    other = another_than(company, author)
    found, samples, _ = admit(other, data, cid, NAMES[2], company._state)
    assert (found.verdict, samples) == (evidence.Verdict.DOES_NOT_FIT, 0)
    other.share(SwarmId.of_manifest(b"another"))
    found, samples, _ = admit(other, data, cid, author, company._state)
    assert (found.lie, samples) == (Lie.FORM, 0)


@pytest.mark.parametrize("is_own", [False, True])
def test_plays_that_are_sold_again_with_other_last_bits_are_not_used_twice(is_own: bool) -> None:
    company = Company(own(a_recipe()) if is_own else a_recipe(), NAMES, keys=KEYS)
    author, cid, data = given_by(company)[0]
    other, shard = another_than(company, author), open_shard(data, cid=cid)
    found, samples, _ = admit(other, data, cid, author, shard.head.state)
    assert (found.verdict, samples) == (evidence.Verdict.TRUE, other.num_foreign)
    rounded = shard.columns | {"log_probs": np.nextafter(shard.columns["log_probs"], np.float32(-9))}
    again, resold = seal(KEYS[NAMES.index(author)], shard.head, rounded)
    assert again != cid
    samples_before = other.num_foreign
    found, samples, is_checked = admit(other, resold, again, author, shard.head.state)
    assert (found.verdict, samples, is_checked) == (evidence.Verdict.DOES_NOT_FIT, 0, False)
    assert other.num_foreign == samples_before


def test_a_shard_of_which_no_token_was_drawn_again_does_not_count_as_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "CHECKED_TOKENS", 1)
    company = Company(a_recipe(), NAMES, keys=KEYS)
    author, cid, data = given_by(company)[0]
    other = another_than(company, author)
    assert isinstance(other._sharing, sharing.Sharing)
    other._sharing._tokens[author] = 1
    state = open_shard(data, cid=cid).head.state
    found, _, is_checked = admit(other, data, cid, author, state)
    assert (found.verdict, is_checked) == (evidence.Verdict.TRUE, False)
