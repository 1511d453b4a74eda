"""How far one node is with a run: what a person asks about, and what the other members are told of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from shoal.crdt.views import Contributed, Evaluation
from shoal.protocol.ids import PeerId
from shoal.training.manifest import Role
from shoal.training.run_events import Collected, Policy
from shoal.training.statements import MAX_RATE, Facts, Phase, Wait

FACTS_GAP_S: Final = 2.0
"""Between two reports of progress, in a small swarm; as many reports reach a member of a large one."""
FACTS_PEERS: Final = 16
FEW: Final = 32
"""Live members up to which others are told at once of each thing that they act by; of many, nobody waits for one."""
MAX_RECENT: Final = 20
RATE_WINDOW_S: Final = 6.0

BUSY: Final = frozenset({Phase.STARTING, Phase.STORING, Phase.DONE, Phase.FAILED})
"""Phases in which a member is not about to offer anything."""


@dataclass(slots=True)
class Progress:
    """One node's own progress.

    Attributes:
        policy: what this node holds and goes on from.
        samples: environment steps collected for the next update.
        rounds: epochs that were averaged, and how many of those with others, and how many in earlier lives.
        own_env_steps: by this node, in all.
        steps_per_s: pauses included; ``speed`` while it collects.
        is_following: whether this learner takes no part in the rounds, so as not to slow the others.
        lost_env_steps: of the own part of the swarm, given up for a policy of another part.
        rejected: members whose contributions were left out as malformed or absurd, and how often.
        metrics: of the last update.
        wait: what for, while the phase is ``waiting``.
        stands_by: whether this node would learn if it were needed.
    """

    policy: Policy | None = None
    phase: Phase = Phase.STARTING
    step: int = 0
    samples: int = 0
    rounds: int = 0
    shared_rounds: int = 0
    rounds_before: int = 0
    own_env_steps: int = 0
    steps_per_s: float = 0.0
    speed: float = 0.0
    solved: bool = False
    final: Evaluation | None = None
    is_alone: bool = False
    is_following: bool = False
    lost_env_steps: int = 0
    rejected: dict[PeerId, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    part: str = ""
    wait: Wait = Wait.NOTHING
    stands_by: bool = False
    recent_returns: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))
    _still_s: float = 0.0
    _rate_since: float = 0.0
    _rate_steps: int = 0
    _said: Facts | None = None
    _said_at: float = -float("inf")
    _told: tuple[object, ...] = ()

    @property
    def epoch(self) -> int:
        """Of the policy that this node holds; 0 if it holds none."""
        return 0 if self.policy is None else self.policy.epoch

    @property
    def has_made_nothing(self) -> bool:
        """Whether this node, in this life, made no policy yet."""
        return self.rounds == self.rounds_before

    def wait_for(self, what: Wait) -> None:
        """There is nothing to do until this comes."""
        self.phase, self.wait = Phase.WAITING, what

    def count_on(self, own: Contributed) -> None:
        """Go on counting from what this node's document says, where that is more than what was kept on this disk."""
        self.own_env_steps = max(self.own_env_steps, own.env_steps)
        more = max(own.rounds - self.rounds, 0)
        self.rounds += more
        self.rounds_before += more

    def collected(self, event: Collected, now: float) -> None:
        """The worker collected."""
        self.samples = event.total
        self.own_env_steps += event.samples
        self.recent_returns.extend(event.episode_returns)
        self._still_s += event.seconds  # a slow step of a loop is longer than many a call
        if event.samples and self._still_s > 0:
            speed = event.samples / self._still_s
            self.speed = speed if self.speed == 0 else 0.8 * self.speed + 0.2 * speed
            self._still_s = 0.0
        if not self._rate_since:
            self._rate_since = now - event.seconds
        self._rate_steps += event.samples
        elapsed = now - self._rate_since
        if elapsed > RATE_WINDOW_S:
            half = RATE_WINDOW_S / 2
            self._rate_since, self._rate_steps = now - half, int(self._rate_steps * half / elapsed)
        self.steps_per_s = self._rate_steps / max(now - self._rate_since, 0.5)

    def facts(self, role: Role, epoch: int) -> Facts:
        """What this node says of itself."""
        return Facts(
            role=role,
            phase=self.phase,
            epoch=epoch,
            step=self.step,
            samples=self.samples,
            env_steps=self.own_env_steps,
            steps_per_s=0.0 if self.phase is Phase.DONE else round(min(self.steps_per_s, MAX_RATE), 1),
            speed=round(min(self.speed, MAX_RATE), 1),
            part=self.part,
            wait=self.wait if self.phase is Phase.WAITING else Wait.NOTHING,
            stands_by=self.stands_by,
        )

    def to_tell(self, role: Role, epoch: int, num_live: int, now: float) -> Facts | None:
        """What the others are to be told now: at once what they act by, the rest now and then; None if nothing."""
        told = (self.phase, epoch, self.step, self.samples, self.own_env_steps)
        if told == self._told:
            return None
        said, phase = self._said, self.phase
        if now < self._said_at + FACTS_GAP_S * max(1.0, num_live / FACTS_PEERS):
            if said is None or phase is said.phase:
                return None
            if num_live > FEW:  # the gap is long there, and only who takes part is counted and waited for
                is_urgent = (phase in BUSY) != (said.phase in BUSY)
            else:
                begins = self.step == 0 and (said.phase is not Phase.EXCHANGING or said.epoch != epoch)
                is_urgent = phase in BUSY or (phase is Phase.UPDATING and begins)
            if not is_urgent:
                return None
        facts = self.facts(role, epoch)
        self._said, self._said_at, self._told = facts, now, told
        return facts
