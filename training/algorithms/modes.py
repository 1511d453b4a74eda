"""What is exchanged, and when: the three modes (DESIGN §8) as generators, whatever the objective.

- Mode ``local``: each peer takes its steps on its own samples alone. One exchange then averages the parameters and
  Adam's moments, weighted by samples, and everybody goes on in the direction of the average as far as one peer went
  (`extrapolation`), by the same operations, so all hold the same bits.
- Mode ``diloco``: the same steps, but what is exchanged is how far they led, as an outer gradient
  (`shoal.training.exchange.outer`): a third of the bytes, and fewer by a lossy codec. Adam's moments stay with their
  peer: a newcomer, and a worker that was started anew, begins with zeros, as everybody did.
- Mode ``gradient``: a first exchange merges the moments of the advantages, if there are any, so that they are
  normalised over the joint batch; then one exchange per minibatch averages its gradient, weighted by samples. The k-th
  minibatch of the joint batch is the union of the peers' k-th minibatches, so N peers take the steps of one process.

What an objective lets follow its parameters, such as target networks, follows its own steps until the parameters are
merged, and is then put where all put it (`Steps.settle`); in mode ``gradient`` it follows every joint step. An update
may have no steps, by the state that all share (`Steps.steps_now`); then there is the first exchange alone.

With each update the increments of the normalisers are merged, by its first exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from shoal.protocol.errors import ProtocolError
from shoal.training import watch
from shoal.training.algorithms.adam import Adam, clip_by_norm, fit_first, shorten
from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.extrapolation import extrapolate, travel
from shoal.training.algorithms.normalizers import MOMENTS_FACTOR
from shoal.training.algorithms.objective import Measures, Steps
from shoal.training.algorithms.plausible import Limits, as_floats
from shoal.training.algorithms.rollouts import Source
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.outliers import Scale
from shoal.training.manifest import Mode
from shoal.training.state import check_fit
from shoal.training.tasks.base import Floats
from shoal.training.watch import Slot

_GRADIENT_FACTOR: Final = 100.0  # gradients of few samples are tens of times as long as those of many, now and then

Choreography: TypeAlias = Generator[Exchange, Arrays, Arrays]
"""Gives what was merged with the first exchange: ``{}`` if nobody had any samples."""


@dataclass(frozen=True, slots=True)
class Stepper:
    """What takes the steps.

    Attributes:
        objective: whose gradients they follow.
        adam: the optimiser.
        outer: that of mode ``diloco``.
        limits: what others' contributions are held to.
        max_change: how far a parameter comes at most.
        streams: whose samples the batch is made of.
    """

    objective: Steps[Any]
    adam: Adam
    outer: Outer
    limits: Limits
    max_change: float
    streams: Sequence[Source]


@dataclass(frozen=True, slots=True)
class Given:
    """What one update is made from.

    Attributes:
        batch: the objective's; None, if there are no samples.
        weight: how many samples.
        increments: of the normalisers, to be merged.
        scales: how those of honest peers compare.
        measures: of the steps, to be filled.
    """

    batch: Any
    weight: int
    increments: Arrays
    scales: Mapping[str, Scale]
    measures: Measures = field(default_factory=Measures)


def _locally(stepper: Stepper, given: Given) -> Choreography:
    """Optimise on own samples, then average the outcome."""
    flat, adam = stepper.objective.model.flat, stepper.adam
    start, first, second, step = flat.copy(), adam.first.copy(), adam.second.copy(), adam.step
    step_alone(stepper, given)
    template = {
        "mean/parameters": flat,
        "mean/adam/first": adam.first,
        "nonneg/adam/second": adam.second,
        "mean/travel": np.asarray(travel(start, flat)),
    } | given.increments
    arrays = {name: array.copy() for name, array in template.items()}
    check = partial(stepper.limits.check_contribution, start=start)
    centres = {"mean/parameters": start, "mean/adam/first": first, "nonneg/adam/second": second}
    own = arrays if given.batch is not None else {}
    lossy = {"mean/parameters": stepper.max_change}
    merged = yield Exchange(own, given.weight, arrays, check, given.scales, centres, lossy)
    if not merged:  # nobody had any samples
        flat[:], adam.first[:], adam.second[:], adam.step = start, first, second, step
        stepper.objective.settle(is_merged=False)
        return {}
    _check_merged(merged, arrays)
    flat[:] = extrapolate(start, as_floats(merged["mean/parameters"]), float(merged["mean/travel"]))
    adam.second[:] = merged["nonneg/adam/second"]
    adam.first[:] = fit_first(as_floats(merged["mean/adam/first"]), adam.second)
    adam.step = step + stepper.objective.steps_now
    stepper.objective.settle(is_merged=True)
    return merged


def _apart(stepper: Stepper, given: Given) -> Choreography:
    """Optimise on own samples, then step by the average of how far everybody came."""
    flat = stepper.objective.model.flat
    start = flat.copy()
    step_alone(stepper, given)
    arrays: Arrays = {"mean/delta": start - flat} | given.increments
    check = partial(stepper.limits.check_contribution, start=start)
    lossy = {"mean/delta": stepper.max_change}
    own = arrays if given.batch is not None else {}
    merged = yield Exchange(own, given.weight, arrays, check, given.scales, lossy=lossy)
    flat[:] = start
    if merged:
        _check_merged(merged, arrays)
        stepper.outer.apply(flat, as_floats(merged["mean/delta"]))
    stepper.objective.settle(is_merged=bool(merged))
    return merged


def _together(stepper: Stepper, given: Given) -> Choreography:
    """Normalise advantages over the joint batch, then average the gradient of every minibatch."""
    objective, flat, batch = stepper.objective, stepper.objective.model.flat, given.batch
    arrays, scales, num_steps = dict(given.increments), dict(given.scales), objective.steps_now
    if objective.has_advantages:
        own = Moments.none() if batch is None else objective.moments(batch)
        arrays, scales["moments/advantage"] = own.to_arrays("advantage") | arrays, Scale(MOMENTS_FACTOR)
    check = partial(stepper.limits.check_contribution, start=flat)
    offered = {} if batch is None else arrays
    merged = yield Exchange(offered, given.weight, arrays, check, scales, is_last=not num_steps)
    if merged:
        _check_merged(merged, arrays)
        if batch is not None and objective.has_advantages:
            batch = objective.with_moments(batch, Moments.from_arrays(merged, "advantage"))
    template: Arrays = {"mean/gradient": np.zeros_like(flat)}
    settings = objective.settings
    for number, (minibatch, is_measured) in enumerate(objective.minibatches(batch, stepper.streams), 1):
        gradient: Arrays = {}
        if minibatch is not None:
            own_gradient = _gradient(stepper, minibatch)
            gradient = {"mean/gradient": own_gradient.copy()}
            if is_measured:
                given.measures.add(objective.measures(), len(minibatch))
        joint = yield Exchange(
            gradient,
            0 if minibatch is None else len(minibatch),
            template,
            scales={"mean/gradient": Scale(_GRADIENT_FACTOR)},
            lossy={"mean/gradient": math.inf},
            is_last=number == num_steps,
        )
        if joint:
            _check_merged(joint, template)
            clipped, norm = clip_by_norm(as_floats(joint["mean/gradient"]), settings.max_grad_norm)
            stepper.adam.apply(flat, clipped)
            objective.stepped()
            if is_measured:
                given.measures.add({"gradient_norm": norm}, 1)
    return merged


MODES: Final[Mapping[Mode, Callable[[Stepper, Given], Choreography]]] = {
    Mode.LOCAL: _locally,
    Mode.DILOCO: _apart,
    Mode.GRADIENT: _together,
    Mode.ROLLOUTS: _locally,
}


def step_alone(stepper: Stepper, given: Given) -> None:
    """All steps of an update on own samples, if there are any."""
    objective, batch = stepper.objective, given.batch
    if batch is None:
        return
    if objective.has_advantages:
        batch = objective.with_moments(batch, objective.moments(batch))
    max_norm, taken = objective.settings.max_grad_norm, 0
    for minibatch, is_measured in objective.minibatches(batch, stepper.streams):
        if minibatch is None:
            continue
        gradient = _gradient(stepper, minibatch)
        is_enough = objective.is_enough()
        if is_measured or is_enough:
            given.measures.add(objective.measures(), len(minibatch))
        if is_enough:
            given.measures.add({"steps_taken": taken}, 1)
            return
        norm = shorten(gradient, max_norm)
        stepper.adam.apply(objective.model.flat, gradient)
        objective.stepped()
        taken += 1
        if is_measured:
            given.measures.add({"gradient_norm": norm}, len(minibatch))


def _gradient(stepper: Stepper, minibatch: Any) -> Floats:
    watch.page[Slot.CALLS] += 1
    return stepper.objective.gradient(minibatch)


def _check_merged(merged: Arrays, template: Arrays) -> None:
    check_fit(merged, template)
    for name, array in merged.items():
        if name.startswith("nonneg/") and (array.astype(np.float64) < 0).any():
            raise ProtocolError(f"{name!r} is negative; leave out who contributed it")
