"""Who takes part in the fuzz targets: keys that never change, so that a finding is found again."""

from __future__ import annotations

from typing import Final

from shoal.protocol.ids import SwarmId
from shoal.protocol.signing import Signer

ALICE: Final = Signer(b"a" * 32)
BOB: Final = Signer(b"b" * 32)
OWN: Final = Signer(b"o" * 32)
"""The node under test."""

SWARM: Final = SwarmId.of_manifest(b"swarm")
OTHER_SWARM: Final = SwarmId.of_manifest(b"other")
