"""Two hosts on one network, each in a network namespace of its own, with the default settings."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys

import pytest

from shoal.node.api.client import Client
from shoal.node.config import NodeConfig

from .storing import StoringNode, until_together

SHOAL = [sys.executable, "-m", "shoal.cli.main"]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    names = [f"shoal-{secrets.token_hex(3)}" for _ in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "route", "add", "default", "dev", "eth0")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


def test_nodes_on_a_lan_find_each_other_and_a_ticket_is_all_it_takes_to_train_together(two_hosts, tmp_path):
    environment = os.environ | {"SHOAL_HOME": str(tmp_path)}

    def shoal(host, *words):
        command = ["ip", "netns", "exec", host, *SHOAL, *words, "--profile", host]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout

    first, second = two_hosts
    try:
        info = json.loads(shoal(first, "up", "-d", "--json"))
        assert info["addresses"][0].startswith("/ip4/10.77.0.1/tcp/")
        shoal(second, "up", "-d")
        with Client(NodeConfig(home=tmp_path, profile=second).paths, second) as client, client.events() as events:
            for event in events:  # by mDNS: nobody told it an address
                if event is not None and event.name == "node" and event.data["num_peers"] > 0:
                    break
        task = ("--task", "gym:CartPole-v1", "--algorithm", "ppo", "--target-return", "100")
        created = json.loads(shoal(first, "swarm", "create", *task, "--min-learners", "2", "--json"))
        end = json.loads(shoal(second, "join", created["ticket"], "--json").strip().splitlines()[-1])
        assert end["phase"] == "done"
        assert end["solved"]
        assert not end["trained_alone"]
    finally:
        for host in two_hosts:
            shoal(host, "down")


def test_members_that_all_stopped_and_woke_at_other_addresses_find_each_other_by_mdns(two_hosts, tmp_path):
    nodes = {host: StoringNode(tmp_path, host) for host in two_hosts}
    pids = {}

    def wake():
        environment = os.environ | {"SHOAL_HOME": str(tmp_path)}
        started = {
            host: subprocess.Popen(
                ["ip", "netns", "exec", host, *SHOAL, "up", "-d", "--json", "--profile", host],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in two_hosts
        }
        for host, process in started.items():
            info = json.loads(process.communicate(timeout=60)[0].strip().splitlines()[-1])
            nodes[host].peer_id, pids[host] = info["peer_id"], info["pid"]
        until_together(*nodes.values())

    def stop():
        for host in list(pids):
            os.kill(pids.pop(host), signal.SIGKILL)

    try:
        wake()
        stop()
        for number, host in enumerate(two_hosts, 1):  # so that nothing that they kept of each other is of use
            ip("-n", host, "addr", "flush", "dev", "eth0")
            ip("-n", host, "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            ip("-n", host, "route", "add", "default", "dev", "eth0")
        before = {host: len(node.log()) for host, node in nodes.items()}
        wake()
        assert any("on the local network" in node.log()[before[host] :] for host, node in nodes.items())
    finally:
        stop()
