"""Every fuzz target takes the samples that it starts from, and notices what it is there to notice; without atheris."""

from __future__ import annotations

import importlib
import pkgutil
import random

import pytest

import shoal.node
from shoal.protocol.services import Service

from .harness import BASE_BYTES, TARGETS, FindingError, Target, check_text, load_target, run_traced, warm_up
from .headers import KINDS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_samples(name: str) -> None:
    target = load_target(name)
    warm_up(target)
    seeds = list(target.seeds())
    assert seeds == list(target.seeds()), "the samples differ from one time to the next"
    assert len(set(seeds)) == len(seeds)
    assert max(map(len, seeds)) <= target.max_bytes
    for seed in seeds:
        run_traced(target, seed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_what_it_makes_of_its_samples(name: str) -> None:
    target = load_target(name)
    assert target.mutate is not None
    rng = random.Random(1)

    def flip_one_bit(data: bytes, max_bytes: int) -> bytes:
        flipped = bytearray(data or b"\0")
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped[:max_bytes])

    for seed in list(target.seeds()) * 5:
        mutated = target.mutate(seed, target.max_bytes, rng, flip_one_bit)[: target.max_bytes]
        target.run(mutated)


def test_all_that_any_service_sends_or_takes_is_read_by_a_target() -> None:
    for module in pkgutil.walk_packages(shoal.node.__path__, "shoal.node."):
        importlib.import_module(module.name)
    services = [Service]
    for service in services:
        services += service.__subclasses__()
    methods = [
        method for service in services if service.__module__.startswith("shoal.") for method in service.methods.values()
    ]
    assert len(methods) >= 10
    for method in methods:
        for kind in (method.request, method.answer):
            assert KINDS.get(kind.__name__) is kind, f"fuzz/headers.py does not know {method.name}'s {kind.__name__}"


def test_a_target_that_takes_too_much_memory_is_caught() -> None:
    def allocate(_: bytes) -> None:
        bytearray(2 * BASE_BYTES)

    with pytest.raises(FindingError, match="allocate"):
        run_traced(Target(run=allocate, seeds=list), b"x")


@pytest.mark.parametrize("text", ["a line\nand another", "\x1b[2J", "x" * 3000])
def test_an_error_that_could_spoil_a_log_is_caught(text: str) -> None:
    with pytest.raises(FindingError):
        check_text(text)
