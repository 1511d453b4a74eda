"""A store keeps within its room, the newest first, and its index is the store again; draws are as they were told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.protocol.signing import Signer
from shoal.training.rollouts.sampler import Accounts, Ratio, Usage, draw
from shoal.training.rollouts.shard import Place
from shoal.training.rollouts.store import (
    Advanced,
    Came,
    Drop,
    FoundFalse,
    FoundTrue,
    Keep,
    Kept,
    Reason,
    Store,
    StoreEvent,
    StoreLimits,
    Used,
)

PEERS = [Signer(bytes([number]) * 32).peer_id for number in range(1, 6)]
ME, *OTHERS = PEERS
LIMITS = StoreLimits(max_bytes=1000, author_share=0.5, max_age=3)


def kept(
    number: int, author: PeerId = OTHERS[0], version: int = 10, num_bytes: int = 100, units: tuple[int, ...] = (10, 10)
) -> Kept:
    name = Cid.of_block(f"{number} {author}".encode())
    return Kept(name, Place(author, "", number, 0), version, num_bytes, units, (0,) * len(units))


def a_store(*shards: Kept, version: int = 10, limits: StoreLimits = LIMITS) -> Store:
    store = Store(ME, limits)
    store.handle(Advanced(version))
    for shard in shards:
        store.handle(Came(shard))
    return store


def names(store: Store) -> set[int]:
    return {each.place.stream for each in store}


def test_the_oldest_version_goes_first_and_then_what_gives_least() -> None:
    shards = [
        kept(0, OTHERS[0], 9),
        kept(1, OTHERS[1], 8),
        kept(2, OTHERS[2], 10, units=(1, 1)),
        kept(3, OTHERS[3], 10),
    ]
    store = a_store(*shards, limits=replace(LIMITS, max_bytes=400, author_share=1.0))
    outputs = [store.handle(Came(kept(number, ME))) for number in (4, 5, 6)]
    assert [[type(each) for each in some] for some in outputs] == [[Keep, Drop]] * 3
    gone = [each.cid for some in outputs for each in some if isinstance(each, Drop)]
    assert gone == [shards[1].cid, shards[0].cid, shards[2].cid]
    assert store.dropped == {Reason.NO_ROOM: 3}


def test_an_author_that_makes_much_pushes_out_its_own() -> None:
    store = a_store(*(kept(number, OTHERS[1], 7) for number in range(4)))
    for number in range(20):
        store.handle(Came(kept(number, OTHERS[0], 10)))
    count = Counter(each.place.author for each in store)
    assert count == {OTHERS[1]: 4, OTHERS[0]: 5}


def test_own_shards_may_take_all_the_room() -> None:
    assert len(a_store(*(kept(number, ME) for number in range(20)))) == 10


def test_what_is_too_old_too_new_known_twice_or_shunned_is_not_taken() -> None:
    first = kept(0)
    store = a_store(first)
    second = replace(first, cid=Cid.of_block(b"another history"))
    for shard, reason in (
        (kept(1, version=6), Reason.STALE),
        (kept(2, version=11), Reason.AHEAD),
        (second, Reason.TWICE),
        (kept(3, num_bytes=501), Reason.NO_ROOM),
    ):
        instead = first.cid if reason is Reason.TWICE else None
        assert store.handle(Came(shard)) == [Drop(shard.cid, OTHERS[0], reason, instead)]
    assert store.handle(Came(first)) == []
    assert store.handle(FoundFalse(first.cid, OTHERS[0])) == [Drop(first.cid, OTHERS[0], Reason.FALSE)]
    assert store.handle(Came(kept(4))) == [Drop(kept(4).cid, OTHERS[0], Reason.SHUNNED)]
    assert store.shunned == {OTHERS[0]}


def test_shards_grow_stale_as_the_policy_advances() -> None:
    store = a_store(kept(0, version=8), kept(1, version=10))
    assert store.handle(Advanced(11)) == []
    assert [type(each) for each in store.handle(Advanced(12))] == [Drop]
    assert names(store) == {1}
    assert store.handle(Advanced(5)) == []
    assert store.version == 12


def test_what_was_used_up_goes_and_does_not_come_back() -> None:
    shard = kept(0)
    store = a_store(shard)
    assert store.handle(Used(shard.cid, (0,))) == []
    assert store.handle(Used(shard.cid, (1,))) == [Drop(shard.cid, OTHERS[0], Reason.USED_UP)]
    assert store.handle(Came(shard)) == [Drop(shard.cid, OTHERS[0], Reason.KNOWN)]
    assert store.handle(Used(shard.cid, (0,))) == []


authors = st.sampled_from(PEERS)
events = st.lists(
    st.one_of(
        st.builds(
            lambda number, author, version, size: Came(kept(number, author, version, size)),
            st.integers(0, 12),
            authors,
            st.integers(0, 14),
            st.integers(1, 600),
        ),
        st.builds(Advanced, st.integers(0, 14)),
        st.builds(lambda number, author: Used(kept(number, author).cid, (0,)), st.integers(0, 12), authors),
        st.builds(lambda number, author: FoundTrue(kept(number, author).cid), st.integers(0, 12), authors),
        st.builds(lambda author: FoundFalse(Cid.of_block(b""), author), st.sampled_from(OTHERS)),
    ),
    max_size=40,
)


@given(events, st.integers(100, 2000), st.floats(0.1, 1))
@settings(deadline=None)
def test_whatever_happens_the_orders_make_what_the_store_says_and_its_index_is_the_store(
    happens: list[StoreEvent], max_bytes: int, share: float
) -> None:
    limits = StoreLimits(max_bytes=max_bytes, author_share=share, max_age=3, max_uses=2)
    store = Store(ME, limits)
    pinned: set[Cid] = set()
    for event in happens:
        for order in store.handle(event):
            if isinstance(order, Keep):
                pinned.add(order.cid)
            else:
                pinned.discard(order.cid)
        assert pinned == {each.cid for each in store}
        assert store.num_bytes == sum(each.num_bytes for each in store) <= max_bytes
        for author in OTHERS:
            assert sum(each.num_bytes for each in store if each.place.author == author) <= max_bytes * share
        assert all(store.version - 3 <= each.version <= store.version for each in store)
    again, orders = Store.of_index(store.index(), ME, limits)
    assert orders == []
    assert list(again) == list(store)
    assert again.index() == store.index()
    smaller, orders = Store.of_index(store.index(), ME, replace(limits, max_bytes=max_bytes // 2))
    assert {each.cid for each in smaller} == pinned - {each.cid for each in orders if isinstance(each, Drop)}


def test_an_index_that_is_none_is_refused() -> None:
    for data in (b"", b"\xc1", a_store(kept(0)).index() + b"\0"):
        with pytest.raises(ProtocolError):
            Store.of_index(data, ME, LIMITS)
    with pytest.raises(UsageError):
        StoreLimits(max_bytes=1, author_share=0)


# --- draws -----------------------------------------------------------------------------------------------------------


def many(author: PeerId, count: int, version: int = 10, units: tuple[int, ...] = (8, 8)) -> list[Kept]:
    return [kept(number, author, version, units=units) for number in range(count)]


@given(
    st.lists(
        st.tuples(st.sampled_from(PEERS), st.integers(4, 11), st.lists(st.integers(1, 20), min_size=1, max_size=4)),
        max_size=30,
    ),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_draw_keeps_its_promises(
    made: list[tuple[PeerId, int, list[int]]], own: int, foreign: int, max_age: int, seed: int
) -> None:
    if own + foreign == 0:
        return
    shards = [kept(number, author, version, units=tuple(sizes)) for number, (author, version, sizes) in enumerate(made)]
    ratio = Ratio(own=own, foreign=foreign, max_age=max_age)
    drawn = draw(shards, 10, ME, ratio, np.random.default_rng(seed))
    assert drawn == draw(reversed(shards), 10, ME, ratio, np.random.default_rng(seed)), "another order, another draw"
    by_name = {each.cid: each for each in shards}
    assert drawn.own <= own
    assert drawn.foreign <= foreign
    for side, is_own in ((drawn.own, True), (drawn.foreign, False)):
        assert side == sum(pick.samples for pick in drawn.picks if (pick.author == ME) == is_own)
    for pick in drawn.picks:
        shard = by_name[pick.cid]
        assert 0 <= pick.age <= max_age
        assert pick.age == 10 - shard.version
        assert len(set(pick.units)) == len(pick.units)
        assert pick.samples == sum(shard.units[unit] for unit in pick.units)


def test_an_update_has_the_ratio_that_was_set() -> None:
    shards = many(ME, 20) + many(OTHERS[0], 20) + many(OTHERS[1], 20)
    drawn = draw(shards, 10, ME, Ratio(own=64, foreign=128), np.random.default_rng(0))
    assert (drawn.own, drawn.foreign) == (64, 128)
    by_author = Counter[PeerId]()
    for pick in drawn.picks:
        by_author[pick.author] += pick.samples
    assert by_author == {ME: 64, OTHERS[0]: 64, OTHERS[1]: 64}


def test_own_samples_do_not_stand_in_for_others() -> None:
    drawn = draw(many(ME, 50), 10, ME, Ratio(own=64, foreign=64), np.random.default_rng(0))
    assert (drawn.own, drawn.foreign) == (64, 0)


def test_of_one_other_alone_all_is_taken_and_of_several_none_gives_more_than_its_share() -> None:
    ratio = Ratio(own=0, foreign=160, max_share=0.25)
    assert draw(many(OTHERS[0], 20), 10, ME, ratio, np.random.default_rng(0)).foreign == 160
    flood = many(OTHERS[0], 500) + [each for other in OTHERS[1:] for each in many(other, 5)]
    drawn = draw(flood, 10, ME, ratio, np.random.default_rng(0))
    assert drawn.foreign == 160
    assert sum(pick.samples for pick in drawn.picks if pick.author == OTHERS[0]) <= 40


def test_what_is_not_used_is_counted_with_the_reason() -> None:
    fresh = kept(0, units=(8, 8))
    shards = [
        replace(fresh, uses=(1, 0), is_checked=True),
        kept(1, version=3, units=(5,)),
        kept(2, version=11, units=(6,)),
        kept(3, OTHERS[1], units=(7,)),
        kept(4, OTHERS[2], units=(9,)),
        replace(kept(5, OTHERS[3], units=(1000,)), is_checked=True),
    ]
    ratio = Ratio(own=0, foreign=100, max_age=6, needs_check=True)
    drawn = draw(shards, 10, ME, ratio, np.random.default_rng(0), shunned=frozenset({OTHERS[2]}))
    assert drawn.passed_over == {
        Reason.USED_UP: 8,
        Reason.STALE: 5,
        Reason.AHEAD: 6,
        Reason.UNCHECKED: 7,
        Reason.SHUNNED: 9,
        Reason.TOO_LARGE: 1000,
    }
    assert [(pick.cid, pick.units) for pick in drawn.picks] == [(fresh.cid, (1,))]


@pytest.mark.parametrize("max_uses", [1, 3])
def test_nothing_is_used_more_often_than_was_said(max_uses: int) -> None:
    limits = StoreLimits(max_bytes=10**6, max_uses=max_uses)
    store = a_store(*many(OTHERS[0], 6), *many(ME, 6), limits=limits)
    ratio, rng = Ratio(own=24, foreign=24, max_uses=max_uses), np.random.default_rng(1)
    used: Counter[tuple[Cid, int]] = Counter()
    accounts = Accounts()
    for _ in range(50):
        drawn = draw(store, 10, ME, ratio, rng)
        accounts.used(drawn)
        for event in drawn.used():
            used.update((event.cid, unit) for unit in event.units)
            store.handle(event)
    assert set(used.values()) == {max_uses}
    assert len(used) == 24
    assert len(store) == 0
    assert accounts.by_author[ME].used == accounts.by_author[OTHERS[0]].used == 6 * 16 * max_uses


def test_accounts_say_who_made_what_was_used() -> None:
    accounts = Accounts()
    accounts.made(OTHERS[0], 100)
    accounts.checked(OTHERS[0], 40)
    for reason in (Reason.STALE, Reason.FALSE, Reason.TWICE, Reason.NO_ROOM):
        accounts.dropped(OTHERS[0], 10, reason)
    drawn = draw([kept(0, version=8), kept(1, version=10)], 10, ME, Ratio(own=0, foreign=40), np.random.default_rng(0))
    accounts.used(drawn)
    assert accounts.by_author == {OTHERS[0]: Usage(100, 40, 40, 20, 10, 40)}
    assert accounts.by_author[OTHERS[0]].mean_staleness == 1.0
    assert Usage().mean_staleness == 0.0
