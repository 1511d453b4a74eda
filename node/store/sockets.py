"""Unix sockets that nobody but this user can open."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from shoal.node.store.files import storage_error

MAX_PATH_BYTES: Final = 107  # sun_path, less its zero byte; unix(7)


def place(wanted: Path, stack: ExitStack) -> Path:
    """Where a socket can be put: where it is wanted or, if that path is too long, in a folder that goes with ``stack``.

    Raises:
        ShoalError: if there can be no such folder.
    """
    if len(os.fsencode(wanted)) <= MAX_PATH_BYTES:
        return wanted
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = runtime if runtime and Path(runtime).is_dir() and len(os.fsencode(runtime)) < 64 else "/tmp"  # noqa: S108  mkdtemp makes a private folder in it
    try:
        folder = Path(tempfile.mkdtemp(prefix="shoal-", dir=parent))
    except OSError as error:
        raise storage_error(Path(parent), error) from error
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder / wanted.name


def listen(path: Path) -> socket.socket:
    """A listener at a path of this node's own; what another life left there is replaced.

    Raises:
        ShoalError: if there can be none.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # left by a node that was killed; we hold the profile's lock
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise storage_error(path, error) from error
    return listener
