"""The all-reduce between real nodes: the same bytes at all of them, also when one is killed or stands still."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from shoal.cli.bench import reducing_nodes
from shoal.node.api.client import Client
from shoal.node.api.requests import BenchReduceRequest
from shoal.node.api.schemas import BenchReduceResult
from shoal.protocol.errors import ShoalError

ERRORS = {"fp32": 1e-5, "int8": 0.1}


@pytest.mark.parametrize("codec", ERRORS)
def test_the_command_measures_real_nodes_that_end_with_the_same_bytes(codec: str) -> None:
    words = ("--peers", "3", "--numel", "600000", "--rounds", "2", "--codec", codec, "--json")
    command = [sys.executable, "-m", "shoal.cli.main", "bench", "allreduce", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    figures = json.loads(done.stdout)
    assert figures["bit_identical"] is True
    assert figures["max_error"] < ERRORS[codec]
    assert figures["num_left_out"] == 0
    assert (figures["peers"], figures["numel"], figures["codec"]) == (3, 600_000, codec)
    assert min(figures["seconds_median"], figures["bus_mb_s_per_peer"], figures["lane_mb_s"]) > 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_killed_or_stands_still_costs_the_others_little(how: signal.Signals) -> None:
    found: dict[int, BenchReduceResult | ShoalError] = {}

    def ask(number: int, client: Client, request: BenchReduceRequest) -> None:
        try:
            found[number] = client.bench_reduce(request, timeout_s=120)
        except ShoalError as error:
            found[number] = error

    with reducing_nodes(3) as (clients, names):
        pids = [client.node().pid for client in clients]
        request = BenchReduceRequest(name=f"{how}", peers=names, numel=6_000_000, rounds=3)
        threads = [threading.Thread(target=partial(ask, *each, request)) for each in enumerate(clients)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        assert not found, "it is to fail while they reduce"
        os.kill(pids[2], how)
        for thread in threads[:2]:
            thread.join()
        os.kill(pids[2], signal.SIGKILL)
        threads[2].join()
    one, two = found[0], found[1]
    assert isinstance(one, BenchReduceResult), one
    assert isinstance(two, BenchReduceResult), two
    # Who does not answer an heir in time may end a round with another outcome, and its digest says so.
    assert sum(mine != theirs for mine, theirs in zip(one.digests, two.digests, strict=True)) <= 1
    assert one.digests[-1] == two.digests[-1]
    assert one.num_left_out > 0
