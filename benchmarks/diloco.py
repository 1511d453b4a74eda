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
Bytes are those of the contributions as a worker hands them to its node to be signed and offered; every other member
fetches each once, in either way. The round in which all take one member's parameters for the beginning is left out.

    python benchmarks/diloco.py [--rows topk/50,int8/50/0.7/0.9] [--seeds 3] [--steps 4000] [--keep]

A row is ``codec/H``, and ``/outer learning rate/outer momentum`` where these are not the defaults of a training loop.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.averager import Contribution, merge
from shoal.training.exchange.codecs import Sender
from shoal.training.exchange.rules import Codec
from shoal.training.loop.gate import Gate
from shoal.training.loop.learner import Averaged, LoopLearner
from shoal.training.loop.tensors import Floats, Tensors, split
from shoal.training.manifest import Manifest, Mode
from shoal.training.statements import NO_BALLOT
from shoal.training.tasks.failures import Failures
from shoal.training.worker import Worker
from shoal.training.worker_calls import Begin, Collect, Merge, MergeAnswer, Open

RESULT: Final = Path(__file__).parent / "results" / "diloco.md"
PEERS: Final = sorted(PeerId.of_public_key(bytes([number]) * 32) for number in range(1, 5))
WINDOW, LETTERS, EMBEDDING, WIDTH, DEPTH = 16, 97, 16, 128, 2
BATCH: Final = 32
RATE: Final = 3e-3
WARM_STEPS: Final = 100
LAST_RATE: Final = 0.1
HELD_OUT: Final = 16384
END_S: Final = 600.0
ROWS: Final = ("int8/50", "topk/30")


class Network(nn.Module):
    """A residual network on the embeddings of a window."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, EMBEDDING)
        self.first = nn.Linear(WINDOW * EMBEDDING, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.outer = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, LETTERS)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Scores ``[n, LETTERS]`` of what follows windows ``[n, WINDOW]``."""
        values = self.first(self.embedding(windows).flatten(1))
        for norm, inner, outer in zip(self.norms, self.inner, self.outer, strict=True):
            values = values + outer(nn.functional.gelu(inner(norm(values))))
        scores: torch.Tensor = self.last(nn.functional.gelu(values))
        return scores


@dataclass(frozen=True, slots=True)
class Row:
    """A way to exchange.

    Attributes:
        codec: of the run.
        every: optimiser steps between two exchanges, H.
        outer: learning rate and momentum of the outer step; a loop's defaults, if None.
    """

    codec: Codec
    every: int
    outer: tuple[float, float] | None = None

    @classmethod
    def parse(cls, text: str) -> Row:
        codec, every, *rest = text.split("/")
        return cls(Codec(codec), int(every), (float(rest[0]), float(rest[1])) if rest else None)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one training.

    Attributes:
        loss: mean negative log-likelihood of a held-out character, nats.
        num_bytes: of contributions, per member and step.
        cpu_s: seconds of one core.
    """

    loss: float
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


def minibatch(member: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a member's step, however it is exchanged."""
    text = texts()[member]
    starts = np.random.default_rng([seed, member, step]).integers(0, len(text) - WINDOW, BATCH)
    return windows_at(text, torch.from_numpy(starts))


def held_out_loss(network: Network) -> float:
    text = texts()[-1]
    starts = np.random.default_rng(0).integers(0, len(text) - WINDOW, HELD_OUT)
    windows, following = windows_at(text, torch.from_numpy(starts))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network(windows), following))


def new_network(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network()


def optimiser_of(network: Network) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01, fused=True)


def set_rate(optimiser: torch.optim.AdamW, step: int, steps: int) -> None:
    """From 0 to the rate, and by half a cosine to a tenth of it."""
    fallen = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
    optimiser.param_groups[0]["lr"] = RATE * min((step + 1) / WARM_STEPS, 1.0) * fallen


# --- how it is exchanged ---------------------------------------------------------------------------------------------


def by_gradients(seed: int, steps: int) -> Found:
    """Every step the average of all gradients, as float32."""
    began, num_bytes = time.process_time(), 0
    network = new_network(seed)
    parameters = dict(network.named_parameters())
    optimiser, sender = optimiser_of(network), Sender(Codec.FP32)
    for step in range(steps):
        said = []
        for member, author in enumerate(PEERS):
            windows, following = minibatch(member, seed, step)
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(windows), following).backward()
            gradient: Floats = np.concatenate([each.grad.numpy().ravel() for each in parameters.values()])
            num_bytes += len(sender.encode({"mean/gradient": gradient}, {}, {}))
            said.append(Contribution(author, float(BATCH), {"mean/gradient": gradient}))
        average = merge(said)["mean/gradient"].astype(np.float32)
        for name, part in split(average, parameters).items():
            parameters[name].grad = torch.from_numpy(part.copy())
        set_rate(optimiser, step, steps)
        optimiser.step()
    return Found(held_out_loss(network), num_bytes / steps / len(PEERS), time.process_time() - began)


class Member:
    """A training loop in a thread of its own, and the worker that a node would drive."""

    def __init__(self, number: int, manifest: Manifest, seed: int, steps: int) -> None:
        self.number, self.seed, self.steps = number, seed, steps
        self.network = new_network(seed + 1000 * number)
        self.optimiser = optimiser_of(self.network)
        self.num_done = self.epoch = 0
        tensors = Tensors(self.network)
        self.gate: Gate[Averaged] = Gate()
        self.worker = Worker(None, lambda request: (LoopLearner(request.manifest, tensors, self.gate), Failures("")))
        self.worker.open(Open(manifest, PEERS[number]))
        self._todo: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._todo.put(self.gate.wait_for_news)

    def _run(self) -> None:
        while (todo := self._todo.get()) is not None:
            try:
                todo()
            except Exception as error:
                self.gate.fail(error)
                raise

    def train(self, number: int) -> None:
        """Have the loop do so many steps, and wait until it has."""
        self._todo.put(lambda: self._train(number))
        self.worker.collect(Collect(number * BATCH, END_S))

    def _train(self, number: int) -> None:
        news = None
        for step in range(self.num_done, self.num_done + number):
            windows, following = minibatch(self.number, self.seed, step)
            self.optimiser.zero_grad()
            nn.functional.cross_entropy(self.network(windows), following).backward()
            set_rate(self.optimiser, step, self.steps)
            self.optimiser.step()
            news = self.gate.step(BATCH)
        self.num_done += number
        if news is None:
            self.gate.wait_for_news()

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
    request = Merge(
        NO_BALLOT, tuple(PEERS), tuple(int(each.weight) for each in given), (1.0,) * len(PEERS), tuple(contributions)
    )
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


def apart(row: Row, seed: int, steps: int) -> Found:
    """``every`` steps by each on its own, then one exchange."""
    began, num_bytes, done = time.process_time(), 0.0, 0
    outer: dict[str, Any] = {}
    if row.outer is not None:
        outer = {"outer_learning_rate": row.outer[0], "outer_momentum": row.outer[1]}
    manifest = Manifest(
        owner=PEERS[0],
        task="loop:characters",
        algorithm="average",
        mode=Mode.DILOCO,
        codec=row.codec,
        batch_per_learner=row.every * BATCH,
        max_env_steps=2**50,
        hyperparameters=outer,
    )
    members = [Member(number, manifest, seed, steps) for number in range(len(PEERS))]
    try:
        exchange(members)
        while done < steps:
            number = min(row.every, steps - done)
            for member in members:
                member.train(number)
            num_bytes += exchange(members)
            done += number
        loss = held_out_loss(members[0].network)
    finally:
        for member in members:
            member.end()
    return Found(loss, num_bytes / steps, time.process_time() - began)


def main() -> None:
    """Print the table; keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bases = [by_gradients(seed, options.steps) for seed in range(options.seeds)]
    print("gradient", [round(b.loss, 4) for b in bases], round(bases[0].num_bytes), bases[0].cpu_s, flush=True)
    for row in map(Row.parse, options.rows.split(",")):
        found = [apart(row, seed, options.steps) for seed in range(options.seeds)]
        print(
            row,
            [round(b.loss, 4) for b in found],
            "%+.2f%%" % (100 * statistics.fmean(f.loss / b.loss - 1 for f, b in zip(found, bases))),
            round(found[0].num_bytes, 1),
            "x%d" % (bases[0].num_bytes / found[0].num_bytes),
            round(found[0].cpu_s, 1),
            flush=True,
        )


if __name__ == "__main__":
    main()
