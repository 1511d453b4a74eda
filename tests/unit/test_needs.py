"""A run names the contents that it needs, and no others."""

from __future__ import annotations

import random

from shoal.dht.blocks import name
from shoal.node.swarm.holding import IDLE_BYTES, LEASE_S, PART_S, Holding, open_memory
from shoal.node.swarm.needs import MAX_COMING, Needs
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES
from shoal.training.statements import NO_BALLOT, RoundKey


def cid(number: int) -> Cid:
    return Cid.of_block(b"%d" % number)


def test_a_round_and_the_one_before_are_needed_and_older_ones_are_over() -> None:
    needs = Needs()
    for epoch in range(1000):
        assert needs.follow(RoundKey(epoch, 0, NO_BALLOT), cid(-epoch))
        assert not needs.follow(RoundKey(epoch, 0, NO_BALLOT), cid(-epoch))
        needs.offer(cid(10 * epoch))
        needs.come(cid(10 * epoch + 1), is_policy=False)
        expected = {cid(10 * each + offset) for each in (epoch, max(0, epoch - 1)) for offset in (0, 1)}
        assert needs.in_memory() == expected | {cid(-epoch), cid(min(0, 1 - epoch))}
        assert not needs.is_over(cid(10 * epoch + 1))
        assert epoch < 2 or needs.is_over(cid(10 * (epoch - 2) + 1))


def test_policies_on_their_way_are_few_and_on_disk_are_the_newest_two_and_those_that_solve_the_task() -> None:
    needs = Needs()
    for number in range(100):
        needs.come(cid(number), is_policy=True)
    assert len(needs.in_memory()) == MAX_COMING
    needs.claim(cid(7))
    for number in range(100):
        assert needs.on_disk(cid(number))[:2] == (cid(number - 1), cid(number))[-min(2, number + 1) :] or number == 0
        needs.write(cid(number))
    assert needs.on_disk() == (cid(98), cid(99), cid(7))


def a_content(holding: Holding, seed: int, now: float, *, size: int = BLOCK_BYTES, is_whole: bool = True) -> Cid:
    data = random.Random(seed).randbytes(size)
    named = name(data)
    in_memory = holding.take_room(size + len(named.manifest_bytes), now)
    room = memoryview(data) if is_whole else open_memory(size)
    return holding.add(named, room, now, in_file=not in_memory, is_whole=is_whole).cid


def test_what_is_idle_goes_but_what_a_peer_is_taking_and_what_came_in_part_a_while_later() -> None:
    holding = Holding(max_memory_bytes=64 * BLOCK_BYTES)
    taken, part = (a_content(holding, seed, 0.0, size=2 * BLOCK_BYTES, is_whole=seed == 1) for seed in (1, 2))
    holding.lease(taken, 0.0)
    idle = [a_content(holding, seed, 0.0) for seed in range(3, 10)]
    holding.hold("a run", [idle[-1]], 1.0)
    assert [holding.get(each) is None for each in (taken, part)] == [False, False]
    assert sum(holding.get(each) is not None for each in idle) <= 1 + IDLE_BYTES // BLOCK_BYTES
    holding.trim(LEASE_S + 1.0)
    holding.trim(PART_S + 1.0)
    assert holding.memory_bytes <= IDLE_BYTES + BLOCK_BYTES
    assert holding.get(idle[-1]) is not None


def test_a_content_of_one_block_is_not_kept_for_whoever_has_taken_all_of_it() -> None:
    holding = Holding()
    for epoch in range(1000):  # of a run that is quicker than `LEASE_S`
        mine = a_content(holding, epoch, epoch / 100, size=100_000)
        holding.hold("a run", [mine], epoch / 100)
        holding.lease(mine, epoch / 100)
    assert holding.memory_bytes <= IDLE_BYTES + 100_000


def test_a_content_that_was_made_here_and_went_while_it_was_fetched_is_gone_when_the_fetch_ends() -> None:
    holding = Holding()
    fetched = holding.get(a_content(holding, 1, 0.0, size=2 * BLOCK_BYTES, is_whole=False))
    assert fetched is not None
    holding.use(fetched)
    assert holding.get(a_content(holding, 1, 0.0, size=2 * BLOCK_BYTES)) is not fetched
    holding.trim(1.0)
    assert holding.get(fetched.cid) is None
    holding.unuse(fetched, 2.0)
    for seed in range(2, 10):
        a_content(holding, seed, 1000.0 + seed)
        holding.trim(1000.0 + seed)
    assert holding.memory_bytes <= IDLE_BYTES


def test_a_block_that_two_contents_share_stays_as_long_as_one_does() -> None:
    holding = Holding()
    same = bytes(BLOCK_BYTES)
    cids = []
    for number in range(2):
        data = same + b"%d" % number
        named = name(data)
        holding.take_room(len(data) + len(named.manifest_bytes), 0.0)
        cids.append(holding.add(named, memoryview(data), 0.0, in_file=False, is_whole=True, owner=str(number)).cid)
    shared = Cid.of_block(same)
    holding.hold("0", (), 1.0)
    for seed in range(5, 10):
        a_content(holding, seed, 1.0)
    holding.trim(1.0)
    assert holding.get(cids[0]) is None
    assert holding.find(shared) == same
    assert holding.find(cids[1]) is not None
