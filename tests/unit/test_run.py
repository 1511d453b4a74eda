"""One node's run, fed by hand: what its worker is told to do, what it says, and what cannot stop it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TypeVar

import pytest

from shoal.crdt.views import Contributed, Evaluation
from shoal.dht.fetch import Lack
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.limits import MAX_MEMBERS
from shoal.training import pacing
from shoal.training import run_events as events
from shoal.training.electorate import Delivered, Electorate
from shoal.training.exchange.early import MAX_EARLY, Early
from shoal.training.jobs import MAX_ENDED
from shoal.training.lineage import RETRY_S
from shoal.training.manifest import Manifest, Role
from shoal.training.others import ALONE_S
from shoal.training.run import CHUNK_S, Run
from shoal.training.run_events import Output, Policy
from shoal.training.statements import (
    HASH_BYTES,
    MAX_RATE,
    MAX_SAMPLES,
    MAX_UPLINK,
    NO_BALLOT,
    Facts,
    Offer,
    Phase,
    Result,
    RoundKey,
    Statement,
    Vote,
    first_after,
)
from shoal.training.taking import COMING_S, LOOK_S

ME, A, B, LIAR = (PeerId.of_public_key(bytes([n]) * 32) for n in range(4))
BATCH = 1000
MANIFEST = Manifest(
    owner=ME,
    task="gym:CartPole-v1",
    algorithm="ppo",
    batch_size=BATCH,
    min_learners=1,
    target_return=475.0,
    eval_interval=10**6,
    max_env_steps=10**9,
)
SWARM = SwarmId.of_manifest(b"a run")
INITIAL = Policy(0, Cid.of_block(b"initial"), "0", 0, None, NO_BALLOT, Electorate())
T = TypeVar("T")


def policy_after(parent: Policy, *authors: PeerId, text: str = "") -> Policy:
    delivered = tuple(Delivered(author, BATCH // len(authors), 1.0) for author in authors)
    cid = Cid.of_block(f"{parent.cid} {authors} {text}".encode())
    ballot = hashlib.sha256(cid.encode()).digest()
    return Policy(
        parent.epoch + 1, cid, "", parent.env_steps + BATCH, parent.cid, ballot, parent.electorate.after(delivered)
    )


SHARED = policy_after(INITIAL, ME, A, B)


class Node:
    """A run, and the shell around it in a few lines: what it says is signed, and time is kept."""

    def __init__(self, role: Role = Role.LEARNER, manifest: Manifest = MANIFEST, stored: Result | None = None) -> None:
        self.now = 100.0
        self.run = Run(manifest, SWARM, ME, role, self.now, stored=stored)
        self.outputs: list[Output] = []

    def give(self, *given: events.Event) -> list[Output]:
        """What comes of these, what it says itself included."""
        found: list[Output] = []
        for event in given:
            for output in self.run.handle(event, self.now):
                found.append(output)
                if isinstance(output, events.Say):
                    name = hashlib.sha256(repr(output.statement).encode()).digest()
                    found += self.give(events.Said(output.statement, name))
        return found

    def hear(self, author: PeerId, *statements: Statement) -> list[Output]:
        names = [hashlib.sha256(f"{author} {each}".encode()).digest() for each in statements]
        return self.give(*(events.Heard(author, each, name) for each, name in zip(statements, names, strict=True)))

    def wait(self, seconds: float) -> list[Output]:
        until, found = self.now + seconds, []
        while self.now < until:
            self.now = min(until, self.now + LOOK_S / 4)
            found += self.give(events.Tick())
        return found

    def collect(self, samples: int, seconds: float = 0.1) -> list[Output]:
        self.now += seconds
        return self.give(events.Collected(self.run.progress.samples + samples, samples, seconds))

    def holding(self, policy: Policy) -> Node:
        """Brought to where it holds this policy."""
        self.give(events.Opened(INITIAL))
        self.run.jobs.job = None
        self.run.jobs.in_worker = policy
        self.run._hold(policy, self.now, [])
        self.give(events.Tick())
        return self


def of(kind: type[T], outputs: list[Output]) -> list[T]:
    return [output for output in outputs if isinstance(output, kind)]


def facts(policy: Policy = INITIAL, phase: Phase = Phase.COLLECTING, samples: int = 0, speed: float = 1000.0) -> Facts:
    return Facts(role=Role.LEARNER, phase=phase, epoch=policy.epoch, samples=samples, speed=speed)


def test_a_learner_alone_goes_through_an_epoch() -> None:
    node = Node()
    assert of(events.Collect, node.give(events.Opened(INITIAL))) == [events.Collect(BATCH, CHUNK_S)]
    assert of(events.Update, node.collect(BATCH)) == [events.Update(INITIAL)]
    merged = of(events.Merge, node.give(events.Yielded(Cid.of_block(b"mine"), BATCH)))
    assert [each.author for each in merged[0].ballot.offers] == [ME]
    after = policy_after(INITIAL, ME)
    outputs = node.give(events.Updated(after))
    assert node.run.policy == after
    assert after.result in [each.statement for each in of(events.Say, outputs)]
    assert of(events.Collect, outputs)


@pytest.mark.parametrize(("measured", "said"), [(0, 0), (1_250_000, 1_250_000), (2**60, MAX_UPLINK)])
def test_an_offer_says_what_the_node_can_send_as_it_was_measured_last(measured: int, said: int) -> None:
    node = Node()
    node.give(events.Opened(INITIAL))
    node.collect(BATCH)
    merged = of(events.Merge, node.give(events.Yielded(Cid.of_block(b"mine"), BATCH, uplink=measured)))
    assert [each.offer.uplink for each in merged[0].ballot.offers] == [said]


def test_what_was_collected_while_an_update_waited_counts_in_the_next_epoch() -> None:
    node = Node()
    node.give(events.Opened(INITIAL))
    node.collect(BATCH)
    node.give(events.Yielded(Cid.of_block(b"mine"), BATCH))
    ahead = events.Collected(40, 40, 0.5, (7.0,))
    outputs = node.give(events.Updated(policy_after(INITIAL, ME), ahead=ahead))
    assert of(events.Collect, outputs) == [events.Collect(BATCH - 40, CHUNK_S)]
    assert (node.run.progress.own_env_steps, node.run.epoch.work_s) == (BATCH + 40, 0.5)
    node.collect(BATCH - 40)
    whole = events.Collected(BATCH, BATCH, 0.5)
    outputs = node.give(
        events.Yielded(Cid.of_block(b"mine again"), BATCH),
        events.Updated(policy_after(policy_after(INITIAL, ME), ME), ahead=whole),
    )
    assert of(events.Update, outputs), "all that an epoch needs is here"


def test_the_first_epoch_waits_until_enough_learners_are_there() -> None:
    node = Node(manifest=replace(MANIFEST, min_learners=2))
    assert not of(events.Collect, node.give(events.Opened(INITIAL)))
    assert of(events.Collect, node.hear(A, facts()))


def test_collecting_is_done_in_pieces_so_that_it_shows_however_slow_a_step_is() -> None:
    """Item 7: a node whose environment takes 1.4 s a step showed 0 samples for five minutes."""
    node = Node()
    node.give(events.Opened(INITIAL))
    told = of(events.Say, node.collect(1, seconds=2.4))
    assert node.run.progress.samples == 1
    assert any(isinstance(each.statement, Facts) and each.statement.samples == 1 for each in told)


def test_nobody_is_stopped_by_what_a_member_says_it_collected() -> None:
    """Item 3, ATTACKS row 2: ``samples = 2**53`` and ``phase = exchanging`` stopped everybody at 0 samples."""
    node = Node().holding(SHARED)
    for phase in (Phase.EXCHANGING, Phase.COLLECTING):
        outputs = node.hear(LIAR, facts(SHARED, phase, samples=MAX_SAMPLES, speed=MAX_RATE))
        assert not of(events.Update, outputs)
    assert isinstance(node.run.jobs.job, events.Collect)
    assert pacing.share(node.run._pace(SHARED)) >= BATCH / 3


def test_a_jump_in_epochs_is_not_even_fetched() -> None:
    """Item 9, ATTACKS rows 5 and 5b."""
    node = Node().holding(SHARED)
    node.hear(A, facts(SHARED), SHARED.result)
    node.hear(B, facts(SHARED), SHARED.result)
    cid = Cid.of_block(b"mine")
    outputs = []
    for epoch, steps in ((2**40, 2**40), (2**40, 2**50), (2, MANIFEST.max_env_steps - 1), (2, 1)):
        jump = Result(epoch=epoch, cid=cid, parent=SHARED.cid, ballot=NO_BALLOT, env_steps=steps)
        outputs += node.hear(LIAR, facts(SHARED), jump) + node.wait(2 * LOOK_S)
    assert not of(events.Fetch, outputs)
    assert node.run.policy == SHARED


def test_what_half_of_the_stake_went_on_to_is_fetched_and_loaded_with_what_was_collected() -> None:
    """Item 7: who is slow does not hold the others up, and what it made counts in the next epoch."""
    node = Node().holding(SHARED)
    after = policy_after(SHARED, A, B)
    node.collect(50)
    outputs = node.hear(A, facts(after), after.result) + node.hear(B, facts(after), after.result) + node.wait(LOOK_S)
    assert of(events.Fetch, outputs)[0].cid == after.cid
    node.give(events.Fetched(after.cid))
    loaded = of(events.Load, node.collect(10))
    assert loaded == [events.Load(after.result, keep_samples=True)]
    node.give(events.Loaded(after, 60))
    assert node.run.policy == after
    assert node.run.progress.samples == 60


def test_bytes_that_nobody_gives_stop_nothing() -> None:
    """Item 3: a newer policy that nobody holds stopped everybody for up to 30 s each time."""
    node = Node().holding(SHARED)
    after = policy_after(SHARED, A, B)
    node.hear(A, facts(after), after.result)
    node.hear(B, facts(after), after.result)
    node.wait(LOOK_S)
    assert of(events.Collect, node.collect(10))
    assert of(events.Collect, node.give(events.NotFetched(after.cid, "nobody has it")) + node.collect(10))


def test_of_several_policies_that_are_heard_of_at_once_the_newest_alone_is_asked_for() -> None:
    """Whoever comes hears what members said lately, the oldest first, and would fetch each whole before the next."""
    node = Node().holding(SHARED)
    line = [SHARED]
    for _ in range(4):
        line.append(policy_after(line[-1], A, B))
    outputs = [each for policy in line[1:] for author in (A, B) for each in node.hear(author, policy.result)]
    outputs += node.wait(LOOK_S)
    assert [each.cid for each in of(events.Fetch, outputs)] == [line[-1].cid]


def test_a_policy_that_is_still_coming_is_waited_for_though_newer_ones_are_heard_of() -> None:
    """Over a slow link each newer one would begin anew, and none would ever be whole."""
    node = Node().holding(SHARED)
    after = policy_after(SHARED, A, B)
    later = policy_after(after, A, B)
    outputs = node.hear(A, facts(after), after.result) + node.hear(B, facts(after), after.result) + node.wait(LOOK_S)
    assert {each.cid for each in of(events.Fetch, outputs)} == {after.cid}
    outputs = node.give(events.Coming(after.cid))
    outputs += node.hear(A, facts(later), later.result) + node.hear(B, facts(later), later.result)
    for _ in range(20):
        outputs += node.give(events.Coming(after.cid)) + node.wait(COMING_S / 2)
    assert later.cid not in {each.cid for each in of(events.Fetch, outputs)}
    outputs = node.wait(COMING_S)  # nothing comes any more
    assert later.cid in {each.cid for each in of(events.Fetch, outputs)}


@pytest.mark.parametrize(
    ("lack", "is_asked_again"), [(Lack.STALLED, True), (Lack.UNAVAILABLE, True), (Lack.UNFIT, False)]
)
def test_what_stalled_or_cannot_be_had_now_is_asked_for_again_and_what_is_no_state_never(
    lack: Lack, is_asked_again: bool
) -> None:
    """One failure barred a policy for the life of the process."""
    node = Node().holding(SHARED)
    after = policy_after(SHARED, A, B)
    node.hear(A, facts(after), after.result)
    node.hear(B, facts(after), after.result)
    node.wait(LOOK_S)
    outputs = node.give(events.NotFetched(after.cid, "so it is", lack))
    assert not of(events.Fetch, outputs + node.wait(RETRY_S / 2))
    outputs = node.wait(RETRY_S) + node.wait(RETRY_S)
    assert (after.cid in {each.cid for each in of(events.Fetch, outputs)}) is is_asked_again


def test_a_claim_of_solved_that_nobody_gives_stops_nothing() -> None:
    """Items 3 and 9, ATTACKS row 7: 300 claims of policies that nobody holds."""
    node = Node().holding(SHARED)
    lies = tuple(
        Evaluation(author=LIAR, epoch=n + 2, cid=Cid.of_block(b"lie %d" % n), mean_return=1e9, env_steps=1, episodes=20)
        for n in range(300)
    )
    outputs = node.give(events.Documents(lies)) + node.collect(10)
    asked = of(events.Fetch, outputs)
    assert len(asked) == 1
    assert of(events.Collect, outputs)
    outputs = node.give(events.NotFetched(asked[0].cid, "nobody has it")) + node.collect(10) + node.wait(2.0)
    assert not of(events.Fetch, outputs)


def solved(author: PeerId, policy: Policy) -> Evaluation:
    return Evaluation(
        author=author,
        epoch=policy.epoch,
        cid=policy.cid,
        mean_return=500.0,
        env_steps=policy.env_steps,
        episodes=20,
    )


@pytest.mark.parametrize("is_true", [True, False])
def test_who_has_ended_and_hears_then_that_it_was_solved_earlier_ends_with_that_if_it_is_so(is_true: bool) -> None:
    """Of three nodes two had ended with epoch 34 and one with 36, for good: it had heard of the other too late."""
    first = policy_after(SHARED, A, B)
    later = policy_after(first, ME, A, B)
    node = Node().holding(later)
    mine, others = solved(ME, later), solved(A, first)
    (finish,) = of(events.Finish, node.give(events.Documents((mine,))) + node.collect(10))
    assert finish.final == mine
    node.give(events.Finished())
    assert node.run.progress.phase is Phase.DONE

    (fetch,) = of(events.Fetch, node.give(events.Documents((mine, others))))
    assert fetch.cid == first.cid
    (load,) = of(events.Load, node.give(events.Fetched(first.cid)))
    assert load.result.cid == first.cid
    assert of(events.Evaluate, node.give(events.Loaded(first)))
    assert node.run.progress.phase is Phase.DONE  # to people and to the others nothing has begun again
    outputs = node.give(events.Evaluated(500.0 if is_true else 9.0))
    assert [each.final for each in of(events.Finish, outputs)] == ([others] if is_true else [])
    node.give(events.Finished())
    assert node.run.progress.final == (others if is_true else mine)
    assert node.run.policy == (first if is_true else later)
    assert not of(events.Evaluate, node.wait(60.0))


def test_the_worker_does_one_job_at_a_time_also_when_a_policy_comes_while_it_exchanges() -> None:
    node = Node().holding(SHARED)
    for peer in (A, B):
        node.hear(peer, facts(SHARED), SHARED.result)
    after = policy_after(SHARED, A, B)
    node.collect(BATCH)
    assert isinstance(node.run.jobs.job, events.Update)
    for peer in (A, B):
        node.hear(peer, facts(after), after.result)
    node.wait(LOOK_S)
    node.give(events.Fetched(after.cid))
    outputs = node.give(events.Yielded(Cid.of_block(b"mine"), BATCH))
    assert len([each for each in outputs if isinstance(each, events.Load | events.Merge)]) == 1
    assert of(events.Load, outputs)
    assert of(events.Abandon, outputs) == [events.Abandon(keep_samples=True)]


def test_who_floods_pushes_out_nothing_that_others_said_of_rounds_to_come() -> None:
    """ATTACKS row 24."""
    node = Node().holding(SHARED)
    for peer in (A, B):
        node.hear(peer, facts(SHARED))
    after = policy_after(SHARED, A, B)
    key = RoundKey(after.epoch, 0, first_after(after.cid))
    node.hear(A, Offer(key=key, cid=Cid.of_block(b"of A"), weight=100, seconds=1.0))
    for number in range(200 * MAX_EARLY):
        node.hear(LIAR, Vote(key=RoundKey(9, 0, number.to_bytes(HASH_BYTES, "big")), ballot=NO_BALLOT))
    node.run._hold(after, node.now, [])
    assert node.run.round is not None
    assert A in node.run.round.offers


def test_a_state_that_ends_every_worker_is_given_up() -> None:
    """ATTACKS rows 5c and 5d: an overflow killed every worker each epoch."""
    node = Node().holding(SHARED)
    after = policy_after(SHARED, A, B)
    for peer in (A, B):
        node.hear(peer, facts(after), after.result)
    node.wait(LOOK_S)
    node.give(events.Fetched(after.cid))
    assert of(events.Load, node.collect(10))
    node.give(events.WorkerGone("overflow"))
    assert of(events.Load, node.give(events.Opened(INITIAL)))[0].result == SHARED.result
    assert of(events.Collect, node.give(events.Loaded(SHARED, 0)))
    for peer in (A, B):
        node.hear(peer, facts(after), after.result)
    assert not of(events.Fetch, node.wait(LOOK_S))


def test_a_state_that_an_earlier_life_kept_is_not_loaded_at_every_restart_if_it_ends_the_worker() -> None:
    node = Node(stored=SHARED.result)
    assert of(events.Fetch, node.give(events.Opened(INITIAL)))
    assert of(events.Load, node.give(events.Fetched(SHARED.cid)))
    for _ in range(MAX_ENDED - 1):  # once may be the machine's fault, and it is all that is left
        node.give(events.WorkerGone("overflow"))
        assert of(events.Load, node.give(events.Opened(INITIAL)))[0].result == SHARED.result
    node.give(events.WorkerGone("overflow"))
    assert of(events.Collect, node.give(events.Opened(INITIAL)))
    assert node.run.policy == INITIAL


def test_an_own_policy_that_ends_every_worker_is_given_up() -> None:
    node = Node().holding(SHARED)
    node.give(events.WorkerGone("killed"))
    for _ in range(MAX_ENDED):
        assert of(events.Load, node.give(events.Opened(INITIAL)))[0].result == SHARED.result
        node.give(events.WorkerGone("overflow"))
    assert of(events.Collect, node.give(events.Opened(INITIAL)))
    assert node.run.policy == INITIAL


LOOPS = replace(MANIFEST, task="loop:x", algorithm="average", target_return=None, eval_interval=1)


def test_a_persons_own_loop_that_ends_over_and_over_costs_no_policy() -> None:
    node = Node(manifest=LOOPS).holding(SHARED)
    for _ in range(3 * MAX_ENDED):
        node.give(events.WorkerGone("Ctrl-C"))
        assert of(events.Load, node.give(events.Opened(INITIAL)))[0].result == SHARED.result
    assert node.run.policy == SHARED


def test_a_persons_own_loop_is_never_asked_to_evaluate() -> None:
    for manifest, is_asked in ((LOOPS, False), (replace(MANIFEST, eval_interval=1), True)):
        node = Node(manifest=manifest)
        node.give(events.Opened(INITIAL))
        node.collect(BATCH)
        assert bool(of(events.Evaluate, node.give(events.Updated(policy_after(INITIAL, ME))))) is is_asked


def test_a_task_that_does_not_work_here_is_told_to_the_others_and_nothing_more_is_done() -> None:
    node = Node().holding(SHARED)
    outputs = node.give(events.TaskFailed("no environment works"))
    (told,) = (say.statement for say in of(events.Say, outputs) if isinstance(say.statement, Facts))
    assert told.phase is Phase.FAILED
    assert not any(isinstance(each, events.Collect | events.Load) for each in node.wait(60))


def test_what_a_part_of_the_swarm_loses_when_it_heals_is_counted_and_told() -> None:
    """ATTACKS row 30: from where they parted, not from the beginning."""
    node = Node().holding(SHARED)
    for peer in (A, B):
        node.hear(peer, facts(SHARED), SHARED.result)
        node.give(events.Gone(peer))
    alone = policy_after(policy_after(SHARED, ME), ME)
    node.run.progress.rounds = 2
    node.run.jobs.in_worker = alone
    node.run._hold(alone, node.now, [])
    theirs = policy_after(policy_after(policy_after(SHARED, A, B), A, B), A, B)
    outputs = []
    for peer in (A, B):
        outputs += node.hear(peer, facts(theirs), theirs.result)
    outputs += node.wait(4.0)
    assert theirs.cid in [each.cid for each in of(events.Fetch, outputs)]
    node.give(events.Fetched(theirs.cid))
    node.collect(10)
    outputs = node.give(events.Loaded(theirs, 0))
    assert node.run.policy == theirs
    assert node.run.progress.lost_env_steps == alone.env_steps - SHARED.env_steps
    assert any("another part" in each.text for each in of(events.Note, outputs))


def test_a_policy_that_is_not_what_its_holders_say_is_not_held_and_they_are_not_heard_again() -> None:
    node = Node().holding(SHARED)
    after = policy_after(SHARED, A, B)
    for peer in (A, B):
        node.hear(peer, facts(after), after.result)
    node.wait(LOOK_S)
    node.give(events.Fetched(after.cid))
    node.collect(10)
    node.give(events.Loaded(replace(after, env_steps=after.env_steps + 1), 0))
    assert node.run.policy == SHARED
    assert node.run.lineage.liars == {A, B}


def test_being_alone_is_loud() -> None:
    node = Node().holding(SHARED)
    node.hear(A, facts(SHARED))
    node.give(events.Gone(A))
    assert any("ALONE" in each.text for each in of(events.Note, node.wait(2 * ALONE_S)))
    assert node.run.progress.is_alone
    node.hear(A, facts(SHARED))
    assert not node.run.progress.is_alone


def test_who_was_started_again_goes_on_from_what_it_kept() -> None:
    node = Node(stored=SHARED.result)
    assert [each.cid for each in of(events.Fetch, node.give(events.Opened(INITIAL)))] == [SHARED.cid]
    assert of(events.Load, node.give(events.Fetched(SHARED.cid)))[0].result == SHARED.result
    outputs = node.give(events.Loaded(SHARED, 0))
    assert node.run.policy == SHARED
    assert of(events.Collect, outputs)


def test_counting_goes_on_from_what_the_own_document_says_where_the_disk_kept_less() -> None:
    node = Node(stored=SHARED.result)
    node.run.handle(events.Documents((), Contributed(5000, 7)), node.now)
    assert node.run.facts().env_steps == 5000
    assert (node.run.progress.rounds, node.run.trained_alone) == (7, True)
    node.run.handle(events.Documents((), Contributed(10, 1)), node.now)
    assert node.run.facts().env_steps == 5000


def test_who_kept_something_that_does_not_fit_begins_anew() -> None:
    node = Node(stored=SHARED.result)
    node.give(events.Opened(INITIAL), events.Fetched(SHARED.cid))
    node.give(events.LoadRefused("it is no state of this run"))
    assert node.run.policy == INITIAL


def test_a_node_that_only_stores_keeps_what_most_hold() -> None:
    node = Node(Role.STORAGE)
    outputs = node.hear(A, facts(SHARED), SHARED.result) + node.hear(B, facts(SHARED), SHARED.result)
    assert SHARED.cid in [each.cid for each in of(events.Fetch, outputs + node.wait(4.0))]
    assert [each.policy.cid for each in of(events.Keep, node.give(events.Fetched(SHARED.cid)))] == [SHARED.cid]


def test_statements_of_rounds_to_come_are_bounded_by_author_and_in_all() -> None:
    first = PeerId.of_public_key(bytes(32))
    early = Early({first})
    key = RoundKey(9, 0, bytes(HASH_BYTES))
    for number in range(2 * MAX_MEMBERS):
        author = PeerId.of_public_key(number.to_bytes(32, "big"))
        for _ in range(MAX_EARLY + 1):
            early.keep(events.Heard(author, Vote(key=key, ballot=NO_BALLOT), b""))
    kept = early.of(key)
    assert len(kept) == MAX_MEMBERS * MAX_EARLY
    assert first in {each.author for each in kept}


def test_a_node_whose_state_is_gone_waits_for_who_has_it_and_never_begins_anew() -> None:
    node = Node(stored=SHARED.result)
    (fetch,) = of(events.Fetch, node.give(events.Opened(INITIAL)))
    assert fetch.cid == SHARED.cid
    notes = of(events.Note, node.give(events.NotFetched(SHARED.cid, "nobody is known to hold it")))
    assert [note.is_warning for note in notes] == [True]
    tried = []
    for _ in range(240):
        found = node.wait(1.0)
        assert not of(events.Collect, found)
        for fetch in of(events.Fetch, found):
            tried.append(fetch.sources)
            assert not of(events.Collect, node.give(events.NotFetched(fetch.cid, "nobody is known to hold it")))
    assert 2 <= len(tried) < 40
    assert set(tried) == {()}
    assert node.run.policy is None
    assert node.run.progress.phase is Phase.FETCHING
    node.hear(A, SHARED.result)
    found = node.wait(120.0)
    assert (A,) in [fetch.sources for fetch in of(events.Fetch, found)]
    node.give(events.Fetched(SHARED.cid))
    (load,) = [node.run.jobs.job]
    assert isinstance(load, events.Load)
    node.give(events.Loaded(SHARED, 0))
    assert node.run.policy == SHARED
