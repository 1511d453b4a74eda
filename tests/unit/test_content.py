"""Bytes are cut, named and put together again; a manifest that lies about them is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.blocks import assemble, split
from shoal.dht.manifests import ContentManifest, open_content_manifest
from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import Cid
from shoal.protocol.limits import BLOCK_BYTES, MAX_CONTENT_BYTES

BLOCK = Cid.of_block(b"x")


def bytes_of(size: int) -> bytes:
    return (b"0123456789abcdefg" * (size // 17 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES])
def test_up_to_a_block_is_one_block(size: int) -> None:
    data = bytes_of(size)
    content = split(memoryview(data))
    assert content.cid == Cid.of_block(data)
    assert content.blocks == {content.cid: data}
    assert assemble(content.cid, content.blocks) == data


@pytest.mark.parametrize("size", [BLOCK_BYTES + 1, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_more_is_a_manifest_and_its_blocks(size: int) -> None:
    data = bytes_of(size)
    content = split(data)
    manifest = open_content_manifest(content.cid, content.blocks[content.cid])
    assert manifest.size == size
    assert all(len(content.blocks[cid]) <= BLOCK_BYTES for cid in manifest.blocks)
    assert sum(manifest.block_sizes().values()) == size
    assert assemble(content.cid, content.blocks) == data


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 3 * BLOCK_BYTES), st.integers(0, 255))
def test_any_size_comes_back_under_the_same_name(size: int, fill: int) -> None:
    data = bytes([fill]) * size  # equal blocks are one
    content = split(data)
    assert assemble(content.cid, content.blocks) == data
    assert split(memoryview(data)).cid == content.cid


def test_equal_blocks_of_another_size_are_no_lie() -> None:
    data = bytes(2 * BLOCK_BYTES)
    content = split(data)
    assert len(content.blocks) == 2
    assert assemble(content.cid, content.blocks) == data


def test_a_missing_or_damaged_block_is_told() -> None:
    content = split(bytes_of(BLOCK_BYTES + 1))
    for cid in content.blocks:
        with pytest.raises(ProtocolError, match="missing"):
            assemble(content.cid, {name: data for name, data in content.blocks.items() if name != cid})
        with pytest.raises(ProtocolError, match="damaged"):
            assemble(content.cid, content.blocks | {cid: b"other"})


@pytest.mark.parametrize(
    "fields",
    [
        {"size": BLOCK_BYTES, "blocks": [BLOCK]},
        {"size": -1, "blocks": []},
        {"size": 2 * BLOCK_BYTES, "blocks": [BLOCK]},
        {"size": 2 * BLOCK_BYTES, "blocks": [BLOCK] * 3},
        {"size": 2 * BLOCK_BYTES - 1, "blocks": [BLOCK] * 2},
        {"size": 2 * BLOCK_BYTES, "blocks": [BLOCK, Cid.of_manifest(b"x")]},
        {"size": 2 * BLOCK_BYTES, "blocks": [BLOCK, "no cid"]},
        {"size": 2 * BLOCK_BYTES, "blocks": [BLOCK] * 2, "more": 1},
        {"size": MAX_CONTENT_BYTES + 1, "blocks": []},
        {"size": 2**63, "blocks": []},
        {"size": "2", "blocks": []},
        {},
        [],
    ],
)
def test_a_manifest_that_lies_is_refused(fields: Any) -> None:
    data = encode(fields)
    with pytest.raises(ProtocolError):
        open_content_manifest(Cid.of_manifest(data), data)


def test_a_manifest_under_another_name_is_refused() -> None:
    content = split(bytes_of(BLOCK_BYTES + 1))
    data = content.blocks[content.cid]
    for cid in (Cid.of_manifest(b"other"), Cid.of_block(data)):
        with pytest.raises(ProtocolError):
            open_content_manifest(cid, data)
    with pytest.raises(LimitError):
        open_content_manifest(content.cid, bytes(BLOCK_BYTES + 1))


def test_blocks_that_are_shorter_than_the_manifest_says_are_told() -> None:
    content = split(bytes_of(BLOCK_BYTES + 2))
    manifest = open_content_manifest(content.cid, content.blocks[content.cid])
    lie = encode(dataclasses.replace(manifest, size=BLOCK_BYTES + 3))
    cid = Cid.of_manifest(lie)
    with pytest.raises(ProtocolError):
        assemble(cid, content.blocks | {cid: lie})


def test_the_largest_content_has_a_manifest_that_fits_into_a_block() -> None:
    count = MAX_CONTENT_BYTES // BLOCK_BYTES
    data = encode(ContentManifest(size=MAX_CONTENT_BYTES, blocks=(BLOCK,) * count))
    assert len(data) <= BLOCK_BYTES
    assert len(open_content_manifest(Cid.of_manifest(data), data).blocks) == count


def test_a_bomb_is_refused_by_its_manifest_and_an_honest_content_of_zeros_is_not() -> None:
    bomb = encode(ContentManifest(size=2048 * BLOCK_BYTES, blocks=(BLOCK,) * 2048))
    with pytest.raises(LimitError, match="too often"):
        open_content_manifest(Cid.of_manifest(bomb), bomb, max_bytes=MAX_CONTENT_BYTES)
    with pytest.raises(LimitError, match="allowed"):
        open_content_manifest(Cid.of_manifest(bomb), bomb, max_bytes=100 * BLOCK_BYTES)
    zeros = split(bytes(3 * BLOCK_BYTES))
    opened = open_content_manifest(zeros.cid, zeros.blocks[zeros.cid], max_bytes=3 * BLOCK_BYTES)
    assert opened.size == 3 * BLOCK_BYTES
