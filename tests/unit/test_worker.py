"""A worker lives through whatever a call brings, tells it as what it is, and takes over no numbers that end a run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from shoal.protocol.codec import decode_message, encode_message
from shoal.protocol.errors import ProtocolError, RemoteError, ShoalError, Status, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.rpc import Answered, Failed, RpcConnection
from shoal.protocol.services import Empty, Method
from shoal.training import keeper, merging
from shoal.training.algorithms.base import Exchange
from shoal.training.algorithms.engine import PolicyLearner
from shoal.training.arena import Region
from shoal.training.electorate import MAX_MISSED
from shoal.training.exchange.codecs import Sender
from shoal.training.exchange.rules import WRITTEN, Codec
from shoal.training.manifest import Manifest, Mode
from shoal.training.state import decode_arrays, digest, encode_arrays
from shoal.training.statements import MAX_OFFERS, NO_BALLOT
from shoal.training.worker import Worker, serve
from shoal.training.worker_calls import (
    BEGIN,
    COLLECT,
    LARGE_STATE_BYTES,
    MERGE,
    MERGE_FAILED,
    OPEN,
    Abandon,
    Begin,
    Collect,
    Load,
    Log,
    Merge,
    MergeAnswer,
    Open,
)

SWARM = SwarmId(str(Cid.of_block(b"a run")))
PEERS = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 9))
PARENT = Cid.of_block(b"the policy before")
BALLOT = bytes(range(32))
SECONDS = 2.0
SMALL = {"num_envs": 4, "update_epochs": 2, "num_minibatches": 4, "hidden_sizes": [16, 16]}


def a_manifest(task: str = "gym:CartPole-v1", mode: Mode = Mode.LOCAL, **settings: Any) -> Manifest:
    settings = SMALL | settings
    return Manifest(owner=PEERS[0], task=task, algorithm="ppo", hyperparameters=settings, mode=mode, batch_size=256)


def a_worker(manifest: Manifest | None = None, peer: PeerId = PEERS[0]) -> Worker:
    worker = Worker()
    worker.open(Open(manifest or a_manifest(), peer, swarm=SWARM))
    return worker


def fingerprint(worker: Worker) -> str:
    learner = worker.learner
    assert isinstance(learner, PolicyLearner)
    return digest(learner._state())


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def served(worker: Worker) -> Iterator[Callable[[Method[Any, Any], object], Any]]:
    """A worker behind its socket, as the node sees it."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, worker))
    thread.start()
    connection = RpcConnection()

    def call(method: Method[Any, Any], request: object) -> Any:
        body, attachments = encode_message(request)
        connection.call(method.name, body, attachments, now=0.0, timeout_s=60)
        for piece in connection.data_to_send():
            ours.sendall(piece)
        while True:
            for event in connection.receive_data(ours.recv(1 << 20), 0.0):
                match event:
                    case Failed(_, error):
                        raise error
                    case Answered(_, answer, parts):
                        return decode_message(method.answer, answer, parts)

    try:
        yield call
    finally:
        ours.close()
        thread.join()
        theirs.close()


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (KeyError("nothing called x"), Status.INTERNAL, "KeyError: 'nothing called x'"),
        (ZeroDivisionError("by zero"), Status.INTERNAL, "ZeroDivisionError: by zero"),
        (OverflowError("too large"), Status.INTERNAL, "OverflowError: too large"),
        (RecursionError("too deep"), Status.INTERNAL, "RecursionError: too deep"),
        (UsageError("do this instead"), Status.INVALID_ARGUMENT, "do this instead"),
        (ProtocolError("no such form"), Status.INVALID_ARGUMENT, "no such form"),
        (RemoteError(Status.ABORTED, "again"), Status.ABORTED, "again"),
        (OSError(28, "No space left on device", "/x"), Status.RESOURCE_EXHAUSTED, "No space left on device: /x"),
        (OSError(24, "Too many open files"), Status.RESOURCE_EXHAUSTED, "Too many open files"),
        (MemoryError(), Status.RESOURCE_EXHAUSTED, "out of memory"),
    ],
)
def test_whatever_a_method_raises_is_told_as_what_it_is_and_the_worker_lives_on(
    raised: Exception, status: Status, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = a_worker()

    def fail(_: Collect) -> None:
        raise raised

    whole = worker.methods[COLLECT.name]
    with served(worker) as call:
        worker.methods[COLLECT.name] = (Collect, fail)
        with pytest.raises(RemoteError) as told:
            call(COLLECT, Collect(8))
        assert (told.value.status, told.value.message) == (status, words)
        worker.methods[COLLECT.name] = whole
        assert call(COLLECT, Collect(8)).samples == 8
    if not isinstance(raised, ShoalError):
        assert "Traceback" in caplog.text


def test_a_method_that_a_worker_does_not_have_is_unimplemented() -> None:
    with served(a_worker()) as call:
        with pytest.raises(RemoteError, match="no method") as told:
            call(Method("worker.fly", Empty, Empty), Empty())
        assert told.value.status is Status.UNIMPLEMENTED
        assert call(OPEN, Open(a_manifest(), PEERS[0])).epoch == 0


def test_an_answer_that_cannot_be_written_does_not_end_the_worker() -> None:
    worker = a_worker()
    worker.methods["worker.count"] = (Empty, lambda _: Collect(2**70))
    with served(worker) as call:
        with pytest.raises(RemoteError, match="OverflowError") as told:
            call(Method("worker.count", Empty, Collect), Empty())
        assert told.value.status is Status.INTERNAL
        assert call(COLLECT, Collect(8)).samples == 8


def test_an_update_that_fails_can_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = a_worker()
    worker.collect(Collect(64))
    before = fingerprint(worker)
    answer = begin(worker)
    with monkeypatch.context() as patched:
        patched.setattr(PolicyLearner, "_require_sane", lambda *_: {}["nothing"])
        with pytest.raises(KeyError):
            worker.merge(merge_of({PEERS[0]: answer}))
    assert fingerprint(worker) == before
    with pytest.raises(RemoteError, match="no update is under way"):
        worker.merge(merge_of({PEERS[0]: answer}))
    again = begin(worker)
    assert worker.merge(merge_of({PEERS[0]: again})).state is not None


# --- states ----------------------------------------------------------------------------------------------------------


DESCENT: dict[str, Any] = {
    "epoch": 1,
    "env_steps": 256,
    "parent": PARENT,
    "ballot": BALLOT.hex(),
    "electorate": {PEERS[0]: [256.0, 128.0, 0]},
}


def a_state(worker: Worker, meta: dict[str, Any] | None = None, **changes: Any) -> bytes:
    arrays = worker.learner.export_state()
    for name, value in changes.items():
        array = np.asarray(arrays[name.replace("__", "/")])
        changed = array.copy()
        changed[...] = value
        arrays[name.replace("__", "/")] = changed
    return encode_arrays(arrays, DESCENT | (meta or {}))


@pytest.mark.parametrize(
    "meta",
    [
        {"epoch": 2**53 + 1},
        {"epoch": 2**53},
        {"epoch": -1},
        {"epoch": True},
        {"epoch": 1.0},
        {"epoch": None},
        {"env_steps": 2**53 + 1},
        {"env_steps": 2**53},
        {"env_steps": 2**70},
        {"env_steps": -1},
    ],
)
def test_a_state_with_an_epoch_or_steps_that_cannot_be_is_refused(meta: dict[str, Any]) -> None:
    refuses(lambda worker: a_state(worker, meta))


@pytest.mark.parametrize(
    "changes",
    [
        {"adam__step": 2**63 - 1},
        {"adam__step": 2**40 + 1},
        {"adam__step": -1},
        {"adam__first": 0.9e30},
        {"adam__first": np.nan},
        {"adam__first": 0.4},
        {"adam__second": 1e30},
        {"adam__second": -1e-6},
        {"parameters__actor__0__bias": 1e10},
        {"parameters__actor__0__bias": -np.inf},
        {"parameters__actor__log_std": 1e3},
        {"parameters__actor__log_std": -1e9},
        {"moments__observation__count": 2.0**60},
        {"moments__observation__count": np.nan},
        {"moments__observation__mean": 1e300},
        {"moments__observation__m2": 1e300},
        {"moments__return__m2": -1.0},
    ],
)
def test_a_state_that_no_learner_exports_is_refused(changes: dict[str, Any]) -> None:
    refuses(lambda worker: a_state(worker, **changes), "gym:Pendulum-v1")


@pytest.mark.parametrize(
    "meta",
    [
        {"parent": 7},
        {"parent": "nobody"},
        {"parent": []},
        {"ballot": None},
        {"ballot": 7},
        {"ballot": "no hex"},
        {"ballot": "00" * 31},
        {"ballot": "00" * 33},
        {"electorate": None},
        {"electorate": []},
        {"electorate": {"nobody": [256.0, 128.0, 0]}},
        {"electorate": {PEERS[0]: 256.0}},
        {"electorate": {PEERS[0]: [256.0, 128.0]}},
        {"electorate": {PEERS[0]: ["256", 128.0, 0]}},
        {"electorate": {PEERS[0]: [0.0, 128.0, 0]}},
        {"electorate": {PEERS[0]: [-1.0, 128.0, 0]}},
        {"electorate": {PEERS[0]: [2.0**32, 128.0, 0]}},
        {"electorate": {PEERS[0]: [256.0, 1e9, 0]}},
        {"electorate": {PEERS[0]: [256.0, 128.0, MAX_MISSED]}},
        {"electorate": {PEERS[0]: [256.0, 128.0, -1]}},
        {"electorate": {PEERS[0]: [256.0, 128.0, True]}},
        {"electorate": {PeerId.of_public_key(bytes([n]) * 32): [1.0, 1.0, 0] for n in range(MAX_OFFERS + 1)}},
    ],
)
def test_a_state_that_does_not_say_where_it_comes_from_is_refused(meta: dict[str, Any]) -> None:
    refuses(lambda worker: a_state(worker, meta))


@pytest.mark.parametrize("missing", ["ballot", "electorate"])
def test_a_state_that_leaves_out_a_part_of_its_descent_is_refused(missing: str) -> None:
    rest = {name: value for name, value in DESCENT.items() if name != missing}
    refuses(lambda worker: encode_arrays(worker.learner.export_state(), rest))


def test_a_state_is_loaded_with_its_descent() -> None:
    worker = a_worker()
    answer = worker.load(Load(a_state(worker)))
    assert (answer.epoch, answer.env_steps, answer.parent, answer.ballot) == (1, 256, PARENT, BALLOT)
    assert answer.electorate == DESCENT["electorate"]
    initial = worker.open(Open(a_manifest(), PEERS[0]))
    assert (initial.epoch, initial.parent, initial.ballot, initial.electorate) == (0, None, NO_BALLOT, {})


def test_moments_that_the_run_does_not_take_are_refused() -> None:
    refuses(lambda worker: a_state(worker, moments__observation__count=256.0))


def refuses(make: Callable[[Worker], bytes], task: str = "gym:CartPole-v1") -> None:
    """A state is refused and nothing has changed: not the state, not the samples, not the update under way."""
    worker = a_worker(a_manifest(task))
    data = make(worker)
    worker.collect(Collect(64))
    before = fingerprint(worker)
    answer = begin(worker)
    with pytest.raises(ProtocolError):
        worker.load(Load(data))
    assert worker.merge(merge_of({PEERS[0]: answer})).state is not None
    assert fingerprint(worker) != before
    worker.load(Load(a_state(worker)))


@pytest.mark.parametrize("counts", [(2**53 + 1, 0), (0, 2**63), (-1, 0)])
def test_an_update_to_an_epoch_that_cannot_be_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError):
        begin(a_worker(), *counts)


def test_an_update_of_a_policy_that_the_worker_does_not_hold_is_refused() -> None:
    with pytest.raises(RemoteError, match="holds epoch 0, not 1") as told:
        begin(a_worker(), 1)
    assert told.value.status is Status.FAILED_PRECONDITION


def test_an_update_from_an_electorate_that_cannot_be_leaves_the_one_under_way() -> None:
    worker = a_worker()
    worker.collect(Collect(64))
    answer = begin(worker)
    with pytest.raises(ProtocolError):
        begin(worker, nobody=[1.0, 1.0, 0])
    assert worker.merge(merge_of({PEERS[0]: answer})).state is not None


# --- merging ---------------------------------------------------------------------------------------------------------


def begin(worker: Worker, epoch: int = 0, env_steps: int | None = None, **electorate: Any) -> MergeAnswer:
    """Start the update of the policy of an epoch, into which as many steps went as the manifest wants."""
    return worker.begin(Begin(epoch, PARENT, 256 * epoch if env_steps is None else env_steps, electorate))


def merge_of(answers: dict[PeerId, MergeAnswer]) -> Merge:
    authors = tuple(sorted(peer for peer, answer in answers.items() if answer.contribution is not None))
    return Merge(
        BALLOT,
        authors,
        tuple(int(answers[author].weight) for author in authors),
        tuple(SECONDS for _ in authors),
        tuple(bytes(answers[author].contribution or b"") for author in authors),
    )


def forge(answer: MergeAnswer, value: Callable[[str, np.ndarray[Any, Any]], Any]) -> MergeAnswer:
    arrays = decode_arrays(bytes(answer.contribution or b""))[0]
    forged = {name: np.asarray(value(name, array), array.dtype) for name, array in arrays.items()}
    return MergeAnswer(4 * 256.0, encode_arrays(forged, {}))


def huge(name: str, array: np.ndarray[Any, Any]) -> Any:
    signs = np.where(np.arange(array.size).reshape(array.shape) % 2, -1.0, 1.0)
    if name.startswith("nonneg/") or name.endswith(("/count", "/m2")):
        return np.full(array.shape, 4 * 256.0) if name.endswith("/count") else np.full(array.shape, 0.99e30)
    return 0.99e30 * signs


@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("num_peers", [2, 3, 4, 8])
def test_one_contribution_of_numbers_near_the_limit_changes_nothing_but_who_is_left_out(
    num_peers: int, mode: Mode, task: str
) -> None:
    """Row by row of every exchange of an epoch, one of the peers sends ±0.99e30."""
    run = a_manifest(task, mode)
    peers, liar = PEERS[:num_peers], PEERS[num_peers // 2]
    workers = {peer: a_worker(run, peer) for peer in peers}
    for epoch in (1, 2):
        for worker in workers.values():
            worker.collect(Collect(256 // num_peers))
        answers = {peer: begin(worker, epoch - 1) for peer, worker in workers.items()}
        while all(answer.state is None for answer in answers.values()):
            sent = answers | {liar: forge(answers[liar], huge)}
            answers = {peer: worker.merge(merge_of(sent)) for peer, worker in workers.items() if peer != liar} | {
                liar: workers[liar].merge(merge_of(sent))
            }
            assert {answer.rejected for answer in answers.values()} == {(liar,)}
        states = {bytes(answer.state.state or b"") for answer in answers.values() if answer.state is not None}
        assert len(states) == 1
        assert all(np.isfinite(array).all() for array in decode_arrays(states.pop())[0].values())
        assert all(np.isfinite(list(answer.stats.values())).all() for answer in answers.values())


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "nnm+multi_krum", "arc+nnm+centered_clipping"])
def test_a_plausible_lie_reaches_no_further_than_the_honest_by_the_rule_of_the_manifest(
    aggregator: str, mode: Mode
) -> None:
    """One of four turns round what it found, and adds as much as anybody may; all four end with the same bits."""
    run = replace(a_manifest("gym:Pendulum-v1", mode), aggregator=aggregator)
    workers = {peer: a_worker(run, peer) for peer in PEERS[:4]}
    liar, honest = PEERS[2], [PEERS[0], PEERS[1], PEERS[3]]
    for epoch in (1, 2):
        for worker in workers.values():
            worker.collect(Collect(64))
        answers = {peer: begin(worker, epoch - 1) for peer, worker in workers.items()}
        while all(answer.state is None for answer in answers.values()):
            said = {peer: decode_arrays(bytes(answer.contribution or b""))[0] for peer, answer in answers.items()}
            lies = {name: turned_round(name, array, workers[liar]) for name, array in said[liar].items()}
            sent = answers | {liar: MergeAnswer(answers[liar].weight, encode_arrays(lies, {}))}
            rejected: list[PeerId] = []
            merged = workers[liar]._average(merge_of(sent), rejected)
            assert not rejected
            for name in (each for each in merged if each.startswith(("mean/", "nonneg/"))):
                true = np.stack([said[peer][name].astype(np.float64) for peer in honest])
                apart = max(np.linalg.norm(one - other) for one in true for other in true)
                assert np.linalg.norm(merged[name] - true.mean(axis=0)) <= 4 * apart + 1e-12, name
            answers = {peer: worker.merge(merge_of(sent)) for peer, worker in workers.items()}
        assert len({bytes(answer.state.state or b"") for answer in answers.values() if answer.state is not None}) == 1


LOSSY = [codec for codec in WRITTEN if codec is not Codec.FP32]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("codec", LOSSY)
def test_in_every_codec_all_end_with_the_same_bits_and_what_was_lost_is_no_part_of_them(
    codec: Codec, mode: Mode
) -> None:
    run = replace(a_manifest("gym:Pendulum-v1", mode), codec=codec)
    workers = {peer: a_worker(run, peer) for peer in PEERS[:3]}
    for epoch in (1, 2):
        for worker in workers.values():
            worker.collect(Collect(64))
        answers = {peer: begin(worker, epoch - 1) for peer, worker in workers.items()}
        while all(answer.state is None for answer in answers.values()):
            answers = {peer: worker.merge(merge_of(answers)) for peer, worker in workers.items()}
            assert {answer.rejected for answer in answers.values()} == {()}
        states = {bytes(answer.state.state or b"") for answer in answers.values() if answer.state is not None}
        assert len(states) == 1
    assert len({digest(sender_of(worker).memory) for worker in workers.values()}) == len(workers)
    for worker in workers.values():
        worker.load(Load(a_state(worker)))
        assert not sender_of(worker).memory, "a jump to another state leaves what was lost on the way to this one"


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_no_contribution_in_the_codec_of_the_run_is_left_out(codec: Codec) -> None:
    run = replace(a_manifest(), codec=codec)
    workers = {peer: a_worker(run, peer) for peer in PEERS[:3]}
    for worker in workers.values():
        worker.collect(Collect(64))
    answers = {peer: begin(worker) for peer, worker in workers.items()}
    packed, _ = decode_arrays(bytes(answers[PEERS[0]].contribution or b""))
    plain = dict(exchange_of(workers[PEERS[0]]).arrays)
    for lie in (plain, plain | packed, {name: packed[name] for name in packed if "packed" not in name}):
        sent = answers | {PEERS[0]: MergeAnswer(answers[PEERS[0]].weight, encode_arrays(lie, {}))}
        for worker in workers.values():
            rejected: list[PeerId] = []
            worker._average(merge_of(sent), rejected)
            assert rejected == [PEERS[0]]
    held = sender_of(workers[PEERS[0]])
    assert workers[PEERS[0]].merge(merge_of(sent)).rejected == (PEERS[0],)
    assert not held.memory, "what was not merged was not sent"


def exchange_of(worker: Worker) -> Exchange:
    """What it wants averaged now."""
    assert isinstance(worker._merging.wanted, Exchange)
    return worker._merging.wanted


def sender_of(worker: Worker) -> Sender:
    """What its contributions go through."""
    return worker._merging._sender("", exchange_of(worker))


def turned_round(name: str, array: np.ndarray[Any, Any], worker: Worker) -> Any:
    if name.startswith(("moments/", "nonneg/")):
        return array
    if name == "mean/travel":  # the square of how far that is
        return 9 * array
    centre = exchange_of(worker).centres.get(name, np.zeros_like(array))
    return (centre - 3 * (array - centre)).astype(array.dtype) if "adam" not in name else array


@pytest.mark.parametrize("mode", list(Mode))
def test_fast_and_slow_honest_peers_leave_nobody_out(mode: Mode) -> None:
    """Two that had the time for one vector step, and one with all the rest of the batch."""
    run = a_manifest("gym:CartPole-v1", mode, update_epochs=5, num_minibatches=32)
    workers = {peer: a_worker(run, peer) for peer in PEERS[:3]}
    for epoch in (1, 2):
        for worker, steps in zip(workers.values(), (4, 4, 256), strict=True):
            worker.collect(Collect(steps))
        answers = {peer: begin(worker, epoch - 1) for peer, worker in workers.items()}
        while all(answer.state is None for answer in answers.values()):
            answers = {peer: worker.merge(merge_of(answers)) for peer, worker in workers.items()}
            if mode is Mode.LOCAL:
                assert {answer.rejected for answer in answers.values()} == {()}


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("mean/parameters", lambda array: array + 1.0, "further than"),
        ("mean/adam/first", lambda array: array * 0 + 0.4, "too large for the second"),
        ("nonneg/adam/second", lambda array: array * 0 + 0.3, "longer than"),
        ("mean/travel", lambda array: array * 4, "travelled"),
        ("moments/observation/count", lambda array: array + 1, "count"),
        ("moments/return/mean", lambda array: array + 1e16, "beyond"),
    ],
)
def test_what_the_optimiser_cannot_have_made_is_left_out_even_of_a_pair(
    name: str, value: Callable[[Any], Any], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_manifest("gym:Pendulum-v1")
    workers = {peer: a_worker(run, peer) for peer in PEERS[:2]}
    for worker in workers.values():
        worker.collect(Collect(128))
    answers = {peer: begin(worker) for peer, worker in workers.items()}
    assert all(worker._average(merge_of(answers), []) for worker in workers.values())
    forged = forge(answers[PEERS[1]], lambda key, array: value(array) if key == name else array)
    sent = answers | {PEERS[1]: MergeAnswer(answers[PEERS[1]].weight, forged.contribution)}
    for worker in workers.values():
        answer = worker.merge(merge_of(sent))
        assert answer.rejected == (PEERS[1],)
        assert answer.state is not None
    assert complaint in caplog.text


def test_a_merge_that_leads_nowhere_is_taken_back_and_told_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = a_worker()
    worker.collect(Collect(64))
    before = fingerprint(worker)
    answer = begin(worker)
    request = merge_of({PEERS[0]: answer})
    with monkeypatch.context() as patched:
        patched.setattr(merging, "merge", lambda *_, **__: decode_arrays(bytes(endless(answer)))[0])
        with pytest.raises(RemoteError, match=PEERS[0]) as told:
            worker.merge(request)
    assert told.value.status is MERGE_FAILED
    assert fingerprint(worker) == before
    assert worker.learner.samples == 64
    again = begin(worker)
    assert worker.merge(merge_of({PEERS[0]: again})).state is not None


def endless(answer: MergeAnswer) -> bytes:
    """Parameters that fit and whose values overflow."""
    arrays = decode_arrays(bytes(answer.contribution or b""))[0]
    return encode_arrays(arrays | {"mean/parameters": np.full_like(arrays["mean/parameters"], 1e30)}, {})


@pytest.mark.parametrize("codec", WRITTEN)
def test_a_step_that_no_optimiser_can_have_come_to_is_left_out_in_mode_diloco(codec: Codec) -> None:
    run = replace(a_manifest(mode=Mode.DILOCO), codec=codec)
    workers = {peer: a_worker(run, peer) for peer in PEERS[:2]}
    for worker in workers.values():
        worker.collect(Collect(128))
    answers = {peer: begin(worker) for peer, worker in workers.items()}
    liar = workers[PEERS[1]]
    exchange = exchange_of(liar)
    most = exchange.lossy["mean/delta"]
    for size, expected in ((0.999 * most, []), (1.1 * most, [PEERS[1]])):
        arrays = exchange.arrays | {"mean/delta": np.full_like(exchange.arrays["mean/delta"], size)}
        data = Sender(codec).encode(arrays, {"mean/delta": 1e9}, {})
        rejected: list[PeerId] = []
        sent = answers | {PEERS[1]: MergeAnswer(answers[PEERS[1]].weight, data)}
        workers[PEERS[0]]._average(merge_of(sent), rejected)
        assert rejected == expected


def test_what_topk_sends_late_is_not_given_momentum_on_top() -> None:
    for codec, expected in ((Codec.INT8, (0.7, 0.9)), (Codec.TOPK, (1.0, 0.0))):
        learner = a_worker(replace(a_manifest(mode=Mode.DILOCO), codec=codec)).learner
        assert isinstance(learner, PolicyLearner)
        assert (learner.config.outer_learning_rate, learner.config.outer_momentum) == expected


@pytest.mark.parametrize("value", [np.nan, 1e3])
def test_an_outer_momentum_that_nobody_can_have_is_refused(value: float) -> None:
    worker = a_worker(a_manifest(mode=Mode.DILOCO))
    before = fingerprint(worker)
    with pytest.raises(ProtocolError):
        worker.load(Load(a_state(worker, outer__momentum=value)))
    assert fingerprint(worker) == before


@pytest.mark.parametrize("field", ["authors", "weights", "seconds", "contributions"])
def test_lists_that_do_not_fit_together_are_refused_and_the_update_still_waits(field: str) -> None:
    worker = a_worker()
    worker.collect(Collect(64))
    request = merge_of({PEERS[0]: begin(worker)})
    with pytest.raises(ProtocolError, match="not of one number"):
        worker.merge(replace(request, **{field: ()}))
    assert worker.merge(request).state is not None


@pytest.mark.parametrize("mode", list(Mode))
def test_only_what_was_let_in_counts_and_the_same_at_every_member(mode: Mode) -> None:
    """Of four, one gives nonsense and one nothing; the first exchange of an epoch says who counts."""
    run = a_manifest(mode=mode)
    peers, liar, idle = PEERS[:3], PEERS[1], PEERS[3]
    workers = {peer: a_worker(run, peer) for peer in peers}
    standing = {idle: [80.0, 10.0, 0], PEERS[0]: [100.0, 10.0, 2]}
    for steps, worker in zip((64, 96, 128), workers.values(), strict=True):
        worker.collect(Collect(steps))
    answers = {peer: begin(worker, env_steps=1000, **standing) for peer, worker in workers.items()}
    weights = {peer: answer.weight for peer, answer in answers.items()}
    liars = [liar]
    while all(answer.state is None for answer in answers.values()):
        sent = answers | {each: forge(answers[each], huge) for each in liars}
        answers = {peer: worker.merge(merge_of(sent)) for peer, worker in workers.items()}
        assert {answer.rejected for answer in answers.values()} == {tuple(liars)}
        liars = [] if liars else [PEERS[2]]  # who was let in first counts, whatever it gives later
    states = [answer.state for answer in answers.values() if answer.state is not None]
    assert len({bytes(state.state or b"") for state in states}) == 1
    meta = decode_arrays(bytes(states[0].state or b""))[1]
    given = {peer: weight for peer, weight in weights.items() if peer != liar}
    electorate = {
        idle: [40.0, 10.0, 1],
        PEERS[0]: [50.0 + given[PEERS[0]] / 2, 5.0 + given[PEERS[0]] / SECONDS / 2, 0],
        PEERS[2]: [given[PEERS[2]], given[PEERS[2]] / SECONDS, 0],
    }
    assert meta == {
        "epoch": 1,
        "env_steps": 1000 + sum(given.values()),
        "parent": PARENT,
        "ballot": BALLOT.hex(),
        "electorate": electorate,
    }
    for state in states:
        assert (state.env_steps, state.parent, state.ballot) == (meta["env_steps"], PARENT, BALLOT)
        assert state.electorate == electorate
    newcomer = a_worker(run, idle)
    assert newcomer.load(Load(states[0].state or b"")).electorate == electorate


def test_what_was_collected_is_kept_or_dropped_with_an_update_that_is_given_up() -> None:
    worker = a_worker()
    worker.collect(Collect(64))
    for keep_samples, left in ((True, 64), (False, 0)):
        answer = begin(worker)
        worker.abandon(Abandon(keep_samples))
        assert worker.learner.samples == left
        with pytest.raises(RemoteError, match="no update is under way"):
            worker.merge(merge_of({PEERS[0]: answer}))


def test_a_round_without_any_contribution_of_use_still_waits_for_one() -> None:
    worker = a_worker()
    worker.collect(Collect(64))
    answer = begin(worker)
    with pytest.raises(RemoteError, match="of any use") as told:
        worker.merge(merge_of({PEERS[0]: forge(answer, huge)}))
    assert told.value.status is Status.FAILED_PRECONDITION
    assert worker.merge(merge_of({PEERS[0]: answer})).state is not None


# --- samples of the policy before ------------------------------------------------------------------------------------


def solo(worker: Worker, epoch: int) -> bytes:
    """One update by a worker alone; the state that it leads to."""
    answer = begin(worker, epoch - 1)
    while answer.state is None:
        answer = worker.merge(merge_of({PEERS[0]: answer}))
    return bytes(answer.state.state or b"")


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_what_an_overtaken_learner_collected_counts_in_the_next_epoch(task: str, mode: Mode) -> None:
    run = a_manifest(task, mode)
    fast, slow = a_worker(run), a_worker(run, PEERS[1])
    fast.collect(Collect(256))
    slow.collect(Collect(64))
    learner = slow.learner
    assert isinstance(learner, PolicyLearner)
    expected = learner._log_probs(learner._streams[0])
    answer = slow.load(Load(solo(fast, 1), keep_samples=True))
    assert (answer.epoch, answer.epoch_samples) == (1, 64)
    assert slow.collect(Collect(32)).epoch_samples == 96
    # The ratio is that of the paper: to the policy that acted, with its normaliser.
    log_probs = learner._batch().log_probs
    np.testing.assert_array_equal(log_probs[:64], expected.ravel())
    np.testing.assert_array_equal(log_probs[64:], learner._log_probs(learner._streams[0]).ravel()[64:])
    contribution = begin(slow, 1)
    if mode is Mode.LOCAL:
        assert contribution.weight == 96
    while contribution.state is None:
        contribution = slow.merge(merge_of({PEERS[1]: contribution}))
    assert np.isfinite(list(contribution.stats.values())).all()
    assert slow.learner.samples == 0


def test_no_sample_is_more_than_one_policy_version_old() -> None:
    fast, slow = a_worker(), a_worker(peer=PEERS[1])
    fast.collect(Collect(256))
    slow.collect(Collect(64))
    first = solo(fast, 1)
    assert slow.load(Load(first, keep_samples=True)).epoch_samples == 64
    slow.collect(Collect(16))
    fast.collect(Collect(256))
    second = solo(fast, 2)
    assert slow.load(Load(second, keep_samples=True)).epoch_samples == 16
    fast.collect(Collect(256))
    solo(fast, 3)
    fast.collect(Collect(256))
    assert slow.load(Load(solo(fast, 4), keep_samples=True)).epoch_samples == 0
    slow.collect(Collect(16))
    assert slow.load(Load(first)).epoch_samples == 0


def test_kept_samples_keep_their_cut_episodes() -> None:
    """Pendulum's episodes are cut after 200 steps: those of dropped steps are dropped, those of kept ones are kept."""
    worker = a_worker(a_manifest("gym:Pendulum-v1"))
    fast = a_worker(a_manifest("gym:Pendulum-v1"), PEERS[1])
    worker.collect(Collect(4 * 250))
    states = []
    for epoch in (1, 2):
        fast.collect(Collect(256))
        answer = begin(fast, epoch - 1)
        while answer.state is None:
            answer = fast.merge(merge_of({PEERS[1]: answer}))
        states.append(bytes(answer.state.state or b""))
    assert worker.load(Load(states[0], keep_samples=True)).epoch_samples == 1000
    worker.collect(Collect(4 * 160))
    learner = worker.learner
    assert isinstance(learner, PolicyLearner)
    assert len(learner._streams[0].rollout().final_observations) == 8
    assert worker.load(Load(states[1], keep_samples=True)).epoch_samples == 640
    rollout = learner._streams[0].rollout()
    assert rollout.truncated.sum() == len(rollout.final_observations) == 4
    assert solo(worker, 3)


def test_a_contribution_of_a_megabyte_or_more_lies_in_the_arena() -> None:
    small, large = a_worker(), a_worker(a_manifest(hidden_sizes=[256, 256]))  # below the size that is reduced by parts
    for worker in (small, large):
        worker.collect(Collect(64))
    assert begin(small).contribution is not None
    answer = begin(large)
    assert answer.contribution is None
    data = bytes(large._arena.view(Region.OFFERED, answer.contribution_bytes))
    assert answer.contribution_bytes >= LARGE_STATE_BYTES
    done = large.merge(merge_of({PEERS[0]: replace(answer, contribution=data)}))
    assert done.state is not None


# --- samples of an update that waits ---------------------------------------------------------------------------------

APART = [Mode.LOCAL, Mode.DILOCO]


def after(count: int) -> Callable[[], bool]:
    """Over when it has been asked so often."""
    left = iter(range(count - 1))
    return lambda: next(left, None) is None


def ppo(worker: Worker) -> PolicyLearner:
    assert isinstance(worker.learner, PolicyLearner)
    return worker.learner


@pytest.mark.parametrize("mode", APART)
@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_what_is_collected_while_an_update_waits_is_there_for_the_next_one(task: str, mode: Mode) -> None:
    run = a_manifest(task, mode)
    worker, idle, other = a_worker(run), a_worker(run), a_worker(run, PEERS[1])
    for each in (worker, idle, other):
        each.collect(Collect(64))
    answers = [begin(each) for each in (worker, idle, other)]
    worker.collect_ahead(after(5))
    num_envs = ppo(worker).config.num_envs
    expected = ppo(worker)._log_probs(ppo(worker)._streams[0], 64 // num_envs).ravel()
    assert answers[0].weight == answers[1].weight == 64
    ends = [each.merge(merge_of({PEERS[0]: answers[0], PEERS[1]: answers[2]})) for each in (worker, idle)]
    assert ends[0].state is not None
    assert ends[0].state == ends[1].state, "it changes nothing in this update"
    ahead = ends[0].ahead
    assert ends[1].ahead is None
    assert ahead is not None
    assert ahead.samples == ahead.epoch_samples == worker.learner.samples == 5 * num_envs
    assert worker.collect(Collect(32)).epoch_samples == 5 * num_envs + 32
    # The ratio is that of the paper: to the policy that acted, which is what this learner's own steps led to.
    log_probs = ppo(worker)._batch().log_probs
    np.testing.assert_array_equal(log_probs[: 5 * num_envs], expected)
    present = ppo(worker)._log_probs(ppo(worker)._streams[0]).ravel()
    assert not np.array_equal(present[: 5 * num_envs], expected)
    np.testing.assert_array_equal(log_probs[5 * num_envs :], present[5 * num_envs :])
    assert solo(worker, 2)
    assert worker.learner.samples == 0


@pytest.mark.parametrize("mode", APART)
def test_an_update_that_is_given_up_leaves_both_what_it_used_and_what_was_collected_meanwhile(mode: Mode) -> None:
    worker = a_worker(a_manifest("gym:Pendulum-v1", mode))
    worker.collect(Collect(64))
    learner, before = ppo(worker), fingerprint(worker)
    expected = learner._log_probs(learner._streams[0]).ravel()
    begin(worker)
    worker.collect_ahead(after(3))
    meanwhile = learner._log_probs(learner._streams[0]).ravel()[64:]
    worker.abandon(Abandon(keep_samples=True))
    assert fingerprint(worker) == before
    assert learner.samples == 64 + 3 * learner.config.num_envs
    np.testing.assert_array_equal(learner._batch().log_probs, np.concatenate([expected, meanwhile]))
    fast = a_worker(a_manifest("gym:Pendulum-v1", mode), PEERS[1])
    fast.collect(Collect(256))
    assert worker.load(Load(solo(fast, 1), keep_samples=True)).epoch_samples == len(expected) + len(meanwhile)
    np.testing.assert_array_equal(learner._batch().log_probs, np.concatenate([expected, meanwhile]))
    assert solo(worker, 2)


def test_what_was_collected_while_an_update_waited_is_no_older_than_anything_else() -> None:
    worker, fast = a_worker(), a_worker(peer=PEERS[1])
    for each in (worker, fast):
        each.collect(Collect(64))
    answer = begin(worker)
    worker.collect_ahead(after(4))
    worker.merge(merge_of({PEERS[0]: answer}))
    num_ahead = worker.learner.samples
    worker.collect(Collect(16))
    assert worker.learner.samples == num_ahead + 16
    solo(fast, 1)
    fast.collect(Collect(64))
    assert worker.load(Load(solo(fast, 2), keep_samples=True)).epoch_samples == 16


def test_no_more_is_collected_ahead_than_a_learner_may_offer() -> None:
    run = a_manifest()
    worker = a_worker(run)
    largest = run.batch.largest_share
    worker.collect(Collect(largest + 64))
    begin(worker)
    for _ in range(3):
        worker.collect_ahead(lambda: False)
    assert worker.learner.samples <= 2 * largest
    assert worker.learner.samples > 2 * largest - ppo(worker).config.num_envs


def test_nothing_is_collected_ahead_where_an_update_is_not_done_with_the_samples() -> None:
    worker = a_worker(a_manifest(mode=Mode.GRADIENT))
    worker.collect_ahead(lambda: False)
    worker.collect(Collect(64))
    begin(worker)
    worker.collect_ahead(lambda: False)
    assert worker.learner.samples == 64


def test_a_worker_collects_while_it_waits_and_does_the_next_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = a_worker()
    env, stepped = ppo(worker)._streams[0]._env, threading.Event()
    whole_step = env.step

    def step(actions: Any) -> Any:
        stepped.set()
        return whole_step(actions)

    with served(worker) as call:
        call(COLLECT, Collect(64))
        monkeypatch.setattr(env, "step", step)
        answer = call(BEGIN, Begin(0, PARENT, 0, {}))
        assert stepped.wait(60)
        merged = call(MERGE, merge_of({PEERS[0]: answer}))
        assert merged.ahead is not None
        assert merged.ahead.samples == worker.learner.samples
        assert merged.ahead.seconds > 0


@pytest.mark.parametrize("steps", [0, 2])
def test_an_environment_that_fails_while_it_waits_does_not_end_the_worker(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it collected before that is there for the next update, and it is known who acted."""
    worker = a_worker()
    worker.collect(Collect(64))
    answer = begin(worker)
    stream = ppo(worker)._streams[0]
    whole_step, left = stream._env.step, iter(range(steps))

    def fail(actions: Any) -> Any:
        if next(left, None) is None:
            raise KeyError("no such thing")
        return whole_step(actions)

    monkeypatch.setattr(stream._env, "step", fail)
    worker.collect_ahead(lambda: False)
    assert worker.merge(merge_of({PEERS[0]: answer})).state is not None
    assert worker.learner.samples == steps * ppo(worker).config.num_envs
    assert np.isfinite(stream.log_probs).all()


# --- time ------------------------------------------------------------------------------------------------------------


def test_collecting_ends_early_after_the_time_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose vector step takes 1.4 s shows what it has after 3 s, and goes on from there."""
    worker = a_worker()
    learner = worker.learner
    assert isinstance(learner, PolicyLearner)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    env = learner._streams[0]._env
    whole_step = env.step

    def slow_step(actions: Any) -> Any:
        nonlocal now
        now += 1.4
        return whole_step(actions)

    monkeypatch.setattr(env, "step", slow_step)
    first = worker.collect(Collect(256, max_seconds=3.0))
    assert (first.samples, first.epoch_samples) == (12, 12)
    assert first.seconds == pytest.approx(4.2)
    second = worker.collect(Collect(256, max_seconds=0.1))
    assert (second.samples, second.epoch_samples) == (4, 16)
    assert worker.collect(Collect(16)).seconds == pytest.approx(5.6)


def test_a_learner_takes_at_least_a_step() -> None:
    for senseless in (0, -5):
        with pytest.raises(UsageError):
            a_worker().collect(Collect(senseless))


# --- metrics ---------------------------------------------------------------------------------------------------------


def noted(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What event files say: by name, environment steps and value."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_every_metric_of_an_update_reaches_the_node_and_the_event_files(tmp_path: Path) -> None:
    worker = Worker()
    worker.open(Open(a_manifest(), PEERS[0], str(tmp_path)))
    stats = []
    for epoch in (1, 2):
        worker.collect(Collect(64))
        answer = begin(worker, epoch - 1, 64 * (epoch - 1))
        stats.append(worker.merge(merge_of({PEERS[0]: answer})).stats)
    worker.log(Log(128, {"evaluation/return": 12.5}))
    worker.close()
    assert {"policy_loss", "value_loss", "entropy", "approx_kl", "gradient_norm"} <= stats[0].keys()
    expected = {
        f"training/{name}": [(64, pytest.approx(stats[0][name])), (128, pytest.approx(stats[1][name]))]
        for name in stats[0]
    }
    assert noted(tmp_path) == expected | {"evaluation/return": [(128, 12.5)]}


def test_a_worker_without_a_folder_notes_nothing_and_takes_the_call() -> None:
    a_worker().log(Log(1, {"evaluation/return": 1.0}))


def test_metrics_that_cannot_be_written_do_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    worker = Worker()
    worker.open(Open(a_manifest(), PEERS[0], str(tmp_path)))
    for epoch in (1, 2):
        worker.collect(Collect(64))
        solo(worker, epoch)
    assert caplog.text.count("cannot be written") == 1


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "given"), [({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_what_computes_in_a_worker_has_one_thread_or_as_many_as_a_person_says(
    said: dict[str, str], given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in keeper.THREADS:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    keeper._give_threads()
    assert [os.environ[name] for name in keeper.THREADS] == [given] * 3


def test_metrics_are_written_without_torch_and_it_can_be_loaded_all_the_same() -> None:
    program = "import sys; from shoal.training import events; print('torch' in sys.modules); import torch"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
