"""Training loops that people write, in processes of their own, averaged by real nodes."""

from __future__ import annotations

import logging
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal.node.api.client import Client
from shoal.protocol.errors import RefusedError, ShoalError, UsageError
from shoal.training.exchange import Averaged, Averager

from .conftest import Node

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits.py"
LINE = re.compile(r"average (\d+) of (\d+) loops: loss \S+, accuracy (\S+), parameters (\w+)")
SOON_S = 90.0


@dataclass(frozen=True, slots=True)
class Line:
    """What the example prints after an average."""

    epoch: int
    members: int
    accuracy: float
    digest: str


class Digits:
    """The example as a process."""

    def __init__(self, node: Node, *options: str) -> None:
        command = [sys.executable, "-P", str(EXAMPLE), "--averages", "100000", "--pause", "0.005", *options]
        self.process = subprocess.Popen(
            [*command, "--profile", node.profile],
            env=node.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[Line] = []
        self.printed: list[str] = []
        self._new: queue.Queue[Line | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.printed.append(text)
            found = LINE.match(text)
            if found:
                epoch, members, accuracy, digest = found.groups()
                self._new.put(Line(int(epoch), int(members), float(accuracy), digest))
        self._new.put(None)

    def wait_for(self, promise: str, holds: Callable[[Line], bool]) -> Line:
        """The next line that is as promised."""
        while True:
            try:
                line = self._new.get(timeout=SOON_S)
            except queue.Empty:
                line = None
            if line is None:
                pytest.fail(f"{promise}: not seen; printed were\n{''.join(self.printed[-30:])}")
            self.lines.append(line)
            if holds(line):
                return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def digits() -> Iterator[Callable[..., Digits]]:
    begun: list[Digits] = []

    def begin(*words: Any) -> Digits:
        begun.append(Digits(*words))
        return begun[-1]

    try:
        yield begin
    finally:
        for each in begun:
            each.end()


def test_three_loops_learn_digits_together_and_a_killed_one_hurts_nobody(make_node: Callable[..., Node]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'shoal[examples]'")
    nodes = [make_node() for _ in range(3)]
    created = nodes[0].ask(
        *("swarm", "create", "--task", "loop:digits", "--batch-per-learner", "512", "--min-learners", "3")
    )
    with digits() as begin:
        loops = [
            begin(node, "--part", f"{number}/3", "--swarm", created["ticket"]) for number, node in enumerate(nodes, 1)
        ]
        for each in loops:
            each.wait_for("it learns", lambda line: line.accuracy >= 0.9 and line.members == 3)
        first, second, third = loops
        third.process.send_signal(signal.SIGKILL)
        gone_at = first.wait_for("it goes on without the one that was killed", lambda line: line.members == 2).epoch
        first.wait_for("and again", lambda line: line.epoch > gone_at and line.members == 2)
        latest = second.wait_for("so does the other", lambda line: line.members == 2).epoch

        again = begin(nodes[2], "--part", "3/3")
        line = again.wait_for("it is back among them", lambda line: line.members == 3)
        assert line.epoch > latest, "it went on from where the others were"
        assert min(each.accuracy for each in again.lines) >= 0.85
        for each in (first, second):
            each.wait_for("they have it back", lambda line: line.members == 3)
        alike = {line.epoch: line.digest for line in first.lines if line.members > 1}
        for each in (second, third, again):
            common = [line for line in each.lines if line.epoch in alike and line.members > 1]
            assert common
            assert all(line.digest == alike[line.epoch] for line in common), "not the same bits"


def trained(averager: Averager, model: nn.Module, *, steps: int = 100_000) -> Averaged | None:
    """Train until something is averaged."""
    for _ in range(steps):
        with torch.no_grad():
            for each in model.parameters():
                each += 0.001
        averaged = averager.step(10)
        if averaged is not None:
            return averaged
    return None


def trained_for_ever(averager: Averager, model: nn.Module) -> None:
    while True:
        trained(averager, model, steps=10)


def test_what_a_node_and_one_loop_do_for_each_other(
    make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = make_node()
    monkeypatch.setenv("SHOAL_HOME", str(node.home))
    caplog.set_level(logging.WARNING, "shoal.training.loop.averager")
    model = nn.Linear(3, 2)
    with Averager(model, create="x", every=100, profile=node.profile) as averager:
        assert averager.epoch == 1
        assert trained(averager, model) == Averaged(2, 1)
        assert "ALONE" in caplog.text
        assert averager.ticket.startswith("shoal1")

        with Client(node.config.paths, node.profile) as client:
            path = Path(client.swarm(averager.swarm).loop_socket or "")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

        with pytest.raises(RefusedError, match=r"the process \d+ is attached to this swarm"):
            Averager(nn.Linear(3, 2), profile=node.profile)

        # The node may go and come: the loop goes on meanwhile, and is averaged again.
        caplog.clear()
        node.run("down")
        assert trained(averager, model, steps=20) is None
        node.up()
        while averager.epoch < 4:
            trained(averager, model)
        assert "the node does not answer" in caplog.text
        assert "attached to the node again" in caplog.text
        before = [each.detach().clone() for each in model.parameters()]
        epoch = averager.epoch

    with pytest.raises(UsageError, match=r"'weight' is \[2, 4\] here and \[2, 3\] there"):
        Averager(nn.Linear(4, 2), create="x", profile=node.profile)
    with pytest.raises(UsageError, match="batch per learner 100, not 50"):
        Averager(model, create="x", every=50, profile=node.profile)

    # A loop that is started again goes on from where the swarm is.
    anew = nn.Linear(3, 2)
    with Averager(anew, "x", profile=node.profile) as averager:
        assert averager.epoch == epoch
        assert all((mine - old).abs().max() < 0.2 for mine, old in zip(anew.parameters(), before, strict=True))
        node.run("leave", averager.swarm)
        with pytest.raises(ShoalError, match="in no swarm"):
            trained_for_ever(averager, anew)
