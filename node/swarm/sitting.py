"""Where a person sits down: asks of other members, which the local API shows and takes answers to.

The rules and bounds are the core's (`shoal.training.tasks.people`); here are the waiting and the clock. Nobody but the
local API can answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from shoal.node.signals import Signal
from shoal.protocol.errors import RemoteError, Status, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.plain_roles import PlainRole

if TYPE_CHECKING:  # with NumPy, which a node without such a seat does not load
    from shoal.training.tasks.people import People, PersonAsk

MARGIN_S: Final = 0.5
"""An answer begins its way back so long before whoever asked gives it up."""
MAX_LOOK_S: Final = 30.0
"""For one look at what waits."""


class Sitting:
    """The chair of one run at this node.

    Attributes:
        changed: set when something is asked, or answered.
    """

    def __init__(self) -> None:
        self.changed = Signal()
        self._people: People | None = None

    @property
    def num_waiting(self) -> int:
        """Asks that can be answered now."""
        return 0 if self._people is None else self._people.count(trio.current_time())

    def seat(self, roles: tuple[PlainRole, ...]) -> None:
        """These roles can be played from now on; none: none can, and what is asked still is given up."""
        if not roles:
            self._people = None
            self.changed.set()
            return
        from shoal.training.tasks.people import People
        from shoal.training.tasks.plain import read_roles

        if self._people is None:
            self._people = People()
        self._people.roles = read_roles(roles)

    async def ask(self, peer: PeerId, takes: bytes, deadline: float) -> bytes:
        """What somebody here does where a member's takes stand, as far as it was done in time.

        Raises:
            RemoteError: FAILED_PRECONDITION if nobody is there, RESOURCE_EXHAUSTED if it is too much,
                DEADLINE_EXCEEDED if nobody did anything.
            ProtocolError: if these are no takes of this game.
        """
        people = self._people
        if people is None:
            raise RemoteError(Status.FAILED_PRECONDITION, "what this node plays has no seat for a person")
        from shoal.training.tasks.cast import MAX_PERSON_S
        from shoal.training.tasks.people import NobodyThereError, TooMuchError

        now = trio.current_time()
        until = min(deadline - MARGIN_S, now + MAX_PERSON_S)
        try:
            question = people.ask(peer, takes, until, now)
        except NobodyThereError as error:
            raise RemoteError(Status.FAILED_PRECONDITION, str(error)) from error
        except TooMuchError as error:
            raise RemoteError(Status.RESOURCE_EXHAUSTED, str(error)) from error
        self.changed.set()
        try:
            with trio.move_on_at(until):
                while question.missing and self._people is people:
                    await self.changed.wait()
        finally:
            people.drop(question)
            self.changed.set()
        if question.acts and all(act is None for act in question.acts):
            raise RemoteError(Status.DEADLINE_EXCEEDED, "nobody here answered in time")
        return question.encoded()

    async def look(self, seconds: float) -> list[PersonAsk]:
        """What waits for an answer; if nothing does, wait for so long."""
        found: list[PersonAsk] = []
        with trio.move_on_after(min(seconds, MAX_LOOK_S)):
            while not (found := self._seen()) and seconds > 0:
                people = self._people
                if people is not None:
                    people.num_readers += 1
                try:
                    await self.changed.wait()
                finally:
                    if people is not None:
                        people.num_readers -= 1
        return found or self._seen()

    def _seen(self) -> list[PersonAsk]:
        return [] if self._people is None else self._people.look(trio.current_time())

    def answer(self, number: int, act: object) -> None:
        """Somebody here does something.

        Raises:
            UsageError: if nobody waits for that, or the role cannot act so.
        """
        if self._people is None:
            raise UsageError("nobody is asked anything at this node: what it plays has no seat for a person")
        self._people.answer(number, act, trio.current_time())
        self.changed.set()
