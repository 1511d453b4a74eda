"""What a node accepts as its set-up, and how it keeps small private files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.node.config import NodeConfig, check_peer_address
from shoal.node.lock import hold_profile, lock_holder
from shoal.node.profile import default_home
from shoal.node.store.files import write_private
from shoal.protocol.errors import RefusedError, ShoalError, UsageError
from shoal.protocol.signing import Signer

PEER = Signer(bytes(32)).peer_id


def test_the_defaults_are_valid_and_live_under_shoal_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    config = NodeConfig()
    assert config.paths.root == tmp_path / "profiles" / "default"


def test_without_shoal_home_the_platforms_data_folder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_HOME", raising=False)
    assert default_home().name == "shoal"


@pytest.mark.parametrize("profile", ["", ".", "..", "../x", "a/b", "-x", "a b", "x" * 65, "ü"])
def test_a_profile_that_is_no_plain_name_is_refused(profile: str) -> None:
    with pytest.raises(UsageError, match="profile name"):
        NodeConfig(profile=profile)


@pytest.mark.parametrize("address", ["", "x", "/ip4/1.2.3.4", "/ip4/1.2.3.4/tcp/70000", "/ip4/1.2.3.4/udp/1", "/tcp/1"])
def test_what_is_no_place_to_listen_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"multiaddr|listen"):
        NodeConfig(listen=(address,))


def test_a_node_listens_somewhere() -> None:
    with pytest.raises(UsageError, match="at least one"):
        NodeConfig(listen=())


@pytest.mark.parametrize("address", ["x", "/ip4/1.2.3.4/tcp/1", f"/p2p/{PEER}", "/ip4/1.2.3.4/tcp/1/p2p/nobody"])
def test_a_bootstrap_address_says_where_and_whom(address: str) -> None:
    with pytest.raises(UsageError):
        NodeConfig(bootstrap=(address,))


def test_a_full_address_is_split_into_where_and_whom() -> None:
    assert check_peer_address(f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}") == ("/ip4/1.2.3.4/tcp/1", PEER)


def test_a_profile_is_held_once_and_names_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "profile" / "lock"
    assert lock_holder(lock) is None
    with hold_profile(lock, "p"):
        assert lock_holder(lock) == os.getpid()
        with pytest.raises(RefusedError, match=rf"already running \(pid {os.getpid()}\)"), hold_profile(lock, "p"):
            pass
    assert lock_holder(lock) is None
    with hold_profile(lock, "p"):
        pass


def test_a_killed_holder_frees_its_profile(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        "import sys; from pathlib import Path; from shoal.node.lock import hold_profile\n"
        "with hold_profile(Path(sys.argv[1]), 'p'):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert lock_holder(lock) == holder.pid
        holder.kill()
        holder.wait()
        assert lock_holder(lock) is None


def test_a_private_file_is_replaced_whole_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, b"one")
    write_private(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    with pytest.raises(ShoalError, match="cannot be written") as caught:
        write_private(folder, b"x")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_said_as_such() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    from shoal.node.store.files import storage_error

    with pytest.raises(OSError, match="space") as caught, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    assert "no space left" in str(storage_error(Path("/dev/full"), caught.value))
