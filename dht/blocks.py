"""Bytes cut into blocks that are named by their hash, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shoal.dht.manifests import ContentManifest, open_content_manifest
from shoal.protocol.codec import encode
from shoal.protocol.errors import ProtocolError, TooLargeError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES


@dataclass(frozen=True, slots=True)
class Content:
    """Some bytes, ready to be served.

    Attributes:
        cid: their name: of the only block, or of the manifest.
        blocks: every block by name, the manifest with them.
    """

    cid: Cid
    blocks: dict[Cid, bytes]


@dataclass(frozen=True, slots=True)
class Named:
    """What some bytes are called.

    Attributes:
        cid: of the only block, or of the manifest.
        manifest: what they consist of; None if they are one block.
        manifest_bytes: the manifest as a block; empty if they are one block.
    """

    cid: Cid
    manifest: ContentManifest | None = None
    manifest_bytes: bytes = b""


def name(data: bytes | memoryview) -> Named:
    """Find out what bytes are called, without copying them; equal bytes have an equal CID everywhere.

    Raises:
        TooLargeError: if they are more than one content may have.
    """
    if len(data) > MAX_CONTENT_BYTES:
        raise TooLargeError(f"a content of {len(data)} bytes exceeds the limit of {MAX_CONTENT_BYTES}; split it")
    if len(data) <= BLOCK_BYTES:
        return Named(Cid.of_block(data))
    manifest = ContentManifest(size=len(data), blocks=tuple(Cid.of_block(part) for part in _parts(data)))
    encoded = encode(manifest)
    return Named(Cid.of_manifest(encoded), manifest, encoded)


def split(data: bytes | memoryview) -> Content:
    """Cut bytes into blocks; see `name`."""
    named = name(data)
    if named.manifest is None:
        return Content(named.cid, {named.cid: bytes(data)})
    parts = {cid: bytes(part) for cid, part in zip(named.manifest.blocks, _parts(data), strict=True)}
    return Content(named.cid, {named.cid: named.manifest_bytes, **parts})


def _parts(data: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + BLOCK_BYTES] for start in range(0, len(view), BLOCK_BYTES))


def assemble(cid: Cid, blocks: Mapping[Cid, bytes]) -> bytes:
    """Put a content together; every block is checked against its name.

    Raises:
        ProtocolError: if a block is missing, or not what its name says.
    """
    first = _checked(cid, blocks)
    if not cid.is_manifest:
        return first
    manifest = open_content_manifest(cid, first)
    data = b"".join(_checked(block, blocks) for block in manifest.blocks)
    if len(data) != manifest.size:
        raise ProtocolError(f"the blocks of {cid} make {len(data)} bytes, not {manifest.size}")
    return data


def _checked(cid: Cid, blocks: Mapping[Cid, bytes]) -> bytes:
    data = blocks.get(cid)
    if data is None:
        raise ProtocolError(f"block {cid} is missing; fetch it first")
    if not cid.matches(data):
        raise ProtocolError(f"block {cid} is damaged; fetch it again")
    return data
