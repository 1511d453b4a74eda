"""Network namespaces: made, entered and removed, so that nothing of the lab ever lies in the host's own network.

Every namespace of a lab is called ``shoal-lab-<pid of its owner>-<random>-<what it is>``. Whatever happens to the owner
(it may be killed with signal 9), ``python tests/lab/netns.py clean`` finds what it left and removes it, the processes
in there and its folder of temporary files included. Labs whose owner still runs are left alone, unless ``--all`` is
given.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PREFIX: Final = "shoal-lab-"
FOLDER: Final = Path("/run/netns")
COMMAND_TIMEOUT_S: Final = 30.0
NEEDED: Final = ("ip", "nft", "conntrack", "miniupnpd")
PACKAGES: Final = "iproute2 nftables conntrack miniupnpd-nftables"

_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab cannot be built or used."""


def missing() -> str:
    """What it takes to make a lab here that is not there; empty if nothing is."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"the NAT lab needs {', '.join(absent)} (on Debian: apt install {PACKAGES})"
    return "" if os.geteuid() == 0 else "the NAT lab makes network namespaces, which needs root"


def command(*words: str, text: str | None = None) -> str:
    """Run a command with this standard input; gives what it prints."""
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(words)}: {done.stderr.strip()}\n{text or ''}")
    return done.stdout


def new_prefix() -> str:
    """What the names of all namespaces of one lab begin with."""
    return f"{PREFIX}{os.getpid()}-{secrets.token_hex(2)}-"


def create(name: str) -> None:
    """Make a namespace with nothing but loopback in it."""
    command("ip", "netns", "add", name)
    ip(name, "link set lo up")


def ip(namespace: str, *lines: str) -> None:
    """Run commands of ``ip`` in a namespace."""
    command("ip", "-n", namespace, "-batch", "-", text="\n".join(lines))


def nft(namespace: str, ruleset: str) -> None:
    """Load a ruleset in a namespace."""
    command("ip", "netns", "exec", namespace, "nft", "-f", "-", text=ruleset)


def sysctl(namespace: str, **values: int) -> None:
    """Set values under ``net``; ``ipv4__ip_forward`` stands for ``ipv4/ip_forward``."""
    with inside(namespace):
        for name, value in values.items():
            Path("/proc/sys/net", *name.split("__")).write_text(str(value), encoding="ascii")


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is in a namespace: the sockets and devices that it makes belong there, and stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(FOLDER / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(target)
        finally:
            os.close(target)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(home)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def names(prefix: str = PREFIX) -> list[str]:
    """The namespaces there are."""
    return sorted(path.name for path in FOLDER.glob(f"{prefix}*")) if FOLDER.is_dir() else []


def destroy(*namespaces: str) -> None:
    """Kill the processes in these namespaces and remove them."""
    for name in namespaces:
        for pid in _pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for name in namespaces:
        command("ip", "netns", "del", name)


def _pids(namespace: str) -> list[int]:
    try:
        return [int(word) for word in command("ip", "netns", "pids", namespace).split()]
    except LabError:  # a file that was never mounted: its maker was killed between the two
        return []


def clean(*, running_too: bool = False) -> list[str]:
    """Remove every lab whose owner is gone, or really every one; gives the names of the namespaces."""
    left = [name for name in names() if running_too or not owner_runs(name)]
    destroy(*left)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if running_too or not owner_runs(folder.name):
            shutil.rmtree(folder)
    return left


def owner_runs(name: str) -> bool:
    """Whether the process that made a namespace, or what else is called like one, is still there."""
    pid = name.removeprefix(PREFIX).split("-")[0]
    return pid.isdigit() and Path("/proc", pid).exists()


if __name__ == "__main__":
    if sys.argv[1:] not in (["clean"], ["clean", "--all"]):
        sys.exit("usage: python tests/lab/netns.py clean [--all]")
    for removed in clean(running_too="--all" in sys.argv):
        print(removed)
