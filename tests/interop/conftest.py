"""js-libp2p, installed once for all tests that need it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .js import install


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where js-libp2p is installed; skips what needs it, with the reason, where it cannot be."""
    return install()
