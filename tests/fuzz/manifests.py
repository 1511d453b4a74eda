"""What names a run or a content: manifests of both kinds, and tickets.

An input is a letter and what follows it: ``c`` a content manifest; ``r`` a run manifest, to be signed here; ``s`` a
sealed run manifest as it is; ``t`` a ticket as text. Contents are named by their hash, so the target computes
the name; it is the signature that a stranger cannot make.
"""

from __future__ import annotations

import base64
import zlib
from random import Random
from typing import Final

from shoal.dht.manifests import ContentManifest, open_content_manifest
from shoal.protocol.codec import encode
from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES
from shoal.training.manifest import KIND, Manifest, Mode, open_manifest, sign_manifest
from shoal.training.ticket import Ticket

from .harness import FindingError, MutateBytes, Target, refusing, require
from .identities import ALICE, BOB, SWARM
from .mutators import mutate_packed


def _run(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    match kind:
        case b"c":
            _run_content(rest)
        case b"r":
            _run_signed(encode(ALICE.seal(KIND, rest)))
        case b"s":
            _run_signed(rest)
        case b"t":
            _run_ticket(rest.decode(errors="replace"))


def _run_content(data: bytes) -> None:
    cid = Cid.of_manifest(data)
    with refusing(ProtocolError):
        manifest = open_content_manifest(cid, data)
        require(encode(manifest) == data, "a content manifest was taken that we write otherwise")
        require(manifest.size <= MAX_CONTENT_BYTES, "a content manifest describes more than may be")
        sizes = manifest.block_sizes()
        total = sum(sizes[block] for block in manifest.blocks)
        require(total == manifest.size, "the blocks of a content manifest do not add up")
        require(all(0 < size <= BLOCK_BYTES for size in sizes.values()), "a block has a size that cannot be")
        _require_refused(data, cid)


def _require_refused(data: bytes, cid: Cid) -> None:
    try:
        open_content_manifest(Cid.of_manifest(data + b"\0"), data)
    except ProtocolError:
        return
    raise FindingError(f"the bytes of {cid} were taken for another content")


def _run_signed(data: bytes) -> None:
    with refusing(ProtocolError, UsageError):
        manifest = open_manifest(SwarmId.of_manifest(data), data)
        if manifest.owner != ALICE.peer_id:
            raise FindingError("a run manifest was taken that its owner did not sign")
        swarm, written = sign_manifest(manifest, ALICE)
        require(encode(open_manifest(swarm, written)) == encode(manifest), "a run manifest comes back changed")


def _run_ticket(text: str) -> None:
    with refusing(UsageError):
        ticket = Ticket.parse(text)
        require(Ticket.parse(str(ticket)) == ticket, "a ticket comes back changed")


def _seeds() -> list[bytes]:
    blocks = [Cid.of_block(bytes([number])) for number in range(3)]
    contents = [
        ContentManifest(size=2 * BLOCK_BYTES + 1, blocks=tuple(blocks)),
        ContentManifest(size=2 * BLOCK_BYTES, blocks=(blocks[0], blocks[0])),
    ]
    runs = [
        Manifest(owner=ALICE.peer_id, task="gym:CartPole-v1", algorithm="ppo", target_return=475.0),
        Manifest(
            owner=ALICE.peer_id,
            task="gym:Pendulum-v1",
            algorithm="ppo",
            mode=Mode.GRADIENT,
            hyperparameters={"gamma": 0.9, "hidden_sizes": [64, 64]},
        ),
        Manifest(owner=BOB.peer_id, task="gym:CartPole-v1", algorithm="ppo"),
    ]
    tickets = [Ticket(SWARM, ()), Ticket(SWARM, ("/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW",) * 2)]
    _, rightly = sign_manifest(runs[0], ALICE)
    sealed = [rightly, encode(BOB.seal(KIND, encode(runs[0]))), encode(ALICE.seal("op/1", encode(runs[0])))]
    return [
        *(b"c" + encode(content) for content in contents),
        *(b"r" + encode(run) for run in runs),
        *(b"s" + one for one in sealed),
        *(b"t" + str(ticket).encode() for ticket in tickets),
    ]


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    if data[:1] not in (b"c", b"r", b"s", b"t") or rng.random() < 0.05:
        return rng.choice((b"c", b"r", b"s", b"t")) + mutate_bytes(data[1:], max_bytes - 1)
    if data[:1] == b"t":
        return b"t" + _mutate_ticket(data[1:], max_bytes - 1, rng, mutate_bytes)
    if rng.random() < 0.8:
        return data[:1] + mutate_packed(data[1:], max_bytes - 1, rng, mutate_bytes)
    return data[:1] + mutate_bytes(data[1:], max_bytes - 1)


def _mutate_ticket(text: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change what is inside of the ticket, and give it the right checksum again."""
    start = str(Ticket(SWARM, ()))[:6].encode()
    body = text.removeprefix(start).upper()
    try:
        payload = base64.b32decode(body + b"=" * (-len(body) % 8))[4:]
    except ValueError:
        return mutate_bytes(text, max_bytes)
    payload = mutate_packed(payload, max_bytes // 2, rng, mutate_bytes)
    raw = zlib.crc32(payload).to_bytes(4, "big") + payload
    return start + base64.b32encode(raw).rstrip(b"=").lower()


TARGET: Final = Target(run=_run, seeds=_seeds, mutate=_mutate)
