"""Training loops that people write are averaged like any learner: the same bits for all, and nobody's loop is hurt."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shoal.node.api.requests import CreateSwarm
from shoal.protocol.errors import NoDaemonError, ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.outer import Outer
from shoal.training.exchange.rules import Codec
from shoal.training.loop.averager import Averager
from shoal.training.loop.gate import Gate, GateClosedError
from shoal.training.loop.learner import VOTES, Averaged, LoopLearner
from shoal.training.loop.tensors import Given, Tensors, differences
from shoal.training.manifest import LOOP_MAX_SAMPLES, Manifest, Mode
from shoal.training.state import decode_arrays, encode_arrays
from shoal.training.statements import NO_BALLOT
from shoal.training.tasks.failures import Failures
from shoal.training.worker import Worker
from shoal.training.worker_calls import Abandon, Begin, Collect, Load, Merge, MergeAnswer, Open, StateAnswer

PEERS = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 6))
PARENT = Cid.of_block(b"the policy before")
END_S = 20.0
pytestmark = pytest.mark.usefixtures("one_thread")


def a_manifest(**given: Any) -> Manifest:
    return Manifest(owner=PEERS[0], task="loop:x", algorithm="average", **given)


class Loop:
    """A loop in a thread of its own, behind a worker that the test drives as a node would."""

    def __init__(self, manifest: Manifest, tensors: Given, peer: PeerId = PEERS[0]) -> None:
        self.peer = peer
        self.tensors = Tensors(tensors)
        self.gate: Gate[Averaged] = Gate()
        self.news: queue.Queue[Averaged | Exception] = queue.Queue()
        self._todo: queue.Queue[Callable[[], Averaged | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.now = 0.0
        self.worker = Worker(None, self._make)
        self.opened = self.worker.open(Open(manifest, peer))
        self.held: StateAnswer | None = None
        self.later(self.gate.wait_for_news)

    def _make(self, request: Open) -> tuple[LoopLearner, Failures]:
        learner = LoopLearner(request.manifest, self.tensors, self.gate, clock=lambda: self.now)
        return learner, Failures("")

    def _run(self) -> None:
        while (todo := self._todo.get()) is not None:
            try:
                found = todo()
            except Exception as error:
                self.news.put(error)
            else:
                if found is not None:
                    self.news.put(found)

    def later(self, what: Callable[[], Averaged | None]) -> None:
        """Have the loop's thread do it, after what it was told before."""
        self._todo.put(what)

    def train(self, by: float, samples: int) -> None:
        """Have the loop move every parameter, and say how much that took."""

        def move() -> Averaged | None:
            with torch.no_grad():
                for tensor in self.tensors.parameters.values():
                    tensor += by
            return self.gate.step(samples)

        self.later(move)

    def heard(self) -> Averaged:
        """What the loop hears next of its tensors."""
        found = self.news.get(timeout=END_S)
        assert isinstance(found, Averaged), found
        return found

    def collect(self, samples: int) -> int:
        return self.worker.collect(Collect(samples, END_S)).epoch_samples

    def begin(self) -> MergeAnswer:
        epoch = 0 if self.held is None else self.held.epoch
        return self.worker.begin(Begin(epoch, PARENT, epoch, {}))

    def load(self, state: StateAnswer, *, keep_samples: bool = False) -> StateAnswer:
        assert state.state is not None
        self.held = self.worker.load(Load(state.state, keep_samples))
        return self.held

    def values(self) -> np.ndarray[Any, Any]:
        return self.tensors.read()[0]

    def end(self) -> None:
        self.gate.close()
        self._todo.put(None)
        self._thread.join(END_S)
        assert not self._thread.is_alive()


def merged(loops: list[Loop], given: list[MergeAnswer]) -> list[MergeAnswer]:
    """Each merges what all gave."""
    request = Merge(
        NO_BALLOT,
        tuple(each.peer for each, answer in zip(loops, given, strict=True) if answer.contribution is not None),
        tuple(int(each.weight) for each in given if each.contribution is not None),
        tuple(1.0 for each in given if each.contribution is not None),
        tuple(each.contribution for each in given if each.contribution is not None),
    )
    answers = [each.worker.merge(request) for each in loops]
    for loop, answer in zip(loops, answers, strict=True):
        loop.held = answer.state
    return answers


@contextmanager
def loops_of(manifest: Manifest, *tensors: Given, begun: bool = True) -> Iterator[list[Loop]]:
    """Loops of one swarm; if they have begun, all hold the tensors of the first."""
    loops: list[Loop] = []
    try:
        loops += [Loop(manifest, each, peer) for each, peer in zip(tensors, PEERS, strict=False)]
        if begun:
            merged(loops, [each.begin() for each in loops])
            assert [each.heard() for each in loops] == [Averaged(1, len(loops))] * len(loops)
        yield loops
    finally:
        for each in loops:
            each.end()


def digests(answers: list[MergeAnswer]) -> set[str]:
    return {answer.state.digest for answer in answers if answer.state is not None}


def vectors(*values: float, size: int = 600) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.full((size,), value)} for value in values]


# --- averaging -------------------------------------------------------------------------------------------------------


def test_loops_begin_with_the_same_state_and_then_with_the_tensors_of_one_of_them() -> None:
    with loops_of(a_manifest(), *vectors(3.0, 5.0, 7.0), begun=False) as loops:
        assert len({bytes(each.opened.state or b"") for each in loops}) == 1
        answers = merged(loops, [each.begin() for each in loops])
        assert [each.heard() for each in loops] == [Averaged(1, 3)] * 3
        assert len(digests(answers)) == 1
        assert all((each.values() == 3.0).all() for each in loops)


@pytest.mark.parametrize("codec", Codec)
def test_after_an_average_all_loops_hold_the_same_bits(codec: Codec) -> None:
    with loops_of(a_manifest(codec=codec, mode=Mode.DILOCO), *vectors(1.0, 1.0, 1.0)) as loops:
        for number in range(3):
            for index, each in enumerate(loops):
                each.train(0.01 * (index + 1), 32 * (index + 1))
                assert each.collect(32 * (index + 1)) == 32 * (index + 1)
            answers = merged(loops, [each.begin() for each in loops])
            assert [each.heard() for each in loops] == [Averaged(number + 2, 3)] * 3
            assert len(digests(answers)) == 1
            assert len({each.values().tobytes() for each in loops}) == 1


def test_the_average_is_weighted_by_samples() -> None:
    with loops_of(a_manifest(), *vectors(1.0, 9.0)) as loops:
        for each, by, samples in zip(loops, (0.4, -0.2), (100, 300), strict=True):
            each.train(by, samples)
            each.collect(samples)
        merged(loops, [each.begin() for each in loops])
        assert loops[0].heard() == loops[1].heard() == Averaged(2, 2)
        np.testing.assert_allclose(loops[1].values(), 1.0 + (100 * 0.4 - 300 * 0.2) / 400, rtol=1e-6)


def test_a_loop_does_not_run_ahead_of_the_average_and_gives_no_more_than_is_believed() -> None:
    with loops_of(a_manifest(batch_per_learner=100), *vectors(0.0)) as (loop,):
        for _ in range(50):
            loop.train(1.0, 30)
        while loop.values()[0] < 4:
            loop.gate.count_to(100, lambda: False)
        loop.gate.hold()
        assert loop.gate.samples == 120, "the rest of its steps wait"
        loop.gate.samples = 100_000  # one step may be of any size
        assert loop.begin().weight == 200


def test_in_mode_diloco_an_outer_step_is_taken_by_the_average() -> None:
    expected = np.ones(600, np.float32)
    outer = Outer(600, learning_rate=0.5, momentum=0.8, max_gradient=np.inf)
    settings = {"outer_learning_rate": 0.5, "outer_momentum": 0.8}
    with loops_of(a_manifest(mode=Mode.DILOCO, hyperparameters=settings), *vectors(1.0, 1.0)) as loops:
        for _ in range(3):
            outer.apply(expected, np.full(600, -0.25, np.float32))
            for each in loops:
                each.train(0.25, 10)
                each.collect(10)
            merged(loops, [each.begin() for each in loops])
            for each in loops:
                each.heard()
        np.testing.assert_allclose(loops[0].values(), expected, rtol=1e-5)


def an_epoch(loops: list[Loop], seconds: list[float]) -> list[MergeAnswer]:
    """Each works for a second, and takes so long to exchange."""
    for loop in loops:
        loop.now += 1.0
        loop.train(0.01, 10)
        loop.collect(10)
    given = [loop.begin() for loop in loops]
    for loop, exchange_s in zip(loops, seconds, strict=True):
        loop.now += exchange_s
    answers = merged(loops, given)
    for loop in loops:
        loop.heard()
    assert len(digests(answers)) == 1
    return given


def test_with_codec_auto_what_takes_too_long_travels_smaller_and_everybody_knows() -> None:
    manifest, size = a_manifest(codec=Codec.AUTO, mode=Mode.DILOCO), 20_000
    with loops_of(manifest, *vectors(1.0, 1.0, 1.0, size=size)) as loops:

        def times_smaller(seconds: list[float]) -> set[int]:
            given = an_epoch(loops, seconds)
            return {round(4 * size / len(each.contribution or b"")) for each in given}

        assert times_smaller([0.5, 0.5, 0.01]) == {1}
        assert times_smaller([0.5, 0.5, 0.01]) == {1}, "one exchange teaches, and the next one votes"
        assert times_smaller([0.5, 0.01, 0.1]) == {4}
        newest = loops[0].held
        assert newest is not None
        with loops_of(manifest, *vectors(9.0, size=size), begun=False) as (late,):
            late.load(newest)
            late.heard()
            late.train(0.01, 10)
            late.collect(10)
            assert round(4 * size / len(late.begin().contribution or b"")) == 4, "who comes later is told"
        assert times_smaller([0.005, 0.005, 0.005]) == {4}, "one of three moves nobody"
        assert times_smaller([0.005, 0.005, 0.005]) == {4}, "all are fast, and say so"
        assert times_smaller([0.005, 0.005, 0.005]) == {1}


def test_a_state_with_a_codec_that_there_is_not_is_refused() -> None:
    with loops_of(a_manifest(codec=Codec.AUTO), *vectors(1.0)) as (loop,):
        assert loop.held is not None
        arrays, meta = decode_arrays(bytes(loop.held.state or b""))
        for step in (-1, 3):
            forged = encode_arrays(arrays | {"codec": np.asarray(step, np.int64)}, meta)
            with pytest.raises(ProtocolError, match="a codec that there is not"):
                loop.worker.load(Load(forged))


def test_who_votes_for_more_than_itself_is_left_out() -> None:
    with loops_of(a_manifest(codec=Codec.AUTO), *vectors(1.0, 1.0)) as loops:
        for loop in loops:
            loop.train(0.01, 10)
            loop.collect(10)
        given = [loop.begin() for loop in loops]
        arrays, meta = decode_arrays(bytes(given[1].contribution or b""))
        forged = encode_arrays(arrays | {VOTES: np.array([100, 0, 0])}, meta)
        answers = merged(loops, [given[0], replace(given[1], contribution=forged)])
        assert [answer.rejected for answer in answers] == [(PEERS[1],)] * 2


def test_the_statistics_of_batch_normalisation_are_averaged_too() -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    with loops_of(a_manifest(), *models) as loops:
        for each, model, value in zip(loops, models, (1.0, 4.0), strict=True):
            model[1].running_mean.fill_(value)
            each.train(0.0, 50)
            each.collect(50)
        merged(loops, [each.begin() for each in loops])
        for each, model in zip(loops, models, strict=True):
            each.heard()
            assert torch.equal(model[1].running_mean, torch.full((4,), 2.5))


def test_who_comes_later_gets_the_newest_state_before_its_first_step() -> None:
    with loops_of(a_manifest(), *vectors(2.0)) as loops:
        (first,) = loops
        first.train(1.0, 8)
        first.collect(8)
        (answer,) = merged(loops, [first.begin()])
        assert first.heard() == Averaged(2, 1)
        assert answer.state is not None
        with loops_of(a_manifest(), *vectors(50.0), begun=False) as (late,):
            assert late.load(answer.state).digest == answer.state.digest
            assert late.heard() == Averaged(2, 0)
            assert late.values().tobytes() == first.values().tobytes()


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [float("nan"), float("inf")])
def test_a_loop_that_has_diverged_gives_nothing_and_hears_which_tensor_it_is(by: float) -> None:
    with loops_of(a_manifest(), *vectors(1.0, 1.0)) as (loop, other):
        for each, way in ((loop, by), (other, 0.5)):
            each.train(way, 10)
            each.collect(10)
        with pytest.raises(UsageError, match="'w' holds NaN or infinity: the loop has diverged; lower the learning"):
            loop.begin()
        error = loop.news.get(timeout=END_S)
        assert isinstance(error, UsageError)
        merged([other], [other.begin()])
        assert other.heard() == Averaged(2, 1)
        assert (other.values() == 1.5).all()


def test_what_is_out_of_all_proportion_is_left_out() -> None:
    with loops_of(a_manifest(), *vectors(1.0, 1.0, 1.0, 1.0)) as loops:
        for each, by in zip(loops, (0.1, 0.1, 1e9, 0.1), strict=True):
            each.train(by, 10)
            each.collect(10)
        answers = merged(loops, [each.begin() for each in loops])
        assert {answer.rejected for answer in answers} == {(PEERS[2],)}
        np.testing.assert_allclose(loops[0].values(), 1.1, rtol=1e-6)


def test_nobody_begins_with_numbers_out_of_all_proportion() -> None:
    with loops_of(a_manifest(), *vectors(1e20, 1.0, 1.0), begun=False) as loops:
        answers = merged(loops, [each.begin() for each in loops])
        assert {answer.rejected for answer in answers} == {(PEERS[0],)}
        assert (loops[0].values() == 1.0).all()


def test_who_counts_for_several_members_is_left_out() -> None:
    with loops_of(a_manifest(), *vectors(1.0, 1.0)) as loops:
        for each in loops:
            each.train(0.1, 10)
            each.collect(10)
        given = [each.begin() for each in loops]
        arrays, _ = decode_arrays(given[1].contribution or b"")
        lie = encode_arrays(arrays | {"sum/members": np.asarray(1000)}, {})
        answers = merged(loops, [given[0], replace(given[1], contribution=lie)])
        assert {answer.rejected for answer in answers} == {(PEERS[1],)}
        assert loops[0].heard() == Averaged(2, 1)


def test_what_was_done_on_a_state_that_the_others_went_on_from_counts_on_top_of_the_next_once() -> None:
    with loops_of(a_manifest(), *vectors(0.0, 0.0)) as (fast, slow):
        fast.train(1.0, 10)
        fast.collect(10)
        (answer,) = merged([fast], [fast.begin()])
        fast.heard()
        assert answer.state is not None
        slow.train(0.25, 3)
        assert slow.worker.collect(Collect(3, END_S)).epoch_samples == 3
        slow.train(0.0, 0)
        loaded = slow.load(answer.state, keep_samples=True)
        assert slow.heard() == Averaged(2, 0)
        assert (loaded.epoch_samples, loaded.digest) == (3, answer.state.digest), "what all hold is what it says"
        assert (slow.values() == 1.25).all()

        fast.train(1.0, 10)
        fast.collect(10)
        (answer,) = merged([fast], [fast.begin()])
        assert answer.state is not None
        slow.train(0.5, 4)
        assert slow.collect(4) == 7
        slow.train(0.0, 0)
        assert slow.load(answer.state, keep_samples=True).epoch_samples == 4
        assert (slow.values() == 2.5).all(), "the older part of the way is dropped"


def test_an_update_that_is_given_up_leaves_the_loop_as_it_was_and_going_on() -> None:
    with loops_of(a_manifest(), *vectors(1.0)) as (loop,):
        loop.train(0.5, 10)
        loop.collect(10)
        loop.begin()
        loop.worker.abandon(Abandon(keep_samples=True))
        loop.train(0.5, 10)  # it does, or the next would never be
        assert loop.collect(10) == 20
        merged([loop], [loop.begin()])
        assert loop.heard() == Averaged(2, 1)
        assert (loop.values() == 2.0).all()


def test_a_loop_of_another_model_hears_what_differs() -> None:
    shapes = {"tensors": {"0.weight": [10, 64], "0.bias": [10]}}
    with pytest.raises(UsageError, match=r"'0.weight' is \[10, 32\] here and \[10, 64\] there"):
        LoopLearner(a_manifest(hyperparameters=shapes), Tensors(nn.Sequential(nn.Linear(32, 10))), Gate(), clock=float)
    with pytest.raises(UsageError, match=r"'0.bias' \[10\] is there and not here"):
        LoopLearner(
            a_manifest(hyperparameters=shapes),
            Tensors(nn.Sequential(nn.Linear(64, 10, bias=False))),
            Gate(),
            clock=float,
        )
    assert differences({"a": [1]}, {"b": [2]}) == "'a' [1] is here and not there, 'b' [2] is there and not here"


def test_a_newcomer_of_another_model_hears_it_from_the_state_where_the_run_does_not_say_it() -> None:
    with (
        loops_of(a_manifest(), *vectors(1.0)) as (member,),
        loops_of(a_manifest(), *vectors(1.0, size=500), begun=False) as (other,),
    ):
        member.train(1.0, 10)
        member.collect(10)
        (answer,) = merged([member], [member.begin()])
        assert answer.state is not None
        with pytest.raises(ProtocolError):
            other.load(answer.state)
        error = other.news.get(timeout=END_S)
        assert isinstance(error, UsageError)
        assert "'w' is [500] here and [600] there" in str(error)


def test_a_member_that_has_averaged_with_others_is_not_stopped_by_a_state_that_does_not_fit() -> None:
    with (
        loops_of(a_manifest(), *vectors(1.0, 1.0)) as (member, _),
        loops_of(a_manifest(), *vectors(1.0, size=500)) as (liar,),
    ):
        liar.train(1.0, 10)
        liar.collect(10)
        (answer,) = merged([liar], [liar.begin()])
        assert answer.state is not None
        with pytest.raises(ProtocolError):
            member.load(answer.state)
        member.train(1.0, 10)
        assert member.collect(10) == 10
        assert (member.values() == 2.0).all()
        assert member.news.empty()


def test_tensors_that_cannot_be_averaged_are_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"'weight' is float16.*float\(\)"):
        Tensors(nn.Linear(2, 2).half())
    with pytest.raises(UsageError, match="nothing to average"):
        Tensors([])
    once = nn.Linear(2, 2).parameters()
    assert list(Tensors(once).parameters) == ["0", "1"]
    with pytest.raises(UsageError, match="gives them once"):
        Tensors(once)
    with pytest.raises(UsageError, match="not a tensor"):
        Tensors({"w": 1.0})  # type: ignore[dict-item]
    model = nn.Linear(2, 2)
    assert Tensors(torch.optim.SGD(model.parameters(), lr=1.0)).shapes == {"0": [2, 2], "1": [2]}
    assert Tensors(nn.BatchNorm1d(3)).shapes.keys() == {"weight", "bias", "running_mean", "running_var"}


def test_a_run_of_loops_has_no_end_unless_it_is_given_one() -> None:
    assert CreateSwarm(task="loop:x", algorithm="average").most_env_steps == LOOP_MAX_SAMPLES
    assert CreateSwarm(task="loop:x", algorithm="average", max_env_steps=5).most_env_steps == 5
    assert CreateSwarm(task="gym:X-v1", algorithm="ppo").most_env_steps == 10_000_000


def test_a_run_of_loops_says_what_it_is() -> None:
    assert a_manifest().is_loop
    with pytest.raises(UsageError, match="take it together with a task such as loop:"):
        Manifest(owner=PEERS[0], task="gym:X-v1", algorithm="average")
    with pytest.raises(UsageError, match="take it together with a task such as loop:"):
        Manifest(owner=PEERS[0], task="loop:x", algorithm="ppo")
    with pytest.raises(UsageError, match="not gradients"):
        a_manifest(mode=Mode.GRADIENT)
    with pytest.raises(UsageError, match="target return"):
        a_manifest(target_return=1.0)
    with pytest.raises(UsageError, match="mode diloco only"):
        LoopLearner(a_manifest(hyperparameters={"outer_momentum": 0.5}), Tensors(nn.Linear(2, 2)), Gate(), clock=float)
    with pytest.raises(UsageError, match="no setting 'momentum'"):
        LoopLearner(a_manifest(hyperparameters={"momentum": 0.5}), Tensors(nn.Linear(2, 2)), Gate(), clock=float)


# --- the gate, and the way to the node -------------------------------------------------------------------------------


def test_who_waits_for_a_loop_that_ends_does_not_wait_for_ever() -> None:
    gate: Gate[str] = Gate()
    closing = threading.Timer(0.05, gate.close)
    closing.start()
    with pytest.raises(GateClosedError):
        gate.hold()
    assert gate.count_to(10, lambda: False) == 0
    assert gate.step(5) is None


def test_what_fails_in_the_loops_thread_is_raised_there_and_ends_what_waits_for_it() -> None:
    gate: Gate[str] = Gate()
    raised: list[BaseException] = []

    def loop() -> None:
        try:
            gate.step(1)
        except ZeroDivisionError as error:
            raised.append(error)

    gate.count_to(1, lambda: True)
    thread = threading.Thread(target=loop)
    thread.start()
    gate.hold()
    with pytest.raises(GateClosedError, match="division"):
        gate.do(lambda: 1 / 0)
    thread.join(END_S)
    assert raised
    assert not gate.is_open


def test_without_a_node_the_user_is_told_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    with pytest.raises(NoDaemonError, match="shoal up --profile x"):
        Averager(nn.Linear(2, 2), create="digits", profile="x")
    with pytest.raises(UsageError, match="together with create="):
        Averager(nn.Linear(2, 2), "digits", every=10)


def test_the_exchange_offers_the_averager_and_loads_torch_for_nobody_else() -> None:
    program = "import sys; import shoal.training.exchange as e; print('torch' in sys.modules, e.Averager.__name__)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Averager"]
