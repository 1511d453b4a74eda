"""Where a node keeps its things: a folder for each profile, which is one identity and its data.

Apart from the rest of the settings, since whoever only asks a node needs nothing else of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoal.node.store.files import check_own_file, make_own_folder
from shoal.protocol.ids import SwarmId
from shoal.protocol.profiles import API_FILE, check_profile, default_home

__all__ = ["ProfilePaths", "check_profile", "default_home"]


@dataclass(frozen=True, slots=True)
class ProfilePaths:
    """Where one profile keeps what; a profile is one node's identity and data."""

    root: Path

    @property
    def identity(self) -> Path:
        """The raw Ed25519 secret key, mode 0600."""
        return self.root / "identity.key"

    @property
    def database(self) -> Path:
        """SQLite: ops, blocks, what the node is in."""
        return self.root / "node.db"

    @property
    def lock(self) -> Path:
        """Held locked by the node that runs; holds its process id."""
        return self.root / "lock"

    @property
    def api(self) -> Path:
        """JSON: how to reach the API of the node that runs."""
        return self.root / API_FILE

    @property
    def api_token(self) -> Path:
        """The bearer token of the API on TCP, mode 0600."""
        return self.root / "api.token"

    @property
    def api_socket(self) -> Path:
        """The API's Unix socket, unless this path is too long for one."""
        return self.root / "api.sock"

    def loop_socket(self, swarm: SwarmId) -> Path:
        """Where training loops of the user attach to a swarm; in the swarm's own folder it would be too long a path."""
        return self.root / f"loop-{swarm[-16:]}.sock"

    @property
    def log(self) -> Path:
        """What the node reports."""
        return self.root / "node.log"

    def swarm(self, swarm: SwarmId) -> Path:
        """The folder of a swarm's results."""
        return self.root / "swarms" / swarm

    def create(self) -> None:
        """Make the profile's folder, for this user alone.

        Raises:
            ShoalError: if it cannot be made, or if it, or what is in it, is not this user's.
        """
        make_own_folder(self.root)
        for name in (self.identity, self.database, self.lock, self.api, self.api_token, self.log):
            check_own_file(name)
