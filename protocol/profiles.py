"""Where the nodes of this user keep their things: what a program must know to find one that runs on its machine.

A profile is one node's identity and data, and a folder; what is in it is `shoal.node.profile`'s.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import platformdirs

from shoal.protocol.errors import UsageError

API_FILE: Final = "api.json"
"""In the folder of a profile whose node runs: how to reach its API."""

_PROFILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def default_home() -> Path:
    """``$SHOAL_HOME``, or the platform's folder for applications' data.

    Raises:
        UsageError: if there is no such place.
    """
    try:
        named = os.environ.get("SHOAL_HOME") or platformdirs.user_data_dir("shoal", appauthor=False)
        home = Path(named).expanduser()
    except RuntimeError as error:
        nobody = "this user has no home (neither HOME nor an entry in /etc/passwd)"
        raise UsageError(f"{nobody}; set SHOAL_HOME to a folder of its own") from error
    return home.absolute()


def profile_folder(home: Path, profile: str) -> Path:
    """The folder of a profile, be it there or not."""
    return home / "profiles" / profile


def check_profile(name: str) -> str:
    """Check a profile's name, which is also a folder's.

    Raises:
        UsageError: if it is not one.
    """
    if not _PROFILE.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a profile name; use up to 64 letters, digits, '_', '.' and '-', no '.' or '-' first"
        )
    return name
