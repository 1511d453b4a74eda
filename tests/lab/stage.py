"""What the scenarios play on: a lab, nodes in it, waits with a limit, and what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from shoal.node.api.client import Client
from shoal.node.api.schemas import PeerInfo, SwarmDetail

from .net import Lab, Site
from .netns import LabError
from .nodes import LabNode, Relays, listen_addresses

SETTLE_LIMIT_S: Final = 30.0
SOLVE_LIMIT_S: Final = 240.0
POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that a scenario shows.

    Attributes:
        limit: what the figure had to be.
    """

    scenario: str
    what: str
    figure: str
    limit: str
    ok: bool


class Stage:
    """One scenario's.

    Attributes:
        measures: what was measured so far.
        say: tells people what goes on.
    """

    def __init__(self, lab: Lab, scenario: str, say: Callable[[str], None]) -> None:
        self.lab = lab
        self.measures: list[Measure] = []
        self.say = say
        self._scenario = scenario
        self._relays: Relays | None = None

    # --- nodes ---

    @property
    def relays(self) -> Relays:
        """Three public nodes that relay; they stand from the first time that this is asked for."""
        if self._relays is None:
            self._relays = Relays(self.lab)
        return self._relays

    def start(self, site: Site, *options: str, host: int = 0, bootstrap: Sequence[str] | None = None) -> LabNode:
        """Run a node on a site's host; it knows the relays, unless told whom else."""
        node = LabNode(site.hosts[host], self.lab.folder, f"{site.name}-{host + 1}")
        known = self.relays.addresses() if bootstrap is None else bootstrap
        return node.up(*options, listen=listen_addresses(site, host), bootstrap=known)

    def pair(self, kind: str, *options: str) -> tuple[Site, LabNode, Site, LabNode]:
        """Two nodes, each at a site of this kind of its own, that others can reach."""
        sites = [self.lab.add(kind, f"{name}-{kind.replace('_', '-')}") for name in "ab"]
        nodes = self.start_all(*sites, options=options)
        return sites[0], nodes[0], sites[1], nodes[1]

    def start_all(self, *sites: Site, options: Sequence[str] = ()) -> list[LabNode]:
        """Run a node at each site; gives them when others can reach them."""
        _ = self.relays  # before the threads ask for them
        with ThreadPoolExecutor() as pool:
            nodes = list(pool.map(lambda site: self.start(site, *options), sites))
        for node in nodes:
            node.wait_until_reachable()
        return nodes

    # --- what is shown ---

    def within(self, what: str, took_s: float, limit_s: float) -> None:
        """Something took so long, and had to be over by the limit."""
        self._record(what, f"{took_s:.2f} s", f"≤ {limit_s:g} s", ok=took_s <= limit_s)

    def equal(self, what: str, figure: object, wanted: object) -> None:
        """Something is this, and should be that."""
        self._record(what, str(figure), str(wanted), ok=figure == wanted)

    def at_least(self, what: str, figure: float, least: float, unit: str = "") -> None:
        """Something is so much, and had to be more."""
        self._record(what, f"{figure:g} {unit}".strip(), f"≥ {least:g} {unit}".strip(), ok=figure >= least)

    def fail(self, what: str) -> None:
        """The scenario could not be played to its end."""
        self._record("the scenario itself", what, "no error", ok=False)

    def _record(self, what: str, figure: str, limit: str, *, ok: bool) -> None:
        self.measures.append(Measure(self._scenario, what, figure, limit, ok))
        self.say(f"  {'ok' if ok else 'FAILED'}: {what}: {figure} (should be {limit})")


def wait_until(what: str, holds: Callable[[], bool], limit_s: float = SETTLE_LIMIT_S) -> float:
    """Gives how many seconds it took.

    Raises:
        LabError: if it does not hold in time.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > limit_s:
            raise LabError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - began


def peer_of(client: Client, peer: str) -> PeerInfo | None:
    """What a node knows of a peer; None if it is not connected."""
    return next((known for known in client.peers() if known.peer_id == peer), None)


def path_to(client: Client, peer: str) -> str:
    """How a node reaches a peer; empty if it does not."""
    known = peer_of(client, peer)
    return "" if known is None else known.path


def wait_for_path(client: Client, peer: str, *paths: str) -> None:
    """Until a node reaches a peer by one of these paths."""
    wait_until(f"a path {' or '.join(paths)} to {peer}", lambda: path_to(client, peer) in paths)


def wait_until_solved(clients: Sequence[Client], swarm: str) -> list[SwarmDetail]:
    """Until every one of these nodes says that a run is solved; gives what they say.

    Raises:
        LabError: if it ends unsolved, or does not end in time.
    """

    def are_over() -> bool:
        return all(client.swarm(swarm).phase in ("done", "failed") for client in clients)

    wait_until("the end of the run", are_over, SOLVE_LIMIT_S)
    return [client.swarm(swarm) for client in clients]
