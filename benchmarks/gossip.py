"""What does one announcement cost each member, however many there are? Real cores on a simulated network.

Every member is `shoal.crdt.gossip`, `shoal.crdt.presence` and `shoal.crdt.meeting`, driven as the node drives them, and
nothing else, so that thousands fit into one process (`benchmarks/sim.py` has whole members). They come within twenty
seconds, each knows three others, `SPEAKERS` of them have said something; then, while one of sixteen loses power, half
of these without their connections ending, something new is said every quarter of a second. Of what the network loses
nothing is sent again. Seeded, so the simulated figures repeat anywhere.

    python benchmarks/gossip.py [--peers 32 128 1000 10000] [--loss 0.05] [--seed 0]

Each size is a process of its own. A row of the result that is measured anew replaces the old one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from shoal.crdt.gossip import Gossip
from shoal.crdt.gossip_messages import (
    ContactDown,
    ContactUp,
    Control,
    Dial,
    Event,
    Item,
    Known,
    Published,
    Push,
    Pushed,
    Tell,
    Tick,
    Told,
    Wake,
)
from shoal.crdt.meeting import BUCKET_BYTES, Differing, differing, lacking, summary
from shoal.crdt.presence import Fresh, PresenceTable, TopicRule
from shoal.crdt.presence import Known as HeardBefore
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signed
from shoal.protocol.sim import Links, Network
from shoal.training.sim_member import MESSAGE_BYTES, Notary, SimSigner

RESULT = Path(__file__).parent / "results" / "gossip.md"
HEAD = """# One announcement, as a swarm grows

`python benchmarks/gossip.py`: the real cores of gossip and presence, 5 % loss, round trips of 100 to 140 ms, one of
sixteen killed meanwhile. *messages*, *copies* of the record and *bytes* are what one member sends for one announcement
of one member, upkeep of the overlay included; *99 %* and *all* of the living have heard it after so many seconds, on
average and in the slowest case. *met* is what a member sends to those whom it meets while the swarm gathers: records,
and bytes in all. CPU and memory are of one process on one core.

| peers | missed | messages | copies | bytes | 99 % s | all s | slowest s | met | bytes met | events | CPU s | MB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
LINKS = {"latency_s": 0.05, "latency_spread_s": 0.02, "jitter_s": 0.005}
SPEAKERS = 32
ANNOUNCEMENTS = 24
EVERY_S = 0.25
SETTLE_S = 10.0
DIAL_S = 0.15
SEAL_BYTES = 160
TOPICS = {"facts": TopicRule(max_bytes=768, per_s=4, burst=16)}
SWARM = SwarmId.of_manifest(b"announcements")


class Node:
    """One member: its cores, and as much of a shell as they need."""

    def __init__(self, swarm: Swarm, signer: SimSigner) -> None:
        self.swarm = swarm
        self.peer = signer.peer_id
        self.signer = signer
        self.connected: set[PeerId] = set()
        self.core = Gossip(self.peer, swarm.network.rng)
        notary = swarm.notary
        self.table = PresenceTable(SWARM, self.peer, 1, TOPICS, check=notary.check, read=notary.read)

    def say(self, number: int) -> Item:
        """Something new."""
        record = self.table.announce(self.signer, "facts", {"phase": "collecting", "number": number}, 60.0)  # type: ignore[arg-type]
        item = Item(record.item, self.table.key_of(record.presence), self.peer)
        self.handle(Published((item,)))
        return item

    def handle(self, event: Event) -> None:
        """Do what the core says."""
        network = self.swarm.network
        for output in self.core.handle(event, network.now):
            match output:
                case Push(peer, ids):
                    self.send(peer, [sealed for each in ids if (sealed := self.table.find(each)) is not None])
                case Tell(peer, message):
                    self.tell(peer, message)
                case Wake(at):
                    network.wake(self.peer, at, self.handle, Tick())
                case Dial(peer):
                    network.at(DIAL_S, self.swarm.dialed, self, peer, of=self.peer)

    def send(self, target: PeerId, records: Sequence[Signed]) -> int:
        """Push; how many bytes that are."""
        num_bytes = MESSAGE_BYTES + sum([len(each.payload) + SEAL_BYTES for each in records])
        if records and target in self.connected:
            self.swarm.count(num_bytes, len(records))
            receive = self.swarm.nodes[target].receive
            self.swarm.network.send(self.peer, target, num_bytes, receive, self.peer, records)
        return num_bytes

    def tell(self, target: PeerId, message: Control) -> None:
        """Say what the core has to say to another."""
        if target in self.connected:
            ids = len(message.have) + len(message.want) + len(message.prune) + len(message.graft)
            num_bytes = MESSAGE_BYTES + 40 + 18 * ids + 60 * (len(message.shuffle) + len(message.shuffle_reply))
            self.swarm.count(num_bytes, 0)
            told = self.swarm.nodes[target].told
            self.swarm.network.send(self.peer, target, num_bytes, told, self.peer, message)

    def told(self, source: PeerId, message: Control) -> None:
        """It came."""
        self.handle(Told(source, message))

    def receive(self, source: PeerId, records: Sequence[Signed]) -> None:
        """A push came."""
        now = self.swarm.network.now
        fresh, known = [], []
        for sealed in records:
            heard = self.table.receive(sealed, now)
            if isinstance(heard, Fresh):
                fresh.append(self.swarm.notary.news(heard, self.table)[0])
                self.swarm.heard(fresh[-1])
            elif isinstance(heard, HeardBefore):
                known.append(heard.record_hash[:16])
        if fresh or known:
            self.handle(Pushed(source, tuple(fresh), tuple(known)))

    def meet(self, other: Node) -> None:
        """A connection stands: ask what the other lacks."""
        self.connected.add(other.peer)
        self.handle(ContactUp(other.peer))
        ours = summary(self.table)
        self.swarm.met(MESSAGE_BYTES + len(ours), 0)
        self.swarm.network.send(self.peer, other.peer, len(ours), other.asked, self, ours)

    def asked(self, other: Node, theirs: bytes) -> None:
        """Answer."""
        answer = differing(self.table, theirs)
        self.swarm.met(MESSAGE_BYTES + len(answer.buckets) + len(answer.rows), 0)
        self.swarm.network.send(self.peer, other.peer, 0, other.give, self, len(theirs) // BUCKET_BYTES, answer)

    def give(self, other: Node, num_buckets: int, answer: Differing) -> None:
        """What the other lacks."""
        lacks = lacking(self.table, num_buckets, answer)
        if lacks:
            self.swarm.met(self.send(other.peer, lacks), len(lacks))


class Swarm:
    """All of them, and what they spend."""

    def __init__(self, size: int, loss: float, seed: int) -> None:
        self.network = Network(seed, Links(**LINKS, loss=loss))
        self.notary = Notary()
        self.nodes: dict[PeerId, Node] = {}
        self.messages = self.copies = self.num_bytes = 0
        self.met_records = self.met_bytes = 0
        self.heard_at: dict[bytes, list[float]] = {}
        for number in range(size):
            signer = SimSigner(f"{seed} {number}")
            self.notary.add(signer)
            self.network.add(signer.peer_id)
            self.nodes[signer.peer_id] = Node(self, signer)
        peers = list(self.nodes)
        for number, peer in enumerate(peers[1:], start=1):
            known = tuple(self.network.rng.sample(peers[:number], min(3, number)))
            self.network.at(20.0 * number / size, self.nodes[peer].handle, Known(known), of=peer)

    def count(self, num_bytes: int, copies: int) -> None:
        """A message."""
        self.messages += 1
        self.copies += copies
        self.num_bytes += num_bytes

    def met(self, num_bytes: int, records: int) -> None:
        """A message of two that meet."""
        self.met_bytes += num_bytes
        self.met_records += records

    def heard(self, item: Item) -> None:
        """Somebody heard it."""
        at = self.heard_at.get(item.id)
        if at is not None:
            at.append(self.network.now)

    def dialed(self, node: Node, peer: PeerId) -> None:
        """A connection, if both live."""
        other = self.nodes[peer]
        if not self.network.can_reach(node.peer, peer):
            node.handle(ContactDown(peer))
        elif peer not in node.connected:
            other.meet(node)
            node.meet(other)

    def kill(self, node: Node, noticed_after_s: float) -> None:
        """It loses power; its neighbours learn of it after a while."""
        self.network.kill(node.peer)
        for other in sorted(node.connected):
            self.network.at(noticed_after_s, self.parted, self.nodes[other], node.peer)

    def parted(self, node: Node, peer: PeerId) -> None:
        """A connection is gone."""
        if peer in node.connected and self.network.is_alive(node.peer):
            node.connected.discard(peer)
            node.handle(ContactDown(peer))


def measure(size: int, loss: float, seed: int) -> dict[str, float]:
    """One swarm, in this process."""
    began = time.process_time()
    swarm = Swarm(size, loss, seed)
    network, rng = swarm.network, Random(seed)
    nodes = list(swarm.nodes.values())
    speakers = nodes[: min(SPEAKERS, size // 2)]
    for number, speaker in enumerate(speakers):
        network.at(10 + 20.0 * number / len(speakers), speaker.say, -number)
    network.run(40.0)
    met_records, met_bytes = swarm.met_records, swarm.met_bytes
    victims = rng.sample(nodes[len(speakers) :], max(1, size // 16))
    for number, victim in enumerate(victims):
        network.at(10.0 * number / len(victims), swarm.kill, victim, 0.1 if number % 2 else 8.0)
    before = swarm.messages, swarm.copies, swarm.num_bytes
    said_at: dict[bytes, float] = {}
    for number in range(ANNOUNCEMENTS):
        speaker = rng.choice(speakers)
        at = network.now
        record = speaker.say(number).id
        said_at[record] = at
        swarm.heard_at[record] = []
        network.run(at + EVERY_S)
    network.run(network.now + SETTLE_S)
    living = [node for node in nodes if network.is_alive(node.peer)]
    newest = {(node.peer, node.table.held()[0].stamp) for node in speakers}
    missed = sum(len(newest - {(each.presence.author, each.stamp) for each in node.table.held()}) for node in living)
    share = ANNOUNCEMENTS * size
    nearly, everybody = [], []
    for record, times in swarm.heard_at.items():
        took = sorted(at - said_at[record] for at in times)
        nearly.append(took[min(len(took), round(0.99 * len(living))) - 1])
        everybody.append(took[-1])
    return {
        "missed": missed,
        "messages": (swarm.messages - before[0]) / share,
        "copies": (swarm.copies - before[1]) / share,
        "bytes": (swarm.num_bytes - before[2]) / share,
        "nearly_s": sum(nearly) / len(nearly),
        "all_s": sum(everybody) / len(everybody),
        "slowest_s": max(everybody),
        "met_records": met_records / size,
        "met_bytes": met_bytes / size,
        "events": network.num_events,
        "cpu_s": time.process_time() - began,
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def row(size: int, got: dict[str, float]) -> str:
    """For the table."""
    cells = [f"{size}", f"{got['missed']:.0f}", f"{got['messages']:.1f}", f"{got['copies']:.2f}", f"{got['bytes']:.0f}"]
    cells += [f"{got['nearly_s']:.2f}", f"{got['all_s']:.2f}", f"{got['slowest_s']:.2f}", f"{got['met_records']:.0f}"]
    cells += [f"{got['met_bytes']:.0f}", f"{got['events']:.0f}", f"{got['cpu_s']:.0f}", f"{got['mb']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def keep(rows: list[str]) -> None:
    """Put rows into the result, in order of size."""
    text = RESULT.read_text() if RESULT.exists() else ""
    table, mark, rest = text.partition("\n## ")  # what is written by hand below stays
    kept = {line.split("|")[1]: line for line in (*table.splitlines(), *rows) if line[:2] == "| " and line[2].isdigit()}
    lines = sorted(kept.values(), key=lambda line: int(line.split("|")[1]))
    RESULT.write_text(HEAD + "\n".join(lines) + "\n" + mark + rest)


def main() -> None:
    """Measure each size, and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[32, 128, 1000])
    parser.add_argument("--loss", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for peers in options.peers:
        if options.one:
            print(json.dumps(measure(peers, options.loss, options.seed)))
            return
        command = [sys.executable, __file__, "--one", f"--peers={peers}", f"--loss={options.loss}"]
        done = subprocess.run([*command, f"--seed={options.seed}"], check=True, stdout=subprocess.PIPE, text=True)
        line = row(peers, json.loads(done.stdout))
        print(line, flush=True)
        keep([line])


if __name__ == "__main__":
    main()
