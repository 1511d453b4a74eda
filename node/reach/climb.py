"""The climb: from a relayed path to a peer to the best one that the NATs of both allow. See `shoal.node.mesh.paths`.

Both sides try the addresses of the other. Then one of them begins the hole punching, and the side that was dialed
offers WebRTC a little later, unless it is known that neither can work; what failed is noted with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final

import trio
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from multiaddr import Multiaddr

from shoal.node.mesh.addresses import CIRCUIT, ip_of, is_loopback, tcp_address
from shoal.node.mesh.circuits import BROKEN
from shoal.node.mesh.host import Connected, Host
from shoal.node.mesh.paths import PathKind, Rung
from shoal.node.reach.nat import Mapping, NatSummary, NatType, can_punch
from shoal.node.reach.probing import Probe
from shoal.node.reach.punch import Puncher, PunchError
from shoal.node.reach.webrtc import PendingPipe, WebRtc
from shoal.node.reach.webrtc_pipe import WebRtcError
from shoal.node.signals import Signal
from shoal.node.supervise import Policy
from shoal.node.wire.contracts import Introduction, ReachService, SessionDescription
from shoal.protocol.errors import RemoteError, ShoalError, Status
from shoal.protocol.ids import PeerId
from shoal.protocol.services import client

log = logging.getLogger(__name__)

MEET_S: Final = 3.0
"""How long a peer may take to introduce itself."""
DIRECT_S: Final = 1.0
LET_BEGIN_S: Final = 4.0
"""How long the side that should not begin a punch waits for the other before it tries itself."""
PUNCH_HEAD_START_S: Final = 1.0
"""How long hole punching, which gives a faster path, is let alone before WebRTC is tried beside it."""
WEBRTC_S: Final = 10.0


class Climber:
    """Climbs, to every peer that is worth it.

    Args:
        news: set when an introduction came or the network changed.
    """

    def __init__(
        self,
        host: Host,
        probe: Probe,
        puncher: Puncher | None,
        webrtc: WebRtc | None,
        stun_servers: Sequence[tuple[str, int]],
        introduced: dict[PeerId, Introduction],
        news: Signal,
    ) -> None:
        self._host = host
        self._probe = probe
        self._puncher = puncher
        self._webrtc = webrtc
        self._further_servers = stun_servers
        self._introduced = introduced
        self._news = news
        self._climbing: dict[PeerId, Connected] = {}

    def path_changed(self, peer: PeerId, state: Connected) -> None:
        """A peer is connected, by another path than before."""
        if state.kind is not PathKind.DIRECT and self._climbing.get(peer) is not state:
            self._climbing[peer] = state
            self._host.spawn("climbing", self._keep_climbing, peer, state, policy=Policy.DROP)

    async def _keep_climbing(self, peer: PeerId, state: Connected) -> None:
        try:
            while self._host.connected.get(peer) is state:
                wait_s = state.ladder.wait_s(state.kind, trio.current_time())
                if wait_s is None:
                    return
                if wait_s:
                    with trio.move_on_after(wait_s):
                        await self._news.wait()
                    continue
                before = state.kind.rank
                await self._climb(peer, state)
                is_better = state.kind.rank < before
                state.ladder.climbed(is_better=is_better, now=trio.current_time())
                if state.kind is PathKind.PUNCHED:
                    return  # as good as direct, until something changes
        finally:
            if self._climbing.get(peer) is state:
                del self._climbing[peer]

    async def _climb(self, peer: PeerId, state: Connected) -> None:
        introduction = await self._introduction_of(peer)
        if introduction is None:
            return
        if not _is_at_top(state):
            await self._try_direct(peer, state, introduction)
        if _is_at_top(state) or self._host.connected.get(peer) is not state:
            return
        ours, theirs = self._probe.report().summary, _summary(introduction)
        with trio.CancelScope() as others:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._try_webrtc, peer, state, ours, theirs)
                await self._try_punch(peer, state, ours, theirs)
                if _is_at_top(state):
                    others.cancel()

    async def _introduction_of(self, peer: PeerId) -> Introduction | None:
        with trio.move_on_after(MEET_S):
            while peer not in self._introduced:
                await self._news.wait()
        return self._introduced.get(peer)

    async def _try_direct(self, peer: PeerId, state: Connected, introduction: Introduction) -> None:
        known = dict.fromkeys((*introduction.addresses, *self._host.known_addresses(peer)))
        addresses = [address for address in known if CIRCUIT not in address and self._can_try(address, state)]
        if not addresses:
            _note(state, Rung.DIRECT, "the peer has no address that this node could dial")
            return
        addresses = self._host.sift(peer, addresses)
        if not addresses:
            _note(state, Rung.DIRECT, "its addresses lead nowhere from here, or were dialed often enough for now")
            return
        reasons: set[str] = set()

        async def dial(address: str) -> None:
            try:
                await self._host.dial(peer, address)
            except (ShoalError, *BROKEN) as error:
                reasons.add(_reason(error))
            else:
                nursery.cancel_scope.cancel()

        with trio.move_on_after(DIRECT_S) as scope:
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(dial, address)
        if _is_at_top(state):
            _note(state, Rung.DIRECT, None)
            return
        if scope.cancelled_caught:
            reasons.add(f"no answer within {DIRECT_S:.0f} s")
        tried = ", ".join(sorted({address.partition("/p2p/")[0] for address in addresses}))
        _note(state, Rung.DIRECT, f"{'; '.join(sorted(reasons))} ({tried})")

    def _can_try(self, address: str, state: Connected) -> bool:
        ip = ip_of(address)
        if not ip:
            return True  # a name
        has_family = self._host.door.port(ip) is not None
        return has_family and (is_loopback(ip_of(state.address)) or not is_loopback(ip))

    async def _try_punch(self, peer: PeerId, state: Connected, ours: NatSummary, theirs: NatSummary) -> None:
        reason = can_punch(ours, theirs, "tcp")
        if self._puncher is None:
            reason = "switched off here (--no-punch)"
        if reason is not None:
            _note(state, Rung.PUNCH, reason)
            return
        if not _should_begin(ours, theirs, is_inbound=not state.outbound):
            with trio.move_on_after(LET_BEGIN_S):
                while self._host.connected.get(peer) is state and not _is_at_top(state):
                    await self._host.wait_for_change()
        if not _is_at_top(state) and self._puncher is not None:
            try:
                await self._puncher.punch(peer)
            except PunchError as error:
                _note(state, Rung.PUNCH, str(error))
                return
        _note(state, Rung.PUNCH, None)

    async def _try_webrtc(self, peer: PeerId, state: Connected, ours: NatSummary, theirs: NatSummary) -> None:
        reason = can_punch(ours, theirs, "udp")
        if self._webrtc is None:
            reason = "switched off here (--no-webrtc)"
        if reason is not None or self._webrtc is None:
            _note(state, Rung.WEBRTC, reason)
            return
        if can_punch(ours, theirs, "tcp") is None:
            await trio.sleep(PUNCH_HEAD_START_S)
        if state.outbound or state.kind.rank <= PathKind.WEBRTC.rank:
            return  # the other side offers
        try:
            pending = await self._webrtc.offer(self._stun_servers())
            try:
                with trio.fail_after(WEBRTC_S):
                    reach = client(ReachService, self._host.links.at(peer), timeout_s=WEBRTC_S)
                    answer = await reach.webrtc(SessionDescription(pending.sdp))
                    await pending.accept(answer.sdp)
                    await self._connect_webrtc(peer, pending, is_initiator=True)
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await pending.aclose()
        except (WebRtcError, RemoteError, trio.TooSlowError, *BROKEN) as error:
            _note(state, Rung.WEBRTC, _reason(error))
        else:
            _note(state, Rung.WEBRTC, None)

    def _stun_servers(self) -> list[tuple[str, int]]:
        return [(each.ip, each.stun_port) for each in self._probe.observers()] + list(self._further_servers)

    async def answer_webrtc(self, peer: PeerId, sdp: str) -> str:
        """Answer a peer's offer.

        Raises:
            RemoteError: if there is no WebRTC here, or the offer makes no sense.
        """
        if self._webrtc is None:
            raise RemoteError(Status.UNIMPLEMENTED, "this node has no WebRTC")
        state = self._host.connected.get(peer)
        if state is None or state.kind is not PathKind.RELAYED:
            raise RemoteError(Status.FAILED_PRECONDITION, "there is a path that is as good")
        try:
            pending = await self._webrtc.answer(sdp, self._stun_servers())
        except WebRtcError as error:
            raise RemoteError(Status.INVALID_ARGUMENT, str(error)) from error
        self._host.spawn("awaiting WebRTC", self._await_webrtc, peer, pending, policy=Policy.DROP)
        return pending.sdp

    async def _await_webrtc(self, peer: PeerId, pending: PendingPipe) -> None:
        try:
            with trio.fail_after(WEBRTC_S):
                await self._connect_webrtc(peer, pending, is_initiator=False)
        except (WebRtcError, trio.TooSlowError, *BROKEN) as error:
            log.debug("WebRTC with %s did not come to be: %s", peer, error)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await pending.aclose()

    async def _connect_webrtc(self, peer: PeerId, pending: PendingPipe, *, is_initiator: bool) -> None:
        pipe = await pending.connected(WEBRTC_S)
        ip, port = pipe.get_remote_address() or ("0.0.0.0", 0)  # noqa: S104  not bound to
        address = Multiaddr(tcp_address(ip, port).replace("/tcp/", "/udp/") + "/webrtc-direct")
        await self._host.upgrade(RawConnection(pipe, is_initiator, addresses=[address]), peer)


def _should_begin(ours: NatSummary, theirs: NatSummary, *, is_inbound: bool) -> bool:
    """Whether this side begins a punch: not the one whose port nobody can know, since who begins must be dialed."""
    moving = ours.tcp_mapping is Mapping.DEPENDENT, theirs.tcp_mapping is Mapping.DEPENDENT
    return moving[1] if moving[0] != moving[1] else is_inbound


def _is_at_top(state: Connected) -> bool:
    return state.kind.is_tcp_between_both


def _note(state: Connected, rung: Rung, failure: str | None) -> None:
    state.ladder.note(rung, failure, trio.current_time())


def _summary(introduction: Introduction) -> NatSummary:
    """What a peer says of its NAT."""
    return NatSummary(NatType(introduction.udp), Mapping(introduction.tcp_mapping))


def _reason(error: BaseException) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    if isinstance(error, SwarmException):
        return "somebody else answers there, or the handshake broke off"
    return (str(error) or type(error).__name__).splitlines()[0][:120]
