"""Small private files, written whole or not at all, with failures said in one line.

What a node keeps is this user's alone: its key is its name. So a folder that somebody else made, or that others may
write to, is refused, and so is one that lies in such a one: they could put what they like in its place. A folder with
the sticky bit (/tmp) lets nobody do that, and ends the looking upwards. Files are not opened through symbolic links.
The rule is OpenSSH's (StrictModes), but that a group with nobody else in it is this user.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
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


def make_own_folder(path: Path) -> None:
    """As `make_private_folder`, for what nobody else may have made or may change.

    Raises:
        ShoalError: if it cannot be made, or if somebody else could have put there what is in it.
    """
    make_private_folder(path)
    check_own_folder(path)


def check_own_folder(path: Path) -> None:
    """Check that a folder and those above it are of this user, or of root, and that nobody else may write to them.

    Raises:
        ShoalError: if that is not so. One that is not there yet is nobody's.
    """
    try:
        ours = path.lstat()
        if ours.st_uid != os.geteuid():
            raise _not_ours(path, f"belongs to {_user(ours.st_uid)}")
        for start in dict.fromkeys((path.absolute(), path.resolve())):
            for folder in (start, *start.parents):
                found = folder.lstat()
                if found.st_uid not in (os.geteuid(), 0):
                    raise _not_ours(folder, f"belongs to {_user(found.st_uid)}")
                if stat.S_ISLNK(found.st_mode):
                    continue
                if found.st_mode & stat.S_ISVTX and folder != start:
                    break
                if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid)):
                    raise _not_ours(folder, f"can be written to by others (mode {stat.S_IMODE(found.st_mode):04o})")
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(path, error) from error


def check_own_file(path: Path) -> None:
    """Check that a file, if there is one, is this user's and no link to another.

    Raises:
        ShoalError: if it is not.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(path, error) from error
    if stat.S_ISLNK(found.st_mode):
        raise _not_ours(path, "is a symbolic link")
    if found.st_uid != os.geteuid():
        raise _not_ours(path, f"belongs to {_user(found.st_uid)}")


def open_own(path: Path, flags: int) -> int:
    """Open a file of this user, mode 0600 where it is made; gives the descriptor.

    Raises:
        ShoalError: if it is a symbolic link, or another user's.
        OSError: if it cannot be opened for another reason.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_ours(path, "is a symbolic link") from error
        raise
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        os.close(descriptor)
        raise _not_ours(path, f"belongs to {_user(owner)}")
    return descriptor


def _not_ours(path: Path, why: str) -> ShoalError:
    return ShoalError(f"{path} {why}; set SHOAL_HOME to a folder of {_user(os.geteuid())} alone, or correct that")


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _is_own_group(number: int) -> bool:
    """Whether nobody but this user is in a group; many systems give each user one and let it write."""
    if number != os.getegid():
        return False
    try:
        group, me = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


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
