"""Shards of rows: T steps of N environments that step together (`shoal.training.tasks.VectorEnv`), as columns.

===============  ==================  ===============================================================================
column           shape               what
===============  ==================  ===============================================================================
``seeds``        ``[N]`` uint32      from which the environments were reset when the stream began
``lead``         ``[L, N(, size)]``  the acts of the stream's earlier shards: replayed to where this one begins
``actions``      ``[T, N(, size)]``  smallest unsigned type that holds them, or float32
``rewards``      ``[T, N]``          float32
``log_probs``    ``[T, N]``          float32, of the actions under the policy that acted
``terminated``   ``[T, N]``          bool
``truncated``    ``[T, N]``          bool
``sights``       ``[T + 1, N, s]``   float32, what was shown; left out where it can be replayed
``finals``       ``[K, s]``          float32, the last sights of the K episodes that were cut off; with ``sights``
===============  ==================  ===============================================================================

Without sights a shard is two to six times smaller (`benchmarks/results/shards.md`), and whoever learns from it has to
replay it, which takes nearly as long as acting did; whoever checks it replays it anyhow. A stream that goes on
carries its earlier acts along, so that each shard can be replayed by itself; they cost a byte or less each and are
bounded (`MAX_REPLAYED`), since each is a step for whoever checks; then the stream begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import LimitError, ProtocolError
from shoal.training.rollouts.packed import Array
from shoal.training.rollouts.shard import MAX_SAMPLES, Shard, ShardKind
from shoal.training.tasks.base import Actions, ActionSpace, Discrete, Floats

MAX_ENVS: Final = 1024
MAX_REPLAYED: Final = MAX_SAMPLES
"""Environment steps that whoever checks a shard has to take, its lead among them."""
_UNSIGNED: Final = ("uint8", "uint16", "uint32")
_NAMES: Final = frozenset(
    {"seeds", "lead", "actions", "rewards", "log_probs", "terminated", "truncated", "sights", "finals"}
)
_OPTIONAL: Final = frozenset({"sights", "finals"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """T steps of N environments, see the head of this module.

    Attributes:
        seeds: int64 ``[N]``.
        lead: ``[L, N]`` int64 or ``[L, N, size]`` float32.
        actions: ``[T, N]`` int64 or ``[T, N, size]`` float32.
        rewards: ``[T, N]``.
        log_probs: ``[T, N]``.
        terminated: ``[T, N]``.
        truncated: ``[T, N]``.
        sights: ``[T + 1, N, observation_size]``; None, where they are to be replayed.
        finals: ``[K, observation_size]``, in the order of ``truncated``; likewise.
    """

    seeds: npt.NDArray[np.int64]
    lead: Actions
    actions: Actions
    rewards: Floats
    log_probs: Floats
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    sights: Floats | None = field(default=None)
    finals: Floats | None = field(default=None)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rewards)

    @property
    def num_envs(self) -> int:
        """N."""
        return int(self.rewards.shape[1])

    @property
    def samples(self) -> int:
        """T times N."""
        return self.rewards.size

    @property
    def units(self) -> tuple[int, ...]:
        """How many samples each environment gave: what an update draws by itself."""
        return (self.steps,) * self.num_envs

    def of_envs(self, envs: Sequence[int]) -> Rows:
        """The steps of some environments, in this order; what an update drew of a shard."""
        chosen = list(envs)
        finals = None
        if self.finals is not None:
            places = np.full(self.truncated.shape, -1)
            places[self.truncated] = np.arange(len(self.finals))
            finals = self.finals[places[:, chosen][self.truncated[:, chosen]]]
        return Rows(
            seeds=self.seeds[chosen],
            lead=self.lead[:, chosen],
            actions=self.actions[:, chosen],
            rewards=self.rewards[:, chosen],
            log_probs=self.log_probs[:, chosen],
            terminated=self.terminated[:, chosen],
            truncated=self.truncated[:, chosen],
            sights=None if self.sights is None else self.sights[:, chosen],
            finals=finals,
        )

    def columns(self, space: ActionSpace) -> dict[str, Array]:
        """As they are written."""
        found: dict[str, Array] = {
            "seeds": self.seeds.astype(np.uint32),
            "lead": _written(self.lead, space),
            "actions": _written(self.actions, space),
            "rewards": self.rewards,
            "log_probs": self.log_probs,
            "terminated": self.terminated,
            "truncated": self.truncated,
        }
        if self.sights is not None and self.finals is not None:
            found |= {"sights": self.sights, "finals": self.finals}
        return found

    def replace_sights(self, sights: Floats | None, finals: Floats | None) -> Rows:
        """The same with other sights, or without."""
        return Rows(
            seeds=self.seeds,
            lead=self.lead,
            actions=self.actions,
            rewards=self.rewards,
            log_probs=self.log_probs,
            terminated=self.terminated,
            truncated=self.truncated,
            sights=sights,
            finals=finals,
        )


class DoesNotFitError(ProtocolError):
    """A shard is sound, and of another task, policy or version than this one: of no use here, and no lie."""


def rows_of(shard: Shard, observation_size: int, space: ActionSpace) -> Rows:
    """The rows of a shard, held to what its task can show and do.

    Raises:
        DoesNotFitError: if it is of another kind, or its columns have other types or lengths than the task's.
        LimitError: if it has more environments or steps than may be.
        ProtocolError: if it holds numbers that nobody can have met: not finite, probabilities above 1, actions that
            there are not.
    """
    if shard.head.kind is not ShardKind.ROWS:
        raise DoesNotFitError(f"a shard of {shard.head.kind} is none of rows; use it for what it is")
    columns = dict(shard.columns)
    if not _NAMES - _OPTIONAL <= columns.keys() <= _NAMES or ("sights" in columns) != ("finals" in columns):
        raise DoesNotFitError("a shard of rows has other columns than this version knows; update Shoal to use it")
    shape = columns["rewards"].shape
    if len(shape) != 2 or not shape[0] or not 1 <= shape[1] <= MAX_ENVS or shape[0] * shape[1] > MAX_SAMPLES:
        raise LimitError(f"a shard of {list(shape)} steps is longer than may be, or empty; refuse it")
    steps, count = shape
    for name in ("rewards", "log_probs"):
        _require(columns, name, (steps, count), ("float32",))
    for name in ("terminated", "truncated"):
        _require(columns, name, (steps, count), ("bool",))
    _require(columns, "seeds", (count,), ("uint32",))
    if (len(columns["lead"]) + steps) * count > MAX_REPLAYED:
        raise LimitError(f"a shard takes more than {MAX_REPLAYED} steps to replay; begin streams anew more often")
    one = () if isinstance(space, Discrete) else (space.size,)
    types = _UNSIGNED if isinstance(space, Discrete) else ("float32",)
    _require(columns, "actions", (steps, count, *one), types)
    _require(columns, "lead", (len(columns["lead"]), count, *one), types)
    if "sights" in columns:
        cut = int(columns["truncated"].sum())
        _require(columns, "sights", (steps + 1, count, observation_size), ("float32",))
        _require(columns, "finals", (cut, observation_size), ("float32",))
    if shard.head.samples != steps * count:
        raise ProtocolError(f"a shard says {shard.head.samples} samples and has {steps * count}; refuse it")
    _check_numbers(columns, space)
    return Rows(
        seeds=columns["seeds"].astype(np.int64),
        lead=_read(columns["lead"], space),
        actions=_read(columns["actions"], space),
        rewards=columns["rewards"],
        log_probs=columns["log_probs"],
        terminated=columns["terminated"],
        truncated=columns["truncated"],
        sights=columns.get("sights"),
        finals=columns.get("finals"),
    )


def _require(columns: dict[str, Array], name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
    array = columns[name]
    if array.shape != shape or array.dtype.name not in types:
        raise DoesNotFitError(
            f"a shard's {name} are {array.dtype.name} {list(array.shape)} and not {types[0]} {list(shape)}, as the "
            "task has them; use shards of this task"
        )


def _check_numbers(columns: dict[str, Array], space: ActionSpace) -> None:
    for name in columns.keys() & {"rewards", "log_probs", "sights", "finals", "lead", "actions"}:
        array = columns[name]
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise ProtocolError(f"a shard's {name} are not finite; refuse it")
    if (columns["terminated"] & columns["truncated"]).any():
        raise ProtocolError("a shard's episode ends by itself and is cut off at once; refuse it")
    if isinstance(space, Discrete):
        if (columns["log_probs"] > 0).any():
            raise ProtocolError("a shard has actions of probabilities above 1; refuse it")
        for name in ("actions", "lead"):
            if columns[name].size and int(columns[name].max()) >= space.count:
                raise ProtocolError(f"a shard's {name} are not all 0 to {space.count - 1}; refuse it")


def _written(actions: Actions, space: ActionSpace) -> Array:
    if not isinstance(space, Discrete):
        return actions
    kind: Any = next(each for each in _UNSIGNED if space.count - 1 <= np.iinfo(each).max)
    return actions.astype(kind)


def _read(actions: Array, space: ActionSpace) -> Actions:
    return actions.astype(np.int64) if isinstance(space, Discrete) else actions
