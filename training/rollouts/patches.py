"""New weights for actors as patches: what changed between two copies of a policy, bit for bit.

After PULSE (Miahi and Belilovsky, arXiv 2602.03839): actors act by bfloat16, in which most of what an optimiser does to
a weight is too small to be seen; so between two versions few words differ, and only these are sent, by the gaps between
their indices and by their values, compressed. Every so often all words are sent (a *keyframe*). Each patch names what
it is a patch of and the digest of all words that come of it, so a copy is right to the bit or it is not taken.

Deviations from the paper. A value is sent as how many steps of bfloat16 it is from the one before, not as itself: still
exact, and small numbers compress where bits of mantissas do not. Where so many words differ that their indices cost
more than zeros would, the steps of all words are sent (*dense*). Whatever is smallest is sent, a keyframe too.

`eased` makes a copy that moves less: words that are only a few steps off stay as they are, and are sent when they have
come further. What actors act by is then not the rounded policy but a close one that all agree on by its digest, and
log-probabilities are this one's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import LimitError, ProtocolError, ShoalError, UsageError
from shoal.training.rollouts.acting import Words
from shoal.training.rollouts.packed import Array, compress, decompress
from shoal.training.statements import HASH_BYTES, MAX_EPOCH

FORM: Final = b"pat\x01"
MAX_WORDS: Final = 2**31
MAX_HEAD_BYTES: Final = 512
_LENGTH_BYTES: Final = 4
_LEVEL: Final = 9
_BYTES: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
_SIGN: Final = np.uint16(0x8000)

_Steps = npt.NDArray[np.uint16]


class PatchKind(StrEnum):
    """What is sent."""

    KEY = "key"
    SPARSE = "sparse"
    DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchHead:
    """What a patch says of itself.

    Attributes:
        kind: see the head of this module.
        version: of the policy.
        words: of a copy.
        base: digest of the copy that is patched; empty of a keyframe.
        digest: of the copy that comes of it, SHA-256 over its little-endian words.
        changed: how many words are sent.
        gap_bytes: of one gap between indices; 0 where there are none.
        value_bytes: of one value.
        gaps: length of the compressed gaps.
    """

    kind: PatchKind
    version: int
    words: int
    base: bytes
    digest: bytes
    changed: int
    gap_bytes: int
    value_bytes: int
    gaps: int

    def __post_init__(self) -> None:
        is_key, is_sparse = self.kind is PatchKind.KEY, self.kind is PatchKind.SPARSE
        if not 0 <= self.version <= MAX_EPOCH or not 1 <= self.words <= MAX_WORDS:
            raise ProtocolError("a patch is of a version or a length that no policy has; refuse it")
        if len(self.digest) != HASH_BYTES or len(self.base) != (0 if is_key else HASH_BYTES):
            raise ProtocolError(
                "a patch names its digest, and unless it is a keyframe what it is a patch of; refuse it"
            )
        if not 0 <= self.changed <= self.words or (not is_sparse and self.changed != self.words):
            raise ProtocolError("a patch changes more words than there are, or not all that it should; refuse it")
        if (
            (self.gap_bytes in _BYTES) != is_sparse
            or (not is_sparse and (self.gap_bytes or self.gaps))
            or self.gaps < 0
        ):
            raise ProtocolError("only a sparse patch has gaps; refuse it")
        if self.value_bytes not in (1, 2) or (is_key and self.value_bytes != 2):
            raise ProtocolError("a word changes by one byte or two; refuse it")


class MissingBaseError(ShoalError):
    """A patch is of a copy that is not here. Nobody is to blame: take a keyframe, or the patches before it."""


def digest_of(words: Words) -> bytes:
    """By which a copy is known."""
    return hashlib.sha256(words.astype("<u2", copy=False).tobytes()).digest()


def key_of(words: Words, version: int) -> bytes:
    """A keyframe: all words of a copy."""
    head = PatchHead(
        kind=PatchKind.KEY,
        version=version,
        words=words.size,
        base=b"",
        digest=digest_of(words),
        changed=words.size,
        gap_bytes=0,
        value_bytes=2,
        gaps=0,
    )
    return _sealed(head, b"", _packed(words, 2))


def patch_of(before: Words, words: Words, version: int) -> bytes:
    """The smallest of a sparse patch, a dense one and a keyframe.

    Args:
        before: the copy that is there.
        words: the copy that is to be, as long.
        version: of the policy.

    Raises:
        UsageError: if they are not as long.
    """
    if before.shape != words.shape or not words.size:
        raise UsageError(f"a copy of {words.size} words is no patch of one of {before.size}; send a keyframe")
    steps = _steps_between(before, words)
    places = np.flatnonzero(steps)
    gaps = np.diff(places, prepend=-1) - 1
    gap_bytes, value_bytes = _narrowest(gaps, (1, 2, 4)), _narrowest(steps, (1, 2))
    base, digest = digest_of(before), digest_of(words)
    packed_gaps = _packed(gaps, gap_bytes)

    def made(kind: PatchKind, changed: int, gap_size: int, packed: bytes, values: Array) -> bytes:
        head = PatchHead(
            kind=kind,
            version=version,
            words=words.size,
            base=base,
            digest=digest,
            changed=changed,
            gap_bytes=gap_size,
            value_bytes=value_bytes,
            gaps=len(packed),
        )
        return _sealed(head, packed, _packed(values, value_bytes))

    sparse = made(PatchKind.SPARSE, len(places), gap_bytes, packed_gaps, steps[places])
    dense = made(PatchKind.DENSE, words.size, 0, b"", steps)
    return min(sparse, dense, key_of(words, version), key=len)


def head_of(data: bytes | memoryview) -> PatchHead:
    """What a patch from anybody says of itself.

    Raises:
        ProtocolError: if it is none.
    """
    return _opened(memoryview(data))[0]


def apply(before: Words | None, data: bytes | memoryview, num_words: int, *, digest: bytes | None = None) -> Words:
    """The copy that a patch from anybody leads to.

    Args:
        before: the copy that is here; None: none.
        data: the patch.
        num_words: how many words a copy of this policy has (`ActorShape.num_words`); nothing larger is unpacked.
        digest: of the copy that is wanted, if it is known by somebody's signed word; None: the patch's own counts.

    Raises:
        MissingBaseError: if it is a patch of another copy than the one that is here. Nothing was unpacked.
        LimitError: if it is of a larger copy. Likewise.
        ProtocolError: if it does not lead to what it says, or to what is wanted.
    """
    head, packed_gaps, packed_values = _opened(memoryview(data))
    if head.words != num_words:
        raise LimitError(f"a patch is of {head.words} words and this policy's copy has {num_words}; refuse it")
    if digest is not None and head.digest != digest:
        raise ProtocolError("this patch leads to another copy than the one that is wanted; fetch it from another peer")
    if head.kind is PatchKind.KEY:
        words = _unpacked(packed_values, num_words, 2).astype(np.uint16)
    else:
        if before is None or before.size != num_words or digest_of(before) != head.base:
            raise MissingBaseError(
                "this patch is of a copy that is not here; take a keyframe, or the patches before it"
            )
        steps = _unpacked(packed_values, head.changed, head.value_bytes).astype(np.uint16)
        if head.kind is PatchKind.SPARSE:
            places = np.cumsum(_unpacked(packed_gaps, head.changed, head.gap_bytes).astype(np.int64) + 1) - 1
            if len(places) and places[-1] >= num_words:
                raise ProtocolError("a patch changes words that there are not; fetch it from another peer")
            words = before.copy()
            words[places] = _stepped(before[places], steps)
        else:
            words = _stepped(before, steps)
    if digest_of(words) != head.digest:
        raise ProtocolError("a patch does not lead to the copy that it names; fetch it from another peer")
    return words


def eased(before: Words, exact: Words, num_parameters: int, *, most: int) -> Words:
    """A copy near the exact one that differs in fewer words from the one before.

    Args:
        before: the copy that is there.
        exact: what rounding the policy gives.
        num_parameters: of the first words, which are bfloat16; those after them stay exact.
        most: words that are at most so many steps of bfloat16 off stay as they were.
    """
    zigzag = _steps_between(before[:num_parameters], exact[:num_parameters])
    distance = (zigzag.astype(np.int64) + 1) >> 1
    words = exact.copy()
    words[:num_parameters] = np.where(distance <= most, before[:num_parameters], exact[:num_parameters])
    return words


class Patcher:
    """The sender's side: patches, and a keyframe every so often.

    Attributes:
        every: versions from one keyframe to the next.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise UsageError(f"a keyframe every {every} versions is none; say 1 or more")
        self.every = every
        self._before: Words | None = None
        self._since = 0

    def next(self, words: Words, version: int) -> bytes:
        """What to send of a new version."""
        if self._before is None or self._since + 1 >= self.every or self._before.shape != words.shape:
            data = key_of(words, version)
        else:
            data = patch_of(self._before, words, version)
        self._since = 0 if head_of(data).kind is PatchKind.KEY else self._since + 1
        self._before = words.copy()
        return data


# --- bytes -----------------------------------------------------------------------------------------------------------


def _sealed(head: PatchHead, gaps: bytes, values: bytes) -> bytes:
    told = encode(head)
    return FORM + len(told).to_bytes(_LENGTH_BYTES, "little") + told + gaps + values


def _opened(view: memoryview) -> tuple[PatchHead, memoryview, memoryview]:
    start = len(FORM) + _LENGTH_BYTES
    if bytes(view[: len(FORM)]) != FORM:
        raise ProtocolError("these bytes are no patch, or one of another version; update Shoal if others take them")
    length = int.from_bytes(view[len(FORM) : start], "little")
    if length > MAX_HEAD_BYTES or start + length > len(view):
        raise LimitError(
            f"a patch's head of {length} bytes does not fit into it, or exceeds {MAX_HEAD_BYTES}; refuse it"
        )
    told = bytes(view[start : start + length])
    head = decode(PatchHead, told, max_bytes=MAX_HEAD_BYTES, strict=True)
    if encode(head) != told or start + length + head.gaps > len(view):
        raise ProtocolError("a patch is not written in the canonical form, or is cut short; fetch it from another peer")
    middle = start + length + head.gaps
    return head, view[start + length : middle], view[middle:]


def _packed(numbers: Array, width: int) -> bytes:
    """Numbers of so many bytes each, the first bytes of all before the second ones."""
    flat: npt.NDArray[np.uint8] = np.frombuffer(numbers.astype(_BYTES[width]).tobytes(), np.uint8)
    return compress(flat.reshape(-1, width).T.tobytes(), _LEVEL)


def _unpacked(packed: memoryview, count: int, width: int) -> Array:
    size = count * width
    planes = np.frombuffer(decompress(packed, size, max_bytes=size), np.uint8)
    return np.frombuffer(planes.reshape(width, -1).T.tobytes(), _BYTES[width])


def _narrowest(numbers: Array, widths: tuple[int, ...]) -> int:
    most = int(numbers.max(initial=0))
    return next(width for width in widths if most < 2 ** (8 * width))


# --- bfloat16 by steps -----------------------------------------------------------------------------------------------


def _ordered(words: Words) -> Words:
    """Numbers that rise as the bfloat16 do, each one more than the one before."""
    return np.where(words & _SIGN, ~words, words | _SIGN)


def _steps_between(before: Words, words: Words) -> _Steps:
    """From one to the other, in zigzag: 0, -1, 1, -2 are 0, 1, 2, 3."""
    apart = (_ordered(words) - _ordered(before)).view(np.int16)  # modulo 2**16, so there and back is exact
    return ((apart << 1) ^ (apart >> 15)).view(np.uint16)


def _stepped(before: Words, zigzag: _Steps) -> Words:
    apart = (zigzag >> 1) ^ (~(zigzag & np.uint16(1)) + np.uint16(1))
    ordered = _ordered(before) + apart
    return np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered)
