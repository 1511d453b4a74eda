"""What honest nodes have of a machine and of their run, for the scripts here."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.node.api.client import Client
from shoal.training.keeper import descendants

TICK_S: Final = os.sysconf("SC_CLK_TCK")
LOOK_S: Final = 0.05


def own_s(pid: int) -> float:
    """What a process alone has taken of the processors."""
    return sum(map(int, _stat(pid)[11:13])) / TICK_S


def cpu_s(*pids: int) -> float:
    """What these processes and all that they started have taken of the processors."""
    total = 0
    for each in {each for pid in pids for each in (pid, *descendants(pid))}:
        with suppress(OSError):
            total += sum(map(int, _stat(each)[11:15]))  # its own, and that of its children that have ended
    return total / TICK_S


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()


@dataclass(frozen=True, slots=True)
class Epochs:
    """What a run did in some seconds.

    Attributes:
        per_s: epochs a second, from the first that came to the last.
        cpu_s: what the nodes asked for and their workers took of the processors for one.
        node_load: what the first of these nodes, without its worker, took of one processor.
    """

    per_s: float
    cpu_s: float
    node_load: float


def measure(clients: Sequence[Client], pids: Sequence[int], swarm: str, seconds: float) -> Epochs:
    """Follow a run by the counter of whichever of its nodes is behind."""

    def look() -> tuple[int, float, float, float]:
        epoch = min(client.swarm(swarm).epoch for client in clients)
        return epoch, time.monotonic(), cpu_s(*pids), own_s(pids[0])

    until = time.monotonic() + seconds
    began = last = None
    epoch = min(client.swarm(swarm).epoch for client in clients)
    while time.monotonic() < until:
        if min(client.swarm(swarm).epoch for client in clients) > epoch:
            last = look()
            epoch = last[0]
            began = began or last
        time.sleep(LOOK_S)
    if began is None or last is None or last is began:
        return Epochs(0.0, float("inf"), 0.0)
    gained, took_s = last[0] - began[0], last[1] - began[1]
    return Epochs(gained / took_s, (last[2] - began[2]) / gained, (last[3] - began[3]) / took_s)
