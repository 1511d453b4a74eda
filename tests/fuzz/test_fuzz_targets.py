"""Every fuzz target takes the samples that it starts from, and notices what it is there to notice; without atheris."""

from __future__ import annotations

import random

import pytest

from .harness import BASE_BYTES, TARGETS, FindingError, Target, check_text, load_target, run_traced, warm_up


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
def test_what_a_target_makes_of_its_samples_stays_within_bounds(name: str) -> None:
    target = load_target(name)
    assert target.mutate is not None
    rng = random.Random(1)
    for seed in list(target.seeds()) * 3:
        mutated = target.mutate(seed, target.max_bytes, rng, lambda data, max_bytes: data[::-1][:max_bytes])
        assert len(mutated) <= target.max_bytes + 1


def test_a_target_that_takes_too_much_memory_is_caught() -> None:
    def allocate(_: bytes) -> None:
        bytearray(2 * BASE_BYTES)

    with pytest.raises(FindingError, match="allocate"):
        run_traced(Target(run=allocate, seeds=list), b"x")


@pytest.mark.parametrize("text", ["a line\nand another", "\x1b[2J", "x" * 3000])
def test_an_error_that_could_spoil_a_log_is_caught(text: str) -> None:
    with pytest.raises(FindingError):
        check_text(text)
