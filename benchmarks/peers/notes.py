"""What a person wrote below the table of a result."""

from __future__ import annotations

from pathlib import Path


def kept_notes(result: Path, heading: str) -> str:
    """The part of a result that begins with this heading, with it, as the last run left it; empty if there is none."""
    _, found, notes = (result.read_text(encoding="utf-8") if result.exists() else "").partition(heading)
    return found + notes
