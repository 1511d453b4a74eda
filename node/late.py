"""What a dependency imports and a node seldom or never uses, loaded when it is used.

libp2p imports at its start a client of a certificate authority, QUIC, WebSockets, GossipSub, Bitswap, SECIO, RSA and
more; the server of the local API imports HTTP/2, WebSockets and the whole of OpenAPI; together they take 30 MB of
every node that stands idle. In place of the modules of `SELDOM_USED` stand modules without code. A name that is taken
from one is a stand-in: calling it loads the module, and with it those of the list that are in the same package, and
calls what the name means there. What is loaded by then is found in ``sys.modules`` as usual.

A stand-in does for what is called, subclassed by nobody, and asked for by ``isinstance``. It does not for ``except``,
and not for a value: a module of which others take these is not to be listed. Objects of `MADE_LATE`, which others make
at their start and keep, are made when something is asked of them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

SELDOM_USED: Final = (
    "Crypto",  # of peers whose key is RSA
    "aioquic",
    "coincurve",  # of peers whose key is secp256k1
    "cryptography.hazmat.primitives.serialization.ssh",
    "fastapi.openapi.models",
    "fastapi.security",
    "hypercorn.protocol.h2",
    "hypercorn.protocol.ws_stream",
    "libp2p.bitswap.block_service",
    "libp2p.bitswap.block_store",
    "libp2p.bitswap.client",
    "libp2p.bitswap.gated_decision_engine",
    "libp2p.bitswap.payment_client_1_3",
    "libp2p.bitswap.payment_ledger",
    "libp2p.bitswap.pricing_engine",
    "libp2p.bitswap.wantlist",
    "libp2p.discovery.upnp",
    "libp2p.peer.persistent",
    "libp2p.pubsub.gossipsub",
    "libp2p.pubsub.pubsub",
    "libp2p.records.ipns",
    "libp2p.security.secio",  # with the curves of fastecdsa
    "libp2p.security.tls.autotls.acme",  # with httpx and requests
    "libp2p.security.tls.autotls.broker",
    "libp2p.transport.quic.connection",
    "libp2p.transport.quic.connection_id_registry",
    "libp2p.transport.quic.listener",
    "libp2p.transport.quic.security",
    "libp2p.transport.quic.stream",
    "libp2p.transport.quic.transport",
    "libp2p.transport.websocket",
    "logging.config",
    "multiaddr.resolvers.dns",
    "opentelemetry._logs",
    "opentelemetry.metrics",
    "opentelemetry.propagate",
    "opentelemetry.trace",
    "prometheus_client",
    "psutil",
)
MADE_LATE: Final = (("multiaddr.resolvers.dns", "DNSResolver"), ("psutil", "Process"))


class _Kind(type):
    """The class of stand-ins, which are classes for the sake of annotations."""

    _module: str
    _path: tuple[str, ...]

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if (cls._module, *cls._path) in MADE_LATE:
            return _Unmade(lambda: cls._real()(*arguments, **named))
        return cls._real()(*arguments, **named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(cls._module, (*cls._path, name))

    def __instancecheck__(cls, value: object) -> bool:
        return _is_loaded(cls._module) and isinstance(value, cls._real())

    def _real(cls) -> Any:
        module = load(cls._module)
        for depth, name in enumerate(cls._path):
            if isinstance(module, ModuleType) and not hasattr(module, name):
                module = importlib.import_module(".".join((cls._module, *cls._path[: depth + 1])))
            else:
                module = getattr(module, name)
        return module


class _Unmade:
    """An object that is made when something is asked of it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = self._make()
        return getattr(self._made, name)


def _stand_in(module: str, path: tuple[str, ...]) -> Any:
    return _Kind(path[-1], (), {"_module": module, "_path": path})


class _Empty(ModuleType):
    """A module in whose place nothing has been loaded yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(self.__name__, (name,))


class _Finder:
    """Finds and loads `_Empty` modules for whatever is in `waiting`, and below it."""

    def __init__(self) -> None:
        self.waiting: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _root(fullname, self.waiting) is None:
            return None
        return ModuleSpec(fullname, cast(Any, self), is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_FINDER: Final = _Finder()


def stand_in() -> None:
    """From now on, load `SELDOM_USED` late; what is loaded already stays."""
    _FINDER.waiting.update(name for name in SELDOM_USED if name not in sys.modules)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def load(name: str) -> ModuleType:
    """The module itself, for what stands in its place."""
    root = _root(name, _FINDER.waiting)
    if root is not None:
        package = root.rpartition(".")[0]
        roots = {each for each in _FINDER.waiting if each == root or (package and each.rpartition(".")[0] == package)}
        _FINDER.waiting -= roots
        for each in [each for each in sys.modules if _root(each, roots)]:
            del sys.modules[each]
    return importlib.import_module(name)


def is_late(name: str) -> bool:
    """Whether a module is one of those that wait."""
    return _root(name, _FINDER.waiting) is not None


def _is_loaded(name: str) -> bool:
    return not is_late(name)


def _root(name: str, roots: Iterable[str]) -> str | None:
    return next((root for root in roots if name == root or name.startswith(f"{root}.")), None)
