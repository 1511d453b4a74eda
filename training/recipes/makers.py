"""Models and objectives by the names that recipes call them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from shoal.protocol.errors import UsageError
from shoal.training.algorithms.clone import Clone
from shoal.training.algorithms.grpo import GRPO
from shoal.training.algorithms.takes import TakeObjective
from shoal.training.models.hf_lora import HfLora
from shoal.training.models.tokens import TokenModel
from shoal.training.plugins import suggest

MODELS: Final[Mapping[str, Callable[..., Any]]] = {"hf_lora": HfLora, "tokens": TokenModel}
OBJECTIVES: Final[dict[str, Any]] = {each.name: each for each in (Clone, GRPO)}
"""Those that ship with Shoal."""


def make_model(kind: str, sizes: Mapping[str, Any], seed: int) -> Any:
    """A model in its initial state.

    Raises:
        UsageError: if there is no such kind, or not of such sizes.
    """
    if kind not in MODELS:
        raise UsageError(f"no model is called {kind!r:.80}; {suggest(kind, MODELS)}")
    try:
        return MODELS[kind](**sizes, seed=seed)
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
