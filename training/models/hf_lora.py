"""A pretrained language model from a local folder, of which low-rank adapters are learned (LoRA, arXiv 2106.09685).

The model is Hugging Face transformers', the adapters are PEFT's, and neither is changed: the adapters' weights are
given to every pass from outside, as views of one flat float32 vector (`torch.func.functional_call`). So what is
clipped, stepped, averaged and compared are the adapters alone, and several policies on one base share its memory.
Adapters begin with PEFT's distribution, but the same bits on every machine: A by `shoal.training.models.flat`, B with
zeros.

The base is frozen and never crosses the wire. It may lie in another precision on each node: on a CPU it is computed in
float32, elsewhere as its folder says, four bits included where the folder is quantised. Adapters are float32, and the
same bits, everywhere; what they add to is then not quite the same, nor are log-probabilities.

**Text and tokens.** An act is text to all others, but what is learned from are the tokens that were sampled: a model
may say a text by other tokens than the tokenizer would. They are kept with the take for as long as that lives. An act
that somebody else made is what the tokenizer makes of it, with its end if it is shorter than it might be.

Prompts are completed side by side, padded on the left, with keys and values kept; one that several plays share is read
once. Who is beside a prompt changes what is computed in the last bits. Sampling takes its numbers from the generator
that it is given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from shoal.protocol.errors import UsageError
from shoal.training.models.flat import FlatParameters, OnFlat, Spec
from shoal.training.models.folders import library, model_folder
from shoal.training.models.prompts import Chat, Form, Plain
from shoal.training.models.text import Sequences, padded
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Take, Text

AT_ONCE: Final = 256
"""Prompts that are completed side by side."""
_MAX_RANK: Final = 512
_MAX_TARGETS: Final = 32
_MAX_CONTEXT: Final = 2**17
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


class HfLora(OnFlat):
    """The model with its adapters.

    Attributes:
        context: the longest sequence that it sees, in tokens.
        base: the model without weights of its own in its adapters.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        *,
        folder: str,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = ("q_proj", "v_proj", "o_proj"),
        context: int = 512,
        max_tokens: int = 64,
        chat: bool = False,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        """Load it.

        Args:
            folder: the name of the model, see `shoal.training.models.folders`.
            rank: of the adapters.
            alpha: what they give is multiplied by this over the rank.
            targets: the last parts of names of linear layers that get adapters.
            context: the longest sequence, in tokens; no longer than the model's own.
            max_tokens: of an act where a game does not say; an act is always shorter than the context.
            chat: whether sights stand in the model's chat template.
            device: ``cpu``, ``cuda``, or ``auto``: a GPU if there is one.
            seed: of the adapters.

        Raises:
            UsageError: if a package or the folder is missing, or they do not go together.
        """
        bounds = (
            ("rank", rank, 1, _MAX_RANK),
            ("context", context, 2, _MAX_CONTEXT),
            ("max_tokens", max_tokens, 1, _MAX_CONTEXT),
        )
        for name, value, least, most in bounds:
            if not least <= value <= most:
                raise UsageError(f"a language model's {name} is {least} to {most}, not {value}")
        if not 0 < alpha <= 1e6:
            raise UsageError(f"alpha is {alpha}; it is above 0 and at most a million")
        if isinstance(targets, str) or not 1 <= len(targets) <= _MAX_TARGETS:
            raise UsageError(f"targets are 1 to {_MAX_TARGETS} names of layers, such as q_proj")
        path = model_folder(folder)
        self._device = _device(device)
        self.tokenizer = _tokenizer(path)
        self.base = _base(path, rank, alpha, tuple(targets), self._device)
        weights = {name: tuple(each.shape) for name, each in self.base.named_parameters() if each.requires_grad}
        self._weights = {_short(name): name for name in sorted(weights)}
        self._parameters = FlatParameters(
            {short: _begins(name, weights[name]) for short, name in self._weights.items()}, seed
        )
        self.context = min(context, int(getattr(self.base.config, "max_position_embeddings", context) or context))
        self._max_tokens = max_tokens
        self._form: Form = Chat(self.tokenizer) if chat else Plain()
        self._begin = [] if chat else list(self.tokenizer("")["input_ids"])
        self._ends = _ends(self.base, self.tokenizer)
        self._padding = self._ends[0] if self._ends else 0
        self._said: WeakKeyDictionary[Take, dict[int, list[int]]] = WeakKeyDictionary()

    # --- judging ---

    def encode(self, takes: Sequence[Take]) -> Sequences:
        """Takes that are over, or still wait for acts, as sequences."""
        found = [self._history(take) for take in takes]
        rows = [tokens[-self.context :] for tokens, _, _ in found]
        return padded(rows, [is_act[-self.context :] for _, is_act, _ in found], self._padding)

    def log_probs(self, sequences: Sequences) -> torch.Tensor:
        """Of every token that the policy chose, given what came before: ``[S, T]``, 0 for all others."""
        tokens, is_act = sequences.tokens, sequences.is_act[:, 1:]
        columns = is_act.any(dim=0).nonzero()[:, 0]  # a vocabulary's worth of numbers each: no more than are wanted
        if not len(columns):
            columns = torch.zeros(1, dtype=torch.int64)
        # What is padded comes after all that counts, and nothing sees what comes after it: no mask is needed.
        logits = self._run(tokens[:, :-1], logits_to_keep=columns.to(self._device)).logits.float()
        wanted = tokens[:, 1:][:, columns, None].to(self._device)
        chosen = (logits.gather(2, wanted)[..., 0] - logits.logsumexp(dim=-1)).cpu()
        chosen = chosen.where(is_act[:, columns], torch.zeros(()))
        return torch.zeros(tokens.shape).index_copy(1, columns + 1, chosen)

    def _history(self, take: Take) -> tuple[list[int], list[bool], bool]:
        """What was seen and said so far, which tokens were said, and whether the last act said its end."""
        tokens: list[int] = []
        is_act: list[bool] = []
        is_ended = False
        said = self._said.get(take, {})
        for turn, act in enumerate(take.acts):
            before = self._sight(take.sights[turn], is_first=turn == 0, is_ended=is_ended)
            known = said.get(turn)
            after = self._act(act, self._most(take)) if known is None or self._text(take, known) != act else known
            tokens += before + after
            is_act += [False] * len(before) + [True] * len(after)
            is_ended = bool(after) and after[-1] in self._ends
        return tokens, is_act, is_ended

    def _sight(self, sight: str, *, is_first: bool, is_ended: bool) -> list[int]:
        text = self._form.before(sight, is_first=is_first, is_ended=is_ended)
        found = [*(self._begin if is_first else []), *self._tokens(text)]
        return found or ([self._padding] if is_first else [])  # the first word is said after something

    def _act(self, act: str, most: int) -> list[int]:
        tokens = self._tokens(act)
        return [*tokens, *self._ends[:1]] if len(tokens) < most else tokens

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, take: Take, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        space = take.spaces.acts
        return str(text)[: space.max_chars] if isinstance(space, Text) else str(text)

    def _most(self, take: Take) -> int:
        return max(1, min(take.max_tokens or self._max_tokens, self.context - 1))

    # --- acting ---

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[str], Floats]:
        """Complete the newest sight of each; see `shoal.training.tasks.cast.Actor`."""
        prompts = []
        for take in takes:
            tokens, _, is_ended = self._history(take)
            tokens += self._sight(take.sights[-1], is_first=not take.acts, is_ended=is_ended)
            prompts.append(tokens[-(self.context - self._most(take)) :])
        log_probs = np.zeros(len(takes), np.float32)
        acts = [""] * len(takes)
        order = sorted(range(len(takes)), key=lambda index: len(prompts[index]))  # little is padded so
        for start in range(0, len(order), AT_ONCE):
            group = order[start : start + AT_ONCE]
            most = [self._most(takes[index]) for index in group]
            said, log_probs[group] = self._complete([prompts[index] for index in group], most, rng, greedy)
            for index, tokens in zip(group, said, strict=True):
                take = takes[index]
                self._said.setdefault(take, {})[len(take.acts)] = tokens
                acts[index] = self._text(take, tokens)
        return acts, log_probs

    @torch.no_grad()
    def _complete(
        self, prompts: Sequence[Sequence[int]], most: Sequence[int], rng: np.random.Generator, greedy: bool
    ) -> tuple[list[list[int]], Floats]:
        """Tokens that follow prompts, ends included, at most so many each; and how likely they were, ``[B]``."""
        rows = list(dict.fromkeys(map(tuple, prompts)))  # several plays of one scenario begin alike: read once
        place = {row: number for number, row in enumerate(rows)}
        which = torch.tensor([place[tuple(prompt)] for prompt in prompts])
        count, longest = len(prompts), max(map(len, rows))
        tokens, mask = torch.full((len(rows), longest), self._padding), torch.zeros((len(rows), longest)).long()
        for index, row in enumerate(rows):
            tokens[index, longest - len(row) :], mask[index, longest - len(row) :] = torch.tensor(row), 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        said: list[list[int]] = [[] for _ in prompts]
        total, is_over, kept = np.zeros(count), np.zeros(count, np.bool_), None
        for turn in range(max(most)):
            found = self._run(
                tokens,
                attention_mask=mask.to(self._device),
                position_ids=positions.to(self._device),
                cache=kept,
                use_cache=True,
                logits_to_keep=1,
            )
            kept, logits = found.cache, found.logits[:, -1].float()
            if turn == 0:
                there = which.to(self._device)
                kept.reorder_cache(there)
                logits, mask, positions = logits[there], mask[which], positions[which]
            log_probs = torch.log_softmax(logits, dim=-1)
            chosen = log_probs.argmax(dim=-1) if greedy else _sample(log_probs, rng.random(count))
            likely = log_probs.gather(1, chosen[:, None])[:, 0].cpu().double().numpy()
            chosen = chosen.cpu()
            for index in map(int, np.flatnonzero(~is_over)):
                said[index].append(int(chosen[index]))
                total[index] += likely[index]
                is_over[index] = said[index][-1] in self._ends or len(said[index]) == most[index]
            if is_over.all():
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones((count, 1), dtype=torch.int64)], dim=1)
        return said, total.astype(np.float32)

    def _run(self, tokens: torch.Tensor, **given: Any) -> Any:
        """One pass with the adapters as they are; what it gives is on the model's device."""
        views = self._parameters.tensors_on(self._device)
        weights = {self._weights[short]: view for short, view in views.items()}
        given = {"use_cache": False, **given, "input_ids": tokens.to(self._device)}
        return torch.func.functional_call(self.base, weights, (), given)


def _sample(log_probs: torch.Tensor, chances: npt.NDArray[np.float64]) -> torch.Tensor:
    """A token for each row ``[B, V]``, by one number from 0 to 1 each."""
    sums = log_probs.double().exp().cumsum(dim=-1)
    wanted = torch.as_tensor(chances, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=sums.shape[1] - 1)


# --- loading ---

_BASES: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
"""Those in use: policies of one base share it."""


def _base(folder: Path, rank: int, alpha: float, targets: tuple[str, ...], device: torch.device) -> Any:
    """The frozen model of a folder, with PEFT's adapters in it.

    Raises:
        UsageError: if it cannot be loaded, or has no such layers.
    """
    key = (folder, rank, alpha, targets, device)
    found = _BASES.get(key)
    if found is not None:
        return found
    transformers, peft = library("transformers"), library("peft")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            device_map={"": str(device)},
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(
            f"the model in {folder} cannot be loaded ({_short_reason(error)}); it has to be a causal language model "
            "that transformers itself knows, with weights as safetensors"
        ) from error
    missing = {"cache", "position_ids", "logits_to_keep"} - inspect.signature(model.forward).parameters.keys()
    if missing:
        raise UsageError(
            f"the model in {folder} does not take {', '.join(sorted(missing))}; choose a decoder such as Llama"
        )
    model.requires_grad_(requires_grad=False)
    model.eval()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    try:
        peft.inject_adapter_in_model(config, model)
    except (ValueError, TypeError) as error:
        reason = _short_reason(error)
        raise UsageError(f"the model in {folder} takes no adapters at {', '.join(targets)[:200]} ({reason})") from error
    _BASES[key] = model
    return model


def _tokenizer(folder: Path) -> Any:
    try:
        return library("transformers").AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"the tokenizer in {folder} cannot be loaded ({_short_reason(error)})") from error


def _device(wanted: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if wanted not in ("auto", "cpu", "cuda") or (wanted == "cuda" and not has_gpu):
        raise UsageError(f"this machine has no device {wanted!r:.40}; say auto, cpu{' or cuda' if has_gpu else ''}")
    return torch.device("cuda:0" if has_gpu and wanted != "cpu" else "cpu")


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an act, the tokenizer's own first."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = said if isinstance(said, list) else [said]
    return tuple(dict.fromkeys(each for each in (tokenizer.eos_token_id, *listed) if each is not None))


def _short(name: str) -> str:
    if not name.endswith((_A, _B)):
        raise UsageError(f"adapters of {name[:80]} are of another form than A and B; target linear layers alone")
    return name.removesuffix(".default.weight")


def _begins(name: str, shape: tuple[int, ...]) -> Spec:
    """As PEFT begins: A as evenly as `torch.nn.Linear`, of which the deviation is taken; B with zeros."""
    return Spec(shape, 1 / math.sqrt(3 * math.prod(shape[1:])) if name.endswith(_A) else 0.0)


def _short_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
