"""Who joins depends on no one member: others are asked when it is slow, says no, or is gone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from shoal.dht.fetch import Lack
from shoal.node.swarm.content import UnavailableError
from shoal.node.swarm.introducing import LIMIT_S, OTHERS_S, fetch_manifest
from shoal.protocol.errors import NoPeersError
from shoal.protocol.ids import PeerId, SwarmId

A, B, C = (PeerId.of_public_key(bytes([n]) * 32) for n in range(3))
SWARM = SwarmId.of_manifest(b"a run")
NEVER = float("inf")


class Members:
    """Each gives the manifest after a while, or says that it has none (None); others are found when asked for."""

    def __init__(self, others: Sequence[PeerId], **takes_s: float | None) -> None:
        self.takes_s = {{"a": A, "b": B, "c": C}[name]: s for name, s in takes_s.items()}
        self.others = others
        self.asked: list[tuple[PeerId, ...]] = []

    async def find(self) -> Sequence[PeerId]:
        await trio.sleep(0.5)
        return self.others

    async def get(self, members: Sequence[PeerId], patience_s: float) -> bytes:
        self.asked.append(tuple(members))
        has = [each for member in members if (each := self.takes_s[member]) is not None]
        if not has:
            await trio.sleep(0.1)
            raise UnavailableError("nobody is left who has it")
        if min(has) > patience_s:
            await trio.sleep(patience_s)
            raise UnavailableError(f"nothing came for {patience_s:g} s")
        await trio.sleep(min(has))
        return b"manifest"


def joined(members: Members) -> tuple[bytes, float]:
    """The manifest, and after which time; it is asked of the first member first."""

    async def run() -> tuple[bytes, float]:
        began = trio.current_time()
        return await fetch_manifest(SWARM, (A,), members.find, members.get), trio.current_time() - began

    return trio.run(run, clock=MockClock(autojump_threshold=0))


def test_who_gives_it_soon_is_the_only_one_that_is_asked() -> None:
    members = Members((A, B), a=OTHERS_S - 0.5, b=0.0)
    assert joined(members) == (b"manifest", pytest.approx(OTHERS_S - 0.5))
    assert members.asked == [(A,)]


@pytest.mark.parametrize("first", [NEVER, 1000.0, 15.0])
def test_others_are_asked_beside_one_that_is_slow(first: float) -> None:
    members = Members((A, B), a=first, b=0.2)
    assert joined(members) == (b"manifest", pytest.approx(OTHERS_S + 0.7))


def test_one_that_is_slow_is_still_waited_for() -> None:
    members = Members((A,), a=15.0)
    found, at = joined(members)
    assert found == b"manifest"
    assert at == pytest.approx(15.0)


def test_others_are_asked_at_once_when_the_first_has_none() -> None:
    members = Members((A, B), a=None, b=0.2)
    assert joined(members) == (b"manifest", pytest.approx(0.8))


def test_it_is_asked_for_again() -> None:
    members = Members((A, B), a=None, b=None)

    async def find() -> Sequence[PeerId]:
        members.takes_s[B] = None if len(members.asked) < 3 else 0.0
        return (B,)

    members.find = find  # type: ignore[method-assign]  # it comes to have it
    assert joined(members)[0] == b"manifest"


def test_what_was_asked_of_whom_is_said_when_nobody_gives_it() -> None:
    with pytest.raises(
        NoPeersError, match=r"2 member.s. of .* none gave it within \d+ s .*nobody is left.*fresh ticket"
    ):
        joined(Members((A, B), a=None, b=None))
    with pytest.raises(NoPeersError, match=rf"2 member.s. of .* {LIMIT_S:.0f} s .*nothing came for 30 s"):
        joined(Members((A, B), a=NEVER, b=NEVER))


def test_what_can_be_no_manifest_is_asked_of_nobody_else() -> None:
    async def get(members: Sequence[PeerId], patience_s: float) -> bytes:
        raise UnavailableError("it has too many bytes", Lack.UNFIT)

    members = Members((A, B), a=0.0)
    members.get = get  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="too many bytes"):
        joined(members)
