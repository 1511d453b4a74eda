"""A policy that learns from takes: an objective with a loss of torch's, on the engine's optimiser and modes.

An objective (`TakeObjective`) makes a batch of takes, maybe after asking the swarm, and a loss of a part of it. All
else is here or the engine's: the parts, Adam on one flat vector, clipping, and what is exchanged (`modes`): parameters
of a policy that all train together are averaged in the run's mode; one that is its owner's alone is averaged with
nobody's, and nothing of it crosses the wire but what its objective asks for.

A policy may be shared in part: the parameters whose names fit ``shared`` are averaged, by their distance from the start
as in mode ``diloco`` with an outer step of 1, and the rest, with Adam's moments, stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.adam import Adam
from shoal.training.algorithms.base import AskingUpdate, DivergedError, Exchange, UpdateStats
from shoal.training.algorithms.modes import MODES, Given, Stepper, step_alone
from shoal.training.algorithms.plausible import COARSE_TRAVEL_FACTOR, TRAVEL_FACTOR, Limits, as_floats
from shoal.training.algorithms.rollouts import Source
from shoal.training.algorithms.settings import check_ranges, setting
from shoal.training.effects import Effect
from shoal.training.exchange import outer
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.rules import ROUNDING, Codec
from shoal.training.manifest import Mode
from shoal.training.models.text import Ids
from shoal.training.state import check_fit
from shoal.training.tasks.base import Floats
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import News, Plain

EVERYTHING: Final = ("*",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSettings:
    """What every objective over takes has."""

    learning_rate: float = setting(1e-4, "Adam's", 1e-9, 1.0)
    adam_epsilon: float = setting(1e-8, "Adam's", 1e-12, 1.0)
    update_epochs: int = setting(1, "passes over the takes per update", 1, 1000)
    num_minibatches: int = setting(1, "optimiser steps per pass", 1, 65536)
    max_grad_norm: float = setting(1.0, "longer gradients are scaled down to this", 1e-6, 1e9)
    outer_learning_rate: float = setting(outer.LEARNING_RATE, "of the outer step in mode diloco", 1e-6, 10.0)
    outer_momentum: float = setting(outer.MOMENTUM, "likewise its momentum", 0.0, outer.MAX_MOMENTUM)

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def num_steps(self) -> int:
        """Of the optimiser, per update."""
        return self.update_epochs * self.num_minibatches


class TakeModel(Protocol):
    """A model whose parameters are one vector, and which acts in takes."""

    @property
    def flat(self) -> Floats:
        """``[num_parameters]``: writing to it changes the model."""
        ...

    @property
    def parameters(self) -> dict[str, Floats]:
        """By name, views of `flat`."""
        ...

    def gradient_of(self, loss: torch.Tensor) -> Floats:
        """Of a scalar, ``[num_parameters]``; overwritten by the next."""
        ...


class TakeBatch(Protocol):
    """What an update is made from."""

    def __len__(self) -> int: ...

    def part(self, rows: Ids) -> TakeBatch:
        """Some of it."""
        ...


@runtime_checkable
class Advised(Protocol):
    """A batch with advantages, which are given mean 0 and deviation 1 before the first step."""

    def moments(self) -> Moments:
        """Of the advantages; their count is the batch's length."""
        ...

    def normalized(self, moments: Moments) -> Self:
        """With advantages so scaled: in mode ``gradient`` by those of all members."""
        ...


M = TypeVar("M", contravariant=True)
B = TypeVar("B", bound=TakeBatch)


class TakeObjective(Protocol[M, B]):
    """How a policy learns from takes.

    Attributes:
        num_exchanges: that `prepare` asks for, with takes or without.
    """

    num_exchanges: int

    @property
    def settings(self) -> TakeSettings:
        """The run's."""
        ...

    def prepare(self, takes: Sequence[Take], model: M, news: News) -> Generator[Exchange | Effect, Any, B | None]:
        """What an update is made from; None, if there is nothing to learn from these takes."""
        ...

    def loss(self, model: M, batch: B) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean over a batch, and what is worth knowing."""
        ...


@runtime_checkable
class Mindful(Protocol):
    """An objective to which it matters what others do."""

    def meet(self, takes: Iterable[Take], policies: Mapping[str, Any]) -> None:
        """Before each update: the takes of all roles in what is learned from, and the models of all policies."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """An objective that keeps something from one update to the next; it is this member's own, and in no state."""

    def memory(self) -> dict[str, Plain]:
        """All of it, copied."""
        ...

    def remember(self, memory: Mapping[str, Plain]) -> None:
        """Go on from what `memory` gave, maybe in another process; of ``{}``, begin anew.

        Raises:
            ProtocolError: if it is no such memory. Nothing has changed.
        """
        ...


@runtime_checkable
class Keeping(Protocol):
    """An objective that learns from takes of earlier updates too, which it keeps in this process alone."""

    def used(self) -> None:
        """The update for which `prepare` was called last is done; of one that failed, nothing is to be kept."""
        ...


class Trainee:
    """One policy of a run, as one member trains it.

    Attributes:
        model: that acts.
        objective: how it learns.
        is_own: whether nobody else's parameters are averaged with it.
    """

    def __init__(
        self,
        model: TakeModel,
        objective: TakeObjective[Any, Any],
        *,
        mode: Mode,
        codec: Codec,
        seed: int,
        is_own: bool = False,
        shared: Sequence[str] = EVERYTHING,
    ) -> None:
        """Begin with no takes.

        Args:
            model: in its initial state.
            objective: how it learns.
            mode: the run's.
            codec: the run's.
            seed: of the order in which takes are used, this member's own.
            is_own: whether it is averaged with nobody's.
            shared: patterns of the parameters that are.

        Raises:
            UsageError: if no parameter fits ``shared``.
        """
        settings = objective.settings
        self.model, self.objective, self.is_own = model, objective, is_own
        self._mode, self._shared = mode, tuple(shared)
        self._names = [name for name in model.parameters if any(fnmatchcase(name, each) for each in self._shared)]
        if not self._names:
            raise UsageError(f"no parameter of the model is called like {', '.join(self._shared)}; say * for all")
        self._adam = Adam(model.flat.size, learning_rate=settings.learning_rate, epsilon=settings.adam_epsilon)
        max_change = self._adam.max_change(settings.num_steps)
        is_exact = codec is Codec.FP32
        factor = TRAVEL_FACTOR if codec in (Codec.FP32, Codec.BF16, Codec.INT8) else COARSE_TRAVEL_FACTOR
        self._max_change = max_change
        self._limits = Limits(settings.max_grad_norm, max_change if is_exact else ROUNDING * max_change, {}, factor)
        self._outer = Outer(
            model.flat.size,
            learning_rate=settings.outer_learning_rate,
            momentum=settings.outer_momentum,
            max_gradient=ROUNDING * max_change,
        )
        steps = _Steps(model, objective, np.random.default_rng(seed))
        self._stepper = Stepper(steps, self._adam, self._outer, self._limits, max_change, ())

    @property
    def is_whole(self) -> bool:
        """Whether all parameters are averaged."""
        return len(self._names) == len(self.model.parameters)

    # --- an update ---

    def update(self, takes: Sequence[Take], news: News) -> AskingUpdate:
        """Learn from takes; whoever drives it says that it is done (`used`), or puts the trainee back (`load`).

        Raises:
            ProtocolError: if the merged arrays do not fit.
            DivergedError: if the state that they lead to is of no use.
        """
        batch = yield from self._prepare(takes, news)
        given = Given(batch, 0 if batch is None else len(batch), {}, {})
        if self.is_own:
            step_alone(self._stepper, given)
        elif self.is_whole:
            yield from MODES[self._mode](self._stepper, given)
        else:
            yield from self._in_part(given)
        try:
            self._limits.check_state(self._all_parameters())
        except ProtocolError as error:
            raise DivergedError(f"what was merged leads to a policy that nobody would take: {error}") from error
        measures = given.measures.means() if batch is not None else {}
        return UpdateStats(len(takes), self.objective.settings.num_steps, measures)

    def used(self) -> None:
        """The last update is done, and those of the policies beside it."""
        if isinstance(self.objective, Keeping):
            self.objective.used()

    @property
    def actor(self) -> Any:
        """What acts with the parameters as they are: the model."""
        return self.model

    def taught_by(self, objective: TakeObjective[Any, Any], seed: int) -> Callable[[Sequence[Take], News], None]:
        """What teaches this policy by another objective, with an optimiser of its own, and nobody else in it."""
        teacher = Trainee(self.model, objective, mode=self._mode, codec=Codec.FP32, seed=seed, is_own=True)

        def teach(takes: Sequence[Take], news: News) -> None:
            try:
                next(teacher.update(takes, news))
            except StopIteration:
                teacher.used()
                return
            raise UsageError("an objective that asks the swarm teaches nobody before the run; take another one")

        return teach

    def _prepare(self, takes: Sequence[Take], news: News) -> Generator[Exchange | Effect, Any, Any]:
        """The objective's, with the last of its exchanges marked if nothing comes after it."""
        preparing = self.objective.prepare(takes, self.model, news)
        number, answer = 0, None
        while True:
            try:
                wanted = preparing.send(answer)  # None, at first
            except StopIteration as end:
                if number != self.objective.num_exchanges:
                    raise UsageError(
                        f"an objective asked {number} times and not {self.objective.num_exchanges}; num_exchanges "
                        "says how often, whatever the takes"
                    ) from end
                return end.value
            if not isinstance(wanted, Exchange):
                answer = yield wanted
                continue
            number += 1
            is_last = self.is_own and number == self.objective.num_exchanges
            answer = yield Exchange(
                wanted.arrays, wanted.weight, wanted.template, wanted.check, wanted.scales, is_last=is_last
            )

    def _in_part(self, given: Given) -> Generator[Exchange, Arrays, None]:
        """Optimise on own takes, then average how far the shared parameters came."""
        parameters = self.model.parameters
        start = {name: parameters[name].copy() for name in self._names}
        step_alone(self._stepper, given)
        deltas: Arrays = {f"mean/delta/{name}": start[name] - parameters[name] for name in self._names}
        merged = yield Exchange(
            deltas if given.batch is not None else {},
            given.weight,
            deltas,
            lambda contribution: _check_deltas(contribution.arrays, self._limits.max_change),
            lossy=dict.fromkeys(deltas, self._max_change),
        )
        if merged:
            check_fit(merged, deltas)
        for name in self._names:
            parameters[name][...] = start[name]
            if merged:
                parameters[name] -= as_floats(merged[f"mean/delta/{name}"])

    # --- the state ---

    def shared(self) -> Arrays:
        """What all members hold of it, as views; nothing of a policy that is its owner's."""
        if self.is_own:
            return {}
        found: Arrays = {f"parameters/{name}": self.model.parameters[name] for name in self._names}
        if self.is_whole and self._mode is Mode.DILOCO:
            found["outer/momentum"] = self._outer.momentum
        elif self.is_whole:
            found |= self._moments()
        return found

    def private(self) -> Arrays:
        """What nobody else holds, as views."""
        return self._all_parameters() | self._moments()

    def load(self, arrays: Arrays) -> None:
        """Take what is there of `shared` or `private`, which was checked."""
        for name, view in self.model.parameters.items():
            if f"parameters/{name}" in arrays:
                view[...] = arrays[f"parameters/{name}"]
        if "adam/step" in arrays:
            self._adam.first[:], self._adam.second[:] = arrays["adam/first"], arrays["adam/second"]
            self._adam.step = int(arrays["adam/step"])
        if "outer/momentum" in arrays:
            self._outer.momentum[:] = arrays["outer/momentum"]

    def check(self, arrays: Arrays) -> None:
        """Refuse what cannot be `shared` of such a policy.

        Raises:
            ProtocolError: if it is none.
        """
        check_fit(arrays, self.shared())
        self._limits.check_state(arrays)
        if "outer/momentum" in arrays:
            self._outer.check(arrays["outer/momentum"])

    def snapshot(self) -> Arrays:
        """All of it, copied."""
        everything = self._all_parameters() | self._moments() | {"outer/momentum": self._outer.momentum}
        return {name: array.copy() for name, array in everything.items()}

    def memory(self) -> dict[str, Plain]:
        """What the objective keeps from one update to the next, copied; empty, if it keeps nothing."""
        return self.objective.memory() if isinstance(self.objective, Remembering) else {}

    def remember(self, memory: Mapping[str, Plain]) -> None:
        """Have the objective go on from what `memory` gave.

        Raises:
            ProtocolError: if it is no such memory. Nothing has changed.
        """
        if isinstance(self.objective, Remembering):
            self.objective.remember(memory)

    def _all_parameters(self) -> Arrays:
        return {f"parameters/{name}": array for name, array in self.model.parameters.items()}

    def _moments(self) -> Arrays:
        adam = self._adam
        return {"adam/first": adam.first, "adam/second": adam.second, "adam/step": np.asarray(adam.step, np.int64)}


class _Steps:
    """An objective over takes, as the engine steps by it."""

    has_advantages = True

    def __init__(self, model: TakeModel, objective: TakeObjective[Any, Any], rng: np.random.Generator) -> None:
        self.model = model
        self._objective = objective
        self._rng = rng
        self._measures: dict[str, float] = {}

    @property
    def settings(self) -> Any:
        return self._objective.settings

    def moments(self, batch: TakeBatch) -> Moments:
        """Of advantages, where the batch has such; the length of the batch is what others check."""
        if isinstance(batch, Advised):
            return batch.moments()
        return Moments(float(len(batch)), np.zeros(()), np.zeros(()))

    def with_moments(self, batch: TakeBatch, moments: Moments) -> TakeBatch:
        return batch.normalized(moments) if isinstance(batch, Advised) else batch

    def minibatches(
        self, batch: TakeBatch | None, streams: Sequence[Source]
    ) -> Iterator[tuple[TakeBatch | None, bool]]:
        settings = self._objective.settings
        for number in range(1, settings.update_epochs + 1):
            order = None if batch is None else self._rng.permutation(len(batch))
            for part in range(settings.num_minibatches):
                rows = None if order is None else np.array_split(order, settings.num_minibatches)[part]
                found = None if batch is None or rows is None or not len(rows) else batch.part(rows)
                yield found, number == settings.update_epochs

    def gradient(self, batch: TakeBatch) -> Floats:
        loss, self._measures = self._objective.loss(self.model, batch)
        return self.model.gradient_of(loss)

    def measures(self) -> dict[str, float]:
        return self._measures

    def is_enough(self) -> bool:
        return False

    @property
    def steps_now(self) -> int:
        return self._objective.settings.num_steps

    def stepped(self) -> None:
        pass

    def settle(self, *, is_merged: bool) -> None:
        pass


def _check_deltas(arrays: Arrays, most: float) -> None:
    for name, array in arrays.items():
        change = float(np.abs(array.astype(np.float64)).max(initial=0.0))
        if not change <= most:
            raise ProtocolError(f"{name[:80]!r} moved by {change:.3g}, further than the optimiser's steps reach")
