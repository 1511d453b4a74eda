"""Scenarios of what nodes do for each other: everything over a relay, a quick start, whole homes, a helpful router.

Each takes the `Stage` to play on.
"""

from __future__ import annotations

import json
import secrets
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from shoal.node.api.client import Client
from shoal.protocol.errors import NoDaemonError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.ticket import Ticket

from .netns import LabError
from .nodes import PORT, LabNode, listen_addresses
from .stage import POLL_S, Stage, path_to, peer_of, wait_for_path, wait_until, wait_until_solved

STARTS: Final = 5
START_LIMIT_S: Final = 1.5
GIVE_UP_S: Final = 30.0
CREATE: Final = ("swarm", "create", "--task", "gym:CartPole-v1", "--min-learners", "2", "--json")
LARGE: Final = (
    *("swarm", "create", "--task", "gym:CartPole-v1", "--min-learners", "1", "--target-return", "1000"),
    *(
        "--max-env-steps",
        "1000000000",
        "--set",
        "hidden_sizes=[4096,60,4096,60,4096,60,4096,60]",
        "--set",
        "update_epochs=1",
    ),
    *("--set", "num_minibatches=1", "--json"),
)
LARGE_MIB: Final = 40
"""Of a state of that run: three and a half million parameters, and Adam's two moments of each."""
LARGE_LIMIT_S: Final = 180.0
SLOW_BYTES_PER_S: Final = 10e6 / 8
NOWHERE: Final = "5.250.0.1"
"""An address that belongs to no site: what is sent there is lost without a word."""


def only_a_relay(stage: Stage) -> None:
    """Calls, tensors, look-ups in the DHT, shared state and training work between nodes that have only a relay."""
    _, a, _, b = stage.pair("symmetric", "--serve-bench")
    _do_everything(stage, a, b, "relayed")


def webrtc(stage: Stage) -> None:
    """All of that works by UDP too, between nodes that punch no holes by TCP."""
    _, a, _, b = stage.pair("port_restricted", "--serve-bench", "--no-punch")
    _do_everything(stage, a, b, "webrtc")


def _do_everything(stage: Stage, a: LabNode, b: LabNode, path: str) -> None:
    with a.client() as at_a, b.client() as at_b:
        at_a.ping(b.peer_id)
        wait_for_path(at_a, b.peer_id, path)
        wait_for_path(at_b, a.peer_id, path)
        with _paths_between(a, b) as paths:
            calls = _bench(a, b, "rpc", "--size", "128")
            stage.at_least("unary calls of 128 B", calls["calls_per_s"], 100, "calls/s")
            tensor = _bench(a, b, "stream", "--size", "8MB")
            stage.at_least("tensor of 8 MB, its digest checked", tensor["mb_per_s"], 0.5, "MB/s")
            back = _bench(b, a, "load", "--size", "1MB")
            stage.at_least("calls beside a transfer, the other way", back["calls"], 1)
            created = json.loads(a.run(*CREATE))
            swarm = created["swarm"]
            # Its only address leads nowhere, so the members have to be found in the DHT.
            lost = Ticket(SwarmId(swarm), (f"/ip4/{NOWHERE}/tcp/{PORT}/p2p/{_stranger()}",))
            began = time.monotonic()
            wait_until("the swarm's record in the DHT", lambda: _joins(b, str(lost)))
            stage.say(f"  joined with a ticket of dead addresses, in {time.monotonic() - began:.1f} s")
            ends = wait_until_solved((at_a, at_b), swarm)
            stage.equal("CartPole solved, on both", [end.solved for end in ends], [True, True])
            shares = [member.share for member in ends[0].members]
            stage.at_least("smaller share of the steps", round(min(shares), 3), 0.05)
            took_s = wait_until("the same state on both", lambda: _same_state(at_a, at_b, swarm))
            stage.within("the same shared state on both", took_s, 10)
    stage.equal("paths in use all the time", ", ".join(sorted(paths)), path)


def start(stage: Stage) -> None:
    """A node that is given one reachable bootstrap node of three has a peer 1.5 s after its command, in the median."""
    reachable = stage.relays.addresses()[0]
    deaf = f"/ip4/{NOWHERE}/tcp/{PORT}/p2p/{_stranger()}"
    refusing = f"/ip4/{stage.relays.sites[0].address}/tcp/{PORT + 7}/p2p/{_stranger()}"
    site = stage.lab.add("port_restricted")
    took: list[float] = []
    for number in range(STARTS):
        node = LabNode(site.hosts[0], stage.lab.folder, f"start-{number + 1}")
        words = [word for address in (deaf, refusing, reachable) for word in ("--bootstrap", address)]
        words += [word for address in listen_addresses(site) for word in ("--listen", address)]
        began = time.monotonic()
        process = subprocess.Popen(
            node.command("up", "--no-mdns", *words),
            env=node.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with _client_of(node, process) as client:
                while not client.node().num_peers:
                    if time.monotonic() - began > GIVE_UP_S:
                        raise LabError(f"no peer after {GIVE_UP_S:.0f} s\n{node.log()}")
                    time.sleep(0.01)
                took.append(time.monotonic() - began)
        finally:
            process.terminate()
            process.wait(timeout=10)
    stage.say(f"  {', '.join(f'{each:.2f}' for each in took)} s")
    stage.within(f"command to first peer, median of {STARTS}", statistics.median(took), START_LIMIT_S)


def compose(stage: Stage) -> None:
    """The topology of docker-compose.yml: two homes with two nodes each and a relay; one of each home trains."""
    lab = stage.lab
    relay_site, home_a, home_b = lab.add("open", "relay"), lab.add("same_lan", "home-a"), lab.add("same_lan", "home-b")
    relay = stage.start(relay_site, "--relay", "on", bootstrap=())
    known = [f"/ip4/{relay_site.address}/tcp/{PORT}/p2p/{relay.peer_id}"]
    a1, a2, b1, b2 = (stage.start(home, host=host, bootstrap=known) for home in (home_a, home_b) for host in (0, 1))
    with a1.client() as at_a, b1.client() as at_b, a2.client() as at_a2:
        wait_until("an address by the relay", lambda: any("p2p-circuit" in each for each in at_a.node().addresses))
        created = json.loads(a1.run(*CREATE))
        began = time.monotonic()
        b1.run("join", "--detach", created["ticket"])
        ends = wait_until_solved((at_a, at_b), created["swarm"])
        stage.say(f"  {time.monotonic() - began:.0f} s; a1 reaches b1 {path_to(at_a, b1.peer_id)}")
        stage.equal("CartPole solved, on both", [end.solved for end in ends], [True, True])
        stage.at_least("smaller share of the steps", round(min(m.share for m in ends[0].members), 3), 0.05)
        answered = at_a2.ping(b2.peer_id)
        stage.within("the other two: first byte", answered.first_byte_s, 5)


def upnp(stage: Stage) -> None:
    """A router forwards its node's port when asked: anybody reaches the node directly, and it relays for others."""
    lab = stage.lab
    known: list[str] = []
    for name in ("public1", "public2"):  # they help to find out, but do not relay
        site = lab.add("open", name)
        node = stage.start(site, "--relay", "off", bootstrap=known)
        known.append(f"/ip4/{site.address}/tcp/{PORT}/p2p/{node.peer_id}")
    home = stage.start(lab.add("upnp", "home"), bootstrap=known)
    with home.client() as at_home:
        took_s = wait_until("a forwarded port", lambda: bool(at_home.nat().port_mapping))
        stage.say(f"  {at_home.nat().port_mapping}")
        stage.within("the router forwards the port", took_s, 10)
        stage.within("it relays", wait_until("relaying", lambda: at_home.nat().relaying), 10)
    one, other = (stage.start(lab.add("symmetric", name), bootstrap=known) for name in ("one", "other"))
    with one.client() as at_one, other.client() as at_other:
        for client in (at_one, at_other):  # which have to find it, since nobody told them of it
            wait_until("a reservation", lambda client=client: client.nat().held_relays == [home.peer_id])  # type: ignore[misc]
        stage.equal("from behind a symmetric NAT", at_one.ping(home.peer_id).path, "direct")
        at_one.ping(other.peer_id)
        wait_for_path(at_one, other.peer_id, "relayed")
        met = peer_of(at_one, other.peer_id)
        stage.equal("two symmetric NATs meet through it", met is not None and met.relayed_by == home.peer_id, True)


def slow_link(stage: Stage) -> None:
    """A member with 10 Mbit/s takes a state of 40 MiB of a run that goes on meanwhile; nothing comes twice."""
    fast_site, slow_site = stage.lab.add("open", "fast"), stage.lab.add("open", "slow")
    fast = stage.start(fast_site, "--relay", "off", bootstrap=())
    known = [f"/ip4/{fast_site.address}/tcp/{PORT}/p2p/{fast.peer_id}"]
    slow = stage.start(slow_site, "--relay", "off", bootstrap=known)
    with fast.client() as at_fast, slow.client() as at_slow:
        swarm_and_ticket = json.loads(fast.run(*LARGE, timeout_s=120))
        swarm = swarm_and_ticket["swarm"]
        wait_until("an epoch", lambda: at_fast.swarm(swarm).epoch >= 1, LARGE_LIMIT_S)
        stage.lab.set_link(slow_site, rate=SLOW_BYTES_PER_S)
        before = stage.lab.count(slow_site)["down"]["bytes"]
        slow.run("join", "--detach", "--role", "storage", swarm_and_ticket["ticket"], timeout_s=120)
        began = at_fast.swarm(swarm).epoch
        took_s = wait_until("the state", lambda: at_slow.swarm(swarm).epoch >= 1, LARGE_LIMIT_S)
        came = (stage.lab.count(slow_site)["down"]["bytes"] - before) / 2**20
        stage.say(f"  epoch {at_slow.swarm(swarm).epoch}; the run went from {began} to {at_fast.swarm(swarm).epoch}")
        stage.at_least("time that it took, more than a fetch once had", round(took_s, 1), 30, "s")
        stage.within("time that it took", took_s, 2 * LARGE_MIB * 2**20 / SLOW_BYTES_PER_S)
        stage.equal(f"came for {LARGE_MIB} MiB: {came:.0f} MiB, with what else is said", came < 1.3 * LARGE_MIB, True)


def _bench(node: LabNode, peer: LabNode, kind: str, *options: str) -> dict[str, Any]:
    said = node.run("bench", kind, "--peer", peer.peer_id, "--seconds", "2", *options, "--json", timeout_s=120)
    figures: dict[str, Any] = json.loads(said)
    return figures


def _joins(node: LabNode, ticket: str) -> bool:
    """Whether a node finds a swarm; its record reaches the DHT a little after the swarm is made."""
    try:
        node.run("join", "--detach", ticket, timeout_s=120)
    except LabError:
        return False
    return True


def _same_state(one: Client, other: Client, swarm: str) -> bool:
    return one.state(swarm) == other.state(swarm)


def _stranger() -> PeerId:
    """The name of a node that there is not."""
    return Signer(secrets.token_bytes(32)).peer_id


@contextmanager
def _paths_between(a: LabNode, b: LabNode) -> Iterator[set[str]]:
    """The paths by which two nodes reach each other while the block lasts; ``none`` if they do not."""
    seen: set[str] = set()
    is_over = threading.Event()

    def watch() -> None:
        with a.client() as at_a, b.client() as at_b:
            while not is_over.wait(POLL_S):
                seen.update((path_to(at_a, b.peer_id) or "none", path_to(at_b, a.peer_id) or "none"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


def _client_of(node: LabNode, process: subprocess.Popen[bytes]) -> Client:
    """The local API of a node that is just starting, as soon as it is there."""
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        try:
            return node.client()
        except NoDaemonError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
