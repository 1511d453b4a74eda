"""Small private files, written whole or not at all, with failures said in one line."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from shoal.protocol.errors import ResourceError, ShoalError

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


def make_private_folder(path: Path) -> None:
    """Create a folder, and those above it, for this user alone; leaves an existing one as it is.

    Raises:
        ShoalError: if it cannot be.
    """
    try:
        path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error


def write_private(path: Path, data: bytes) -> None:
    """Replace a file, mode 0600; a crash at any instant leaves the old content or the new.

    Raises:
        ShoalError: if it cannot be written.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # is of mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise storage_error(path, error) from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> ShoalError:
    """What the system refused, as one line that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left to write {path}; free some, or set SHOAL_HOME to a folder with space")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ShoalError(f"{path} is not writable; set SHOAL_HOME to a folder that is, or correct its permissions")
    return ShoalError(f"{path} cannot be written: {error.strerror or error}; SHOAL_HOME names another place")
