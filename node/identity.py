"""The node's name: one Ed25519 secret per profile, made at the first start and never shown."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shoal.node.store.files import make_own_folder, open_own, write_private
from shoal.protocol.errors import ShoalError
from shoal.protocol.signing import Signer

SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's key, ready to sign, and raw for libp2p."""

    signer: Signer
    secret: bytes = field(repr=False)


def load_or_create_identity(path: Path) -> Identity:
    """Read the secret key, or make one.

    Raises:
        ShoalError: if the file cannot be read or written, is not a key, or is open to other users.
    """
    try:
        with open(open_own(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123  a descriptor
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(SECRET_BYTES + 1)
    except FileNotFoundError:
        return _create(path)
    except OSError as error:
        raise ShoalError(f"the identity {path} cannot be read: {error.strerror}; correct its permissions") from error
    if mode & 0o077:
        raise ShoalError(f"the identity {path} is open to other users (mode {mode:04o}); run: chmod 600 {path}")
    if len(secret) != SECRET_BYTES:
        raise ShoalError(
            f"the identity {path} is damaged; restore it from a backup, or move it away to start as a new node"
        )
    return Identity(Signer(secret), secret)


def create_known_identity(path: Path, seed: str) -> Identity:
    """Make a key that anybody can make who knows the seed: for nodes that live for one command on one machine.

    What a node learns from may depend on its name, so such a command comes to the same again.
    """
    return _create(path, hashlib.sha256(f"shoal known identity/{seed}".encode()).digest())


def _create(path: Path, secret: bytes | None = None) -> Identity:
    make_own_folder(path.parent)
    secret = secrets.token_bytes(SECRET_BYTES) if secret is None else secret
    write_private(path, secret)
    return Identity(Signer(secret), secret)
