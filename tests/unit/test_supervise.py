"""What fails in a task ends in its domain: logged with its reason, counted, and then what its policy says."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
import trio.testing

from shoal.node.supervise import (
    MAX_COUNTERS,
    MAX_REASON_CHARS,
    OTHER,
    Policy,
    Supervisor,
    open_plain_nursery,
    reason_of,
)
from shoal.protocol.errors import (
    Fault,
    LimitError,
    NoPeersError,
    ProtocolError,
    RefusedError,
    RemoteError,
    ResourceError,
    ShoalError,
    Status,
    TooLargeError,
    UsageError,
    fault_of,
    leaves,
    resource_error,
    unwrap,
)


def failing(error: BaseException, times: int, began: list[float]) -> Callable[[], object]:
    """A task that raises so many times, and then stays; ``began`` takes the times at which it began."""

    async def task() -> None:
        began.append(trio.current_time())
        if len(began) <= times:
            raise error
        await trio.sleep_forever()

    return task


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_is_restarted_waits_longer_each_time_up_to_half_a_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began: list[float] = []
    async with Supervisor().open("node") as domain:
        domain.start_soon("sync", failing(OSError("gone"), 9, began), policy=Policy.RESTART)
        await trio.sleep(200)
        domain.cancel()
    gaps = [round(after - before, 6) for before, after in pairwise(began)]
    assert gaps == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.trio
async def test_after_a_minute_of_peace_the_waits_begin_anew(autojump_clock: trio.testing.MockClock) -> None:
    began: list[float] = []

    async def task() -> None:
        began.append(trio.current_time())
        await trio.sleep(61 if len(began) == 4 else 0)
        raise OSError("gone")

    async with Supervisor().open("node") as domain:
        domain.start_soon("sync", task, policy=Policy.RESTART)
        await trio.sleep(67)
        domain.cancel()
    gaps = [round(after - before, 6) for before, after in pairwise(began)]
    assert gaps[:5] == [0.5, 1, 2, 61.5, 1]


@pytest.mark.trio
async def test_what_is_dropped_is_gone_and_the_rest_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    began: list[float] = []
    others: list[float] = []
    async with Supervisor().open("swarm", "bafy") as domain:
        domain.start_soon("catch up", failing(ValueError("no"), 1, began), policy=Policy.DROP)
        domain.start_soon("gossip", failing(ValueError("no"), 0, others), policy=Policy.DROP)
        await trio.sleep(100)
        assert (len(began), len(others)) == (1, 1)
        assert domain.failure is None
        assert domain.failures == {("catch up", Fault.OWN): 1}
        assert not domain.is_over
        domain.cancel()


@pytest.mark.trio
async def test_what_ends_its_domain_cancels_all_in_it_and_no_other_domain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    supervisor = Supervisor()
    ended: list[str] = []

    async def stays() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("stays")

    async def swarm(name: str) -> None:
        async with supervisor.open("swarm", name) as domain:
            domain.start_soon("stays", stays, policy=Policy.RESTART)
            if name == "first":
                domain.start_soon("run", failing(LimitError("117 offers"), 1, []), policy=Policy.END)
            await trio.sleep_forever()
        assert domain.failure is not None
        assert (domain.failure.domain, domain.failure.task) == ("swarm first", "run")
        assert domain.failure.fault is Fault.REMOTE
        assert str(domain.failure) == "run failed: 117 offers"
        assert domain.is_over
        ended.append(name)

    async with supervisor.open("node") as node:
        node.start_soon("swarm", swarm, "first", policy=Policy.DROP)
        node.start_soon("swarm", swarm, "second", policy=Policy.DROP)
        await trio.sleep(10)
        assert ended == ["stays", "first"]
        assert not node.failures
        node.cancel()


@pytest.mark.trio
async def test_a_task_that_returns_is_over_whatever_its_policy() -> None:
    async with Supervisor().open("node") as domain:
        for policy in Policy:
            domain.start_soon("greet", trio.lowlevel.checkpoint, policy=policy)
    assert domain.failure is None
    assert not domain.failures


# --- starting --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_who_starts_a_task_gets_its_first_value_and_later_ones_are_nobodys_business(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began: list[float] = []

    async def serve(port: int, *, task_status: trio.TaskStatus[int]) -> None:
        began.append(trio.current_time())
        task_status.started(port + len(began))
        await trio.sleep(1)
        raise OSError("gone")

    async with Supervisor().open("node") as domain:
        assert await domain.start("api", serve, 40, policy=Policy.RESTART) == 41
        await trio.sleep(2)
        assert len(began) == 2
        assert domain.failures == {("api", Fault.OWN): 1}
        domain.cancel()


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.trio
async def test_an_error_before_a_task_has_started_is_the_callers(policy: Policy) -> None:
    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery():
            raise UsageError("no such port")

    async with Supervisor().open("node") as domain:
        with pytest.raises(UsageError, match="no such port"):
            await domain.start("api", serve, policy=policy)
        assert not domain.failures
        assert not domain.is_over


@pytest.mark.trio
async def test_in_a_domain_that_is_over_nothing_starts_and_nothing_is_raised() -> None:
    began: list[float] = []
    supervisor = Supervisor()
    async with supervisor.open("node") as outer, supervisor.open("swarm", "bafy") as domain:
        smaller = domain.inside("peer", "12D3")
        domain.cancel()
        for each in (domain, smaller):
            assert not each.start_soon("catch up", failing(OSError(), 0, began), policy=Policy.RESTART)
            with pytest.raises(RefusedError, match="ends"):
                await each.start("run", failing(OSError(), 0, began), policy=Policy.RESTART)
        outer.cancel()
    assert not domain.start_soon("catch up", failing(OSError(), 0, began), policy=Policy.RESTART)
    assert not began


@pytest.mark.trio
async def test_who_waits_for_a_start_is_told_when_the_domain_ends() -> None:
    async def slow(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep_forever()

    supervisor = Supervisor()
    async with supervisor.open("node") as outer:
        async with trio.open_nursery() as nursery:

            async def waits() -> None:
                with pytest.raises(RefusedError, match="ends"):
                    await peer.start("dial", slow, policy=Policy.DROP)

            peer = outer.inside("peer", "12D3")
            nursery.start_soon(waits)
            await trio.testing.wait_all_tasks_blocked()
            peer.cancel()
        assert not outer.is_over


# --- cancellation and groups -----------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_cancellation_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor()
    with trio.move_on_after(0) as scope:
        async with supervisor.open("node") as domain:
            for policy in Policy:
                domain.start_soon("stays", trio.sleep_forever, policy=policy)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not supervisor.failures
    assert not caplog.records


@pytest.mark.trio
async def test_an_error_on_the_way_out_is_told_and_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def untidy() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("untidy")

    supervisor = Supervisor()
    with trio.move_on_after(0) as scope:
        async with supervisor.open("node") as domain:
            domain.start_soon("untidy", untidy, policy=Policy.RESTART)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert domain.failures == {("untidy", Fault.OWN): 1}
    assert "ValueError: untidy" in caplog.text


@pytest.mark.trio
async def test_a_group_of_errors_is_one_failure_that_tells_each(caplog: pytest.LogCaptureFixture) -> None:
    async def reads() -> None:
        lies = ExceptionGroup("", [ProtocolError("a lie"), RemoteError(Status.UNAVAILABLE, "gone")])
        raise ExceptionGroup("", [lies, OSError(errno.EMFILE, "Too many open files"), ProtocolError("a lie")])

    async with Supervisor().open("swarm", "bafy") as domain:
        domain.start_soon("read", reads, policy=Policy.END)
    assert domain.failure is not None
    assert domain.failure.fault is Fault.RESOURCE
    assert domain.failure.reason.startswith("a lie; UNAVAILABLE: gone; this process has no file descriptors left")
    assert domain.failures == {("read", Fault.RESOURCE): 1}
    assert len(caplog.records) == 1


@pytest.mark.trio
async def test_what_the_block_itself_raises_comes_out_as_it_is_when_all_tasks_are_gone() -> None:
    ended = False

    async def stays() -> None:
        nonlocal ended
        try:
            await trio.sleep_forever()
        finally:
            ended = True

    async def enters() -> None:
        async with Supervisor().open("swarm", "bafy") as domain:
            domain.start_soon("stays", stays, policy=Policy.RESTART)
            await trio.testing.wait_all_tasks_blocked()
            raise UsageError("no such task")

    with pytest.raises(UsageError, match="no such task"):
        await enters()
    assert ended


# --- smaller domains -------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_peer_of_a_node_ends_without_the_node_and_with_it() -> None:
    ended: list[str] = []

    async def stays(name: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(name)

    async with Supervisor().open("node") as node:
        ann, bob, cat = (node.inside("peer", name) for name in ("ann", "bob", "cat"))
        for domain in (ann, bob, cat):
            domain.start_soon("keep alive", stays, domain.name, policy=Policy.RESTART)
        await trio.testing.wait_all_tasks_blocked()
        ann.cancel()
        bob.start_soon("dial", failing(ProtocolError("a lie"), 1, []), policy=Policy.END)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(ended) == ["peer ann", "peer bob"]
        assert bob.failure is not None
        assert node.failure is None
        assert not node.is_over
        assert not cat.is_over
        node.cancel()
    assert sorted(ended) == ["peer ann", "peer bob", "peer cat"]


@pytest.mark.trio
async def test_who_ends_a_domain_can_wait_until_its_tasks_are_gone(autojump_clock: trio.testing.MockClock) -> None:
    async def slow_to_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(7)

    async with Supervisor().open("node") as node:
        swarm = node.inside("swarm", "bafy")
        await swarm.wait_gone()
        swarm.start_soon("run", slow_to_end, policy=Policy.RESTART)
        swarm.start_soon("gossip", trio.sleep_forever, policy=Policy.RESTART)
        await trio.testing.wait_all_tasks_blocked()
        swarm.start_soon("not begun yet", trio.sleep_forever, policy=Policy.RESTART)
        swarm.cancel()
        began = trio.current_time()
        await swarm.wait_gone()
        assert trio.current_time() - began == pytest.approx(7)
        assert not node.is_over
        node.cancel()


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_who_is_told_something_and_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []

    def hears(number: int) -> None:
        told.append(number)
        if number == 1:
            raise KeyError("no such peer")

    async with Supervisor().open("swarm", "bafy") as domain:
        for number in range(3):
            domain.call("hearing", hears, number)
        domain.cancel()
        domain.call("hearing", hears, 3)
    assert told == [0, 1, 2]
    assert domain.failures == {("hearing", Fault.OWN): 1}
    assert "swarm bafy: hearing failed" in caplog.text


@pytest.mark.trio
async def test_what_one_call_does_at_once_fails_with_one_error_and_not_a_group() -> None:
    async def raises(error: Exception) -> None:
        raise error

    async def calls(*errors: Exception) -> None:
        async with open_plain_nursery() as nursery:
            for error in errors:
                nursery.start_soon(raises, error)

    with pytest.raises(KeyError):
        await calls(KeyError("x"))
    with pytest.raises(ProtocolError):
        await calls(KeyError("x"), ProtocolError("a lie"))
    with pytest.raises(ExceptionGroup):
        await calls(KeyError("x"), ValueError("y"))
    with trio.move_on_after(0) as scope:
        async with open_plain_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
    assert scope.cancelled_caught


# --- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "level", "has_trace"),
    [
        (KeyError("x"), logging.ERROR, True),
        (ProtocolError("a lie"), logging.WARNING, False),
        (OSError(errno.ENOSPC, "No space left on device"), logging.WARNING, False),
    ],
)
@pytest.mark.trio
async def test_a_failure_is_told_once_with_its_place_and_reason(
    error: Exception, level: int, has_trace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Supervisor().open("swarm", "bafy") as domain:
        domain.start_soon("gossip", failing(error, 1, []), policy=Policy.DROP)
    (record,) = caplog.records
    assert record.levelno == level
    assert record.getMessage().startswith("swarm bafy: gossip failed")
    assert reason_of(error) in record.getMessage()
    assert (record.exc_info is not None) is has_trace


@pytest.mark.trio
async def test_the_trace_of_a_remote_failure_is_there_for_who_debugs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with Supervisor().open("node") as domain:
        domain.start_soon("gossip", failing(ProtocolError("a lie"), 1, []), policy=Policy.DROP)
    assert "Traceback" in caplog.text


@pytest.mark.trio
async def test_counters_are_bounded_and_those_of_peers_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor()
    async with supervisor.open("node") as node:
        for number in range(MAX_COUNTERS + 10):
            node.inside("peer", str(number)).start_soon("dial", failing(OSError(), 1, []), policy=Policy.DROP)
    assert supervisor.failures == {("peer", "dial", Fault.OWN): MAX_COUNTERS + 10}
    async with supervisor.open("node") as node:
        for number in range(MAX_COUNTERS + 10):
            node.start_soon(f"task {number}", failing(OSError(), 1, []), policy=Policy.DROP)
    assert len(supervisor.failures) == MAX_COUNTERS + 1
    assert supervisor.failures[OTHER, OTHER, Fault.OWN] == 11


@pytest.mark.trio
async def test_every_task_is_known_by_name_and_a_test_can_make_each_fail_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[tuple[str, str]] = []

    def seam(domain: str, task: str) -> None:
        asked.append((domain, task))
        if asked.count((domain, task)) == 1:
            raise OSError("as told")

    supervisor = Supervisor(seam)
    async with supervisor.open("node") as domain:

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            await trio.sleep_forever()

        await domain.start("api", serve, policy=Policy.RESTART)
        domain.start_soon("follow", trio.sleep_forever, policy=Policy.RESTART)
        await trio.sleep(1)
        assert sorted(asked) == [("node", "api")] * 2 + [("node", "follow")] * 2
        domain.cancel()
    assert supervisor.tasks == {("node", "api"): Policy.RESTART, ("node", "follow"): Policy.RESTART}


def test_a_reason_is_one_short_line_whatever_a_peer_wrote() -> None:
    reason = reason_of(ProtocolError("a lie\n12:00 ERROR another line\x1b[31m" + "x" * 10_000))
    assert reason.isprintable()
    assert reason.startswith("a lie ")
    assert len(reason) == MAX_REASON_CHARS


# --- whose fault -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (UsageError("x"), Fault.OWN),
        (TooLargeError("x"), Fault.OWN),
        (ShoalError("x"), Fault.OWN),
        (ZeroDivisionError(), Fault.OWN),
        (LimitError("x"), Fault.REMOTE),
        (NoPeersError("x"), Fault.REMOTE),
        (RemoteError(Status.INTERNAL, "x"), Fault.REMOTE),
        (ConnectionResetError(), Fault.REMOTE),
        (ResourceError("x"), Fault.RESOURCE),
        (MemoryError(), Fault.RESOURCE),
        *((OSError(code, "x"), Fault.RESOURCE) for code in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)),
        (OSError(errno.EACCES, "x"), Fault.OWN),
        (ExceptionGroup("", [LimitError("x"), OSError(errno.ENOMEM, "x")]), Fault.RESOURCE),
        (ExceptionGroup("", [LimitError("x"), ExceptionGroup("", [KeyError("x")])]), Fault.OWN),
    ],
    ids=repr,
)
def test_an_error_tells_whose_fault_it_is(error: Exception, fault: Fault) -> None:
    assert fault_of(error) is fault


def test_what_a_peer_sent_can_never_be_taken_for_what_this_node_asked() -> None:
    assert not issubclass(LimitError, UsageError)
    assert not issubclass(TooLargeError, ProtocolError)
    assert TooLargeError.exit_code == UsageError.exit_code


def test_every_error_of_a_group_is_found() -> None:
    group = ExceptionGroup("", [ExceptionGroup("", [KeyError("a")]), UsageError("b"), ProtocolError("c")])
    assert [repr(each) for each in leaves(group)] == ["KeyError('a')", "UsageError('b')", "ProtocolError('c')"]
    assert str(unwrap(group)) == "b"


def test_scarcity_says_what_to_do() -> None:
    scarce = resource_error(OSError(errno.EMFILE, "Too many open files"))
    assert scarce is not None
    assert "ulimit -n" in str(scarce)
    assert resource_error(OSError(errno.EPERM, "no")) is None
