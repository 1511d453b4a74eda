"""Whatever members sign, and whatever comes of jobs and fetches, a run takes it and goes on.

The statements are made up by somebody who sees what the node under test does: they are for the round that it is in,
name the policy that it holds and the offers that it knows, and carry the largest numbers that there are.
"""

from __future__ import annotations

import hashlib
import math
from random import Random
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt.views import MAX_COUNT, Evaluation, evaluations
from shoal.protocol.codec import encode, to_plain
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training import run_events as events
from shoal.training.claims import possible
from shoal.training.electorate import Electorate, Standing
from shoal.training.exchange.rounds import Ballot
from shoal.training.manifest import Manifest, Mode, Role
from shoal.training.run import Run
from shoal.training.run_events import Policy
from shoal.training.statements import (
    MAX_ATTEMPTS,
    MAX_EPOCH,
    MAX_OFFERS,
    MAX_RATE,
    MAX_SAMPLES,
    MAX_SECONDS,
    MAX_STEPS,
    NO_BALLOT,
    TOPIC_OF,
    TOPIC_RULES,
    Addresses,
    Facts,
    Offer,
    Phase,
    Proposal,
    Result,
    RoundKey,
    Statement,
    Vote,
    ballot_name,
    first_after,
    read_statement,
)

PEERS: Final = sorted(PeerId.of_public_key(bytes([n]) * 32) for n in range(1, 6))
ME: Final = PEERS[2]
SWARM: Final = SwarmId.of_manifest(b"robust")
INITIAL: Final = Policy(0, Cid.of_block(b"initial"), "", 0, None, NO_BALLOT, Electorate())
NAMES: Final = [bytes([n]) * 32 for n in range(1, 7)]
"""Hashes that name nothing."""
PAUSES_S: Final = (0.0, 0.0, 0.001, 0.05, 0.3, 2.0, 100.0)
ENVELOPE_BYTES: Final = 384
"""Of a presence record, beside what it says."""
NUM_STEPS: Final = 250


def record_name(author: PeerId, statement: Statement) -> bytes:
    """Stands for the hash of the record."""
    return hashlib.sha256(author.encode() + encode(statement)).digest()


class Stage:
    """One run, a worker that does its jobs somehow, and members who say anything."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.now = 100.0
        self.cids = [INITIAL.cid, *(Cid.of_block(bytes([n])) for n in range(5))]
        self.job: events.Job | None = None
        self.fetches: list[Cid] = []
        self.said: list[events.Said] = []
        self.is_open = False
        self.num_updates = 0
        self.max_env_steps = rng.choice((1024, 2**40))
        stored = Result(epoch=2, cid=self.cids[1], parent=self.cids[0], ballot=NAMES[0], env_steps=512)
        self.run = Run(
            Manifest(
                owner=PEERS[0],
                task="gym:CartPole-v1",
                algorithm="ppo",
                batch_size=256,
                mode=rng.choice(list(Mode)),
                target_return=rng.choice((None, 100.0)),
                max_env_steps=self.max_env_steps,
            ),
            SWARM,
            ME,
            Role.STORAGE if rng.random() < 0.1 else Role.LEARNER,
            self.now,
            stored=stored if rng.random() < 0.2 else None,
        )

    # What happens.

    def step(self) -> None:
        """Something happens, and what follows from it is checked."""
        rng = self.rng
        self.now += rng.choice(PAUSES_S)
        roll = rng.random()
        if roll < 0.5:
            author = rng.choice(PEERS)
            statement = self.statement()
            self.hand_in(events.Heard(author, statement, record_name(author, statement)))
        elif roll < 0.75 and (self.said or self.job is not None):
            self.hand_in(self.said.pop(0) if self.said else self.job_done())
        elif roll < 0.85 and self.fetches:
            cid = self.fetches.pop(rng.randrange(len(self.fetches)))
            self.hand_in(events.Fetched(cid) if rng.random() < 0.7 else events.NotFetched(cid, "nobody gives it"))
        elif 0.85 <= roll < 0.87:
            self.hand_in(events.Gone(rng.choice(PEERS)))
        elif 0.87 <= roll < 0.9:
            self.hand_in(events.Documents(tuple(self.evaluation() for _ in range(rng.randrange(4)))))
        elif not self.is_open:
            self.is_open = True
            self.hand_in(events.Opened(INITIAL))
        elif 0.9 <= roll < 0.905:
            self.is_open, self.job = False, None
            self.hand_in(events.WorkerGone("it died"))
        else:
            self.hand_in(events.Tick())

    def hand_in(self, event: events.Event) -> None:
        for output in self.run.handle(event, self.now):
            match output:
                case events.Say(statement):
                    self.check_statement(statement)
                    self.said.append(events.Said(statement, record_name(ME, statement)))
                case events.Fetch(cid, sources, _):
                    assert len(sources) <= 2 * len(PEERS)
                    self.fetches.append(cid)
                case events.Wake(at):
                    assert at > self.now
                case events.Abandon() | events.Keep() | events.Write() | events.WriteEvaluation() | events.Note():
                    pass
                case _:
                    assert self.is_open
                    assert self.job is None, f"the worker is to do {output} while it does {self.job}"
                    self.job = output
                    if isinstance(output, events.Merge):
                        self.check_ballot(output.ballot)

    def check_statement(self, statement: Statement) -> None:
        """What a node says is understood by all, and fits into a record of its topic."""
        topic = TOPIC_OF[type(statement)]
        assert read_statement(topic, to_plain(statement)) == statement
        assert len(encode(statement)) + ENVELOPE_BYTES <= TOPIC_RULES[topic].max_bytes

    def check_ballot(self, ballot: Ballot) -> None:
        authors = [each.author for each in ballot.offers]
        assert authors == sorted(set(authors))
        assert 1 <= len(authors) <= MAX_OFFERS

    # What jobs come to.

    def job_done(self) -> events.Event:
        rng = self.rng
        job, self.job = self.job, None
        match job:
            case events.Collect(samples, max_seconds):
                number = rng.randint(0, samples + 7)
                total = self.run.progress.samples + number
                return events.Collected(total, number, rng.choice((0.0, max_seconds, 60.0)), (math.pi,))
            case events.Update(policy):
                return self.yielded() if rng.random() < 0.9 else self.updated(policy, NO_BALLOT)
            case events.Merge(ballot):
                if rng.random() < 0.15:
                    return events.MergeFailed("no finite numbers")
                policy = self.run.policy or INITIAL
                return self.yielded() if rng.random() < 0.3 else self.updated(policy, ballot.name)
            case events.Load(result):
                can_be = result.epoch <= result.env_steps <= 2 * self.max_env_steps
                if rng.random() < 0.2 or not can_be:
                    return events.LoadRefused("no state")
                epoch = result.epoch if rng.random() < 0.8 else result.epoch + 1
                policy = Policy(
                    epoch, result.cid, "", result.env_steps, result.parent, result.ballot, self.electorate()
                )
                return events.Loaded(policy, rng.choice((0, 0, 64)))
            case events.Evaluate():
                return events.Evaluated(rng.choice((0.0, 200.0, math.nan, math.inf, -1e300)))
            case _:
                return events.Finished()

    def yielded(self) -> events.Yielded:
        cid = self.some_cid() if self.rng.random() < 0.9 else None
        return events.Yielded(cid, 0 if cid is None else self.rng.choice((1, 64, 256)), self.some_peers())

    def updated(self, parent: Policy, ballot: bytes) -> events.Updated:
        self.num_updates += 1
        cid = Cid.of_block(b"%d" % self.num_updates)
        self.cids.append(cid)
        steps = parent.env_steps + 256
        policy = Policy(parent.epoch + 1, cid, "", steps, parent.cid, ballot, self.electorate())
        return events.Updated(policy, self.some_peers(), {"loss": 0.5})

    def electorate(self) -> Electorate:
        stakes = (0.125, 64.0, 256.0, float(MAX_SAMPLES))
        rates = (1e-6, 100.0, MAX_RATE)
        rng = self.rng
        return Electorate(
            {peer: Standing(rng.choice(stakes), rng.choice(rates), rng.randrange(3)) for peer in self.some_peers()}
        )

    # What members say.

    def statement(self) -> Statement:
        rng = self.rng
        policy = self.run.policy or INITIAL
        match rng.randrange(7):
            case 0 | 1:
                weight = self.number(1, 64, 256, MAX_SAMPLES)
                return Offer(key=self.key(), cid=self.some_cid(), weight=weight, seconds=rng.choice((0.0, MAX_SECONDS)))
            case 2:
                return Proposal(key=self.key(), attempt=self.attempt(), offers=self.offers())
            case 3:
                key, attempt = self.key(), self.attempt()
                name = rng.choice((NO_BALLOT, ballot_name(key, self.offers()), ballot_name(key, self.offers())))
                return Vote(key=key, ballot=name, attempt=attempt, cast=rng.choice((0, attempt, attempt // 2)))
            case 4:
                return Result(
                    epoch=self.number(policy.epoch + 1, policy.epoch, 0, 1, MAX_EPOCH),
                    cid=self.some_cid(),
                    parent=rng.choice((policy.cid, self.some_cid(), None)),
                    ballot=rng.choice((NO_BALLOT, *NAMES, self.decided())),
                    env_steps=self.number(policy.env_steps + 256, 0, 256, 1024, MAX_STEPS),
                )
            case 5:
                return Facts(
                    role=rng.choice(list(Role)),
                    phase=rng.choice(list(Phase)),
                    epoch=self.number(policy.epoch, 0, 1, MAX_EPOCH),
                    step=self.number(0, 1, MAX_EPOCH),
                    samples=self.number(0, 64, MAX_SAMPLES),
                    env_steps=self.number(0, MAX_STEPS),
                    steps_per_s=rng.choice((0.0, MAX_RATE)),
                    speed=rng.choice((0.0, 100.0, MAX_RATE)),
                )
        return Addresses(addresses=("/ip4/127.0.0.1/tcp/1",))

    def key(self) -> RoundKey:
        """Mostly of the round that the node is in, or of one that follows from it."""
        current, rng = self.run.round, self.rng
        if current is not None and rng.random() < 0.7:
            return current.key
        if current is not None and rng.random() < 0.5:
            return RoundKey(current.key.epoch, current.key.step + 1, self.decided())
        after = rng.choice((first_after(self.some_cid()), *NAMES))
        return RoundKey(self.number(0, 1, 2, MAX_EPOCH), self.number(0, 1, MAX_EPOCH), after)

    def decided(self) -> bytes:
        """A ballot that the node decided on, if it did."""
        current = self.run.round
        if current is not None and current.decided is not None:
            return current.decided.name
        return self.rng.choice(NAMES)

    def offers(self) -> tuple[bytes, ...]:
        """Names of a ballot: mostly of all offers that the node knows, or of some."""
        rng, current = self.rng, self.run.round
        known = [] if current is None else [each.name for each in current.offers.values()]
        if known and rng.random() < 0.5:
            return tuple(sorted(known))
        names = [*known, *NAMES[:2]]
        return tuple(sorted(rng.sample(names, rng.randint(1, len(names)))))

    def attempt(self) -> int:
        current = self.run.round
        return self.number(0 if current is None else current.attempt, 0, 1, 2, MAX_ATTEMPTS)

    def evaluation(self) -> Evaluation:
        rng = self.rng
        epoch, steps = self.number(0, 1, 3, MAX_EPOCH, MAX_COUNT), self.number(0, 256, MAX_STEPS, MAX_COUNT)
        mean_return = rng.choice((0.0, 150.0, 1e300))
        return Evaluation(epoch, self.some_cid(), mean_return, steps, 20, rng.choice(PEERS))

    def number(self, *numbers: int) -> int:
        return self.rng.choice(numbers)

    def some_cid(self) -> Cid:
        return self.rng.choice(self.cids[-8:])

    def some_peers(self) -> tuple[PeerId, ...]:
        return tuple(peer for peer in PEERS if self.rng.random() < 0.5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_statement_and_no_outcome_of_a_job_ends_a_run(seed: int) -> None:
    stage = Stage(Random(seed))
    for _ in range(NUM_STEPS):
        stage.step()


@pytest.mark.parametrize("beyond", [("epoch", MAX_EPOCH), ("env_steps", MAX_STEPS)])
def test_a_claim_beyond_what_a_run_can_come_to_is_not_handed_to_it(beyond: tuple[str, int]) -> None:
    """Documents take larger numbers than any statement does."""
    what, most = beyond
    for number, is_heard in ((most, True), (most + 1, False), (MAX_COUNT, False)):
        epoch, env_steps = (number, 1) if what == "epoch" else (1, number)
        entry = {"cid": INITIAL.cid, "return": 1.0, "env_steps": env_steps, "episodes": 20}
        found = possible(evaluations({PEERS[0]: {"evaluations": {str(epoch): entry}}}))
        assert [(each.epoch, each.env_steps) for each in found] == ([(epoch, env_steps)] if is_heard else [])
