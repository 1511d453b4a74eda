"""The worker process of one swarm: the only place where environments run and torch is loaded.

A shell: it reads calls from a socket, does them one after the other, and answers. The node that started it drives
it (`training.worker_calls`) and replaces it when it dies. It ends when the socket does.

    python -m shoal.training.worker FD
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from shoal.protocol.codec import decode_message, encode_message
from shoal.protocol.errors import ProtocolError, RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.limits import MAX_WORKER_ATTACHMENT_BYTES
from shoal.protocol.rpc import Called, RpcConnection
from shoal.protocol.services import Empty
from shoal.training.algorithms import Exchange, Learner, UpdateStats, load_algorithm
from shoal.training.exchange.averager import Arrays, Contribution, merge, validate
from shoal.training.requirements import check_loaded, requirements
from shoal.training.state import decode_arrays, digest, encode_arrays
from shoal.training.tasks import load_task
from shoal.training.worker_calls import (
    ABANDON,
    COLLECT,
    EVALUATE,
    FINISH,
    LOAD,
    MERGE,
    OPEN,
    Collect,
    Collected,
    Evaluate,
    Evaluated,
    Finish,
    Load,
    Merge,
    MergeAnswer,
    Open,
    StateAnswer,
)


class Worker:
    """One swarm's learner behind the worker's methods."""

    def __init__(self) -> None:
        self._learner: Learner | None = None
        self._update: Generator[Exchange, Arrays, UpdateStats] | None = None
        self._template: Arrays = {}  # what contributions to the round under way look like
        self.methods: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
            OPEN.name: (OPEN.request, self.open),
            LOAD.name: (LOAD.request, self.load),
            COLLECT.name: (COLLECT.request, self.collect),
            MERGE.name: (MERGE.request, self.merge),
            ABANDON.name: (ABANDON.request, self.abandon),
            EVALUATE.name: (EVALUATE.request, self.evaluate),
            FINISH.name: (FINISH.request, self.finish),
        }

    @property
    def learner(self) -> Learner:
        """The learner that `open` made."""
        if self._learner is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "the worker holds no run yet")
        return self._learner

    def open(self, request: Open) -> StateAnswer:
        """Set up the run and give its initial state."""
        manifest = request.manifest
        task, algorithm = load_task(manifest.task), load_algorithm(manifest.algorithm)
        check_loaded(manifest, requirements(manifest.algorithm, algorithm.version, manifest.task, task.version))
        self._learner = algorithm.learner(manifest, task, peer=request.peer)
        return self._state(0, 0)

    def load(self, request: Load) -> StateAnswer:
        """Replace the learner's state."""
        arrays, meta = decode_arrays(bytes(request.state))
        epoch, env_steps = meta.get("epoch"), meta.get("env_steps")
        if type(epoch) is not int or type(env_steps) is not int or epoch < 0 or env_steps < 0:
            raise ProtocolError("the state does not say its epoch and environment steps")
        self._drop_update()
        self.learner.import_state(arrays)
        return StateAnswer(epoch, env_steps, digest(self.learner.policy_arrays()))

    def collect(self, request: Collect) -> Collected:
        """Collect experience."""
        collected = self.learner.collect(request.num_steps)
        returns = tuple(float(value) for value in collected.episode_returns)
        return Collected(collected.samples, collected.total, returns)

    def merge(self, request: Merge) -> MergeAnswer:
        """Start the update, or send it the average that it waits for."""
        rejected: list[PeerId] = []
        try:
            if not request.authors:
                self._drop_update(keep_samples=True)
                self._update = self.learner.update()
                exchange = next(self._update)
            else:
                exchange = self._running_update().send(self._average(request, rejected))
        except StopIteration as end:
            self._update = None
            stats: UpdateStats = end.value
            state = self._state(request.epoch, request.env_steps)
            return MergeAnswer(state=state, stats=stats.metrics, rejected=tuple(rejected))
        self._template = exchange.template
        contribution = encode_arrays(exchange.arrays, {}) if exchange.weight > 0 else None
        return MergeAnswer(weight=exchange.weight, contribution=contribution, rejected=tuple(rejected))

    def _running_update(self) -> Generator[Exchange, Arrays, UpdateStats]:
        if self._update is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "no update is under way")
        return self._update

    def _average(self, request: Merge, rejected: list[PeerId]) -> Arrays:
        contributions = []
        for author, weight, data in zip(request.authors, request.weights, request.contributions, strict=True):
            try:
                contribution = Contribution(author, weight, decode_arrays(bytes(data))[0])
                validate(contribution, self._template)
            except ProtocolError:
                rejected.append(author)
                continue
            contributions.append(contribution)
        if not contributions:
            raise RemoteError(Status.FAILED_PRECONDITION, "no contribution of the round is well-formed")
        return merge(contributions)

    def abandon(self, _: Empty) -> Empty:
        """Drop what was collected and any half-done update."""
        self._drop_update()
        return Empty()

    def _drop_update(self, *, keep_samples: bool = False) -> None:
        if self._update is not None:
            self._update.close()
            self._update = None
        if not keep_samples:
            self.learner.abandon()

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Evaluate the present policy."""
        returns = self.learner.evaluate(request.episodes, request.seed)
        return Evaluated(tuple(float(value) for value in returns))

    def finish(self, request: Finish) -> Empty:
        """Write the results of the run."""
        folder = Path(request.folder)
        folder.mkdir(parents=True, exist_ok=True)
        policy = encode_arrays(self.learner.policy_arrays(), request.result)
        _write(folder / "policy.safetensors", policy)
        _write(folder / "result.json", (json.dumps(request.result, indent=2) + "\n").encode())
        _draw_curve(folder / "curve.png", request)
        return Empty()

    def _state(self, epoch: int, env_steps: int) -> StateAnswer:
        learner = self.learner
        data = encode_arrays(learner.export_state(), {"epoch": epoch, "env_steps": env_steps})
        return StateAnswer(epoch, env_steps, digest(learner.policy_arrays()), data)


def _write(path: Path, data: bytes) -> None:
    half = path.with_name(path.name + ".part")
    half.write_bytes(data)
    half.replace(path)


def _draw_curve(path: Path, request: Finish) -> None:
    import matplotlib as mpl  # a second's import that only the end of a run needs

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [point[1] for point in request.curve]
    axes.plot(steps, [point[2] for point in request.curve], marker="o", markersize=3, label="mean evaluation return")
    target = request.result.get("target_return")
    if isinstance(target, int | float):
        axes.axhline(target, linestyle="--", linewidth=1, color="tab:green", label=f"target {target:g}")
    axes.set_xlabel("environment steps, all peers together")
    axes.set_ylabel("return")
    axes.set_title(str(request.result.get("task", "")))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    half = path.with_name("." + path.name)
    figure.savefig(half, dpi=120)
    plt.close(figure)
    half.replace(path)


def serve(connection_socket: socket.socket) -> None:
    """Do calls until the far side closes the socket."""
    worker = Worker()
    connection = RpcConnection(max_attachment_bytes=MAX_WORKER_ATTACHMENT_BYTES)
    while data := connection_socket.recv(1 << 20):
        for event in connection.receive_data(data, time.monotonic()):
            if isinstance(event, Called):
                _do(worker, connection, event)
                for piece in connection.data_to_send():
                    connection_socket.sendall(piece)


def _do(worker: Worker, connection: RpcConnection, call: Called) -> None:
    try:
        request_type, method = worker.methods[call.method]
        body, attachments = encode_message(method(decode_message(request_type, call.body, call.attachments)))
        connection.answer(call.call_id, body, attachments)
    except KeyError:
        connection.fail(call.call_id, Status.UNIMPLEMENTED, f"a worker has no method {call.method}")
    except RemoteError as error:
        connection.fail(call.call_id, error.status, error.message)
    except ShoalError as error:
        connection.fail(call.call_id, Status.INVALID_ARGUMENT, str(error))
    except OSError as error:
        connection.fail(call.call_id, Status.RESOURCE_EXHAUSTED, f"{error.strerror}: {error.filename}")


def main() -> None:
    """Serve the socket whose file descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node, which closes the socket
    torch.set_num_threads(1)
    os.nice(5)  # the node that this worker belongs to comes first
    try:
        serve(socket.socket(fileno=int(sys.argv[1])))
    except (ConnectionError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
