#!/usr/bin/env python
"""Fuzz every decoder, each target in a process of its own, and say what came of it.

    tests/fuzz/run.py                                      every target for 20 seconds, two at a time
    tests/fuzz/run.py --seconds 300 --target rpc           one target for longer
    tests/fuzz/run.py --target frames --input FILE         one input again, without atheris: what a finding prints

The corpus starts from valid samples that our own encoders make; nothing is kept between runs unless ``--corpus`` names
a folder. A finding is written to ``build/fuzz/<target>/``. Exit status: 0 nothing found, 1 a finding, 2 wrong usage or
no atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path[0] = str(ROOT / "tests")  # where the package `fuzz` is; this file's own folder would shadow others

from fuzz.harness import TARGETS, load_target, run_traced  # noqa: E402 - can be found only now

TIMEOUT_S: Final = 5
"""An input that takes longer is a finding; valid ones take a millisecond."""

RSS_LIMIT_MB: Final = 768
"""A process that grows beyond this is a finding: it starts with about 100."""

_START_AND_END_S: Final = 120
"""Beside its seconds, a process may take so long before it is ended: for imports, and one last slow input."""

_MAX_HEX_BYTES: Final = 4096
_MAX_LINE_CHARS: Final = 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one target."""

    target: str
    executions: int
    executions_per_s: int
    edges: int
    features: int
    peak_rss_mb: int
    log: str
    finding: Path | None
    failed: bool

    @property
    def result(self) -> str:
        """In one word, for the table."""
        if self.finding is not None:
            return "FOUND " + self.finding.name.split("-")[0]
        return "FAILED" if self.failed else "ok"


def fuzz(name: str, seconds: int, corpus: Path, artifacts: Path, seed: int | None) -> Outcome:
    """Run one target; libFuzzer stops at its first finding."""
    corpus.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    before = set(artifacts.iterdir())
    for index, sample in enumerate(load_target(name).seeds()):
        (corpus / f"seed-{index:03}").write_bytes(sample)
    command = [
        *(sys.executable, "-m", "fuzz.engine", name, str(corpus)),
        *(f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_LIMIT_MB}"),
        *(f"-artifact_prefix={artifacts}/", "-print_final_stats=1", "-report_slow_units=1000"),
        *([] if seed is None else [f"-seed={seed}"]),
    ]
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            command,
            cwd=artifacts,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds + _START_AND_END_S,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 1, (error.stdout or b"") + b"\nthe process did not end; it was killed\n"
    log = output.decode(errors="replace")
    findings = sorted(set(artifacts.iterdir()) - before)
    return Outcome(
        target=name,
        executions=_last(r"^stat::number_of_executed_units:\s*(\d+)", log),
        executions_per_s=_last(r"^stat::average_exec_per_sec:\s*(\d+)", log),
        edges=_last(r"^#\d+\s.* cov: (\d+)", log),
        features=_last(r"^#\d+\s.* ft: (\d+)", log),
        peak_rss_mb=_last(r"^stat::peak_rss_mb:\s*(\d+)", log),
        log=log,
        finding=findings[0] if findings else None,
        failed=status != 0,
    )


def _last(pattern: str, log: str) -> int:
    found = re.findall(pattern, log, re.MULTILINE)
    return int(found[-1]) if found else 0


def print_table(outcomes: list[Outcome]) -> None:
    """What every target did."""
    row = "{:<12}{:>12}{:>10}{:>8}{:>10}{:>12}  {}"
    print(row.format("target", "executions", "exec/s", "edges", "features", "peak MiB", "result"))
    for one in outcomes:
        numbers = (one.executions, one.executions_per_s, one.edges, one.features, one.peak_rss_mb)
        print(row.format(one.target, *(f"{number:,}" for number in numbers), one.result))


def print_finding(outcome: Outcome) -> None:
    """The trace, the input, and how to see it again."""
    print(f"\n--- {outcome.target}: {outcome.result}")
    print(_trace(outcome.log))
    if outcome.finding is None:
        return
    data = outcome.finding.read_bytes()
    shown = data[:_MAX_HEX_BYTES].hex() + ("…" if len(data) > _MAX_HEX_BYTES else "")
    print(f"\ninput, {len(data)} bytes in hex: {shown}")
    print(f"again: tests/fuzz/run.py --target {outcome.target} --input {outcome.finding}")


def _trace(log: str) -> str:
    """The Python exception, or, where libFuzzer itself stopped (time, memory), the end of what it said."""
    lines = [line[:_MAX_LINE_CHARS] for line in log.splitlines() if not line.startswith("stat::")]
    starts = [at for at, line in enumerate(lines) if "=== Uncaught Python exception" in line]
    if not starts:
        return "\n".join(lines[-30:])
    end = next((at for at in range(starts[0], len(lines)) if lines[at].startswith("==")), len(lines))
    return "\n".join(lines[starts[0] + 1 : end]).rstrip()


def run_input(name: str, path: Path) -> int:
    """Run one input as the fuzzer does; whatever it raises is shown."""
    target = load_target(name)
    with contextlib.suppress(AssertionError):
        for seed in target.seeds():  # fills the caches, so that they are not in the peak
            target.run(seed)
    data = path.read_bytes()
    peak = run_traced(target, data)
    print(f"{name} took {len(data)} bytes well, with a peak of {peak:,} bytes of memory")
    return 0


def main() -> int:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=int, default=20, metavar="N", help="per target (default: 20)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all; may be given several times")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="targets at a time (default: 2)")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run this one input of the one --target")
    parser.add_argument("--seed", type=int, metavar="N", help="of libFuzzer's chance; default: another every time")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="keep what was learned here, one folder per target")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", default=ROOT / "build" / "fuzz", help="for findings")
    arguments = parser.parse_args()
    names: list[str] = arguments.target or list(TARGETS)
    if arguments.input is not None:
        if len(names) != 1 or not arguments.input.is_file():
            parser.error("--input needs one --target, and a file")
        return run_input(names[0], arguments.input)
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; run: pip install -e '.[fuzz]'")
    with contextlib.ExitStack() as stack:
        corpora: Path = arguments.corpus or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-fuzz-")))
        pool = stack.enter_context(ThreadPoolExecutor(max(1, arguments.jobs)))
        outcomes = list(
            pool.map(
                lambda name: fuzz(
                    name,
                    arguments.seconds,
                    corpora.resolve() / name,
                    arguments.artifacts.resolve() / name,
                    arguments.seed,
                ),
                names,
            )
        )
    print_table(outcomes)
    bad = [outcome for outcome in outcomes if outcome.failed]
    for outcome in bad:
        print_finding(outcome)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
