"""A node keeps its name, and keeps it to itself."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from shoal.node.identity import create_known_identity, load_or_create_identity
from shoal.protocol.errors import ShoalError
from shoal.protocol.signing import Signer, verify


def test_the_first_start_makes_a_name_and_every_later_one_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "identity.key"
    first, second = load_or_create_identity(path), load_or_create_identity(path)
    assert first.signer.peer_id == second.signer.peer_id == Signer(second.secret).peer_id
    verify(first.signer.peer_id, "test", b"x", second.signer.sign("test", b"x"))


def test_two_profiles_are_two_nodes(tmp_path: Path) -> None:
    first, second = load_or_create_identity(tmp_path / "a"), load_or_create_identity(tmp_path / "b")
    assert first.signer.peer_id != second.signer.peer_id


def test_a_known_identity_is_the_same_by_the_same_seed_and_is_found_by_the_node(tmp_path: Path) -> None:
    one, again, other = (
        create_known_identity(tmp_path / name, seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert one.signer.peer_id == again.signer.peer_id != other.signer.peer_id
    assert load_or_create_identity(tmp_path / "a").secret == one.secret


def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "identity.key"
    load_or_create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    path.chmod(0o644)
    with pytest.raises(ShoalError, match="chmod 600"):
        load_or_create_identity(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_said_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ShoalError, match="damaged"):
        load_or_create_identity(path)
    assert path.read_bytes() == content


def test_a_key_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "identity.key"
    folder.mkdir(mode=0o700)
    with pytest.raises(ShoalError, match="cannot be read"):
        load_or_create_identity(folder)


def test_the_secret_is_not_printed(tmp_path: Path) -> None:
    identity = load_or_create_identity(tmp_path / "identity.key")
    assert repr(identity.secret) not in repr(identity)
