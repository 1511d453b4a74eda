"""Where this process is inside of an environment, and what happens when it does not come back from there.

Environments are other people's code: they may wait for ever. Nothing is counted against a fixed time but a single call
of one of them: while calls come back, a chunk or an evaluation takes as long as it takes. A thread looks every quarter
of a second; one call that has lasted for longer than the patience is interrupted where it stands by `HungError`, so
that it leaves its traceback and the other environments go on. One that cannot be interrupted, since it never comes back
from C, ends the process, which is replaced; so does one that holds Python's lock, by way of faulthandler's own thread.

What is going on stands on a page of memory that the node reads (`Slot`): so it knows a process that hangs as a whole,
and can say of one that is gone where it was.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import threading
import time
from array import array
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Final, TextIO

PAGE_BYTES: Final = 4096
TICK_S: Final = 0.25
PATIENCE_S: Final = 4.0
"""How long one step or reset may take; ``SHOAL_ENV_PATIENCE`` names another time."""
MAKING: Final = 2.0
"""How many times as long it may take to make an environment."""
LOCKED_S: Final = 8.0
"""How long Python's lock may be held."""
GRACE_S: Final = 1.0
"""How long a call that was interrupted may take to come back."""
EXIT_HUNG: Final = 75
INDEX_BITS: Final = 32
PATIENCE_VARIABLE: Final = "SHOAL_ENV_PATIENCE"


class Slot(IntEnum):
    """What stands where on the page, each a 64-bit number.

    BEATS: rises as long as the process runs.
    PLACE: what it does in which environment: an `Act`, and the environment's number in the lower 32 bits.
    CALLS: rises with what is done: environment steps, minibatches.
    BUSY: whether it works on a call of the node.
    """

    BEATS = 0
    PLACE = 1
    CALLS = 2
    BUSY = 3


class Act(IntEnum):
    """What an environment is asked to do, shifted to where `Slot.PLACE` has it."""

    NOTHING = 0
    STEP = 1 << INDEX_BITS
    RESET = 2 << INDEX_BITS
    MAKE = 3 << INDEX_BITS
    CLOSE = 4 << INDEX_BITS

    @property
    def words(self) -> str:
        """As a sentence names it."""
        return "its constructor" if self is Act.MAKE else self.name.lower()


class HungError(BaseException):
    """An environment did not come back; raised in it. Not an `Exception`: it may catch those as its own."""


def place_of(number: int) -> tuple[Act, int]:
    """What `Slot.PLACE` says: what was done, in which environment."""
    return Act(number >> INDEX_BITS << INDEX_BITS), number & ((1 << INDEX_BITS) - 1)


def patience_s() -> float:
    """How long one step or reset may take."""
    try:
        seconds = float(os.environ.get(PATIENCE_VARIABLE, PATIENCE_S))
    except ValueError:
        return PATIENCE_S
    return seconds if 0 < seconds < math.inf else PATIENCE_S


page: memoryview = memoryview(array("Q", bytes(PAGE_BYTES)))
"""Of this process; what is written here costs less than any call, since it is written for every step."""


def use(shared: memoryview) -> None:
    """Write on memory that the node sees."""
    global page
    page = shared.cast("B").cast("Q")


def begin(report: Path | None, on_stuck: Callable[[str], None] = lambda _: None) -> None:
    """Look after the thread that calls this, which is to be the process's main one, until the process ends.

    Args:
        report: the file that gets the tracebacks of what ends the process; none: stderr.
        on_stuck: told in one line what is about to end the process.
    """
    file = None if report is None else report.open("a", encoding="utf-8")
    if file is not None:
        faulthandler.enable(file)
    signal.signal(signal.SIGALRM, _interrupt)
    page[Slot.BEATS] += 1  # from here on it may hang, and be seen to
    main = threading.get_ident()
    threading.Thread(target=_look, args=(main, file, on_stuck), name="watch", daemon=True).start()


_suspect = (0, 0)  # (place, calls) of what is to be interrupted


def _interrupt(number: int, frame: FrameType | None) -> None:
    """In the main thread, at the line that hangs; nothing happens if it has just gone on."""
    if _suspect == (page[Slot.PLACE], page[Slot.CALLS]) and _suspect[0]:
        raise HungError(f"did not come back in {_patience(_suspect[0]):g} s")


def _patience(place: int) -> float:
    return patience_s() * (MAKING if place_of(place)[0] is Act.MAKE else 1)


def _look(main: int, file: TextIO | None, on_stuck: Callable[[str], None]) -> None:
    global _suspect
    seen, ticks = (0, 0), 0
    lasting = {"exit": True} if file is None else {"exit": True, "file": file}
    while True:
        faulthandler.dump_traceback_later(LOCKED_S, **lasting)
        time.sleep(TICK_S)
        page[Slot.BEATS] += 1
        now = (page[Slot.PLACE], page[Slot.CALLS])
        if now != seen or not now[0]:
            seen, ticks = now, 0
            continue
        ticks += 1  # and not the time, which goes on while a process is stopped
        limit_s = _patience(now[0])
        if ticks * TICK_S >= limit_s + GRACE_S:
            on_stuck(f"did not come back in {limit_s:g} s, and could not be interrupted")
            faulthandler.dump_traceback(*(() if file is None else (file,)))
            os._exit(EXIT_HUNG)
        if ticks * TICK_S >= limit_s:
            _suspect = now
            signal.pthread_kill(main, signal.SIGALRM)
