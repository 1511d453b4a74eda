"""Looking a task up: what a run of it needs, found out in a process of its own that does not outlive the question.

That process loads what the task is made of, which is other people's code, and tries a few steps. It is kept as a worker
is (`shoal.training.keeper`): in a group of its own, away from the folder in which the node was started, with what it
prints apart from what it answers.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import trio

from shoal.node.swarm.workers import child_environment
from shoal.protocol.codec import from_plain
from shoal.protocol.errors import ShoalError, UsageError
from shoal.training.env_arguments import check_arguments
from shoal.training.plugins import check_plugin

log = logging.getLogger(__name__)

LOOK_UP_S: Final = 60.0
END_S: Final = 3.0
MAX_ANSWER_BYTES: Final = 65_536
MAX_NAME_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What a run needs.

    Attributes:
        target_return: the task's own, if it has one.
        requires: what its members must have, as `shoal.training.requirements` says it.
        defaults: of the manifest's fields, where the task or the algorithm has others than most.
    """

    target_return: float | None
    requires: dict[str, int]
    defaults: dict[str, Any]


async def look_up(task: str, algorithm: str, arguments: Mapping[str, Any] | None = None) -> LookedUp:
    """What ``python -m shoal.training.tasks`` says.

    Args:
        task: ``scheme:name``.
        algorithm: its name.
        arguments: what the task's environments are made with.

    Raises:
        UsageError: if a name can be none, nobody here offers anything by it, or there can be no such run.
        ShoalError: if it says nothing, or not in time.
    """
    for name in (task, algorithm):
        if not name.isprintable() or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
            raise UsageError(f"{name[:80]!r} can be no name; names are of up to {MAX_NAME_BYTES} printable characters")
    scheme, colon, rest = task.partition(":")
    if not (scheme and colon and rest):
        raise UsageError(f"task {task[:80]!r} needs a scheme and a name, for example gym:CartPole-v1")
    check_arguments(arguments or {})
    check_plugin("shoal.tasks", "task scheme", scheme)
    check_plugin("shoal.algorithms", "algorithm", algorithm)
    made_with = json.dumps(dict(arguments or {}))
    reader, writer = os.pipe()
    stream = trio.lowlevel.FdStream(reader)
    said, answer = bytearray(), bytearray()
    async with stream:
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", "shoal.training.tasks", str(writer), "--", task, algorithm, made_with],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                start_new_session=True,
                cwd="/",
                env=child_environment(),
            )
        finally:
            os.close(writer)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read, process.stdout, said)
                with trio.move_on_after(LOOK_UP_S):
                    await _read(stream, answer)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                process.terminate()
                with trio.move_on_after(END_S):
                    await process.wait()
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
    try:
        found = json.loads(answer)
    except ValueError as error:
        printed = said.decode(errors="replace")[-2000:]
        log.warning("looking %s up failed (code %s): %s", task, process.returncode, printed)
        lines = printed.strip().splitlines() or ["it took too long"]
        raise ShoalError(f"the task {task!r} could not be looked up: {lines[-1][:300]}; the log has more") from error
    if isinstance(found, dict) and "error" in found:
        raise UsageError(str(found["error"]))
    return from_plain(LookedUp, found)


async def _read(stream: trio.abc.ReceiveStream | None, into: bytearray) -> None:
    """Keep the end of what comes, until no more does."""
    if stream is not None:
        async for data in stream:
            into += data
            del into[:-MAX_ANSWER_BYTES]
