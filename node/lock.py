"""One node per profile: a lock that the system releases however the node ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.node.store.files import make_own_folder, open_own, storage_error
from shoal.protocol.errors import RefusedError


@contextmanager
def hold_profile(path: Path, profile: str) -> Iterator[None]:
    """Hold the profile's lock file while the node runs.

    Raises:
        RefusedError: if a node already runs under it.
        ShoalError: if the file cannot be written.
    """
    make_own_folder(path.parent)
    try:
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            raise RefusedError(
                f"profile {profile!r} is already running (pid {pid}); stop it with `shoal down --profile {profile}`, "
                "or start another with --profile"
            ) from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise storage_error(path, error) from error
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, since removing it would race with the next holder


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock now, if any."""
    try:
        descriptor = open_own(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 20, 0).strip()
        return int(text) if text.isdigit() else None
    else:
        return None
    finally:
        os.close(descriptor)
