"""What is installed to be learned, and what there is to know of one task, for people and programs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from shoal.training.plugins import installed
from shoal.training.tasks import load_task
from shoal.training.tasks.base import ActionSpace, Box, Continuous, Discrete, MultiDiscrete

GROUP = "shoal.tasks"


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """One task.

    Attributes:
        name: ``scheme:name``, as a manifest has it.
        summary: half a sentence.
        target_return: the mean return at which it counts as solved, where it says so itself.
        max_episode_steps: after which an episode is cut, if it is.
        needs: what is to be installed before it can be learned here; empty: nothing.
    """

    name: str
    summary: str
    target_return: float | None = None
    max_episode_steps: int | None = None
    needs: str = ""


@dataclass(frozen=True, slots=True)
class TaskDetails(TaskEntry):
    """One task in full.

    Attributes:
        version: members of a run need the same.
        about: what its author says of it.
        observation: what the environment shows, and what networks see of it.
        action: how the environment is acted in, and how policies act.
        wrappers: what stands around the environment, from the outside in.
        arguments: what it can be made with (``--env-set``), and the defaults; null: it does not say.
        takes_more: whether it takes others too, which it does not name.
    """

    version: int = 0
    about: str = ""
    observation: dict[str, str] = field(default_factory=dict)
    action: dict[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    takes_more: bool = False

    def to_plain(self) -> dict[str, Any]:
        """As maps, lists and scalars."""
        return asdict(self)


@runtime_checkable
class Described(Protocol):
    """A task that has more to tell of itself than learning needs."""

    def described(self) -> Mapping[str, Any]:
        """Some fields of `TaskDetails`, by name."""
        ...


def entries() -> list[TaskEntry]:
    """All that can be named: of each scheme what it lists (``listed``), or how it is written, if it lists nothing."""
    found: list[TaskEntry] = []
    for scheme in installed(GROUP):
        try:
            factory = entry_points(group=GROUP)[scheme].load()
            listing: Callable[[], list[dict[str, Any]]] | None = getattr(factory, "listed", None)
            rows = [{"name": f"{scheme}:NAME", "summary": _first_line(factory)}] if listing is None else listing()
            found += [TaskEntry(**row) for row in rows]
        except Exception as error:  # another package's defect, of any type, which hides no other scheme
            found.append(TaskEntry(f"{scheme}:NAME", f"cannot be loaded: {type(error).__name__}: {error}"))
    return found


def entries_of(package: str) -> list[TaskEntry]:
    """The environments of an installed package that registers them when it is imported.

    Raises:
        UsageError: if it is none, or cannot be imported.
    """
    from shoal.training.tasks.registry import listed_of  # loads Gymnasium

    return [TaskEntry(**row) for row in listed_of(package)]


def details(name: str, arguments: Mapping[str, Any] | None = None) -> TaskDetails:
    """One of them, made with these arguments.

    Raises:
        UsageError: if it is unknown, cannot be learned by what is here, or takes no such arguments.
        TaskFailedError: if it fails when it is made.
    """
    task = load_task(name, arguments)
    told: Mapping[str, Any] = task.described() if isinstance(task, Described) else {}
    observation = {"seen_as": box_in_words(task.observation_space)} | told.get("observation", {})
    action = {"acts_by": acts_in_words(task.action_space)} | told.get("action", {})
    own = {"summary": _first_line(type(task)), "target_return": task.target_return, "version": task.version}
    return TaskDetails(task.name, **{**own, **told, "observation": observation, "action": action})


def box_in_words(box: Box) -> str:
    """What networks see: ``4 numbers``, ``an image of 4 x 84 x 84 bytes``."""
    if box.is_image:
        kind = "bytes" if box.dtype == "uint8" else "numbers"
        return f"an image of {' x '.join(map(str, box.shape))} {kind}"
    return f"{box.size} {'bytes, from 0 to 1' if box.dtype == 'uint8' else 'numbers'}"


def acts_in_words(space: ActionSpace) -> str:
    """How policies act: ``one of 2``."""
    match space:
        case Discrete(count):
            return f"one of {count}"
        case MultiDiscrete(counts):
            return f"{len(counts)} choices at once, of {', '.join(map(str, counts[:20]))}" + (
                ", …" if len(counts) > 20 else ""
            )
        case Continuous(size):
            return f"{size} numbers, of which -1 to 1 spans the bounds"


def _first_line(factory: object) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0].rstrip(".")
