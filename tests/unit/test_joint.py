"""Several updates in one exchange: in step, each by its own section, whatever anybody sends."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.training.algorithms.base import Exchange, Joint, Update, UpdateStats
from shoal.training.algorithms.joint import Section, decode_joint, encode_joint, together
from shoal.training.exchange.averager import Arrays


def update(heard: list[Arrays], number: int, weight: float = 1.0) -> Update:
    """An update with so many exchanges."""
    for index in range(number):
        arrays: Arrays = {"mean/x": np.full(2, index, np.float32)}
        heard.append((yield Exchange(arrays, weight, arrays, is_last=index == number - 1)))
    return UpdateStats(3, number)


def test_updates_go_in_step_and_those_with_fewer_exchanges_are_done_earlier() -> None:
    """What is asked for at each step, and what each is told."""
    short: list[Arrays] = []
    long: list[Arrays] = []
    joint = together({"a": update(short, 1), "b": update(long, 3), "none": update([], 0)}, 7.0)
    asked: list[tuple[list[str], bool]] = []
    answer = None
    try:
        while True:
            wanted: Joint = next(joint) if answer is None else joint.send(answer)
            asked.append((sorted(wanted.exchanges), wanted.is_last))
            answer = {name: {"mean/x": np.full(2, len(asked), np.float32)} for name in wanted.exchanges}
    except StopIteration as end:
        stats = end.value
    assert asked == [(["a", "b"], False), (["b"], False), (["b"], True)]
    assert [float(each["mean/x"][0]) for each in short] == [1.0]
    assert [float(each["mean/x"][0]) for each in long] == [1.0, 2.0, 3.0]
    assert {name: each.steps for name, each in stats.items()} == {"a": 1, "b": 3, "none": 0}


def test_what_nobody_gave_anything_to_is_told_so() -> None:
    """An answer that lacks a section is an empty one; who has turns gives, also where no policy has use for them."""
    heard: list[Arrays] = []
    joint = together({"a": update(heard, 1, weight=0.0)}, 5.0)
    assert next(joint).weight == 5
    with pytest.raises(StopIteration):
        joint.send({})
    assert heard == [{}]


def test_one_that_fails_closes_the_others() -> None:
    """So that each takes itself back."""
    closed: list[str] = []

    def careful(name: str) -> Update:
        try:
            yield Exchange({}, 0, {})
            yield Exchange({}, 0, {})
        except GeneratorExit:
            closed.append(name)
            raise
        return UpdateStats(0, 0)

    def failing() -> Generator[Exchange, Arrays, UpdateStats]:
        yield Exchange({}, 0, {})
        raise ProtocolError("does not fit")

    joint = together({"a": careful("a"), "b": failing(), "c": careful("c")}, 1.0)
    next(joint)
    with pytest.raises(ProtocolError, match="does not fit"):
        joint.send({})
    assert closed == ["a", "c"]


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.tuples(st.floats(0.5, 2.0**53), st.binary(max_size=64)), max_size=8
    )
)
def test_sections_come_as_they_went(sections: dict[str, tuple[float, bytes]]) -> None:
    """Whatever their names and bytes."""
    wanted = {name: Section(*each) for name, each in sections.items()}
    assert decode_joint(encode_joint(wanted), wanted.keys() | {"another"}) == wanted


@given(st.binary(max_size=200))
def test_bytes_from_anybody_are_sections_or_refused(data: bytes) -> None:
    """And nothing else happens."""
    try:
        found = decode_joint(data, {"a"})
    except ProtocolError:
        return
    assert found.keys() <= {"a"}


@pytest.mark.parametrize(
    ("sections", "names", "reason"),
    [
        ({"b": Section(1.0, b"")}, {"a"}, "not asked for"),
        ({"a": Section(0.0, b"")}, {"a"}, "cannot weigh"),
        ({"a": Section(-1.0, b"")}, {"a"}, "cannot weigh"),
        ({"a": Section(2.0**60, b"")}, {"a"}, "cannot weigh"),
    ],
)
def test_a_section_that_no_honest_member_sends_is_refused(
    sections: dict[str, Section], names: set[str], reason: str
) -> None:
    """By its name or its weight."""
    with pytest.raises(ProtocolError, match=reason):
        decode_joint(encode_joint(sections), names)


def test_a_content_is_as_long_as_its_sections() -> None:
    """No more, no less."""
    data = encode_joint({"a": Section(1.0, b"12345")})
    for wrong in (data + b"x", data[:-1]):
        with pytest.raises(ProtocolError):
            decode_joint(wrong, {"a"})
