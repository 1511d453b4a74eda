"""Serves the local API: on a Unix socket for the same user, and on loopback TCP for whoever holds the token.

Hypercorn speaks HTTP, connection by connection, in the node's own trio loop. Its `serve` is not used, because it
shields its sends from cancellation and owns the connections: a reader that has stopped reading (a suspended
``shoal watch``) would hold up the end of the node. Here the connections are ours and are closed under it.

On TCP three things keep other users and web pages out: the bearer token (a file of mode 0600), a ``Host`` that names
this machine (a page elsewhere may point its own domain at 127.0.0.1: DNS rebinding), and no CORS headers at all.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState, LifespanState

from shoal.node.api.app import create_app, error_response
from shoal.node.store import sockets
from shoal.node.store.files import write_private
from shoal.protocol.errors import RefusedError, ShoalError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from trio import TaskStatus  # type: ignore[attr-defined]  # exported, but not in a way that mypy sees

    from shoal.node.api.app import NodeView
    from shoal.node.profile import ProfilePaths

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
MAX_CONNECTIONS: Final = 256
MAX_REQUEST_BYTES: Final = 1024 * 1024
_LOCAL_HOST: Final = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ApiAddress:
    """How to reach a running API; also what api.json says, with the node's ``pid`` and ``peer_id``."""

    socket: Path
    url: str
    token_file: Path


async def serve_api(
    node: NodeView,
    paths: ProfilePaths,
    *,
    port: int = 0,
    task_status: TaskStatus[ApiAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; start it with ``await nursery.start(serve_api, node, paths)``, last of all.

    It writes api.json when it listens, so from then on others take the node for ready, and removes it at its end.

    Raises:
        ShoalError: if the port is in use or the profile cannot be written.
    """
    app = create_app(node)
    with ExitStack() as stack:
        token = secrets.token_urlsafe(32)
        write_private(paths.api_token, token.encode())
        tcp = stack.enter_context(_listen_tcp(port))
        path = sockets.place(paths.api_socket, stack)
        unix = stack.enter_context(sockets.listen(path))
        stack.callback(path.unlink, missing_ok=True)
        address = ApiAddress(path, f"http://{LOOPBACK}:{tcp.getsockname()[1]}", paths.api_token)
        async with trio.open_nursery() as nursery:
            await nursery.start(_serve, app, unix)
            await nursery.start(_serve, _Guard(app, token), tcp)
            task_status.started(address)
            # Only now does the node know its API's address, and whoever reads the file may ask at once.
            info = node.node()
            record = {
                "socket": str(path),
                "url": address.url,
                "token_file": str(address.token_file),
                "pid": os.getpid(),
                "peer_id": str(info.peer_id),
            }
            stack.callback(paths.api.unlink, missing_ok=True)
            write_private(paths.api, json.dumps(record).encode())


def _listen_tcp(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ShoalError(f"the local API cannot use port {port}: {error.strerror}; choose another") from error
    return listener


async def _serve(
    app: ASGIApp, listener: socket.socket, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.h11_max_incomplete_size = 64 * 1024
    config.include_server_header = False
    wrapped = ASGIWrapper(cast(ASGIFramework, _BodyLimit(app)))
    context = WorkerContext(None)
    streams: set[trio.SocketStream] = set()

    async def handle(stream: trio.SocketStream) -> None:
        if len(streams) >= MAX_CONNECTIONS:
            log.warning("the local API has %d connections open; another one is refused", len(streams))
            await stream.aclose()
            return
        streams.add(stream)
        try:
            await TCPServer(wrapped, config, context, ConnectionState(LifespanState()), cast(Any, stream))
        except Exception:
            log.exception("a connection to the local API failed")  # that one only
        finally:
            streams.discard(stream)

    async def close_streams_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            for stream in streams:
                stream.socket.close()

    # dup: trio closes the listener that it is given, the caller closes its own
    accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(close_streams_when_cancelled)
        await nursery.start(trio.serve_listeners, handle, [accepting])
        task_status.started()


class _Guard:
    """Lets only requests pass that come from this machine's own programs and carry the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: dict[bytes, bytes] = dict(scope["headers"])
            if not _LOCAL_HOST.fullmatch(headers.get(b"host", b"").decode("latin-1")):
                answer = error_response(403, RefusedError.exit_code, "ask for 127.0.0.1 or localhost by that name")
                await answer(scope, receive, send)
                return
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                message = "send the header `Authorization: Bearer TOKEN`; api.json names the file with the token"
                answer = error_response(401, RefusedError.exit_code, message)
                answer.headers["WWW-Authenticate"] = "Bearer"
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _BodyLimit:
    """Ends a request whose body is longer than any that the API takes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there is nothing to start up, and no WebSocket
            return
        await self._app(scope, partial(self._receive, receive, [0]), send)

    @staticmethod
    async def _receive(receive: Receive, taken: list[int]) -> Any:
        message = await receive()
        taken[0] += len(message.get("body", b""))
        if taken[0] > MAX_REQUEST_BYTES:
            return {"type": "http.disconnect"}
        return message
