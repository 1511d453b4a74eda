"""Shards on their way: an actor signs and names what its worker made, a learner fetches what falls to it.

What is to be taken is decided by `shoal.training.rollouts.intake`; what is in a shard is for the worker to see
(`shoal.training.rollouts.admitting`). A shard is a content like any other, held by its actor as long as that names it.
"""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import trio

from shoal.node.supervise import Domain
from shoal.node.supervise import Policy as Task
from shoal.node.swarm.content import ContentStore
from shoal.node.swarm.holding import NoRoomError
from shoal.node.swarm.replica import Replica
from shoal.node.wire.channel import Channel
from shoal.protocol.codec import to_plain
from shoal.protocol.errors import RemoteError, ShoalError, TooLargeError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.manifest import Manifest
from shoal.training.rollouts.intake import UPDATES_TAKEN, Intake
from shoal.training.rollouts.trust import Look, Trust
from shoal.training.run_events import Admitted, Policy
from shoal.training.statements import MAX_GIVEN, MAX_SHARD_BYTES, TOPIC_OF, GivenShard, GivenShards
from shoal.training.worker_calls import ADMIT, Admit, LearnedFrom, RolledOut
from shoal.training.worker_calls import Admitted as Admitting

log = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""For a shard whose bytes do not come."""
REGISTER: Final = "false_shards"
"""Of a node's document: by actor, what it signed that is not so."""
MAX_ACCUSED: Final = 64
_TOPIC: Final = TOPIC_OF[GivenShards]


def _check_room(data: bytes) -> None:
    if len(data) > MAX_SHARD_BYTES:
        raise TooLargeError(f"a shard of {len(data)} bytes is not sent; {MAX_SHARD_BYTES} is the most")


class Shards:
    """Those of one run, as this node gives and takes them.

    Attributes:
        intake: what is taken.
        trust: how closely what is taken is looked at.
        worker: that learns from them; None while there is none.
        num_given: that this node made.
        check_s: seconds of looking into shards before they are learned from, of this node's worker.
    """

    def __init__(
        self,
        manifest: Manifest,
        swarm: SwarmId,
        signer: Signer,
        replica: Replica,
        content: ContentStore,
        reachable: Callable[[tuple[PeerId, ...]], Awaitable[tuple[PeerId, ...]]],
        learners: Callable[[], Iterable[PeerId]],
        post: Callable[[Admitted], None],
    ) -> None:
        """Hold nothing.

        Args:
            manifest: of the run.
            swarm: its name.
            signer: this node's.
            replica: by which members say things.
            content: where shards lie.
            reachable: those of some members who can be asked.
            learners: the others that learn now.
            post: is told what was taken.
        """
        self.intake = Intake(signer.peer_id, manifest.max_staleness, 2 * manifest.batch.largest_share)
        if manifest.is_recipe:  # its learner draws from a shard what it has use for, and looks into no more than that
            self.intake.most_of_version = UPDATES_TAKEN * manifest.most_foreign
        else:
            self.intake.most_samples = manifest.most_foreign
        self.worker: Channel | None = None
        self.num_given = 0
        self.check_s = 0.0
        self.trust = Trust(manifest.check_rate)
        self._max_staleness = manifest.max_staleness
        self._signer = signer
        self._replica = replica
        self._content = content
        self._reachable = reachable
        self._learners = learners
        self._post = post
        self._swarm = swarm
        self._owner = f"{swarm}/shards"
        self._rng = random.SystemRandom()  # nobody is to know which shard is looked into
        self._given: list[GivenShard] = []
        self._taken: dict[Cid, None] = {}
        self._names: dict[int, Cid] = {}
        self._fetches: Domain | None = None

    @property
    def _version(self) -> int:
        """The newest that this node's worker held."""
        return max(self._names, default=0)

    # An actor's.

    async def give(self, made: RolledOut, version: int) -> Cid | None:
        """Sign a shard, and let the learners have it; its name, or None if there is no room for it."""
        from shoal.training.rollouts.shard import signed  # with NumPy, which an idle node does not load

        try:
            cid, data = await trio.to_thread.run_sync(signed, self._signer, bytes(made.head), bytes(made.body))
            _check_room(data)
            await self._content.put(data, owner=self._owner)
        except (NoRoomError, TooLargeError) as error:
            log.warning("what this node collected is not given to the learners: %s", error)
            return None
        self.num_given += 1
        self._given = [GivenShard(cid, version, made.samples, len(data)), *self._given][:MAX_GIVEN]
        self._hold()
        self._replica.publish(_TOPIC, to_plain(GivenShards(given=tuple(self._given))))
        return cid

    # A learner's.

    def begin(self, fetches: Domain) -> None:
        """Fetch in this domain from now on."""
        self._fetches = fetches

    def holds(self, policy: Policy) -> None:
        """This node's worker holds a policy."""
        if self._names.get(policy.epoch) == policy.cid:
            return
        self._names[policy.epoch] = policy.cid
        for old in [each for each in self._names if each < policy.epoch - self._max_staleness]:
            del self._names[old]
        self.intake.oldest = min(self._names)
        self.look(policy.epoch)

    def heard(self, author: PeerId, said: GivenShards) -> None:
        """Somebody says what it has."""
        self.intake.named(author, said.given)
        self.look(self._version)

    def gone(self, author: PeerId) -> None:
        """A member is no longer heard of."""
        self.intake.gone(author)

    def learned(self, used: Iterable[LearnedFrom], waiting: int, version: int) -> None:
        """An update was made from these, of the policy of an epoch; so many samples wait for a later one."""
        self.intake.waiting = waiting
        for each in used:
            tally = self.intake.tally(each.author)
            tally.used += 1
            tally.samples += each.samples
            tally.staleness += each.samples * max(0, version - each.version)

    def look(self, version: int) -> None:
        """Fetch what is to be taken now."""
        if self._fetches is None or self.worker is None:
            return
        for author, given in self.intake.next(version, list(self._learners())):
            self._fetches.start_soon("fetching a shard", self._take, author, given, policy=Task.DROP)

    async def _take(self, author: PeerId, given: GivenShard) -> None:
        from shoal.training.rollouts.evidence import Verdict  # likewise

        tally = self.intake.tally(author)
        try:
            sources = await self._reachable((author,))
            data = await self._content.get(
                given.cid, sources, max_bytes=given.num_bytes, patience_s=PATIENCE_S, owner=self._owner
            )
            worker = self.worker
            if worker is None:
                return
            self._taken[given.cid] = None
            look = self.trust.look(author, self._rng.random())
            is_checked = look is not Look.NONE
            chance = self._rng.getrandbits(32) if look is Look.ONE else None
            state = self._names.get(given.version)
            request = Admit(data, given.cid, author, given.version, state, is_checked, chance)
            found = await worker.call(ADMIT, request)
            self.intake.took(given.version, found.samples)
        except (ShoalError, RemoteError) as error:
            log.info("a shard of %s is not learned from: %s", author, error)
            return
        finally:
            self._taken.pop(given.cid, None)
            self.intake.came(given.cid)
            self._hold()
            self.look(self._version)
        if found.is_checked:
            tally.checked += 1
            if found.verdict == Verdict.TRUE:
                self.trust.found_true(author)
            self.check_s += found.seconds
        match found.verdict:
            case Verdict.TRUE:
                self.intake.waiting = found.waiting
                self._post(Admitted(found.total))
            case Verdict.FALSE:
                tally.refused += 1
                self.intake.shunned.add(author)
                log.warning("%s gave a shard that is false (%s): %s; no more are taken", author, found.lie, found.words)
                await self._accuse(author, given.cid, found)
            case _:
                tally.refused += found.verdict == Verdict.DOES_NOT_FIT
                log.info("a shard of %s is not learned from: %s", author, found.words)

    async def _accuse(self, author: PeerId, shard: Cid, found: Admitting) -> None:
        """Write into this node's document what its author signed and is not so: a word that anybody can check."""
        from shoal.training.rollouts.evidence import Lie, accuse  # likewise

        own = dict(self._replica.documents().get(self._signer.peer_id, {}).get(REGISTER) or {})
        if not found.proof or author in own or len(own) >= MAX_ACCUSED:
            return
        try:
            said = accuse(self._signer, self._swarm, shard, found.proof, Lie(found.lie), found.step, found.part)
            entry = {"epoch": self._version, "kind": found.lie, "said": base64.b64encode(said).decode()}
            await self._replica.write(**{REGISTER: own | {author: entry}})
        except ShoalError as error:
            log.warning("that %s lies could not be written: %s", author, error)

    def documents(self) -> None:
        """The documents changed: whom this node accused before, it takes nothing from; whom others do, it looks at."""
        for writer, document in self._replica.documents().items():
            accused = document.get(REGISTER)
            if isinstance(accused, Mapping):
                (self.intake.shunned if writer == self._signer.peer_id else self.trust.suspects).update(
                    list(accused)[:MAX_ACCUSED]
                )

    def _hold(self) -> None:
        self._content.hold(self._owner, dict.fromkeys([*(each.cid for each in self._given), *self._taken]))

    def close(self) -> None:
        """Hold nothing."""
        self._content.hold(self._owner, ())
