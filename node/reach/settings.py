"""How much a node does to be reached. Checked here, once, and trusted everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from shoal.node.mesh.addresses import check_listen
from shoal.node.mesh.relay_limits import RelayLimits
from shoal.protocol.errors import UsageError

RELAY_RULES: Final = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachConfig:
    """What a node does to be reached, and to reach others better.

    Raises:
        UsageError: if a word or an address makes no sense.
    """

    relay: str = "auto"
    """Whether it relays for others: ``on``, ``off``, or ``auto``: when everybody can dial it."""

    relay_limits: RelayLimits = field(default_factory=RelayLimits)
    """How much it relays."""

    port_mapping: bool = True
    """Whether to ask the router to forward the port (PCP, NAT-PMP, UPnP)."""

    punch: bool = True
    """Whether to punch holes by TCP."""

    webrtc: bool = True
    """Whether to try UDP by WebRTC."""

    announce: tuple[str, ...] = ()
    """Further multiaddrs at which others reach this node, for example a port that was forwarded by hand."""

    stun_servers: tuple[str, ...] = ()
    """``HOST:PORT`` of third parties to ask too how WebRTC's socket is seen; peers are asked anyway."""

    def __post_init__(self) -> None:
        if self.relay not in RELAY_RULES:
            raise UsageError(f"{self.relay!r} is no rule for relaying; write one of {', '.join(RELAY_RULES)}")
        for address in self.announce:
            check_listen(address)
        for server in self.stun_servers:
            host, _, port = server.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise UsageError(f"{server[:80]!r} is no STUN server; write HOST:PORT")
