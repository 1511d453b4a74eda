"""Ordinary nodes in the lab: each started with the ordinary command on a host, and asked over its local API.

The API's Unix socket is a file, so a node is reached by it from outside its network namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from shoal.node.api.client import Client
from shoal.node.api.schemas import NatInfo
from shoal.node.config import NodeConfig
from shoal.protocol.errors import ShoalError

from .net import Host, Lab, Site
from .netns import LabError

SHOAL: Final = (sys.executable, "-m", "shoal.cli.main")
PORT: Final = 4001
RELAYS: Final = 3
START_TIMEOUT_S: Final = 90.0
"""A node takes some seconds of processor to start, and a machine of the lab may have a tenth of a core."""
READY_TIMEOUT_S: Final = 15.0
POLL_S: Final = 0.05


class LabNode:
    """A node on a host, in a fresh profile.

    Attributes:
        info: what ``shoal up --json`` printed.
    """

    def __init__(self, host: Host, home: Path, profile: str) -> None:
        self.host = host
        self.info: dict[str, Any] = {}
        self._config = NodeConfig(home=home, profile=profile)

    @property
    def peer_id(self) -> str:
        """Its name."""
        return str(self.info["peer_id"])

    def command(self, *words: str) -> list[str]:
        """A command line that runs ``shoal`` on this host for this node."""
        return self.host.command(*SHOAL, *words, "--profile", self._config.profile)

    def environment(self) -> dict[str, str]:
        """What it runs with."""
        return os.environ | {"SHOAL_HOME": str(self._config.home)}

    def run(self, *words: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """Run a command line of ``shoal`` on this host to its end; gives what it prints.

        Raises:
            LabError: if it fails.
        """
        done = subprocess.run(
            self.command(*words),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise LabError(f"shoal {words[0]} ended with {done.returncode}: {done.stderr.strip()}\n{self.log()}")
        return done.stdout

    def up(self, *options: str, listen: Sequence[str], bootstrap: Sequence[str] = ()) -> LabNode:
        """Start it; returns when it is ready."""
        words = ["up", "-d", "--json", "--no-mdns", *options]
        words += [word for address in listen for word in ("--listen", address)]
        words += [word for address in bootstrap for word in ("--bootstrap", address)]
        self.info = json.loads(self.run(*words).strip().splitlines()[-1])
        return self

    def client(self) -> Client:
        """Its local API; use it in a ``with`` block."""
        return Client(self._config.paths, self._config.profile)

    def wait_until_reachable(self) -> None:
        """Returns when the node knows how others reach it, and has a peer; only then can it be called.

        Raises:
            LabError: if it does not in time.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        with self.client() as client:
            while not (client.node().num_peers and _is_reachable(client.nat())):
                if time.monotonic() > deadline:
                    late = (
                        f"a node is neither public, nor forwarded to, nor held by a relay after {READY_TIMEOUT_S:.0f} s"
                    )
                    raise LabError(f"{late}\n{self.log()}")
                time.sleep(POLL_S)

    def is_relaying(self) -> bool:
        """Whether it relays for others, which it does once it has found itself public."""
        with self.client() as client:
            return client.nat().relaying

    def stop(self) -> None:
        """Begin to end it, if it runs."""
        with contextlib.suppress(ShoalError), self.client() as client:
            client.stop()

    def log(self, num_lines: int = 30) -> str:
        """The end of its log."""
        path = self._config.paths.log
        if not path.exists():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def _is_reachable(nat: NatInfo) -> bool:
    return nat.reachability == "public" or bool(nat.port_mapping or nat.held_relays)


def listen_addresses(site: Site, host: int = 0) -> list[str]:
    """Where a node at a site listens: a port of its own on every host, for those that share a NAT."""
    port = PORT + host
    ipv4, ipv6 = [f"/ip4/0.0.0.0/tcp/{port}"], [f"/ip6/::/tcp/{port}"]
    return (ipv4 if site.has_ipv4 else []) + (ipv6 if site.has_ipv6 else [])


class Relays:
    """Public nodes in different networks; the first of them also listens on TCP port 443.

    Attributes:
        sites: where they are.
        nodes: they themselves, in the same order.
    """

    def __init__(self, lab: Lab, *options: str, count: int = RELAYS) -> None:
        self.sites = [lab.add("open", f"relay{number}") for number in range(1, count + 1)]
        self.nodes: list[LabNode] = []
        for number, site in enumerate(self.sites):
            listen = listen_addresses(site) + (["/ip4/0.0.0.0/tcp/443"] if number == 0 else [])
            node = LabNode(site.hosts[0], lab.folder, site.name)
            self.nodes.append(node.up(*options, listen=listen, bootstrap=self.addresses()))
        self._wait_until_one_relays()

    def _wait_until_one_relays(self) -> None:
        """The others may learn only as more nodes come that they are public."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not any(node.is_relaying() for node in self.nodes):
            if time.monotonic() > deadline:
                raise LabError(f"no relay relays after {READY_TIMEOUT_S:.0f} s\n{self.nodes[-1].log()}")
            time.sleep(POLL_S)

    def addresses(self) -> list[str]:
        """The full addresses of those that run."""
        found = []
        for number, (site, node) in enumerate(zip(self.sites, self.nodes, strict=False)):
            transports = [f"/ip4/{site.address}/tcp/{PORT}", f"/ip6/{site.address6}/tcp/{PORT}"]
            transports += [f"/ip4/{site.address}/tcp/443"] if number == 0 else []
            found += [f"{transport}/p2p/{node.peer_id}" for transport in transports]
        return found
