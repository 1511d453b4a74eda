"""Models by name between real nodes: looked up in the DHT, fetched from who is not connected yet, and from no liar."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from shoal.dht.records import Kind, Model, Record, sign_record
from shoal.dht.registry import ModelName
from shoal.node.api.requests import GetModel, PublishModel
from shoal.node.api.schemas import FetchInfo, ModelInfo
from shoal.node.mesh.host import Host, open_host
from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.holders import Holders
from shoal.node.swarm.models import Models
from shoal.node.swarm.names import Names
from shoal.node.swarm.trees import Trees
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import Block, BlockRequest, NameAsked, NameHeld, TreeAsked, TreeHeld
from shoal.protocol.errors import NoPeersError, RefusedError, ShoalError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signed, Signer

GENEROUS_S = 120.0


class Zeros:
    """Where others have the bytes of a folder."""

    async def open(self, peer: PeerId, offset: int, length: int) -> Iterator[memoryview]:
        return iter([memoryview(bytes(length))])


class LyingTrees(Trees):
    """Says that it has whatever it is asked for, and gives zeros, once it is told to."""

    is_liar = False

    async def held(self, request: TreeAsked) -> TreeHeld:
        if not self.is_liar:
            return await super().held(request)
        return TreeHeld(is_whole=True, ref=self._host.links.bulk.offer_source(Zeros(), 2**40))


class LyingNames(Names):
    """Gives these records for any name, once it has some."""

    lies: tuple[Signed, ...] = ()

    async def named(self, request: NameAsked) -> NameHeld:
        return NameHeld(self.lies) if self.lies else await super().named(request)


class LyingContent(ContentStore):
    """Gives this for any block, once it is told to."""

    lie: bytes | None = None

    async def block(self, request: BlockRequest) -> Block:
        return await super().block(request) if self.lie is None else Block(self.lie)


@dataclass(slots=True, eq=False)
class Node:
    host: Host
    signer: Signer
    trees: LyingTrees
    names: LyingNames
    content: LyingContent
    models: Models

    @property
    def me(self) -> PeerId:
        return self.host.peer_id

    async def publish(self, path: Path, name: str, *tags: str) -> ModelInfo:
        return await self.models.publish(PublishModel(path=str(path), name=name, tags=list(tags)))

    async def get(self, model: str, out: Path | None = None) -> FetchInfo:
        return await self.models.get(GetModel(model=model, out="" if out is None else str(out)))


@asynccontextmanager
async def node(folder: Path, number: int, *, is_server: bool = True) -> AsyncIterator[Node]:
    """One that keeps what it has in a folder; a client of the DHT is dialed by nobody for it."""
    router, secret = Router(), bytes([number]) * 32
    with open_storage(folder) as storage:
        async with open_host(
            secret=secret, listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=[], mdns=False, router=router
        ) as host:
            host.table.note_reach(is_reachable=is_server)
            content, holders = LyingContent(storage, host), Holders(host)
            names = LyingNames(storage, host, Signer(secret))
            trees = LyingTrees(storage, host, content, holders)
            for service in (content, trees, names):
                router.add(service)
            models = Models(trees, names, holders, content, storage, host.peer_id)
            models.take_up()
            yield Node(host, Signer(secret), trees, names, content, models)


@asynccontextmanager
async def around_a_hub(
    path: Path, count: int, clients: frozenset[int] = frozenset({1, 2})
) -> AsyncIterator[list[Node]]:
    """So many, each connected to the first alone, at least at first."""
    async with AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(node(path / f"node{number}", number + 1, is_server=number not in clients))
            for number in range(count)
        ]
        with trio.fail_after(GENEROUS_S):
            for each in found[1:]:
                await join(each, found[0])
            yield found


async def join(one: Node, hub: Node) -> None:
    await one.host.connect(hub.host.addresses())
    while not len(one.host.table.core.table):  # noqa: ASYNC110  no event tells of it
        await trio.sleep(0.02)


def open_storage(folder: Path) -> Storage:
    folder.mkdir(exist_ok=True)
    return Storage(folder / "node.db")


def a_folder(path: Path, text: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.txt").write_text(text)
    return path


def version(owner: Node, number: int, content: Cid, *earlier: Cid, name: str = "cart") -> Record:
    """As its owner signs it, in whatever mood."""
    body = Model(content, 7, (), "", earlier)
    return sign_record(owner.signer, Kind.MODEL, name, body, seq=number, now=owner.host.table.now())


async def failure_of(task: Awaitable[object]) -> str:
    with pytest.raises(ShoalError) as caught:
        await task
    return str(caught.value)


@pytest.mark.trio
async def test_a_model_is_found_by_name_and_fetched_from_whom_nobody_was_connected_to(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 3) as (_, ann, bob):
        published = await ann.publish(a_folder(tmp_path / "one", "first"), "cart.v-1", "PPO")
        assert (published.version, published.owner, published.num_told) == (1, ann.me, 1)
        assert ann.me not in bob.host.connected
        found = await bob.models.search("ppo")
        assert [(each.name, each.owner, each.cid) for each in found] == [("cart.v-1", ann.me, published.cid)]
        assert [each.cid for each in await bob.models.search("cart.v-1")] == [published.cid]
        shown = await bob.models.one(f"{ann.me}/cart.v-1")
        assert (shown.cid, shown.stored_on, shown.files) == (published.cid, [ann.me], [])
        assert ann.me not in bob.host.connected
        got = await bob.get(f"{ann.me}/cart.v-1", tmp_path / "out")
        assert (tmp_path / "out" / "model.txt").read_text() == "first"
        assert set(got.sources) == {str(ann.me)}
        assert got.model == f"{ann.me}/cart.v-1@1"
        assert [each.name for each in bob.models.all()] == ["cart.v-1"]
        assert (await bob.models.pin("cart.v-1", True)).is_pinned
        while bob.me not in (await ann.models.one("cart.v-1")).stored_on:  # noqa: ASYNC110  who has it says so
            await trio.sleep(0.2)


@pytest.mark.trio
async def test_a_content_is_found_by_its_cid_alone(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 3) as (_, ann, bob):
        published = await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        await bob.get(published.cid, tmp_path / "out")
        assert (tmp_path / "out" / "model.txt").read_text() == "first"


@pytest.mark.trio
async def test_what_nobody_has_is_told_in_a_line_and_soon(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 3) as (hub, ann, bob):
        with trio.fail_after(15):
            text = await failure_of(bob.get(f"{ann.me}/nothing"))
            assert "nobody who can be reached knows" in text
            assert "\n" not in text
            with pytest.raises(UnavailableError, match="nobody who can be reached has it"):
                await bob.get(Cid.of_block(b"never made"))
            with pytest.raises(UsageError, match="nothing here is called"):
                await bob.get("nothing")
        await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        with pytest.raises(UsageError, match="versions 1 to 1"):
            await bob.get(f"{ann.me}/cart@2")
        for bad in ("../etc", f"{ann.me}/../cart", f"{ann.me}/", f"{ann.me}/cart@0", f"{ann.me}/a/b", "/etc/passwd"):
            with pytest.raises(UsageError):
                await bob.get(bad)
        for bad in ("..", "../cart", "a/b", "/etc", ".hidden", "a\0b", ""):
            with pytest.raises((UsageError, ValueError)):
                await bob.publish(tmp_path / "one", bad)
        assert not hub.trees.records()


@pytest.mark.trio
async def test_a_node_alone_publishes_and_says_where_it_is_and_others_find_it_later(tmp_path: Path) -> None:
    async with node(tmp_path / "ann", 1) as ann:
        published = await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        assert (published.stored_on, published.num_told) == ([ann.me], 0)
        await ann.publish(a_folder(tmp_path / "two", "second"), "gone")
        await ann.models.remove("gone")
    async with node(tmp_path / "ann", 1, is_server=False) as ann, node(tmp_path / "hub", 2) as hub:
        with trio.fail_after(GENEROUS_S):
            with pytest.raises(NoPeersError):
                await hub.get(f"{ann.me}/cart")
            await join(ann, hub)
            async with node(tmp_path / "bob", 3, is_server=False) as bob:
                await join(bob, hub)
                while not await bob.models.search("cart"):  # noqa: ASYNC110  it is said again by itself
                    await trio.sleep(0.2)
                await bob.get(f"{ann.me}/cart", tmp_path / "out")
                assert not await bob.models.search("gone")  # what is not here any more is not said


@pytest.mark.trio
async def test_a_new_version_takes_the_name_and_the_old_one_can_be_had(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 3) as (_, ann, bob):
        one = await ann.publish(a_folder(tmp_path / "one", "first"), "cart", "old")
        assert (await ann.publish(tmp_path / "one", "cart", "old")).version == 1  # the same again is no new one
        two = await ann.publish(a_folder(tmp_path / "two", "second"), "cart", "new")
        assert (two.version, two.cid != one.cid) == (2, True)
        for model, text in ((f"{ann.me}/cart", "second"), (f"{ann.me}/cart@1", "first")):
            await bob.get(model, tmp_path / text)
            assert (tmp_path / text / "model.txt").read_text() == text
        for model, cid in (("cart@1", one.cid), ("cart", two.cid), (one.cid, one.cid)):
            shown = await ann.models.one(model)
            assert (shown.cid, [each.version for each in shown.versions]) == (cid, [2, 1])
        assert sorted((each.name, each.version) for each in bob.models.all()) == [("cart", 1), ("cart", 2)]
        await ann.models.remove("cart@1")
        assert [each.version for each in ann.models.all()] == [2]


@pytest.mark.trio
async def test_a_name_that_changed_twice_while_a_node_was_away_is_the_newest_when_it_is_back(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 2, frozenset({1})) as (hub, ann):
        await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        async with node(tmp_path / "bob", 9, is_server=False) as bob:
            await join(bob, hub)
            assert (await bob.get(f"{ann.me}/cart")).model.endswith("@1")
        await ann.publish(a_folder(tmp_path / "two", "second"), "cart")
        await ann.publish(a_folder(tmp_path / "three", "third"), "cart")
        async with node(tmp_path / "bob", 9, is_server=False) as bob:
            await join(bob, hub)
            with trio.fail_after(10):
                assert (await bob.models.one(f"{ann.me}/cart")).version == 3


@pytest.mark.trio
async def test_a_name_goes_on_with_its_numbers_after_a_restart_and_after_a_lost_disk(tmp_path: Path) -> None:
    async with node(tmp_path / "hub", 1) as hub:
        with trio.fail_after(GENEROUS_S):
            for number, disk in enumerate(("disk", "disk", "new disk"), start=1):
                async with node(tmp_path / disk, 2, is_server=False) as ann:
                    await join(ann, hub)
                    path = a_folder(tmp_path / f"source{number}", f"text {number}")
                    assert (await ann.publish(path, "cart")).version == number


@pytest.mark.trio
async def test_an_older_record_never_wins_whoever_repeats_it(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 3) as (hub, ann, bob):
        await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        old = ann.names.own()["cart"].newest
        two = await ann.publish(a_folder(tmp_path / "two", "second"), "cart")
        assert (await bob.models.one(f"{ann.me}/cart")).cid == two.cid
        hub.names.lies = (old.signed,)
        hub.host.table.core.store._kept.clear()  # it forgot the newest, and keeps the old one
        hub.host.table.core.store._at_key.clear()
        hub.host.table.core.store.put(old, "", hub.host.table.now())
        name = ModelName(ann.me, "cart")
        for asker in (bob, ann):
            known = await asker.names.look_up(name)
            assert known is not None
            assert (known.newest.statement.seq, known.fork) == (2, None)


@pytest.mark.trio
async def test_two_contents_for_one_version_are_shown_and_neither_is_fetched(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 4, frozenset({1, 2, 3})) as (hub, ann, bob, eve):
        one = await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        other = version(ann, 1, Cid.of_block(b"another content"))
        hub.names.lies = (other.signed,)
        text = await failure_of(bob.get(f"{ann.me}/cart", tmp_path / "out"))
        assert "signed two contents for version 1" in text
        assert one.cid in text
        assert other.body.manifest in text
        assert not (tmp_path / "out").exists()
        hub.names.lies = ()
        await eve.host.connect(bob.host.addresses())
        with pytest.raises(RefusedError):  # who has seen it shows it
            await eve.get(f"{ann.me}/cart@1")
        await bob.get(one.cid, tmp_path / "out")  # who knows what it trusts, gets it
        three = version(ann, 2, Cid.of_block(b"a third one"), one.cid)
        hub.names.lies = (three.signed,)
        shown = await bob.models.one(f"{ann.me}/cart")
        assert (shown.version, {each.cid for each in shown.disputed}) == (2, {one.cid, other.body.manifest})


@pytest.mark.trio
async def test_records_of_others_about_others_and_forged_ones_are_nothing(tmp_path: Path) -> None:
    async with around_a_hub(tmp_path, 3) as (hub, ann, bob):
        one = await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        true = ann.names.own()["cart"].newest
        evil = version(hub, 9, Cid.of_block(b"evil"))
        forged = Signed(ann.me, evil.signed.payload, evil.signed.signature)
        other_name = version(ann, 9, Cid.of_block(b"of another model"), name="other")
        for lies in ((evil.signed,), (forged,), (other_name.signed,), (true.signed, forged)):
            hub.names.lies = lies
            shown = await bob.models.one(f"{ann.me}/cart")
            assert (shown.version, shown.cid, shown.disputed) == (1, one.cid, [])
        assert [each.owner for each in await bob.models.search("cart")] == [ann.me]


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["has nothing", "gives other bytes", "is not there"])
async def test_false_holders_cost_time_and_no_byte(tmp_path: Path, kind: str) -> None:
    async with around_a_hub(tmp_path, 6, frozenset({1, 2, 3, 4, 5})) as (_, ann, bob, *liars):
        published = await ann.publish(a_folder(tmp_path / "one", "first"), "cart")
        for liar in liars:
            if kind == "is not there":
                liar.host.table._mesh = Elsewhere(liar.host)  # type: ignore[assignment]
            liar.trees.is_liar = kind == "gives other bytes"
            liar.content.lie = b"evil"
            await liar.host.table.provide(published.cid)
        named = await bob.host.table.find(published.cid)
        assert set(named) == {ann.me, *(liar.me for liar in liars)}
        await bob.get(f"{ann.me}/cart", tmp_path / "out")
        assert (tmp_path / "out" / "model.txt").read_text() == "first"
        if kind == "is not there":
            assert not any(liar.me in bob.host.connected for liar in liars)


class Elsewhere:
    """A host that says that it is where nobody is, and where somebody else is."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def addresses(self) -> tuple[str, ...]:
        victim = next(iter(self._host.connected))
        return (f"/ip4/127.0.0.1/tcp/9/p2p/{self._host.peer_id}", f"/ip4/127.0.0.1/tcp/9/p2p/{victim}")

    def __getattr__(self, name: str) -> object:
        return getattr(self._host, name)
