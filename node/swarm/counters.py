"""What a replica counts of what went wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ReplicaStatistics:
    """Counters since the start.

    Attributes:
        refused_records: presence that was forged, malformed or foreign.
        refused_ops: ops that will never fit.
        refused_answers: of peers that were asked what they hold of presence, and answered nonsense.
        stale: presence older than what is held.
        dropped: what did not fit into the queue of a member that is gone by now.
        failed_pushes: calls that failed, each try counted.
        lost: members that took no pushes any more.
        unheard: connections that came or went without news of it.
        not_stored: batches of ops that could not be written to disk.
    """

    refused_records: int = 0
    refused_ops: int = 0
    refused_answers: int = 0
    stale: int = 0
    dropped: int = 0
    failed_pushes: int = 0
    lost: int = 0
    unheard: int = 0
    not_stored: int = 0
