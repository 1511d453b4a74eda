"""A small transformer over characters, with a tokenizer of its own: text from a policy of any node, in CPU-seconds.

Pre-norm decoder blocks (Vaswani et al., arXiv 1706.03762; the order of Xiong et al., arXiv 2002.04745), learned
positions, GELU, tied output weights (Press and Wolf, arXiv 1608.05859). Every printable ASCII character and the newline
is a token, and so are the end of an act and the end of a sight. A take is one sequence, turn after turn: sight, end of
sight, act, end of act. What does not fit into the context is forgotten from the beginning.

Prompts of one length are completed side by side with their keys and values kept, so no padding changes what a model
says. Each act is sampled by noise of its own (`TokenModel.complete`), so that it can be drawn again without the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from shoal.protocol.errors import UsageError
from shoal.training.models.flat import FlatParameters, OnFlat, Spec
from shoal.training.models.text import Ids, Sequences, padded
from shoal.training.rollouts.acting import Noise
from shoal.training.rollouts.takes import Drawn
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Take, Text

END_OF_ACT: Final = 0
END_OF_SIGHT: Final = 1
_CHARACTERS: Final = "\n" + "".join(map(chr, range(32, 127)))
_UNKNOWN: Final = "?"
_ID_OF: Final = {character: number + 2 for number, character in enumerate(_CHARACTERS)}
VOCABULARY: Final = len(_CHARACTERS) + 2
_DEVIATION: Final = 0.02
_NEVER: Final = -math.inf
_NOISE_TURNS: Final = 16
"""Tokens for which noise is drawn at once: a call for each would take as long as the model does."""


def encode_text(text: str) -> list[int]:
    """The characters as tokens; what is none of them reads as a question mark."""
    return [_ID_OF.get(character, _ID_OF[_UNKNOWN]) for character in text]


def _of_acts(logits: torch.Tensor) -> torch.Tensor:
    """Without what no act can say."""
    ends = torch.zeros(VOCABULARY)
    ends[END_OF_SIGHT] = _NEVER
    return logits + ends


def decode_text(tokens: Sequence[int]) -> str:
    """The inverse of `encode_text`; ends are nothing."""
    return "".join(_CHARACTERS[token - 2] for token in tokens if token >= 2)


class TokenModel(OnFlat):
    """The transformer.

    Attributes:
        context: the longest sequence that it sees.
    """

    def __init__(self, *, width: int = 64, layers: int = 2, heads: int = 4, context: int = 128, seed: int = 0) -> None:
        """Initialise it, to the same bits on every machine.

        Raises:
            UsageError: if the sizes do not go together.
        """
        for name, value, most in (("width", width, 4096), ("layers", layers, 64), ("context", context, 8192)):
            if not 1 <= value <= most:
                raise UsageError(f"a transformer's {name} is 1 to {most}, not {value}")
        if heads < 1 or width % heads:
            raise UsageError(f"a width of {width} is not divided among {heads} heads; choose a multiple of them")
        self.context = context
        self._sizes = {"width": width, "layers": layers, "heads": heads, "context": context}
        self._heads, self._layers = heads, layers
        specs = {"embedding": Spec((VOCABULARY, width), _DEVIATION), "positions": Spec((context, width), _DEVIATION)}
        deep = _DEVIATION / math.sqrt(2 * layers)
        for index in range(layers):
            specs |= {
                f"{index}/attention/scale": Spec((width,), fill=1.0),
                f"{index}/attention/shift": Spec((width,)),
                f"{index}/attention/in": Spec((3 * width, width), _DEVIATION),
                f"{index}/attention/out": Spec((width, width), deep),
                f"{index}/units/scale": Spec((width,), fill=1.0),
                f"{index}/units/shift": Spec((width,)),
                f"{index}/units/in": Spec((4 * width, width), _DEVIATION),
                f"{index}/units/in_bias": Spec((4 * width,)),
                f"{index}/units/out": Spec((width, 4 * width), deep),
                f"{index}/units/out_bias": Spec((width,)),
            }
        specs |= {"scale": Spec((width,), fill=1.0), "shift": Spec((width,))}
        self._parameters = FlatParameters(specs, seed)

    def alike(self) -> TokenModel:
        """Another of its sizes, in its initial state."""
        return TokenModel(**self._sizes)

    # --- judging ---

    def encode(self, takes: Sequence[Take]) -> Sequences:
        """Takes that are over, or still wait for acts, as sequences."""
        rows: list[list[int]] = []
        masks: list[list[bool]] = []
        for take in takes:
            tokens, is_act = self._history(take, len(take.acts))
            rows.append(tokens[-self.context :])
            masks.append(is_act[-self.context :])
        return padded(rows, masks, END_OF_ACT)

    def log_probs(self, sequences: Sequences) -> torch.Tensor:
        """Of every token that the policy chose, given what came before: ``[S, T]``, 0 for all others."""
        logits = _of_acts(self.logits(sequences.tokens[:, :-1]))
        chosen = functional.log_softmax(logits, dim=-1).gather(2, sequences.tokens[:, 1:, None])[..., 0]
        chosen = chosen.where(sequences.is_act[:, 1:], torch.zeros(()))
        return functional.pad(chosen, (1, 0))

    def _history(self, take: Take, num_acts: int) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        is_act: list[bool] = []
        for turn in range(num_acts):
            sight, act = encode_text(take.sights[turn]), encode_text(take.acts[turn])
            tokens += [*sight, END_OF_SIGHT, *act, END_OF_ACT]
            is_act += [False] * (len(sight) + 1) + [True] * (len(act) + 1)
        return tokens, is_act

    # --- acting ---

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[str], Floats]:
        """Complete the newest sight of each; see `shoal.training.tasks.cast.Actor`."""
        noises = None if greedy else [Noise(seed) for seed in rng.integers(2**63, size=len(takes)).tolist()]
        drawn = self.complete(takes, noises)
        log_probs = [each.log_probs.sum(dtype=np.float64) for each in drawn]
        return [self.said(each) for each in drawn], np.array(log_probs, np.float32)

    def said(self, drawn: Drawn) -> str:
        """The text of what was drawn."""
        return decode_text(drawn.tokens.tolist())

    def complete(self, takes: Sequence[Take], noises: Sequence[Noise] | None) -> list[Drawn]:
        """What to say to the newest sight of each, token by token with its end.

        A token is the argmax of log-probability plus Gumbel noise; each token takes a number for every token that there
        is from its take's noise, in their order. So what one take says depends on nothing that is said beside it, up to
        rounding.

        Args:
            takes: that wait.
            noises: of each, used for nothing else; None: the likeliest tokens.
        """
        found: dict[int, Drawn] = {}
        by_length: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        prompts = []
        for index, take in enumerate(takes):
            prompt, most = self.prompt(take, len(take.acts))
            prompts.append(prompt)
            by_length[len(prompt), most].append(index)
        for (_, most), group in sorted(by_length.items()):
            rows = np.array([prompts[index] for index in group], np.int64)
            own = None if noises is None else [noises[index] for index in group]
            found |= zip(group, self._complete(rows, most, own), strict=True)
        return [found[index] for index in range(len(takes))]

    def count(self, act: str) -> int:
        """Tokens of an act, its end among them."""
        return len(act) + 1

    def prompt(self, take: Take, act: int) -> tuple[list[int], int]:
        """What an act of a take answers, and the most tokens that it may have before its end."""
        space = take.spaces.acts
        most = take.max_tokens or (space.max_chars if isinstance(space, Text) else 1)
        most = max(1, min(most, self.context - 2))
        tokens, _ = self._history(take, act)
        return [*tokens, *encode_text(take.sights[act]), END_OF_SIGHT][-(self.context - most) :], most

    @torch.no_grad()
    def _complete(self, prompts: Ids, most: int, noises: Sequence[Noise] | None) -> list[Drawn]:
        """Completions of prompts ``[B, T]``."""
        count = len(prompts)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        logits = self.logits(torch.from_numpy(prompts), kept)[:, -1]
        tokens: list[list[int]] = [[] for _ in range(count)]
        likely: list[list[float]] = [[] for _ in range(count)]
        is_over = np.zeros(count, np.bool_)
        noise = np.zeros((count, 1, 1))
        for turn in range(most + 1):
            log_probs = functional.log_softmax(_of_acts(logits), dim=-1).double().numpy()
            if turn == most:  # it has to end
                chosen = np.full(count, END_OF_ACT)
            elif noises is None:
                chosen = log_probs.argmax(axis=1)
            else:
                if turn % _NOISE_TURNS == 0:
                    noise = np.stack([each.gumbel((_NOISE_TURNS, VOCABULARY)) for each in noises])
                chosen = (log_probs + noise[:, turn % _NOISE_TURNS]).argmax(axis=1)
            for index in np.flatnonzero(~is_over).tolist():
                tokens[index].append(int(chosen[index]))
                likely[index].append(float(log_probs[index, chosen[index]]))
            is_over |= chosen == END_OF_ACT
            if is_over.all():
                break
            logits = self.logits(torch.from_numpy(chosen[:, None]), kept)[:, -1]
        pairs = zip(tokens, likely, strict=True)
        return [Drawn(np.array(own, np.int32), np.array(each, np.float32)) for own, each in pairs]

    def logits(self, tokens: torch.Tensor, kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None) -> torch.Tensor:
        """``[B, T, VOCABULARY]`` for tokens ``[B, T]`` that follow those whose keys and values are kept, if any are."""
        own = self._parameters.tensors
        start = kept[0][0].shape[2] if kept else 0
        size = tokens.shape[1]
        hidden = own["embedding"][tokens] + own["positions"][start : start + size]
        width = hidden.shape[-1]
        for index in range(self._layers):
            name = f"{index}/attention"
            normal = functional.layer_norm(hidden, (width,), own[f"{name}/scale"], own[f"{name}/shift"])
            joined = functional.linear(normal, own[f"{name}/in"]).view(len(tokens), size, 3, self._heads, -1)
            query, key, value = joined.permute(2, 0, 3, 1, 4)
            if kept is not None and len(kept) > index:
                key, value = torch.cat([kept[index][0], key], dim=2), torch.cat([kept[index][1], value], dim=2)
                kept[index] = key, value
            elif kept is not None:
                kept.append((key, value))
            seen = functional.scaled_dot_product_attention(query, key, value, is_causal=size > 1)
            hidden = hidden + functional.linear(seen.transpose(1, 2).reshape(hidden.shape), own[f"{name}/out"])
            name = f"{index}/units"
            normal = functional.layer_norm(hidden, (width,), own[f"{name}/scale"], own[f"{name}/shift"])
            units = functional.gelu(functional.linear(normal, own[f"{name}/in"], own[f"{name}/in_bias"]))
            hidden = hidden + functional.linear(units, own[f"{name}/out"], own[f"{name}/out_bias"])
        normal = functional.layer_norm(hidden, (width,), own["scale"], own["shift"])
        return functional.linear(normal, own["embedding"])


class TokenJudge:
    """Such a model, as whoever looks into a shard needs it; see `shoal.training.rollouts.checking.Judge`.

    One pass goes over a whole act, where its actor went token by token with what it kept: other sums, the same but for
    rounding.

    Attributes:
        model: with the parameters of the policy that acted.
    """

    vocabulary = VOCABULARY
    slack = 1e-3

    def __init__(self, model: TokenModel) -> None:
        self.model, self.longest = model, model.context - 1

    def log_probs(self, take: Take, act: int, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """``[n, VOCABULARY]``, at each place of an act."""
        prompt, most = self.model.prompt(take, act)
        row = torch.tensor([[*prompt, *tokens[:-1].tolist()]])
        with torch.no_grad():
            logits = _of_acts(self.model.logits(row))[0, len(prompt) - 1 :]
        found: npt.NDArray[np.float64] = functional.log_softmax(logits, dim=-1).double().numpy()
        if len(tokens) == most + 1:  # it had to end
            found[-1] = np.where(np.arange(VOCABULARY) == END_OF_ACT, found[-1], _NEVER)
        return found

    def text(self, tokens: npt.NDArray[np.int32]) -> str | None:
        """What they say; None, if an end is not where they end."""
        ends = np.flatnonzero(tokens == END_OF_ACT).tolist()
        return decode_text(tokens.tolist()) if ends == [len(tokens) - 1] else None
