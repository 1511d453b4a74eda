"""How far do liars bend what is learned? Handwritten digits by ten workers, of whom one, two or three lie.

The workers are in one process: each takes local steps of SGD on its part of scikit-learn's digits (a small torch
network), and what they say is merged by the product's own `merge`, as in mode ``local``, by each aggregator of a
manifest. None of them is told how many lie: three of ten are assumed. The liars know what the honest say
(`tests/hostile/poison.py`), and their part of the data is lost; the last column is the mean of the honest alone.

Accuracy is on a quarter of the digits that nobody trains on. *Alike*: each worker has a random tenth of the others.
*Unlike*: parts by a Dirichlet distribution over the classes (concentration 1), so of unequal size and kind.

    python benchmarks/robust.py [--seeds 2] [--rounds 30]
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.hostile.poison import ATTACKS, poison  # noqa: E402  after the path is known

from shoal.protocol.errors import ProtocolError  # noqa: E402
from shoal.protocol.ids import PeerId  # noqa: E402
from shoal.training.exchange.averager import Contribution, merge, validate  # noqa: E402
from shoal.training.exchange.rules import Aggregator  # noqa: E402

RESULT = Path(__file__).parent / "results" / "robust.md"
WORKERS = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 11))
AGGREGATORS = (
    *("mean", "median", "trimmed_mean", "multi_krum", "centered_clipping"),
    *("nnm+median", "nnm+trimmed_mean", "nnm+multi_krum", "nnm+centered_clipping", "arc+nnm+trimmed_mean"),
)
FRACTIONS = (1, 2, 3)
HIDDEN, CLASSES, PIXELS = 32, 10, 64
LOCAL_STEPS, BATCH, RATE = 10, 32, 0.2
ALLOWED = 2.0  # points of accuracy that the best aggregator may lose


@dataclass(frozen=True, slots=True)
class Data:
    """Pixels ``[n, 64]`` and classes ``[n]``."""

    pixels: torch.Tensor
    classes: torch.Tensor


@functools.cache
def digits(seed: int) -> tuple[Data, Data]:
    """What is trained on, and what is not."""
    from sklearn.datasets import load_digits  # comes with shoal[peers]

    bunch: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    pixels = torch.from_numpy((bunch.data[order] / 16.0).astype(np.float32))
    classes = torch.from_numpy(bunch.target[order].astype(np.int64))
    held = len(order) // 4
    return Data(pixels[held:], classes[held:]), Data(pixels[:held], classes[:held])


def parts(data: Data, is_alike: bool, rng: np.random.Generator) -> list[np.ndarray]:
    """Which samples each worker has."""
    if is_alike:
        return list(np.array_split(rng.permutation(len(data.classes)), len(WORKERS)))
    owners = np.zeros(len(data.classes), np.int64)
    for kind in range(CLASSES):
        of_kind = np.flatnonzero(data.classes.numpy() == kind)
        owners[of_kind] = rng.choice(len(WORKERS), len(of_kind), p=rng.dirichlet(np.ones(len(WORKERS))))
    found = [np.flatnonzero(owners == worker) for worker in range(len(WORKERS))]
    return [each if len(each) else np.asarray([worker]) for worker, each in enumerate(found)]


SHAPES = ((PIXELS, HIDDEN), (1, HIDDEN), (HIDDEN, CLASSES), (1, CLASSES))


def first_parameters(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    layers = [rng.normal(0, (2 / shape[0]) ** 0.5 if shape[0] > 1 else 0.0, shape) for shape in SHAPES]
    return np.concatenate([layer.ravel() for layer in layers]).astype(np.float32)


def logits(flat: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """``[workers, batch, classes]``, of parameters ``[workers, d]`` and pixels ``[workers, batch, 64]``."""
    sizes = [rows * columns for rows, columns in SHAPES]
    layers = [part.view(-1, *shape) for part, shape in zip(flat.split(sizes, dim=1), SHAPES, strict=True)]
    hidden = torch.relu(torch.baddbmm(layers[1], pixels, layers[0]))
    return torch.baddbmm(layers[3], hidden, layers[2])


def local_steps(start: np.ndarray, data: Data, owned: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Parameters ``[workers, d]`` after the local steps of each, all at once."""
    flat = torch.from_numpy(np.stack([start] * len(owned))).requires_grad_()
    for _ in range(LOCAL_STEPS):
        index = torch.from_numpy(np.stack([rng.choice(each, BATCH) for each in owned]))
        scores = logits(flat, data.pixels[index])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), data.classes[index].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss / BATCH, flat)
        with torch.no_grad():
            flat -= RATE * gradient
    return flat.detach().numpy()


def accuracy(
    seed: int, aggregator: Aggregator, *, attack: str | None = None, liars: int = 0, is_alike: bool = True, rounds: int
) -> float:
    """Percent of unseen digits that the merged parameters name rightly, at the end."""
    train, unseen = digits(seed)
    rng = np.random.default_rng([seed, liars])
    owned = parts(train, is_alike, np.random.default_rng([seed, 1]))[: len(WORKERS) - liars]
    start = first_parameters(seed)
    template = {"mean/parameters": start}
    for _ in range(rounds):
        found = local_steps(start, train, owned, rng)
        said = [
            Contribution(author, float(len(part)), {"mean/parameters": parameters})
            for author, part, parameters in zip(WORKERS, owned, found, strict=False)
        ]
        if attack is not None:
            said += poison(attack, said, WORKERS[len(said) :], rng, template)
        try:
            for each in said:
                validate(each, template)
        except ProtocolError:  # the numbers have left what anybody takes; it ends here
            break
        start = merge(said, aggregator, centres=template)["mean/parameters"].astype(np.float32)
        template = {"mean/parameters": start}
    with torch.no_grad():
        named = logits(torch.from_numpy(start)[None], unseen.pixels[None])[0].argmax(dim=1)
    return 100 * float((named == unseen.classes).double().mean())


def table(seeds: int, rounds: int, *, is_alike: bool) -> tuple[list[str], bool]:
    """Lines of Markdown, and whether the best aggregator loses no more than it may in every row."""

    def mean_accuracy(name: str, attack: str | None = None, liars: int = 0) -> float:
        rule = Aggregator.parse(name)
        runs = (
            accuracy(seed, rule, attack=attack, liars=liars, is_alike=is_alike, rounds=rounds) for seed in range(seeds)
        )
        return statistics.fmean(runs)

    clean = mean_accuracy("mean")
    lines = [
        f"| liars of 10 | attack | {' | '.join(f'`{name}`' for name in AGGREGATORS)} | without them |",
        "|---" * (len(AGGREGATORS) + 3) + "|",
        f"| 0 | | {' | '.join(f'{mean_accuracy(name):.1f}' for name in AGGREGATORS)} | {clean:.1f} |",
    ]
    worst = dict.fromkeys(AGGREGATORS, 100.0)
    is_kept = True
    for liars in FRACTIONS if is_alike else FRACTIONS[-1:]:
        without = mean_accuracy("mean", None, liars)
        for attack in ATTACKS:
            row = {name: mean_accuracy(name, attack, liars) for name in AGGREGATORS}
            best = max(row.values())
            is_kept &= best >= clean - ALLOWED
            cells = (f"**{value:.1f}**" if value == best else f"{value:.1f}" for value in row.values())
            lines.append(f"| {liars} | {attack} | {' | '.join(cells)} | {without:.1f} |")
            worst = {name: min(worst[name], value) for name, value in row.items()}
    best_name = max(worst, key=lambda name: worst[name])
    lines += [
        f"| | the worst | {' | '.join(f'{value:.1f}' for value in worst.values())} | |",
        "",
        f"Clean run by `mean`: {clean:.1f} %. Best by its worst row: `{best_name}`, {worst[best_name]:.1f} %;",
        f"`mean` falls to {worst['mean']:.1f} %.",
    ]
    return lines, is_kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    lines = [
        "# Liars: accuracy in percent on handwritten digits, ten workers, one to three of them lying",
        "",
        f"`python benchmarks/robust.py --seeds {given.seeds} --rounds {given.rounds}`,",
        f"Python {platform.python_version()}, torch {torch.__version__}, means of {given.seeds} seeds.",
        "Three liars are assumed in every row. The best is bold.",
        "",
    ]
    is_kept = True
    for title, is_alike in (("Workers whose data are alike", True), ("Workers whose data are unlike", False)):
        rows, kept = table(given.seeds, given.rounds, is_alike=is_alike)
        is_kept &= kept or not is_alike
        lines += [f"## {title}", "", *rows, ""]
    said = "is" if is_kept else "is not"
    lines.append(
        f"Where data are alike, the best aggregator {said} within {ALLOWED:g} points of the clean run in every row."
    )
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n{time.monotonic() - began:.0f} s")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
