"""Ballots of RLCCF, as they cross the wire."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shoal.protocol.errors import ProtocolError
from shoal.training.exchange.averager import Contribution, validate
from shoal.training.recipes import rlccf
from shoal.training.recipes.crowd import HASH_BITS, CrowdGRPO, CrowdSettings, packed, unpacked
from shoal.training.recipes.local import peers

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
HASHES = st.integers(0, 2**HASH_BITS - 1)


@given(arrays(np.int64, SHAPES, elements=HASHES))
def test_ballots_hold_two_hashes_in_a_number(answers: npt.NDArray[np.int64]) -> None:
    """Of any number of plays; an exchange carries all of them."""
    ballots = np.stack([packed(each) for each in answers])
    assert ballots.shape[2] == (answers.shape[2] + 1) // 2
    np.testing.assert_array_equal(unpacked(ballots, answers.shape[2]), answers)
    of_one = {"each/answers": ballots[0]}
    validate(Contribution(peers(1)[0], 1.0, of_one), of_one)


@given(arrays(np.int64, (2, 3, 2), elements=st.integers(-(2**53), 2**53)))
def test_any_numbers_are_some_answers(ballots: npt.NDArray[np.int64]) -> None:
    """What a liar sends is read as votes for something, and as no more of them than there are plays."""
    assert unpacked(ballots, 3).shape == (2, 3, 3)


def test_how_often_the_crowd_is_right_is_kept_of_the_first_epochs_and_the_last() -> None:
    """Over a restart, and bounded; what is no such memory is refused, and changes nothing."""
    objective = CrowdGRPO(CrowdSettings())
    for epoch in range(40):
        objective._count(epoch / 40)
    assert objective.memory() == {"votes": [epoch / 40 for epoch in (0, 1, 2, 3, 4, *range(30, 40))]}
    again = CrowdGRPO(CrowdSettings())
    again.remember(objective.memory())
    for votes in ("many", [0.5] * 16, ["0.5"]):
        with pytest.raises(ProtocolError):
            again.remember({"votes": votes})
    assert again.memory() == objective.memory()
    again.remember({})
    assert again.memory() == {"votes": []}


def test_what_the_crowd_expects_is_what_the_recipe_draws() -> None:
    """They are apart, so that the recipe is listed without torch."""
    settings = CrowdSettings()
    assert (settings.prompts, settings.plays) == (rlccf.PROMPTS, rlccf.PLAYS)
