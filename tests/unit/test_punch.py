"""What a punch in vain means for the next one."""

from shoal.node.reach.punch import MARKED_S, MAX_MARKS, Marks
from shoal.protocol.ids import PeerId

ONE, OTHER = PeerId("one"), PeerId("other")


def test_a_dial_in_vain_is_remembered_for_as_long_as_a_nat_may_wait_for_its_answer():
    marks = Marks()
    marks.leave(ONE, 10.0)
    assert MARKED_S > 120, "Linux waits that long"
    assert marks.has(ONE, 10.0)
    assert marks.has(ONE, 10.0 + MARKED_S - 0.1)
    assert not marks.has(ONE, 10.0 + MARKED_S)
    assert not marks.has(OTHER, 10.0)


def test_the_last_dial_in_vain_counts():
    marks = Marks()
    marks.leave(ONE, 0.0)
    marks.leave(ONE, 100.0)
    assert marks.has(ONE, 100.0 + MARKED_S - 0.1)


def test_no_more_than_so_many_peers_are_remembered_and_the_newest_are():
    marks = Marks()
    peers = [PeerId(f"peer{number}") for number in range(MAX_MARKS + 3)]
    for number, peer in enumerate(peers):
        marks.leave(peer, number / 1000)
    assert [marks.has(peer, 1.0) for peer in peers] == 3 * [False] + MAX_MARKS * [True]
