"""The table of what theory allows, and the list that programs read."""

import json
import re
from pathlib import Path

import pytest

from .expected import LADDER, expected, pairs
from .report import Result, write
from .rules import KINDS, PAIRED


def test_every_pair_of_kinds_is_run_once_and_each_kind_with_itself():
    unordered = {frozenset(pair) for pair in pairs()}
    assert len(unordered) == len(pairs())
    assert unordered == {frozenset((one, other)) for one in KINDS for other in KINDS} | {frozenset([k]) for k in PAIRED}


@pytest.mark.parametrize(("one", "other"), pairs())
def test_what_is_expected_does_not_depend_on_who_calls_and_has_a_reason(one, other):
    assert expected(one, other) == expected(other, one)
    paths = expected(one, other).paths
    assert list(paths) == sorted(paths, key=LADDER.index)
    assert expected(one, other).why


def test_a_better_path_than_expected_is_good_and_a_worse_one_or_none_is_not():
    wanted = expected("port_restricted", "port_restricted")
    assert [path for path in (*LADDER, "", "other") if wanted.is_met_by(path)] == ["direct", "punched", "webrtc"]
    assert not Result("open", "open", connected=False, path="direct").is_good


def test_reasons_are_asked_for_where_a_path_is_good_enough_but_a_better_one_could_be_hoped_for():
    kinds = ("port_restricted", "port_restricted")
    best = {path: Result(*kinds, connected=True, path=path).is_best for path in (*LADDER, "")}
    assert best == {"direct": True, "punched": True, "webrtc": False, "relayed": False, "": False}
    assert Result("symmetric", "symmetric", connected=True, path="relayed").is_best
    assert Result("full_cone", "port_restricted", connected=True, path="punched").is_best, "as good as a direct one"


def test_programs_read_what_is_promised_of_every_pair(tmp_path):
    written = tmp_path / "build" / "lab.json"
    write([Result("open", "symmetric", connected=True, path="direct", first_byte_s=0.1, best_path_s=0.2)], written)
    assert json.loads(written.read_text(encoding="utf-8")) == [
        {
            "a": "open",
            "b": "symmetric",
            "connected": True,
            "path": "direct",
            "expected_path": "direct",
            "first_byte_s": 0.1,
            "best_path_s": 0.2,
        }
    ]


def test_the_documentation_says_what_is_expected_here():
    page = (Path(__file__).resolve().parents[2] / "docs" / "reachability.md").read_text(encoding="utf-8")
    table = page.partition("| pair |")[2].splitlines()
    rows = [line for line in table if re.fullmatch(r"\| [a-z0-9 ]+, [a-z0-9 ]+ \|.*\|", line)]
    told = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]
    meant = []
    for pair in pairs():
        expectation = expected(*pair)
        names = ", ".join(kind.replace("_", " ") for kind in pair)
        meant.append((names, " or ".join(expectation.paths), expectation.why))
    assert told == meant
