"""Whether honest nodes on unlike machines accuse each other: every shard of each is looked at whole by the others.

A machine is a process of its own, with the arithmetic of another one: which kernels NumPy, its BLAS, PyTorch and oneDNN
take, and how many threads. Makers act as actors do (`RowStream`) by copies of policies as they come in a run, and of
ones that are wider or have larger weights. Checkers are what learners run (`check_rows`). Two makers act by PyTorch in
float32, which no actor of Shoal does, and another implementation might.

Told is what came of the checks, and by how much of what rounding may explain the honest were ever away.

    python benchmarks/accusing.py [--checks 10000] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from peers.notes import kept_notes

from shoal.protocol.ids import Cid, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.algorithms import load_algorithm
from shoal.training.manifest import Manifest, Mode
from shoal.training.rollouts.acting import Acting, ActorShape, Noise, Words, copy_of
from shoal.training.rollouts.checking import check_rows
from shoal.training.rollouts.evidence import Verdict
from shoal.training.rollouts.replaying import surroundings
from shoal.training.rollouts.rows import rows_of
from shoal.training.rollouts.shard import noise_seed, open_shard, seal
from shoal.training.rollouts.streams import RowStream
from shoal.training.tasks import Task, load_task

RESULT: Final = Path(__file__).parent / "results" / "accusing.md"
NOTES: Final = "## What it says"
ONE: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TWO: Final = dict.fromkeys(ONE, "2")
OLD: Final = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}
CHECKERS: Final[dict[str, dict[str, str]]] = {
    "as it comes, one thread": ONE,
    "two threads": TWO,
    "BLAS for Haswell (AVX2)": ONE | {"OPENBLAS_CORETYPE": "Haswell"},
    "BLAS for Nehalem (SSE4.2), two threads": TWO | {"OPENBLAS_CORETYPE": "Nehalem"},
    "NumPy without AVX2 and AVX-512, BLAS for Prescott (SSE3)": ONE | OLD | {"OPENBLAS_CORETYPE": "Prescott"},
}
BY_TORCH: Final[dict[str, dict[str, str]]] = {
    "PyTorch, oneDNN and ATen as they come, two threads": TWO,
    "PyTorch, oneDNN SSE4.1, ATen default, MKL compatible": ONE
    | {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
}
MAKERS: Final = CHECKERS | BY_TORCH
TASKS: Final = ("gym:CartPole-v1", "gym:Pendulum-v1", "gym:LunarLander-v3")
POLICIES: Final = (((64, 64), 1.0), ((64, 64), 4.0), ((256, 256), 2.0))
"""Hidden layers, and by what all weights are multiplied: a run makes its policies surer."""
STEPS: Final = 16
MAX_LEAD: Final = 32
ENVS: Final = 4
SWARM: Final = SwarmId.of_manifest(b"a swarm")
STATE: Final = Cid.of_block(b"a policy")
ME: Final = Signer(bytes([1]) * 32)


class TorchActing(Acting):
    """The same layers by PyTorch."""

    def _outputs(self, hidden: Any) -> Any:
        import torch

        found = torch.from_numpy(np.ascontiguousarray(hidden, np.float32))
        for number, (weight, bias) in enumerate(self._layers):
            found = torch.tanh(found) if number else found
            found = torch.nn.functional.linear(found, torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy()))
        return found.numpy()


def policies(name: str) -> Iterator[tuple[Task, ActorShape, Words]]:
    """Of a task: the same bits in every process that has them from the first."""
    for number, (hidden, factor) in enumerate(POLICIES):
        manifest = Manifest(
            owner=ME.peer_id,
            task=name,
            algorithm="ppo",
            mode=Mode.ROLLOUTS,
            seed=number,
            hyperparameters={"hidden_sizes": list(hidden)},
        )
        task, kind = load_task(name), load_algorithm("ppo")
        learner = kind.learner(manifest, task, peer=ME.peer_id)  # type: ignore[attr-defined]
        shape = kind.actor_shape(manifest, task)  # type: ignore[attr-defined]
        learner.collect(1024)  # so that the normaliser has seen something
        arrays = {
            key: each * np.float32(factor) if "weight" in key else each for key, each in learner.policy_arrays().items()
        }
        yield task, shape, copy_of(shape, arrays)


def shape_of(task: Task, hidden: tuple[int, ...], words: Words) -> ActorShape:
    """Of a copy, which was made by another process."""
    for is_normalized in (False, True):
        shape = ActorShape(task.observation_space.size, task.action_space, hidden, is_normalized)  # type: ignore[arg-type]
        if shape.num_words == len(words):
            return shape
    raise SystemExit(f"a copy of {len(words)} words is of no policy of {task.name}")


def copies(folder: Path) -> Iterator[tuple[str, Task, Acting, Acting]]:
    """By the first process: the name of each policy, its task, and what acts by it in NumPy and in PyTorch."""
    for name in TASKS:
        task = load_task(name)
        for number, (hidden, _) in enumerate(POLICIES):
            words = np.load(folder / f"{name.partition(':')[2]}-{number}.npy")
            shape = shape_of(task, hidden, words)
            yield f"{name.partition(':')[2]}-{number}", task, Acting(shape, words), TorchActing(shape, words)


def make(folder: Path, maker: int, shards: int) -> None:
    """As one machine: so many shards by each policy."""
    signer = Signer((100 + maker).to_bytes(32, "big"))
    for policy, task, by_numpy, by_torch in copies(folder):
        stream = RowStream(
            *(task, ENVS),
            author=signer.peer_id,
            swarm=SWARM,
            surroundings=surroundings(task),
            max_lead=MAX_LEAD,
            is_shown=True,
        )
        acting = by_numpy if maker < len(CHECKERS) else by_torch
        for number in range(shards):
            head, rows = stream.collect(acting, number, STATE, STEPS)
            cid, data = seal(signer, head, rows.columns(task.action_space))
            stream.sealed(cid)
            (folder / f"{policy}.{maker}.{number}").write_bytes(data)
        stream.close()


def check(folder: Path, checker: int, shards: int) -> dict[str, dict[str, float]]:
    """As one machine: what is found of every maker's shards, by task and verdict, and how near honest ones came."""
    found: dict[str, Counter[str]] = {}
    nearest: dict[str, float] = {}
    for policy, task, acting, _ in copies(folder):
        own = surroundings(task)
        of_task, name = found.setdefault(task.name, Counter()), task.name
        for maker in range(len(MAKERS)):
            for number in range(shards):
                data = (folder / f"{policy}.{maker}.{number}").read_bytes()
                shard = open_shard(data, cid=Cid.of_block(data), swarm=SWARM)
                finding = check_rows(shard, task, own, acting)
                of_task[str(finding.verdict)] += 1
                if finding.verdict is Verdict.FALSE:
                    print(f"checker {checker}, maker {maker}, {policy}: {finding.words}", file=sys.stderr)
                rows = rows_of(shard, task.observation_space.size, task.action_space)
                if number % 10 or rows.sights is None:
                    continue
                seen = rows.sights[:-1].reshape(rows.samples, -1)
                acts = rows.actions.reshape(rows.samples, *rows.actions.shape[2:])
                expected = acting.expected(seen, acts, Noise(noise_seed(shard.author, shard.head)))
                away = np.abs(rows.log_probs.reshape(-1) - expected.log_probs) / expected.slack
                nearest[name] = max(nearest.get(name, 0.0), float(away.max()))
    return {name: dict(each) | {"nearest": nearest.get(name, 0.0)} for name, each in found.items()}


def on(settings: Mapping[str, str], *words: object) -> Any:
    """One process of this program, as a machine; what it printed."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)],
        env=os.environ | dict(settings),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout or "null")


def main() -> None:
    """Play all machines, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--checks", type=int, default=10_000, help="at least")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument(
        "--as-machine", nargs=4, metavar=("make|check", "FOLDER", "NUMBER", "SHARDS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.as_machine:
        act, folder, number, shards = options.as_machine
        if act == "make":
            make(Path(folder), int(number), int(shards))
        else:
            print(json.dumps(check(Path(folder), int(number), int(shards))))
        return
    each = len(TASKS) * len(POLICIES) * len(CHECKERS) * len(MAKERS)
    shards = -(-options.checks // each)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in TASKS:
            for number, (_, _, words) in enumerate(policies(task)):
                np.save(folder / f"{task.partition(':')[2]}-{number}.npy", words)
        for number, settings in enumerate(MAKERS.values()):
            on(settings, "--as-machine", "make", folder, number, shards)
            print(f"made by {list(MAKERS)[number]}: {time.monotonic() - began:.0f} s", flush=True)
        lines = [
            "| who looks | task | checks | true | false | does not fit | nearest to what rounding explains |",
            "|---|---|---|---|---|---|---|",
        ]
        total: Counter[str] = Counter()
        for number, (words, settings) in enumerate(CHECKERS.items()):
            for task, found in on(settings, "--as-machine", "check", folder, number, shards).items():
                nearest = found.pop("nearest")
                counts = Counter(found)
                total += counts
                kinds = [counts[str(kind)] for kind in (Verdict.TRUE, Verdict.FALSE, Verdict.DOES_NOT_FIT)]
                cells = " | ".join(map(str, (sum(counts.values()), *kinds)))
                lines.append(f"| {words} | {task.partition(':')[2]} | {cells} | {100 * nearest:.1f} % |")
                print(lines[-1], flush=True)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(total.items()))
    summary = f"{sum(total.values())} checks: {said}; {sum(total.values()) * STEPS * ENVS} steps."
    print(summary)
    if options.keep:
        makers = "\n".join(f"- {name}" for name in MAKERS)
        RESULT.write_text(
            "# Do honest nodes accuse each other?\n\n"
            f"`python benchmarks/accusing.py --checks {options.checks}`, Python {platform.python_version()}, NumPy "
            f"{np.__version__}, {platform.machine()}.\n**{summary}**\n\n"
            + "\n".join(lines)
            + f"\n\nEach looks at what all of these made, {shards} shards of {STEPS * ENVS} steps by each of "
            f"{len(POLICIES)} policies of each task:\n\n"
            f"{makers}\n\n" + (kept_notes(RESULT, NOTES) or f"{NOTES}\n"),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
