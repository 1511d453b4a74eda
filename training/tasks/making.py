"""Making Gymnasium environments: which may be made, and with which arguments.

An environment id comes from a manifest, so from the network: only what is in Gymnasium's registry is made. A package
puts its own there by an entry point in the group ``shoal.environments``, whose name is the id and whose value is a
function that registers it. Most packages know nothing of that, and register theirs when they are imported. Of an id
such as ``minigrid:MiniGrid-Empty-5x5-v0`` Gymnasium would import any module; here it has to be the top of an installed
package that says itself that it needs Gymnasium, so that a stranger can name what was installed to be learned, and no
other code.

Arguments come from there too (`shoal.training.env_arguments`). They are those of the environment's constructor, and
``max_episode_steps``, which is Gymnasium's own, and ``observe``: of what an environment shows as a Dict, the key of
what is to be seen as if it were all, or several keys. What would change how Shoal itself makes and wraps an environment
is refused, and of Atari games all but a few are: the frames that the others are about are Shoal's wrappers' business.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points, packages_distributions, requires
from typing import Any, Final

import gymnasium

from shoal.protocol.errors import UsageError
from shoal.training import watch
from shoal.training.plugins import suggest
from shoal.training.tasks import atari
from shoal.training.tasks.failures import in_words
from shoal.training.watch import Act, Slot

log = logging.getLogger(__name__)

GROUP: Final = "shoal.environments"
HORIZON: Final = "max_episode_steps"
OBSERVE: Final = "observe"
_NEEDS_GYMNASIUM: Final = re.compile(r"gymnasium(?![\w.-])(?!.*\bextra\s*==)", re.IGNORECASE)
"""What a package says that it needs, always and not for an extra of its own."""
_OURS: Final = ("id", "render_mode", "disable_env_checker", "apply_api_compatibility", "autoreset")


def is_gymnasiums_own(env: Any) -> bool:
    """Whether it comes with Gymnasium: some of these leave the bounds of their space, which is harmless."""
    spec = getattr(env, "spec", None)
    return spec is not None and str(spec.entry_point).startswith("gymnasium.envs.")


def close_env(env: Any, index: int) -> None:
    """Close one that is not needed any more; what goes wrong then does not matter."""
    try:
        watch.page[Slot.CALLS] += 1
        watch.page[Slot.PLACE] = Act.CLOSE | index
        env.close()
    except BaseException as error:  # other people's code
        log.info("an environment failed when it was closed: %s", in_words(error))
    finally:
        watch.page[Slot.PLACE] = 0


def make_env(
    env_id: str,
    index: int,
    arguments: Mapping[str, Any] | None = None,
    *,
    is_training: bool = True,
    render_mode: str | None = None,
) -> Any:
    """One that is in Gymnasium's registry; see the head.

    Args:
        env_id: in the registry.
        index: number of the environment among those beside it.
        arguments: what it is made with.
        is_training: whether it may be made easier to learn from; see `shoal.training.tasks.atari`.
        render_mode: how it is to be seen, as Gymnasium calls it; not at all, if None.

    Raises:
        UsageError: if there is none of this name, it takes no such arguments, or what it needs is missing.
    """
    given: dict[str, Any] = dict(arguments or {})
    place = watch.page[Slot.PLACE]  # it may be made in the middle of a play
    watch.page[Slot.CALLS] += 1
    watch.page[Slot.PLACE] = Act.MAKE | index
    try:
        spec = find_spec(env_id)
        if given:
            _check_known(env_id, spec, given)
        if render_mode is not None:
            given["render_mode"] = render_mode
        if atari.is_atari(spec.id):
            return atari.make(spec.id, given, is_training=is_training)
        keys = given.pop(OBSERVE, None)
        env = gymnasium.make(spec.id, disable_env_checker=True, **given)
        return env if keys is None else _observing(env, keys)
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{env_id} cannot be made here: {reason[:300]}") from error
    finally:
        watch.page[Slot.PLACE] = place


def _observing(env: Any, keys: Any) -> Any:
    """One of which only this is seen: what is under a key, or a Dict of what is under several.

    Raises:
        UsageError: if it shows no such thing. The environment is closed.
    """
    space, named = env.observation_space, [keys] if isinstance(keys, str) else keys
    known = list(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else []
    if not isinstance(named, list) or not named or any(each not in known for each in named):
        close_env(env, 0)
        what = f"the keys {', '.join(map(str, known))[:200]}" if known else "no Dict"
        raise UsageError(f"{OBSERVE} names what of a Dict is to be seen; {env.spec.id} shows {what}")
    if isinstance(keys, str):
        return gymnasium.wrappers.TransformObservation(env, lambda shown: shown[keys], space[keys])
    return gymnasium.wrappers.FilterObservation(env, named)


def find_spec(env_id: str) -> Any:
    """What the registry has of an id, which may begin with the package that brings it; see the head.

    Raises:
        UsageError: if there is none of this name, or what brings it is not installed.
    """
    module, colon, env_id = env_id.rpartition(":")
    if colon:
        import_environments(module)
    if atari.is_atari(env_id):
        atari.register()
    if env_id not in gymnasium.registry:
        register_installed(env_id)
    if env_id not in gymnasium.registry:
        raise UsageError(f"no Gymnasium environment is called {env_id[:80]!r}; {suggest(env_id, gymnasium.registry)}")
    return gymnasium.registry[env_id]


@cache
def import_environments(module: str) -> None:
    """Import an installed package of environments, so that it registers them.

    Raises:
        UsageError: if it is none, or cannot be imported.
    """
    distributions = packages_distributions().get(module, ())
    if not any(_NEEDS_GYMNASIUM.match(need) for name in distributions for need in requires(name) or ()):
        raise UsageError(
            f"{module[:80]!r} is no installed package that needs Gymnasium, so it is not asked for environments; "
            "install it first, or see `shoal task ls`"
        )
    try:
        importlib.import_module(module)
    except Exception as error:  # other people's code, which may look for a display
        raise UsageError(f"{module} cannot be imported here: {in_words(error)}") from error


def register_installed(env_id: str) -> None:
    """Have a package that offers an id put it into the registry; nothing happens, if none does.

    Raises:
        UsageError: if what the package needs is missing.
    """
    found = entry_points(group=GROUP, name=env_id)
    for each in found:
        try:
            each.load()()
        except ImportError as error:
            raise UsageError(f"{env_id} cannot be made here: its package needs {error.name or error}") from error


def settable(env_id: str) -> tuple[dict[str, Any], bool]:
    """What can be said of an environment when it is made.

    Returns:
        Its arguments by name with their defaults, and whether it takes others too, which it doesn't name.

    Raises:
        UsageError: as `find_spec`.
        ImportError: if what it needs is missing.
    """
    spec = find_spec(env_id)
    if atari.is_atari(spec.id):
        return {name: spec.kwargs.get(name) for name in atari.ARGUMENTS}, False
    creator = spec.entry_point
    if isinstance(creator, str):
        creator = gymnasium.envs.registration.load_env_creator(creator)
    named, takes_more = {}, False
    for name, each in inspect.signature(creator).parameters.items():
        if each.kind is each.VAR_KEYWORD:
            takes_more = True
        elif each.kind is not each.VAR_POSITIONAL and name not in _OURS:
            named[name] = spec.kwargs.get(name, None if each.default is each.empty else each.default)
    return named | {HORIZON: spec.max_episode_steps, OBSERVE: None}, takes_more


def _check_known(env_id: str, spec: Any, arguments: Mapping[str, Any]) -> None:
    """Check names of arguments.

    Raises:
        UsageError: if one is not the environment's, or not for a run to say.
    """
    known, takes_more = settable(env_id)
    for name in arguments:
        if name in _OURS or (name in spec.kwargs and name not in known):
            raise UsageError(f"{env_id} is made by Shoal with a {name} of its own; leave it out")
        if name not in known and not takes_more:
            raise UsageError(f"{env_id} takes no argument {name[:80]!r}; it takes {', '.join(sorted(known))[:300]}")
