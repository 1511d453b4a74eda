"""A training loop of the user as a `shoal.training.algorithms.Learner`: what is averaged of it, and what comes back.

The loop trains as it likes. Once it, or enough of the others, have done their share of an epoch, each contributes how
far it came from the parameters that all began with, turned round (``start - local``), weighted by the samples that it
has trained on meanwhile. Modes (DESIGN §8):

- ``local``: the average of that is taken off the start: the weighted mean of what the members have (local SGD, Stich,
  arXiv 1805.09767);
- ``diloco``: it is taken for a gradient by an outer Nesterov step (`shoal.training.exchange.outer`).

Float buffers of modules, such as the running statistics of batch normalisation, are averaged as they are. The optimiser
stays the loop's own, as in DiLoCo: its moments go with no state, so a newcomer's start at zero.

**How it begins.** Networks that were initialised apart have no mean that is of any use. So nobody's parameters are the
run's initial state, which is empty and the same for everybody; the first round takes those of the one member whose name
comes first (``first/`` of `exchange.averager`), and all go on from these. Until then no loop trains: a newcomer's waits
in the constructor of its `Averager`, and is given the state of those who have begun, if there are any.

What was done on a state that the others went on from without this loop is not lost: where the run says to keep it, the
way that the loop went is put on top of the newer state, and counts in the next epoch. Only once, though: what is older
than that is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.base import Collected, DivergedError, Exchange, Update, UpdateStats
from shoal.training.exchange import adapting, outer
from shoal.training.exchange.averager import Arrays, Contribution
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.outliers import Scale
from shoal.training.exchange.rules import Codec
from shoal.training.loop.gate import Gate
from shoal.training.loop.tensors import Floats, Shapes, Tensors, differences, split
from shoal.training.manifest import Manifest, Mode
from shoal.training.plugins import suggest
from shoal.training.state import check_fit

SHAPES: Final = "tensors"
"""The hyperparameter that says which tensors every member's loop must have, with their shapes."""
VOTES: Final = "sum/codec"
"""Of what the next exchange travels as, where the run leaves it open (`shoal.training.exchange.adapting`)."""
SETTINGS: Final = (SHAPES, "outer_learning_rate", "outer_momentum")
CHUNKS_TO_HEAR: Final = 4
"""Times that a loop which has nothing yet is asked to collect, until it takes itself for one of the first: members that
are there are heard of meanwhile."""
MAX_WAY: Final = 1000.0
"""No parameter comes further in an epoch than so many times the largest that there is, or than this."""
DELTA_FACTOR: Final = 100.0
"""What one has come in an epoch may be so many times what the median has: one step, or all of them."""


@dataclass(frozen=True, slots=True)
class Averaged:
    """The loop's tensors were changed.

    Attributes:
        epoch: averages that the swarm has made up to this state.
        members: of how many loops this is the average; 0 if it was taken from others who made it
            without this loop.
    """

    epoch: int
    members: int


class LoopLearner:
    """One loop's part in a run; see `shoal.training.algorithms.Learner` and the head of this module."""

    def __init__(
        self,
        manifest: Manifest,
        tensors: Tensors,
        gate: Gate[Averaged],
        *,
        clock: Callable[[], float],
    ) -> None:
        """Begin with nothing averaged.

        Args:
            manifest: of the run.
            tensors: of the loop.
            gate: to its thread.
            clock: seconds; what exchanges take decides what the next one travels as, where the run says so.

        Raises:
            UsageError: if the run's settings are none, or are not for tensors such as these.
        """
        settings = manifest.hyperparameters
        for name in settings:
            if name not in SETTINGS:
                raise UsageError(f"a training loop has no setting {name[:80]!r}; {suggest(name, SETTINGS)}")
        self._are_shapes_known = SHAPES in settings
        if self._are_shapes_known and (difference := differences(tensors.shapes, _shapes(settings[SHAPES]))):
            raise misfit(difference)
        self._mode = manifest.mode
        self._share = manifest.batch.largest_share
        self._tensors = tensors
        self._gate = gate
        parameters, buffers = (sum(each.numel() for each in group.values()) for group in _groups(tensors))
        self._start: Floats = np.zeros(parameters, np.float32)
        self._buffers: Floats = np.zeros(buffers, np.float32)
        self._epoch = 0
        self._begun: Floats | None = None  # where this loop began from, if it was not from the start
        self._num_carried = 0  # samples of the way from the start to there
        self._has_shared = False
        self._num_told = 0
        self._num_asked = 0
        self._outer = _outer(manifest, parameters)
        self._step = 0 if manifest.codec is Codec.AUTO else None  # in `adapting.STEPS`
        self._clock = clock
        self._ended_at: float | None = None  # of the last exchange, with what it took
        self._exchanged_s = 0.0
        self._running: Update | None = None

    @property
    def samples(self) -> int:
        """That wait for the next update."""
        return self._gate.samples if self._epoch else 0

    def collect(self, num_steps: int, is_over: Callable[[], bool] = lambda: False) -> Collected:
        """Wait until the loop has trained on so many more samples; see `Learner.collect`.

        A loop that has nothing yet is said to have collected what is asked, after a while: then nobody else has begun.
        """
        if self._epoch == 0:
            self._num_asked += 1
            if self._num_asked <= CHUNKS_TO_HEAR:
                self._gate.count_to(2**62, is_over)
                return Collected(0, 0, ())
            return Collected(0, num_steps, ())
        total = self._gate.count_to(self._num_told + num_steps, is_over)
        samples, self._num_told = max(total - self._num_told, 0), total
        return Collected(samples, total, ())

    def collect_ahead(self, is_over: Callable[[], bool]) -> Collected:
        """Nothing: the loop waits for the average itself."""
        return Collected(0, self.samples, ())

    def update(self) -> Update:
        """Average; see the head of this module."""
        self._running = self._update()
        return self._running

    def _update(self) -> Update:
        self._gate.hold()
        try:
            if self._epoch == 0:
                members = yield from self._agree()
            else:
                members = yield from self._average()
        finally:
            self._running = None
            self._gate.let_go(self._share)
        metrics = {"members": float(members)}
        if self._step is not None:
            metrics["codec_step"] = float(self._step)
        return UpdateStats(0, 1, metrics)

    def _agree(self) -> Generator[Exchange, Arrays, int]:
        """Take one member's parameters for the beginning of all."""
        parameters, buffers = self._gate.do(self._tensors.read)
        template: Arrays = {"first/parameters": parameters, "sum/members": _ONE}
        if buffers.size:
            template["first/buffers"] = buffers
        self._require_sound(parameters, buffers, "initialise the model anew")
        merged = yield Exchange(template, 1.0, template, _check_members, {"first/parameters": Scale(DELTA_FACTOR)})
        if not merged:
            raise DivergedError("no member has parameters that can be begun with")
        check_fit(merged, template)
        self._settle(merged["first/parameters"], merged.get("first/buffers", buffers), 1)
        return self._made(merged)

    def _average(self) -> Generator[Exchange, Arrays, int]:
        """Take what all have found."""
        samples = min(self._gate.samples, 2 * self._share)  # no more is believed of anybody
        parameters, buffers = self._gate.do(self._tensors.read)
        template: Arrays = {"mean/delta": self._start - parameters, "sum/members": _ONE}
        if buffers.size:
            template["mean/buffers"] = buffers
        self._require_sound(parameters, buffers, "lower the learning rate, and start anew from the swarm's state")
        began = self._clock()
        if self._step is not None:
            template[VOTES] = self._vote(began, parameters.nbytes)
        most = MAX_WAY * (1.0 + float(np.abs(self._start).max(initial=0.0)))
        merged = yield Exchange(
            template if samples else {},
            samples,
            template,
            partial(_check_way, most),
            {"mean/delta": Scale(DELTA_FACTOR)},
            {"mean/buffers": self._buffers},
            {"mean/delta": most},
            None if self._step is None else adapting.STEPS[self._step],
        )
        if not merged:
            raise DivergedError("no member has anything to average")
        check_fit(merged, template)
        moved, momentum = self._start.copy(), self._outer.momentum.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            self._outer.apply(moved, _floats(merged["mean/delta"]))
        if not (np.isfinite(moved).all() and np.isfinite(self._outer.momentum).all()):
            self._outer.momentum[:] = momentum
            raise DivergedError("what was merged leads to parameters that are not finite")
        self._settle(moved, merged.get("mean/buffers", self._buffers), self._epoch + 1)
        step = self._step
        if step is not None:
            self._step = adapting.next_step(step, merged[VOTES])
        members = self._made(merged)
        if step == self._step:  # else what it took says nothing of the next one
            self._ended_at = self._clock()
            self._exchanged_s = self._ended_at - began
        return members

    def _vote(self, now: float, num_bytes: int) -> np.ndarray[Any, Any]:
        if self._ended_at is None:
            return adapting.vote(None, 0.0, num_bytes)
        return adapting.vote(self._exchanged_s, now - self._ended_at, num_bytes)

    def _made(self, merged: Arrays) -> int:
        """An average was made with so many others."""
        members = int(merged["sum/members"])
        self._has_shared = self._has_shared or members > 1
        self._gate.do(lambda: self._tensors.write(self._start, self._buffers))
        self._gate.tell(Averaged(self._epoch, members), samples=0)
        return members

    def _settle(self, parameters: np.ndarray[Any, Any], buffers: np.ndarray[Any, Any], epoch: int) -> None:
        """All members have this now, and nothing of what comes after it."""
        self._start, self._buffers, self._epoch = _floats(parameters), _floats(buffers), epoch
        self._begun, self._num_carried, self._num_told = None, 0, 0
        self._ended_at = None

    def abandon(self) -> None:
        """Give up a half-done update. What the loop has trained is in its own tensors, and stays there."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def export_state(self) -> Arrays:
        """What all members hold since the last average, copied."""
        return {name: array.copy() for name, array in self._state().items()}

    def import_state(self, arrays: Arrays, *, keep_samples: bool = False) -> None:
        """Take a state, into the loop's tensors too; see `Learner.import_state` and the head of this module."""
        try:
            self._check(arrays)
        except ProtocolError as error:
            if not self._are_shapes_known and not self._has_shared:  # else it is a lie: the others' fitted before
                there = {name.partition("/")[2]: each.shape for name, each in arrays.items() if _is_tensor(name)}
                self._gate.fail(misfit(differences(self._tensors.shapes, there) or str(error)))
            raise
        self.abandon()
        epoch = int(arrays["epoch"])
        before_parameters, before_buffers = _groups(self._tensors)
        parameters = _joined(arrays, "parameters", before_parameters)
        buffers = _joined(arrays, "buffers", before_buffers)
        if "outer/momentum" in arrays:
            self._outer.momentum[:] = arrays["outer/momentum"]
        if self._step is not None:
            self._step = int(arrays["codec"])
        if epoch == 0:  # nobody's parameters yet
            self._settle(parameters, buffers, 0)
            self._num_asked = 0
            return
        self._gate.hold()
        try:
            self._take(parameters, buffers, epoch, keep_samples=keep_samples and self._epoch > 0)
        finally:
            self._gate.let_go(self._share)

    def _take(self, parameters: Floats, buffers: Floats, epoch: int, *, keep_samples: bool) -> None:
        new = self._gate.samples - self._num_carried if keep_samples else 0
        local, _ = self._gate.do(self._tensors.read)
        way = local - (self._start if self._begun is None else self._begun)
        self._settle(parameters, buffers, epoch)
        self._has_shared = True
        if new > 0 and np.isfinite(way).all():
            self._begun = parameters + way
            self._num_carried = self._num_told = new
        shown = parameters if self._begun is None else self._begun
        self._gate.do(lambda: self._tensors.write(shown, buffers))
        self._gate.tell(Averaged(epoch, 0), samples=self._num_carried)

    def policy_arrays(self) -> Arrays:
        """The parameters and buffers that all members hold, copied."""
        return {name: array.copy() for name, array in self._state().items() if _is_tensor(name)}

    def evaluate(self, episodes: int, seed: int) -> list[float]:
        """Nothing: the loop evaluates itself."""
        raise UsageError(f"a training loop has no episodes, so no {episodes} of them can be run from seed {seed}")

    def _state(self) -> Arrays:
        parameters, buffers = _groups(self._tensors)
        state: Arrays = {f"parameters/{name}": each for name, each in split(self._start, parameters).items()}
        state |= {f"buffers/{name}": each for name, each in split(self._buffers, buffers).items()}
        state["epoch"] = np.asarray(self._epoch, np.int64)
        if self._step is not None:
            state["codec"] = np.asarray(self._step, np.int64)
        return state | ({"outer/momentum": self._outer.momentum} if self._mode is Mode.DILOCO else {})

    def _check(self, arrays: Arrays) -> None:
        check_fit(arrays, self._state())
        if int(arrays["epoch"]) < 0:
            raise ProtocolError("the state is of an epoch below 0; take another state")
        if self._step is not None and not 0 <= int(arrays["codec"]) < len(adapting.STEPS):
            raise ProtocolError("the state names a codec that there is not; take another state")

    def _require_sound(self, parameters: Floats, buffers: Floats, remedy: str) -> None:
        """Stop a loop that has diverged: its optimiser has, too, and would spoil what it took from others at once."""
        for vector, group in zip((parameters, buffers), _groups(self._tensors), strict=True):
            for name, part in split(vector, group).items():
                if not np.isfinite(part).all():
                    error = UsageError(f"{name!r} holds NaN or infinity: the loop has diverged; {remedy}")
                    self._gate.fail(error)
                    raise error


_ONE: Final = np.asarray(1, np.int64)


def misfit(difference: str) -> UsageError:
    """The loop is of another model than the swarm's."""
    return UsageError(
        f"this loop trains another model than its swarm: {difference}; build the same model as the others, or start a "
        "swarm of its own"
    )


def _check_way(most: float, contribution: Contribution) -> None:
    _check_members(contribution)
    votes = contribution.arrays.get(VOTES)
    if votes is not None and not adapting.is_vote(votes):
        raise ProtocolError(f"the contribution of {contribution.author} has more than one vote; leave it out")
    way = contribution.arrays.get("mean/delta")  # which, if it is large, is held to this part by part
    if way is not None and not float(np.abs(way).max(initial=0.0)) <= most:
        raise ProtocolError(f"the contribution of {contribution.author} came further than any loop does; leave it out")


def _check_members(contribution: Contribution) -> None:
    if contribution.arrays["sum/members"] != _ONE:
        raise ProtocolError(f"the contribution of {contribution.author} is not that of one member; leave it out")


def _shapes(value: Any) -> Shapes:
    if not isinstance(value, dict) or not all(
        isinstance(each, list | tuple) and all(type(size) is int for size in each) for each in value.values()
    ):
        raise UsageError(f"the run's setting {SHAPES!r} does not map names of tensors to shapes; start another run")
    return value


def _outer(manifest: Manifest, size: int) -> Outer:
    """The step that the average leads to; in mode ``local``, all the way to it."""
    given = manifest.hyperparameters
    if manifest.mode is Mode.LOCAL:
        if any(name != SHAPES for name in given):
            raise UsageError("an outer step is taken in mode diloco only; take that, or leave its settings out")
        return Outer(size, learning_rate=1.0, momentum=0.0, max_gradient=math.inf)
    is_sparse = manifest.codec is Codec.TOPK  # whose memory is momentum enough
    rate = given.get("outer_learning_rate", 1.0 if is_sparse else outer.LEARNING_RATE)
    momentum = given.get("outer_momentum", 0.0 if is_sparse else outer.MOMENTUM)
    for name, value, most in (("outer_learning_rate", rate, 10.0), ("outer_momentum", momentum, outer.MAX_MOMENTUM)):
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise UsageError(f"{name} must be between 0 and {most}, not {value!r:.40}")
    return Outer(size, learning_rate=rate, momentum=momentum, max_gradient=math.inf)


def _groups(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    return tensors.parameters, tensors.buffers


def _is_tensor(name: str) -> bool:
    return name.startswith(("parameters/", "buffers/"))


def _joined(arrays: Arrays, kind: str, tensors: dict[str, Any]) -> Floats:
    parts = [_floats(arrays[f"{kind}/{name}"]).ravel() for name in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _floats(array: np.ndarray[Any, Any]) -> Floats:
    result: Floats = array.astype(np.float32, copy=True)
    return result
