"""Fixed seats: the exact weights that a CID names, had before anything is played, or what the recipe says instead."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid
from shoal.training.effects import Fetch, Fetched
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.local import manifest_of, peers
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.recipe import Probe
from shoal.training.state import encode_arrays
from shoal.training.tasks.cast import Everyone, Fixed, Foreign, Learned, Scripted, pair
from shoal.training.tasks.failures import Failures, TaskFailedError
from shoal.training.tasks.source import SharedPrompts

from .test_past import recipe

NAME = peers(1)[0]


def learner(seat: Fixed, seed: int = 0) -> RecipeLearner:
    """The policy against this seat."""
    made = recipe(pair("agent", seat), probes=(Probe("won", SharedPrompts(2, seed=1, is_fixed=True)),))
    return RecipeLearner(made, manifest_of(made, NAME, seed), Failures("x"), peer=NAME, life="0")


def drive(playing: Generator[Any, Any, Any], answer: Any, most: int = 5) -> tuple[Any, list[Fetch]]:
    """To its end, or so many fetches; what it asked for."""
    asked: list[Fetch] = []
    given = None
    try:
        while len(asked) < most:
            asked.append(playing.send(given))
            given = answer
    except StopIteration as end:
        return end.value, asked
    return None, asked


def state(seed: int = 7, **changed: Any) -> bytes:
    """Of a run of this recipe."""
    made = recipe(Everyone("agent"))
    arrays = RecipeLearner(made, manifest_of(made, NAME, seed), Failures("x"), peer=NAME).export_state()
    return encode_arrays({**arrays, **changed}, {"epoch": 1})


def test_the_weights_play_as_they_are_and_nobody_learns_from_it() -> None:
    """Fetched once, whatever the present policy becomes."""
    data = state()
    seat = Fixed("agent", Cid.of_block(data))
    made = learner(seat)
    collected, asked = drive(made.collecting(24, lambda: False), Fetched(data))
    assert [(each.cid, each.waits) for each in asked] == [(seat.cid, True)]
    assert len(data) < asked[0].max_bytes < 2**22
    assert collected.samples >= 24
    own = learner(Fixed("agent", seat.cid), seed=7)._trainees["agent"].model  # as the run of that seed began
    playing: Any = made._actors[seat]
    np.testing.assert_array_equal(playing.flat, own.flat)
    assert not np.array_equal(playing.flat, made._trainees["agent"].model.flat)
    assert {take.seat for take in made._takes("agent")} == {Learned("agent")}
    assert {take.role for take in made._takes("agent")} == {"player_0"}
    before = playing.flat.copy()
    made._trainees["agent"].model.flat[:] = 1
    _, asked = drive(made.collecting(24, lambda: False), None)
    assert asked == []
    np.testing.assert_array_equal(playing.flat, before)


def test_while_nobody_gives_them_nothing_is_played_or_somebody_else_plays() -> None:
    """As the recipe says; asked anew each time."""
    seat = Fixed("agent", Cid.of_block(b"x"))
    made = learner(seat)
    for answer in (None, Fetched(None)):
        collected, asked = drive(made.collecting(24, lambda: False), answer)
        assert (collected.samples, collected.total, len(asked)) == (0, 0, 1)
    assert drive(made.evaluating(1, 1), Fetched(None))[0] is None  # waits
    stands_in = Fixed("agent", seat.cid, otherwise=Scripted("first"))
    made = learner(stands_in)
    collected, asked = drive(made.collecting(24, lambda: False), Fetched(None))
    assert collected.samples >= 24
    assert not asked[0].waits
    assert {act for played in made._plays for take in played.takes if take.seat == stands_in for act in take.acts} == {
        0
    }
    assert drive(made.evaluating(1, 1), Fetched(None))[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"nonsense", "not a Shoal state"),
        (encode_arrays({"other/parameters/w": np.zeros(3, np.float32)}, {}), "no policy 'agent' in it; it has other"),
        (encode_arrays({"x": np.zeros(3, np.float32)}, {}), "it has none"),
        (state(**{"agent/parameters/odd": np.zeros(3, np.float32)}), "'odd' is not asked for"),
    ],
)
def test_what_is_no_such_policy_is_refused_for_good_with_the_reason(data: bytes, words: str) -> None:
    """The name stands for these bytes, so no try would change that."""
    with pytest.raises(TaskFailedError, match=words):
        drive(learner(Fixed("agent", Cid.of_block(data))).collecting(24, lambda: False), Fetched(data))


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (3e30, "beyond")]
)
def test_values_that_no_learner_reaches_are_refused(value: float, words: str) -> None:
    """As everything is that comes from elsewhere."""
    made = recipe(Everyone("agent"))
    arrays = RecipeLearner(made, manifest_of(made, NAME), Failures("x"), peer=NAME).export_state()
    name = next(each for each in arrays if "/parameters/" in each)
    arrays[name].reshape(-1)[0] = value
    data = encode_arrays(arrays, {})
    with pytest.raises(TaskFailedError, match=words):
        drive(learner(Fixed("agent", Cid.of_block(data))).collecting(24, lambda: False), Fetched(data))
    shorter = encode_arrays({each: array[:-1] if each == name else array for each, array in arrays.items()}, {})
    with pytest.raises(TaskFailedError, match="take another state"):
        drive(learner(Fixed("agent", Cid.of_block(shorter))).collecting(24, lambda: False), Fetched(shorter))


def test_a_refusal_of_the_node_ends_it_too() -> None:
    """What is too large is not fetched."""
    made = learner(Fixed("agent", Cid.of_block(b"x")))
    with pytest.raises(TaskFailedError, match="9 bytes too many"):
        drive(made.collecting(24, lambda: False), Fetched(None, "9 bytes too many"))


def test_seats_that_cannot_be_are_refused_and_a_manifest_may_name_other_weights() -> None:
    """Before anything is played."""
    with pytest.raises(UsageError, match="fixes the policy 'agnet'"):
        learner(Fixed("agnet", Cid.of_block(b"x")))
    with pytest.raises(UsageError, match="only a policy or a script"):
        Fixed("agent", Cid.of_block(b"x"), otherwise=Foreign("x"))  # type: ignore[arg-type]
    made = recipe(Everyone(Fixed("agent", Cid.of_block(b"x"))))
    cid = Cid.of_block(b"y")
    changed = overridden(made, {"cast.policy.cid": str(cid)})
    assert changed.cast.policy.cid == cid  # type: ignore[attr-defined]
    with pytest.raises(UsageError):
        overridden(made, {"cast.policy.cid": "bafy"})
