"""What a learner and a stage want from the world: they yield an effect, and are sent its answer.

Whoever drives them owns time and the network, and they own neither. In a swarm the node answers; a process alone
answers by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.training.tasks.play import Take


@dataclass(frozen=True, slots=True)
class Consult:
    """Ask another member, or a person, what to do. The answer: one act for each take, or None if nobody answered.

    Whoever answers this has a deadline: the plays of these takes wait for it, and nothing else does.

    Attributes:
        part: which part of the swarm plays it.
        policy: by which of its policies; none: a person.
        takes: with the sights that wait for acts.
    """

    part: str
    policy: str | None
    takes: tuple[Take, ...]
