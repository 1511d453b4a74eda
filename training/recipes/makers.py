"""Models and objectives by the names that recipes call them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.clone import Clone
from shoal.training.algorithms.grpo import GRPO
from shoal.training.algorithms.ppo_takes import PPOTakes
from shoal.training.algorithms.reinforce_takes import ReinforceTakes
from shoal.training.algorithms.softq import SoftQ
from shoal.training.algorithms.takes import TakeObjective
from shoal.training.models.entities import Entities
from shoal.training.models.gru import GRU
from shoal.training.models.hf_lora import HfLora
from shoal.training.models.mlp import MLP
from shoal.training.models.tokens import TokenModel
from shoal.training.plugins import suggest
from shoal.training.tasks.play import Role

BODIES: Final[Mapping[str, Callable[..., Any]]] = {"mlp": MLP, "gru": GRU, "entities": Entities}
"""Models that are of a size with what their roles see and how they act."""
MODELS: Final[Mapping[str, Callable[..., Any]]] = {"hf_lora": HfLora, "tokens": TokenModel, **BODIES}
OBJECTIVES: Final[dict[str, Any]] = {each.name: each for each in (Clone, GRPO, PPOTakes, ReinforceTakes, SoftQ)}
"""Those that ship with Shoal."""


def make_model(kind: str, sizes: Mapping[str, Any], seed: int, roles: Callable[[], Sequence[Role]] = tuple) -> Any:
    """A model in its initial state.

    Args:
        kind: one of `MODELS`.
        sizes: of it.
        seed: of its initial values.
        roles: gives those that it is to play, for a model that has to know.

    Raises:
        UsageError: if there is no such kind, or not of such sizes, or it cannot play such roles.
    """
    if kind not in MODELS:
        raise UsageError(f"no model is called {kind!r:.80}; {suggest(kind, MODELS)}")
    known = (roles(),) if kind in BODIES else ()
    try:
        return MODELS[kind](*known, **sizes, seed=seed)
    except TypeError as error:
        raise UsageError(f"a model {kind} is not made of {', '.join(sizes)}: {error}") from error


def objective_of(name: str, settings: Mapping[str, Any], own: Sequence[type[Any]] = ()) -> TakeObjective[Any, Any]:
    """An objective with settings.

    Args:
        name: of one of the recipe's own, or of those that ship with Shoal.
        settings: what differs from the defaults.
        own: the recipe's.

    Raises:
        UsageError: if there is none of this name, or it has no such setting.
    """
    kinds: dict[str, Any] = OBJECTIVES | {each.name: each for each in own}
    if name not in kinds:
        raise UsageError(f"no objective over takes is called {name!r:.80}; {suggest(name, kinds)}")
    kind = kinds[name]
    known = [field.name for field in fields(kind.settings_type)]
    for each in settings:
        if each not in known:
            raise UsageError(f"{kind.name} has no setting {each[:80]!r}; {suggest(each, known)}")
    made: TakeObjective[Any, Any] = kind(kind.settings_type(**settings))
    return made
