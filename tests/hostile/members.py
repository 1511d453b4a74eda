"""A member that lies, made of the project's own library: it joins a swarm and says what no honest one says.

Each attack takes a member and lies until it is cancelled. `ATTACKS` names them; what they did to real nodes before is
told beside each (rows of the list of attacks that this project was tried with).
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import trio

from shoal.crdt.meeting import Differing
from shoal.crdt.presence import PresenceTable, TopicRule
from shoal.crdt.sync import SwarmDocs
from shoal.node.mesh.host import Host, PeerDown, PeerUp, open_host
from shoal.node.store.database import Storage, StoredSwarm
from shoal.node.supervise import Supervisor
from shoal.node.swarm.replica import Replica
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import (
    Block,
    BlockRequest,
    ContentService,
    GossipPush,
    PresenceSummary,
    SwarmService,
    SyncAnswer,
    SyncRequest,
)
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import RemoteError, ShoalError, Status
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.services import Empty, client, current_call
from shoal.protocol.signing import Signer
from shoal.training.manifest import Role
from shoal.training.state import decode_arrays, encode_arrays
from shoal.training.statements import (
    MAX_EPOCH,
    MAX_RATE,
    MAX_SAMPLES,
    TOPIC_OF,
    TOPIC_RULES,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    Statement,
    Vote,
    read_statement,
)

SECRET = bytes([77]) * 32


class _Calls(SwarmService):
    replica: Replica | None = None

    async def sync(self, request: SyncRequest) -> SyncAnswer:
        if self.replica is None:
            raise RemoteError(Status.NOT_FOUND, "not yet")
        return await self.replica.serve_sync(current_call().peer, request)

    async def compare(self, request: PresenceSummary) -> Differing:
        if self.replica is None:
            raise RemoteError(Status.NOT_FOUND, "not yet")
        return self.replica.serve_compare(request)

    async def gossip(self, request: GossipPush) -> Empty:
        if self.replica is None:
            raise RemoteError(Status.NOT_FOUND, "not yet")
        await self.replica.serve_gossip(current_call().peer, request)
        return Empty()


class _Contents(ContentService):
    def __init__(self) -> None:
        self.blocks: dict[Cid, bytes] = {}

    async def block(self, request: BlockRequest) -> Block:
        block = self.blocks.get(request.cid)
        if block is None:
            raise RemoteError(Status.NOT_FOUND, "gone")
        return Block(block)


@dataclass
class Liar:
    """A member, and what it spent."""

    swarm: SwarmId
    host: Host
    replica: Replica
    contents: _Contents
    said: int = 0
    num_bytes: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def say(self, statement: Statement) -> bytes:
        return self.publish(TOPIC_OF[type(statement)], to_plain(statement))

    def publish(self, topic: str, facts: Mapping[str, Any]) -> bytes:
        self.said += 1
        return self.replica.publish(topic, facts)

    def newest(self, kind: type[Any]) -> tuple[PeerId, Any, bytes] | None:
        """The newest thing of a kind that an honest member said."""
        found: list[tuple[int, PeerId, Any, bytes]] = []
        for author in list(self.replica.live):
            for facts, name in self.replica.statements(author, TOPIC_OF[kind]):
                statement = read_statement(TOPIC_OF[kind], dict(facts))
                if isinstance(statement, kind):
                    epoch = statement.key.epoch if hasattr(statement, "key") else statement.epoch
                    found.append((epoch, author, statement, name))
        if not found:
            return None
        _, author, statement, name = max(found, key=lambda each: each[:2])
        return author, statement, name

    def made_up(self) -> Cid:
        return Cid.of_block(self.rng.bytes(16))

    def give(self, data: bytes) -> Cid:
        cid = Cid.of_block(data)
        self.contents.blocks[cid] = data
        return cid

    async def get(self, peer: PeerId, cid: Cid) -> bytes:
        block = await client(ContentService, self.host.at(peer), timeout_s=5).block(BlockRequest(cid))
        return bytes(block.data)


@asynccontextmanager
async def a_liar(
    swarm: SwarmId, address: str, secret: bytes = SECRET, says: Facts | None = None
) -> AsyncIterator[Liar]:
    """A member of a swarm that knows one address of another; ``says``: that it is, if not a learner at work."""
    signer, calls, contents = Signer(secret), _Calls(), _Contents()
    loose = {
        topic: TopicRule(max_bytes=rule.max_bytes, keep=4, per_s=1e6, burst=10**6)
        for topic, rule in TOPIC_RULES.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_host(
                secret=secret,
                listen=["/ip4/127.0.0.1/tcp/0"],
                bootstrap=[],
                mdns=False,
                router=Router(calls, contents),
                lanes=False,
            ) as host,
            Supervisor().open("swarm", "of a liar") as domain,
            trio.open_nursery() as nursery,
        ):
            with Storage(Path(folder) / "node.sqlite") as storage:
                storage.add_swarm(StoredSwarm(swarm=swarm, manifest=b"", role="learner", joined_at=1.0))
                docs = SwarmDocs(swarm, signer.peer_id)
                replica = Replica(
                    swarm, signer, docs, PresenceTable(swarm, signer.peer_id, 1, loose), storage, host, domain
                )
                calls.replica = replica
                replica.begin()
                nursery.start_soon(_follow, host, replica)
                await host.connect([address])
                liar = Liar(swarm, host, replica, contents)
                liar.say(says or Facts(role=Role.LEARNER, phase=Phase.COLLECTING))
                with trio.fail_after(20):
                    while liar.newest(Result) is None:
                        await replica.changed.wait()
                try:
                    yield liar
                finally:
                    nursery.cancel_scope.cancel()
                    domain.cancel()


async def _follow(host: Host, replica: Replica) -> None:
    async for event in host.events:
        match event:
            case PeerUp(peer):
                await replica.peer_up(peer)
            case PeerDown(peer):
                replica.peer_down(peer)


async def boasts(liar: Liar) -> None:
    """Row 2: one such record stopped three nodes for ever."""
    while True:
        held = liar.newest(Result)
        epoch = 0 if held is None else held[1].epoch
        for ahead, phase in ((0, Phase.EXCHANGING), (1, Phase.COLLECTING), (0, Phase.UPDATING)):
            liar.say(
                Facts(
                    role=Role.LEARNER,
                    phase=phase,
                    epoch=epoch + ahead,
                    samples=MAX_SAMPLES,
                    speed=MAX_RATE,
                    steps_per_s=MAX_RATE,
                )
            )
        await trio.sleep(0.2)


async def invents_offers(liar: Liar) -> None:
    """Rows 3 and 4: the longest proposals, of offers that do not exist, of its own alone, out of turn."""
    while True:
        offered = liar.newest(Offer)
        if offered is not None:
            key = offered[1].key
            names = tuple(sorted(liar.rng.bytes(32) for _ in range(128)))
            liar.say(Proposal(key=key, attempt=0, offers=names))
            own = liar.say(Offer(key=key, cid=liar.made_up(), weight=4096))
            for attempt in range(3):
                liar.say(Proposal(key=key, attempt=attempt, offers=(own,)))
            liar.say(Vote(key=key, ballot=liar.rng.bytes(32), attempt=0))
        await trio.sleep(0.1)


async def prophesies(liar: Liar) -> None:
    """Rows 5 and 5b: epochs to come, near the end of numbers; nobody has them."""
    while True:
        held = liar.newest(Result)
        if held is not None:
            result = held[1]
            for ahead in (1, 1000, MAX_EPOCH - result.epoch):
                liar.say(
                    Result(
                        epoch=result.epoch + ahead,
                        cid=liar.made_up(),
                        parent=result.cid,
                        ballot=liar.rng.bytes(32),
                        env_steps=result.env_steps + 2048 * min(ahead, 1000),
                    )
                )
        await trio.sleep(0.2)


async def poisons_the_register(liar: Liar) -> None:
    """Row 5: a policy register with an epoch of 2**53 stopped all for ever."""
    for number in range(1000):
        await liar.replica.write(
            policy={"epoch": 2**53, "cid": liar.made_up(), "env_steps": 2**53 - number, "digest": "0" * 64}
        )
        await trio.sleep(0.5)


async def takes_over(liar: Liar) -> None:
    """Rows 4, 5c and 5d: true states with parameters of its own and step counts near the end, which it does give."""
    while True:
        held = liar.newest(Result)
        if held is not None:
            author, result, _ = held
            try:
                arrays, meta = decode_arrays(await liar.get(author, result.cid))
            except ShoalError:
                await trio.sleep(0.1)
                continue
            for name in arrays:
                if name.startswith("parameters/"):
                    arrays[name] = np.full_like(arrays[name], 0.123456)
            arrays["adam/step"] = np.asarray(2**62, np.int64)
            ballot = liar.rng.bytes(32)
            meta |= {"epoch": result.epoch + 1, "parent": result.cid, "ballot": ballot.hex()}
            cid = liar.give(encode_arrays(arrays, meta))
            liar.say(
                Result(epoch=result.epoch + 1, cid=cid, parent=result.cid, ballot=ballot, env_steps=meta["env_steps"])
            )
        await trio.sleep(0.3)


async def gives_absurd_numbers(liar: Liar) -> None:
    """Row 6: one contribution of 0.99e30 made every later update NaN."""
    last = -1
    while True:
        offered = liar.newest(Offer)
        if offered is not None and offered[1].key.epoch > last:
            author, offer, _ = offered
            try:
                arrays, meta = decode_arrays(await liar.get(author, offer.cid))
            except ShoalError:
                continue
            last = offer.key.epoch
            absurd = {
                name: np.full_like(array, 0.99e30) if name.startswith("mean/parameters") else array
                for name, array in arrays.items()
            }
            liar.say(Offer(key=offer.key, cid=liar.give(encode_arrays(absurd, meta)), weight=2048, seconds=0.5))
        await trio.sleep(0.01)


async def solves(liar: Liar) -> None:
    """Row 7: 300 claims that made-up policies solved the task; and the same of true ones."""
    claims = {
        str(10_000 + number): {"cid": liar.made_up(), "return": 1e9, "env_steps": 1, "episodes": 20}
        for number in range(300)
    }
    await liar.replica.write(evaluations=claims)
    while True:
        held = liar.newest(Result)
        if held is not None:
            result = held[1]
            entry = {"cid": result.cid, "return": 1e9, "env_steps": result.env_steps, "episodes": 20}
            await liar.replica.write(evaluations={str(result.epoch): entry})
        await trio.sleep(1)


async def never_comes(liar: Liar) -> None:
    """Row 15: present, promising, and never ready."""
    while True:
        held = liar.newest(Result)
        epoch = 0 if held is None else held[1].epoch
        liar.say(Facts(role=Role.LEARNER, phase=Phase.COLLECTING, epoch=epoch, samples=1, speed=5000.0))
        if held is not None:
            liar.say(held[1])
        await trio.sleep(0.25)


async def spams(liar: Liar) -> None:
    """Row 24: as many records as it can, each as long as it may be."""
    number = 0
    while True:
        number += 1
        for topic in ("facts", "offer", "vote"):
            liar.publish(topic, {"nonsense": "x" * 300, "number": number})
        await trio.sleep(0.01)


Attack = Callable[[Liar], Awaitable[None]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        boasts,
        invents_offers,
        prophesies,
        poisons_the_register,
        takes_over,
        gives_absurd_numbers,
        solves,
        never_comes,
        spams,
    )
}
