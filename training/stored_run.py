"""What a node keeps on its disk of a run, to go on with it after a restart."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.protocol.ids import PeerId
from shoal.training.statements import Result


@dataclass(frozen=True, slots=True)
class StoredRun:
    """The newest policy that was held, and what this node put in.

    Attributes:
        result: names the policy and its descent; None if there is none yet.
        env_steps: by this node.
        rounds: that it was part of.
        liars: members whose claims turned out false.
        shunned: members that signed a result that does not follow from what it was made of.
    """

    result: Result | None = None
    env_steps: int = 0
    rounds: int = 0
    liars: tuple[PeerId, ...] = ()
    shunned: tuple[PeerId, ...] = ()
