"""What a training run is: a signed, content-addressed manifest. Its CID is the swarm's name.

It names a task and an algorithm that the reader has installed; code never travels. Changing one byte makes
another swarm, so all who hold the same `SwarmId` train the same thing.

A manifest is read strictly: a field that is not known here could change what members compute, and a member that
ignored it would merge otherwise than the rest and split the swarm. For the same reason it says which versions of what
it names a member must have (`training.requirements`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import TooLargeError, UnknownFieldError, UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.protocol.limits import MAX_HEADER_BYTES
from shoal.protocol.signing import Signed, Signer
from shoal.training.batch import Batch
from shoal.training.env_arguments import check_arguments
from shoal.training.exchange.rules import WRITTEN, Aggregator, Codec

KIND: Final = "manifest/1"
MAX_NAME_CHARS: Final = 80
MAX_REQUIREMENTS: Final = 64
MAX_VERSION: Final = 2**31 - 1
MAX_BATCH: Final = 2**31
MAX_STALENESS: Final = 64
LOOP_SCHEME: Final = "loop"
"""Of the task of a run whose members bring training loops of their own (`training.loop`): ``loop:digits``."""
LOOP_ALGORITHM: Final = "average"
"""Theirs: what each made of the parameters is averaged, and how it did that is its own business."""
RECIPE_SCHEME: Final = "recipe"
"""Of the task, and the algorithm, of a run of a recipe (`training.recipes`): ``recipe:rlccf``."""
LOOP_MAX_SAMPLES: Final = 2**50
"""How long such a run goes on unless its manifest says otherwise: without end, as far as anybody can see."""


class Mode(StrEnum):
    """What peers exchange, and when (DESIGN §8)."""

    LOCAL = "local"
    """Every epoch each peer optimises on its own samples, then parameters and optimiser state are averaged."""

    GRADIENT = "gradient"
    """The gradient of every minibatch is averaged, so that N peers equal one process with the joint batch."""

    DILOCO = "diloco"
    """As ``local``, but only how far the parameters came is exchanged, and an outer optimiser steps by its average."""

    ROLLOUTS = "rollouts"
    """As ``local``, of what actors collected as well: they give shards of it, which learners learn from."""


class Role(StrEnum):
    """What a node does in a swarm."""

    LEARNER = "learner"
    """Collects experience, optimises, evaluates, exchanges."""

    ACTOR = "actor"
    """Acts by the newest policy and gives what came of it to the learners, in mode ``rollouts``; needs no torch."""

    EVALUATOR = "evaluator"
    """Evaluates the newest policy again and again, so that no learner has to."""

    STORAGE = "storage"
    """Keeps and serves the shared state and the newest policy; needs no torch."""


class Evaluators(StrEnum):
    """Who evaluates, each time that it is due."""

    ONE = "one"
    """One of those who made the policy, by turns."""

    ALL = "all"
    """Each of them: where policies are the nodes' own, nobody else can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One training run.

    Attributes:
        owner: who started it.
        task: ``scheme:name``, for example ``gym:CartPole-v1``.
        algorithm: for example ``ppo``.
        hyperparameters: the algorithm's own settings; what is absent takes the algorithm's default for the task.
        env_arguments: what the task's environments are made with, beside their own defaults; see
            `training.env_arguments`.
        seed: from which every member derives its own.
        mode: what is exchanged.
        aggregator: by which rule contributions become one; see `training.exchange.rules`.
        codec: what contributions travel as; see `training.exchange.codecs`.
        batch_per_learner: environment steps that the fastest learner collects per epoch; the others collect what they
            manage in the same time.
        batch_size: environment steps that all learners together collect per epoch at most; no such bound, if None.
        min_learners: the first epoch waits until this many learners are there.
        target_return: the run is done when the mean evaluation return reaches it; never, if None.
        eval_episodes: episodes per evaluation.
        eval_interval: epochs between evaluations.
        evaluators: who does it; if all, then the first epoch too, to begin from.
        max_env_steps: the run ends, unsolved, after this many steps by all learners together.
        name: for people; may be empty, and the same in any number of runs.
        created_at: Unix seconds by the owner's clock; tells apart runs that are alike.
        max_staleness: in mode ``rollouts``: how many policy versions old what others collected may be.
        foreign_ratio: likewise: the most of what an update is made from that others may have collected.
        check_rate: likewise: the least part of an actor's shards that a learner replays to see whether they are true;
            of an actor that it does not know yet, all are. 0: none ever.
        requires: what a member must have, and of which version; see `training.requirements`.
        version: of this schema.
    """

    owner: PeerId
    task: str
    algorithm: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    env_arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    mode: Mode = Mode.LOCAL
    aggregator: str = "mean"
    codec: Codec = Codec.FP32
    batch_per_learner: int = 2048
    batch_size: int | None = None
    min_learners: int = 1
    target_return: float | None = None
    eval_episodes: int = 20
    eval_interval: int = 2
    evaluators: Evaluators = Evaluators.ONE
    max_env_steps: int = 10_000_000
    max_staleness: int = 4
    foreign_ratio: float = 0.9
    check_rate: float = 0.05
    name: str = ""
    created_at: int = 0
    requires: dict[str, int] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self) -> None:
        if ":" not in self.task:
            raise UsageError(
                f"task {self.task!r:.80} needs a scheme; for a Gymnasium environment write {'gym:' + self.task!r:.80}"
            )
        if self.is_loop != (self.algorithm == LOOP_ALGORITHM):
            raise UsageError(
                f"the algorithm {LOOP_ALGORITHM!r} is for training loops of one's own, and for nothing else: take it "
                f"together with a task such as {LOOP_SCHEME}:digits"
            )
        if self.is_loop and self.mode is Mode.GRADIENT:
            raise UsageError("training loops average parameters, not gradients; take the mode local or diloco")
        if self.is_loop and self.target_return is not None:
            raise UsageError("a training loop has no return that Shoal could measure; leave the target return out")
        if not self.is_loop and self.codec is Codec.AUTO:
            raise UsageError(f"the codec auto is for training loops of one's own; choose one of {', '.join(WRITTEN)}")
        if self.env_arguments and self.is_loop:
            raise UsageError("a training loop makes its own environments; leave the environment's arguments out")
        check_arguments(self.env_arguments)
        Aggregator.parse(self.aggregator)
        if self.batch_size is not None and not 1 <= self.batch_size <= MAX_BATCH:
            raise UsageError(f"batch size must be between 1 and {MAX_BATCH}, not {self.batch_size}")
        for name, low, high in (
            ("batch_per_learner", 1, MAX_BATCH),
            ("min_learners", 1, 256),
            ("eval_episodes", 1, 10_000),
            ("eval_interval", 1, 1_000_000),
            ("max_env_steps", 1, 2**62),
            ("seed", 0, 2**32 - 1),
            ("max_staleness", 0, MAX_STALENESS),
            ("foreign_ratio", 0, 1),
            ("check_rate", 0, 1),
            ("created_at", 0, 2**53),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name.replace('_', ' ')} must be between {low} and {high}, not {value}")
        if len(self.name) > MAX_NAME_CHARS or not self.name.isprintable():
            raise UsageError(f"a run's name is at most {MAX_NAME_CHARS} printable characters, not {self.name[:90]!r}")
        if len(self.requires) > MAX_REQUIREMENTS:
            raise UsageError(f"a manifest names at most {MAX_REQUIREMENTS} requirements, not {len(self.requires)}")
        for name, version in self.requires.items():
            if not 0 <= version <= MAX_VERSION:
                raise UsageError(f"the version of {name[:80]!r} must be between 0 and {MAX_VERSION}, not {version}")
        if self.version != 1:
            raise UsageError(f"this manifest is of version {self.version}; update Shoal to join it")

    @property
    def is_loop(self) -> bool:
        """Whether each member's learner is a training loop of its own, which attaches to its node."""
        return self.task.partition(":")[0] == LOOP_SCHEME

    @property
    def is_recipe(self) -> bool:
        """Whether a recipe is learned."""
        return self.task.partition(":")[0] == RECIPE_SCHEME

    @property
    def batch(self) -> Batch:
        """How much goes into an epoch."""
        return Batch(self.batch_per_learner, self.batch_size)

    @property
    def most_foreign(self) -> int:
        """Environment steps that a learner's update takes of what others collected, at most: no shard is larger."""
        return round(self.foreign_ratio * self.batch.largest_share)


def sign_manifest(manifest: Manifest, signer: Signer) -> tuple[SwarmId, bytes]:
    """The swarm's name and the bytes that it names.

    Raises:
        UsageError: if the signer is not the owner.
        TooLargeError: if nobody could open it because it is too big.
    """
    if manifest.owner != signer.peer_id:
        raise UsageError("a manifest is signed by its owner")
    data = encode(signer.seal(KIND, encode(manifest)))
    if len(data) > MAX_HEADER_BYTES:
        raise TooLargeError(
            f"a manifest of {len(data)} bytes exceeds the {MAX_HEADER_BYTES}; set fewer hyper-parameters"
        )
    return SwarmId.of_manifest(data), data


def open_manifest(swarm: SwarmId, data: bytes) -> Manifest:
    """Check bytes that somebody sent as the manifest of ``swarm``, and read them.

    Raises:
        UsageError: if these are not the bytes that the name stands for, or say something that only a newer version
            understands.
        SignatureError: if the owner did not sign them.
        ProtocolError: if they are not a manifest.
    """
    if not swarm.matches(data):
        raise UsageError(f"these bytes are not the manifest of {swarm}")
    try:
        signed = decode(Signed, data, max_bytes=MAX_HEADER_BYTES, strict=True)
        signed.check(KIND)
        manifest = decode(Manifest, signed.payload, max_bytes=MAX_HEADER_BYTES, strict=True)
    except UnknownFieldError as error:
        raise UsageError(f"this run was started by a newer Shoal ({error}); update Shoal to join it") from error
    if manifest.owner != signed.author:
        raise UsageError(f"the manifest of {swarm} names {manifest.owner} as owner but {signed.author} signed it")
    return manifest
