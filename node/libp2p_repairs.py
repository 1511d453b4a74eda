"""Repairs of the libp2p package, each with its upstream symptom, kept in one place.

They are made for one version of the package and refuse to touch another, so that an upgrade has to look at them.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Final

import libp2p.network.swarm

log = logging.getLogger(__name__)

REPAIRED_VERSION: Final = "0.8.1"


def apply_repairs() -> None:
    """Repair the installed libp2p; does nothing, and says so, if its version is another than `REPAIRED_VERSION`."""
    version = importlib.metadata.version("libp2p")
    if version != REPAIRED_VERSION:
        log.warning("libp2p is %s, not %s: its repairs are left out", version, REPAIRED_VERSION)
        return
    _dial_without_waiting_for_the_race()


def _dial_without_waiting_for_the_race() -> None:
    # Symptom: every successful dial takes 250 ms longer than it must. The event that ends the happy-eyeballs wait
    # (RFC 8305) is only set when an attempt fails.
    libp2p.network.swarm._HAPPY_EYEBALLS_DELAY = 0.0
