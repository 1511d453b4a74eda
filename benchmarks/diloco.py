"""What does it cost in bytes to train together? Four training loops that exchange how far they came, and seldom.

A network learns the next character of Python's own library from the 16 before it. Four members train on files of their
own, each by AdamW with one schedule of the learning rate, and their loss is that of files that none of them sees.

- *gradient*: what mode ``gradient`` does. The float32 gradient of every minibatch is averaged, so four members are one
  with the joint minibatch. It is what the rest is measured by.
- *diloco*: real training loops in their workers (`shoal.training.loop`, `shoal.training.worker`) as a node drives them,
  without a network: each trains ``H`` steps by its own optimiser, the contributions are bytes in the run's codec with
  its error feedback, and everybody merges what it decodes from them and takes the outer step. After each round all hold
  the same bits, or this stops.

Both see the same minibatches in the same order and have the same settings of AdamW, those that are best for *gradient*.
The networks of all members are computed side by side, as stacks of matrices, which is faster; nothing of one goes into
another but by exchanges. Bytes are those of the contributions as a worker hands them to its node to be signed and
offered; every other member fetches each once, in either way. The round in which all take one member's parameters for
the beginning is left out.

    python benchmarks/diloco.py [--rows int8/50/1/0.5] [--seeds 3] [--steps 2000] [--rate 4e-3] [--keep]

A row is ``codec/H/outer learning rate/outer momentum``.
"""

from __future__ import annotations

import argparse
import math
import platform
import queue
import statistics
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.exchange.codecs import Sender
from shoal.training.exchange.rules import Codec
from shoal.training.loop.gate import Gate
from shoal.training.loop.learner import Averaged, LoopLearner
from shoal.training.loop.tensors import Floats, Tensors
from shoal.training.manifest import LOOP_MAX_SAMPLES, Manifest, Mode
from shoal.training.statements import NO_BALLOT
from shoal.training.tasks.failures import Failures
from shoal.training.worker import Worker
from shoal.training.worker_calls import Begin, Collect, Merge, MergeAnswer, Open

RESULT: Final = Path(__file__).parent / "results" / "diloco.md"
PEERS: Final = sorted(PeerId.of_public_key(bytes([number]) * 32) for number in range(1, 5))
WINDOW, LETTERS, EMBEDDING, WIDTH, DEPTH = 16, 97, 16, 96, 2
BATCH: Final = 64
RATE: Final = 4e-3
WARM_STEPS: Final = 100
LAST_RATE: Final = 0.1
HELD_OUT: Final = 16384
END_S: Final = 600.0
ROWS: Final = ("int2/105/1/0.7", "int8/50/1/0.7", "topk/11/4/0")


class Networks:
    """Residual networks on the embeddings of a window, one for each member, that are computed side by side.

    Attributes:
        parameters: by name, ``[members, ...]``.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        shapes = {"embedding": (LETTERS, EMBEDDING), "first": (WINDOW * EMBEDDING, WIDTH), "last": (WIDTH, LETTERS)}
        for number in range(DEPTH):
            shapes |= {f"inner{number}": (WIDTH, WIDTH), f"outer{number}": (WIDTH, WIDTH)}
        made: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
        for seed in seeds:
            torch.manual_seed(seed)
            for name, shape in shapes.items():
                made[name].append(torch.randn(shape) * (0.5 if name == "embedding" else shape[0] ** -0.5))
        self.parameters = {name: torch.stack(each).requires_grad_() for name, each in made.items()}

    def of(self, member: int) -> dict[str, torch.Tensor]:
        """Those of one member, which are views."""
        return {name: each.detach()[member] for name, each in self.parameters.items()}

    def losses(self, windows: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood ``[members]`` of what follows windows ``[members, n, WINDOW]``."""
        held = self.parameters
        members = torch.arange(len(windows))[:, None, None]
        values = held["embedding"][members, windows].flatten(2) @ held["first"]
        for number in range(DEPTH):
            normed = nn.functional.layer_norm(values, (WIDTH,))
            values = values + nn.functional.relu(normed @ held[f"inner{number}"]) @ held[f"outer{number}"]
        scores = nn.functional.layer_norm(values, (WIDTH,)) @ held["last"]
        each = nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="none")
        return each.view(following.shape).mean(1)


@dataclass(frozen=True, slots=True)
class Row:
    """A way to exchange.

    Attributes:
        codec: of the run.
        every: optimiser steps between two exchanges, H.
        outer: learning rate and momentum of the outer step.
    """

    codec: Codec
    every: int
    outer: tuple[float, float]

    @classmethod
    def parse(cls, text: str) -> Row:
        codec, every, rate, momentum = text.split("/")
        return cls(Codec(codec), int(every), (float(rate), float(momentum)))


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one training.

    Attributes:
        losses: mean negative log-likelihood of a held-out character, nats, by seed.
        num_bytes: of contributions, per member and step.
        cpu_s: seconds of one core.
    """

    losses: tuple[float, ...]
    num_bytes: float
    cpu_s: float


# --- what is learned -------------------------------------------------------------------------------------------------


@cache
def texts() -> tuple[torch.Tensor, ...]:
    """The characters of each member's files, and of those that are held out; others than ASCII count as one."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: list[list[bytes]] = [[] for _ in range(len(PEERS) + 1)]
    for number, path in enumerate(files):
        parts[number % len(parts)].append(path.read_bytes())
    codes = np.full(256, LETTERS - 1, np.int64)
    codes[[9, 10, *range(32, 127)]] = np.arange(LETTERS)
    return tuple(torch.from_numpy(codes[np.frombuffer(b"".join(part), np.uint8)]) for part in parts)


def windows_at(text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = text[starts[:, None] + torch.arange(WINDOW + 1)]
    return found[:, :-1], found[:, -1]


def minibatches(seeds: Sequence[int], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a step of all members of these seeds, however they are exchanged."""
    found = []
    for seed in seeds:
        for member in range(len(PEERS)):
            text = texts()[member]
            starts = np.random.default_rng([seed, member, step]).integers(0, len(text) - WINDOW, BATCH)
            found.append(windows_at(text, torch.from_numpy(starts)))
    return torch.stack([each for each, _ in found]), torch.stack([each for _, each in found])


def held_out_losses(networks: Networks) -> list[float]:
    """Of the first member of each seed."""
    text = texts()[-1]
    starts = np.random.default_rng(0).integers(0, len(text) - WINDOW, HELD_OUT)
    windows, following = windows_at(text, torch.from_numpy(starts))
    with torch.no_grad():
        total = len(networks.parameters["first"])
        losses = networks.losses(windows.expand(total, -1, -1), following.expand(total, -1))
    return losses[:: len(PEERS)].tolist()


def optimiser_of(networks: Networks) -> torch.optim.AdamW:
    """Every number's own, so each member's own."""
    return torch.optim.AdamW(list(networks.parameters.values()), weight_decay=0.01, fused=True)


def train(networks: Networks, optimiser: torch.optim.AdamW, seeds: Sequence[int], step: int) -> None:
    """Gradients of a step of all."""
    optimiser.zero_grad()
    networks.losses(*minibatches(seeds, step)).sum().backward()


def go(optimiser: torch.optim.AdamW, rate: float, step: int, steps: int) -> None:
    """Step at the rate's place in its schedule: from 0 up to it, and down half a cosine to a tenth of it."""
    fallen = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
    optimiser.param_groups[0]["lr"] = rate * min((step + 1) / WARM_STEPS, 1.0) * fallen
    optimiser.step()


# --- how it is exchanged ---------------------------------------------------------------------------------------------


def by_gradients(seeds: Sequence[int], steps: int, rate: float) -> Found:
    """Every step the average of all gradients, as float32."""
    began, num_bytes, count = time.process_time(), 0, len(PEERS)
    networks = Networks([seed for seed in seeds for _ in PEERS])
    optimiser, sender = optimiser_of(networks), Sender(Codec.FP32)
    for step in range(steps):
        train(networks, optimiser, seeds, step)
        gradients: list[Floats] = [each.grad.numpy() for each in networks.parameters.values()]
        for first in range(0, count * len(seeds), count):
            said = []
            for member, author in enumerate(PEERS, first):
                gradient = np.concatenate([each[member].ravel() for each in gradients])
                num_bytes += len(sender.encode({"mean/gradient": gradient}, {}, {}))
                said.append(Contribution(author, float(BATCH), {"mean/gradient": gradient}))
            average, at = merge(said)["mean/gradient"], 0
            for each in gradients:
                size = each[0].size
                each[first : first + count] = average[at : at + size].reshape(each.shape[1:])
                at += size
        go(optimiser, rate, step, steps)
    losses = held_out_losses(networks)
    return Found(tuple(losses), num_bytes / steps / count / len(seeds), time.process_time() - began)


class Member:
    """A training loop in a thread of its own, and the worker that a node would drive."""

    def __init__(self, peer: PeerId, manifest: Manifest, given: Mapping[str, torch.Tensor]) -> None:
        self.epoch = 0
        tensors = Tensors(given)
        self.gate: Gate[Averaged] = Gate()
        learner = LoopLearner(manifest, tensors, self.gate, clock=time.monotonic)
        self.worker = Worker(None, lambda _: (learner, Failures("")))
        self.worker.open(Open(manifest, peer))
        self._todo: queue.Queue[Callable[[], Averaged | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._todo.put(lambda: None)

    def _run(self) -> None:
        while (todo := self._todo.get()) is not None:
            try:
                if todo() is None:
                    self.gate.wait_for_news()
            except Exception as error:
                self.gate.fail(error)
                raise

    def has_trained(self, samples: int) -> None:
        """The loop comes to its step, after so many."""
        self._todo.put(lambda: self.gate.step(samples))
        self.worker.collect(Collect(samples, END_S))

    def begin(self) -> MergeAnswer:
        """What it contributes."""
        return self.worker.begin(Begin(self.epoch, Cid.of_block(b"the state before"), self.epoch, {}))

    def end(self) -> None:
        self.gate.close()
        self._todo.put(None)
        self._thread.join(END_S)


def exchange(members: Sequence[Member]) -> float:
    """A round; bytes per member."""
    given = [member.begin() for member in members]
    contributions = [bytes(answer.contribution or b"") for answer in given]
    weights = tuple(int(each.weight) for each in given)
    request = Merge(NO_BALLOT, tuple(PEERS), weights, (1.0,) * len(PEERS), tuple(contributions))
    answers = [member.worker.merge(request) for member in members]
    digests = set()
    for member, answer in zip(members, answers, strict=True):
        if answer.state is None or answer.rejected:
            raise RuntimeError(f"the round failed: {answer.rejected} were left out")
        member.epoch = answer.state.epoch
        digests.add(answer.state.digest)
    if len(digests) > 1:
        raise RuntimeError("the members hold different parameters after a round")
    return sum(map(len, contributions)) / len(members)


def apart(row: Row, seeds: Sequence[int], steps: int, rate: float) -> Found:
    """``every`` steps by each on its own, then one exchange."""
    began, num_bytes, count = time.process_time(), 0.0, len(PEERS)
    manifest = Manifest(
        owner=PEERS[0],
        task="loop:characters",
        algorithm="average",
        mode=Mode.DILOCO,
        codec=row.codec,
        batch_per_learner=row.every * BATCH,
        max_env_steps=LOOP_MAX_SAMPLES,
        hyperparameters=dict(zip(("outer_learning_rate", "outer_momentum"), row.outer, strict=True)),
    )
    networks = Networks([seed for seed in seeds for _ in PEERS])
    optimiser = optimiser_of(networks)
    swarms = [
        [Member(peer, manifest, networks.of(first + number)) for number, peer in enumerate(PEERS)]
        for first in range(0, count * len(seeds), count)
    ]
    try:
        for members in swarms:
            exchange(members)
        for first in range(0, steps, row.every):
            number = min(row.every, steps - first)
            for step in range(first, first + number):
                train(networks, optimiser, seeds, step)
                go(optimiser, rate, step, steps)
            for members in swarms:
                for member in members:
                    member.has_trained(number * BATCH)
                num_bytes += exchange(members)
        losses = held_out_losses(networks)
    finally:
        for members in swarms:
            for member in members:
                member.end()
    return Found(tuple(losses), num_bytes / steps / len(seeds), time.process_time() - began)


def report(base: Found, rows: Sequence[tuple[Row, Found]], numel: int, steps: int, command: str) -> list[str]:
    """The table, in Markdown."""
    shown = ", ".join(f"{loss:.3f}" for loss in base.losses)
    lines = [
        "# DiLoCo: the loss of exchanging every gradient, and its bytes",
        "",
        f"`{command}`, Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}.",
        f"{len(PEERS)} members, {steps:,} steps of {BATCH} samples by each, {numel:,} parameters; losses of held-out",
        "characters in nats, by seed; bytes of contributions per member and step, as they were encoded. *Momentum* and",
        "*rate* are those of the outer step.",
        "",
        "| codec | H | rate | momentum | losses | beside gradient | bytes per step | times fewer |",
        "|---|---|---|---|---|---|---|---|",
        f"| fp32, gradients | 1 | | | {shown} | | {base.num_bytes:,.0f} | 1 |",
    ]
    for row, found in rows:
        far = statistics.fmean(a / b - 1 for a, b in zip(found.losses, base.losses, strict=True))
        rate, momentum = row.outer
        shown = ", ".join(f"{loss:.3f}" for loss in found.losses)
        lines.append(
            f"| {row.codec} | {row.every} | {rate:g} | {momentum:g} | {shown} | {far:+.1%} | {found.num_bytes:,.1f} "
            f"| **{base.num_bytes / found.num_bytes:,.0f}** |"
        )
    return lines


def main() -> None:
    """Print the table; keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    base = by_gradients(seeds, options.steps, options.rate)
    print("gradient", base, flush=True)
    numel = sum(each[0].numel() for each in Networks([0]).parameters.values())
    words = options.rows.split(",")
    rows: list[tuple[Row, Found]] = []
    lines: list[str] = []
    for word in words:
        row = Row.parse(word)
        rows.append((row, apart(row, seeds, options.steps, options.rate)))
        print(*rows[-1], flush=True)
        command = (
            f"python benchmarks/diloco.py --rows {','.join(words[: len(rows)])} --seeds {options.seeds} "
            f"--steps {options.steps} --rate {options.rate:g}"
        )
        lines = report(base, rows, numel, options.steps, command)
        if options.keep:  # after each row, as it takes its time
            RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
