"""Machines on one switch, each of which can be struck: killed, stopped, slowed, cut off, and made whole again.

Every machine is a network namespace with one cable to a bridge, and a cgroup with a share of a core. Nothing is
simulated: what is killed is killed with signal 9, all at once, as in a power cut; what is stopped is stopped with
SIGSTOP; what is slowed gets a smaller quota; and who is cut off has its cable pulled at the far end, so that its own
device sees nothing of it. Beside the machines there is a place `outside`, without a limit, for those who only look.

The switch is the kernel's: it adds no delay and takes no processor from the machines, unlike the lab's own internet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

from . import machines, netns
from .machines import Machine
from .net import Host
from .netns import LabError, ip

SLOWED_TO: Final = 0.1
"""Of its share."""
END_S: Final = 10.0
BURST_KB: Final = 64
"""What a shaped cable carries at once: the largest piece that the kernel hands it."""
QUEUE_MS: Final = 100
"""What waits before a shaped cable; what comes beyond that is dropped."""
WHOLE: Final = 64.0
"""Cores: as many as there are."""


class Kind(StrEnum):
    """What happens to a machine."""

    KILL = "kill"
    STOP = "stop"
    SLOW = "slow"
    CUT = "cut"


@dataclass(slots=True)
class Struck:
    """What is wrong with a machine now."""

    kind: Kind
    at: float


def missing() -> str:
    """What it takes that is not there; empty if nothing is."""
    if os.geteuid() != 0:
        return "machines of a share of a core, on a network of their own, need root"
    if not any(Path(folder, "ip").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        return "networks of their own need `ip` (on Debian: apt install iproute2)"
    return machines.missing()


class Ground:
    """So many machines on one switch. Use it in a ``with`` block, which takes everything down again.

    Attributes:
        machines: with one address each.
        outside: for those who only look.
        struck: what is wrong, by the number of the machine.
        folder: for files that are wanted as long as it stands.
    """

    def __init__(self, count: int, cores: float) -> None:
        self.machines: list[Machine] = []
        self.struck: dict[int, Struck] = {}
        self._count = count
        self._cores = cores
        self._prefix = netns.new_prefix()
        self._switch = f"{self._prefix}switch"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Lay it out. The machines have no limit until `limit`, so that what is started first is there soon.

        Raises:
            LabError: if it cannot be laid out here.
        """
        try:
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=self._prefix)))
            self._stack.callback(lambda: netns.destroy(*netns.names(self._prefix)))
            netns.create(self._switch)
            ip(self._switch, "link add bridge type bridge", "link set bridge up")
            for number in range(self._count):
                host = self._add(f"m{number}", number + 1)
                cgroup = machines.create(host.namespace)
                self._stack.callback(machines.remove, cgroup)
                self.machines.append(Machine(host.namespace, host.address, cgroup))
            self.outside = self._add("outside", 200)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Take everything down."""
        self.close()

    def close(self) -> None:
        """End all that runs there and remove it."""
        self._stack.close()

    def _add(self, name: str, number: int) -> Host:
        host = Host(f"{self._prefix}{name}", f"10.79.0.{number}")
        netns.create(host.namespace)
        ip(self._switch, f"link add port{number} type veth peer name eth0 netns {host.namespace}")
        ip(self._switch, f"link set port{number} master bridge", f"link set port{number} up")
        ip(host.namespace, f"addr add {host.address}/24 dev eth0", "link set eth0 up", "route add default dev eth0")
        return host

    # What is done to them.

    def limit(self) -> None:
        """Each machine has its share of a core from now on."""
        for machine in self.machines:
            machines.limit(machine.cgroup, self._cores)

    def shape(self, number: int, mbit: float) -> None:
        """A machine's cable carries so many Mbit/s from now on, each way."""
        bucket = ("root", "tbf", "rate", f"{mbit:g}mbit", "burst", f"{BURST_KB}kb", "latency", f"{QUEUE_MS}ms")
        for namespace, device in ((self.machines[number].namespace, "eth0"), (self._switch, f"port{number + 1}")):
            netns.command("tc", "-n", namespace, "qdisc", "replace", "dev", device, *bucket)

    def unlimit(self) -> None:
        """Each machine has what it can get."""
        for machine in self.machines:
            machines.limit(machine.cgroup, WHOLE)

    def strike(self, number: int, kind: Kind) -> None:
        """Begin a fault; one machine has one at a time.

        Raises:
            LabError: if something is wrong with the machine already, or what is killed does not end.
        """
        if number in self.struck:
            raise LabError(f"machine {number} suffers from {self.struck[number].kind} already")
        self.struck[number] = Struck(kind, time.monotonic())
        match kind:
            case Kind.KILL:
                self._signal_all(number, signal.SIGKILL)
                wait_empty(self.machines[number])
            case Kind.STOP:
                self._signal_all(number, signal.SIGSTOP)
            case Kind.SLOW:
                machines.limit(self.machines[number].cgroup, SLOWED_TO * self._cores)
            case Kind.CUT:
                ip(self._switch, f"link set port{number + 1} nomaster")

    def mend(self, number: int) -> Kind:
        """End what is wrong with a machine; what was killed is for the caller to start again."""
        kind = self.struck.pop(number).kind
        match kind:
            case Kind.KILL:
                pass
            case Kind.STOP:
                self._signal_all(number, signal.SIGCONT)
            case Kind.SLOW:
                machines.limit(self.machines[number].cgroup, self._cores)
            case Kind.CUT:
                ip(self._switch, f"link set port{number + 1} master bridge")
        return kind

    def kill_all(self) -> None:
        """End all that runs on the machines, whatever is wrong with them."""
        for number in list(self.struck):
            self.mend(number)
        for number in range(self._count):
            self._signal_all(number, signal.SIGKILL)
            wait_empty(self.machines[number])

    def _signal_all(self, number: int, what: signal.Signals) -> None:
        """To all processes of a machine, also those that are started meanwhile."""
        done: set[int] = set()
        while new := set(pids_of(self.machines[number])) - done:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, what)
            done |= new


def pids_of(machine: Machine) -> list[int]:
    """Of what runs there."""
    return [int(word) for word in (machine.cgroup / "cgroup.procs").read_text(encoding="ascii").split()]


def wait_empty(machine: Machine) -> None:
    """Until nothing runs there.

    Raises:
        LabError: if that takes too long.
    """
    ends = time.monotonic() + END_S
    while pids := pids_of(machine):
        if time.monotonic() > ends:
            raise LabError(f"what runs in {machine.cgroup} does not end: {pids}")
        time.sleep(0.005)
