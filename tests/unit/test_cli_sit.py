"""``shoal sit``: what a person is shown, and what of what they type is an act."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from shoal.cli import sit as sitting
from shoal.node.api.requests import AnswerAsk
from shoal.node.api.schemas import ActsInfo, AskInfo
from shoal.protocol.errors import UsageError
from shoal.protocol.signing import Signer

PEER = Signer(bytes([1]) * 32).peer_id


def ask(number: int = 7, sight: Any = (0.5, 1), kind: str = "discrete", size: int = 4, **more: Any) -> AskInfo:
    """One that waits."""
    shown = sight if isinstance(sight, str) else list(sight)
    acts = ActsInfo(kind=kind, size=size)
    return AskInfo(id=number, peer=PEER, role="player_1", sight=shown, acts=acts, seconds_left=42, **more)


class FakeClient:
    """A node that asks so much, and then has ended."""

    def __init__(self, *asks: AskInfo) -> None:
        self.left = list(asks)
        self.done: list[object] = []
        self.phase = "done"

    def asks(self, swarm: str, wait_s: float = 0.0) -> list[AskInfo]:
        """What is left."""
        return list(self.left)

    def answer_ask(self, swarm: str, request: AnswerAsk) -> None:
        """Only 1 and 3 are legal."""
        if request.act not in (1, 3):
            raise UsageError("act is not legal now; answer with one of 1, 3")
        self.done.append((request.id, request.act))
        self.left = [each for each in self.left if each.id != request.id]

    def swarm(self, swarm: str) -> Any:
        """How it is."""
        return self


def test_what_is_asked_is_shown_in_words() -> None:
    """Of every kind; text of another node's cannot move the cursor."""
    words = sitting.shown(ask(legal=[1, 3], turn=2), 3)
    for part in ("player_1, turn 3: 42 s to answer; 3 more wait", "you see: 0.5  1", "you may: 1 3"):
        assert part in words
    assert len(sitting.shown(ask(legal=list(range(1000)), size=1000), 0)) < 400
    assert "2 numbers" in sitting.shown(ask(kind="continuous", size=2), 0)
    words = sitting.shown(ask(sight="say\x1b[2J\r\x07 it\nnow", kind="text", size=8, tag="\x1b]0;x\x07"), 0)
    assert "say\N{REPLACEMENT CHARACTER}[2J" in words
    assert "it\nnow" in words
    assert all(char.isprintable() or char == "\n" for char in words)


def test_what_is_typed_is_read_as_the_role_acts() -> None:
    """Or asked for again."""
    assert sitting.act_of(ask(), " 3 ") == 3
    assert sitting.act_of(ask(kind="continuous", size=2), "0.5, -1") == [0.5, -1.0]
    assert sitting.act_of(ask(kind="text"), "hello there") == "hello there"
    with pytest.raises(UsageError, match="'three' is not a whole number"):
        sitting.act_of(ask(), "three")
    with pytest.raises(UsageError, match="is not 2 numbers"):
        sitting.act_of(ask(kind="continuous", size=2), "0.5 x")


def test_at_a_terminal_a_wrong_answer_is_asked_for_again(monkeypatch: Any, capsys: Any) -> None:
    """Until the run is over, or the person gets up."""
    client: Any = FakeClient(ask(7, legal=[1, 3]), ask(8, legal=[1, 3]))
    typed = iter(["two", "2", "3", "1"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    sitting._at_terminal(client, "swarm")
    assert client.done == [(7, 3), (8, 1)]
    shown = capsys.readouterr().out
    for words in ("'two' is not a whole number", "answer with one of 1, 3", "the run is over: done"):
        assert words in shown


def test_with_json_each_ask_is_a_line_once_and_each_line_an_answer(monkeypatch: Any, capsys: Any) -> None:
    """What is no answer gets a line that says so."""
    client: Any = FakeClient(ask(7, legal=[1, 3]))
    monkeypatch.setattr(sitting, "LOOK_S", 0.01)
    lines = ["nonsense\n", "[]\n", "\n", '{"id": 7, "act": 2}\n', '{"id": 7, "act": 3}\n']
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(lines)))
    sitting._by_lines(client, "swarm")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = [each for each in said if "accepted" in each]
    assert [each["accepted"] for each in answers] == [False, False, False, True]
    assert "act is not legal" in answers[2]["error"]
    assert len([each for each in said if "role" in each]) <= 1
    assert client.done == [(7, 3)]
