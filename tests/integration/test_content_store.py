"""Content on a real disk and between real hosts."""

import pytest
import trio

from shoal.node.mesh.host import open_host
from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore, UnavailableError
from shoal.node.wire.channel import Router
from shoal.protocol.ids import Cid

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


@pytest.mark.trio
async def test_content_comes_from_a_peer_and_what_nobody_has_is_said_to_be_unavailable(tmp_path):
    with trio.fail_after(30), Storage(tmp_path / "a.db") as disk_a, Storage(tmp_path / "b.db") as disk_b:
        router_a, router_b = Router(), Router()
        async with (
            open_host(secret=b"a" * 32, listen=LISTEN, bootstrap=[], mdns=False, router=router_a) as a,
            open_host(secret=b"b" * 32, listen=LISTEN, bootstrap=[], mdns=False, router=router_b) as b,
        ):
            store_a, store_b = ContentStore(disk_a, a), ContentStore(disk_b, b)
            for router, store in ((router_a, store_a), (router_b, store_b)):
                router.add(store)
            await b.connect(a.addresses())
            data = bytes(range(256)) * 12_345  # three blocks
            cid = await store_a.put(data, keep=True)
            assert await store_b.get(cid, [a.peer_id], keep=True) == data
            assert await store_b.get(cid, [], keep=False) == data
            with pytest.raises(UnavailableError):
                await store_b.get(Cid.of_block(b"never made"), [a.peer_id], keep=False, timeout_s=5)


@pytest.mark.trio
async def test_a_full_store_lets_the_oldest_go_but_never_the_manifest_of_a_run(tmp_path):
    with Storage(tmp_path / "node.db") as disk:
        async with open_host(secret=b"a" * 32, listen=LISTEN, bootstrap=[], mdns=False, router=Router()) as host:
            store = ContentStore(disk, host, memory_bytes=0, disk_bytes=100_000)
            manifest = await store.put(b"the manifest of a run", keep=True, is_plain=True)
            first = await store.put(b"0" * 10_000, keep=True)
            for index in range(1, 40):
                newest = await store.put(f"{index:05}".encode() * 2_000, keep=True)
            assert disk.blocks_size() < 120_000
            assert store.find(first) is None
            assert store.find(newest) is not None
            assert store.find(manifest) == b"the manifest of a run"
