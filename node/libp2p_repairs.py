"""Repairs of the libp2p package, each with its upstream symptom, kept in one place.

They are made for one version of the package and refuse to touch another, so that an upgrade has to look at them.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Final

import libp2p.network.swarm
import trio
from libp2p.stream_muxer.yamux.yamux import YamuxStream

log = logging.getLogger(__name__)

REPAIRED_VERSION: Final = "0.8.1"


def apply_repairs() -> None:
    """Repair the installed libp2p; does nothing, and says so, if its version is another than `REPAIRED_VERSION`."""
    version = importlib.metadata.version("libp2p")
    if version != REPAIRED_VERSION:
        log.warning("libp2p is %s, not %s: its repairs are left out", version, REPAIRED_VERSION)
        return
    _dial_without_waiting_for_the_race()
    _hold_peers_to_their_windows()


def _dial_without_waiting_for_the_race() -> None:
    # Symptom: every successful dial takes 250 ms longer than it must. The event that ends the happy-eyeballs wait
    # (RFC 8305) is only set when an attempt fails.
    libp2p.network.swarm._HAPPY_EYEBALLS_DELAY = 0.0


class _WindowExceededError(trio.TooSlowError):
    """A peer sent more than it was allowed to; of the class at which libp2p's muxer closes a connection."""


def _hold_peers_to_their_windows() -> None:
    # Symptom: a peer that ignores yamux's flow control fills the memory of this node by a stream that is not read as
    # fast: the muxer logs "peer exceeded receive window", for each frame anew, and keeps the bytes.
    def set_window(stream: YamuxStream, num_bytes: int) -> None:
        if num_bytes < 0:
            log.warning("%s sends more than it may; its connection is closed", stream.conn.peer_id)
            raise _WindowExceededError
        vars(stream)["recv_window"] = num_bytes

    window = property(lambda stream: vars(stream)["recv_window"], set_window)
    YamuxStream.recv_window = window  # type: ignore[assignment]  # an attribute of each stream, seen by this from now on
