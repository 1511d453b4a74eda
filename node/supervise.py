"""Failure domains: what fails in a task ends there, with its reason logged and counted.

A `Domain` is the node itself, a swarm, or a peer. Every task that outlives the call that began it is started in one,
under a name and a policy that says what its failure means. No error leaves a domain: the rest of the node goes on, and
whoever owns the domain reads `Domain.failure` when it has ended. The idea is Erlang's (Armstrong, "Making reliable
distributed systems in the presence of software errors", 2003, chapter 5); instead of counting restarts per time, we
wait longer before each, because most of what fails here (a disk, a network, a peer) is repaired from outside.

Cancellation is no failure and passes untouched; so do KeyboardInterrupt and its like.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from shoal.protocol.errors import Fault, RefusedError, ShoalError, fault_of, leaves, resource_error, unwrap

if TYPE_CHECKING:
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

log = logging.getLogger(__name__)

FIRST_WAIT_S: Final = 0.5
MAX_WAIT_S: Final = 30.0
PEACE_S: Final = 60.0
"""Who ran as long as this before it failed is restarted as after a first failure."""
MAX_COUNTERS: Final = 1024
MAX_REASON_CHARS: Final = 500
REMOTE_ERRORS: Final = (ConnectionError, TimeoutError, trio.BrokenResourceError)
"""What else than an error of Shoal says that the far side of a connection is gone."""
OTHER: Final = "other"

FaultSeam = Callable[[str, str], None]
"""Told (domain, task) each time a task begins; what it raises, the task raises. For tests alone."""


class Backoff:
    """How long to wait before what failed is begun again: longer each time, until it has run for `PEACE_S`."""

    def __init__(self) -> None:
        """Nothing has failed yet."""
        self._next_s = FIRST_WAIT_S

    def after(self, ran_s: float) -> float:
        """Seconds to wait, now that it failed after running for ``ran_s``."""
        wait_s = FIRST_WAIT_S if ran_s >= PEACE_S else self._next_s
        self._next_s = min(2 * wait_s, MAX_WAIT_S)
        return wait_s


class Policy(Enum):
    """What the failure of a task means.

    RESTART: it begins again, after a wait that doubles from 0.5 s to 30 s, and is 0.5 s again after a minute of peace.
    DROP: it is gone, and the rest of its domain goes on.
    END: it ends its domain, with all tasks in it.
    """

    RESTART = "restart"
    DROP = "drop"
    END = "end"


@dataclass(frozen=True, slots=True)
class Failure:
    """One task that failed once.

    Attributes:
        domain: where.
        task: which.
        fault: whose fault it was.
        reason: every error in it in words, one after the other, at most `MAX_REASON_CHARS` characters.
    """

    domain: str
    task: str
    fault: Fault
    reason: str

    def __str__(self) -> str:
        return f"{self.task} failed: {self.reason}"


class Supervisor:
    """What all domains of a node have in common: the counters, and the names of the tasks.

    Attributes:
        failures: how often a task failed, by (domain, task, fault); at most `MAX_COUNTERS` entries, and what is beyond
            them is counted as of the domain and the task `OTHER`.
        tasks: every task that was ever started, by (kind of its domain, its name), with its policy.
    """

    def __init__(self, fault_seam: FaultSeam | None = None) -> None:
        self.failures: Counter[tuple[str, str, Fault]] = Counter()
        self.tasks: dict[tuple[str, str], Policy] = {}
        self._seam = fault_seam

    def begins(self, domain: str, task: str) -> None:
        """A task begins now; raises what a test wants it to."""
        if self._seam is not None:
            self._seam(domain, task)

    def failed(self, domain: Domain, task: str, error: BaseException, then: str) -> Failure:
        """Count and log a failure, once.

        Args:
            domain: where.
            task: which.
            error: what it raised.
            then: what happens now, as a clause.
        """
        fault = fault_of(error, remote=REMOTE_ERRORS)
        failure = Failure(domain.name, task, fault, reason_of(error))
        key = (domain.counted_as, task, fault)
        if key not in self.failures and len(self.failures) >= MAX_COUNTERS:
            key = (OTHER, OTHER, fault)
        self.failures[key] += 1
        message = "%s: %s failed (fault: %s): %s; %s"
        told = (domain.name, task, fault, failure.reason, then)
        if fault is Fault.OWN:
            log.error(message, *told, exc_info=error)
        else:
            trace = "".join(traceback.format_exception(error)) if log.isEnabledFor(logging.DEBUG) else ""
            log.warning(message + "%s", *told, trace and f"\n{trace}")
        return failure

    @asynccontextmanager
    async def open(self, kind: str, name: str = "") -> AsyncIterator[Domain]:
        """A domain. Leaving the block waits for its tasks, as with a nursery; `Domain.cancel` makes that short.

        Args:
            kind: "node", "swarm", "peer"…
            name: which of its kind.

        Raises:
            Exception: whatever the block itself raises, as it is, after all tasks are cancelled and gone.
        """
        caught: Exception | None = None
        async with trio.open_nursery() as nursery:
            domain = Domain(self, kind, f"{kind} {name}".strip(), nursery)
            try:
                yield domain
            except Exception as error:
                caught = error
                domain.cancel()
            except BaseException:  # cancelled from outside: its tasks are too, and nothing more may begin
                domain.cancel()
                raise
        domain.cancel()
        if caught is not None:
            raise caught


class Domain:
    """Tasks that may fail without harm to any other domain; `Supervisor.open` and `inside` make one.

    Attributes:
        kind: "node", "swarm", "peer"…
        name: the kind and which of it.
        counted_as: its name among the counters: of peers, who are without number, only the kind.
        failure: what ended it, if a failure did.
        supervisor: what it has in common with all other domains of this node.
    """

    def __init__(
        self, supervisor: Supervisor, kind: str, name: str, nursery: trio.Nursery, outer: Domain | None = None
    ) -> None:
        self.kind = kind
        self.name = name
        self.counted_as = kind if kind == "peer" else name
        self.failure: Failure | None = None
        self.supervisor = supervisor
        self._nursery = nursery
        self._outer = outer
        self._running: set[trio.CancelScope] = set()
        self._gone = trio.Event()
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended or is about to: nothing more is started in it."""
        return self._is_over or (self._outer is not None and self._outer.is_over)

    @property
    def failures(self) -> dict[tuple[str, Fault], int]:
        """How often its tasks failed, by name and fault."""
        counted = self.supervisor.failures.items()
        return {(task, fault): count for (name, task, fault), count in counted if name == self.counted_as}

    def inside(self, kind: str, name: str) -> Domain:
        """A smaller domain that ends with this one at the latest; `cancel` it when what it stands for is gone."""
        return Domain(self.supervisor, kind, f"{kind} {name}", self._nursery, self)

    def cancel(self) -> None:
        """End it; its tasks, and whoever is inside the block that opened it, are cancelled."""
        self._is_over = True
        if self._outer is None:
            self._nursery.cancel_scope.cancel()
        for scope in list(self._running):  # also of who has not started yet, and so is no task of the nursery
            scope.cancel()

    async def wait_gone(self) -> None:
        """After `cancel`, until all its tasks are gone."""
        while self._running:
            await self._gone.wait()

    def start_soon(
        self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any, policy: Policy
    ) -> bool:
        """Run a task; never raises. In a domain that is over, nothing happens.

        Args:
            name: of the task; the same for all tasks that do the same, since it names a counter.
            function: the task. If it returns, the task is over, whatever the policy.
            *arguments: for it.
            policy: what its failure means.

        Returns:
            Whether it runs; if not, what it was to close at its end is the caller's still.
        """
        self.supervisor.tasks[self.kind, name] = policy
        if self.is_over:
            log.debug("%s: %s is not started, because it ends", self.name, name)
            return False
        scope = trio.CancelScope()
        self._enter(scope)  # before it runs, so that `cancel` meets it whenever that comes
        try:
            self._nursery.start_soon(self._run, scope, name, function, arguments, policy)
        except RuntimeError:  # the nursery has just closed, and the block's end has not been told yet
            log.debug("%s: %s is not started, because it has ended", self.name, name)
            self._leave(scope)
            return False
        return True

    async def start(
        self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any, policy: Policy
    ) -> Any:
        """Run a task and wait until it calls ``task_status.started``; when it begins again, it calls that again.

        Returns:
            What it passes to ``started``.

        Raises:
            Exception: what the task raises before it has started. That is the caller's to handle: it is not counted.
            RefusedError: if the domain is over.
        """
        self.supervisor.tasks[self.kind, name] = policy
        if self.is_over:
            raise RefusedError(f"{name} cannot be started, because {self.name} ends")
        scope = trio.CancelScope()
        self._enter(scope)
        try:
            return await self._nursery.start(partial(self._run, scope, name, function, arguments, policy))
        except BaseException:
            self._leave(scope)
            raise

    def call(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Tell somebody something, at once. What goes wrong there is dropped, like the failure of a task."""
        self.supervisor.tasks[self.kind, name] = Policy.DROP
        if self.is_over:
            return
        try:
            self.supervisor.begins(self.name, name)
            function(*arguments)
        except Exception as error:
            self._judge(name, error, Policy.DROP, 0)

    async def serve(self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any) -> bool:
        """Do something in the task of a caller that is not this program's, libp2p's say, and that no failure may reach.

        It is dropped with what goes wrong, like a task; it ends with the caller's task, and not with this domain.

        Returns:
            Whether nothing went wrong.
        """
        self.supervisor.tasks[self.kind, name] = Policy.DROP
        is_done = False

        async def serve() -> None:
            nonlocal is_done
            await function(*arguments)
            is_done = True

        await self._repeat(name, serve, (), Policy.DROP, None)
        return is_done

    async def _run(
        self,
        scope: trio.CancelScope,
        name: str,
        function: Callable[..., Awaitable[object]],
        arguments: tuple[Any, ...],
        policy: Policy,
        task_status: TaskStatus[Any] | None = None,
    ) -> None:
        start = None if task_status is None else _Start(task_status, lambda: self.supervisor.begins(self.name, name))
        try:
            with scope:
                await self._repeat(name, function, arguments, policy, start)
        finally:
            self._leave(scope)
        if start is not None and not start.is_done and scope.cancelled_caught:
            raise RefusedError(f"{name} cannot be started, because {self.name} ends")

    def _enter(self, scope: trio.CancelScope) -> None:
        for domain in self._chain():
            domain._running.add(scope)

    def _leave(self, scope: trio.CancelScope) -> None:
        for domain in self._chain():
            domain._running.discard(scope)
            if not domain._running:
                domain._gone.set()
                domain._gone = trio.Event()

    def _chain(self) -> Iterator[Domain]:
        """This domain and those that it is inside of."""
        domain: Domain | None = self
        while domain is not None:
            yield domain
            domain = domain._outer

    async def _repeat(
        self,
        name: str,
        function: Callable[..., Awaitable[object]],
        arguments: tuple[Any, ...],
        policy: Policy,
        start: _Start | None,
    ) -> None:
        backoff = Backoff()
        while True:
            began = trio.current_time()
            cancelled: BaseException | None = None
            try:
                if start is None:
                    self.supervisor.begins(self.name, name)
                    await function(*arguments)
                else:
                    await function(*arguments, task_status=start)
                return  # noqa: TRY300  an else would have to come after both handlers
            except BaseExceptionGroup as group:
                failed, cancelled = group.split(Exception)
                if failed is None:
                    raise
                error: Exception = failed
            except Exception as alone:
                error = alone
            if start is not None and not start.is_done:
                raise plain(error)
            wait_s = backoff.after(trio.current_time() - began)
            self._judge(name, error, policy, wait_s)
            if cancelled is not None:
                raise cancelled
            if policy is not Policy.RESTART or self.is_over:
                return
            await trio.sleep(wait_s)

    def _judge(self, name: str, error: Exception, policy: Policy, wait_s: float) -> None:
        if self.is_over:
            self.supervisor.failed(self, name, error, "it was about to end")
            return
        match policy:
            case Policy.RESTART:
                self.supervisor.failed(self, name, error, f"it begins again in {wait_s:g} s")
            case Policy.DROP:
                self.supervisor.failed(self, name, error, "the rest goes on without it")
            case Policy.END:
                self.failure = self.supervisor.failed(self, name, error, f"that ends {self.name}")
                self.cancel()


class _Start:
    """The ``task_status`` of a supervised task: the second ``started`` and those after it are nobody's business."""

    def __init__(self, task_status: TaskStatus[Any], begins: Callable[[], None]) -> None:
        self.is_done = False
        self._task_status = task_status
        self._begins = begins

    def started(self, value: Any = None) -> None:
        """The task runs."""
        if not self.is_done:
            self._task_status.started(value)
            self.is_done = True
        self._begins()


def reason_of(error: BaseException) -> str:
    """An error in one line, fit for a log and a terminal; of a group, each error in it once.

    Returns:
        At most `MAX_REASON_CHARS` characters.
    """
    words = dict.fromkeys(_words(each) for each in leaves(error))
    return "".join(char if char.isprintable() else " " for char in "; ".join(words)[:MAX_REASON_CHARS])


def _words(error: BaseException) -> str:
    scarce = resource_error(error)
    if scarce is not None:
        return str(scarce)
    if isinstance(error, ShoalError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


@asynccontextmanager
async def open_plain_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for what one call does at once; its error comes without a group, Shoal's own before any other."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise plain(group) from None


def plain(error: BaseException) -> BaseException:
    """What a caller can act on: of a group, the only error in it, or Shoal's first, or else the group."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    errors = list(leaves(error))
    return errors[0] if len(errors) == 1 else unwrap(error)
