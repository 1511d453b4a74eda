"""Models of bodies and what they learn by: judged as acted, estimated as by hand, shared as each policy says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.bodies import BodySettings, batch_of, take_advantages
from shoal.training.algorithms.clone import Clone, CloneSettings
from shoal.training.algorithms.ppo_takes import PPOTakes, PPOTakesSettings
from shoal.training.algorithms.reinforce_takes import ReinforceTakes
from shoal.training.manifest import Mode
from shoal.training.models.bodies import BodyModel
from shoal.training.models.entities import Entities
from shoal.training.models.gru import GRU
from shoal.training.models.mlp import MLP
from shoal.training.recipes import hammer, shared_layers
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import Company, manifest_of, peers, play_locally
from shoal.training.recipes.makers import make_model
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.placing import NOWHERE, check_said, number_of, place_of
from shoal.training.recipes.playing import roles_of
from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict
from shoal.training.state import digest
from shoal.training.tasks.cast import ByRole, Everyone, Learned, Scripted
from shoal.training.tasks.failures import Failures
from shoal.training.tasks.games.deferred import Deferred
from shoal.training.tasks.games.gym import GymGame
from shoal.training.tasks.games.messenger import MESSENGER, Messenger
from shoal.training.tasks.games.oneof import OneOf
from shoal.training.tasks.games.team import Team
from shoal.training.tasks.play import Ask, Box, Continuous, Discrete, End, Play, Role, Table, Take, Text
from shoal.training.tasks.source import ByPlace, FreshSeeds, News, Scenario, SharedPrompts
from shoal.training.tasks.stage import Stage, alone

NUMBERED, FREE = Role(Box(6), Discrete(3)), Role(Box(6), Continuous(2))
MODELS = ("mlp", "gru", "entities")
SIZES: Mapping[str, Mapping[str, Any]] = {
    "mlp": {"hidden_sizes": (8,)},
    "gru": {"width": 8, "hidden_sizes": (8,)},
    "entities": {"own": 2, "entity": 2, "width": 8, "hidden_sizes": (8,)},
}


def made(kind: str, role: Role = NUMBERED, **sizes: Any) -> BodyModel:
    """A small one, whose policy is not quite even."""
    model: BodyModel = make_model(kind, {**SIZES[kind], **sizes}, 1, lambda: [role])
    model.flat[:] += 0.1 * np.random.default_rng(0).normal(size=model.flat.size).astype(np.float32)
    return model


def lived(
    model: BodyModel,
    role: Role = NUMBERED,
    lengths: Sequence[int] = (3, 5, 1),
    *,
    legal: bool = False,
    central: int = 0,
) -> list[Take]:
    """Takes that the model acted in, side by side; every other one was cut off."""
    rng = np.random.default_rng(7)
    takes = [Take("body", role, Learned("a"), Scenario(number), number) for number in range(len(lengths))]
    for turn in range(max(lengths)):
        asked = [take for take, length in zip(takes, lengths, strict=True) if turn < length]
        for take in asked:
            take.sights.append(rng.normal(size=6).astype(np.float32))
            take.rewards.append(float(rng.normal()))
            if legal:
                take.legal.append(np.array([True, turn % 2 == 0, True]))
            if central:
                take.central.append(rng.normal(size=central).astype(np.float32))
        acts, log_probs = model.act(Table(asked), rng, greedy=False)
        for take, act, log_prob in zip(asked, acts, log_probs, strict=True):
            take.acts.append(act if isinstance(role.acts, Continuous) else int(act))
            take.log_probs.append(float(log_prob))
    for take in takes[::2]:
        take.cut, take.final = True, rng.normal(size=6).astype(np.float32)
    return takes


# --- models ---


@pytest.mark.parametrize("role", [NUMBERED, FREE])
@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_says_of_its_acts_when_it_judges_is_what_it_said_when_it_acted(kind: str, role: Role) -> None:
    """Whatever stood beside it in a batch, and with the state of the whole take."""
    model = made(kind, role)
    takes = lived(model, role, legal=role is NUMBERED)
    turns = model.encode(takes)
    judged = model.evaluate(turns)
    acted = np.concatenate([take.log_probs for take in takes])
    np.testing.assert_allclose(judged.log_probs[turns.is_act].detach().numpy(), acted, atol=1e-5)
    assert judged.values.shape == judged.entropy.shape == turns.is_act.shape
    assert torch.isfinite(judged.entropy[turns.is_act]).all()
    few = model.evaluate(turns.part(np.array([0])))
    np.testing.assert_allclose(few.values[0].detach(), judged.values[0, : few.values.shape[1]].detach(), atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_not_legal_is_never_done_and_nothing_is_lost_by_it(kind: str) -> None:
    """Greedy or not; gradients stay finite."""
    model = made(kind)
    takes = lived(model, lengths=(40, 40), legal=True)
    assert all(act != 1 for take in takes for act in take.acts[1::2])
    assert any(act == 1 for take in takes for act in take.acts[::2])
    turns = model.encode(takes)
    judged = model.evaluate(turns)
    gradient = model.gradient_of((judged.log_probs - judged.entropy).sum())
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_acts_are_the_likeliest_and_ask_for_no_luck(kind: str) -> None:
    """For numbers, the mean."""
    for role in (NUMBERED, FREE):
        model = made(kind, role)
        (take,) = lived(model, role, (2,))
        take.sights.append(np.ones(6, np.float32))
        state = np.random.default_rng(0)
        first, second = (model.act([take], state, greedy=True)[0] for _ in range(2))
        np.testing.assert_allclose(first, second, atol=1e-6)
        assert state.bit_generator.state == np.random.default_rng(0).bit_generator.state


@pytest.mark.parametrize("kind", MODELS)
def test_initial_values_hang_on_the_seed_alone(kind: str) -> None:
    """The same bits for the same seed."""
    first, same, other = (make_model(kind, SIZES[kind], seed, lambda: [FREE]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.flat, same.flat)
    assert not np.array_equal(first.flat, other.flat)
    assert {"decide/log_std", "value/0/weight"} <= first.parameters.keys()


def test_critics_see_what_is_shown_to_them_and_acts_do_not_depend_on_it() -> None:
    """Of a game that shows other numbers, it says so."""
    model = made("mlp", central=4)
    takes = lived(model, central=4)
    turns = model.encode(takes)
    before = model.evaluate(turns)
    assert turns.central is not None
    after = model.evaluate(replace(turns, central=turns.central + 1))
    torch.testing.assert_close(before.log_probs, after.log_probs)
    assert (before.values != after.values).all()
    assert np.isfinite(model.last_values(takes)).all()
    with pytest.raises(UsageError, match="shows critics 0 numbers and not 4"):
        model.encode(lived(made("mlp")))


def test_a_recurrent_model_knows_what_was_and_forgets_nothing_by_a_new_policy() -> None:
    """The same sight after another one is another state; a kept state is what is computed anew."""
    model = made("gru")
    assert isinstance(model, GRU)
    takes = lived(model, lengths=(4, 4))
    for take in takes:
        take.sights.append(np.ones(6, np.float32))
    kept = model._newest_features(takes)
    assert not torch.equal(kept[0], kept[1])
    model._kept.clear()
    torch.testing.assert_close(model._newest_features(takes), kept)
    model.flat[:] *= 1.5
    changed = model._newest_features(takes)
    model._kept.clear()
    torch.testing.assert_close(model._newest_features(takes), changed)
    assert not torch.allclose(changed, kept)


def test_the_order_of_entities_is_of_no_consequence_unless_places_differ() -> None:
    """A set; and one front-end for each size of sight, behind which all is the same."""
    for has_places in (False, True):
        model = made("entities", has_places=has_places)
        takes = lived(model)
        turns = model.encode(takes)
        swapped = replace(turns, sights=turns.sights[..., [0, 1, 4, 5, 2, 3]])
        same = torch.allclose(model.evaluate(turns).values, model.evaluate(swapped).values, atol=1e-6)
        assert same is not has_places
    several = Entities([NUMBERED, Role(Box(2), Discrete(3)), Role(Box(10), Discrete(3))], own=2, entity=2, width=8)
    assert several.sizes == [2, 6, 10]
    assert {name.split("/")[1] for name in several.parameters if name.startswith("encode/")} == {"2", "6", "10"}
    small = Take("small", Role(Box(2), Discrete(3)), Learned("a"), Scenario(0), 0)
    small.sights, small.acts, small.rewards, small.log_probs = [np.ones(2, np.float32)], [1], [0.0], [0.0]
    mixed = [*lived(made("entities")), small]
    together = several.evaluate(several.encode(mixed)).values[:, 0]
    apart = torch.cat([several.evaluate(several.encode([take])).values[:, 0] for take in mixed])
    torch.testing.assert_close(together, apart)
    for take in mixed:
        take.sights.append(take.sights[0])
    joint, _ = several.act(mixed, np.random.default_rng(0), greedy=True)
    assert joint.tolist() == [several.act([take], np.random.default_rng(0), True)[0][0] for take in mixed]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MLP([]), "plays none"),
        (lambda: MLP([Role(Text(), Discrete(2))]), "sees numbers"),
        (lambda: MLP([Role(Box(2), Text())]), "acts in one way"),
        (lambda: MLP([NUMBERED, FREE]), "acts in one way"),
        (lambda: GRU([NUMBERED, Role(Box(2), Discrete(3))]), "always as many"),
        (lambda: MLP([NUMBERED], hidden_sizes=(0,)), "hidden_sizes"),
        (lambda: MLP([NUMBERED], central=-1), "central is 0"),
        (lambda: GRU([NUMBERED], width=0), "width is 1"),
        (lambda: Entities([NUMBERED], own=3, entity=2), "6 is not 3 numbers"),
        (lambda: Entities([NUMBERED], own=2, entity=2, width=9), "multiple"),
        (lambda: make_model("mlp", {"width": 3}, 0, lambda: [NUMBERED]), "not made of"),
    ],
)
def test_a_model_that_cannot_be_says_why(make: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        make()


# --- objectives ---


def by_hand(take: Take, values: Sequence[float], last: float, gamma: float, gae_lambda: float) -> list[float]:
    """GAE, step by step from the end."""
    found, running, after = [], 0.0, last if take.cut else 0.0
    for reward, value in zip(reversed(take.rewards), reversed(values), strict=True):
        running = reward + gamma * after - value + gamma * gae_lambda * running
        after = value
        found.append(running)
    return found[::-1]


@pytest.mark.parametrize("kind", MODELS)
def test_advantages_are_those_of_each_take_by_itself(kind: str) -> None:
    """Worth what the critic says where it was cut off, nothing where it ended."""
    model, settings = made(kind), BodySettings(gamma=0.9, reward_scale=0.5)
    takes = lived(model, lengths=(3, 5, 1, 2))
    last = model.last_values(takes)
    assert (last[::2] != 0).all()
    assert (last[1::2] == 0).all()
    batch = batch_of(takes, model, settings, gae_lambda=0.8, has_values=True)
    assert batch is not None
    is_act = batch.turns.is_act
    values = model.evaluate(batch.turns).values[is_act].detach().numpy()
    wanted: list[float] = []
    for take in takes:
        own = replace(take, rewards=[0.5 * reward for reward in take.rewards])
        start = len(wanted)
        wanted += by_hand(own, values[start : start + len(take)].tolist(), float(last[takes.index(take)]), 0.9, 0.8)
    np.testing.assert_allclose(batch.advantages[is_act], wanted, atol=1e-5)
    np.testing.assert_allclose(batch.returns[is_act], np.array(wanted) + values, atol=1e-5)
    assert batch_of([], model, settings, gae_lambda=0.8, has_values=True) is None
    assert len(batch) == batch.moments().count
    assert float(batch.moments().mean) == pytest.approx(np.mean(wanted), abs=1e-5)


def test_a_last_sight_is_worth_what_the_model_says_of_it() -> None:
    """As if one more act had been asked for there."""
    for kind in MODELS:
        model = made(kind)
        (take,) = lived(model, lengths=(3,))
        longer = replace(take, sights=[*take.sights, take.final], acts=[*take.acts, 0], rewards=[0.0] * 4)
        longer.log_probs = [0.0] * 4
        turns = model.encode([longer])
        wanted = model.evaluate(turns).values[turns.is_act][-1]
        assert model.last_values([take])[0] == pytest.approx(float(wanted.detach()), abs=1e-6)


def test_without_a_critic_an_act_is_worth_what_came_after_it() -> None:
    """Discounted; a cut ends it."""
    takes = lived(made("mlp"), lengths=(3, 2))
    advantages = take_advantages(takes, np.zeros(5, np.float32), np.zeros(2, np.float32), BodySettings(gamma=0.5), 1.0)
    wanted = [sum(0.5**n * r for n, r in enumerate(take.rewards[k:])) for take in takes for k in range(len(take))]
    np.testing.assert_allclose(advantages, wanted, atol=1e-6)


def prepared(objective: Any, model: BodyModel, takes: list[Take]) -> Any:
    """Its batch."""
    preparing = objective.prepare(takes, model, News())
    with pytest.raises(StopIteration) as end:
        next(preparing)
    return end.value.value


@pytest.mark.parametrize("role", [NUMBERED, FREE])
def test_the_gradients_are_those_of_the_formulas(role: Role) -> None:
    """PPO's before the first step is REINFORCE's with its advantages; away from there, finite differences say so."""
    model = made("mlp", role)
    takes = lived(model, role)
    settings = PPOTakesSettings(value_coefficient=0.3, entropy_coefficient=0.02, clip_range=0.2)
    batch = prepared(PPOTakes(settings), model, takes)
    batch = batch.normalized(batch.moments())
    objective = PPOTakes(settings)
    plain = replace(settings, value_coefficient=0.0, entropy_coefficient=0.0)
    mine = model.gradient_of(PPOTakes(plain).loss(model, batch)[0]).copy()
    theirs = model.gradient_of(ReinforceTakes(BodySettings(entropy_coefficient=0.0)).loss(model, batch)[0])
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
    model.flat[:] += 0.05 * np.random.default_rng(3).normal(size=model.flat.size).astype(np.float32)
    direction = np.random.default_rng(4).normal(size=model.flat.size).astype(np.float32)
    gradient = model.gradient_of(objective.loss(model, batch)[0]).astype(np.float64)

    def at(step: float) -> float:
        before = model.flat.copy()
        model.flat[:] += np.float32(step) * direction
        loss = float(objective.loss(model, batch)[0].detach())
        model.flat[:] = before
        return loss

    assert (at(2e-3) - at(-2e-3)) / 4e-3 == pytest.approx(float(gradient @ direction), rel=0.03, abs=2e-3)


def test_a_ratio_that_is_far_enough_is_held() -> None:
    """Upwards where an act was good, downwards where it was bad."""
    model, objective = made("mlp"), PPOTakes(PPOTakesSettings(value_coefficient=0.0, entropy_coefficient=0.0))
    batch = prepared(objective, model, lived(model))
    for advantage, shift in ((1.0, -1.0), (-1.0, 1.0)):
        held = replace(batch, advantages=torch.full_like(batch.advantages, advantage), old=batch.old + shift)
        loss, measures = objective.loss(model, held)
        assert np.abs(model.gradient_of(loss)).max() == 0
        assert measures["clip_fraction"] == 1


@pytest.mark.parametrize("kind", MODELS)
def test_bodies_can_be_taught_by_what_was_done(kind: str) -> None:
    """Cloning serves them as it serves text."""
    model, objective = made(kind), Clone(CloneSettings())
    takes = lived(model)
    batch = prepared(objective, model, takes)
    first, _ = objective.loss(model, batch)
    for _ in range(20):
        model.flat[:] -= 0.5 * model.gradient_of(objective.loss(model, batch)[0])
    assert float(objective.loss(model, batch)[0].detach()) < float(first.detach())


def cart_pole(
    model: str, objective: str, settings: Mapping[str, Any], sizes: Mapping[str, Any] | None = None
) -> Recipe:
    """One policy that balances."""
    return Recipe(
        name="cart-pole",
        summary="one body",
        paper="none",
        claim="it balances",
        game=GymGame("CartPole-v1"),
        source=FreshSeeds(),
        cast=Everyone("own"),
        policies={"own": Policy(model=model, objective=objective, settings=settings, sizes=sizes or {})},
        probes=(Probe("return", SharedPrompts(16, seed=1, is_fixed=True)),),
        verdict=lambda run, baseline: Verdict(holds=True, figure=0.0, baseline=0.0, text=""),
        turns=1024,
        plays=8,
    )


@pytest.mark.parametrize(
    ("model", "objective", "settings", "sizes", "epochs"),
    [
        ("mlp", "ppo", {"learning_rate": 3e-3, "num_minibatches": 8}, {}, 8),
        ("mlp", "reinforce", {"learning_rate": 1e-2}, {}, 10),
        ("gru", "ppo", {"learning_rate": 3e-3, "num_minibatches": 8}, {"width": 32}, 8),
    ],
)
def test_cart_pole_is_learned_in_seconds(
    model: str, objective: str, settings: dict[str, Any], sizes: dict[str, Any], epochs: int
) -> None:
    """From 10 to 30 steps that an even policy stands, greedily; the best of the last probes counts."""
    company = Company(cart_pole(model, objective, settings, sizes), peers(1))
    best = 0.0
    for epoch in range(epochs):
        company.collect()
        company.update()
        if epoch >= epochs // 2:
            best = max(best, company.probe()["return"])
    assert best >= 150


# --- games of our own, for what recipes share ---


@dataclass(frozen=True)
class Gather:
    """Walkers on a line are to stand where the mark is. Their sights differ in length from task to task."""

    walkers: int = 2
    extra: int = 0
    turns: int = 6
    name: str = "gather"

    @property
    def roles(self) -> dict[str, Role]:
        return {f"walker_{number}": Role(Box(2 + 2 * self.extra), Discrete(3)) for number in range(self.walkers)}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        mark, places = float(rng.uniform(-1, 1)), rng.uniform(-1, 1, self.walkers)
        paid = 0.0
        for _ in range(self.turns):
            asks = []
            for role, place in zip(self.roles, places, strict=True):
                sight = np.zeros(2 + 2 * self.extra, np.float32)
                sight[:2] = place - mark, mark
                asks.append(Ask(role, sight, paid))
            moves = np.array((yield tuple(asks))) - 1
            places = places + 0.2 * moves
            paid = -float(np.abs(places - mark).mean())
        return End(
            dict.fromkeys(self.roles, paid), {role: np.zeros(2 + 2 * self.extra, np.float32) for role in self.roles}
        )


def two_policies(**local: Any) -> Recipe:
    """A messenger and those that it talks to, on our own game."""
    base = cart_pole("mlp", "ppo", {})
    small = {"hidden_sizes": (8,)}
    return replace(
        base,
        game=Messenger(Gather(), 2),
        cast=ByRole(messenger="messenger", walker="local"),
        policies={
            "messenger": Policy(model="mlp", objective="ppo", sizes=small),
            "local": Policy(**{"model": "mlp", "objective": "ppo", "sizes": small, **local}),
        },
        turns=48,
    )


def bits(company: Company, policy: str, pattern: str = "") -> set[bytes]:
    """Of a policy's parameters whose names begin so, one for every different node."""
    return {
        b"".join(
            array.tobytes()
            for name, array in learner._trainees[policy].model.parameters.items()
            if name.startswith(pattern)
        )
        for learner in company.learners.values()
    }


def after(recipe: Recipe, epochs: int = 2, **settings: Any) -> Company:
    """Three nodes, so many epochs later."""
    company = Company(recipe, peers(3), **settings)
    for _ in range(epochs):
        company.collect()
        company.update()
    return company


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.ROLLOUTS])  # plays of text are shared
def test_policies_by_role_are_each_the_same_bits_everywhere(mode: Mode) -> None:
    """Both have learned, from their own takes."""
    recipe = two_policies()
    began, company = Company(recipe, peers(3)), after(recipe, mode=mode)
    for policy in ("messenger", "local"):
        assert len(bits(company, policy)) == 1
        assert bits(company, policy) != bits(began, policy)
    assert len({digest(each.export_state()) for each in company.learners.values()}) == 1


@pytest.mark.parametrize("model", MODELS)
def test_one_policy_is_everybodys_and_the_other_each_ones_own(model: str) -> None:
    """The own ones begin alike, and part; no state carries them."""
    sizes = {**SIZES[model], "own": 2} if model == "entities" else SIZES[model]
    company = after(two_policies(owner="own", model=model, sizes=sizes))
    assert len(bits(company, "local")) == 3
    assert len(bits(company, "messenger")) == 1
    states = [each.export_state() for each in company.learners.values()]
    assert len({digest(state) for state in states}) == 1
    assert not any(name.startswith("local/") for name in states[0])


def test_a_policy_may_be_shared_in_part_beside_one_that_is_shared_whole() -> None:
    """What perceives is one's own, what decides and values is everybody's."""
    sizes = {**SIZES["entities"], "own": 2}
    company = after(two_policies(model="entities", sizes=sizes, shared=("decide/*", "value/*")))
    assert len(bits(company, "messenger")) == 1
    assert len(bits(company, "local", "encode/")) == 3
    assert len(bits(company, "local", "decide/")) == len(bits(company, "local", "value/")) == 1


def test_a_frozen_policy_stands_still_beside_one_that_learns() -> None:
    """Bit by bit."""
    recipe = two_policies(is_frozen=True)
    began, company = Company(recipe, peers(3)), after(recipe)
    assert bits(company, "local") == bits(began, "local")
    assert bits(company, "messenger") != bits(began, "messenger")


def test_a_messenger_whose_words_do_not_arrive_changes_nothing_for_the_others() -> None:
    """They see zeros, in sights of the same size."""
    game = Messenger(Gather(), 2, is_mute=True)
    assert game.roles == Messenger(Gather(), 2).roles
    seats = ByRole(messenger=Scripted("random"), walker=Scripted("random"))
    staged = alone(Stage(game, SharedPrompts(2), seats, {}, 2).collect(News()))
    for take in staged.takes:
        if take.role != MESSENGER:
            assert not np.any([sight[2:] for sight in take.sights])


def test_messages_at_random_are_told_whatever_the_messenger_says() -> None:
    """Numbers from -1 to 1, other ones for each role and step."""
    game = Messenger(Gather(), 2, is_random=True)
    seats = ByRole(messenger=Scripted("random"), walker=Scripted("random"))
    told = [
        float(number)
        for take in alone(Stage(game, SharedPrompts(2), seats, {}, 2).collect(News())).takes
        if take.role != MESSENGER
        for sight in take.sights
        for number in sight[2:]
    ]
    assert max(map(abs, told)) < 1
    assert len(set(told)) == len(told)
    with pytest.raises(UsageError, match="leave is_mute or is_random out"):
        Messenger(Gather(), 2, is_mute=True, is_random=True)


def test_a_policy_has_the_roles_that_the_cast_gives_it_or_that_it_names() -> None:
    """Each space once."""
    recipe = two_policies()
    assert roles_of(recipe, "local") == [Role(Box(4), Discrete(3))]
    assert roles_of(recipe, "messenger") == [Role(Box(4), Continuous(4))]
    named = two_policies(roles=("walker_*",))
    assert roles_of(named, "local") == [Role(Box(4), Discrete(3))]
    with pytest.raises(UsageError, match="which the game has not"):
        roles_of(two_policies(roles=("walkers",)), "local")


# --- places ---


def test_places_are_given_in_the_order_of_numbers_and_kept() -> None:
    """The least that nobody has; who said nothing has none."""
    anew = np.array([[30, NOWHERE], [10, NOWHERE], [20, NOWHERE]])
    assert [place_of(number, anew) for number in (10, 20, 30, 40)] == [0, 1, 2, NOWHERE]
    gone = np.array([[30, 2], [5, NOWHERE], [10, 0], [7, NOWHERE]])
    assert [place_of(number, gone) for number in (30, 10, 5, 7)] == [2, 0, 1, 3]
    check_said(np.array([number_of(peers(1)[0]), NOWHERE]))
    for said in ([-1, 0], [2**52, 0], [1, -2], [1, 2**40]):
        with pytest.raises(ProtocolError, match="no node has"):
            check_said(np.array(said))


def by_place(**changed: Any) -> Recipe:
    """Two tasks, whose sights are of other sizes, one after the other among the nodes."""
    params = {"near": {"game": "near"}, "far": {"game": "far"}}
    policy: dict[str, Any] = {
        "model": "entities",
        "objective": "ppo",
        "sizes": {"own": 2, "entity": 2, "width": 8, "hidden_sizes": (8,)},
        "shared": ("decide/*", "value/*"),
        **changed,
    }
    return replace(
        cart_pole("mlp", "ppo", {}),
        game=OneOf(near=Team(Gather(), "walker", 0.5), far=Deferred("far", lambda: Team(Gather(2, 2), "walker"))),
        source=ByPlace({name: FreshSeeds(each) for name, each in params.items()}),
        cast=Everyone("own"),
        policies={"own": Policy(**policy)},
        probes=(Probe("return", ByPlace({name: SharedPrompts(4, params=each) for name, each in params.items()})),),
        turns=48,
        is_placed=True,
    )


def test_each_node_has_a_task_by_its_place_and_trains_the_front_end_of_that() -> None:
    """The front-end of a task that a node does not have stays as it was; what decides is everybody's."""
    began, company = Company(by_place(), peers(3)), after(by_place(), 3)
    places = [learner._place for learner in company.learners.values()]
    assert sorted(places) == [0, 1, 2]
    (before,) = bits(began, "own", "encode/6/")
    for learner in company.learners.values():
        own = learner._trainees["own"].model.parameters
        far = b"".join(array.tobytes() for name, array in own.items() if name.startswith("encode/6/"))
        assert (far == before) == (learner._place % 2 == 0)
    assert len(bits(company, "own", "decide/")) == 1
    assert by_place().is_by_all
    assert math.isfinite(company.probe()["return"])


def test_a_node_keeps_its_place_in_its_next_life_and_takes_none_of_an_update_that_failed(tmp_path: Path) -> None:
    """From its file."""
    recipe = by_place()
    company = Company(recipe, peers(2))
    name, learner = list(company.learners.items())[1]
    learner.settle_in(tmp_path)
    learner.collect(48)
    update = learner.update()
    next(update)
    update.close()
    assert learner._place == NOWHERE
    company.collect()
    company.update()
    assert learner._place != NOWHERE
    again = RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, life="2")
    again.settle_in(tmp_path)
    assert again._place == learner._place
    assert again.evaluate(1, 0)


# --- the recipes of bodies, tiny ---


def tiny(recipe: Recipe, probes: Mapping[str, int]) -> Recipe:
    """In a second or two."""
    changes: dict[str, Any] = {f"probes.return.source.{path}": value for path, value in probes.items()}
    return overridden(recipe, {**changes, "turns": 200, "plays": 8})


@pytest.mark.parametrize(
    ("recipe", "probes"),
    [
        (hammer.RECIPE, {"per_epoch": 4}),
        (shared_layers.RECIPE, {f"sources.{name}.per_epoch": 4 for name in shared_layers.TASKS}),
    ],
    ids=["hammer", "shared-layers"],
)
def test_a_recipe_of_bodies_and_its_baseline_run_and_are_judged(recipe: Recipe, probes: Mapping[str, int]) -> None:
    """In three nodes' parts in one process."""
    pytest.importorskip("mpe2", reason="the games extra brings it")
    pytest.importorskip("pettingzoo", reason="the games extra brings it")
    small = tiny(recipe, probes)
    held_against = ({}, recipe.baseline, *recipe.further)
    run, *baselines = (play_locally(overridden(small, each), 3, epochs=3) for each in held_against)
    verdict = recipe.verdict(run, *baselines)
    assert math.isfinite(verdict.figure)
    assert math.isfinite(verdict.baseline)
    assert "return" in run.scores


def test_the_verdicts_are_the_claims() -> None:
    """As good is not enough."""

    def report(*scores: float) -> Report:
        return Report({"return": tuple(enumerate(scores, 1))}, len(scores), 1, 1.0, 3)

    good, bad = report(-40, -20, -20, -20), report(-40, -25, -25, -25)
    assert hammer.judge(good, bad, bad).holds
    assert not hammer.judge(bad, bad, bad).holds
    assert not hammer.judge(good, bad, good).holds, "no better than messages at random"
    assert not hammer.judge(good, good, bad).holds, "no better than none"
    assert shared_layers.judge(report(-3, -1, -1), report(-3, -2, -1)).holds
    assert not shared_layers.judge(report(-3, -2, -1), report(-3, -2, -1)).holds
