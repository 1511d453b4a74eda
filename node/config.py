"""How a node is set up. Checked here, once, and trusted everywhere else; where it keeps its things: `profile`."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from shoal.node.budgets import BudgetLimits
from shoal.node.mesh.addresses import check_listen, protocols_of
from shoal.node.mesh.relay_limits import RelayLimits
from shoal.node.profile import ProfilePaths, check_profile, default_home
from shoal.node.reach.settings import ReachConfig
from shoal.node.traffic import MIN_BYTES_PER_S
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.protocol.profiles import profile_folder

LISTEN_IPV4: Final = "/ip4/0.0.0.0/tcp/0"
LISTEN_IPV6: Final = "/ip6/::/tcp/0"
GB: Final = 10**9
MBIT: Final = 125_000
"""Bytes a second, of one Mbit/s."""
MIN_DISK_BYTES: Final = GB // 10


def default_listen() -> tuple[str, ...]:
    """Any port on every interface, by each IP that this machine has."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return (LISTEN_IPV4,)
    return (LISTEN_IPV4, LISTEN_IPV6)


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

    listen: tuple[str, ...] = field(default_factory=default_listen)
    """TCP multiaddrs to listen on; port 0 is the port of last time, or any that is free."""

    bootstrap: tuple[str, ...] = ()
    """Full multiaddrs (``/ip4/…/tcp/…/p2p/…``) of nodes to connect to at the start."""

    mdns: bool = True
    """Whether to look for nodes on the local network, and to be found there."""

    api_port: int = 0
    """TCP port of the local API on loopback; 0 lets the system choose."""

    serve_bench: bool = False
    """Whether peers may measure the wire against this node (``shoal bench``)."""

    reach: ReachConfig = field(default_factory=ReachConfig)
    """What it does to be reached."""

    max_peers: int = 256
    """How many peers stay connected, unless its swarms and relays need more."""

    budgets: BudgetLimits = field(default_factory=BudgetLimits)
    """How much of this machine peers and runs may take."""

    wall_clock: Callable[[], float] = time.time
    """Unix seconds. Nothing is timed by it: it may be wrong, and may be set back."""

    def __post_init__(self) -> None:
        check_profile(self.profile)
        if self.max_peers < 4:
            raise UsageError(f"a node cannot do with {self.max_peers} peers; allow at least 4")
        check_budgets(self.budgets)
        if not self.listen:
            raise UsageError(f"a node listens on at least one address, for example {LISTEN_IPV4}")
        for address in self.listen:
            check_listen(address)
        for address in self.bootstrap:
            check_peer_address(address)
        if not 0 <= self.api_port <= 65535:
            raise UsageError(f"{self.api_port} is not a TCP port")

    @property
    def paths(self) -> ProfilePaths:
        """Where this profile keeps what."""
        return ProfilePaths(profile_folder(self.home, self.profile))


def parse_relay_limits(texts: Sequence[str]) -> RelayLimits:
    """Read ``NAME=NUMBER`` limits, on top of the usual ones.

    Raises:
        UsageError: if there is no such limit, or the number makes no sense.
    """
    names = [each.name for each in fields(RelayLimits)]
    limits = RelayLimits()
    for text in texts:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in names or not 1 <= number < 2**50:
            raise UsageError(f"{text[:80]!r} is no limit; write NAME=NUMBER with one of {', '.join(names)}")
        values: dict[str, Any] = {name: number if name == "bytes_per_s" else int(number)}
        limits = replace(limits, **values)
    return limits


def relay_limit_words(limits: RelayLimits) -> list[str]:
    """What `parse_relay_limits` makes these limits of."""
    usual = RelayLimits()
    return [
        f"{each.name}={getattr(limits, each.name)}"
        for each in fields(RelayLimits)
        if getattr(limits, each.name) != getattr(usual, each.name)
    ]


def budget_limits(max_disk_gb: float, max_upload_mbit: float, max_download_mbit: float) -> BudgetLimits:
    """Limits as a person writes them: GB of 10^9 bytes, Mbit/s, 0 for no limit of a rate.

    Raises:
        UsageError: if a number makes no sense.
    """
    for number in (max_disk_gb, max_upload_mbit, max_download_mbit):
        if not 0 <= number < 2**40:
            raise UsageError(f"{number} is no limit; write a number of GB or Mbit/s that is not negative")
    return BudgetLimits(
        max_disk_bytes=round(max_disk_gb * GB),
        upload_bytes_per_s=max_upload_mbit * MBIT or None,
        download_bytes_per_s=max_download_mbit * MBIT or None,
    )


def budget_words(limits: BudgetLimits) -> list[str]:
    """The options of ``shoal up`` of which `budget_limits` makes these limits."""
    rates = {"--max-upload": limits.upload_bytes_per_s, "--max-download": limits.download_bytes_per_s}
    limited = [word for option, rate in rates.items() if rate is not None for word in (option, str(rate / MBIT))]
    return ["--max-disk", str(limits.max_disk_bytes / GB), *limited]


def check_budgets(limits: BudgetLimits) -> None:
    """Check that a node can live on them.

    Raises:
        UsageError: if it cannot.
    """
    if limits.max_disk_bytes < MIN_DISK_BYTES:
        raise UsageError(
            f"a node cannot do with {limits.max_disk_bytes / GB:g} GB of disk; allow --max-disk {MIN_DISK_BYTES / GB:g}"
        )
    for option, rate in (("upload", limits.upload_bytes_per_s), ("download", limits.download_bytes_per_s)):
        if rate is not None and rate < MIN_BYTES_PER_S:
            raise UsageError(
                f"at {rate / MBIT:g} Mbit/s a block takes longer than a peer waits; allow --max-{option} "
                f"{MIN_BYTES_PER_S / MBIT:g}, or 0 for no limit"
            )


def check_peer_address(text: str) -> tuple[str, PeerId]:
    """Check the full address of a node.

    Returns:
        The address without its ``/p2p/…``, and the node's name.

    Raises:
        UsageError: if it is not one.
    """
    names = protocols_of(text)
    if len(names) < 3 or names[-1] != "p2p":
        raise UsageError(f"{text[:120]!r} does not say whom to expect there; write /ip4/ADDRESS/tcp/PORT/p2p/PEER")
    transport, _, peer = text.rstrip("/").rpartition("/p2p/")
    return transport, PeerId.parse(peer)
