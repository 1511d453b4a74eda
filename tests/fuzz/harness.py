"""What a fuzz target is, and what is asked of each of its runs.

A target is a function of bytes that returns, whatever the bytes are. It catches the errors that its decoder documents
(`refusing`) and asserts what must hold of the rest. Anything that escapes is a finding. Beside that, for every target:

* What an error says is short and printable: it ends in logs and on terminals, and the peer must not choose what it does
  there.
* Memory: the peak of what Python allocates during one input is at most `BASE_BYTES` plus `BYTES_PER_BYTE` times the
  input's length (or what the target allows). This is tracemalloc's peak. libFuzzer's ``-malloc_limit_mb`` has no effect
  here: it hooks the allocator through a sanitizer, and Python runs without one. Tracing costs a factor of three or so,
  so under the fuzzer it is done for one input in `TRACED`; which one depends on the bytes alone, so that a finding is
  found again. What Rust and C allocate by themselves is bounded by ``-rss_limit_mb``.
* Time: libFuzzer's ``-timeout``, per input.

Nothing in here, and in no target, needs atheris: a target runs on its own seeds in the ordinary test suite.
"""

from __future__ import annotations

import gc
import importlib
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar, cast

from shoal.protocol.errors import ShoalError

T = TypeVar("T")

TARGETS: Final = ("frames", "rpc", "headers", "tensors", "manifests", "records", "states", "bulk", "reach", "shards")
"""Names of targets; each is a module of this package with a `Target` called ``TARGET``."""

BASE_BYTES: Final = 1024 * 1024
BYTES_PER_BYTE: Final = 256
"""An empty map is one byte on the wire and about 90 in memory, and plain data is copied once when it is checked."""

TRACED: Final = 16

MAX_ERROR_CHARS: Final = 2000

MutateBytes = Callable[[bytes, int], bytes]
"""libFuzzer's own mutation: the bytes, and how long the result may be."""

Mutate = Callable[[bytes, int, Random, MutateBytes], bytes]
"""A target's own mutation: the bytes, how long the result may be, a source of chance, and libFuzzer's mutation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One decoder under test.

    Attributes:
        run: reads one input; raises only for a finding.
        seeds: valid inputs, made by our own encoders.
        mutate: makes mostly valid inputs out of others; libFuzzer's own mutation, if there is none.
        max_bytes: the longest input to try.
        max_peak_bytes: the peak of memory that an input of this length may cause.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutate | None = None
    max_bytes: int = 4096
    max_peak_bytes: Callable[[int], int] = lambda length: BASE_BYTES + BYTES_PER_BYTE * length


class FindingError(AssertionError):
    """A promise was broken."""


def load_target(name: str) -> Target:
    """The target of this name; imports what it tests."""
    return cast(Target, importlib.import_module(f".{name}", __package__).TARGET)


def require(holds: object, promise: str) -> None:
    """Check an invariant; unlike ``assert``, also under ``python -O``."""
    if not holds:
        raise FindingError(promise)


@contextmanager
def refusing(*expected: type[ShoalError]) -> Iterator[None]:
    """Whatever of the expected errors the decoder raises inside is a refusal, and fine if it is well said."""
    try:
        yield
    except expected as error:
        check_text(str(error))


def unless_refused(read: Callable[[], T], *expected: type[ShoalError]) -> T | None:
    """What was read, or None if it is refused by one of the expected errors."""
    try:
        return read()
    except expected as error:
        check_text(str(error))
        return None


def check_text(text: str) -> None:
    """Check that what an error says may go to a log or a terminal."""
    require(len(text) <= MAX_ERROR_CHARS, f"an error of {len(text)} characters: {text[:100]!r}…")
    require(text.isprintable(), f"an error that is not printable: {text[:500]!r}")


@contextmanager
def allocating_at_most(max_bytes: int) -> Iterator[None]:
    """Check the peak of memory of what is done inside, if memory is traced now; what was before it counts no more."""
    if not tracemalloc.is_tracing():
        yield
        return
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        require(peak <= max_bytes, f"a step made Python allocate {peak} bytes, more than {max_bytes}")


def run_traced(target: Target, data: bytes) -> int:
    """Run one input and check its peak of memory.

    What is seen once and not again was no decoder's: coverage keeps tables of its own, which grow now and then.

    Returns:
        The peak, in bytes.
    """
    limit = target.max_peak_bytes(len(data))
    peak = _peak_of(target, data)
    if peak > limit:
        peak = min(peak, _peak_of(target, data))
    require(peak <= limit, f"{len(data)} bytes of input made Python allocate {peak} bytes, more than {limit}")
    return peak


def _peak_of(target: Target, data: bytes) -> int:
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        target.run(data)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not was_tracing:
            tracemalloc.stop()


def run_sampled(target: Target, data: bytes) -> None:
    """Run one input, and check its peak of memory if it is one of the sample."""
    if zlib.crc32(data) % TRACED == 0:
        run_traced(target, data)
    else:
        target.run(data)


def warm_up(target: Target) -> None:
    """Run the seeds, so that caches are filled before anything is measured."""
    for seed in target.seeds():
        target.run(seed)
    gc.collect()
