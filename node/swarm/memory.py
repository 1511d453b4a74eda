"""How much memory this node may use: what the machine has, or what its control group leaves it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_GROUPS: Final = "/proc/self/cgroup"
_V1: Final = "sys/fs/cgroup/memory"
_V2: Final = "sys/fs/cgroup"


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes; ``root``: where ``proc`` and ``sys`` are.

    The least limit of the control group of this process and of those it lies in, v1 or v2.
    """
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not known here: nothing is ruled out by it
        found = 2**63
    try:
        lines = (root / _GROUPS.removeprefix("/")).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, folder = ([*line.split(":", 2), "", ""])[:3]
        names = controllers.split(",")
        if controllers and "memory" not in names:
            continue
        base, file = (root / _V1, "memory.limit_in_bytes") if controllers else (root / _V2, "memory.max")
        place = base / folder.lstrip("/")
        for each in (place, *place.parents):
            if not each.is_relative_to(base):
                break
            found = min(found, _number_in(each / file, found))
    return found


def _number_in(path: Path, otherwise: int) -> int:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return otherwise
    return int(text) if text.isdigit() else otherwise
