"""Train a small network on scikit-learn's digits, together with whoever else runs this: no reinforcement learning here.

    pip install 'shoal[train,examples]'

On one machine, three nodes are three profiles:

    shoal up -d --profile a
    shoal up -d --profile b
    shoal up -d --profile c
    python examples/digits.py --profile a --create digits     # prints a ticket
    python examples/digits.py --profile b --swarm TICKET
    python examples/digits.py --profile c --swarm TICKET

Each has a part of the training images of its own (``--part 1/3`` and so on; a random half by default), and all come to
what one with all images would. Any of them may stop, be killed, or come later. ``shoal watch`` shows how they do.
"""

from __future__ import annotations

import argparse
import hashlib
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from shoal.training.exchange import Averager


def main() -> None:
    """Train, and print the accuracy on images that nobody trains on."""
    options = parsed()
    torch.set_num_threads(1)  # the network is small, and several of these may share a machine
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    test_images, test_labels, images, labels = images[:360], labels[:360], images[360:], labels[360:]
    if options.part is None:
        mine = torch.randperm(len(labels))[: len(labels) // 2]
    else:
        number, parts = (int(each) for each in options.part.split("/"))
        mine = torch.arange(number - 1, len(labels), parts)
    images, labels = images[mine], labels[mine]

    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Averager(
        model, options.swarm, create=options.create, every=options.every, profile=options.profile
    ) as averager:
        if options.create:
            print(f"others: python examples/digits.py --swarm {averager.ticket} --profile …", flush=True)
        while averager.epoch < options.averages:
            chosen = torch.randint(len(labels), (32,))
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(options.pause)
            averaged = averager.step(32)
            if averaged is None:
                continue
            if averaged.members == 0:
                print(f"taken: average {averaged.epoch}, which the others made", flush=True)
                continue
            accuracy = measured(model, test_images, test_labels)
            held = b"".join(each.detach().numpy().tobytes() for each in model.parameters())
            print(
                f"average {averaged.epoch} of {averaged.members} loops: loss {loss.item():.3f}, "
                f"accuracy {accuracy:.3f}, parameters {hashlib.sha256(held).hexdigest()[:12]}",
                flush=True,
            )


def measured(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The part of the images that is told right."""
    model.eval()
    with torch.no_grad():
        right = model(images).argmax(dim=1) == labels
    model.train()
    return right.float().mean().item()


def parsed() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarm", help="a ticket, or the name of a swarm that the node is in")
    parser.add_argument("--create", metavar="NAME", help="start a swarm of this name, or go on with it")
    parser.add_argument("--every", type=int, help="samples between two averages; with --create. Default: 2048")
    parser.add_argument("--part", metavar="N/M", help="train on the N-th of M parts of the images")
    parser.add_argument("--averages", type=int, default=30, help="stop after so many")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per step, as a larger network would take")
    parser.add_argument("--profile", default="default", help="of the node")
    return parser.parse_args()


if __name__ == "__main__":
    main()
