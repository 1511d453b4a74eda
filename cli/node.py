"""``shoal up``, ``down``, ``status``, ``peers``, ``nat``, ``doctor``, ``ping``: the node of this machine.

What draws for people is imported where something is drawn: a node in the background and whoever asks for JSON do
without; so are the settings of a node, which only its start needs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.cli.common import AsJson, Profile, connect, console, print_json, profile_paths
from shoal.node.lock import lock_holder
from shoal.protocol.errors import NoDaemonError, ShoalError

if TYPE_CHECKING:
    from shoal.node.api.schemas import NodeInfo
    from shoal.node.config import NodeConfig

STOP_TIMEOUT_S: Final = 5.0
PING_INTERVAL_S: Final = 1.0


def up(  # the options of one command; Typer wants them as arguments
    profile: Profile = "default",
    listen: Annotated[list[str] | None, typer.Option(metavar="MULTIADDR", help="Listen here; repeat for more.")] = None,
    bootstrap: Annotated[
        list[str] | None, typer.Option(metavar="MULTIADDR", help="Connect to this node (…/p2p/…); repeat for more.")
    ] = None,
    mdns: Annotated[bool, typer.Option(help="Look for nodes on the local network, and be found there.")] = True,
    relay: Annotated[
        str, typer.Option(metavar="auto|on|off", help="Relay for others; auto: when everybody can dial this node.")
    ] = "auto",
    relay_limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A limit of what it relays; repeat for more.")
    ] = None,
    port_mapping: Annotated[bool, typer.Option(help="Ask the router to forward the port.")] = True,
    punch: Annotated[bool, typer.Option(help="Punch holes in NATs by TCP.")] = True,
    webrtc: Annotated[bool, typer.Option(help="Try UDP by WebRTC where TCP fails.")] = True,
    announce: Annotated[
        list[str] | None, typer.Option(metavar="MULTIADDR", help="Others reach it here too; repeat for more.")
    ] = None,
    stun: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A third party's STUN server; peers are enough.")
    ] = None,
    max_peers: Annotated[int, typer.Option(help="Peers to stay connected to, unless swarms need more.")] = 256,
    max_disk: Annotated[float, typer.Option(metavar="GB", help="Disk for contents and logs.")] = 10.0,
    max_upload: Annotated[float, typer.Option(metavar="MBIT/S", help="Of contents to peers; 0: no limit.")] = 0.0,
    max_download: Annotated[float, typer.Option(metavar="MBIT/S", help="Of contents from peers; 0: no limit.")] = 0.0,
    api_port: Annotated[int, typer.Option(help="TCP port of the local API; 0: any.")] = 0,
    serve_bench: Annotated[bool, typer.Option("--serve-bench", help="Let peers run `shoal bench` against it.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background; return when ready.")] = False,
    as_json: AsJson = False,
    ready_fd: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Run a node. It stays in the foreground; Ctrl-C ends it."""
    from shoal.node.config import NodeConfig, budget_limits, default_listen, parse_relay_limits
    from shoal.node.reach.settings import ReachConfig

    config = NodeConfig(
        profile=profile,
        listen=tuple(listen or default_listen()),
        bootstrap=tuple(bootstrap or ()),
        mdns=mdns,
        reach=ReachConfig(
            relay=relay,
            relay_limits=parse_relay_limits(relay_limit or ()),
            port_mapping=port_mapping,
            punch=punch,
            webrtc=webrtc,
            announce=tuple(announce or ()),
            stun_servers=tuple(stun or ()),
        ),
        max_peers=max_peers,
        budgets=budget_limits(max_disk, max_upload, max_download),
        api_port=api_port,
        serve_bench=serve_bench,
    )
    if detach:
        from shoal.cli.spawn import BackgroundNode

        _say_ready(BackgroundNode(config).wait_ready(), detached=True, as_json=as_json)
        return
    if ready_fd >= 0:
        _run_for_parent(config, ready_fd)
        return

    def on_ready(info: NodeInfo) -> None:
        _say_ready(ready_answer(info), detached=False, as_json=as_json)

    _run(config, on_ready, foreground=True)


def _say_ready(ready: dict[str, Any], *, detached: bool, as_json: bool) -> None:
    if as_json:
        print_json(ready)
        return
    from shoal.cli import render

    console().print(render.ready(ready, detached=detached), soft_wrap=True)


def ready_answer(info: NodeInfo) -> dict[str, Any]:
    """What ``shoal up --json`` prints."""
    keys = {"peer_id", "addresses", "api", "pid", "profile"}
    return info.model_dump(mode="json", include=keys)


def _run(config: NodeConfig, on_ready: Callable[[NodeInfo], None], *, foreground: bool) -> None:
    from shoal.node import daemon  # libp2p takes a second
    from shoal.node.logs import set_up_logging

    set_up_logging(config.paths.log, foreground=foreground)
    daemon.run(config, on_ready=on_ready)


def _run_for_parent(config: NodeConfig, ready_fd: int) -> None:
    import json

    os.set_inheritable(ready_fd, False)  # a worker that held it open would look like a node still starting
    pipe = os.fdopen(ready_fd, "w", encoding="utf-8")

    def tell(answer: dict[str, Any]) -> None:
        if pipe.closed:
            return
        try:
            with pipe:
                pipe.write(json.dumps(answer) + "\n")
        except BrokenPipeError:  # whoever started us has gone; we stay
            pass

    try:
        _run(config, lambda info: tell(ready_answer(info)), foreground=False)
    except ShoalError as error:
        tell({"error": {"code": error.exit_code, "message": str(error)}})
        raise
    except Exception as error:
        tell({"error": {"code": 1, "message": f"the node failed to start: {error!r:.200}; see {config.paths.log}"}})
        raise


def down(profile: Profile = "default", as_json: AsJson = False) -> None:
    """Stop the node."""
    pid = stop_node(profile)
    print_json({"stopped": True, "pid": pid, "profile": profile}) if as_json else typer.echo("stopped")


def stop_node(profile: str) -> int:
    """Ask the node of a profile to end, and wait until it has; gives its process id.

    Raises:
        NoDaemonError: if none runs.
        ShoalError: if it does not end.
    """
    from shoal.cli.spawn import wait_gone

    paths = profile_paths(profile)
    holder = lock_holder(paths.lock)
    try:
        with connect(profile) as client:
            pid = client.stop()
    except NoDaemonError:
        if holder is None:
            raise
        pid = holder  # it starts, ends, or hangs: the API is not there
        os.kill(pid, signal.SIGTERM)
    if not wait_gone(pid, STOP_TIMEOUT_S):
        raise ShoalError(
            f"the node (pid {pid}) has not ended in {STOP_TIMEOUT_S:.0f} s; see {paths.log}, or: kill {pid}"
        )
    return pid


def status(profile: Profile = "default", as_json: AsJson = False) -> None:
    """What this node is doing."""
    with connect(profile) as client:
        info = client.node()
        if as_json:
            print_json(info)
            return
        found = client.swarms()
    from shoal.cli import render

    console().print(render.status(info, found))


def peers(profile: Profile = "default", as_json: AsJson = False) -> None:
    """The nodes that this one is connected to."""
    with connect(profile) as client:
        found = client.peers()
    if as_json:
        print_json(found)
        return
    from shoal.cli import render

    console().print(render.peers(found))


def nat(profile: Profile = "default", as_json: AsJson = False) -> None:
    """What this node is behind, and how it is reached."""
    with connect(profile) as client:
        info = client.nat()
    if as_json:
        print_json(info)
        return
    from shoal.cli import render

    console().print(render.nat(info))


def doctor(profile: Profile = "default", as_json: AsJson = False) -> None:
    """What stands between this node and its peers, and what you can do about it."""
    with connect(profile) as client:
        info = client.doctor()
    if as_json:
        print_json(info)
        return
    from shoal.cli import render

    console().print(render.doctor(info))


def ping(
    peer: Annotated[str, typer.Argument(help="A peer's name, its beginning if connected, or a multiaddr (…/p2p/…).")],
    count: Annotated[int, typer.Option("--count", "-c", min=1, help="How often.")] = 4,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Reach a peer, and tell by which path and how long it takes."""
    with connect(profile) as client:
        for number in range(count):
            if number:
                time.sleep(PING_INTERVAL_S)
            found = client.ping(peer)
            if as_json:
                print_json(found)
                continue
            from shoal.cli import render

            console().print(render.ping(found), soft_wrap=True)
