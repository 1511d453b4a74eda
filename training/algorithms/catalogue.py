"""What is installed to learn by, and what can be set of it, for people and programs."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from shoal.protocol.errors import UsageError
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.settings import Described, described
from shoal.training.plugins import installed


@dataclass(frozen=True, slots=True)
class Entry:
    """One algorithm.

    Attributes:
        name: by which a manifest names it.
        summary: half a sentence; why it cannot be loaded here, if it cannot.
        paper: where it is from; empty, if it does not say.
        version: members of a run need the same; None, if it cannot be loaded.
    """

    name: str
    summary: str
    paper: str = ""
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Details(Entry):
    """One algorithm and all that can be set of it.

    Attributes:
        about: its paper and every deviation from it, in full.
        settings: in the order in which they are told.
    """

    about: str = ""
    settings: tuple[Described, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """As maps, lists and scalars."""
        return asdict(self) | {"settings": [asdict(each) for each in self.settings]}


def entries() -> list[Entry]:
    """All that packages here offer, by name."""
    found: list[Entry] = []
    for name in installed("shoal.algorithms"):
        try:
            whole = details(name)
        except UsageError as error:
            found.append(Entry(name, str(error)))
        except Exception as error:  # another package's defect, of any type, which hides no other algorithm
            found.append(Entry(name, f"cannot be loaded: {type(error).__name__}: {error}"))
        else:
            found.append(Entry(name, whole.summary, whole.paper, whole.version))
    return found


def details(name: str) -> Details:
    """One of them.

    Raises:
        UsageError: if nobody offers it, or what it needs is not installed.
    """
    algorithm = load_algorithm(name)
    about = inspect.getdoc(inspect.getmodule(type(algorithm))) or ""
    if not isinstance(algorithm, OnEngine):  # of another package, which need not say more than the protocol asks
        return Details(name, about.partition("\n")[0], "", algorithm.version, about)
    settings = tuple(described(algorithm.settings, algorithm.in_mode, algorithm.on_images, algorithm.on_tasks))
    return Details(name, algorithm.summary, algorithm.paper, algorithm.version, about, settings)
