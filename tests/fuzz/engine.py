"""One target under atheris, in a process of its own; `run.py` starts it as ``python -m fuzz.engine NAME OPTION…``.

The options are libFuzzer's (https://llvm.org/docs/LibFuzzer.html). Only what reads bytes from strangers is
instrumented, so that the start is quick and coverage is of what matters.
"""

from __future__ import annotations

import importlib
import sys
from random import Random
from typing import Any, Final

from .harness import load_target, run_sampled, warm_up

atheris: Any = importlib.import_module("atheris")  # by name, since it ships no types and may be absent

_INSTRUMENTED: Final = [
    "shoal.protocol",
    "shoal.dht",
    "shoal.crdt",
    "shoal.node.wire.bulk",
    "shoal.training.electorate",
    "shoal.training.exchange.averager",
    "shoal.training.manifest",
    "shoal.training.state",
    "shoal.training.statements",
    "shoal.training.ticket",
    "base58",
]

_TENSORS: Final = "shoal.protocol.tensors"
_OF_TENSORS: Final = (
    *("check_parts", "check_target", "decode_tensor", "decode_tensor_into", "encoded_num_bytes"),
    *("_check_dtype", "_check_options", "_check_shape", "_check_tensor", "_layout"),
    *("_chunk_size", "_fill", "_fill_chunks", "_from_blocks"),
)
"""What is instrumented there: all that reads, but `_check_indices`. atheris 3.0.0 never frees what an instrumented
comparison gives back, which is nothing where that is a bool, and megabytes where arrays are compared."""


def main(name: str, options: list[str]) -> None:
    """Fuzz until libFuzzer ends the process."""
    with atheris.instrument_imports(include=_INSTRUMENTED, exclude=[_TENSORS], enable_loader_override=False):
        target = load_target(name)
    for function in _OF_TENSORS if name == "tensors" else ():
        atheris.instrument_func(getattr(sys.modules[_TENSORS], function))
    warm_up(target)

    def run_one(data: bytes) -> None:
        run_sampled(target, data)

    def mutate_one(data: bytes, max_bytes: int, seed: int) -> bytes:
        assert target.mutate is not None
        return target.mutate(data, max_bytes, Random(seed), atheris.Mutate)[:max_bytes]

    argv = [name, f"-max_len={target.max_bytes}", *options]
    if target.mutate is None:
        atheris.Setup(argv, run_one)
    else:
        atheris.Setup(argv, run_one, custom_mutator=mutate_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
