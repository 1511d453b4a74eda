"""The lab's topology as code: an internet, and sites with a router and hosts behind it.

    with Lab() as lab:
        relay, home = lab.add("open"), lab.add("symmetric")
        home.run("ping", "-c1", relay.address)

The internet is `lab.link`: each site hangs on it by an access link, 12.5 ms one way unless told otherwise, so that a
round trip between two sites takes 50 ms. Each is a network of its own: site 7 has 5.7.0.0/16 and 2a00:7::/32, addresses
that count as public everywhere. Behind the NATs all have the same 192.168.1.0/24, as homes do. `rules` says what the
routers do. Sites, routers, hosts and the internet itself are network namespaces (`netns`); the host's own network gets
nothing.

A site ``open`` is a host without a router. ``double`` has a second router behind the first, on a carrier's
100.64.0.0/24. ``hairpin`` has a host in each of two LANs, between which nothing passes but by the router's public
address. ``same_lan`` has two hosts on one LAN. ``ipv6_only`` has no IPv4; the others behind a router have no IPv6;
``open`` has both.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self

from . import netns
from .netns import LabError, ip
from .rules import KINDS, PAIRED, UPNP_SETTINGS, ruleset

DELAY_MS: Final = 12.5
RATE: Final = 25e6
BURST_PACKETS: Final = 5000
"""That may wait for the link's process when the machine is busy; its own queue is the one that drops."""
ANSWER_TIMEOUT_S: Final = 10.0
MAX_SITES: Final = 255


@dataclass(slots=True)
class Host:
    """A machine at a site: a namespace in which programs run."""

    namespace: str
    address: str = ""

    def command(self, *words: str) -> list[str]:
        """A command that runs here."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def run(self, *words: str, timeout_s: float = 60, check: bool = True, **options: Any) -> Any:
        """Run a program here to its end; gives what `subprocess.run` gives, with text captured."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )
        if check and done.returncode:
            raise LabError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program here."""
        return subprocess.Popen(self.command(*words), **options)


@dataclass(slots=True)
class Site:
    """A place on the internet.

    Attributes:
        number: names its networks; changes when its address does.
        routers: their namespaces, the outermost first; none if it is open.
        hosts: one, or two for a kind that is a pair of its own.
    """

    name: str
    kind: str
    number: int
    routers: list[str] = field(default_factory=list)
    hosts: list[Host] = field(default_factory=list)
    moves: int = 0
    daemon: subprocess.Popen[Any] | None = None

    @property
    def has_ipv4(self) -> bool:
        """Whether it has an IPv4 address on the internet."""
        return self.kind != "ipv6_only"

    @property
    def has_ipv6(self) -> bool:
        """Whether its hosts have global IPv6 addresses."""
        return self.kind in ("ipv6_only", "open")

    @property
    def address(self) -> str:
        """Its IPv4 address on the internet."""
        return f"5.{self.number}.0.1"

    @property
    def address6(self) -> str:
        """Its host's IPv6 address, if it has any."""
        return f"2a00:{self.number:x}::1" if self.kind == "open" else f"2a00:{self.number:x}:0:1::2"

    @property
    def networks(self) -> list[str]:
        """What is routed to it."""
        ipv4, ipv6 = [f"5.{self.number}.0.0/16"], [f"2a00:{self.number:x}::/32"]
        return (ipv4 if self.has_ipv4 else []) + (ipv6 if self.has_ipv6 else [])

    @property
    def namespaces(self) -> list[str]:
        """All of its namespaces."""
        return self.routers + [host.namespace for host in self.hosts]

    @property
    def host_namespace(self) -> str:
        """Where its first host is."""
        return self.hosts[0].namespace

    def run(self, *words: str, **options: Any) -> Any:
        """Run a program on the first host to its end (`Host.run`)."""
        return self.hosts[0].run(*words, **options)

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program on the first host."""
        return self.hosts[0].popen(*words, **options)


class Lab:
    """The internet and all sites. Use it in a ``with`` block, which takes everything down again.

    Attributes:
        prefix: what the names of its namespaces begin with.
        sites: by name.
        folder: for files that are wanted as long as it stands.

    Args:
        delay_ms: of every access link, one way.
        loss: the chance that it loses a packet, each way.
        rate: bytes/s that it carries, each way.
        seed: of the chance.
    """

    def __init__(self, *, delay_ms: float = DELAY_MS, loss: float = 0.0, rate: float = RATE, seed: int = 1) -> None:
        self.prefix = netns.new_prefix()
        self.sites: dict[str, Site] = {}
        self._settings = {"delay_ms": delay_ms, "loss": loss, "rate": rate, "seed": seed}
        self._next_number = 1
        self._free_numbers: list[int] = []
        self._folders = contextlib.ExitStack()
        self._link: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the internet."""
        try:
            core = Host(f"{self.prefix}internet")
            netns.create(core.namespace)
            program = str(Path(__file__).with_name("link.py"))
            self._link = core.popen(
                *(sys.executable, program, json.dumps(self._settings)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.folder = Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix=self.prefix)))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Take everything down."""
        self.close()

    def close(self) -> None:
        """End every process in the lab and remove all of it; it may be in any state."""
        if self._link is not None:
            self._link.kill()
            self._link.communicate()
        for site in self.sites.values():
            _end(site.daemon)
        self.sites.clear()
        netns.destroy(*netns.names(self.prefix))
        self._folders.close()

    # --- sites ---

    def add(self, kind: str, name: str | None = None) -> Site:
        """Build a site of this kind."""
        if kind not in (*KINDS, *PAIRED):
            raise LabError(f"there is no kind of site {kind!r}; there are {', '.join((*KINDS, *PAIRED))}")
        number = self._take_number()
        site = Site(name or f"{kind.replace('_', '-')}-{number}", kind, number)
        if site.name in self.sites:
            raise LabError(f"there is a site {site.name!r} already")
        self.sites[site.name] = site
        if kind != "open":
            site.routers.append(self._new_namespace(site, "router"))
        if kind == "double":
            site.routers.append(self._new_namespace(site, "inner"))
        for number in range(2 if kind in PAIRED else 1):
            site.hosts.append(Host(self._new_namespace(site, f"host{number}")))
        self._wire(site)
        self._configure(site)
        return site

    def remove(self, site: Site) -> None:
        """Take a site down, with all that runs there."""
        self._tell("detach", site)
        _end(site.daemon)
        del self.sites[site.name]
        self._free_numbers.append(site.number)
        netns.destroy(*site.namespaces)

    def set_link(self, site: Site, **values: float) -> None:
        """Change `delay_ms`, `loss` or `rate` of a site's access link."""
        self._tell("set", site, **values)

    def black_out(self, site: Site) -> None:
        """From now on, nothing comes out of a site's access link at either end."""
        self._tell("set", site, dark=True)

    def come_back(self, site: Site) -> None:
        """End a black-out."""
        self._tell("set", site, dark=False)

    def count(self, site: Site) -> dict[str, dict[str, int]]:
        """Packets and bytes that entered a site's access link, and packets that it dropped, ``up`` and ``down``."""
        counted: dict[str, dict[str, int]] = self._tell("count", site)
        return counted

    def flush_nat(self, site: Site) -> None:
        """Let a site's routers forget every connection and mapping, as after a long silence or a restart."""
        self._load_rules(site)
        for router in site.routers:
            netns.command("ip", "netns", "exec", router, "conntrack", "-F")
        self._serve_upnp(site)

    def change_address(self, site: Site) -> None:
        """Move a site: other public networks, and another LAN address for every host."""
        site.number = self._take_number()  # the old one stays unused, so that nobody else gets what was meant for it
        site.moves += 1
        self._tell("route", site, networks=site.networks)
        self._configure(site)

    # --- how they are built ---

    def _wire(self, site: Site) -> None:
        """Give the namespaces their devices."""
        outermost = site.namespaces[0]
        self._tell("attach", site, namespace=outermost, device="wan", networks=site.networks)
        ip(outermost, f"link set wan txqueuelen {BURST_PACKETS}")
        if not site.has_ipv6:  # else the kernel would tell the internet about groups that it has joined
            netns.sysctl(outermost, ipv6__conf__wan__disable_ipv6=1)
        if site.kind == "double":
            _join(site.routers[0], "lan0", site.routers[1], "wan")
        router = site.routers[-1] if site.routers else ""
        match site.kind:
            case "open":
                return
            case "same_lan":
                ip(router, "link add lan0 type bridge", "link set lan0 up")
                for number, host in enumerate(site.hosts):
                    _join(router, f"port{number}", host.namespace, "eth0")
                    ip(router, f"link set port{number} master lan0")
            case _:
                for number, host in enumerate(site.hosts):
                    _join(router, f"lan{number}", host.namespace, "eth0")

    def _configure(self, site: Site) -> None:
        """Give the devices their addresses and routes, in place of those they had."""
        wan = ([f"{site.address}/32"] if site.has_ipv4 else []) + (
            [f"2a00:{site.number:x}::1/128"] if site.has_ipv6 else []
        )
        _address(site.namespaces[0], "wan", wan, ["dev wan"])
        if site.kind == "open":
            site.hosts[0].address = site.address
            return
        if site.kind == "double":
            _address(site.routers[0], "lan0", ["100.64.0.1/24"], [])
            _address(site.routers[1], "wan", ["100.64.0.2/24"], ["via 100.64.0.1"])
        for number, host in enumerate(site.hosts):
            lan = 0 if site.kind == "same_lan" else number
            net = f"192.168.{1 + lan + 10 * site.moves % 250}." if site.has_ipv4 else f"2a00:{site.number:x}:0:1::"
            size = 24 if site.has_ipv4 else 64
            host.address = f"{net}{2 + number}"
            _address(site.routers[-1], f"lan{lan}", [f"{net}1/{size}"], [])
            _address(host.namespace, "eth0", [f"{host.address}/{size}"], [f"via {net}1"])
        for router in site.routers:
            netns.sysctl(router, ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        self._load_rules(site)
        self._serve_upnp(site)

    def _load_rules(self, site: Site) -> None:
        for router in site.routers:
            netns.nft(router, ruleset(site.kind, site.address))

    def _serve_upnp(self, site: Site) -> None:
        """Run the daemon that maps ports for the LAN; it starts anew with the rules that it adds to."""
        if site.kind != "upnp":
            return
        _end(site.daemon)
        settings, log = self.folder / "miniupnpd.conf", self.folder / f"{site.name}.log"
        settings.write_text(UPNP_SETTINGS, encoding="ascii")
        with log.open("wb") as output:
            site.daemon = Host(site.routers[0]).popen(
                *("miniupnpd", "-d", "-f", str(settings), "-P", str(log.with_suffix(".pid"))),
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while "Listening for NAT-PMP" not in (said := log.read_text(encoding="utf-8", errors="replace")):
            if site.daemon.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"miniupnpd does not run at {site.name}: {said}")
            time.sleep(0.01)

    def _new_namespace(self, site: Site, role: str) -> str:
        name = f"{self.prefix}{site.name}-{role}"
        netns.create(name)
        return name

    def _take_number(self) -> int:
        if self._next_number <= MAX_SITES:
            self._next_number += 1
            return self._next_number - 1
        if not self._free_numbers:
            raise LabError(f"a lab has room for {MAX_SITES} sites")
        return self._free_numbers.pop(0)

    def _tell(self, what: str, site: Site, **values: Any) -> Any:
        """Have the link do something."""
        assert self._link is not None, "the lab is used in a `with` block"
        commands: IO[bytes] | None = self._link.stdin
        answers: IO[bytes] | None = self._link.stdout
        assert commands is not None
        assert answers is not None
        commands.write(json.dumps({"do": what, "link": site.name, **values}).encode() + b"\n")
        commands.flush()
        if not select.select([answers], [], [], ANSWER_TIMEOUT_S)[0]:
            raise LabError(f"the link did not {what} {site.name} in {ANSWER_TIMEOUT_S:.0f} s")
        answer = json.loads(answers.readline() or '{"error": "the link has ended"}')
        if "error" in answer:
            raise LabError(f"cannot {what} {site.name}: {answer['error']}")
        return answer


def _join(one: str, device: str, other: str, its_device: str) -> None:
    """A cable between two namespaces."""
    ip(one, f"link add {device} type veth peer name {its_device} netns {other}", f"link set {device} up")
    ip(other, f"link set {its_device} up")


def _address(namespace: str, device: str, addresses: Sequence[str], routes: Sequence[str]) -> None:
    """Give a device these addresses in place of others, and default routes by it for the families that it has."""
    families = sorted({"-6" if ":" in address else "-4" for address in addresses})
    ip(
        namespace,
        f"link set {device} up",
        f"address flush dev {device} scope global",
        *(f"address add {address} dev {device} {'nodad' if ':' in address else ''}" for address in addresses),
    )
    for family in families:
        for route in routes:
            netns.command("ip", family, "-n", namespace, "route", "replace", "default", *route.split(), "dev", device)


def _end(process: subprocess.Popen[Any] | None) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
