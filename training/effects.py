"""What a learner and a stage want from the world: they yield an effect, and are sent its answer.

Whoever drives them owns time and the network, and they own neither. In a swarm the node answers; a process alone
answers by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid
from shoal.training.exchange.averager import Arrays
from shoal.training.rollouts.packed import Columns
from shoal.training.rollouts.shard import Head
from shoal.training.scored import check_probes
from shoal.training.statements import MAX_TOPIC_CHARS
from shoal.training.tasks.play import Take
from shoal.training.tasks.source import Plain


@dataclass(frozen=True, slots=True)
class Post:
    """Let all members have something. The answer: its CID, or None if this node has no room for it.

    Of what a member posts the newest `shoal.training.statements.MAX_POSTED` can be had, as long as it or somebody who
    read it is there.

    Attributes:
        topic: under which others ask for it.
        arrays: by name.
        meta: what describes them.

    Raises:
        UsageError: if the topic is none.
    """

    topic: str
    arrays: Arrays
    meta: dict[str, Plain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_topic(self.topic)


@dataclass(frozen=True, slots=True)
class Latest:
    """Ask for what members have posted. The answer: `shoal.training.tasks.source.Posted`, newest first; maybe nothing.

    What others posted is what they like: whoever reads it checks it.

    Attributes:
        topic: under which it was posted.
        count: at most so many.
        max_age: in epochs; none: however old.
    """

    topic: str
    count: int = 16
    max_age: int | None = None

    def __post_init__(self) -> None:
        check_topic(self.topic)


@dataclass(frozen=True, slots=True)
class Scores:
    """Ask what members have signed of their probes. The answer: `shoal.training.scored.Scored`, by probe and epoch.

    Members may hold different ones at a moment, as each hears of them in its own time. So nothing that all have to
    compute alike may follow from them: a reward of the own takes may, or what is played next; a check of what others
    give may not.

    Attributes:
        probes: by name.
        since: the first epoch.

    Raises:
        UsageError: if the probes are none, or too many.
    """

    probes: tuple[str, ...]
    since: int = 0

    def __post_init__(self) -> None:
        check_probes(self.probes)


@dataclass(frozen=True, slots=True, eq=False)
class Give:
    """Let the others learn from what was played here. The answer: the shard's CID, or None if there is no room for it.

    Attributes:
        head: of the shard, without ``columns`` and ``digest``.
        columns: of it.
    """

    head: Head
    columns: Columns


Effect: TypeAlias = Post | Latest | Scores | Give
"""What an update asks for beside averages; nobody else is in step with it."""


def check_topic(topic: str) -> None:
    """Check what something is posted under.

    Raises:
        UsageError: if it can be no topic.
    """
    if not 1 <= len(topic) <= MAX_TOPIC_CHARS or not topic.isprintable():
        raise UsageError(f"a topic has 1 to {MAX_TOPIC_CHARS} printable characters, not {topic[:80]!r}")


@dataclass(frozen=True, slots=True)
class Consult:
    """Ask another member, or a person, what to do. The answer: one act for each take, or None if nobody answered.

    Whoever answers this has a deadline: the plays of these takes wait for it, and nothing else does.

    Attributes:
        part: which part of the swarm plays it.
        policy: by which of its policies; none: a person.
        takes: with the sights that wait for acts.
        seconds: for the answer; none: as long as a policy of another member has.
        falls_back: whether somebody else plays on where none comes.
    """

    part: str
    policy: str | None
    takes: tuple[Take, ...]
    seconds: float | None = None
    falls_back: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have a content, by its CID, from whoever gives it. The answer: `Fetched`, or None where there is nobody to ask.

    Attributes:
        cid: of the content.
        max_bytes: a larger one is refused before any of it comes.
        waits: whether nothing can be played without it, so that there is no hurry to go on.
    """

    cid: Cid
    max_bytes: int
    waits: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of it.

    Attributes:
        data: the content; none: nobody gives it now, which may change.
        refusal: why it can never be had so; empty: it can.
    """

    data: bytes | None
    refusal: str = ""


Wanted: TypeAlias = Consult | Fetch
"""What plays ask for."""
