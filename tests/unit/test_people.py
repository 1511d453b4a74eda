"""What people are asked and may answer: legal acts, in time, within bounds, and nobody waits for an empty chair."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import PeerId
from shoal.training.tasks.cast import MAX_PERSON_S, Learned, Person
from shoal.training.tasks.people import (
    ABSENT_S,
    MAX_ASKS,
    MAX_BYTES,
    MAX_CHARS,
    MAX_OF_PEER,
    NobodyThereError,
    People,
    TooMuchError,
)
from shoal.training.tasks.play import Box, Continuous, Discrete, Role, Take, Text
from shoal.training.tasks.source import Scenario
from shoal.training.tasks.wire import count_acts, decode_acts, encode_takes

ROLES = {
    "chooser": Role(Box(2), Discrete(4)),
    "talker": Role(Text(2 * MAX_CHARS), Text(8)),
    "walker": Role(Box(2), Continuous(2)),
}
ME, OTHER = (PeerId.of_public_key(bytes([number]) * 32) for number in (1, 2))


def takes(role: str, count: int = 1, sight: Any = None, legal: Any = None) -> bytes:
    """That wait for acts."""
    made = []
    for number in range(count):
        each = Take(role, ROLES[role], Learned("x"), Scenario(number, tag="t"), number)
        shown = np.array([number, 1], np.float32) if sight is None else sight
        each.sights = [shown]
        if legal is not None:
            each.legal = [np.array(legal)]
        made.append(each)
    return encode_takes(made)


def attended(now: float = 0.0) -> People:
    """Somebody has just looked."""
    people = People(ROLES)
    people.look(now)
    return people


def test_an_answer_that_is_not_legal_is_refused_with_what_could_be_done_and_may_be_given_again() -> None:
    """Of every kind of act."""
    people = attended()
    question = people.ask(ME, takes("chooser", legal=[False, True, False, True]), 60, 0)
    (ask,) = people.look(1)
    assert (ask.take.role, ask.sight, ask.legal) == ("chooser", [0, 1], [1, 3])
    for wrong in (0, 4, -1, "1", 1.5, True, None, [1], 10**30, {"act": 1}):
        with pytest.raises(UsageError, match=r"answer with one of 1, 3"):
            people.answer(ask.number, wrong, 2)
    assert ask.refused == 10
    assert people.answer(ask.number, 3, 2) is question
    assert (question.missing, decode_acts(question.encoded(), [Discrete(4)])) == (0, (3,))
    with pytest.raises(UsageError, match="nobody waits for an answer"):
        people.answer(ask.number, 3, 2)
    people.ask(ME, takes("walker"), 60, 2)
    (ask,) = people.look(3)
    for wrong in ([1], [1, 2, 3], ["a", 1], "12", 5, [float("nan"), 0], [1e300, 0], [True, 0]):
        with pytest.raises(UsageError, match="a list of 2 numbers"):
            people.answer(ask.number, wrong, 3)
    np.testing.assert_array_equal(people.answer(ask.number, [0.5, -1], 3).acts[0], np.array([0.5, -1], np.float32))
    people.ask(ME, takes("talker", sight="hello"), 60, 3)
    (ask,) = people.look(3)
    assert (ask.sight, ask.legal) == ("hello", None)
    for wrong in ("too long a word", 1, ["a"]):
        with pytest.raises(UsageError, match="a text of up to 8 characters"):
            people.answer(ask.number, wrong, 3)
    assert people.answer(ask.number, "hi", 3).acts == ["hi"]


def test_nobody_is_asked_where_nobody_sits_and_who_is_thinking_is_there() -> None:
    """Reader, recent look, or an ask that was shown."""
    people = People()
    with pytest.raises(NobodyThereError, match="no seat for a person"):
        people.ask(ME, takes("chooser"), 60, 0)
    people.roles = ROLES
    with pytest.raises(NobodyThereError, match="nobody sits"):
        people.ask(ME, takes("chooser"), 60, 0)
    people.num_readers = 1
    people.ask(ME, takes("chooser"), 60, 0)
    people.num_readers = 0
    assert not people.is_attended(0)
    people.look(1)
    people.ask(ME, takes("chooser"), 60, 50)  # the first was shown, and can be answered until 60
    assert not people.is_attended(60 + ABSENT_S)
    with pytest.raises(NobodyThereError):
        people.ask(ME, takes("chooser"), 200, 60 + ABSENT_S)


def test_what_is_late_is_gone_and_what_was_done_of_a_question_counts() -> None:
    """Also if its asker has gone."""
    people = attended()
    question = people.ask(ME, takes("chooser", 3), 10, 0)
    asks = people.look(0)
    people.answer(asks[1].number, 2, 9)
    assert count_acts(question.encoded(), 3) == 1
    assert decode_acts(question.encoded(), [Discrete(4)] * 3) == (None, 2, None)
    with pytest.raises(UsageError, match="its time is over"):
        people.answer(asks[0].number, 2, 10)
    assert people.count(10) == 0
    people.drop(question)
    later = people.ask(OTHER, takes("chooser"), 30, 10)
    assert [each.number for each in people.look(10)] == [4]
    people.drop(later)
    assert people.count(10) == 0


def test_one_peer_cannot_fill_the_queue_and_all_together_have_a_bound() -> None:
    """What does not fit is left unanswered, and what is too large to be shown."""
    people = attended()
    assert people.ask(ME, takes("chooser", 200), 60, 0).missing == MAX_OF_PEER
    with pytest.raises(TooMuchError):
        people.ask(ME, takes("chooser", 5), 60, 0)
    assert people.ask(OTHER, takes("chooser", 5), 60, 0).missing == 5
    for number in range(3, 60):
        with suppress(TooMuchError):
            people.ask(PeerId.of_public_key(bytes([number]) * 32), takes("chooser", 200), 60, 0)
    assert people.count(0) == MAX_ASKS == len(people._asks)
    assert people.num_refused > 200
    people = attended()
    large = takes("talker", sight="x" * (MAX_CHARS + 1))
    for asked, until in ((large, 60), (bytes(MAX_BYTES + 1), 60), (takes("chooser"), 0.5)):
        with pytest.raises(TooMuchError):
            people.ask(ME, asked, until, 0)
    for hostile in (b"", b"\xc1" * 100, takes("chooser")[:-1]):
        with pytest.raises(ProtocolError):
            people.ask(ME, hostile, 60, 0)


def test_a_person_has_a_time_that_people_need() -> None:
    """And no more than plays can wait."""
    for seconds in (0, 1, MAX_PERSON_S + 1, float("nan")):
        with pytest.raises(UsageError, match="a person has"):
            Person("x", seconds=seconds)
