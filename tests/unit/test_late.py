"""What is not used is not loaded: neither by a node that stands idle nor by a command that asks it something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from shoal.node.profile import ProfilePaths

from .test_api import served

# With what a node seldom uses come others: of what is imported for nothing, each of these would be.
NEVER_IDLE = {
    *("aioice", "aiortc", "av", "gymnasium", "matplotlib", "numpy", "safetensors", "tensorboardX", "torch", "uvloop"),
    *("OpenSSL", "cffi.cparser", "dns", "h2.connection", "httpx", "pycparser", "requests", "rich", "urllib3"),
    *("service_identity", "shoal.cli.demo", "shoal.cli.render", "shoal.cli.swarm", "shoal.training.sim"),
}
NEVER_ASKING = NEVER_IDLE | {
    *("cryptography", "fastapi", "hypercorn", "libp2p", "multiaddr", "shoal.node.config", "starlette", "trio"),
    *("http.client", "shoal.node.api.requests", "shoal.training", "ssl"),
}


def told(program: str, **environment: str) -> Any:
    """What a program of its own prints as JSON, in its last line."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IDLE = """
    import json, sys, threading
    from shoal.cli import main

    def ask(info):
        from shoal.node.api.client import Client
        from shoal.node.profile import ProfilePaths, default_home
        from shoal.node.late import SELDOM_USED, is_late
        with Client(ProfilePaths(default_home() / "profiles" / "p"), "p") as client:
            assert client.node().peer_id == info["peer_id"]
            assert client.nat() and client.peers() == [] and client.swarms() == []
            loaded = [name for name in sys.modules if not is_late(name)]
            print(json.dumps([loaded, sorted(set(SELDOM_USED) & set(loaded))]))
            client.stop()

    node = __import__("shoal.cli.node").cli.node
    node._say_ready = lambda ready, **_: threading.Thread(target=ask, args=[ready]).start()
    sys.exit(main.run(["up", "--profile", "p", "--listen", "/ip4/127.0.0.1/tcp/0", "--mdns"]))
"""


def test_an_idle_node_that_is_asked_has_loaded_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    loaded, in_vain = told(IDLE, SHOAL_HOME=str(tmp_path))
    assert in_vain == []
    assert NEVER_IDLE & set(loaded) == set()


ASKING = """
    import json, sys
    from shoal.cli import main
    assert main.run({words}) == {code}
    print(json.dumps(list(sys.modules)))
"""


@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["peers", "--json"], ["nat", "--json"]])
def test_who_asks_in_vain_loads_nothing_of_a_node(tmp_path: Path, words: list[str]) -> None:
    assert NEVER_ASKING & set(told(ASKING.format(words=words, code=3), SHOAL_HOME=str(tmp_path))) == set()


@pytest.mark.parametrize(
    ("words", "drawn"), [(["status"], {"rich"}), (["status", "--json"], set()), (["peers"], {"rich"})]
)
def test_who_is_answered_has_loaded_little_more(tmp_path: Path, words: list[str], drawn: set[str]) -> None:
    paths = ProfilePaths(tmp_path / "profiles" / "default")
    paths.create()
    program = ASKING.format(words=words, code=0)
    loaded = set(served(paths, lambda _node, _address: told(program, SHOAL_HOME=str(tmp_path))))
    assert NEVER_ASKING & loaded == drawn | ({"shoal.cli.render"} if drawn else set())


def test_a_key_that_is_seldom_used_works_when_it_is() -> None:
    program = """
        import json, sys
        from shoal.node.late import is_late
        from libp2p.crypto import rsa, serialization
        before = is_late("Crypto")
        pair = rsa.create_new_key_pair(1024)
        key = serialization.deserialize_public_key(pair.public_key.serialize())
        signature = pair.private_key.sign(b"said")
        print(json.dumps([before, is_late("Crypto"), key.verify(b"said", signature), key.verify(b"else", signature)]))
    """
    assert told("import shoal.node\n" + textwrap.dedent(program)) == [True, False, True, False]


def test_a_name_is_resolved_when_an_address_has_one() -> None:
    program = """
        import json
        import shoal.node
        import trio
        from multiaddr import Multiaddr
        from shoal.node.late import is_late
        from libp2p.network import swarm

        resolver = swarm.DNSResolver()
        before = is_late("multiaddr.resolvers.dns")
        same = trio.run(resolver.resolve, Multiaddr("/ip4/192.0.2.1/tcp/1"))
        print(json.dumps([before, is_late("multiaddr.resolvers.dns"), [str(each) for each in same]]))
    """
    assert told(program) == [True, False, ["/ip4/192.0.2.1/tcp/1"]]


def test_what_is_loaded_late_is_the_thing_itself() -> None:
    program = """
        import json
        from shoal.node import late
        from hypercorn.protocol import H2Protocol
        from libp2p.pubsub import gossipsub

        stands_in = [isinstance(object(), H2Protocol), isinstance(gossipsub.GossipSub, type)]
        real = late.load("hypercorn.protocol.h2").H2Protocol
        from hypercorn.protocol.h2 import H2Protocol as again
        print(json.dumps([*stands_in, again is real, isinstance(object.__new__(real), H2Protocol)]))
    """
    assert told(program) == [False, True, True, True]


def test_each_can_be_loaded_and_with_it_what_is_in_its_package() -> None:
    program = """
        import json
        import shoal.node.daemon
        from shoal.node.late import SELDOM_USED, is_late, load

        client = load("libp2p.bitswap.client")
        together = [is_late("libp2p.bitswap.wantlist"), is_late("coincurve")]
        code = [bool(vars(load(name)).get("__file__")) for name in SELDOM_USED]
        print(json.dumps([*together, isinstance(client.BitswapClient, type), all(code)]))
    """
    assert told(program) == [False, True, True, True]


def test_an_object_that_others_keep_is_made_when_it_is_asked() -> None:
    program = """
        import json
        import shoal.node.daemon
        from libp2p.rcmgr.memory_stats import MemoryStatsCache
        from shoal.node.late import is_late

        cache = MemoryStatsCache()
        before = is_late("psutil")
        print(json.dumps([before, cache.get_memory_stats().process_memory_bytes > 2**20]))
    """
    assert told(program) == [True, True]


def test_the_description_of_the_api_is_drawn_when_it_is_asked_for() -> None:
    program = """
        import json
        from shoal.node.api.app import create_app
        from shoal.node.late import is_late

        app = create_app(None)
        before = is_late("fastapi.openapi.models")
        described = app.openapi()
        print(json.dumps([before, described["openapi"][0], "CreateSwarm" in described["components"]["schemas"]]))
    """
    assert told(program) == [True, "3", True]
