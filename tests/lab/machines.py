"""Machines on one machine: hosts of the lab with a share of a core each, by the CPU quota of a cgroup (v1 or v2).

So what joining brings can be measured and not argued: four nodes of 0.4 core fit on two cores beside the lab itself,
and none gets what another leaves. A quota holds per period, which is short here, so that a slow machine is slow all the
time and not fast and then dead.

Every cgroup of a lab is called as its namespaces are (`netns.PREFIX`), so what a killed owner left is found by name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .net import Host, Lab, Site
from .netns import PREFIX, LabError, owner_runs

PERIOD_US: Final = 20_000
LEAST_QUOTA_US: Final = 1_000
"""Less is no quota to the kernel: very slow machines get so much in a longer period."""
REMOVE_S: Final = 5.0
_V1: Final = Path("/sys/fs/cgroup/cpu")
_V2: Final = Path("/sys/fs/cgroup")
_ENTER: Final = 'echo $$ > "$0" && exec "$@"'
"""Arguments of ``sh -c``: the process moves itself, so that all that it starts is born there."""


@dataclass(slots=True)
class Machine(Host):
    """A host whose programs together get so much of a core.

    Attributes:
        cgroup: the folder of its cgroup.
    """

    cgroup: Path = Path()

    def command(self, *words: str) -> list[str]:
        """A command that runs here."""
        # Not super(): a dataclass with slots is made anew, and this class's cell would be the old one's.
        return ["sh", "-c", _ENTER, str(self.cgroup / "cgroup.procs"), *Host.command(self, *words)]


def missing() -> str:
    """What it takes to limit a process's share of a core and is not there; empty if nothing is."""
    if _root() is None:
        return "machines of a share of a core need cgroups with a CPU controller, v1 or v2, under /sys/fs/cgroup"
    return ""


def _root() -> Path | None:
    """Where cgroups with a quota are made; None if nowhere."""
    for root in (_V1, _V1.with_name("cpu,cpuacct")):
        if (root / "cpu.cfs_quota_us").exists():
            return root
    controllers = _V2 / "cgroup.subtree_control"
    return _V2 if controllers.exists() and "cpu" in controllers.read_text(encoding="ascii").split() else None


def create(name: str) -> Path:
    """A new cgroup, without a limit.

    Raises:
        LabError: if this machine cannot have any.
    """
    root = _root()
    if root is None:
        raise LabError(missing())
    folder = root / name
    folder.mkdir()
    return folder


def limit(folder: Path, cores: float) -> None:
    """Let what runs in a cgroup have so much of a core from now on."""
    period = max(PERIOD_US, round(LEAST_QUOTA_US / cores))
    quota = max(LEAST_QUOTA_US, round(cores * period))
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{quota} {period}", encoding="ascii")
    else:
        (folder / "cpu.cfs_period_us").write_text(str(period), encoding="ascii")
        (folder / "cpu.cfs_quota_us").write_text(str(quota), encoding="ascii")


@contextlib.contextmanager
def machine(lab: Lab, name: str, cores: float) -> Iterator[tuple[Site, Machine]]:
    """A public site whose host has so much of a core; gone, with all that runs there, when the context ends.

    Raises:
        LabError: if this machine cannot do that.
    """
    site = lab.add("open", name)
    host = site.hosts[0]
    folder = create(f"{lab.prefix}{name}")
    try:
        limit(folder, cores)
        limited = site.hosts[0] = Machine(host.namespace, host.address, folder)
        yield site, limited
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """End what runs in a cgroup, and remove it.

    Raises:
        LabError: if something there does not end.
    """
    ends = time.monotonic() + REMOVE_S
    while folder.exists():
        for pid in (folder / "cgroup.procs").read_text(encoding="ascii").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):  # what was killed is there for a moment
            folder.rmdir()
        if folder.exists() and time.monotonic() > ends:
            raise LabError(f"what runs in {folder} does not end")


def clean() -> list[str]:
    """Remove the cgroups of every lab whose owner is gone; gives their names."""
    root = _root()
    left = [] if root is None else [each for each in root.glob(f"{PREFIX}*") if not owner_runs(each.name)]
    for each in left:
        remove(each)
    return [each.name for each in left]
