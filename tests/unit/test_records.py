"""What is kept of a run: the newest policy, however slow the disk is, and on the way out at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from shoal.node.store.database import Storage
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.needs import Needs
from shoal.node.swarm.records import Records, read_stored
from shoal.node.swarm.replica import Replica
from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.electorate import Electorate
from shoal.training.manifest import Manifest, Role
from shoal.training.run import Run
from shoal.training.run_events import Keep, Policy, Write
from shoal.training.saving import SPARED_S, Sparing
from shoal.training.statements import NO_BALLOT

ME = Signer(bytes([1]) * 32).peer_id
SWARM = SwarmId.of_manifest(b"one")
RUN = Manifest(owner=ME, task="gym:CartPole-v1", algorithm="ppo", hyperparameters={})


def policy(epoch: int) -> Policy:
    """Of an epoch."""
    return Policy(epoch, Cid.of_block(bytes([epoch])), "", 100 * epoch, None, NO_BALLOT, Electorate())


@pytest.fixture(autouse=True)
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps does not wait for threads."""

    async def run_here(call: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)


class Disk:
    """Contents on a disk that takes a while for each."""

    def __init__(self, took_s: float) -> None:
        self.took_s = took_s
        self.kept: list[tuple[Cid, ...]] = []

    async def keep(self, owner: str, cids: Sequence[Cid]) -> None:
        await trio.sleep(self.took_s)
        self.kept.append(tuple(cids))


class Document:
    """This node's, as far as it is written."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def documents(self) -> dict[str, Any]:
        return {}

    async def write(self, **registers: Any) -> None:
        await trio.sleep(1)
        self.written.append(registers)


def kept_by(path: Path, took_s: float, main: Callable[[Run, Records, Document], Awaitable[None]]) -> list[int]:
    """Which epoch was kept in the end, on a disk that takes so long; by a clock that jumps."""
    found: list[int] = []

    async def run() -> None:
        with Storage(path / "node.db") as storage:
            core = Run(RUN, SWARM, ME, Role.LEARNER, trio.current_time())
            document = Document()
            records = Records(
                *(RUN, SWARM, ME, core, Needs(), cast(Replica, document)),
                *(cast(ContentStore, Disk(took_s)), storage, lambda error: pytest.fail(error)),
            )
            await main(core, records, document)
            result = read_stored(storage, SWARM).result
            found.append(0 if result is None else result.epoch)

    trio.run(run, clock=MockClock(autojump_threshold=0))
    return found


@pytest.mark.parametrize("took_s", [0.01, 1.0, 20.0])
def test_the_newest_policy_is_kept_on_the_way_out_however_slow_the_disk_is(tmp_path: Path, took_s: float) -> None:
    async def main(core: Run, records: Records, _: Document) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.write)
            for epoch in range(1, 12):
                core.progress.policy = policy(epoch)
                records.add(Keep(policy(epoch)))
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
        await records.write_last()

    assert kept_by(tmp_path, took_s, main) == [11]


@pytest.mark.parametrize("took_s", [0.01, 1.0, 20.0])
def test_what_a_slow_disk_puts_off_is_kept_though_nothing_comes_after_it(tmp_path: Path, took_s: float) -> None:
    async def main(_: Run, records: Records, __: Document) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.write)
            for epoch in (1, 2, 3):
                records.add(Keep(policy(epoch)))
                await trio.sleep(1)
            await trio.sleep(100)  # and the node is killed
            nursery.cancel_scope.cancel()

    assert kept_by(tmp_path, took_s, main) == [3]


def test_what_was_about_to_be_written_into_the_document_is_written_on_the_way_out(tmp_path: Path) -> None:
    async def main(core: Run, records: Records, document: Document) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.write)
            core.progress.policy = policy(4)
            records.add(Write(policy(4), 400, 4))
            await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
        assert not document.written
        await records.write_last()
        assert [each["policy"]["epoch"] for each in document.written] == [4]

    assert kept_by(tmp_path, 0.01, main) == [4]


def test_writing_takes_a_tenth_of_the_time_and_of_a_slow_disk_a_quarter() -> None:
    sparing = Sparing()
    for took_s, rest_s in ((0.1, 0.9), (0.5, 4.5), (1.5, SPARED_S), (10.0, 30.0)):
        sparing.wrote(100.0, 100.0 + took_s)
        assert sparing.next_at == pytest.approx(100.0 + took_s + rest_s)
