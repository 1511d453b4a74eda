"""A gated recurrent unit (Cho et al., arXiv 1406.1078) in NumPy, forward and backward through time written out.

    r, z = sigmoid(W x + U h + b),    c = tanh(W' x + b' + r (U' h + b'')),    h' = z h + (1 - z) c

The reset gate r is applied behind the product, as cuDNN and torch have it: so one product serves all three. What x adds
is one product for all steps; only what depends on h goes step by step. As in `passes`, autograd's cost per operation
would be most of it: a test holds the gradient to what autograd gives.

Sequences of unequal lengths lie side by side without padding (`shoal.training.models.policy.Course`), so each step is a
slice of every array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.training.models.normals import normals, orthogonal
from shoal.training.models.policy import Course
from shoal.training.tasks.base import Floats


def initial(inputs: int, width: int, raw: np.random.PCG64) -> dict[str, npt.NDArray[np.float64]]:
    """The parameters at first: of deviation 1 / √inputs, orthogonal from step to step, biases 0."""
    return {
        "memory/in": normals(raw, 3 * width * inputs).reshape(3 * width, inputs) / np.sqrt(inputs),
        "memory/in_bias": np.zeros(3 * width),
        "memory/again": np.concatenate([orthogonal(width, width, raw) for _ in range(3)]),
        "memory/again_bias": np.zeros(3 * width),
    }


@dataclass(frozen=True, slots=True)
class Trace:
    """What there is to go backward from, of S samples in the order of a course.

    Attributes:
        after: ``[S, width]``, what is remembered after each.
        inputs: ``[S, inputs]``.
        before: ``[S, width]``.
        gates: ``[S, 2 width]``, r and z.
        proposed: ``[S, width]``, c.
        again: ``[S, width]``, what r is applied to.
        counts: the course's.
    """

    after: Floats
    inputs: Floats
    before: Floats
    gates: Floats
    proposed: Floats
    again: Floats
    counts: tuple[int, ...]


class Gated:
    """The unit, on parameters named as `initial` names them, and where their gradient belongs."""

    def __init__(self, parameters: Mapping[str, Floats], gradient: Mapping[str, Floats]) -> None:
        names = ("memory/in", "memory/in_bias", "memory/again", "memory/again_bias")
        self._in, self._in_bias, self._again, self._again_bias = (parameters[name] for name in names)
        self._d_in, self._d_in_bias, self._d_again, self._d_again_bias = (gradient[name] for name in names)
        self.width = self._again.shape[1]

    def through(self, inputs: Floats, course: Course) -> Trace:
        """Go through samples ``[S, inputs]``."""
        width, size = self.width, len(inputs)
        given = inputs @ self._in.T
        given += self._in_bias
        gates = np.empty((size, 2 * width), np.float32)
        before, after, proposed, again = np.empty((4, size, width), np.float32)
        weights, memory, start = self._again.T, course.memory, 0
        for count in course.counts:
            rows = slice(start, start + count)
            start += count
            memory = memory[:count]
            before[rows] = memory
            added = memory @ weights
            added += self._again_bias
            gate, new = gates[rows], proposed[rows]
            np.add(given[rows, : 2 * width], added[:, : 2 * width], out=gate)
            gate *= 0.5  # sigmoid(x) = ½ + ½ tanh(½ x)
            np.tanh(gate, out=gate)
            gate *= 0.5
            gate += 0.5
            again[rows] = added[:, 2 * width :]
            np.multiply(gate[:, :width], again[rows], out=new)
            new += given[rows, 2 * width :]
            np.tanh(new, out=new)
            np.subtract(memory, new, out=after[rows])
            memory = after[rows]
            memory *= gate[:, width:]
            memory += new
        return Trace(after, inputs, before, gates, proposed, again, course.counts)

    def backward(self, trace: Trace, d_after: Floats) -> None:
        """Write the gradient, by a loss's derivative ``[S, width]`` by what is remembered; that is overwritten.

        It ends where the sequences begin: what was remembered before is taken as given.
        """
        width, end = self.width, len(d_after)
        d_given, d_added = np.empty((2, end, 3 * width), np.float32)
        later: Floats = np.zeros((0, width), np.float32)
        slopes = trace.gates * (1 - trace.gates)
        for count in reversed(trace.counts):
            rows = slice(end - count, end)
            end -= count
            d_memory, gate, new = d_after[rows], trace.gates[rows], trace.proposed[rows]
            d_memory[: len(later)] += later
            d_rows = d_given[rows]
            d_new = d_rows[:, 2 * width :]
            np.subtract(1, gate[:, width:], out=d_new)
            d_new *= d_memory
            d_new *= 1 - new * new
            np.multiply(d_new, trace.again[rows], out=d_rows[:, :width])
            np.subtract(trace.before[rows], new, out=d_rows[:, width : 2 * width])
            d_rows[:, width : 2 * width] *= d_memory
            d_rows[:, : 2 * width] *= slopes[rows]
            d_added[rows] = d_rows
            d_added[rows, 2 * width :] *= gate[:, :width]
            later = d_added[rows] @ self._again
            later += d_memory * gate[:, width:]
        np.matmul(d_given.T, trace.inputs, out=self._d_in)
        np.add.reduce(d_given, axis=0, out=self._d_in_bias)
        np.matmul(d_added.T, trace.before, out=self._d_again)
        np.add.reduce(d_added, axis=0, out=self._d_again_bias)
