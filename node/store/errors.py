"""What goes wrong with what is on disk, each told with its path and what to do."""

from __future__ import annotations

import errno
from pathlib import Path

from shoal.protocol.errors import ResourceError, ShoalError


class StorageError(ShoalError):
    """Something on disk cannot be read or written; what was written before is still there, unless it is damaged."""


class StorageFullError(StorageError, ResourceError):
    """There is no space to write."""


def told(path: Path, error: OSError) -> StorageError:
    """What the system refused, as one line that says what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return StorageFullError(
                f"{path}: the disk is full; free some space, or start the node with a lower --max-disk"
            )
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return StorageError(f"{path} cannot be written ({error.strerror}); check the rights of it and its folder")
    return StorageError(f"{path}: the disk failed ({error.strerror or error}); check it")
