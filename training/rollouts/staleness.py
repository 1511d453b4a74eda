"""Corrections for samples of earlier policies: pure functions of log-probabilities, for objectives to use.

Written θ for the policy that is trained, b for the one that acted (behaviour), p for the one that a step may not leave
(proximal); r = π_θ/π_b. All are NumPy functions of arrays; where a gradient is wanted, the derivative by log π_θ is
given with the value, as the objectives of this house write their gradients out.

- `v_trace`: targets and advantages of IMPALA (Espeholt et al., arXiv 1802.01561); `shoal.training.algorithms.vtrace` is
  the objective around it, and says its deviations.
- `decoupled`: AReaL's objective (Fu et al., arXiv 2505.24298, from Hilton et al., arXiv 2110.00641):
  π_p/π_b · min(u A, clip(u, 1 ± ε) A) with u = π_θ/π_p. What is corrected for, and how far a step goes, are two things;
  PPO is the case p = b. Deviation: π_p/π_b may be cut (``max_weight``), or samples above it left out (``is_masked``, as
  AReaL's code does by default); the paper's formula has neither.
- `interpolated`: A-3PO's stand-in for p (Li et al., arXiv 2512.06547): log π_p = w log π_b + (1 - w) log π_θ with
  w = 1/d for a sample that is d ≥ 1 versions old, and 0 for one that is not old. It saves judging every sample by one
  more policy. In it π_θ counts as a number: nothing is derived by it.
- `group_expectation`: GEPO's weights (Zhang et al., arXiv 2508.17850, eq. 2 and 3): of G plays of one scenario,
  w_i = p_i / Ê with Ê = Σ q_i² / Σ q_i, the group's expectation of q under itself. No single q can make a weight
  explode. As in the authors' code, the p and q of a sequence are geometric means over its tokens (the paper writes
  plain sequence probabilities, which vanish for long ones); all in logarithms here, so that nothing underflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.training.algorithms.rollouts import accumulate, following, runs_on
from shoal.training.tasks.base import Floats

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """What is to be made large, sample by sample.

    Attributes:
        values: ``[S]``.
        slopes: ``[S]``, their derivatives by log π_θ.
        weights: ``[S]``, π_p/π_b as it counted; 0 where a sample was left out.
        is_held: ``[S]``, where the clipped ratio counts, so that nothing depends on θ.
    """

    values: Floats
    slopes: Floats
    weights: Floats
    is_held: Bools


def v_trace(
    log_probs: Floats,
    acted: Floats,
    rewards: Floats,
    values: Floats,
    final_values: Floats,
    terminated: Bools,
    truncated: Bools,
    *,
    gamma: float,
    gae_lambda: float = 1.0,
    max_rho: float = 1.0,
    max_c: float = 1.0,
) -> tuple[Floats, Floats]:
    """What values are to be, and advantages that are yet to be weighted by min(max_rho, r).

    Args:
        log_probs: ``[T, N]``, log π_θ of the actions.
        acted: ``[T, N]``, log π_b of them.
        rewards: ``[T, N]``.
        values: ``[T + 1, N]``, of the states.
        final_values: ``[K]``, of the last states of the K truncated episodes.
        terminated: ``[T, N]``.
        truncated: ``[T, N]``.
        gamma: discount per step.
        gae_lambda: how much of what came later a step passes on, beside ``max_c``.
        max_rho: how much a sample counts at most.
        max_c: how much of what came later a step passes on at most.

    Returns:
        Targets and advantages, each ``[T, N]``.
    """
    with np.errstate(all="ignore"):  # what is not finite is found when the update is done
        ratios = np.exp(log_probs - acted)
    ends, discount = (terminated, truncated), np.float32(gamma)
    after = following(*ends, values, final_values)
    corrections: Floats = np.minimum(ratios, np.float32(max_rho)) * (rewards + discount * after - values[:-1])
    passed_on = np.minimum(ratios, np.float32(max_c)) * np.float32(gamma * gae_lambda)
    accumulate(corrections, passed_on * runs_on(*ends))
    targets = values.copy()
    targets[:-1] += corrections
    advantages: Floats = rewards + discount * following(*ends, targets, final_values) - values[:-1]
    return targets[:-1], advantages


def decoupled(
    log_probs: Floats,
    proximal: Floats,
    acted: Floats,
    advantages: Floats,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    max_weight: float | None = None,
    is_masked: bool = False,
) -> Surrogate:
    """The decoupled PPO objective.

    Args:
        log_probs: ``[S]``, log π_θ.
        proximal: ``[S]``, log π_p.
        acted: ``[S]``, log π_b.
        advantages: ``[S]``.
        clip_range: how far π_θ/π_p may fall below 1, and
        clip_range_high: rise above it; none: as far.
        max_weight: of a sample, π_p/π_b.
        is_masked: whether samples that would weigh more are left out, not cut.
    """
    with np.errstate(over="ignore"):
        weights: Floats = np.exp(proximal - acted)
        ratios: Floats = np.exp(log_probs - proximal)
    if max_weight is not None:
        most = np.float32(max_weight)
        weights = np.where(weights > most, np.float32(0), weights) if is_masked else np.minimum(weights, most)
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = np.clip(ratios, np.float32(1 - clip_range), np.float32(1 + high))
    own, held = ratios * advantages, clipped * advantages
    is_held: Bools = own > held
    values: Floats = weights * np.minimum(own, held)
    slopes: Floats = weights * np.where(is_held, np.float32(0), own)
    return Surrogate(values, slopes, weights, is_held)


def interpolated(log_probs: Floats, acted: Floats, ages: Ints) -> Floats:
    """Log π_p as A-3PO has it: ``[S]``.

    Args:
        log_probs: ``[S]``, log π_θ.
        acted: ``[S]``, log π_b.
        ages: int64 ``[S]``, by how many versions the policy that acted is older than the trained one.
    """
    alpha = np.where(ages > 0, 1 / np.maximum(ages, 1), 0).astype(np.float32)
    found: Floats = log_probs + alpha * (acted - log_probs)
    return found


def group_expectation(log_probs: Floats, acted: Floats, groups: Ints, *, lengths: Ints | None = None) -> Floats:
    """GEPO's weights, ``[S]``: of each sequence, by the expectation over its group.

    Args:
        log_probs: ``[S]``, log π_θ of whole sequences.
        acted: ``[S]``, log π_b, likewise.
        groups: int64 ``[S]``, equal where two sequences are plays of one scenario.
        lengths: int64 ``[S]``, how many tokens each has: log-probabilities are divided by it, as the authors
            do; None: they are taken as they are.
    """
    size = np.ones(len(groups)) if lengths is None else np.maximum(lengths, 1).astype(np.float64)
    of_theta, of_acted = log_probs.astype(np.float64) / size, acted.astype(np.float64) / size
    found = np.empty(len(groups), np.float64)
    for group in np.unique(groups):
        members = groups == group
        q = of_acted[members]
        expected = _log_sum(2 * q) - _log_sum(q)
        with np.errstate(over="ignore"):
            found[members] = np.exp(of_theta[members] - expected)
    return found.astype(np.float32)


def _log_sum(logs: npt.NDArray[np.float64]) -> float:
    """Log Σ exp."""
    highest = float(logs.max())
    return highest + float(np.log(np.exp(logs - highest).sum()))
