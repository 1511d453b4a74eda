"""The local API's routes: a thin layer over what the node says of itself.

All answers are JSON (`schemas`); an error is ``{"error": {"code", "message"}}`` with the command line's exit code.
A swarm may be named by any unambiguous beginning of its CID. ``/docs`` is drawn from the OpenAPI description here,
since the usual page loads its scripts from another site. Who may ask is `server`'s business.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import trio
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from shoal import __version__
from shoal.node.api.prometheus import CONTENT_TYPE, exposition
from shoal.node.api.requests import (
    AnswerAsk,
    BenchDhtRequest,
    BenchReduceRequest,
    BenchRequest,
    CreateSwarm,
    GetModel,
    JoinSwarm,
    PingRequest,
    PublishModel,
)
from shoal.node.api.schemas import (
    AskInfo,
    BenchDhtResult,
    BenchReduceResult,
    BenchResult,
    ContentInfo,
    CreatedSwarm,
    DoctorInfo,
    ErrorAnswer,
    ErrorBody,
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
from shoal.protocol.errors import NoPeersError, RefusedError, ShoalError, UsageError
from shoal.protocol.ids import SwarmId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

BEAT_S: Final = 0.5
"""How often an event stream says that it is alive, and so how soon a dead reader is noticed."""

HTTP_STATUS: Final[tuple[tuple[type[ShoalError], int], ...]] = (
    (UsageError, 400),
    (RefusedError, 409),
    (NoPeersError, 503),
    (ShoalError, 500),
)


class NodeView(Protocol):
    """What the API needs of a node. The plain methods answer at once from what the node knows."""

    def node(self) -> NodeInfo:
        """The node itself."""

    def peers(self) -> list[PeerInfo]:
        """Whom it is connected to."""

    def mesh(self) -> MeshInfo:
        """What it knows of the mesh."""

    def nat(self) -> NatInfo:
        """How it is reached."""

    def doctor(self) -> DoctorInfo:
        """What stands in the way, and what to do about it."""

    async def ping(self, request: PingRequest) -> PingResult:
        """Call a peer; `NoPeersError` if it cannot be reached."""

    def swarms(self) -> list[SwarmSummary]:
        """The swarms that it is in, or was in since it started."""

    def swarm(self, swarm: SwarmId) -> SwarmDetail:
        """One of them; `UsageError` if it is in no such swarm."""

    def manifest(self, swarm: SwarmId) -> dict[str, Any]:
        """What a run was made with."""

    async def policy(self, swarm: SwarmId) -> bytes:
        """The newest training state that is here."""

    def state(self, swarm: SwarmId) -> StateInfo:
        """The shared state of one of them; `UsageError` if it is in no such swarm."""

    def details(self) -> list[SwarmDetail]:
        """The same swarms in detail."""

    def metrics(self) -> MetricsInfo:
        """What was called, how often and how fast."""

    async def bench_reduce(self, request: BenchReduceRequest) -> BenchReduceResult:
        """See `shoal.node.daemon.Node`."""

    async def bench_dht(self, request: BenchDhtRequest) -> BenchDhtResult:
        """See `shoal.node.daemon.Node`."""

    async def bench(self, request: BenchRequest) -> BenchResult:
        """Measure the wire to a peer; takes as long as the request says, and some more."""

    async def create_swarm(self, request: CreateSwarm) -> CreatedSwarm:
        """Start a run and take part in it."""

    async def join_swarm(self, request: JoinSwarm) -> JoinedSwarm:
        """Take part in a run."""

    async def leave_swarm(self, swarm: SwarmId) -> None:
        """Say goodbye to the members and forget the run."""

    async def asks(self, swarm: SwarmId, wait_s: float) -> list[AskInfo]:
        """What the person at this node is asked in a swarm; if nothing, wait for so long."""

    def answer_ask(self, swarm: SwarmId, request: AnswerAsk) -> None:
        """What the person does; `UsageError` if nobody waits for it, or it cannot be done."""

    def content(self) -> ContentInfo:
        """What contents take on disk."""

    def models(self) -> list[ModelInfo]:
        """The models that are here."""

    async def search_models(self, word: str) -> list[ModelInfo]:
        """Models with a tag or a name, here and elsewhere."""

    async def model(self, model: str) -> ModelDetail:
        """One of them, or one of another node by its owner's name; `UsageError` if there is none."""

    async def publish_model(self, request: PublishModel) -> ModelInfo:
        """Take a folder in."""

    async def get_model(self, request: GetModel) -> FetchInfo:
        """Fetch one; takes as long as it takes."""

    async def pin_model(self, model: str, is_pinned: bool) -> ModelInfo:
        """Let one stay, or not."""

    async def remove_model(self, model: str) -> ContentInfo:
        """Forget one."""

    async def collect_models(self) -> ContentInfo:
        """Forget those that are not pinned."""

    def stop(self) -> None:
        """Begin to end the node; returns at once."""

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """What changes from now on; bounded: a reader that is too slow loses events, never blocks the node."""


def create_app(node: NodeView) -> FastAPI:
    """The API of one node, without any check of who asks."""
    app = FastAPI(
        title="Shoal",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},  # tells nobody
        responses={status: {"model": ErrorAnswer} for status in (400, 404, 409, 422, 500, 503)},
    )
    _add_error_handlers(app)
    _add_node_routes(app, node)
    _add_swarm_routes(app, node)
    _add_model_routes(app, node)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs_page(app.openapi()))

    return app


def resolve(node: NodeView, text: str) -> SwarmId:
    """The one swarm of this node whose CID begins with ``text``.

    Raises:
        UsageError: if there is none, or more than one.
    """
    known = [summary.swarm for summary in node.swarms()]
    if text in known:
        return known[known.index(SwarmId(text))]
    matches = [swarm for swarm in known if swarm.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"{text!r} could be any of {len(matches)} swarms; write more of its name")
    raise UsageError(f"this node is in no swarm {text[:80]!r}; `shoal swarm ls` lists those that it is in")


def _add_node_routes(app: FastAPI, node: NodeView) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the node answers."""
        return {"status": "ok"}

    @app.get("/v1/node")
    async def get_node() -> NodeInfo:
        """This node."""
        return node.node()

    @app.post("/v1/node/stop", status_code=202)
    async def stop() -> dict[str, int]:
        """End the node; answers before it has ended."""
        pid = node.node().pid
        node.stop()
        return {"pid": pid}

    @app.get("/v1/peers")
    async def get_peers() -> list[PeerInfo]:
        """The nodes that this one is connected to."""
        return node.peers()

    @app.get("/v1/mesh")
    async def get_mesh() -> MeshInfo:
        """The nodes and connections that this node knows of."""
        return node.mesh()

    @app.get("/v1/nat")
    async def get_nat() -> NatInfo:
        """How this node is reached, and how it knows."""
        return node.nat()

    @app.get("/v1/doctor")
    async def get_doctor() -> DoctorInfo:
        """What stands between this node and its peers, and what to do about it."""
        return node.doctor()

    @app.post("/v1/ping")
    async def ping(request: PingRequest) -> PingResult:
        """Call a peer once, after connecting to it if need be."""
        return await node.ping(request)

    @app.get("/v1/metrics")
    async def get_metrics() -> MetricsInfo:
        """Calls by method: how many, how fast, how much."""
        return node.metrics()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def get_exposition() -> PlainTextResponse:
        """The same and how each swarm goes, as Prometheus reads it."""
        return PlainTextResponse(exposition(node.node(), node.metrics(), node.details()), media_type=CONTENT_TYPE)

    @app.post("/v1/bench/allreduce")
    async def bench_reduce(request: BenchReduceRequest) -> BenchReduceResult:
        """Take part in all-reduces that are measured; answers when they are done."""
        return await node.bench_reduce(request)

    @app.post("/v1/bench/dht")
    async def bench_dht(request: BenchDhtRequest) -> BenchDhtResult:
        """Do one thing in the DHT, and say how long it took."""
        return await node.bench_dht(request)

    @app.post("/v1/bench")
    async def bench(request: BenchRequest) -> BenchResult:
        """Measure the wire to a peer that serves benchmarks; answers when it is done."""
        return await node.bench(request)

    @app.get("/v1/events", response_class=Response)
    async def get_events() -> Response:
        """What changes, as server-sent events, with a comment line every half second in between."""
        return _EventStream(node)


def _add_swarm_routes(app: FastAPI, node: NodeView) -> None:
    @app.get("/v1/swarms")
    async def get_swarms() -> list[SwarmSummary]:
        """The swarms that this node is in."""
        return node.swarms()

    @app.post("/v1/swarms", status_code=201)
    async def create_swarm(request: CreateSwarm) -> CreatedSwarm:
        """Start a training run and take part in it."""
        return await node.create_swarm(request)

    @app.post("/v1/swarms/join")
    async def join_swarm(request: JoinSwarm) -> JoinedSwarm:
        """Take part in a run, by its ticket."""
        return await node.join_swarm(request)

    @app.get("/v1/swarms/{swarm}")
    async def get_swarm(swarm: str) -> SwarmDetail:
        """One swarm in detail."""
        return node.swarm(_resolve_or_404(node, swarm))

    @app.get("/v1/swarms/{swarm}/manifest")
    async def get_manifest(swarm: str) -> dict[str, Any]:
        """What a run was made with: all that its owner signed."""
        return node.manifest(_resolve_or_404(node, swarm))

    @app.get("/v1/swarms/{swarm}/policy", response_class=Response)
    async def get_policy(swarm: str) -> Response:
        """The newest training state that this node holds, as safetensors; the policy is under ``parameters/``."""
        return Response(await node.policy(_resolve_or_404(node, swarm)), media_type="application/octet-stream")

    @app.delete("/v1/swarms/{swarm}")
    async def leave_swarm(swarm: str) -> dict[str, str]:
        """Leave a swarm."""
        found = _resolve_or_404(node, swarm)
        await node.leave_swarm(found)
        return {"swarm": str(found)}

    @app.get("/v1/swarms/{swarm}/asks")
    async def get_asks(swarm: str, wait_s: Annotated[float, Query(ge=0, le=30)] = 0) -> list[AskInfo]:
        """What the person at this node is asked, the oldest first; if nothing, waits so long. Who looks sits here."""
        return await node.asks(_resolve_or_404(node, swarm), wait_s)

    @app.post("/v1/swarms/{swarm}/asks")
    async def answer_ask(swarm: str, request: AnswerAsk) -> dict[str, int]:
        """Answer one; what cannot be done is refused with the reason, and can be answered again."""
        node.answer_ask(_resolve_or_404(node, swarm), request)
        return {"id": request.id}

    @app.get("/v1/state/{swarm}")
    async def get_state(swarm: str) -> StateInfo:
        """The shared state of a swarm, as this node holds it."""
        return node.state(_resolve_or_404(node, swarm))


def _add_model_routes(app: FastAPI, node: NodeView) -> None:
    @app.get("/v1/models")
    async def get_models(search: str = "") -> list[ModelInfo]:
        """The models that this node has published or fetched; or all that it finds by a tag or a name."""
        return await node.search_models(search) if search else node.models()

    @app.post("/v1/models", status_code=201)
    async def publish_model(request: PublishModel) -> ModelInfo:
        """Publish a folder or a file of this machine."""
        return await node.publish_model(request)

    @app.post("/v1/models/get")
    async def fetch_model(request: GetModel) -> FetchInfo:
        """Fetch a model from the peers that have it; answers when it is here."""
        return await node.get_model(request)

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> ModelDetail:
        """One model, with its files."""
        return await node.model(model)

    @app.delete("/v1/models/{model:path}")
    async def remove_model(model: str) -> ContentInfo:
        """Forget a model."""
        return await node.remove_model(model)

    @app.post("/v1/models/{model:path}/pin")
    async def pin_model(model: str) -> ModelInfo:
        """Let a model stay."""
        return await node.pin_model(model, True)

    @app.post("/v1/models/{model:path}/unpin")
    async def unpin_model(model: str) -> ModelInfo:
        """Let a model go when its room is needed."""
        return await node.pin_model(model, False)

    @app.get("/v1/content")
    async def get_content() -> ContentInfo:
        """What contents take on disk, and what is on its way."""
        return node.content()

    @app.post("/v1/content/gc")
    async def collect_models() -> ContentInfo:
        """Forget the models that are not pinned."""
        return await node.collect_models()


class _UnknownSwarmError(UsageError):
    """As `UsageError`, but answered with 404."""


def _resolve_or_404(node: NodeView, text: str) -> SwarmId:
    try:
        return resolve(node, text)
    except UsageError as error:
        raise _UnknownSwarmError(str(error)) from error


def error_response(status: int, code: int, message: str) -> JSONResponse:
    """The one form of every failure."""
    said = message.encode("utf-8", "backslashreplace").decode()  # it may repeat what cannot be sent as it is
    answer = ErrorAnswer(error=ErrorBody(code=code, message=said))
    return JSONResponse(answer.model_dump(), status_code=status)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ShoalError)
    async def on_shoal_error(_: Request, error: ShoalError) -> JSONResponse:
        if isinstance(error, _UnknownSwarmError):
            return error_response(404, error.exit_code, str(error))
        status = next(status for kind, status in HTTP_STATUS if isinstance(error, kind))
        return error_response(status, error.exit_code, str(error))

    @app.exception_handler(RequestValidationError)
    async def on_bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_response(422, UsageError.exit_code, f"{where or 'the request'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is"
        status = 422 if error.status_code == 400 else error.status_code  # FastAPI's own for a body that is no JSON
        return error_response(status, UsageError.exit_code, message)

    @app.exception_handler(Exception)
    async def on_unexpected(_: Request, error: Exception) -> JSONResponse:
        # Hypercorn logs it with its traceback; the node lives on.
        return error_response(500, ShoalError.exit_code, f"the node failed to answer ({error!r:.200}); see its log")


class _EventStream(Response):
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) until the reader goes."""

    def __init__(self, node: NodeView) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._node = node
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        lock = trio.Lock()

        async def write(text: str) -> None:
            async with lock:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async def forward() -> None:
            async for event in events:
                await write(f"event: {event.name}\ndata: {event.model_dump_json(include={'data'})[8:-1]}\n\n")
            nursery.cancel_scope.cancel()

        async def beat() -> None:
            while True:
                await write(":\n\n")
                await trio.sleep(BEAT_S)

        async with self._node.events() as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forward)
                nursery.start_soon(beat)
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()
        with trio.move_on_after(1):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _docs_page(openapi: dict[str, Any]) -> str:
    import html

    rows = [
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation.get('description') or operation.get('summary', ''))}</td></tr>"
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        "<!doctype html><meta charset=utf-8><title>Shoal: local API</title>"
        "<style>body{font:16px/1.5 system-ui;margin:2em;max-width:60em}td{padding:.2em 1em .2em 0}</style>"
        f"<h1>Shoal {html.escape(openapi['info']['version'])}: local API</h1><table>{''.join(rows)}</table>"
        '<p>Requests and answers in full: <a href="/openapi.json">/openapi.json</a> (OpenAPI).'
    )
