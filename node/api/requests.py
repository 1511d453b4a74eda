"""What the local API takes: what is asked of a node, checked before anything behind the API sees it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field, model_validator

from shoal.node.api.schemas import Model, PeerName
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import LOOP_MAX_SAMPLES, LOOP_SCHEME, Evaluators, Manifest, Mode
from shoal.training.statements import MAX_PART_CHARS

_MANIFEST_DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in fields(Manifest)}

MAX_MODEL_NAME_CHARS: Final = 200
MAX_TEXT_CHARS: Final = 8192
MAX_VALUES: Final = 10_000
MAX_DEPTH: Final = 32
MAX_INT: Final = 2**53
"""What every JSON reader takes for the number that was written."""


def _check_plain(value: object) -> None:
    """Raise ValueError for what the wire, the disk or a command line cannot hold."""
    ahead: list[tuple[object, int]] = [(value, 0)]
    count = 0
    while ahead:
        each, depth = ahead.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"should be no deeper than {MAX_DEPTH}, and of no more than {MAX_VALUES} values")
        match each:
            case str():
                if len(each) > MAX_TEXT_CHARS:
                    raise ValueError(f"texts should be of no more than {MAX_TEXT_CHARS} characters")
                if not each.isascii() and any("\ud800" <= char <= "\udfff" for char in each):
                    raise ValueError("a text holds half of a character (a surrogate)")
            case bool():
                pass
            case int() if not -(2**63) <= each < 2**63:
                raise ValueError("whole numbers should fit into 64 bits")
            case float() if not math.isfinite(each):
                raise ValueError("numbers should be finite")
            case dict():
                ahead += [(part, depth + 1) for pair in each.items() for part in pair]
            case list() | tuple():
                ahead += [(part, depth + 1) for part in each]
            case _:
                pass


class Asked(Model):
    """What somebody asks for: refused unless all of it, at whatever depth, can be written down and signed.

    JSON lets pass what nothing behind the API has room for: integers of any size, numbers that are none, half of a
    character, texts and lists without end. Built at once, as FastAPI has it.
    """

    model_config = ConfigDict(defer_build=False)

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        _check_plain(value)
        return value


class BenchRequest(Asked):
    """What to measure.

    Attributes:
        kind: small calls, one large transfer, or both at once.
        peer: a connected node that serves benchmarks.
        size: bytes of one call or transfer.
        concurrency: calls in flight.
        seconds: about how long.
        transport: ``auto`` takes lanes where there is a direct path, ``libp2p`` a libp2p stream.
    """

    kind: Literal["rpc", "stream", "load"]
    peer: PeerName
    size: int = Field(ge=0, le=MAX_INT)
    concurrency: int = Field(default=1, ge=1, le=1024)
    seconds: float = Field(default=5.0, ge=0.1, le=600)
    transport: Literal["auto", "libp2p"] = "auto"


class BenchReduceRequest(Asked):
    """Take part in all-reduces that are measured; every peer is asked the same at the same time.

    Attributes:
        peers: all of them, this node among them, in the same order for everybody.
        numel: of the float32 array.
        codec: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        rounds: that are measured.
        name: of the measurement; another each time.
    """

    name: str = Field(max_length=64)
    peers: list[PeerName] = Field(min_length=2, max_length=64)
    numel: int = Field(ge=1, le=2**28)
    codec: str = "fp32"
    rounds: int = Field(default=5, ge=1, le=1000)


class BenchDhtRequest(Asked):
    """Do one thing in the DHT.

    Attributes:
        kind: put: give a name a content, get: ask what an owner's name stands for, provide: say that this node holds a
            content, find: ask who does.
        name: what is put or got.
        cid: of the content that is put, provided or found.
        owner: of the name that is got.
    """

    kind: Literal["put", "get", "provide", "find"]
    name: str = Field(default="", max_length=64)
    cid: str = Field(default="", max_length=80)
    owner: str = Field(default="", max_length=80)


class PingRequest(Asked):
    """Call a peer once, after connecting to it if need be."""

    peer: str
    """Its name, the beginning of a connected peer's, or a full multiaddr."""


class CreateSwarm(Asked):
    """Start a training run; what is left out takes the manifest's default."""

    task: str
    algorithm: str
    name: str | None = None
    mode: Mode = _MANIFEST_DEFAULTS["mode"]
    aggregator: str = _MANIFEST_DEFAULTS["aggregator"]
    codec: Codec = _MANIFEST_DEFAULTS["codec"]
    batch_per_learner: int | None = None
    """None: the manifest's default; where ``batch_size`` is given, as much."""
    batch_size: int | None = _MANIFEST_DEFAULTS["batch_size"]
    max_staleness: int = _MANIFEST_DEFAULTS["max_staleness"]
    foreign_ratio: float = _MANIFEST_DEFAULTS["foreign_ratio"]
    check_rate: float = _MANIFEST_DEFAULTS["check_rate"]
    min_learners: int = _MANIFEST_DEFAULTS["min_learners"]
    target_return: float | None = None
    """None: the task's own threshold, where it has one."""
    eval_episodes: int = _MANIFEST_DEFAULTS["eval_episodes"]
    eval_interval: int = _MANIFEST_DEFAULTS["eval_interval"]
    max_env_steps: int | None = None
    """None: the manifest's default; without end, where members bring training loops of their own."""
    evaluators: Evaluators = _MANIFEST_DEFAULTS["evaluators"]
    seed: int = _MANIFEST_DEFAULTS["seed"]
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    env_arguments: dict[str, Any] = Field(default_factory=dict)
    """What the task's environments are made with."""
    role: str = "auto"
    part: str = Field(default="", max_length=MAX_PART_CHARS)
    """What this node is in a recipe; empty: what the swarm makes it."""

    @property
    def most_env_steps(self) -> int:
        """After how many steps of all together the run ends."""
        if self.max_env_steps is not None:
            return self.max_env_steps
        default: int = _MANIFEST_DEFAULTS["max_env_steps"]
        return LOOP_MAX_SAMPLES if self.task.startswith(f"{LOOP_SCHEME}:") else default

    @property
    def per_learner(self) -> int:
        """What the fastest learner is to collect per epoch."""
        if self.batch_per_learner is not None:
            return self.batch_per_learner
        default: int = _MANIFEST_DEFAULTS["batch_per_learner"]
        return default if self.batch_size is None else self.batch_size


class AnswerAsk(Asked):
    """A person's answer to an ask."""

    id: int = Field(ge=0, le=MAX_INT)
    act: Any
    """A whole number, a list of numbers or a text, as the role acts."""


class JoinSwarm(Asked):
    """Take part in a run that somebody else started."""

    ticket: str
    role: str = "auto"
    part: str = Field(default="", max_length=MAX_PART_CHARS)
    """What this node is in a recipe; empty: what the swarm makes it."""


class PublishModel(Asked):
    """Take a folder or a file in.

    Attributes:
        path: of it, absolute.
        name: under which others find it, after this node's own name; a name that is there gets a new version.
        tags: words by which others find it.
    """

    path: str = Field(min_length=1, max_length=4096)
    name: str = Field(min_length=1, max_length=MAX_MODEL_NAME_CHARS)
    tags: list[str] = Field(default=[], max_length=32)


class GetModel(Asked):
    """Fetch a model.

    Attributes:
        model: its CID, the name of one that is here, or ``OWNER/NAME[@VERSION]``.
        out: an absolute path of a folder that is not there yet; empty: it is only kept.
        name: what it is to be called here.
        is_pinned: whether it is to stay.
    """

    model: str = Field(min_length=1, max_length=MAX_MODEL_NAME_CHARS)
    out: str = Field(default="", max_length=4096)
    name: str = Field(default="", max_length=MAX_MODEL_NAME_CHARS)
    is_pinned: bool = False
