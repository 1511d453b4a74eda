"""Who is whose neighbour: HyParView's two views, and how they are kept.

From HyParView (Leitão, Pereira, Rodrigues 2007, https://asc.di.fct.unl.pt/~jleitao/pdf/dsn07-leitao.pdf): a small,
symmetric active view of neighbours, to each of whom a connection stands; a passive view of members that could be
dialed; joins that are walked through the overlay; requests that are urgent or not; shuffles. `shoal.crdt.gossip` says
where this deviates.

A neighbour is taken without asking it first, and told; who has no room answers `disconnect`, with members that may have
some. Whoever has few neighbours is made room for: a random neighbour is dropped and told of the newcomer, so that one
link becomes two. What one peer can make another do is bounded: it may cause one eviction, one walk and one shuffle per
period of its own, and its inventions fill only the part of the passive view that is for hearsay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from random import Random
from typing import Final

from shoal.crdt.gossip_messages import MAX_SAMPLE, MAX_STEPS, Ask, Control, Dial, GossipConfig, Output, Tell, Walk
from shoal.protocol.ids import PeerId

_ASK_WAIT_S: Final = 0.5
_MAX_ASK_WAIT_S: Final = 64.0
_HEAR_AT_STEPS: Final = 3  # HyParView's PRWL: with so many steps left, a newcomer's name is remembered
_WALKS_PER_S: Final = 4.0  # that one neighbour may send through here
_MAX_WALKS_AHEAD: Final = 16.0


class _Contact:
    """A member to whom a connection stands."""

    __slots__ = ("asked_at", "joined_at", "made_room_at", "refused_at", "retry_at", "shuffled_at", "walks", "walks_at")

    def __init__(self) -> None:
        self.asked_at = -inf  # when it was last taken as a neighbour on our own account
        self.retry_at = -inf  # not to be asked again before
        self.made_room_at = -inf  # when somebody was last dropped for it
        self.joined_at = -inf  # when its name was last sent on a walk
        self.refused_at = -inf  # when it was last told that it is no neighbour
        self.shuffled_at = -inf
        self.walks = _MAX_WALKS_AHEAD
        self.walks_at = -inf


class Overlay:
    """The views of one node.

    Attributes:
        contacts: members connected.
        neighbours: the active view, in the order of their coming.
        gained: new neighbours since the list was last emptied, which is for its reader to do; and whether either of two
            is short of neighbours.
        lost: neighbours lost likewise.
        due: when `upkeep` is to be called.
        num_dropped: what did not fit into a bound.
    """

    __slots__ = (
        "_ask_at",
        "_ask_wait_s",
        "_config",
        "_dialing",
        "_hearsay",
        "_hearsay_at",
        "_hearsay_wait_s",
        "_me",
        "_mix_at",
        "_rng",
        "_shuffle_at",
        "_shunned",
        "_vouched",
        "_worth",
        "contacts",
        "due",
        "gained",
        "lost",
        "neighbours",
        "num_dropped",
    )

    def __init__(self, me: PeerId, rng: Random, config: GossipConfig, worth: Callable[[PeerId], int]) -> None:
        """Start with nobody; ``worth`` says of two neighbours which one to keep."""
        self._me = me
        self._worth = worth
        self._rng = rng
        self._config = config
        self.contacts: dict[PeerId, _Contact] = {}
        self.neighbours: dict[PeerId, None] = {}
        self.gained: list[tuple[PeerId, bool]] = []
        self.lost: list[PeerId] = []
        self.num_dropped = 0
        self._vouched: dict[PeerId, None] = {}
        self._hearsay: dict[PeerId, None] = {}
        self._shunned: dict[PeerId, float] = {}  # until when
        self._dialing: dict[PeerId, tuple[float, Ask, bool]] = {}  # until when, how much wanted, if hearsay
        self._ask_at = -inf  # nobody is asked before, unless neighbours are few
        self._ask_wait_s = _ASK_WAIT_S
        self._hearsay_at = -inf  # nobody who is only heard of is dialed before
        self._hearsay_wait_s = _ASK_WAIT_S
        self._shuffle_at = inf
        self._mix_at = inf
        self.due = inf

    @property
    def num_passive(self) -> int:
        """Members that could be dialed."""
        return len(self._vouched) + len(self._hearsay)

    # --- what happens ------------------------------------------------------------------------------------------------

    def up(self, peer: PeerId, now: float, outputs: list[Output]) -> None:
        """A connection to a member stands."""
        _, wanted, was_hearsay = self._dialing.pop(peer, (now, Ask.NONE, False))
        if was_hearsay:
            self._hearsay_wait_s = _ASK_WAIT_S
        if peer == self._me or peer in self.contacts:
            return
        if len(self.contacts) >= self._config.max_contacts:
            self.num_dropped += 1
            return
        self.contacts[peer] = _Contact()
        self._vouched.pop(peer, None)
        self._hearsay.pop(peer, None)
        self._shunned.pop(peer, None)
        if self._shuffle_at == inf:
            self._shuffle_at = now + self._config.shuffle_s * self._rng.uniform(0.1, 1.0)
            self._mix_at = now + self._config.mix_s * self._rng.uniform(0.1, 1.0)
        if len(self.neighbours) < self._config.active:
            self._take(peer, max(wanted, self._need()), now, outputs)
        elif wanted is Ask.MIX:
            self._evict(now, outputs, ())
            self._take(peer, wanted, now, outputs)
        self._plan(now)

    def down(self, peer: PeerId, now: float, outputs: list[Output]) -> None:
        """The connection to a peer is gone, or dialing it failed."""
        self._could_not_dial(peer, now)
        if self.contacts.pop(peer, None) is not None:
            self._vouch((peer,))
        if peer in self.neighbours:
            self._lose(peer)
            self._ask_at, self._ask_wait_s = -inf, _ASK_WAIT_S
        self._fill(now, outputs)

    def known(self, peers: Iterable[PeerId], now: float, outputs: list[Output]) -> None:
        """These are members that could be dialed."""
        self._vouch(peers)
        self._fill(now, outputs)

    def told(self, peer: PeerId, message: Control, now: float, outputs: list[Output]) -> None:
        """A control message came."""
        contact = self.contacts.get(peer)
        if contact is None:
            self.num_dropped += 1
            return
        for other in message.shuffle_reply:
            self._hear(other, now)
        if message.disconnect:
            contact.retry_at = now + self._config.retry_s * self._rng.uniform(1, 2)
            if peer in self.neighbours:
                self._lose(peer)
                if now - contact.asked_at < self._config.dial_s:  # it refuses; the others may well be full too
                    self._ask_at = now + self._ask_wait_s * self._rng.uniform(0.5, 1.5)
                    self._ask_wait_s = min(_MAX_ASK_WAIT_S, 2 * self._ask_wait_s)
                else:
                    self._ask_at, self._ask_wait_s = -inf, _ASK_WAIT_S
        if message.neighbour is not Ask.NONE:
            self._asked(peer, contact, message.neighbour, now, outputs)
        if message.walks:
            self._walk(peer, contact, message.walks, now, outputs)
        if message.shuffle:
            self._shuffled(peer, contact, message.shuffle, now, outputs)
        self._fill(now, outputs)

    def strange(self, peer: PeerId, now: float, outputs: list[Output]) -> None:
        """A peer speaks as a neighbour that is none: a message of one side was lost, so say it again."""
        contact = self.contacts.get(peer)
        if contact is None or peer in self.neighbours:
            return
        if len(self.neighbours) < self._config.active and contact.retry_at <= now:
            self._take(peer, Ask.ROOM, now, outputs)
        elif now - contact.refused_at > 1.0:
            contact.refused_at = now
            outputs.append(Tell(peer, Control(disconnect=True)))

    def upkeep(self, now: float, outputs: list[Output]) -> None:
        """Do what time alone asks for."""
        for peer in [peer for peer, (until, _, _) in self._dialing.items() if until <= now]:
            self._could_not_dial(peer, now)
        if self._shuffle_at <= now:
            self._shuffle_at = now + self._config.shuffle_s * self._rng.uniform(0.75, 1.25)
            if self.neighbours:
                partner = self._rng.choice(list(self.neighbours))
                sample = self._sample(partner)
                if sample:
                    outputs.append(Tell(partner, Control(shuffle=sample)))
        if self._mix_at <= now:
            self._mix_at = now + self._config.mix_s * self._rng.uniform(0.75, 1.25)
            self._mix(now, outputs)
        self._fill(now, outputs)

    # --- the active view ---------------------------------------------------------------------------------------------

    def _need(self) -> Ask:
        if not self.neighbours:
            return Ask.JOIN
        return Ask.URGENT if len(self.neighbours) < self._config.few else Ask.ROOM

    def _take(self, peer: PeerId, ask: Ask, now: float, outputs: list[Output]) -> None:
        self.contacts[peer].asked_at = now
        self._gain(peer, ask)
        outputs.append(Tell(peer, Control(neighbour=ask)))

    def _gain(self, peer: PeerId, ask: Ask) -> None:
        self.neighbours[peer] = None
        self.gained.append((peer, ask >= Ask.URGENT))

    def _lose(self, peer: PeerId) -> None:
        del self.neighbours[peer]
        self.lost.append(peer)

    def _evict(self, now: float, outputs: list[Output], instead: tuple[PeerId, ...]) -> None:
        """Make room, and tell who is dropped of those that have some."""
        peers = list(self.neighbours)
        peer = min(self._rng.sample(peers, min(2, len(peers))), key=self._worth)
        self._lose(peer)
        self.contacts[peer].retry_at = now + self._config.retry_s * self._rng.uniform(1, 2)
        outputs.append(Tell(peer, Control(disconnect=True, shuffle_reply=instead)))

    def _asked(self, peer: PeerId, contact: _Contact, ask: Ask, now: float, outputs: list[Output]) -> None:
        if peer not in self.neighbours:
            if len(self.neighbours) >= self._config.active:
                if ask is Ask.ROOM or now - contact.made_room_at < 2 * self._config.retry_s:
                    contact.refused_at = now
                    outputs.append(Tell(peer, Control(disconnect=True, shuffle_reply=self._sample(peer))))
                    return
                contact.made_room_at = now
                self._evict(now, outputs, (peer,))
            self._gain(peer, max(ask, self._need()))
        if ask is Ask.JOIN and now - contact.joined_at > self._config.retry_s:
            contact.joined_at = now
            walk = Control(walks=(Walk(peer, MAX_STEPS),))
            outputs.extend(Tell(other, walk) for other in self.neighbours if other != peer)

    def _walk(
        self, source: PeerId, contact: _Contact, walks: tuple[Walk, ...], now: float, outputs: list[Output]
    ) -> None:
        if source not in self.neighbours:
            return
        contact.walks = min(_MAX_WALKS_AHEAD, contact.walks + min(60.0, now - contact.walks_at) * _WALKS_PER_S)
        contact.walks_at = now
        for walk in walks:
            newcomer = walk.peer
            if newcomer == self._me or newcomer in self.neighbours:
                continue
            if contact.walks < 1:
                self.num_dropped += 1
                continue
            contact.walks -= 1
            others = [peer for peer in self.neighbours if peer not in (source, newcomer)]
            if walk.steps == 0 or not others:
                if newcomer in self.contacts:
                    self.contacts[newcomer].retry_at = -inf
                else:
                    self._hear(newcomer, now)
                continue
            if walk.steps == _HEAR_AT_STEPS:
                self._hear(newcomer, now)
            outputs.append(Tell(self._rng.choice(others), Control(walks=(Walk(newcomer, walk.steps - 1),))))

    def _mix(self, now: float, outputs: list[Output]) -> None:
        """Exchange one neighbour for a random other member."""
        if len(self.neighbours) < self._config.active:
            return  # there is room, so whoever comes is taken
        connected = [peer for peer, contact in self.contacts.items() if self._may_ask(peer, contact, now)]
        dialable = self._dialable(now)
        if not connected and not dialable:
            return
        peer = self._rng.choice([*connected, *dialable])
        if peer in self.contacts:
            self._evict(now, outputs, ())
            self._take(peer, Ask.MIX, now, outputs)
        else:
            self._dial(peer, Ask.MIX, now, outputs)

    def _fill(self, now: float, outputs: list[Output]) -> None:
        """Take, or dial, whoever may be taken while there is room."""
        config = self._config
        if len(self.neighbours) < config.active and (len(self.neighbours) < config.few or self._ask_at <= now):
            connected = [peer for peer, contact in self.contacts.items() if self._may_ask(peer, contact, now)]
            while connected and len(self.neighbours) < config.active:
                peer = connected.pop(self._rng.randrange(len(connected)))
                self._take(peer, self._need(), now, outputs)
            room = config.active - len(self.neighbours) - len(self._dialing)
            if room > 0:
                for peer in self._dialable(now)[:room]:
                    self._dial(peer, Ask.NONE, now, outputs)
        self._plan(now)

    def _may_ask(self, peer: PeerId, contact: _Contact, now: float) -> bool:
        return peer not in self.neighbours and contact.retry_at <= now

    def _dial(self, peer: PeerId, wanted: Ask, now: float, outputs: list[Output]) -> None:
        self._dialing[peer] = (now + self._config.dial_s, wanted, peer in self._hearsay)
        outputs.append(Dial(peer))

    def _could_not_dial(self, peer: PeerId, now: float) -> None:
        _, _, was_hearsay = self._dialing.pop(peer, (now, Ask.NONE, False))
        if was_hearsay:  # somebody invents members
            self._hearsay_at = now + self._hearsay_wait_s
            self._hearsay_wait_s = min(_MAX_ASK_WAIT_S, 2 * self._hearsay_wait_s)
        self._hearsay.pop(peer, None)
        self._shun(peer, now)

    def _plan(self, now: float) -> None:
        """When `upkeep` has something to do."""
        due = min(self._shuffle_at, self._mix_at)
        for until, _, _ in self._dialing.values():
            due = min(due, until)
        if len(self.neighbours) < self._config.active and (
            self.num_passive > len(self._dialing) or len(self.contacts) > len(self.neighbours)
        ):
            due = min(due, max(now + self._config.retry_s / 4, self._ask_at))
        self.due = due

    # --- the passive view --------------------------------------------------------------------------------------------

    def _shuffled(
        self, peer: PeerId, contact: _Contact, heard: tuple[PeerId, ...], now: float, outputs: list[Output]
    ) -> None:
        if now - contact.shuffled_at < 1.0:
            self.num_dropped += 1
            return
        contact.shuffled_at = now
        outputs.append(Tell(peer, Control(shuffle_reply=self._sample(peer))))
        for other in heard:
            self._hear(other, now)

    def _sample(self, reader: PeerId) -> tuple[PeerId, ...]:
        """Members for somebody to know: half neighbours, half whom it may not know."""
        near = [peer for peer in self.neighbours if peer != reader]
        far = [*self._vouched, *self._hearsay]
        half = MAX_SAMPLE // 2
        chosen = self._rng.sample(near, min(half, len(near)))
        return (*chosen, *self._rng.sample(far, min(MAX_SAMPLE - len(chosen), len(far))))

    def _vouch(self, peers: Iterable[PeerId]) -> None:
        most = self._config.passive
        new = [peer for peer in peers if peer != self._me and peer not in self.contacts and peer not in self._vouched]
        if len(new) > most:
            new = self._rng.sample(new, most)
        for peer in new:
            self._hearsay.pop(peer, None)
            if len(self._vouched) >= most:
                del self._vouched[self._rng.choice(list(self._vouched))]
            self._vouched[peer] = None

    def _hear(self, peer: PeerId, now: float) -> None:
        if peer == self._me or peer in self.contacts or peer in self._vouched or peer in self._hearsay:
            return
        if self._shunned.get(peer, -inf) > now:
            return
        if len(self._hearsay) >= max(1, self._config.passive // 2):
            del self._hearsay[self._rng.choice(list(self._hearsay))]
            self.num_dropped += 1
        self._hearsay[peer] = None

    def _dialable(self, now: float) -> list[PeerId]:
        """Whom to dial, in a random order; those who are vouched for first."""
        found: list[PeerId] = []
        for view in (self._vouched, self._hearsay) if self._hearsay_at <= now else (self._vouched,):
            part = [peer for peer in view if peer not in self._dialing and self._shunned.get(peer, -inf) <= now]
            self._rng.shuffle(part)
            found += part
        return found

    def _shun(self, peer: PeerId, now: float) -> None:
        self._shunned.pop(peer, None)
        if len(self._shunned) >= 4 * self._config.passive:
            del self._shunned[next(iter(self._shunned))]
        self._shunned[peer] = now + self._config.retry_s * self._rng.uniform(1, 2)
