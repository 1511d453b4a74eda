"""What Gymnasium's registry offers, without loading any of it; and what there is to tell of one environment."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any, Final

import gymnasium

from shoal.protocol.errors import UsageError
from shoal.training.tasks import atari
from shoal.training.tasks.making import GROUP, import_environments, register_installed, settable

log = logging.getLogger(__name__)

_MODULES: Final = {
    "gymnasium.envs.box2d": ("Box2D", "tasks"),
    "gymnasium.envs.mujoco": ("mujoco", "tasks"),
    "ale_py": ("cv2", "atari"),
}
"""Of environments, what they need, and which of Shoal's extras brings it."""
MAX_SPACE_CHARS: Final = 100
_NOT_LISTED: Final = ("gymnasium.envs.phys2d", "gymnasium.envs.tabular")
"""Those are for JAX, and the same as others."""


def listed() -> list[dict[str, Any]]:
    """The newest version of each environment, as fields of `shoal.training.tasks.catalogue.TaskEntry`."""
    with suppress(UsageError):  # without ALE there are no games of its to list
        atari.register()
    for entry in entry_points(group=GROUP):
        try:
            register_installed(entry.name)
        except Exception as error:  # another package's defect, of any type, which hides no other environment
            log.warning("the environment %s cannot be registered: %s", entry.name, error)
    return _rows("gym:", _is_listed)


def listed_of(package: str) -> list[dict[str, Any]]:
    """Likewise, of a package that registers its own when it is imported.

    Raises:
        UsageError: if it is none, or cannot be imported.
    """
    import_environments(package)
    return _rows(f"gym:{package}:", lambda spec: _module(spec).partition(".")[0] == package)


def _rows(prefix: str, is_listed: Callable[[Any], bool]) -> list[dict[str, Any]]:
    newest: dict[tuple[str | None, str], Any] = {}
    for spec in gymnasium.registry.values():
        key = spec.namespace, spec.name
        if is_listed(spec):
            before = newest.get(key)
            if before is None or (spec.version or 0) >= (before.version or 0):
                newest[key] = spec
    return [
        {
            "name": f"{prefix}{spec.id}",
            "summary": _summary(spec),
            "target_return": spec.reward_threshold,
            "max_episode_steps": spec.max_episode_steps,
            "needs": _needs(_module(spec)),
        }
        for spec in sorted(newest.values(), key=lambda each: (each.namespace or "", each.id))
    ]


def _is_listed(spec: Any) -> bool:
    if not isinstance(spec.entry_point, str) or spec.entry_point.startswith(_NOT_LISTED):
        return False
    # Each game is there two times more under older names, as it is: without the frames that `atari` makes of it.
    return not _module(spec).startswith("ale_py") or atari.is_atari(spec.id)


def described(env: Any) -> dict[str, Any]:
    """What is to be told of an environment that was just made, as fields of `TaskDetails`."""
    wrappers, inner = [], env
    while inner is not env.unwrapped:
        wrappers.append(type(inner).__name__)
        inner = inner.env
    arguments, takes_more = settable(env.spec.id)
    about = inspect.getdoc(type(env.unwrapped)) or ""
    return {
        "summary": _summary(env.spec),
        "max_episode_steps": env.spec.max_episode_steps,
        "about": _first_paragraph(about),
        "observation": {"space": _space(env.observation_space)},
        "action": {"space": _space(env.action_space)},
        "wrappers": tuple(wrappers),
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "takes_more": takes_more,
    }


def _module(spec: Any) -> str:
    """That what makes an environment is in."""
    made_by = spec.entry_point
    return made_by.partition(":")[0] if isinstance(made_by, str) else str(getattr(made_by, "__module__", ""))


def _summary(spec: Any) -> str:
    """Where it comes from, and how it ends: the registry has no more to say."""
    module, made_by = _module(spec), spec.entry_point
    name = made_by.partition(":")[2] if isinstance(made_by, str) else getattr(made_by, "__qualname__", "")
    parts = [part.replace("_", " ") for part in module.split(".")]
    kind = parts[2] if module.startswith("gymnasium.envs.") else parts[0]
    said = [f"{kind}: {name}"]
    if spec.kwargs.get("game"):
        said = [f"Atari: {str(spec.kwargs['game']).replace('_', ' ')}"]
    if spec.max_episode_steps is not None:
        said.append(f"up to {spec.max_episode_steps} steps")
    if spec.reward_threshold is not None:
        said.append(f"solved at {spec.reward_threshold:g}")
    return ", ".join(said)


def _needs(made_in: str) -> str:
    for prefix, (module, extra) in _MODULES.items():
        if made_in.startswith(prefix) and importlib.util.find_spec(module) is None:
            return f"pip install 'shoal[{extra}]'"
    return ""


def _space(space: Any) -> str:
    """As Gymnasium writes it; without its bounds, if these are long."""
    text = " ".join(str(space).split())
    if len(text) <= MAX_SPACE_CHARS or not isinstance(space, gymnasium.spaces.Box):
        return text[: 3 * MAX_SPACE_CHARS]
    return f"Box({space.low.min():g} to {space.high.max():g}, {space.shape}, {space.dtype})"


def _first_paragraph(text: str) -> str:
    """The first words that are no headline."""
    parts = [part for part in text.split("\n\n") if not part.lstrip().startswith(("#", "!", "<", "|"))]
    return " ".join(parts[0].split()) if parts else ""


def _plain(value: Any) -> Any:
    """An argument's default, as JSON can say it; else in words."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)[:200]
