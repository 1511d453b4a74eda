"""Real hosts that reduce together: owners that lie, members that give something else than they signed, latecomers."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import trio

from shoal.node.mesh.host import Host, open_host
from shoal.node.swarm import reducing
from shoal.node.swarm.content import UnavailableError
from shoal.node.swarm.following import follow
from shoal.node.swarm.reducing import Commitments, ReduceResult, Reductions
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import ResultGiven
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.signing import Signer
from shoal.protocol.tensors import TensorCodec
from shoal.training.exchange.allreduce import Member, Outcome
from shoal.training.exchange.audits import SignedOutcome, sign_outcome
from shoal.training.exchange.layout import Layout, Segment, hashes_of
from shoal.training.exchange.rules import Aggregator

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
GENEROUS_S = 60.0
PATIENCE_S = 2.0
NUMEL = 40_000
LAYOUT = Layout((Segment("mean/x", NUMEL, TensorCodec.FP32, 10.0),), Aggregator(), 8192)  # five parts
MEMBERS = 4
RUN = SwarmId("of these")


@dataclass
class One:
    """A member."""

    host: Host
    reductions: Reductions
    offered: memoryview
    lies: list[SignedOutcome] = field(default_factory=list)
    false: set[PeerId] = field(default_factory=set)
    shunned: set[PeerId] = field(default_factory=set)

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    def on_lie(self, said: SignedOutcome) -> None:
        self.lies.append(said)
        self.shunned.add(said.owner)


@asynccontextmanager
async def members(count: int = MEMBERS) -> AsyncIterator[list[One]]:
    with trio.fail_after(GENEROUS_S):
        async with AsyncExitStack() as stack:
            found: list[One] = []
            for number in range(1, count + 1):
                router, secret = Router(), bytes([number]) * 32
                host = await stack.enter_async_context(
                    open_host(secret=secret, listen=[LOOPBACK], bootstrap=[], mdns=False, router=router)
                )
                reductions = Reductions(host.links, Signer(secret))
                router.add(reductions)
                offered = memoryview(bytearray(LAYOUT.num_bytes))
                values = np.random.default_rng(number).standard_normal(NUMEL, np.float32)
                LAYOUT.encode({"mean/x": values}, offered)
                found.append(One(host, reductions, offered))
            for index, one in enumerate(found):
                for other in found[:index]:
                    await one.host.connect(other.host.addresses())
            yield found


def signed_by(found: list[One]) -> dict[PeerId, tuple[bytes, ...]]:
    """The hashes of the parts that each offers."""
    return {one.peer: hashes_of(LAYOUT.num_parts, LAYOUT.hashes(one.offered)) or () for one in found}


def key_of(number: int) -> bytes:
    return hashlib.sha256(f"{number}".encode()).digest()[:16]


async def reduce(
    found: list[One], number: int, signed: dict[PeerId, tuple[bytes, ...]] | None = None
) -> dict[PeerId, ReduceResult]:
    """One all-reduce of all of them; ``signed``: of what they offer, if that is something else."""
    results: dict[PeerId, ReduceResult] = {}
    hashes = signed_by(found) if signed is None else signed
    key = key_of(number)

    async def take_part(one: One) -> None:
        async with one.reductions.reducing(
            key,
            [Member(each.peer, 100.0) for each in found],
            LAYOUT,
            one.offered,
            into=memoryview(bytearray(LAYOUT.num_bytes)),
            patience_s=PATIENCE_S,
            commitments=Commitments(hashes, one.shunned, one.on_lie, one.false.add),
            run=RUN,
        ) as result:
            results[one.peer] = result

    async with trio.open_nursery() as nursery:
        for one in found:
            nursery.start_soon(take_part, one)
    return results


def lying(liar: PeerId, wrong: Callable[[memoryview], None]) -> type[reducing._Reduction]:
    """Reductions as they are, but for one member, which does something to what it reduces before it signs that."""

    class Lying(reducing._Reduction):
        async def _reduce(self, part: int, authors: tuple[PeerId, ...]) -> None:
            if self._me == liar:
                parts = self._parts

                class Wrong(Layout):
                    def reduce(self, part: int, given, weights, out):  # type: ignore[no-untyped-def]
                        used = super().reduce(part, given, weights, out)
                        wrong(out)
                        return used

                assert isinstance(parts, Layout)
                self._parts = Wrong(parts.segments, parts.aggregator, parts.part_numel)
                try:
                    await super()._reduce(part, authors)
                finally:
                    self._parts = parts
            else:
                await super()._reduce(part, authors)

    return Lying


async def test_honest_members_accuse_nobody_and_end_with_the_same_bytes() -> None:
    async with members() as found:
        for number in range(5):
            results = await reduce(found, number)
            assert len({result.digest for result in results.values()}) == 1
            assert len({bytes(result.data) for result in results.values()}) == 1
            exact = sum(np.frombuffer(one.offered, np.float32, NUMEL).astype(np.float64) for one in found) / MEMBERS
            first = next(iter(results.values()))
            assert np.abs(np.frombuffer(first.data, np.float32, NUMEL) - exact).max() < 1e-6
        assert not any(one.lies for one in found)


async def test_an_owner_that_lies_is_named_by_all_the_others_and_then_owns_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flip(out: memoryview) -> None:
        np.frombuffer(out, np.float32)[:] *= -1

    async with members() as found:
        liar = found[2]
        monkeypatch.setattr(reducing, "_Reduction", lying(liar.peer, flip))
        for number in range(3):
            await reduce(found, number)
        honest = [one for one in found if one is not liar]
        assert all({said.owner for said in one.lies} == {liar.peer} for one in honest), "nobody else is accused"
        assert all(said.is_signed() for one in honest for said in one.lies)
        results = await reduce(found, 1000)
        assert len({results[one.peer].digest for one in honest}) == 1
        for one in honest:
            assert all(outcome.owner != liar.peer for outcome in results[one.peer].outcomes.values())


async def test_who_gives_another_part_than_it_signed_is_left_out() -> None:
    async with members() as found:
        liar, signed = found[1], signed_by(found)
        np.frombuffer(liar.offered, np.float32, NUMEL)[:] = 9.0
        results = await reduce(found, 0, signed)
        honest = [one for one in found if one is not liar]
        assert all(one.false == {liar.peer} for one in honest), "each owns a part, and pulls it from everybody"
        for one in honest:
            outcomes = results[one.peer].outcomes.values()
            assert all((liar.peer in each.authors) == (each.owner == liar.peer) for each in outcomes)


async def followed(late: One, found: list[One], number: int) -> tuple[bytes, dict[int, Outcome]]:
    into = memoryview(bytearray(LAYOUT.num_bytes))
    peers, shunned = [one.peer for one in found], late.shunned
    outcomes = await follow(
        late.host.links, key_of(number), peers, LAYOUT, into, patience_s=PATIENCE_S, shunned=shunned
    )
    return bytes(into), outcomes


async def test_who_comes_too_late_has_the_same_bytes_while_the_others_reduce_and_until_their_next_one() -> None:
    async with members() as everybody:
        late, *found = everybody
        got: list[tuple[bytes, dict[int, Outcome]]] = []

        async def come_early() -> None:
            got.append(await followed(late, found, 0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_early)
            results = await reduce(found, 0)
        got.append(await followed(late, found, 0))
        for result in results.values():
            assert got == [(bytes(result.data), result.outcomes)] * 2
        await reduce(found, 1)
        with pytest.raises(UnavailableError, match="3 members"):
            await followed(late, found, 0)


@pytest.mark.parametrize("signs", [False, True])
async def test_one_that_gives_latecomers_something_else_is_passed_over(
    signs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it signs that as its own result, as whoever takes over for an owner would."""
    async with members() as everybody:
        late, *found = everybody
        results = await reduce(found, 0)
        liar, asked = found[1], []

        async def wrong(self: reducing._Reduction, part: int, *, is_data_wanted: bool) -> ResultGiven:
            given = await honest(self, part, is_data_wanted=is_data_wanted)
            if self._me != liar.peer:
                return given
            asked.append(part)
            data = bytes(len(given.data))
            if not signs:
                return replace(given, data=data)
            place = LAYOUT.place(part)
            digest = hashlib.sha256(bytes(place.stop - place.start)).digest()
            outcome = Outcome(liar.peer, given.said.authors, digest)
            return ResultGiven(sign_outcome(self._signer, key_of(0), part, outcome), data)

        honest = reducing._Reduction.given
        monkeypatch.setattr(reducing._Reduction, "given", wrong)
        while not asked:
            data, _ = await followed(late, found, 0)
            assert data == bytes(results[found[0].peer].data)


async def test_nothing_is_taken_that_a_shunned_owner_made() -> None:
    async with members() as everybody:
        late, *found = everybody
        await reduce(found, 0)
        late.shunned.add(found[0].peer)
        with pytest.raises(UnavailableError, match="2 members"):
            await followed(late, found, 0)
