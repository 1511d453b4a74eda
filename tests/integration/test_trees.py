"""Folders between real nodes: what was published is what arrives, from many, from liars' neighbours, after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from shoal.dht.tree_fetch import MAX_OPEN_BLOCKS
from shoal.node.api.client import Client
from shoal.node.api.requests import GetModel, PublishModel
from shoal.node.mesh.host import open_host
from shoal.node.profile import ProfilePaths
from shoal.node.store.blocks import BlockStore
from shoal.node.store.database import Storage
from shoal.node.store.errors import StorageFullError
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.swarm.holders import Holders
from shoal.node.swarm.trees import Trees
from shoal.node.wire.channel import Router
from shoal.node.wire.contracts import TreeHeld
from shoal.protocol.errors import RemoteError, ResourceError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


def a_folder(path: Path, num_bytes: int = 5_300_000, seed: int = 1) -> Path:
    rng = random.Random(seed)
    (path / "a" / "empty").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "a" / "b.bin").write_bytes(rng.randbytes(3000))
    (path / "model.safetensors").write_bytes(rng.randbytes(num_bytes))
    (path / "nothing").write_bytes(b"")
    os.truncate(path / "nothing", 0)
    with (path / "sparse").open("wb") as file:
        file.truncate(3 * BLOCK_BYTES + 5)
    return path


def contents(path: Path) -> dict[str, bytes | None]:
    return {
        str(each.relative_to(path)): each.read_bytes() if each.is_file() else None for each in sorted(path.rglob("*"))
    }


class BadTrees(Trees):
    """Says that it has all, and gives it in a bad way, once it is told to."""

    bad_source = None
    bad_held = None

    async def held(self, request):
        if self.bad_source is None:
            return await (self.bad_held or super().held)(request)
        return TreeHeld(is_whole=True, ref=self._host.links.bulk.offer_source(self.bad_source, 2**40))


class BadSource:
    """Other bytes, and no zeros, which a sparse file has; or a part of them; or a refusal; or nothing at all."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def open(self, peer: object, offset: int, length: int) -> Iterator[memoryview]:
        if self.kind == "refuses":
            raise RemoteError(Status.NOT_FOUND, "never had it")
        if self.kind == "stalls":
            await trio.sleep_forever()
        return self.read(length)

    def read(self, length: int) -> Iterator[memoryview]:
        if self.kind == "breaks":
            yield memoryview(b"x" * (length // 2))
            raise RemoteError(Status.NOT_FOUND, "there is no more")
        yield memoryview(b"x" * length)


@asynccontextmanager
async def nodes(path: Path, count: int, **limits: int):
    """So many, each connected to the first."""
    async with AsyncExitStack() as stack:
        found = []
        for number in range(count):
            folder = path / f"node{number}"
            folder.mkdir()
            disk = stack.enter_context(Storage(folder / "node.db"))
            router = Router()
            host = await stack.enter_async_context(
                open_host(secret=bytes([number + 1]) * 32, listen=LISTEN, bootstrap=[], mdns=False, router=router)
            )
            content = ContentStore(disk, host, **limits)
            trees = BadTrees(disk, host, content, Holders(host))
            router.add(content)
            router.add(trees)
            found.append(SimpleNamespace(host=host, disk=disk, content=content, trees=trees))
        for node in found[1:]:
            await node.host.connect(found[0].host.addresses())
        with trio.fail_after(60):
            while len(found[0].host.connected) < count - 1:  # noqa: ASYNC110  no event tells of it
                await trio.sleep(0.01)
            yield found


@pytest.mark.trio
async def test_what_was_published_is_what_arrives_and_is_given_on(tmp_path):
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 3) as (ann, bob, eve):
        record = await ann.trees.publish(source, "model", ["one"])
        got = await bob.trees.get(record.cid, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(source)
        assert got.sources == {ann.host.peer_id: got.num_bytes}
        assert got.num_bytes < 7 * BLOCK_BYTES  # equal blocks once
        assert bob.trees.record(record.cid).is_whole
        again = await bob.trees.get(record.cid, tmp_path / "again")
        assert again.sources == {}
        await eve.host.connect(bob.host.addresses())
        await ann.host.disconnect(eve.host.peer_id)
        await eve.trees.get(record.cid, tmp_path / "third")
        assert contents(tmp_path / "third") == contents(source)
        assert bob.host.peer_id in (await eve.trees.get(record.cid, None)).sources or eve.disk.trees.num_bytes


@pytest.mark.trio
async def test_a_file_alone_and_a_folder_of_nothing(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "nothing").mkdir()
    async with nodes(tmp_path, 2) as (ann, bob):
        for name in ("one.txt", "nothing"):
            record = await ann.trees.publish(tmp_path / name, name, [])
            await bob.trees.get(record.cid, tmp_path / f"out {name}")
        assert contents(tmp_path / "out one.txt") == {"one.txt": b"one"}
        assert contents(tmp_path / "out nothing") == {}


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["lies", "breaks", "refuses", "stalls"])
async def test_a_bad_source_costs_time_and_no_byte(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("shoal.node.swarm.trees.SILENCE_S", 0.5)
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 3) as (ann, bob, eve):
        record = await ann.trees.publish(source, "model", [])
        eve.trees.bad_source = BadSource(kind)
        await bob.host.connect(eve.host.addresses())
        got = await bob.trees.get(record.cid, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(source)
        assert set(got.sources) == {ann.host.peer_id}


@pytest.mark.trio
async def test_alone_with_a_liar_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.dht.tree_fetch.LONELY_S", 1.0)
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 2) as (eve, bob):
        record = await eve.trees.publish(source, "model", [])
        eve.trees.bad_source = BadSource("lies")
        with pytest.raises(UnavailableError, match="other bytes"):
            await bob.trees.get(record.cid, tmp_path / "out")
        assert not [each for each in tmp_path.iterdir() if "out" in each.name]
        eve.trees.bad_source = None
        await bob.trees.get(record.cid, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(source)


@pytest.mark.trio
async def test_what_a_giver_lost_is_not_given(tmp_path):
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 3) as (ann, bob, eve):
        record = await ann.trees.publish(source, "model", [])
        await eve.trees.publish(source, "model", [])
        await bob.host.connect(eve.host.addresses())
        for file in (tmp_path / "node2" / "models").glob("*/*"):
            file.write_bytes(b"x" * file.stat().st_size)
        got = await bob.trees.get(record.cid, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(source)
        assert set(got.sources) == {ann.host.peer_id}


@pytest.mark.trio
async def test_blocks_that_the_disk_lost_come_again(tmp_path):
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 2) as (ann, bob):
        record = await ann.trees.publish(source, "model", [])
        await bob.trees.get(record.cid, None)
        files = sorted((tmp_path / "node1" / "models").glob("*/*"))
        files[0].write_bytes(b"rot")
        files[1].unlink()
        os.truncate(files[2], 0)
        await bob.trees.get(record.cid, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(source)
        assert bob.disk.trees.num_damaged == 3


@pytest.mark.trio
async def test_what_there_is_no_room_for_is_refused_and_the_oldest_goes_first(tmp_path):
    async with nodes(tmp_path, 2, disk_bytes=12 * BLOCK_BYTES) as (ann, bob):
        found = []
        for number in range(2):
            folder = tmp_path / f"source{number}"
            folder.mkdir()
            (folder / "data").write_bytes(random.Random(number).randbytes(5 * BLOCK_BYTES))
            found.append(await ann.trees.publish(folder, str(number), []))
        (tmp_path / "source0" / "more").write_bytes(random.Random(9).randbytes(4 * BLOCK_BYTES))
        with pytest.raises(ResourceError, match="no room"):
            await ann.trees.publish(tmp_path / "source0", "third", [])
        assert [record.name for record in ann.trees.records()] == ["0", "1"]
        await bob.trees.get(found[0].cid, None)
        await bob.trees.get(found[1].cid, None)
        await ann.trees.set_pinned(found[0].cid, False)
        await ann.trees.remove(found[1].cid)
        third = await ann.trees.publish(tmp_path / "source0" / "more", "third", [])
        await bob.trees.get(third.cid, None)
        assert [record.cid for record in bob.trees.records()] == sorted([found[1].cid, third.cid])


@pytest.mark.trio
async def test_a_full_disk_is_told_and_the_next_try_goes_on(tmp_path, monkeypatch):
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 2) as (ann, bob):
        record = await ann.trees.publish(source, "model", [])
        real = BlockStore.put

        def put(store: BlockStore, blocks: object, **how: bool) -> None:
            if store is bob.disk.trees and len(store) >= 2:
                raise StorageFullError("the disk is full")
            real(store, blocks, **how)

        monkeypatch.setattr(BlockStore, "put", put)
        with pytest.raises(StorageFullError):
            await bob.trees.get(record.cid, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        got = await bob.trees.get(record.cid, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(source)
        assert got.num_bytes <= got.size - 2 * 3000


@pytest.mark.trio
async def test_what_cannot_be_done_is_told(tmp_path):
    source = a_folder(tmp_path / "source")
    async with nodes(tmp_path, 2) as (ann, bob):
        record = await ann.trees.publish(source, "model", [])
        with pytest.raises(UsageError, match="name of"):
            await ann.trees.publish(source / "a", "model", [])
        with pytest.raises(UsageError, match="there already"):
            await bob.trees.get(record.cid, source)
        with pytest.raises(UsageError, match="no folder"):
            await bob.trees.get(record.cid, tmp_path / "no" / "where")
        with pytest.raises(ShoalError, match="cannot be had"):
            await bob.trees.get(Cid.of_block(b"never made"), None)
        other = await ann.content.put(b"no folder at all, but a content", owner="run")

        async def held(_: object) -> TreeHeld:
            return TreeHeld(is_whole=True)

        ann.trees.bad_held = held
        with pytest.raises(UsageError, match="not name a folder"):
            await bob.trees.get(other, None)
        (source / "CON").write_text("")
        with pytest.raises(UsageError, match="Windows"):
            await ann.trees.publish(source, "bad", [])


# --- nodes that are killed ---


def up(home: Path, profile: str, *words: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "shoal.cli.main", "up", "--json", "--profile", profile, "--no-mdns"]
    process = subprocess.Popen(
        [*command, "--listen", LISTEN[0], *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"SHOAL_HOME": str(home)},
    )
    assert process.stdout is not None
    with process.stdout:
        return process, json.loads(process.stdout.readline())["addresses"][0]


def test_a_receiver_that_is_killed_again_and_again_fetches_hardly_anything_twice(tmp_path):
    size = 24 * BLOCK_BYTES
    source = tmp_path / "source"
    source.mkdir()
    (source / "model").write_bytes(random.Random(3).randbytes(size))
    giver, address = up(tmp_path, "giver")
    taker = None
    rng = random.Random(5)
    kept = []
    try:
        with Client(ProfilePaths(tmp_path / "profiles" / "giver"), "giver") as client:
            cid = str(client.publish_model(PublishModel(path=str(source), name="model")).cid)
        for number in range(4):
            taker, _ = up(tmp_path, "taker", "--bootstrap", address, "--max-download", "60")
            with Client(ProfilePaths(tmp_path / "profiles" / "taker"), "taker") as client:
                deadline = time.monotonic() + 30
                while not client.peers() and time.monotonic() < deadline:
                    time.sleep(0.02)
                kept.append(len(list((tmp_path / "profiles" / "taker").glob("models/*/bafk*"))))
                if number == 3:
                    fetched = client.get_model(GetModel(model=cid, out=str(tmp_path / "out")))
                    break
                asking = subprocess.Popen(
                    [sys.executable, "-m", "shoal.cli.main", "model", "get", cid, "--profile", "taker", "--json"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"SHOAL_HOME": str(tmp_path)},
                )
                wanted = kept[-1] + rng.randint(3, 6)
                while len(list((tmp_path / "profiles" / "taker").glob("models/*/bafk*"))) < wanted:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                taker.send_signal(signal.SIGKILL)
                taker.wait()
                asking.wait()
        with Client(ProfilePaths(tmp_path / "profiles" / "giver"), "giver") as client:
            given = client.node().use.upload_bytes
    finally:
        for process in (giver, taker):
            if process is not None:
                process.kill()
                process.wait()
    assert contents(tmp_path / "out") == contents(source)
    assert kept == sorted(kept)  # what was there is there after each kill
    assert kept[-1] >= 9
    assert fetched.num_bytes == size - kept[-1] * BLOCK_BYTES
    assert given < size + 3 * MAX_OPEN_BLOCKS * BLOCK_BYTES  # at most what was on its way at each kill
