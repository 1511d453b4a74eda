"""What models of bodies share: sights that are numbers, acts of a few kinds or of numbers, a value of each sight.

A model of a body acts where a take stands, and judges takes that are over. What it *sees* of a sight are features
(``encode/*``, in which models differ); two small networks of tanh units make acts (``decide/*``) and values
(``value/*``) of them. It judges rows of turns ``[S, T]``: of a model without memory every act is a row of its own
(T = 1); of a recurrent one a row is a take, padded at its end.

Discrete acts have a categorical head, of the acts that are legal; continuous ones a diagonal Gaussian whose deviation
does not depend on the sight. Sampling takes its numbers from the generator that it is given (the Gumbel-max trick, as
in `shoal.training.models.actor_critic`). All parameters are one flat vector (`shoal.training.models.flat`).

Where a game shows critics more than actors (`Ask.central`), a model whose ``central`` says how many numbers that are
has them in its values, beside the features; nothing that acts sees them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from shoal.protocol.errors import UsageError
from shoal.training.models.flat import FlatParameters, OnFlat, Spec
from shoal.training.tasks.base import Actions, Continuous, Discrete, Floats
from shoal.training.tasks.play import Box, Role, Take, newest

Ids: TypeAlias = npt.NDArray[np.int64]

INDIFFERENT: Final = 0.01
"""The gain of a layer that acts, so that all acts are about as likely at first."""
_HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)
_NEVER: Final = -1e9
"""The logit of what is not legal: finite, so that a gradient through it is 0 and not NaN."""
_MAX_LAYERS: Final = 8
_MAX_GAIN: Final = 100.0
_MAX_WIDTH: Final = 4096

Columns: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Turns:
    """What takes saw and did, S rows of T turns.

    Attributes:
        sights: ``[S, T, size]`` float32; shorter ones end in zeros.
        kinds: int64 ``[S]``, which of the model's sizes of sights a row has.
        acts: ``[S, T]`` int64 or ``[S, T, size]`` float32.
        legal: bool ``[S, T, count]``; none: all are.
        central: ``[S, T, n]``, of a model that has such.
        is_act: bool ``[S, T]``; what is none pads a row.
    """

    sights: torch.Tensor
    kinds: torch.Tensor
    acts: torch.Tensor
    legal: torch.Tensor | None
    central: torch.Tensor | None
    is_act: torch.Tensor

    def __len__(self) -> int:
        return len(self.is_act)

    def part(self, rows: Ids) -> Turns:
        """Some of the rows, no longer than the longest of them."""
        is_act = self.is_act[rows]
        used = is_act.any(dim=0).nonzero()
        end = int(used.max()) + 1 if len(used) else 1
        return Turns(
            self.sights[rows][:, :end],
            self.kinds[rows],
            self.acts[rows][:, :end],
            None if self.legal is None else self.legal[rows][:, :end],
            None if self.central is None else self.central[rows][:, :end],
            is_act[:, :end],
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model makes of turns, each ``[S, T]``; where a row is padded, of no meaning.

    Attributes:
        log_probs: of the acts.
        entropy: of the policy there; of a continuous one the differential entropy.
        values: of the sights.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class BodyModel(OnFlat, ABC):
    """A model of a body.

    Attributes:
        sizes: of the sights that it can see, ascending; a row's kind is the number of its size.
        acts: how it acts.
        central: how many numbers its values see beside the features.
    """

    is_recurrent = False
    takes_many = False
    """Whether it can see sights of several sizes."""

    def __init__(self, roles: Sequence[Role], central: int) -> None:
        """Look at the roles that it is to play; `_begin` comes next.

        Raises:
            UsageError: if they are not alike, or see or act in text.
        """
        kind = type(self).__name__
        if not roles:
            raise UsageError(f"a {kind} has to know how its role sees and acts, and its policy plays none of the game")
        acts, sights = ({getattr(role, part) for role in roles} for part in ("acts", "sights"))
        space = next(iter(acts))
        if len(acts) > 1 or not isinstance(space, Discrete | Continuous):
            raise UsageError(f"one {kind} acts in one way, by a number or in numbers, not in {_several(acts)}")
        if not all(isinstance(each, Box) for each in sights) or (len(sights) > 1 and not self.takes_many):
            raise UsageError(f"one {kind} sees numbers, always as many, not {_several(sights)}")
        self.acts: Discrete | Continuous = space
        self.sizes = sorted(each.size for each in sights)
        self.central = whole("central", central, 0, _MAX_WIDTH)
        self._outputs = space.count if isinstance(space, Discrete) else space.size

    def _begin(
        self,
        seen: Mapping[str, Spec],
        features: int,
        hidden_sizes: Sequence[int],
        log_std: float,
        seed: int,
        gain: float = INDIFFERENT,
    ) -> None:
        """Initialise all parameters, to the same bits on every machine.

        Args:
            seen: those of ``encode/*``.
            features: how many there are.
            hidden_sizes: of the network that decides, and of the one that values.
            log_std: of a continuous policy, at first.
            seed: of all of them.
            gain: of the layer that acts: small, and what is done at first hardly depends on what is seen.
        """
        if not 0 <= gain <= _MAX_GAIN:
            raise UsageError(f"the gain of the layer that acts is 0 to {_MAX_GAIN}, not {gain}")
        if len(hidden_sizes) > _MAX_LAYERS or not all(1 <= size <= _MAX_WIDTH for size in hidden_sizes):
            raise UsageError(f"hidden_sizes are at most {_MAX_LAYERS}, each 1 to {_MAX_WIDTH}, not {hidden_sizes}")
        specs = {
            **seen,
            **layers("decide", [features, *hidden_sizes, self._outputs], last_gain=gain),
            **layers("value", [features + self.central, *hidden_sizes, 1], last_gain=1.0),
        }
        if isinstance(self.acts, Continuous):
            specs["decide/log_std"] = Spec((self.acts.size,), fill=log_std)
        self._parameters = FlatParameters(specs, seed)
        self._depth = len(hidden_sizes) + 1

    @abstractmethod
    def see(self, turns: Turns) -> torch.Tensor:
        """Features ``[S, T, n]``, of what was seen up to each turn."""

    # --- judging ---

    def encode(self, takes: Sequence[Take]) -> Turns:
        """What takes that are over saw and did, in their order; at least one, each with acts.

        Raises:
            UsageError: if the model wants central sights and the game shows none, or others.
        """
        return self._turns([self._kind(take) for take in takes], [self._columns(take) for take in takes])

    def evaluate(self, turns: Turns) -> Judged:
        """Log-probabilities, entropies and values."""
        own = self._parameters.tensors
        features = self.see(turns)
        outputs, values = self._outputs_of(own, features, turns), self._values(own, features, turns)
        if isinstance(self.acts, Discrete):
            log_p = functional.log_softmax(outputs, dim=-1)
            log_probs = log_p.gather(-1, turns.acts[..., None])[..., 0]
            return Judged(log_probs, -(log_p.exp() * log_p).sum(dim=-1), values)
        log_std = own["decide/log_std"]
        away = (turns.acts - outputs) * torch.exp(-log_std)
        log_probs = (-0.5 * away * away - log_std - _HALF_LOG_TAU).sum(dim=-1)
        return Judged(log_probs, (log_std + 0.5 + _HALF_LOG_TAU).sum().expand(values.shape), values)

    def logits(self, turns: Turns) -> torch.Tensor:
        """Of every kind of act, ``[S, T, count]``; what is not legal is below all that is.

        Raises:
            UsageError: if acts are numbers.
        """
        if not isinstance(self.acts, Discrete):
            raise UsageError("only acts of a few kinds have logits; take another objective for acts that are numbers")
        own = self._parameters.tensors
        return self._outputs_of(own, self.see(turns), turns)

    def _outputs_of(self, own: Mapping[str, torch.Tensor], features: torch.Tensor, turns: Turns) -> torch.Tensor:
        """Logits, or the means of acts that are numbers."""
        outputs = through(own, "decide", features)
        return outputs if turns.legal is None else outputs.masked_fill(~turns.legal, _NEVER)

    def log_probs(self, turns: Turns) -> torch.Tensor:
        """Of every act, ``[S, T]``; 0 where a row is padded."""
        return self.evaluate(turns).log_probs.where(turns.is_act, torch.zeros(()))

    @torch.no_grad()
    def last_values(self, takes: Sequence[Take]) -> Floats:
        """``[S]``, what comes after the last act of each take is worth: 0, but where it was cut off.

        Where a game showed nothing after the last act, and of what critics alone may see, which it never shows there,
        the last that was shown stands for it.
        """
        found = np.zeros(len(takes), np.float32)
        cut = [number for number, take in enumerate(takes) if take.cut]
        if not cut:
            return found
        columns = [_with_end(self._columns(takes[number]), takes[number]) for number in cut]
        if not self.is_recurrent:
            columns = [{name: array[-1:] for name, array in each.items()} for each in columns]
        turns = self._turns([self._kind(takes[number]) for number in cut], columns)
        values = self._values(self._parameters.tensors, self.see(turns), turns)
        found[cut] = values[torch.arange(len(cut)), turns.is_act.sum(dim=1) - 1].numpy()
        return found

    def _values(self, own: Mapping[str, torch.Tensor], features: torch.Tensor, turns: Turns) -> torch.Tensor:
        if turns.central is not None:
            features = torch.cat([features, turns.central], dim=-1)
        return through(own, "value", features)[..., 0]

    # --- acting ---

    @torch.no_grad()
    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[Actions, Floats]:
        """Act on the newest sight of each; see `shoal.training.tasks.cast.Actor`."""
        features = self._newest_features(takes)
        outputs: Floats = through(self._parameters.tensors, "decide", features).numpy()
        if isinstance(self.acts, Continuous):
            log_std = self.parameters["decide/log_std"]
            away: Floats = np.zeros_like(outputs) if greedy else rng.standard_normal(outputs.shape, np.float32)
            likely: Floats = (-0.5 * away * away - log_std - np.float32(_HALF_LOG_TAU)).sum(axis=1)
            std: Floats = np.exp(log_std)
            return outputs + std * away, likely
        legal = _legal([take.asked_legal for take in takes], self._outputs)
        if legal is not None:
            outputs = np.where(legal, outputs, np.float32(_NEVER))
        scores = outputs
        if not greedy:
            noise = rng.standard_exponential(outputs.shape, np.float32)
            scores = outputs - np.log(np.maximum(noise, np.finfo(np.float32).tiny))
        acts: Ids = scores.argmax(axis=1)
        highest = outputs.max(axis=1)
        total = highest + np.log(np.exp(outputs - highest[:, None]).sum(axis=1))
        log_probs: Floats = outputs[np.arange(len(acts)), acts] - total
        return acts, log_probs

    def _newest_features(self, takes: Sequence[Take]) -> torch.Tensor:
        """``[n, features]`` for the sights that wait."""
        if len(self.sizes) == 1:
            return self._features_of(newest(takes), 0)
        by_kind: defaultdict[int, list[int]] = defaultdict(list)
        for index, take in enumerate(takes):
            by_kind[self._kind(take)].append(index)
        found = [self._features_of(np.stack([takes[i].sights[-1] for i in own]), kind) for kind, own in by_kind.items()]
        order = torch.tensor([index for own in by_kind.values() for index in own])
        return torch.cat(found)[torch.argsort(order)]

    def _features_of(self, sights: Floats, kind: int) -> torch.Tensor:
        """``[n, features]`` for sights ``[n, size]`` of one kind."""
        ones = torch.ones((len(sights), 1), dtype=torch.bool)
        kinds = torch.full((len(sights),), kind, dtype=torch.int64)
        return self.see(Turns(torch.tensor(sights)[:, None], kinds, ones, None, None, ones))[:, 0]

    # --- takes as arrays ---

    def _kind(self, take: Take) -> int:
        size = take.spaces.sights.size if isinstance(take.spaces.sights, Box) else 0
        if size not in self.sizes:
            raise UsageError(f"the role {take.role!r:.80} shows {size} numbers, and this model sees {self.sizes}")
        return self.sizes.index(size)

    def _columns(self, take: Take) -> dict[str, npt.NDArray[Any]]:
        """Of T acts: ``sights``, ``acts``, ``is_act``, and ``legal`` and ``central`` where there are such."""
        arrays = take.arrays()
        found = {"sights": arrays["sights"], "acts": arrays["acts"], "is_act": np.ones(len(take), np.bool_)}
        if isinstance(self.acts, Discrete):
            found["legal"] = arrays.get("legal", np.ones((len(take), self.acts.count), np.bool_))
        if self.central:
            central = arrays.get("central", np.zeros((0, 0), np.float32))
            if central.shape != (len(take), self.central):
                raise UsageError(
                    f"the game shows critics {central.shape[1]} numbers and not {self.central}; set central to that"
                )
            found["central"] = central
        return found

    def _turns(self, kinds: Sequence[int], columns: Sequence[Columns]) -> Turns:
        """Rows of all: of a model without memory one for each turn, else one for each take."""
        lengths = [len(each["acts"]) for each in columns]
        widest = max(each["sights"].shape[1] for each in columns)
        joined: dict[str, torch.Tensor] = {}
        for name in columns[0]:
            arrays = [each[name] for each in columns]
            if name == "sights":
                arrays = [np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in arrays]
            if self.is_recurrent:
                whole = np.zeros((len(arrays), max(lengths), *arrays[0].shape[1:]), arrays[0].dtype)
                for row, array in zip(whole, arrays, strict=True):
                    row[: len(array)] = array
            else:
                whole = np.concatenate(arrays)[:, None]
            joined[name] = torch.from_numpy(whole)
        legal = joined.get("legal")
        if legal is not None:
            legal = None if bool(legal[joined["is_act"]].all()) else legal | ~joined["is_act"][..., None]
        rows = np.array(kinds, np.int64) if self.is_recurrent else np.repeat(np.array(kinds, np.int64), lengths)
        return Turns(
            joined["sights"], torch.from_numpy(rows), joined["acts"], legal, joined.get("central"), joined["is_act"]
        )


# --- parts of models ---


def layers(name: str, sizes: Sequence[int], *, last_gain: float) -> dict[str, Spec]:
    """The parameters of a network of so many units, the first of which are its inputs: ``<name>/<layer>/weight``.

    Hidden layers begin with a gain of √2, as `shoal.training.models.actor_critic` has it, though not orthogonal.
    """
    found: dict[str, Spec] = {}
    for number, (before, after) in enumerate(itertools.pairwise(sizes)):
        gain = last_gain if number == len(sizes) - 2 else math.sqrt(2)
        found[f"{name}/{number}/weight"] = Spec((after, before), gain / math.sqrt(before))
        found[f"{name}/{number}/bias"] = Spec((after,))
    return found


def through(own: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    """What the network of `layers` makes of ``[..., inputs]``; tanh between its layers."""
    number = 0
    while f"{name}/{number}/weight" in own:
        if number:
            hidden = torch.tanh(hidden)
        hidden = functional.linear(hidden, own[f"{name}/{number}/weight"], own[f"{name}/{number}/bias"])
        number += 1
    return hidden


def whole(name: str, value: int, least: int, most: int) -> int:
    """The value, if it may be that.

    Raises:
        UsageError: if not.
    """
    if not least <= value <= most:
        raise UsageError(f"{name} is {least} to {most}, not {value}")
    return value


def following(model: BodyModel, takes: Sequence[Take]) -> tuple[Turns, Turns, torch.Tensor]:
    """Of a model without memory, turns, what was seen after each, and ``[n]`` whether anything came: 1 or 0.

    Where a game showed nothing after the last act of a play that was cut off, the last sight stands for it.

    Args:
        model: that is to judge them.
        takes: that are over, each with acts.
    """
    turns = model.encode(takes)
    starts = np.cumsum([0, *(len(take) for take in takes[:-1])])
    order = np.arange(len(turns)) + 1
    ends = np.array([start + len(take) - 1 for start, take in zip(starts, takes, strict=True)])
    order[ends] = ends
    sights = turns.sights[order]
    for end, take in zip(ends, takes, strict=True):
        if take.final is not None:
            sights[end, 0, : len(take.final)] = torch.tensor(np.asarray(take.final))
    legal = None
    if turns.legal is not None:
        legal = turns.legal[order]
        legal[ends] = True
    goes_on = torch.ones(len(turns))
    goes_on[ends] = torch.tensor([float(take.cut) for take in takes])
    return turns, replace(turns, sights=sights, kinds=turns.kinds[order], legal=legal), goes_on


def _with_end(columns: Columns, take: Take) -> dict[str, npt.NDArray[Any]]:
    """One turn more, that sees where the take was cut off."""
    longer = {name: np.concatenate([array, array[-1:]]) for name, array in columns.items()}
    if take.final is not None:
        longer["sights"][-1] = take.final
    return longer


def _legal(asked: Sequence[npt.NDArray[np.bool_] | None], count: int) -> npt.NDArray[np.bool_] | None:
    """``[n, count]``; None: everything is."""
    if all(each is None for each in asked):
        return None
    everything = np.ones(count, np.bool_)
    return np.stack([everything if each is None else each for each in asked])


def _several(spaces: set[Any]) -> str:
    return " and ".join(sorted(map(str, spaces)))[:200]
