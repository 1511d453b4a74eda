"""What can be set of an algorithm: one field each, with its default, its range and what it is, all in one place.

A manifest overrides the defaults, and these follow the task, its action space, the exchange mode and the codec. What
`shoal algorithm show` tells, and what is refused as out of range, are read off the same fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Final, TypeVar

from shoal.protocol.codec import from_plain
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.exchange import outer
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import Manifest, Mode
from shoal.training.plugins import suggest
from shoal.training.tasks import Continuous, Task

S = TypeVar("S", bound="Settings")


def setting(default: Any, what: str, low: float | None = None, high: float | None = None) -> Any:
    """A field of `Settings`.

    Args:
        default: its own, before task and mode.
        what: it is, for people.
        low: the least that it may be, if it is a number.
        high: likewise the most. A field that may be None is not held to a range where it is.
    """
    return field(default=default, metadata={"what": what, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ABC):
    """What every algorithm on the engine has, each field with a line that says what it is.

    Attributes:
        continuous: which have other defaults where actions are continuous.
    """

    # The bonus holds off the early end of exploration among a few actions. A Gaussian has its own deviation.
    continuous: ClassVar[Mapping[str, Any]] = {"entropy_coefficient": 0.0, "normalize_observations": True}

    num_envs: int = setting(4, "environments that each peer steps side by side", 1, 1024)
    gamma: float = setting(0.99, "discount per step", 0.0, 1.0)
    learning_rate: float = setting(1e-3, "Adam's", 1e-9, 1.0)
    anneal_learning_rate: bool = setting(
        False, "let the learning rate fall in a line, to 0 when all have taken the run's max_env_steps together"
    )
    adam_epsilon: float = setting(1e-5, "Adam's", 1e-12, 1.0)
    max_grad_norm: float = setting(0.5, "longer gradients are scaled down to this", 1e-6, 1e9)
    hidden_sizes: tuple[int, ...] = setting((64, 64), "units per hidden layer, of each network")
    normalize_observations: bool = setting(
        False, "scale observations to mean 0 and deviation 1 over the whole run, of all peers"
    )
    normalize_returns: bool = setting(
        True, "scale rewards so that discounted returns have deviation 1 over the whole run, of all peers"
    )
    outer_learning_rate: float = setting(outer.LEARNING_RATE, "of the outer step in mode diloco", 1e-6, 10.0)
    outer_momentum: float = setting(outer.MOMENTUM, "likewise its momentum", 0.0, outer.MAX_MOMENTUM)

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.hidden_sizes) > 8 or not all(1 <= size <= 4096 for size in self.hidden_sizes):
            raise UsageError(f"hidden_sizes must be at most 8 sizes from 1 to 4096, not {list(self.hidden_sizes)}")

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Of the optimiser, per update."""

    @property
    def is_annealed(self) -> bool:
        """Whether anything depends on how far the run is, so that this has to be known."""
        return self.anneal_learning_rate

    @property
    def is_recurrent(self) -> bool:
        """Whether the policy remembers."""
        return False


def check_ranges(settings: Any) -> None:
    """Check each field of a dataclass of settings against its range.

    Raises:
        UsageError: if one is out of it.
    """
    for each in fields(settings):
        low, high, value = each.metadata["low"], each.metadata["high"], getattr(settings, each.name)
        if low is not None and value is not None and not low <= value <= high:
            raise UsageError(f"{each.name} must be between {low} and {high}, not {value}")


# What bytes are worth is known.
_BYTES: Final[dict[str, Any]] = {"normalize_observations": False}

# A swing is over in a second: looking further ahead learns slower (RL Baselines3 Zoo has 0.9).
_TASKS: Final[dict[str, dict[str, Any]]] = {"gym:Pendulum-v1": {"gamma": 0.95}}

# What topk leaves out comes later and all at once; with outer momentum on top of that a run diverges (2508.15706).
_LATE: Final[dict[str, Any]] = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}


def read_settings(
    kind: type[S],
    algorithm: str,
    manifest: Manifest,
    task: Task,
    in_mode: Mapping[Mode, Mapping[str, Any]],
    on_images: Mapping[str, Any] | None = None,
    on_tasks: Mapping[str, Mapping[str, Any]] | None = None,
) -> S:
    """The manifest's hyperparameters over the defaults for the task, its action space and the exchange mode.

    Args:
        kind: of settings.
        algorithm: whose they are, for people.
        manifest: of the run.
        task: the manifest's.
        in_mode: the algorithm's defaults in some modes.
        on_images: likewise for tasks that show images, in every mode.
        on_tasks: likewise for some tasks, by name; what a mode says comes before them.

    Raises:
        UsageError: if one is unknown, of the wrong type or out of range.
    """
    values: dict[str, Any] = {each.name: plain_default(each) for each in fields(kind)}
    given: dict[str, Any] = {}
    if isinstance(task.action_space, Continuous):
        given |= kind.continuous
    if task.observation_space.dtype == "uint8":
        given |= _BYTES
    given |= {**_TASKS.get(manifest.task, {}), **(on_tasks or {}).get(manifest.task, {})}
    given |= in_mode.get(manifest.mode, {})
    if task.observation_space.is_image:
        given |= on_images or {}
    if manifest.codec is Codec.TOPK:
        given |= _LATE
    for name in manifest.hyperparameters:
        if name not in values:
            raise UsageError(f"{algorithm} has no hyperparameter {name[:80]!r}; {suggest(name, values)}")
    values |= {name: value for name, value in given.items() if name in values}
    try:
        return from_plain(kind, values | manifest.hyperparameters)
    except ProtocolError as error:
        raise UsageError(f"a hyperparameter of {algorithm} is wrong: {error}") from error


@dataclass(frozen=True, slots=True)
class Described:
    """One setting, for people and programs.

    Attributes:
        name: as a manifest has it.
        summary: what it is.
        default: in general.
        defaults: where it is another: by the mode, the codec, the kind of actions or the task.
        low: the least that it may be; None, if it has no range.
        high: likewise the most.
    """

    name: str
    summary: str
    default: Any
    defaults: dict[str, Any]
    low: float | None
    high: float | None


def described(
    kind: type[Settings],
    in_mode: Mapping[Mode, Mapping[str, Any]],
    on_images: Mapping[str, Any] | None = None,
    on_tasks: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Described]:
    """All settings of an algorithm, whose defaults in some modes, for images and for some tasks are given."""
    special = {f"mode {mode}": given for mode, given in in_mode.items()} | {
        "codec topk": _LATE,
        "continuous actions": kind.continuous,
        "bytes": _BYTES,
    }
    special |= {"images": on_images or {}} | _TASKS | dict(on_tasks or {})
    return [
        Described(
            each.name,
            each.metadata["what"],
            plain_default(each),
            {where: values[each.name] for where, values in special.items() if each.name in values},
            each.metadata["low"],
            each.metadata["high"],
        )
        for each in fields(kind)
    ]


def plain_default(each: Field[Any]) -> Any:
    """A setting's default as a manifest would have it."""
    match each.default:
        case tuple() as several:
            return list(several)
        case StrEnum() as choice:
            return str(choice)
    return each.default
