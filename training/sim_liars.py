"""Members of a simulated swarm that lie: one kind for each claim that others act by.

All else they do as honest members do, with the same cores, so that they are counted, voted with and waited for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from shoal.protocol.codec import to_plain
from shoal.protocol.ids import Cid, PeerId
from shoal.training.exchange.direct import Part
from shoal.training.sim_member import Member
from shoal.training.statements import (
    MAX_EPOCH,
    MAX_RATE,
    MAX_SAMPLES,
    TOPIC_OF,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    RoundKey,
    Statement,
    Vote,
)

LIE_S: Final = 0.5
"""Between two lies that are not an answer to anything."""


class Liar(Member):
    """What they have in common: something that is said now and then, and in place of the truth."""

    def start(self) -> None:
        """Begin a life, and to lie."""
        super().start()
        self.swarm.network.at(self.swarm.network.rng.random(), self.again, of=self.peer)

    def again(self) -> None:
        """Lie, and lie again."""
        self.lie()
        self.swarm.network.at(LIE_S, self.again, of=self.peer)

    def lie(self) -> None:
        """Said without being asked."""

    def claim(self, statement: Statement) -> None:
        """Say it, whatever the own run thinks."""
        self.publish(TOPIC_OF[type(statement)], to_plain(statement))

    @property
    def key(self) -> RoundKey | None:
        """The round that is on."""
        return None if self.run.round is None else self.run.round.key

    def made_up(self) -> Cid:
        """A CID that nobody has."""
        return Cid.of_block(self.swarm.rng.randbytes(16))


class Boaster(Liar):
    """Says that it has more samples and is faster than anything, and that it exchanges already."""

    def say(self, statement: Statement) -> None:
        """In every report."""
        if isinstance(statement, Facts):
            statement = replace(
                statement, samples=MAX_SAMPLES, speed=MAX_RATE, steps_per_s=MAX_RATE, phase=Phase.EXCHANGING
            )
        super().say(statement)


class Heavy(Liar):
    """Offers weights and rates that it did not collect."""

    def say(self, statement: Statement) -> None:
        """In every offer."""
        if isinstance(statement, Offer):
            statement = replace(statement, weight=MAX_SAMPLES if self.swarm.rng.random() < 0.2 else 4096, seconds=0.0)
        super().say(statement)


class Empty(Liar):
    """Offers bytes that it gives to hardly anybody."""

    def gives(self, cid: Cid) -> bool:
        """Now and then."""
        return self.swarm.rng.random() < 0.1


class Usurper(Liar):
    """Proposes whenever it likes, also offers that do not exist, and its own alone."""

    def lie(self) -> None:
        """Out of turn."""
        current = self.run.round
        if current is None:
            return
        names = [each.name for each in current.offers.values()][: self.swarm.rng.randrange(1, 4)]
        if self.swarm.rng.random() < 0.3:
            names.append(hashlib.sha256(self.swarm.rng.randbytes(8)).digest())
        if names:
            attempt = self.swarm.rng.randrange(4)
            self.claim(Proposal(key=current.key, attempt=attempt, offers=tuple(sorted(set(names)))))


class Silent(Liar):
    """Offers, but neither proposes nor votes."""

    def say(self, statement: Statement) -> None:
        """All but these."""
        if not isinstance(statement, Proposal | Vote):
            super().say(statement)


class TwoTongued(Liar):
    """When it is its turn, it proposes two ballots; it votes for what does not exist."""

    def say(self, statement: Statement) -> None:
        """Each time."""
        if isinstance(statement, Proposal) and len(statement.offers) > 2:
            self.claim(replace(statement, offers=statement.offers[1:]))
        if isinstance(statement, Vote):
            statement = replace(statement, ballot=hashlib.sha256(self.swarm.rng.randbytes(8)).digest())
        super().say(statement)


class Prophet(Liar):
    """Holds policies of epochs to come that nobody has."""

    def lie(self) -> None:
        """A new one each time."""
        policy = self.run.policy
        if policy is not None:
            ahead = self.swarm.rng.choice((1, 2, 1000, MAX_EPOCH - policy.epoch))
            self.claim(
                Result(
                    epoch=policy.epoch + ahead,
                    cid=self.made_up(),
                    parent=policy.cid,
                    ballot=hashlib.sha256(b"none").digest(),
                    env_steps=policy.env_steps + ahead,
                )
            )


class Solver(Liar):
    """Claims that policies solved the task: true ones and made-up ones."""

    def lie(self) -> None:
        """Not too often: a document is for ever."""
        policy = self.run.policy
        if policy is None or self.swarm.rng.random() > 0.05:
            return
        is_true = self.swarm.rng.random() < 0.5
        cid = policy.cid if is_true else self.made_up()
        epoch = policy.epoch if is_true else policy.epoch + self.swarm.rng.randrange(1, 1000)
        entry = {"cid": cid, "return": 1e9, "env_steps": policy.env_steps, "episodes": 20}
        self.write(evaluations={str(epoch): entry})


class Spammer(Liar):
    """Speaks as fast as it can."""

    def lie(self) -> None:
        """A hundred a second."""
        for number in range(50):
            self.claim(Facts(role=self.role, phase=Phase.COLLECTING, samples=number))


class Late(Liar):
    """Offers at the last moment, every time."""

    def start(self) -> None:
        """Its updates take longer than the others' epochs."""
        self.machine.late_s = self.swarm.config.samples_per_peer / self.swarm.config.speed
        super().start()


class Forked(Liar):
    """Gives each member other parts of a step."""

    def give_part(self, part: Part, members: Iterable[PeerId]) -> None:
        """Each time."""
        for peer in members:
            super().give_part(replace(part, cid=self.made_up()), (peer,))


class Grudging(Liar):
    """Takes part in votes, and gives nobody its part of a step."""

    def give_part(self, part: Part, members: Iterable[PeerId]) -> None:
        """Never."""


OF_STEPS: Final = (Forked, Grudging)
"""In mode ``gradient``; elsewhere these are honest."""

KINDS: Final = (Boaster, Heavy, Empty, Usurper, Silent, TwoTongued, Prophet, Solver, Spammer, Late)
