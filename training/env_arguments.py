"""What an environment can be told when it is made: ``{"gravity": -9.8, "is_slippery": false}``.

Whoever starts a run says it and the manifest carries it, so all members make the same environment. A manifest comes
from anybody, and an environment is other people's code that may open whatever it is given a name of. So an argument is
a number, a truth, nothing, a short text without a path in it, or a list of these, and lists of lists; there are few,
and all together are short.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from shoal.protocol.errors import UsageError

MAX_ARGUMENTS: Final = 32
MAX_NAME_CHARS: Final = 64
MAX_JSON_BYTES: Final = 4096
"""Of all together."""
MAX_TEXT_CHARS: Final = 256
MAX_NUMBER: Final = 2**53
MAX_DEPTH: Final = 3
_NO_TEXT_HAS: Final = ("/", "\\")
_NO_TEXT_BEGINS: Final = (".", "~")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Hold arguments to what the head says.

    Raises:
        UsageError: if one is something else. One line that names it.
    """
    if len(arguments) > MAX_ARGUMENTS:
        raise UsageError(f"an environment takes at most {MAX_ARGUMENTS} arguments, not {len(arguments)}")
    for name, value in arguments.items():
        if not name.isidentifier() or len(name) > MAX_NAME_CHARS or name.startswith("_"):
            raise UsageError(f"{name[:80]!r} can be no argument of an environment; write a name, such as gravity")
        _check(name, value, MAX_DEPTH)
    size = len(json.dumps(dict(arguments)))
    if size > MAX_JSON_BYTES:
        raise UsageError(f"the environment's arguments are {size} bytes long; {MAX_JSON_BYTES} are allowed")


def _check(name: str, value: Any, depth: int) -> None:
    match value:
        case None | bool():
            return
        case int() if abs(value) <= MAX_NUMBER:
            return
        case float() if math.isfinite(value):
            return
        case str():
            _check_text(name, value)
        case list() | tuple() if depth:
            for each in value:
                _check(name, each, depth - 1)
        case _:
            raise UsageError(
                f"the environment's argument {name} cannot be {value!r:.60}; give a number, true, false, null, a text "
                "or a list of these"
            )


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_TEXT_CHARS or not text.isprintable():
        raise UsageError(f"the environment's argument {name} is no text of up to {MAX_TEXT_CHARS} printable characters")
    if text.startswith(_NO_TEXT_BEGINS) or any(each in text for each in _NO_TEXT_HAS):
        raise UsageError(
            f"the environment's argument {name} looks like a path, {text[:60]!r}; a run leads to no files, since its "
            "members' machines hold others: give a name that the environment itself knows"
        )


def in_words(arguments: Mapping[str, Any]) -> str:
    """Arguments for people: ``gravity=-9.8, is_slippery=false``."""
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
