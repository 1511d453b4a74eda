"""Packages that not everybody has: a game of one says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from shoal.protocol.errors import UsageError


def needed(module: str, game: str, install: str = "shoal[games]") -> Any:
    """A module that one of our own tables names.

    Raises:
        UsageError: if it, or what it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the game {game} needs what is not installed ({reason}); pip install {install!r}") from error
