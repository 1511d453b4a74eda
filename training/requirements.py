"""What a member of a run must have, by name and version, so that all members compute the same.

A manifest's ``requires`` maps names to whole numbers. A member must have each of them in exactly this version: a newer
one computes otherwise as well as an older one does. The names:

====================  ==============================================================================================
``exchange``          how members settle what is merged, and how it is merged: `EXCHANGE_VERSION`
``loop``              what is averaged of members' own training loops, and how: `LOOP_VERSION`
``algorithm:<name>``  `Algorithm.version` of what is installed under this name
``task:<scheme>``     `Task.version` of what is installed for this scheme
====================  ==============================================================================================

Whoever starts a run fills in what it has itself (`requirements`). Checking has two halves, as a node never imports
torch: the node checks what can be known without the packages of learning (`check_here`) before it enters a run; the
worker, which loads them, checks the rest (`check_loaded`) before it learns. A member that only stores computes nothing,
so it needs the first half alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

from shoal.protocol.errors import UsageError
from shoal.training.manifest import Manifest, Role

EXCHANGE_VERSION: Final = 2
"""Raised with every change after which members of both versions could end a round with different bytes."""

LOOP_VERSION: Final = 1
"""Raised when `shoal.training.loop` would make other parameters of the same contributions."""

_GROUPS: Final = {"algorithm": "shoal.algorithms", "task": "shoal.tasks"}


class UnmetError(UsageError):
    """A run needs what is not installed here, or another version of it."""


def requirements(algorithm: str, algorithm_version: int, task: str, task_version: int) -> dict[str, int]:
    """The ``requires`` of a run of this algorithm and this task, ``scheme:name``."""
    return {
        "exchange": EXCHANGE_VERSION,
        f"algorithm:{algorithm}": algorithm_version,
        f"task:{task.partition(':')[0]}": task_version,
    }


def loop_requirements() -> dict[str, int]:
    """The ``requires`` of a run of its members' own training loops: their code is nobody's business."""
    return {"exchange": EXCHANGE_VERSION, "loop": LOOP_VERSION}


def check_here(manifest: Manifest, role: Role) -> None:
    """Check what can be known without loading a task or an algorithm.

    Raises:
        UnmetError: if this node cannot take part in this role. One line that says what to update.
    """
    for name, version in sorted(manifest.requires.items()):
        kind, colon, rest = name.partition(":")
        if name == "exchange":
            _check_version(name, version, EXCHANGE_VERSION)
        elif name == "loop":
            _check_version(name, version, LOOP_VERSION)
        elif not colon or kind not in _GROUPS:
            raise UnmetError(f"this run needs {name[:80]!r}, which this Shoal does not know; update Shoal to join it")
        elif role is Role.LEARNER and rest not in entry_points(group=_GROUPS[kind]).names:
            raise UnmetError(
                f"this run needs the {kind} {rest[:80]!r}, which is not installed here; install it to join"
            )


def check_loaded(manifest: Manifest, loaded: Mapping[str, int]) -> None:
    """Check a run against what a worker has loaded for it.

    Args:
        manifest: of the run.
        loaded: as `requirements` gives it.

    Raises:
        UnmetError: if anything is missing or of another version. One line that says what to update.
    """
    for name, version in sorted(manifest.requires.items()):
        if name not in loaded:
            raise UnmetError(f"this run needs {name[:80]!r}, which is not there; update Shoal to join it")
        _check_version(name, version, loaded[name])


def _check_version(name: str, needed: int, here: int) -> None:
    if needed > here:
        raise UnmetError(
            f"this run needs version {needed} of {name[:80]!r} and version {here} is installed; update "
            f"{_package(name)} to join it"
        )
    if needed < here:
        raise UnmetError(
            f"this run needs version {needed} of {name[:80]!r} and the newer version {here} is installed; take an "
            f"older {_package(name)} to join it, or start a new run"
        )


def _package(name: str) -> str:
    """What to install in another version: the package that offers it, or Shoal."""
    kind, _, rest = name.partition(":")
    found = entry_points(group=_GROUPS[kind], name=rest) if kind in _GROUPS else ()
    packages = {each.dist.name for each in found if each.dist is not None} - {"shoal"}
    return min(packages, default="Shoal")
