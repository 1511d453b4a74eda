"""Recipes: what is set, what is shared and what is not, whoever lies and whatever is started anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.clone import Clone, CloneSettings
from shoal.training.algorithms.grpo import GRPO, GroupCorrection, GRPOSettings, group_advantages
from shoal.training.manifest import Mode
from shoal.training.models.tokens import TokenModel
from shoal.training.recipes.crowd import HASH_BITS, NOBODY, crowd, hash_of
from shoal.training.recipes.installed import RecipeTask, load_recipe, recipe_names
from shoal.training.recipes.learner import PRIVATE, RecipeLearner
from shoal.training.recipes.local import Company, manifest_of, peers, play_locally
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.recipe import Policy, Recipe, Report
from shoal.training.recipes.rlccf import RECIPE, judge
from shoal.training.state import digest
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.failures import Failures
from shoal.training.tasks.play import Role, Take, Text
from shoal.training.tasks.source import News, Scenario, SharedPrompts

TINY: Mapping[str, Any] = {
    "policies.own.sizes.width": 16,
    "policies.own.sizes.layers": 1,
    "policies.own.settings.prompts": 4,
    "policies.own.settings.plays": 3,
    "policies.own.warm.max_steps": 2,
    "source.per_epoch": 4,
    "source.plays": 3,
    "probes.accuracy.source.per_epoch": 4,
    "turns": 12,
    "plays": 12,
}


def tiny(**policy: Any) -> Recipe:
    """RLCCF in a second, with another kind of policy if one is asked for."""
    recipe = overridden(RECIPE, TINY)
    if not policy:
        return recipe
    own = recipe.policies["own"]
    changed: dict[str, Any] = {"objective": "clone", "settings": {}, "owner": "all", "is_varied": False, **policy}
    return replace(recipe, policies={"own": replace(own, **changed)})


def run(recipe: Recipe, epochs: int = 2, count: int = 3, **settings: Any) -> Company:
    """So many epochs in one process."""
    company = Company(recipe, peers(count), **settings)
    for _ in range(epochs):
        company.collect()
        company.update()
    return company


def parameters(learner: RecipeLearner) -> np.ndarray[Any, Any]:
    """Of its one policy."""
    return np.array(learner._trainees["own"].model.flat)


def test_every_recipe_that_is_installed_can_be_loaded_and_says_what_it_is() -> None:
    """With a paper and a claim; its settings can be set to what they are."""
    assert "rlccf" in recipe_names()
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.paper
        assert recipe.claim
        assert RecipeTask(name).run_defaults["batch_per_learner"] == recipe.turns


def test_policies_that_are_the_nodes_own_stay_apart_and_only_answers_cross() -> None:
    """Three that differ, each updated; an epoch's exchange is a few hundred bytes."""
    company = run(tiny(), 3)
    learners = list(company.learners.values())
    assert len({parameters(each).tobytes() for each in learners}) == 3
    assert len({digest(each.export_state()) for each in learners}) == 1
    learners[0].collect(12)
    update = learners[0].update()
    content = company._merging[next(iter(company.learners))].offer(next(update))
    assert content is not None
    assert len(content) < 10_000
    update.close()


def test_the_ballots_of_three_nodes_are_less_than_ten_kilobytes_an_epoch() -> None:
    """Of as many prompts and plays as the recipe has; it is all that crosses in an exchange, whatever the models."""
    tiny_models = {path: value for path, value in TINY.items() if path.startswith("policies.own.sizes")}
    company = run(overridden(RECIPE, {**tiny_models, "policies.own.warm.max_steps": 1}), 1)
    company.collect()
    for name, learner in company.learners.items():
        update = learner.update()
        offered = company._merging[name].offer(next(update)) or b""
        assert 48 * 8 * HASH_BITS / 8 < len(offered) < 10_000 / 3
        update.close()


@pytest.mark.parametrize("mode", list(Mode))
def test_a_policy_of_all_is_the_same_bits_everywhere(mode: Mode) -> None:
    """Taught by each, begun with one's, then averaged."""
    learners = list(run(tiny(owner="all"), 3, mode=mode).learners.values())
    assert len({parameters(each).tobytes() for each in learners}) == 1
    assert len({digest(each.export_state()) for each in learners}) == 1


def test_a_policy_that_is_shared_in_part_has_those_parameters_alike_and_no_others() -> None:
    """The last layers are everybody's, the embedding is one's own."""
    shared = ("scale", "shift", "0/units/*")
    learners = list(run(tiny(shared=shared, warm=None), 3).learners.values())
    names = learners[0]._trainees["own"].model.parameters
    is_shared = {name: name in ("scale", "shift") or name.startswith("0/units/") for name in names}
    for name, alike in is_shared.items():
        found = {each._trainees["own"].model.parameters[name].tobytes() for each in learners}
        assert (len(found) == 1) or not alike
    assert len({parameters(each).tobytes() for each in learners}) == 3
    state = learners[0].export_state()
    assert {name for name in state if "/parameters/" in name} == {
        f"own/parameters/{name}" for name, alike in is_shared.items() if alike
    }


def test_a_frozen_policy_never_changes() -> None:
    """Whatever is played."""
    company = Company(tiny(is_frozen=True, warm=None), peers(2))
    before = [parameters(each) for each in company.learners.values()]
    for _ in range(2):
        company.collect()
        company.update()
    for was, learner in zip(before, company.learners.values(), strict=True):
        np.testing.assert_array_equal(was, parameters(learner))


def test_a_newcomer_takes_the_shared_state_and_goes_on_with_the_others() -> None:
    """In the next epoch, with the same bits."""
    recipe = tiny(owner="all")
    company = run(recipe, 2, count=2)
    state = next(iter(company.learners.values())).export_state()
    name = peers(3)[2]
    newcomer = RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, life="late")
    newcomer.import_state(state)
    company.learners[name] = newcomer
    company._merging[name] = Company(recipe, [name])._merging[name]
    company.collect()
    company.update()
    assert len({parameters(each).tobytes() for each in company.learners.values()}) == 1


def test_who_was_late_plays_in_the_next_epoch_beside_what_it_keeps() -> None:
    """It is not at the end of the source because it was in the epoch before."""
    recipe = tiny(owner="all")
    company = run(recipe, 1, count=2)
    company.collect()
    late = list(company.learners.values())[1]
    turns = late._turns
    state = run(recipe, 2, count=1).learners[peers(1)[0]].export_state()
    late.import_state(state, keep_samples=True)
    assert late.samples == turns
    assert late.collect(12).samples > 0


def test_a_worker_that_is_started_anew_goes_on_with_the_policy_that_is_its_own(tmp_path: Path) -> None:
    """From its file; a file of nonsense begins anew, and says so."""
    recipe = tiny()
    company = Company(recipe, peers(2))
    name = next(iter(company.learners))
    company.learners[name].settle_in(tmp_path)
    for _ in range(2):
        company.collect()
        company.update()
    before, state = parameters(company.learners[name]), company.learners[name].export_state()
    again = RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, life="2")
    again.settle_in(tmp_path)
    again.import_state(state)
    np.testing.assert_array_equal(before, parameters(again))
    (tmp_path / PRIVATE).write_bytes(b"nonsense")
    anew = RecipeLearner(recipe, manifest_of(recipe, name), Failures("x"), peer=name, life="3")
    anew.settle_in(tmp_path)
    assert not np.array_equal(before, parameters(anew))


def test_an_update_that_fails_leaves_everything_as_it_was() -> None:
    """Parameters, optimiser and plays."""
    company = run(tiny(owner="all"), 2, count=2)
    company.collect()
    learner = next(iter(company.learners.values()))
    before, samples = parameters(learner), learner.samples
    update = learner.update()
    next(update)
    update.close()
    np.testing.assert_array_equal(before, parameters(learner))
    assert learner.samples == samples


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {**state, "epoch": np.asarray(-1)}, "no run is at epoch"),
        (lambda state: {name: array for name, array in state.items() if name != "epoch"}, "missing"),
        (lambda state: {**state, "own/parameters/scale": np.full(16, np.nan, np.float32)}, "NaN"),
        (lambda state: {**state, "own/parameters/scale": np.full(16, 1e12, np.float32)}, "beyond"),
    ],
)
def test_a_state_that_no_node_exports_is_refused(change: Any, reason: str) -> None:
    """And nothing has changed."""
    learner = next(iter(run(tiny(owner="all"), 1, count=1).learners.values()))
    before = digest(learner.export_state())
    with pytest.raises(ProtocolError, match=reason):
        learner.import_state(change(learner.export_state()))
    assert digest(learner.export_state()) == before


def test_what_can_be_set_is_set_and_what_cannot_is_refused_with_what_could_be_meant() -> None:
    """By paths; kinds stay what they are."""
    recipe = overridden(RECIPE, {"policies.own.settings.learning_rate": 1e-3, "mode": "diloco", "epochs": 7})
    assert (recipe.policies["own"].settings["learning_rate"], recipe.mode, recipe.epochs) == (1e-3, "diloco", 7)
    for path, value, reason in (
        ("policies.onw.objective", "grpo", "own"),
        ("epoch", 1, "epochs"),
        ("epochs", "many", "same kind"),
        ("game", "chess", "same kind"),
        ("mode", "fast", "cannot be"),
        ("probes.accuracy.source.per_epoch", 1.5, "same kind"),
    ):
        with pytest.raises(UsageError, match=reason):
            overridden(RECIPE, {path: value})
    with pytest.raises(UsageError, match="learning_rate"):
        Company(overridden(RECIPE, {"policies.own.settings.lerning_rate": 1e-3}), peers(1))


def test_the_crowd_says_what_those_say_who_agree_with_themselves() -> None:
    """One that gives one answer outweighs one that gives many; nobody is nobody."""
    sure, torn = [7, 7, 7, 7], [1, 2, 3, 9]
    assert crowd(np.array([[sure], [torn]])).tolist() == [7]
    assert crowd(np.array([[torn], [sure], [[9, 9, 9, 9]], [[9, 9, 9, 1]]])).tolist() == [9]
    assert crowd(np.array([[[NOBODY] * 4], [[NOBODY] * 4]])).tolist() == [NOBODY]
    assert crowd(np.array([[[5, NOBODY, NOBODY, NOBODY]], [[6, 6, 1, 2]]])).tolist() == [6], "silence is no agreement"
    assert hash_of(" ") == NOBODY != hash_of("123")
    assert 0 < hash_of("123") < 2**HASH_BITS


def test_the_verdict_is_the_claim() -> None:
    """A gain that is large enough, and larger than by one's own vote."""

    def report(first: float, last: float, *votes: float) -> Report:
        told = {f"own.{name}": ((20, vote),) for name, vote in zip(("vote_first", "vote"), votes, strict=False)}
        return Report({"accuracy": ((1, first), (10, last), (20, last)), **told}, 20, 1, 1.0, 3)

    alone = report(0.7, 0.75, 0.7, 0.8)
    assert judge(report(0.7, 0.9, 0.8, 0.9), alone).holds
    assert not judge(report(0.7, 0.9, 0.9, 0.9), alone).holds, "the vote has to gain as well"
    assert not judge(report(0.7, 0.9, 0.8, 0.9), report(0.7, 0.75, 0.9, 0.95)).holds
    assert not judge(report(0.7, 0.9), alone).holds, "nobody voted"
    assert not judge(report(0.7, 0.75), report(0.7, 0.7)).holds
    assert not judge(report(0.7, 0.9), report(0.7, 0.95)).holds
    with pytest.raises(UsageError, match="said nothing"):
        Report({}, 1, 1, 1.0, 1).last("accuracy")


def test_what_was_taught_is_probed_before_it_learns_by_itself() -> None:
    """By every node, at the first epoch: what claims are held against. What begins with nothing need not be."""
    taught = tiny(owner="all")
    assert taught.is_by_all
    assert not tiny(owner="all", warm=None).is_by_all
    assert RecipeTask("hawkeye").run_defaults["evaluators"] == "all"


def test_a_baseline_has_epochs_of_its_own_and_never_more_than_the_run() -> None:
    """As many, if nothing is said."""
    assert RECIPE.epochs_of_baseline(60) == 60
    fewer = replace(RECIPE, baseline_epochs=10)
    assert (fewer.epochs_of_baseline(60), fewer.epochs_of_baseline(5)) == (10, 5)


def test_a_whole_run_in_one_process_reports_its_probes() -> None:
    """At the first epoch, and at the last."""
    report = play_locally(tiny(), 2, epochs=2)
    assert [epoch for epoch, _ in report.scores["accuracy"]] == [1, 2]
    assert (report.epochs, report.peers) == (2, 2)


# --- objectives ---


def takes(rewards: Sequence[float], seeds: Sequence[int], acts: Sequence[str] | None = None) -> list[Take]:
    """Takes of one turn."""
    made = []
    for index, (reward, seed) in enumerate(zip(rewards, seeds, strict=True)):
        each = Take("solver", Role(Text(), Text()), Learned("own"), Scenario(seed), index)
        each.sights, each.acts = ["21"], ["12" if acts is None else acts[index]]
        each.rewards, each.log_probs = [reward], [0.0]
        made.append(each)
    return made


def test_advantages_are_above_the_mean_of_the_group() -> None:
    """A scenario's own; alone, nothing is learned."""
    rewards = np.array([1, 0, 1, 1, 5], np.float32)
    played = takes(rewards.tolist(), [1, 1, 2, 2, 3])
    np.testing.assert_allclose(group_advantages(played, rewards), [0.5, -0.5, 0, 0, 0])
    np.testing.assert_allclose(group_advantages(played, rewards, scale=True), [1, -1, 0, 0, 0], atol=1e-3)


def learned(objective: Any, model: TokenModel, played: list[Take]) -> Any:
    """Its batch, where it asks nobody."""
    preparing = objective.prepare(played, model, News())
    with pytest.raises(StopIteration) as end:
        next(preparing)
    return end.value.value


def descended(objective: GRPO, model: TokenModel, batch: Any) -> dict[str, float]:
    """Three steps down its loss; what was measured at the last."""
    measures: dict[str, float] = {}
    for _ in range(3):
        loss, measures = objective.loss(model, batch)
        model.flat[:] -= 0.05 * model.gradient_of(loss)
    return measures


def likelihood(model: TokenModel, played: list[Take]) -> list[float]:
    """Of each take's acts."""
    return model.log_probs(model.encode(played)).sum(dim=1).tolist()


@pytest.mark.parametrize("settings", [GRPOSettings(), GRPOSettings(kl_coefficient=0.1, divide_by_length=True)])
def test_grpo_makes_what_was_better_likelier(settings: GRPOSettings) -> None:
    """And what was worse less so; on takes of equal rewards it has nothing to learn."""
    model = TokenModel(width=16, layers=1, heads=2, context=16)
    played, objective = takes([1, 0], [1, 1], ["12", "21"]), GRPO(settings)
    before = likelihood(model, played)
    batch = learned(objective, model, played)
    measures = descended(objective, model, batch)
    after = likelihood(model, played)
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert measures.keys() == {"loss", "clipped", "log_prob"}
    assert learned(objective, model, takes([1, 1], [1, 1])) is None


GEPO = GRPOSettings(correction=GroupCorrection.GROUP_EXPECTATION, clip_range=0.9, clip_range_high=9.0)


def test_plays_of_earlier_policies_count_by_the_expectation_over_their_group() -> None:
    """What is likelier now than its group was then counts for more; and what is better becomes likelier."""
    model = TokenModel(width=16, layers=1, heads=2, context=16)
    played, objective = takes([1, 0], [1, 1], ["12", "21"]), GRPO(GEPO)
    now = likelihood(model, played)
    length = int(model.encode(played).is_act[0].sum())
    for take, log_prob in zip(played, now, strict=True):
        take.log_probs = [log_prob - length * 0.1]  # both were less likely then
    batch = learned(objective, model, played)
    q = np.exp(np.array(now) / length - 0.1)
    np.testing.assert_allclose(batch.begun, np.exp(np.array(now) / length) * q.sum() / (q**2).sum(), rtol=1e-5)
    measures = descended(objective, model, batch)
    after = likelihood(model, played)
    assert after[0] > now[0]
    assert after[1] < now[1]
    assert measures["clipped"] == 0
    assert batch.part(np.array([1])).begun.tolist() == batch.begun[1:].tolist()


def test_what_nobody_vouches_for_counts_as_played_now() -> None:
    model = TokenModel(width=16, layers=1, heads=2, context=16)
    played = takes([1, 0], [1, 1], ["12", "21"])
    known = likelihood(model, played)
    for take, log_prob in zip(played, known, strict=True):
        take.log_probs = [log_prob]
    begun = learned(GRPO(GEPO), model, played).begun
    played[1].log_probs = [float("nan")]
    np.testing.assert_allclose(learned(GRPO(GEPO), model, played).begun, begun, rtol=1e-6)


def test_cloning_makes_what_was_done_likelier_by_its_weight() -> None:
    """What earned nothing is left out, where takes are weighed."""
    model = TokenModel(width=16, layers=1, heads=2, context=16)
    played = takes([1, 0], [1, 1], ["12", "21"])
    assert len(learned(Clone(CloneSettings()), model, played)) == 2
    objective = Clone(CloneSettings(is_weighted=True))
    batch = learned(objective, model, played)
    assert len(batch) == 1
    before = likelihood(model, played[:1])
    loss, _ = objective.loss(model, batch)
    model.flat[:] -= 0.05 * model.gradient_of(loss)
    assert likelihood(model, played[:1]) > before


def test_a_policy_says_what_cannot_be() -> None:
    """Before anything is run."""
    with pytest.raises(UsageError, match="alike everywhere"):
        Policy(model="tokens", objective="grpo", is_varied=True)
    with pytest.raises(UsageError, match="shared with nobody"):
        Policy(model="tokens", objective="grpo", owner="own", shared=("a",))
    with pytest.raises(UsageError, match="tokens"):
        Company(tiny(model="token"), peers(1))
    with pytest.raises(UsageError, match="no parameter"):
        Company(tiny(shared=("nothing/*",)), peers(1))
    assert SharedPrompts(2).draw(News(), np.random.default_rng(0)) is not None
