"""What a node keeps is its user's alone: what others made, or could change, is refused in a line (ATTACKS row 27)."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.node.identity import load_or_create_identity
from shoal.node.lock import hold_profile, lock_holder
from shoal.node.logs import set_up_logging
from shoal.node.profile import ProfilePaths, default_home
from shoal.node.store.files import check_own_folder, make_own_folder
from shoal.protocol.errors import ShoalError, UsageError


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that everybody may write to."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of this user's that others would like to be written to."""
    file = tmp_path / "authorized_keys"
    file.write_text("mine")
    file.chmod(0o644)
    return file


@pytest.fixture
def somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is made in this test so far belongs to another user."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)


@pytest.fixture
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, own_level = root.handlers[:], root.level, logging.getLogger("shoal").level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("shoal").setLevel(own_level)


def test_a_folder_in_which_others_may_put_what_they_like_is_refused(shared: Path) -> None:
    for profile in (shared, shared / "profiles" / "default"):
        with pytest.raises(ShoalError, match=r"can be written to by others \(mode 0777\); set SHOAL_HOME"):
            ProfilePaths(profile).create()


def test_a_sticky_folder_lets_nobody_take_anothers_place(shared: Path) -> None:
    shared.chmod(0o1777)
    ProfilePaths(shared / "mine").create()
    with pytest.raises(ShoalError, match="can be written to by others"):
        ProfilePaths(shared).create()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_own_folder(tmp_path / "home")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(
        ShoalError, match=f"{tmp_path / 'home'} belongs to .*; set SHOAL_HOME to a folder of user 54321"
    ):
        check_own_folder(tmp_path / "home")


def test_a_link_to_a_folder_that_others_may_write_to_is_refused_like_that_folder(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "link").symlink_to(shared)
    with pytest.raises(ShoalError, match="can be written to by others"):
        check_own_folder(tmp_path / "link")
    (tmp_path / "fine").mkdir()
    (tmp_path / "also").symlink_to(tmp_path / "fine")
    check_own_folder(tmp_path / "also")


@pytest.mark.usefixtures("_logging")
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("lock", lambda paths: hold_profile(paths.lock, "p").__enter__()),
        ("lock", lambda paths: lock_holder(paths.lock)),
        ("identity.key", lambda paths: load_or_create_identity(paths.identity)),
        ("node.log", lambda paths: set_up_logging(paths.log, foreground=False)),
        *(
            (name, ProfilePaths.create)
            for name in ("lock", "identity.key", "node.log", "node.db", "api.json", "api.token")
        ),
    ],
)
def test_no_link_is_followed(tmp_path: Path, victim: Path, name: str, use: Callable[[ProfilePaths], object]) -> None:
    paths = ProfilePaths(tmp_path / "profile")
    paths.create()
    (paths.root / name).symlink_to(victim)
    with pytest.raises(ShoalError, match=f"{name} is a symbolic link"):
        use(paths)
    assert victim.read_text() == "mine"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o644


@pytest.mark.usefixtures("_logging")
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("identity.key", lambda paths: load_or_create_identity(paths.identity)),
        ("lock", lambda paths: lock_holder(paths.lock)),
        ("node.db", ProfilePaths.create),
    ],
)
def test_a_file_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, use: Callable[[ProfilePaths], object]
) -> None:
    """A planted key would make this node somebody else's."""
    paths = ProfilePaths(tmp_path / "profile")
    paths.create()
    (paths.root / name).write_bytes(bytes(32))
    (paths.root / name).chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(ShoalError, match="belongs to"):
        use(paths)


@pytest.mark.usefixtures("_logging")
def test_a_log_is_for_its_user_alone_also_after_it_was_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "node.log"
    set_up_logging(path, foreground=False)
    (handler,) = (each for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler))
    handler.doRollover()
    logging.getLogger("shoal").warning("a line")
    for file in (path, path.with_name("node.log.1")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "a line" in path.read_text()


# --- users without a home --------------------------------------------------------------------------------------------


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "SHOAL_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(UsageError, match="set SHOAL_HOME"):
        default_home()
    monkeypatch.setenv("SHOAL_HOME", "~/shoal")
    with pytest.raises(UsageError, match="set SHOAL_HOME"):
        default_home()


@pytest.mark.parametrize("words", [["up", "-d"], ["status"], ["swarm", "ls"], ["join", "shoal1"]])
def test_a_user_without_a_name_meets_one_clear_line(words: list[str]) -> None:
    """As in a container that runs under a number."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "SHOAL_HOME", "XDG_DATA_HOME")}
    command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", sys.executable, "-m", "shoal.cli.main"]
    done = subprocess.run([*command, *words], env=kept, cwd="/", capture_output=True, text=True, check=False)
    if "Permission denied" in done.stderr and "shoal:" not in done.stderr:
        pytest.skip("this Python is not for other users")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
