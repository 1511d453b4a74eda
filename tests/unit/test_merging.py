"""What several members give to one exchange, or to several at once, becomes the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.algorithms.base import Exchange, Joint
from shoal.training.arena import Arena
from shoal.training.exchange.averager import Arrays, Contribution
from shoal.training.exchange.outliers import Scale
from shoal.training.exchange.rules import WRITTEN, Aggregator, Codec
from shoal.training.merging import Given, Merging, NothingToMergeError

PEERS = sorted(PeerId.of_public_key(bytes([number + 1]) * 32) for number in range(3))


def wanted(values: Mapping[str, float | None], weight: float = 10.0) -> Joint:
    """Ballots and one array to be averaged per name; nothing to give where the value is None."""

    def refuse(most: float, contribution: Contribution) -> None:
        if float(contribution.arrays["mean/x"].max()) > most:
            raise ProtocolError(f"{contribution.author} is beyond what an optimiser reaches")

    exchanges = {}
    for name, value in values.items():
        template: Arrays = {"mean/x": np.zeros(3, np.float32), "each/votes": np.zeros(2, np.int64)}
        own: Arrays = {} if value is None else {"mean/x": np.full(3, value, np.float32), "each/votes": np.arange(2)}
        scales = {"mean/x": Scale(10.0)}
        exchanges[name] = Exchange(own, 0.0 if value is None else value, template, partial(refuse, 1e6), scales)
    return Joint(exchanges, weight if any(value is not None for value in values.values()) else 0.0, is_last=True)


def members(*wants: Joint, codec: Codec = Codec.FP32) -> tuple[list[Merging], list[Given]]:
    """A merging for each, and what they give."""
    merging = [Merging(Aggregator(), codec, Arena.make()) for _ in wants]
    given = []
    for peer, each, want in zip(PEERS, merging, wants, strict=False):
        data = each.offer(want)
        if data is not None:
            given.append(Given(peer, want.weight, data))
    return merging, given


def test_each_section_is_merged_of_those_that_gave_it_by_their_weight_in_it() -> None:
    """Of two policies, one is trained by two members and the other by one; all hold the same of both."""
    merging, given = members(
        wanted({"a": 1.0, "b": None}), wanted({"a": 3.0, "b": 2.0}), wanted({"a": None, "b": None})
    )
    assert [each.author for each in given] == PEERS[:2]
    for each in merging:
        rejected: list[PeerId] = []
        merged = each.merge(given, rejected)
        assert not rejected
        np.testing.assert_array_equal(merged["a"]["mean/x"], np.full(3, (1 * 1 + 3 * 3) / 4, np.float32))
        assert merged["a"]["each/votes"].shape == (2, 2)
        np.testing.assert_array_equal(merged["b"]["mean/x"], np.full(3, 2.0, np.float32))


def test_who_lies_in_one_section_is_left_out_of_all() -> None:
    """By the section's own check, by what it looks like beside the others, and by its form."""
    honest = wanted({"a": 1.0, "b": 1.0})
    for lie in (wanted({"a": 1.0, "b": 1e7}), wanted({"a": 1.0, "b": 100.0}), wanted({"a": 1.0, "c": 1.0})):
        merging, given = members(honest, honest, lie)
        rejected: list[PeerId] = []
        merged = merging[0].merge(given, rejected)
        assert rejected == [PEERS[2]]
        assert {len(each["each/votes"]) for each in merged.values()} == {2}


def test_what_nobody_gave_is_absent_and_nothing_at_all_is_an_error() -> None:
    """A policy that nobody trained stays as it is."""
    merging, given = members(wanted({"a": 1.0, "b": None}), wanted({"a": 1.0, "b": None}))
    assert merging[0].merge(given, []).keys() == {"a"}
    with pytest.raises(NothingToMergeError):
        merging[0].merge([], [])


@pytest.mark.parametrize("codec", WRITTEN)
def test_every_codec_carries_sections(codec: Codec) -> None:
    """Each with a memory of its own."""
    merging, given = members(wanted({"a": 1.0, "b": 2.0}), wanted({"a": 1.0, "b": 2.0}), codec=codec)
    answers = [each.merge(given, []) for each in merging]
    for each in merging:
        each.settle(arrived=True)
    first, second = answers
    assert first.keys() == second.keys() == {"a", "b"}
    for name in first:
        np.testing.assert_array_equal(first[name]["mean/x"], second[name]["mean/x"])
