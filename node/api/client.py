"""The local API's client: blocking, over the Unix socket, with the same types and the same errors as in the node."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from shoal.node.api.asking import Answer, GarbledError, connect
from shoal.node.api.schemas import (
    AskInfo,
    BenchDhtResult,
    BenchReduceResult,
    BenchResult,
    ContentInfo,
    CreatedSwarm,
    DoctorInfo,
    ErrorAnswer,
    Event,
    FetchInfo,
    JoinedSwarm,
    MeshInfo,
    MetricsInfo,
    ModelDetail,
    ModelInfo,
    NatInfo,
    NodeInfo,
    PeerInfo,
    PingResult,
    StateInfo,
    SwarmDetail,
    SwarmSummary,
)
from shoal.protocol.errors import NoDaemonError, NoPeersError, RefusedError, ShoalError, UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from shoal.node.api.requests import (
        AnswerAsk,
        BenchDhtRequest,
        BenchReduceRequest,
        BenchRequest,
        CreateSwarm,
        GetModel,
        JoinSwarm,
        PublishModel,
    )
    from shoal.node.profile import ProfilePaths

T = TypeVar("T")

ANSWER_TIMEOUT_S: Final = 10.0
WORK_TIMEOUT_S: Final = 120.0
"""To create or join a swarm: a manifest is fetched, and a slow machine starts a worker."""
TRANSFER_TIMEOUT_S: Final = 30 * 86_400.0
"""The node says when a transfer has failed; until then it goes on, however large it is."""
SILENCE_TIMEOUT_S: Final = 15.0
"""An event stream beats every half second; a node that is silent for so long hangs."""
MIN_REFRESH_S: Final = 0.1
HTTP_FAILED: Final = 400
"""This status, and any above."""

_ERRORS: Final[dict[int, type[ShoalError]]] = {
    kind.exit_code: kind for kind in (ShoalError, UsageError, NoDaemonError, NoPeersError, RefusedError)
}


class Client:
    """Talks to the node that runs under a profile. Use it in a ``with`` block.

    It, and every method, raises `NoDaemonError` if no node answers, and otherwise what the node answered with.
    """

    def __init__(self, paths: ProfilePaths, profile: str) -> None:
        self._profile = profile
        try:
            record = json.loads(paths.api.read_bytes())
            self.pid = int(record["pid"])
            path = str(record["socket"])
            connect(path, ANSWER_TIMEOUT_S).close()  # the file outlives a node that was killed
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._no_daemon() from error
        self._path = path

    def __enter__(self) -> Self:
        """Use the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Each question has had a connection of its own, which is closed."""

    def node(self) -> NodeInfo:
        """The node itself."""
        return self._ask(NodeInfo, "GET", "/v1/node")

    def peers(self) -> list[PeerInfo]:
        """Whom it is connected to."""
        return self._ask(list[PeerInfo], "GET", "/v1/peers")

    def mesh(self) -> MeshInfo:
        """What it knows of the mesh."""
        return self._ask(MeshInfo, "GET", "/v1/mesh")

    def nat(self) -> NatInfo:
        """How it is reached."""
        return self._ask(NatInfo, "GET", "/v1/nat")

    def doctor(self) -> DoctorInfo:
        """What stands between it and its peers, and what to do about it."""
        return self._ask(DoctorInfo, "GET", "/v1/doctor")

    def ping(self, peer: str) -> PingResult:
        """Call a peer once, after connecting to it if need be."""
        from shoal.node.api.requests import PingRequest

        return self._ask(PingResult, "POST", "/v1/ping", PingRequest(peer=peer), timeout_s=WORK_TIMEOUT_S)

    def metrics(self) -> MetricsInfo:
        """What was called, how often and how fast."""
        return self._ask(MetricsInfo, "GET", "/v1/metrics")

    def bench_reduce(self, request: BenchReduceRequest, *, timeout_s: float) -> BenchReduceResult:
        """Take part in all-reduces that are measured."""
        return self._ask(BenchReduceResult, "POST", "/v1/bench/allreduce", request, timeout_s=timeout_s)

    def bench_dht(self, request: BenchDhtRequest) -> BenchDhtResult:
        """Do one thing in the DHT."""
        return self._ask(BenchDhtResult, "POST", "/v1/bench/dht", request, timeout_s=WORK_TIMEOUT_S)

    def bench(self, request: BenchRequest) -> BenchResult:
        """Measure the wire to a peer."""
        timeout_s = WORK_TIMEOUT_S + 4 * request.seconds
        return self._ask(BenchResult, "POST", "/v1/bench", request, timeout_s=timeout_s)

    def swarms(self) -> list[SwarmSummary]:
        """The swarms that it is in."""
        return self._ask(list[SwarmSummary], "GET", "/v1/swarms")

    def swarm(self, swarm: str) -> SwarmDetail:
        """One of them, by its name or the beginning of it."""
        return self._ask(SwarmDetail, "GET", f"/v1/swarms/{_in_path(swarm)}")

    def manifest(self, swarm: str) -> dict[str, Any]:
        """What a run was made with."""
        return self._ask(dict[str, Any], "GET", f"/v1/swarms/{_in_path(swarm)}/manifest")

    def policy(self, swarm: str) -> bytes:
        """The newest training state that the node holds, as safetensors."""
        with self._request("GET", f"/v1/swarms/{_in_path(swarm)}/policy", None, WORK_TIMEOUT_S) as answer:
            return self._all_of(answer, WORK_TIMEOUT_S)

    def state(self, swarm: str) -> StateInfo:
        """The shared state of one of them."""
        return self._ask(StateInfo, "GET", f"/v1/state/{_in_path(swarm)}")

    def create_swarm(self, request: CreateSwarm) -> CreatedSwarm:
        """Start a run and take part in it."""
        return self._ask(CreatedSwarm, "POST", "/v1/swarms", request, timeout_s=WORK_TIMEOUT_S)

    def join_swarm(self, request: JoinSwarm) -> JoinedSwarm:
        """Take part in a run."""
        return self._ask(JoinedSwarm, "POST", "/v1/swarms/join", request, timeout_s=WORK_TIMEOUT_S)

    def leave_swarm(self, swarm: str) -> str:
        """Leave a swarm; gives its full name."""
        answer = self._ask(dict[str, str], "DELETE", f"/v1/swarms/{_in_path(swarm)}", timeout_s=WORK_TIMEOUT_S)
        return answer["swarm"]

    def asks(self, swarm: str, wait_s: float = 0.0) -> list[AskInfo]:
        """What the person at this node is asked in a swarm; if nothing, wait for so long."""
        path = f"/v1/swarms/{_in_path(swarm)}/asks?wait_s={wait_s:g}"
        return self._ask(list[AskInfo], "GET", path, timeout_s=ANSWER_TIMEOUT_S + wait_s)

    def answer_ask(self, swarm: str, request: AnswerAsk) -> None:
        """Answer one."""
        self._ask(dict[str, int], "POST", f"/v1/swarms/{_in_path(swarm)}/asks", request)

    def models(self) -> list[ModelInfo]:
        """The models that it has."""
        return self._ask(list[ModelInfo], "GET", "/v1/models")

    def search_models(self, word: str) -> list[ModelInfo]:
        """Models with a tag or a name, here and elsewhere."""
        path = f"/v1/models?search={quote(word, safe='', errors='replace')}"
        return self._ask(list[ModelInfo], "GET", path, timeout_s=WORK_TIMEOUT_S)

    def model(self, model: str) -> ModelDetail:
        """One of them, with its files; or one of another node, by its owner's name."""
        return self._ask(
            ModelDetail, "GET", f"/v1/models/{quote(model, safe='', errors='replace')}", timeout_s=WORK_TIMEOUT_S
        )

    def publish_model(self, request: PublishModel) -> ModelInfo:
        """Take a folder in."""
        return self._ask(ModelInfo, "POST", "/v1/models", request, timeout_s=TRANSFER_TIMEOUT_S)

    def get_model(self, request: GetModel) -> FetchInfo:
        """Fetch one; returns when it is there."""
        return self._ask(FetchInfo, "POST", "/v1/models/get", request, timeout_s=TRANSFER_TIMEOUT_S)

    def pin_model(self, model: str, *, is_pinned: bool) -> ModelInfo:
        """Let one stay, or not."""
        verb = "pin" if is_pinned else "unpin"
        return self._ask(ModelInfo, "POST", f"/v1/models/{quote(model, safe='', errors='replace')}/{verb}")

    def remove_model(self, model: str) -> ContentInfo:
        """Forget one."""
        return self._ask(
            ContentInfo, "DELETE", f"/v1/models/{quote(model, safe='', errors='replace')}", timeout_s=WORK_TIMEOUT_S
        )

    def collect_models(self) -> ContentInfo:
        """Forget those that are not pinned."""
        return self._ask(ContentInfo, "POST", "/v1/content/gc", timeout_s=WORK_TIMEOUT_S)

    def content(self) -> ContentInfo:
        """What contents take on disk, and what is on its way."""
        return self._ask(ContentInfo, "GET", "/v1/content")

    def stop(self) -> int:
        """Begin to end the node; gives its process id."""
        return self._ask(dict[str, int], "POST", "/v1/node/stop")["pid"]

    def the_swarm(self, swarm: str | None) -> str:
        """The swarm that is meant: the one named, or the only one there is.

        Raises:
            UsageError: if none is named and there is none or more than one.
        """
        if swarm is not None:
            return swarm
        known = self.swarms()
        if len(known) == 1:
            return known[0].swarm
        if not known:
            raise UsageError("this node is in no swarm; start one with `shoal swarm create`, or `shoal join TICKET`")
        raise UsageError(f"this node is in {len(known)} swarms; say which one (`shoal swarm ls`)")

    @contextmanager
    def events(self) -> Iterator[Iterator[Event | None]]:
        """What changes from now on; None stands for a beat without news, twice a second."""
        with self._request("GET", "/v1/events", None, SILENCE_TIMEOUT_S) as answer:
            yield self._parse_events(answer)

    def watch_swarm(self, swarm: str) -> Iterator[SwarmDetail]:
        """A swarm now, and again at every change and every beat; ends only with an error or with its caller."""
        with self.events() as events:
            detail = self.swarm(swarm)
            asked_at = time.monotonic()
            yield detail
            for event in events:
                is_news = event is None or (event.name == "swarm" and event.data.get("swarm") in (None, detail.swarm))
                if is_news and time.monotonic() - asked_at >= MIN_REFRESH_S:
                    asked_at = time.monotonic()
                    detail = self.swarm(detail.swarm)
                    yield detail

    def _parse_events(self, answer: Answer) -> Iterator[Event | None]:
        name = data = ""
        try:
            for line in (raw.decode() for raw in answer.lines()):
                field, _, value = line.partition(":")
                match field:
                    case "event":
                        name = value.strip()
                    case "data":
                        data = value.strip()
                    case "" if line:
                        yield None
                    case "" if name:
                        yield Event(name=name, data=json.loads(data or "{}"))
                        name = data = ""
        except (GarbledError, OSError) as error:
            raise self._gone() from error
        raise self._gone()

    def _ask(
        self,
        kind: type[T],
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> T:
        with self._request(method, path, body, timeout_s) as answer:
            content = self._all_of(answer, timeout_s)
        try:
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            raise _not_understood(path, answer.status) from error

    @contextmanager
    def _request(self, method: str, path: str, body: BaseModel | None, timeout_s: float) -> Iterator[Answer]:
        """A good answer, to be read in the block; a bad one is raised."""
        content = None if body is None else body.model_dump_json(exclude_unset=True).encode()
        try:
            connection = connect(self._path, timeout_s)
        except OSError as error:
            raise self._no_daemon() from error
        with self._failures_of_the_node(timeout_s):
            answer = Answer(connection, method, path, content)
        with answer:
            if answer.status >= HTTP_FAILED:
                raise _error(path, answer.status, self._all_of(answer, timeout_s))
            yield answer

    def _all_of(self, answer: Answer, timeout_s: float) -> bytes:
        with self._failures_of_the_node(timeout_s):
            return answer.read()

    @contextmanager
    def _failures_of_the_node(self, timeout_s: float) -> Iterator[None]:
        """What comes of its silence or its end in the block, as errors that say so."""
        try:
            yield
        except TimeoutError as error:
            raise ShoalError(f"the node (pid {self.pid}) did not answer in {timeout_s:.0f} s; see its log") from error
        except (GarbledError, OSError) as error:
            raise self._gone() from error

    def _no_daemon(self) -> NoDaemonError:
        flag = "" if self._profile == "default" else f" --profile {self._profile}"
        return NoDaemonError(f"no node is running under profile {self._profile!r}; start one with `shoal up{flag}`")

    def _gone(self) -> NoDaemonError:
        return NoDaemonError(f"the node of profile {self._profile!r} has ended; its log says why")


def _error(path: str, status: int, content: bytes) -> ShoalError:
    try:
        error = ErrorAnswer.model_validate_json(content).error
    except ValidationError:
        return _not_understood(path, status)
    return _ERRORS.get(error.code, ShoalError)(error.message)


def _not_understood(path: str, status: int) -> ShoalError:
    return ShoalError(
        f"the node answered {path} with what this version does not understand "
        f"(HTTP {status}); restart it after an update"
    )


def _in_path(text: str) -> str:
    if not text.isalnum():
        raise UsageError(f"{text[:80]!r} is not the name of a swarm; `shoal swarm ls` lists those of this node")
    return text
