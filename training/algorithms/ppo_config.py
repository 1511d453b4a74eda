"""The settings of PPO, their defaults by action space, task and exchange mode, and how a manifest overrides them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from shoal.protocol.codec import from_plain
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.exchange import outer
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import Manifest, Mode
from shoal.training.plugins import suggest
from shoal.training.tasks import Continuous, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """How PPO learns. The defaults are those for discrete actions in mode ``local``; see `ppo_config` for the others.

    Attributes:
        num_envs: environments that each peer steps side by side.
        gamma: discount per step.
        gae_lambda: of the advantage estimate; 0 trusts the values alone, 1 the rewards alone.
        learning_rate: Adam's.
        adam_epsilon: Adam's.
        update_epochs: passes over the samples per update.
        num_minibatches: optimiser steps per pass, whatever the number of samples; so that a peer with a third of the
            batch takes as many steps as a process with all of it.
        clip_range: how far the ratio of an action's new probability to its old may leave 1 before its gradient stops.
        value_coefficient: weight of the value loss.
        entropy_coefficient: weight of the entropy bonus.
        max_grad_norm: longer gradients are scaled down to this.
        hidden_sizes: units per hidden layer, of the actor and of the critic alike.
        initial_log_std: of a continuous policy; 0 where 1 is half the range of an action.
        normalize_observations: scale observations to mean 0 and deviation 1 over the whole run, of all peers.
        normalize_returns: scale rewards so that discounted returns have deviation 1 over the whole run, of all peers.
        outer_learning_rate: of the outer step in mode ``diloco``.
        outer_momentum: likewise.
    """

    num_envs: int = 4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    learning_rate: float = 1e-3
    adam_epsilon: float = 1e-5
    update_epochs: int = 10
    num_minibatches: int = 32
    clip_range: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.01
    max_grad_norm: float = 0.5
    hidden_sizes: tuple[int, ...] = (64, 64)
    initial_log_std: float = 0.0
    normalize_observations: bool = False
    normalize_returns: bool = True
    outer_learning_rate: float = outer.LEARNING_RATE
    outer_momentum: float = outer.MOMENTUM

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_envs", 1, 1024),
            ("gamma", 0.0, 1.0),
            ("gae_lambda", 0.0, 1.0),
            ("learning_rate", 1e-9, 1.0),
            ("adam_epsilon", 1e-12, 1.0),
            ("update_epochs", 1, 1000),
            ("num_minibatches", 1, 65536),
            ("clip_range", 1e-6, 100.0),
            ("value_coefficient", 0.0, 1e6),
            ("entropy_coefficient", 0.0, 1e6),
            ("max_grad_norm", 1e-6, 1e9),
            ("initial_log_std", -20.0, 5.0),
            ("outer_learning_rate", 1e-6, 10.0),
            ("outer_momentum", 0.0, outer.MAX_MOMENTUM),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} must be between {low} and {high}, not {value}")
        if len(self.hidden_sizes) > 8 or not all(1 <= size <= 4096 for size in self.hidden_sizes):
            raise UsageError(f"hidden_sizes must be at most 8 sizes from 1 to 4096, not {list(self.hidden_sizes)}")


# The bonus holds off the early end of exploration among a few actions. A Gaussian has its own deviation, and learns it.
_CONTINUOUS: Final[dict[str, Any]] = {"entropy_coefficient": 0.0, "normalize_observations": True}

# A swing is over in a second: looking further ahead learns slower (RL Baselines3 Zoo has 0.9).
_TASKS: Final[dict[str, dict[str, Any]]] = {"gym:Pendulum-v1": {"gamma": 0.95}}

# In mode gradient every optimiser step is a round over the network, so a tenth as many, three times as long.
_GRADIENT: Final[dict[str, Any]] = {"update_epochs": 8, "num_minibatches": 4, "learning_rate": 3e-3}


# What topk leaves out comes later and all at once; with outer momentum on top of that a run diverges (2508.15706).
_LATE: Final[dict[str, Any]] = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}


def ppo_config(manifest: Manifest, task: Task) -> PPOConfig:
    """The manifest's hyperparameters over the defaults for the task, its action space and the exchange mode.

    Raises:
        UsageError: if one is unknown, of the wrong type or out of range.
    """
    values = asdict(PPOConfig())
    values["hidden_sizes"] = list(values["hidden_sizes"])
    if isinstance(task.action_space, Continuous):
        values |= _CONTINUOUS
    values |= _TASKS.get(manifest.task, {})
    if manifest.mode is Mode.GRADIENT:
        values |= _GRADIENT
    if manifest.codec is Codec.TOPK:
        values |= _LATE
    known = {field.name for field in fields(PPOConfig)}
    for name in manifest.hyperparameters:
        if name not in known:
            raise UsageError(f"ppo has no hyperparameter {name[:80]!r}; {suggest(name, known)}")
    try:
        return from_plain(PPOConfig, values | manifest.hyperparameters)
    except ProtocolError as error:
        raise UsageError(f"a hyperparameter of ppo is wrong: {error}") from error
