"""Content that is bigger than a block: the list of its blocks, itself named by a CID.

A manifest is written in one way only (the codec's canonical form), so equal content has an equal name everywhere.

A block may stand in a content many times, and so a few bytes may describe many: what is taken from others repeats a
mebibyte at most `MAX_REPEATS` times on average, beyond `FREE_REPEAT_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES

MAX_REPEATS: Final = 16
FREE_REPEAT_BYTES: Final = 16 * BLOCK_BYTES
_NAME_BYTES: Final = 64
"""Of one block in a manifest, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentManifest:
    """Some content as blocks.

    Attributes:
        size: of the content, in bytes; more than one block.
        blocks: their names in order. Each but the last has `limits.BLOCK_BYTES`; the last has the rest.
    """

    size: int
    blocks: tuple[Cid, ...]

    def __post_init__(self) -> None:
        if self.size > MAX_CONTENT_BYTES:
            raise LimitError(f"a content of {self.size} bytes exceeds the limit of {MAX_CONTENT_BYTES}")
        if self.size <= BLOCK_BYTES:
            raise ProtocolError(f"a content of {self.size} bytes is one block and has no manifest")
        count = -(-self.size // BLOCK_BYTES)
        if len(self.blocks) != count:
            raise ProtocolError(f"a content of {self.size} bytes has {count} blocks, not {len(self.blocks)}")

    def block_sizes(self) -> dict[Cid, int]:
        """How many bytes each block has, by name; blocks with equal content are one.

        Raises:
            ProtocolError: if one name would need two sizes.
        """
        sizes: dict[Cid, int] = {}
        for index, cid in enumerate(self.blocks):
            size = min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)
            if sizes.setdefault(cid, size) != size:
                raise ProtocolError(f"a manifest gives block {cid} two sizes")
        return sizes


def open_content_manifest(cid: Cid, data: bytes, *, max_bytes: int | None = None) -> ContentManifest:
    """Check bytes that somebody sent as a content's manifest, and read them.

    Args:
        cid: its name.
        data: the bytes.
        max_bytes: of the content that it may describe, and then it may not repeat a block too often; None for an own.

    Raises:
        LimitError: if they are too many, or describe too much.
        ProtocolError: if they are not what the CID names, or not a content manifest.
    """
    most = MAX_CONTENT_BYTES if max_bytes is None else max_bytes
    if len(data) > min(BLOCK_BYTES, _NAME_BYTES * (2 - (-most // BLOCK_BYTES))):
        raise LimitError(f"a manifest of {len(data)} bytes describes more than the {most} bytes that are allowed")
    if not cid.is_manifest or not cid.matches(data):
        raise ProtocolError(f"these bytes are not the manifest {cid}")
    manifest = decode(ContentManifest, data, max_bytes=BLOCK_BYTES)
    if any(block.is_manifest for block in manifest.blocks):
        raise ProtocolError(f"{cid} names a manifest where a block of raw bytes belongs")
    if encode(manifest) != data:
        raise ProtocolError(f"{cid} is not written in the canonical form")
    if manifest.size > most:
        raise LimitError(f"a content of {manifest.size} bytes is more than the {most} that are allowed")
    distinct = sum(manifest.block_sizes().values())
    if max_bytes is not None and manifest.size - FREE_REPEAT_BYTES > MAX_REPEATS * distinct:
        raise LimitError(f"a content of {manifest.size} bytes repeats its {distinct} bytes too often")
    return manifest
