"""The door for training loops: one at a time, whoever comes meanwhile hears why not, and the dead do not block it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from shoal.node.swarm.loops import Door, open_door
from shoal.protocol.ids import PeerId

ME = PeerId.of_public_key(b"m" * 32)
SOON_S = 20.0
# A loop that connects, starts a child which inherits the connection, and says so.
LOOP = """
import os, socket, sys, time
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(100)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def soon() -> None:
        with trio.fail_after(SOON_S):
            await test()

    trio.run(soon)


async def connected(door: Door) -> trio.SocketStream:
    return await trio.open_unix_socket(str(door.path))  # type: ignore[no-any-return, unused-ignore]


def test_only_this_user_can_open_it_and_it_goes_with_the_run(tmp_path: Path) -> None:
    async def scene() -> None:
        async with open_door(tmp_path / "loop.sock") as door:
            assert stat.S_IMODE(door.path.stat().st_mode) == 0o600
        assert not door.path.exists()
        async with open_door(tmp_path / ("x" * 150) / "loop.sock") as elsewhere:
            assert len(os.fsencode(elsewhere.path)) <= 107
            await (await connected(elsewhere)).aclose()

    run(scene)


def test_one_loop_at_a_time_and_the_next_when_it_has_gone(tmp_path: Path) -> None:
    async def scene() -> None:
        gone = trio.Event()
        async with open_door(tmp_path / "loop.sock") as door, await connected(door) as first:
            assert await first.receive_some() == b"welcome\n"
            async with door.next_loop(ME, gone.set) as (channel, _):
                async with await connected(door) as second:
                    refused = await second.receive_some()
                    assert f"the process {os.getpid()} is attached".encode() in refused
                    assert await second.receive_some() == b""
                assert door.num_refused == 1
                assert channel.is_open
                third = await connected(door)
                await first.aclose()
                await gone.wait()
                assert not channel.is_open
            async with third:
                assert await third.receive_some() == b"welcome\n", "it came just before the other had gone"

    run(scene)


def test_a_loop_that_was_killed_has_gone_although_its_children_hold_the_connection(tmp_path: Path) -> None:
    async def scene() -> None:
        gone = trio.Event()
        async with open_door(tmp_path / "loop.sock") as door:
            loop = await trio.lowlevel.open_process(
                [sys.executable, "-c", LOOP, str(door.path)], stdout=subprocess.PIPE
            )
            try:
                async with door.next_loop(ME, gone.set):
                    assert loop.stdout is not None
                    async with loop.stdout as said:
                        child = int(await said.receive_some())
                    loop.kill()
                    await gone.wait()
                    os.kill(child, 0)  # it lives
                    os.kill(child, 9)
            finally:
                loop.kill()
                with trio.CancelScope(shield=True):
                    await loop.wait()

    run(scene)


def test_a_door_takes_the_place_of_one_that_a_killed_node_left(tmp_path: Path) -> None:
    path = tmp_path / "loop.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def scene() -> None:
        async with open_door(path) as door, await connected(door) as loop:
            assert await loop.receive_some() == b"welcome\n"

    run(scene)
