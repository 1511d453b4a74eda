"""``shoal sit``: take the seat of a person in the games of others, at a terminal or by a program."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, Final

import typer
from pydantic import BaseModel, ValidationError

from shoal.cli.common import INTERRUPTED, AsJson, OptionalSwarm, Profile, connect, print_json
from shoal.cli.render import ENDED
from shoal.node.api.client import Client
from shoal.node.api.requests import AnswerAsk
from shoal.node.api.schemas import AskInfo
from shoal.protocol.errors import ShoalError, UsageError

WAIT_S: Final = 20.0
"""For something to be asked, before it is looked whether the run has ended."""
LINES_WAIT_S: Final = 1.0
"""The same with --json, where the end of the answers is to be noticed too."""
LOOK_S: Final = 0.5
"""Between two looks while something waits for an answer."""
MAX_SHOWN: Final = 40


def sit(swarm: OptionalSwarm = None, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Play the part of a person: shows what others ask, and takes answers.

    This node's part has to be one that people play (`shoal join TICKET --part PART`). At a terminal, type an act and
    press Enter; Ctrl-D or Ctrl-C gets up. With --json each ask is a line of JSON on stdout, and each line on stdin is
    an answer: {"id": 7, "act": 2}.
    """
    with connect(profile) as client:
        name = client.swarm(client.the_swarm(swarm)).swarm
        try:
            _by_lines(client, name) if as_json else _at_terminal(client, name)
        except KeyboardInterrupt:
            typer.echo("\ngot up; plays that wait for you go on by themselves when their time is over", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _at_terminal(client: Client, swarm: str) -> None:
    typer.echo("waiting to be asked; Ctrl-D gets up")
    while True:
        asks = client.asks(swarm, WAIT_S)
        if not asks:
            phase = client.swarm(swarm).phase
            if phase in ENDED:
                typer.echo(f"the run is over: {phase}")
                return
            continue
        typer.echo(shown(asks[0], len(asks) - 1))
        try:
            words = input("> ")
        except EOFError:
            typer.echo()
            return
        try:
            client.answer_ask(swarm, AnswerAsk(id=asks[0].id, act=act_of(asks[0], words)))
        except UsageError as error:
            typer.echo(str(error))


def shown(ask: AskInfo, num_more: int) -> str:
    """An ask in words: who asks, what the role sees, and what it can do."""
    tag = f", {_plain(ask.tag)}" if ask.tag else ""
    more = f"; {num_more} more wait" if num_more else ""
    lines = [f"\n{ask.role}, turn {ask.turn + 1}{tag}: {ask.seconds_left:.0f} s to answer{more}"]
    sight = _plain(ask.sight) if isinstance(ask.sight, str) else "  ".join(f"{each:g}" for each in ask.sight)
    lines.append(f"  you see: {sight}")
    match ask.acts.kind:
        case "discrete":
            legal = ask.legal or []
            rest = f" … {legal[-1]}" if len(legal) > MAX_SHOWN else ""
            lines.append(f"  you may: {' '.join(map(str, legal[:MAX_SHOWN]))}{rest}")
        case "continuous":
            lines.append(f"  you do: {ask.acts.size} numbers, most of them from -1 to 1")
        case _:
            lines.append(f"  you say: up to {ask.acts.size} characters")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text of another node's, of which nothing moves the cursor or changes the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def act_of(ask: AskInfo, words: str) -> int | list[float] | str:
    """What somebody typed, as the role acts.

    Raises:
        UsageError: if it is no number where numbers are wanted.
    """
    try:
        match ask.acts.kind:
            case "discrete":
                return int(words)
            case "continuous":
                return [float(each) for each in words.replace(",", " ").split()]
            case _:
                return words
    except ValueError as error:
        wanted = "a whole number" if ask.acts.kind == "discrete" else f"{ask.acts.size} numbers, with spaces in between"
        raise UsageError(f"{words[:40]!r} is not {wanted}; try again") from error


def _by_lines(client: Client, swarm: str) -> None:
    """Asks as lines of JSON, until the answers end or the run does."""
    has_ended = threading.Event()
    threading.Thread(target=_take_answers, args=(client, swarm, has_ended), daemon=True).start()
    last = 0
    while not has_ended.is_set():
        asks = client.asks(swarm, LINES_WAIT_S)
        for ask in asks:
            if ask.id > last:
                _say(ask)
                last = ask.id
        if asks:
            time.sleep(LOOK_S)
        elif (phase := client.swarm(swarm).phase) in ENDED:
            _say({"ended": phase})
            return


def _take_answers(client: Client, swarm: str, has_ended: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip():
            _say(_answered(client, swarm, line))
    has_ended.set()


_OUT: Final = threading.Lock()


def _say(value: BaseModel | dict[str, Any]) -> None:
    """One line, whole."""
    with _OUT:
        print_json(value)


def _answered(client: Client, swarm: str, line: str) -> dict[str, Any]:
    """What came of one line of answers."""
    try:
        said = AnswerAsk.model_validate(json.loads(line))
    except (ValidationError, ValueError) as error:
        words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        return {"id": None, "accepted": False, "error": f'{words}; an answer is {{"id": 7, "act": 2}}'}
    try:
        client.answer_ask(swarm, said)
    except ShoalError as error:
        return {"id": said.id, "accepted": False, "error": str(error)}
    return {"id": said.id, "accepted": True}
