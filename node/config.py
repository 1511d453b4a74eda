"""How a node is set up, and where it keeps its things. Checked here, once, and trusted everywhere else."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import platformdirs
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from shoal.node.files import make_private_folder
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId, SwarmId

DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/0",)
_PROFILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def default_home() -> Path:
    """``$SHOAL_HOME``, or the platform's folder for applications' data."""
    named = os.environ.get("SHOAL_HOME")
    return Path(named).expanduser().absolute() if named else Path(platformdirs.user_data_dir("shoal", appauthor=False))


@dataclass(frozen=True, slots=True)
class ProfilePaths:
    """Where one profile keeps what; a profile is one node's identity and data."""

    root: Path

    @property
    def identity(self) -> Path:
        """The raw Ed25519 secret key, mode 0600."""
        return self.root / "identity.key"

    @property
    def database(self) -> Path:
        """SQLite: ops, blocks, what the node is in."""
        return self.root / "node.db"

    @property
    def lock(self) -> Path:
        """Held locked by the node that runs; holds its process id."""
        return self.root / "lock"

    @property
    def api(self) -> Path:
        """JSON: how to reach the API of the node that runs."""
        return self.root / "api.json"

    @property
    def api_token(self) -> Path:
        """The bearer token of the API on TCP, mode 0600."""
        return self.root / "api.token"

    @property
    def api_socket(self) -> Path:
        """The API's Unix socket, unless this path is too long for one."""
        return self.root / "api.sock"

    @property
    def log(self) -> Path:
        """What the node reports."""
        return self.root / "node.log"

    def swarm(self, swarm: SwarmId) -> Path:
        """The folder of a swarm's results."""
        return self.root / "swarms" / swarm

    def create(self) -> None:
        """Make the profile's folder, for this user alone.

        Raises:
            ShoalError: if it cannot be made.
        """
        make_private_folder(self.root)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """How one node is set up.

    Raises:
        UsageError: if the profile's name or an address makes no sense.
    """

    home: Path = field(default_factory=default_home)
    """The folder of all profiles."""

    profile: str = "default"
    """Which identity and data to use: letters, digits, ``_``, ``.`` and ``-``."""

    listen: tuple[str, ...] = DEFAULT_LISTEN
    """TCP multiaddrs to listen on; port 0 lets the system choose."""

    bootstrap: tuple[str, ...] = ()
    """Full multiaddrs (``/ip4/…/tcp/…/p2p/…``) of nodes to connect to at the start."""

    mdns: bool = True
    """Whether to look for nodes on the local network, and to be found there."""

    api_port: int = 0
    """TCP port of the local API on loopback; 0 lets the system choose."""

    serve_bench: bool = False
    """Whether peers may measure the wire against this node (``shoal bench``)."""

    def __post_init__(self) -> None:
        check_profile(self.profile)
        if not self.listen:
            raise UsageError(f"a node listens on at least one address, for example {DEFAULT_LISTEN[0]}")
        for address in self.listen:
            _check_listen(address)
        for address in self.bootstrap:
            check_peer_address(address)
        if not 0 <= self.api_port <= 65535:
            raise UsageError(f"{self.api_port} is not a TCP port")

    @property
    def paths(self) -> ProfilePaths:
        """Where this profile keeps what."""
        return ProfilePaths(self.home / "profiles" / self.profile)


def check_profile(name: str) -> str:
    """Check a profile's name, which is also a folder's.

    Raises:
        UsageError: if it is not one.
    """
    if not _PROFILE.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a profile name; use up to 64 letters, digits, '_', '.' and '-', no '.' or '-' first"
        )
    return name


def check_peer_address(text: str) -> tuple[str, PeerId]:
    """Check the full address of a node.

    Returns:
        The address without its ``/p2p/…``, and the node's name.

    Raises:
        UsageError: if it is not one.
    """
    names = _protocols(text)
    if len(names) < 3 or names[-1] != "p2p":
        raise UsageError(f"{text[:120]!r} does not say whom to expect there; write /ip4/ADDRESS/tcp/PORT/p2p/PEER")
    transport, _, peer = text.rstrip("/").rpartition("/p2p/")
    return transport, PeerId.parse(peer)


def _check_listen(text: str) -> None:
    names = _protocols(text)
    if len(names) != 2 or names[0] not in ("ip4", "ip6") or names[1] != "tcp":
        raise UsageError(f"cannot listen on {text[:120]!r}; write /ip4/ADDRESS/tcp/PORT or /ip6/ADDRESS/tcp/PORT")


def _protocols(text: str) -> list[str]:
    try:
        names = [protocol.name for protocol in Multiaddr(text).protocols()]
    except (MultiaddrError, ValueError) as error:
        reason = str(error).split(": ", 1)[-1].removesuffix(f" (string: {text})")
        raise UsageError(f"{text[:120]!r} is not a multiaddr ({reason[:120]})") from error
    if not names:
        raise UsageError("an empty multiaddr; one looks like /ip4/192.0.2.1/tcp/4001")
    return names
