"""Environments that fail are their owner's news: told with a traceback in one place, replaced; too many end the run.

Real worker processes. One worker serves all environments that it survives, one after the other.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any, NoReturn

import pytest
import trio

from shoal.node.swarm import workers
from shoal.node.swarm.lookup import LookedUp, look_up
from shoal.node.swarm.workers import WorkerLostError, open_worker
from shoal.protocol.errors import RemoteError, ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.services import Method
from shoal.training.keeper import WORKER_LOG, descendants
from shoal.training.manifest import Manifest
from shoal.training.tasks.failures import FILE
from shoal.training.worker_calls import COLLECT, EVALUATE, OPEN, TASK_FAILED, Collect, Evaluate, Open

ME = PeerId.of_public_key(bytes(32))
SMALL = {"num_envs": 4, "update_epochs": 1, "num_minibatches": 1, "hidden_sizes": [8]}
PROMISED_S = 10.0
SLEEP_S = f"3600.{os.getpid()}"
"""How long the processes wait that `Forks` starts; nobody else does for so long."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the bad environments are installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).with_name("bad_environments.py"), site)
    about = site / "bad_environments-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bad_environments\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[shoal.tasks]\nbad = bad_environments:task\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))  # this process is the node, which knows what is installed
        patch.setenv("BAD_SLEEP_S", SLEEP_S)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        yield site


@dataclass
class WorkerProcess:
    """A worker that is called from a test, which knows nothing of trio."""

    folder: Path
    calls: Queue[Any] = field(default_factory=Queue)
    answers: Queue[Any] = field(default_factory=Queue)
    num_opened: int = 0

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=trio.run, args=(self._serve,))
        self.thread.start()

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            try:
                async with open_worker(nursery, ME, self.folder) as channel:
                    while (asked := await trio.to_thread.run_sync(self.calls.get)) is not None:
                        try:
                            self.answers.put(await channel.call(*asked))
                        except RemoteError as error:
                            if error.status is workers.Status.UNAVAILABLE:
                                raise
                            self.answers.put(error)
            except WorkerLostError as error:
                self.answers.put(error)
            nursery.cancel_scope.cancel()

    def __call__(self, method: Method[Any, Any], request: object) -> Any:
        self.calls.put((method, request))
        answer = self.answers.get(timeout=60)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def open(self, name: str, **settings: Any) -> None:
        self.num_opened += 1
        manifest = Manifest(owner=ME, task=f"bad:{name}", algorithm="ppo", hyperparameters=SMALL | settings)
        self(OPEN, Open(manifest, ME, str(self.folder), f"life {self.num_opened}"))

    def open_and_collect(self, name: str) -> None:
        self.open(name)
        for _ in range(100):
            self(COLLECT, Collect(64))

    def try_all(self, name: str) -> str:
        """Open a task and collect until it fails; gives what it says of that."""
        with pytest.raises(RemoteError) as told:
            self.open_and_collect(name)
        assert told.value.status is TASK_FAILED, told.value
        return told.value.message

    @property
    def report(self) -> str:
        return (self.folder / FILE).read_text()

    def end(self) -> None:
        self.calls.put(None)
        self.thread.join()


@pytest.fixture(scope="module")
def worker(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_ENV_PATIENCE", "1")
        started = WorkerProcess(tmp_path_factory.mktemp("run"))
        started.open("Plain")  # PyTorch is loaded by then
    yield started
    started.end()


@pytest.fixture
def another(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """A worker that may be lost."""
    monkeypatch.setenv("SHOAL_ENV_PATIENCE", "1")
    started = WorkerProcess(tmp_path)
    started.open("Plain")
    yield started
    started.end()


FAILING = {
    "WrongShape": "an observation is of shape (1,) and not (4,)",
    "WrongDtype": "an observation holds <U",
    "NanReward": "a reward is nan, which is not finite",
    "EndlessReward": "a reward is inf, which is not finite",
    "NanShown": "an observation is not finite: number 0 of it is nan",
    "EndlessShown": "an observation is not finite: number 0 of it is inf",
    "ArrayReward": "a reward is an array of shape (2,) and not a number",
    "NoReward": "a reward is a NoneType and not a number",
    "FourValues": "step gave 4 values and not (observation, reward, terminated, truncated, info)",
    "ThreeOfReset": "reset gave 3 values and not (observation, info)",
    "BareReset": "reset gave an array of shape (4,) and not (observation, info)",
    "Outside": "an observation is outside of its space: number 0 of it is 2",
    "KeyErrorInStep": "failed in step: KeyError: 'speed'",
    "ExitInStep": "failed in step: SystemExit: 4",
    "RaisesInReset": "failed in reset: ZeroDivisionError: the map is empty",
    "HungStep": "failed in step: did not come back in 1 s",
    "HungReset": "failed in reset: did not come back in 1 s",
    "BadClose": "failed in step: ValueError: in a step",
}


@pytest.mark.parametrize(("name", "words"), FAILING.items())
def test_an_environment_that_always_fails_ends_its_run_with_a_reason_and_a_traceback(
    worker: WorkerProcess, name: str, words: str
) -> None:
    began = time.monotonic()
    message = worker.try_all(name)
    assert time.monotonic() - began < PROMISED_S
    assert f"of gym:{name}-v0 failed in" in message
    assert words in message
    assert str(worker.folder / FILE) in message
    of_this = worker.report[worker.report.index(f"gym:{name}-v0") :]
    assert "Traceback" in of_this
    assert "bad_environments.py" in of_this or "answers.py" in of_this


def test_one_that_cannot_be_made_is_told_by_its_name(worker: WorkerProcess) -> None:
    for name, words in (("BadConstructor", "no display to draw on"), ("HungConstructor", "did not come back in 2 s")):
        message = worker.try_all(name)
        assert f"gym:{name}-v0 cannot be made: its constructor failed" in message
        assert words in message


def test_one_that_shows_too_much_is_refused(worker: WorkerProcess) -> None:
    with pytest.raises(RemoteError, match="shows 1000000 numbers at once"):
        worker.open("Huge")


def test_one_array_for_all_observations_is_as_good_as_many(worker: WorkerProcess) -> None:
    """The last observation of a cut episode is what it was, and not the next one's first."""
    worker.open("Reused")
    assert worker(COLLECT, Collect(80)).episode_returns == (5.0,) * 16


def test_an_environment_that_fails_by_its_seed_is_replaced_and_the_run_goes_on(worker: WorkerProcess) -> None:
    worker.open("Unlucky")
    for _ in range(20):
        done = worker(COLLECT, Collect(400))
        assert done.samples == 400
    assert 0 < done.failures <= 8  # each of them for the one seed that is unlucky, and never again
    assert "unlucky seed" in done.failure
    seeds = [line for line in worker.report.splitlines() if line.startswith("RuntimeError: unlucky")]
    assert len(seeds) == len(set(seeds)), "no seed fails twice"
    assert set(done.episode_returns) == {10.0}


def test_no_worker_meets_the_episodes_of_the_one_before(worker: WorkerProcess) -> None:
    def unlucky() -> set[str]:
        worker.open("Unlucky", num_envs=64)
        before = len(worker.report)
        with pytest.raises(RemoteError):
            worker(COLLECT, Collect(64 * 8))
        return {line for line in worker.report[before:].splitlines() if line.startswith("RuntimeError: unlucky")}

    assert unlucky().isdisjoint(unlucky())


def test_an_evaluation_takes_as_long_as_its_steps_do(worker: WorkerProcess) -> None:
    """100 steps of 20 ms in one environment after the other: a second is the patience for each of them, not for all."""
    worker.open("Slow")
    began = time.monotonic()
    assert worker(EVALUATE, Evaluate(2, 1)).returns == (50.0, 50.0)
    assert time.monotonic() - began > 1.9
    assert worker(COLLECT, Collect(8)).failures == 0


def test_failed_episodes_are_left_out_of_an_evaluation(worker: WorkerProcess) -> None:
    worker.open("Unlucky")
    evaluated = worker(EVALUATE, Evaluate(8, 1))
    assert 0 < len(evaluated.returns) < 8
    assert set(evaluated.returns) == {10.0}
    assert evaluated.failures


def test_what_environments_print_harms_nothing_and_is_kept_within_bounds(worker: WorkerProcess) -> None:
    worker.open("Loud")
    for _ in range(8):
        assert worker(COLLECT, Collect(1024)).samples == 1024
    text = worker.folder / WORKER_LOG
    assert "straight to the descriptor" in text.read_text() + text.with_suffix(".log.1").read_text()
    assert text.stat().st_size < 5 * 2**20


# --- workers that are lost -------------------------------------------------------------------------------------------


def test_one_that_cannot_be_interrupted_costs_the_worker_alone(another: WorkerProcess) -> None:
    another.open("HungAndSwallows")
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match="did not come back, environment 0 in step") as told:
        another(COLLECT, Collect(64))
    assert time.monotonic() - began < PROMISED_S
    assert told.value.is_task
    assert "hang_and_swallow" in another.report


def test_one_that_ends_its_process_is_told_of(another: WorkerProcess) -> None:
    another.open("GoneAtOnce")
    with pytest.raises(WorkerLostError, match="ended with code 3, environment 0 in step") as told:
        another(COLLECT, Collect(64))
    assert told.value.is_task


def test_one_that_holds_the_lock_of_python_costs_the_worker_alone(
    another: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    another.open("HungInC")
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match="environment 0 in step") as told:
        another(COLLECT, Collect(64))
    assert time.monotonic() - began < PROMISED_S + 2
    assert told.value.is_task
    assert "hang_in_c" in another.report


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def started_by_environments() -> set[int]:
    return {
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if command_of(int(folder.name))[:2] == ["sleep", SLEEP_S]
    }


def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for what no event tells of."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def keeper_of(worker: WorkerProcess) -> int:
    return next(pid for pid in descendants(os.getpid()) if str(worker.folder) in command_of(pid)[-1:])


def collect_for_ever(worker: WorkerProcess) -> NoReturn:
    while True:
        worker(COLLECT, Collect(64))


def stop(worker: WorkerProcess) -> str:
    """ATTACKS row 29: such a worker was replaced after 301 s."""
    for pid in descendants(keeper_of(worker)):
        os.kill(pid, signal.SIGSTOP)
    return "no sign of life"


def kill(worker: WorkerProcess) -> str:
    os.kill(descendants(keeper_of(worker))[0], signal.SIGKILL)
    return "ended by SIGKILL"


def kill_its_keeper(worker: WorkerProcess) -> str:
    os.kill(keeper_of(worker), signal.SIGKILL)
    return "ended by SIGKILL"


@pytest.mark.parametrize("lose", [stop, kill, kill_its_keeper])
def test_a_worker_is_lost_within_seconds_and_all_that_its_environments_started_with_it(
    another: WorkerProcess, lose: Callable[[WorkerProcess], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that left its group and session too."""
    monkeypatch.setattr(workers, "STILL_S", 3.0)
    another.open("Forks")
    until(lambda: len(started_by_environments()) >= 12)
    began = time.monotonic()
    words = lose(another)
    with pytest.raises(WorkerLostError, match=words) as told:
        collect_for_ever(another)  # a process that was killed may still answer one call
    assert time.monotonic() - began < PROMISED_S
    assert not told.value.is_task
    until(lambda: not started_by_environments(), seconds=1)  # what is killed takes a moment to be gone


def test_a_worker_that_is_stopped_as_soon_as_it_works_is_lost_within_seconds_too() -> None:
    """Until the first sign of life it has two minutes: PyTorch is large."""
    program = "from shoal.training import watch; watch.begin(None); print(watch.page[watch.Slot.BEATS])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(shown.stdout) > 0


# --- whole nodes -----------------------------------------------------------------------------------------------------


def test_a_task_that_does_not_work_on_one_machine_ends_the_run_there_with_its_reason_and_the_others_go_on(
    packages: Path, make_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = make_node()
    created = good.ask("swarm", "create", "--task", "bad:Here", "--target-return", "1000")
    good.wait_for(created["swarm"], "it learns", lambda shown: shown["epoch"] >= 1)
    monkeypatch.setenv("BAD_HERE", "1")
    bad = make_node()
    monkeypatch.delenv("BAD_HERE")
    bad.ask("join", created["ticket"], "-d")
    reason = "no licence server in reach"
    failed = bad.wait_for(created["swarm"], "it fails", lambda shown: shown["phase"] == "failed", timeout_s=30)
    assert reason in failed["error"]
    assert FILE in failed["error"]
    for words in (["swarm", "ls"], ["status"], ["swarm", "show"]):
        text = " ".join(bad.run(*words).stdout.split())
        assert "failed" in text, words
        assert "environment 0 of gym:Here-v0" in text, words
    watched = bad.run("watch", check=False)
    assert watched.returncode == 1
    assert reason in watched.stderr
    shown = good.ask("swarm", "show", created["swarm"])
    good.wait_for(created["swarm"], "the other goes on", lambda now: now["epoch"] >= shown["epoch"] + 3, timeout_s=30)


def test_leaving_ends_what_environments_started(packages: Path, make_node: Callable[..., Any]) -> None:
    node = make_node()
    for finish in (["leave"], ["down"]):
        created = node.ask("swarm", "create", "--task", "bad:Forks", "--target-return", "1000")
        node.wait_for(created["swarm"], "it learns", lambda shown: shown["epoch"] >= 1)
        assert started_by_environments()
        node.run(*finish, *([created["swarm"]] if finish == ["leave"] else []))
        until(lambda: not started_by_environments())


# --- looking up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("KeyErrorInStep", "failed in step: KeyError: 'speed'"),
        ("HungAndSwallows", "did not come back in 1 s"),
        ("HungConstructor", "its constructor failed: did not come back in 2 s"),
        ("GoneAtOnce", "could not be looked up"),
        ("Forks", None),
    ],
)
def test_a_task_is_looked_up_in_spite_of_what_it_prints_and_refused_in_a_line_if_it_fails_at_once(
    packages: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str | None
) -> None:
    monkeypatch.setenv("SHOAL_ENV_PATIENCE", "1")

    async def main() -> LookedUp:
        with trio.fail_after(30):
            return await look_up(f"bad:{name}", "ppo")

    if words is None:
        assert trio.run(main).requires["task:bad"] == 1
    else:
        with pytest.raises(ShoalError) as told:
            trio.run(main)
        assert words in str(told.value)
        assert name in str(told.value)
        assert "\n" not in str(told.value)
    assert not started_by_environments()


def test_nothing_is_imported_from_the_folder_in_which_a_node_was_started(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATTACKS row 26: a planted numpy.py was run."""
    for name in ("numpy.py", "json.py", "shoal.py", "sitecustomize.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ["PYTHONPATH"])  # an empty entry is the present folder

    async def main() -> LookedUp:
        return await look_up("bad:Plain", "ppo")

    assert trio.run(main).requires["task:bad"] == 1
    worker = WorkerProcess(tmp_path / "of the run")
    worker.open("Plain")
    worker.end()
    assert not (tmp_path / "run").exists()
