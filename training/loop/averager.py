"""`Averager`: a few lines in a training loop, and what it learns is averaged with what others learn.

    with Averager(model, "TICKET") as averager:
        for x, y in batches:
            ...
            optimizer.step()
            averager.step(len(x))

The process that has the loop is the worker of its user's node, as far as that one swarm goes: it attaches over a Unix
socket, and the node drives it by the same calls (`training.worker_calls`) as a worker of its own. So rounds, votes,
aggregators, codecs, newcomers and restarts are those of every other run; there is no second exchange. A thread reads
the calls; what concerns the tensors is done by the loop's own thread, inside of `step` (`gate`).
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from shoal.protocol.errors import NoDaemonError, ShoalError, UsageError
from shoal.protocol.services import Empty
from shoal.training.algorithms.base import Learner
from shoal.training.loop.gate import Gate
from shoal.training.loop.learner import SHAPES, Averaged, LoopLearner
from shoal.training.loop.node import LocalNode
from shoal.training.loop.tensors import Given, Tensors
from shoal.training.requirements import check_loaded, loop_requirements
from shoal.training.tasks.failures import Failures
from shoal.training.worker import Worker, serve
from shoal.training.worker_calls import FINISH, Finish, Open

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Averaged", "Averager"]

log = logging.getLogger(__name__)

FIRST_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 10.0
REFUSED_S: Final = 3.0
"""How long a node that is there may refuse a loop that it had, until that is its last word."""
END_S: Final = 2.0
ALONE_AFTER: Final = 2
"""Averages of one loop in a row; a single one is of whoever was ready first."""
MAX_SHAPES: Final = 1000
"""Of a model with more tensors the shapes are not in the manifest; they are compared when a state is taken."""


class Averager:
    """Averages what a training loop has made of its tensors with what the other members of a swarm have.

    Use it in a ``with`` block, and call `step` after each step of the optimiser. The tensors are changed in place, in
    `step` and before the constructor returns, and at no other time.

    Attributes:
        swarm: the full name of the swarm.
        epoch: averages that the swarm has made up to the state that this loop goes on from.
        members: of how many loops the last average of this loop was; 0 before that.
    """

    def __init__(
        self,
        parameters: Given,
        swarm: str | None = None,
        *,
        create: str | None = None,
        every: int | None = None,
        min_members: int | None = None,
        mode: str | None = None,
        codec: str | None = None,
        aggregator: str | None = None,
        profile: str = "default",
    ) -> None:
        """Attach to the node of a profile, and wait for the state that the swarm is in.

        A swarm that has begun gives its newest state; of one that has not, everybody takes the tensors of one member.

        Args:
            parameters: a module (its buffers that hold floats are averaged too), an optimiser, or tensors by name or
                in order; float32, on any device.
            swarm: a ticket, or the name of a swarm that the node is in. By default the only one for loops there is.
            create: instead of that, the node's swarm of this name, which is started if it is in none. `ticket` is for
                the others. What follows is for that swarm, and so for all its members; left out, as in
                ``shoal swarm create``.
            every: samples that the fastest loop trains on between two averages; the others do what they manage in
                that time. Default: 2048.
            min_members: the constructor waits until so many loops are there, if nobody has begun.
            mode: ``local`` takes the average, ``diloco`` steps by it.
            codec: what contributions travel as; ``auto``: all bits, and fewer while an exchange takes too much of the
                members' time.
            aggregator: by which rule many contributions become one.
            profile: of the node.

        Raises:
            NoDaemonError: if no node runs under the profile.
            NoPeersError: if no member of a ticket's swarm can be reached.
            RefusedError: if another loop is attached to this swarm at this node.
            UsageError: if these tensors cannot be averaged, or not in this swarm: the message says what differs.
        """
        given = {
            "batch_per_learner": every,
            "min_learners": min_members,
            "mode": mode,
            "codec": codec,
            "aggregator": aggregator,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        if settings and create is None:
            raise UsageError("how often and how it is averaged is the swarm's to say; give that together with create=")
        if swarm is not None and create is not None:
            raise UsageError("give the ticket or the name of a swarm, or create=, not both")
        self.epoch = self.members = self._num_of_one = 0
        self._tensors = Tensors(parameters)
        self._node = LocalNode(profile)
        if create is None:
            self.swarm = self._node.find(swarm)
        else:
            shapes = {SHAPES: self._tensors.shapes} if len(self._tensors.shapes) <= MAX_SHAPES else {}
            self.swarm = self._node.find_or_create(create, settings, shapes)
        self._gate: Gate[Averaged] = Gate()
        self._ending = threading.Event()
        self._connection, self._arena = self._node.attach(self.swarm)
        self._thread = threading.Thread(target=self._speak, name="shoal averager", daemon=True)
        self._thread.start()
        try:
            if min_members is not None and min_members > 1:
                # The ticket cannot be read off an object that is not made before the others have come.
                log.warning("the first average waits for %d loops; the others join with %s", min_members, self.ticket)
            self._hear(self._gate.wait_for_news())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Train in the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The others go on without this loop."""
        self.close()

    @property
    def ticket(self) -> str:
        """What others join with, as things are now."""
        return str(self._node.swarm(self.swarm)["ticket"])

    def step(self, num_samples: int = 1) -> Averaged | None:
        """Say that the loop has trained on so many more samples; when it is time to, average, and wait for that.

        Without a node, and without others, it goes on alone, and says so in the log.

        Returns:
            What was made of the tensors; None if nothing.

        Raises:
            UsageError: if this loop cannot be averaged any more, as when its swarm was left; the message says why.
        """
        if num_samples < 0:
            raise UsageError(f"a loop cannot have trained on {num_samples} samples")
        return self._hear(self._gate.step(num_samples))

    def close(self) -> None:
        """Detach; the tensors stay as they are. A second call does nothing."""
        self._ending.set()
        self._gate.close()
        self._hang_up(socket.SHUT_RD)  # what the node asked last is answered: it may be the newest state
        self._thread.join(END_S)
        self._hang_up(socket.SHUT_RDWR)

    def _hear(self, news: Averaged | None) -> Averaged | None:
        if news is None:
            return None
        self.epoch = news.epoch
        if news.members:
            if news.members > 1 and self._num_of_one >= ALONE_AFTER:
                log.warning("no longer alone: average %d of %s is of %d loops", news.epoch, self.swarm, news.members)
            self._num_of_one = 0 if news.members > 1 else self._num_of_one + 1
            if self._num_of_one == ALONE_AFTER:
                log.warning("this loop trains ALONE: nobody else took part in average %d of %s", news.epoch, self.swarm)
            self.members = news.members
        return news

    # The thread that speaks to the node.

    def _speak(self) -> None:
        while True:
            worker = Worker(self._arena, self._make)

            def finish(request: Finish, worker: Worker = worker) -> Empty:
                log.warning("the run %s is over: this loop goes on alone; results in %s", self.swarm, request.folder)
                return worker.finish(request)

            worker.methods[FINISH.name] = (FINISH.request, finish)
            try:
                serve(self._connection, worker)
            except OSError as error:
                log.debug("the node hung up: %s", error)
            except Exception as error:  # a defect of this program: the loop is not to wait for it for ever
                log.exception("speaking to the node failed")
                self._gate.fail(ShoalError(f"speaking to the node failed: {error!r:.300}"))
            self._connection.close()
            self._arena.close()
            self._gate.let_go()
            if self._ending.is_set() or not self._gate.is_open or not self._attach_again():
                return

    def _attach_again(self) -> bool:
        """Wait for the node to be back; whether it is."""
        log.warning("the node does not answer: this loop goes on ALONE until it is there again; `shoal up` starts it")
        wait_s, refused_since = FIRST_RETRY_S, math.inf
        while not self._ending.wait(wait_s):
            wait_s = min(2 * wait_s, MAX_RETRY_S)
            try:
                self._connection, self._arena = self._node.attach(self.swarm)
            except NoDaemonError:
                refused_since = math.inf
                continue
            except ShoalError as error:
                refused_since = min(refused_since, time.monotonic())
                if time.monotonic() < refused_since + REFUSED_S:  # a node that has just begun knows its swarms soon
                    wait_s = FIRST_RETRY_S
                    continue
                self._gate.fail(error)
                return False
            log.warning("attached to the node again")
            if self._ending.is_set():
                self._hang_up(socket.SHUT_RDWR)
            return True
        return False

    def _make(self, request: Open) -> tuple[Learner, Failures]:
        try:
            check_loaded(request.manifest, loop_requirements())
            return LoopLearner(request.manifest, self._tensors, self._gate, clock=time.monotonic), Failures("")
        except UsageError as error:
            self._gate.fail(error)
            raise

    def _hang_up(self, how: int) -> None:
        with suppress(OSError):
            self._connection.shutdown(how)
