"""What each kind of router does, as nftables rulesets.

A router has the device ``wan``, and ``lan0``, ``lan1``… towards its hosts. Nothing comes in from the WAN that is not
part of a connection from inside, unless its kind of NAT translates it; it is dropped without an answer, because an
answer would be a connection of the router's own, which then holds the port that a host behind it wants to punch with.

Linux's own NAT is port-restricted: it keeps the source port when it is free, and takes packets only from the address
and port that were sent to. Full cone and address-restricted are built on it by a map of every port that was sent from,
and by a set of whom each has sent to; both are renewed by each packet out and forgotten after `IDLE_MINUTES`. They
translate to the same port, so two hosts behind one full-cone NAT must not use the same one.

A bridge hands its frames to the firewall as well where the kernel is told so; hence the rule from ``lan0`` to itself.
"""

from __future__ import annotations

from typing import Final

KINDS: Final = (
    "open",
    "upnp",
    "full_cone",
    "address_restricted",
    "port_restricted",
    "double",
    "udp_blocked",
    "symmetric",
    "tcp443_only",
    "ipv6_only",
)
"""The kinds of site of which every pair is run, the easier ones first."""

PAIRED: Final = ("hairpin", "same_lan")
"""Kinds with two hosts, which are a pair of their own."""

IDLE_MINUTES: Final = 5

_FIREWALL: Final = """
flush ruleset
table inet filter {{
    chain to_router {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname {{ "lo", "lan*" }} accept
    }}
    chain miniupnpd {{ }}
    chain through {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "lan*" oifname "wan" {outbound}
        iifname "lan0" oifname "lan0" accept
        ct status dnat accept
        jump miniupnpd
    }}
}}
"""

_NAT: Final = """
table inet nat {{
    chain prerouting_miniupnpd {{ }}
    chain postrouting_miniupnpd {{ }}
    chain before {{
        type nat hook prerouting priority dstnat;
        iifname "wan" jump prerouting_miniupnpd
    }}
    chain after {{
        type nat hook postrouting priority srcnat;
        oifname "wan" jump postrouting_miniupnpd
        oifname "wan" masquerade {how}
    }}
}}
"""

_CONE: Final = """
table ip cone {{
    map mapped {{
        type inet_proto . inet_service : ipv4_addr
        flags dynamic,timeout; timeout {minutes}m; size 16384
    }}
    set spoken_to {{
        type inet_proto . inet_service . ipv4_addr
        flags dynamic,timeout; timeout {minutes}m; size 16384
    }}
    chain learn {{
        type filter hook postrouting priority srcnat - 1;
        iifname "lan*" meta l4proto {{ tcp, udp }} jump remember
    }}
    chain remember {{
        update @mapped {{ meta l4proto . th sport : ip saddr }}
        update @spoken_to {{ meta l4proto . th sport . ip daddr }}
    }}
    chain before {{
        type nat hook prerouting priority dstnat;
        ip daddr {wan} meta l4proto {{ tcp, udp }} {allowed} dnat to meta l4proto . th dport map @mapped
    }}
    chain after {{
        type nat hook postrouting priority srcnat - 1;
        iifname "lan*" oifname "lan*" ct status dnat snat to {wan}
    }}
}}
"""

_OUTBOUND: Final = {
    "udp_blocked": "meta l4proto != udp accept",
    "tcp443_only": "tcp dport 443 accept",
}
_ALLOWED: Final = {
    "full_cone": "",
    "hairpin": "",
    "address_restricted": "meta l4proto . th dport . ip saddr @spoken_to",
}


def ruleset(kind: str, wan: str) -> str:
    """A router of this kind with this IPv4 address; loading it again forgets what was learned."""
    text = _FIREWALL.format(outbound=_OUTBOUND.get(kind, "accept"))
    if kind != "ipv6_only":
        text += _NAT.format(how="fully-random" if kind == "symmetric" else "")
    if kind in _ALLOWED:
        text += _CONE.format(minutes=IDLE_MINUTES, wan=wan, allowed=_ALLOWED[kind])
    return text


UPNP_SETTINGS: Final = """
ext_ifname=wan
listening_ip=lan0
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
min_lifetime=120
max_lifetime=86400
uuid=00000000-0000-4000-8000-000000000000
upnp_table_name=filter
upnp_nat_table_name=nat
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
allow 1024-65535 192.168.0.0/16 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
"""miniupnpd's, for a router whose only LAN is ``lan0``."""
