"""Names are what they name; a signature holds for one author, one kind and one payload."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ShoalError, SignatureError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import SIGNATURE_BYTES, Signed, Signer, verify

ANN, BOB = Signer(b"a" * 32), Signer(b"b" * 32)


def test_a_peer_id_is_its_key() -> None:
    peer = PeerId.parse(str(ANN.peer_id))
    assert peer == ANN.peer_id
    assert peer.startswith("12D3KooW")
    assert PeerId.of_public_key(peer.public_key) == peer
    assert len(peer.public_key) == 32


def test_a_peer_id_is_that_of_libp2p() -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    assert ID.from_pubkey(create_new_key_pair(b"a" * 32).public_key).to_base58() == ANN.peer_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0OIl",
        "é",
        "😀" * 10,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        str(ANN.peer_id)[:-1],
        str(ANN.peer_id) + "1",
        "1" + str(ANN.peer_id),
        " " + str(ANN.peer_id),
        str(ANN.peer_id) + "\n",
        str(Cid.of_block(b"x")),
        "1" * 100_000,
        "z" * 100_000,
    ],
)
def test_what_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="peer id"):
        PeerId.parse(text)


def test_a_cid_is_what_other_tools_say() -> None:
    # ipfs add --cid-version=1 of a file with this content
    assert Cid.of_block(b"hello world") == "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    digest = hashlib.sha256(b"x").digest()
    raw = bytes([1, 0x81, 4, 0x12, 0x20]) + digest  # 0x0201, messagepack, as a varint
    assert Cid.of_manifest(b"x") == "b" + base64.b32encode(raw).decode().rstrip("=").lower()


@given(st.binary(max_size=50), st.booleans())
def test_a_cid_reads_back(data: bytes, is_manifest: bool) -> None:
    cid = Cid.of_manifest(data) if is_manifest else Cid.of_block(data)
    assert Cid.parse(str(cid)) == cid
    assert Cid.from_bytes(cid.to_bytes()) == cid
    assert cid.is_manifest == is_manifest
    assert cid.matches(data)
    assert cid.matches(memoryview(data))
    assert not cid.matches(data + b"x")


CID = str(Cid.of_block(b"x"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        CID[:-1],
        CID + "a",
        CID.upper(),
        "z" + CID[1:],
        CID + "=",
        CID[:-1] + "1",
        CID[:-1] + "é",
        CID[:-1] + "\u0131",
        " " + CID,
        CID + "\n",
        "b" + "a" * 68,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "b" * 100_000,
    ],
)
def test_what_is_no_cid_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="CID"):
        Cid.parse(text)


@given(st.text(max_size=70))
def test_any_text_is_a_name_or_is_refused(text: str) -> None:
    for kind in (PeerId, Cid, SwarmId):
        for candidate in (text, "b" + text, "12D3KooW" + text):
            with contextlib.suppress(UsageError):
                assert kind.parse(candidate) == candidate


@given(st.binary(max_size=70))
def test_any_bytes_are_a_cid_or_are_refused(raw: bytes) -> None:
    with contextlib.suppress(UsageError):
        assert Cid.from_bytes(raw).to_bytes() == raw


def test_one_name_has_one_spelling() -> None:
    data = base58.b58decode(str(ANN.peer_id))
    assert base58.b58encode(data).decode() == ANN.peer_id
    swarm = SwarmId.of_manifest(b"x")
    assert type(SwarmId.parse(str(swarm))) is SwarmId


def test_a_signature_holds() -> None:
    signed = ANN.seal("op/1", b"payload")
    assert len(signed.signature) == SIGNATURE_BYTES
    signed.check("op/1")
    verify(ANN.peer_id, "op/1", b"payload", ANN.sign("op/1", b"payload"))


@pytest.mark.parametrize(
    ("author", "kind", "payload"),
    [
        (BOB.peer_id, "op/1", b"payload"),
        (ANN.peer_id, "op/2", b"payload"),
        (ANN.peer_id, "op/1", b"other"),
        (ANN.peer_id, "op/1\0p", b"ayload"),
        (PeerId.of_public_key(bytes(32)), "op/1", b"payload"),
        (PeerId.of_public_key(b"\xff" * 32), "op/1", b"payload"),
    ],
)
def test_a_signature_holds_for_nothing_else(author: PeerId, kind: str, payload: bytes) -> None:
    with pytest.raises(SignatureError):
        verify(author, kind, payload, ANN.sign("op/1", b"payload"))


@given(st.binary(max_size=80))
def test_any_other_bytes_are_no_signature(signature: bytes) -> None:
    with pytest.raises(ShoalError):
        Signed(ANN.peer_id, b"payload", signature).check("op/1")


@pytest.mark.parametrize("y", [1, 0, 2**255 - 20, 2**255 - 19, 2**255 - 18])
@pytest.mark.parametrize("sign", [0, 2**255])
def test_a_key_of_small_order_signs_nothing(y: int, sign: int) -> None:
    # With the identity as public key, R = identity and S = 0 satisfy the equation for every message.
    identity = PeerId.of_public_key((y + sign).to_bytes(32, "little"))
    forged = b"\x01" + bytes(31) + bytes(32)
    with pytest.raises(SignatureError):
        verify(identity, "op/1", b"anything", forged)
