"""A contribution of large arrays, to and from the memory that a worker shares with its node.

Its content, which is signed and fetched by everybody, is the hashes of its parts and then what is small of it. What is
large lies in the arena as differences from the centres (`shoal.training.exchange.layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.errors import ProtocolError
from shoal.protocol.tensors import TensorCodec
from shoal.training.exchange.averager import Arrays
from shoal.training.exchange.codecs import Sender
from shoal.training.exchange.layout import HASH_BYTES, Layout

_Array: TypeAlias = npt.NDArray[Any]


def pack(
    layout: Layout,
    sender: Sender,
    arrays: Mapping[str, _Array],
    lossy: Mapping[str, float],
    centres: Mapping[str, _Array],
    offered: memoryview,
) -> bytes:
    """Write what is large to where others pull it from, and give the contribution's content.

    Args:
        layout: of what is large.
        sender: what its codec loses it makes up for next time, once `Sender.settle` says that this arrived.
        arrays: all of the contribution.
        lossy: as for `Sender.encode`; so are ``centres``.
        centres: as above.
        offered: `Layout.num_bytes`.
    """
    large = {segment.name for segment in layout.segments}
    small = sender.encode({name: array for name, array in arrays.items() if name not in large}, lossy, centres)
    wanted: dict[str, _Array] = {}
    for segment in layout.segments:
        name, array = segment.name, arrays[segment.name]
        if name in lossy and (segment.codec is not TensorCodec.FP32 or name in sender.memory):
            wanted[name] = sender.wanted(name, array, lossy, centres)
        else:
            wanted[name] = array - centres[name] if name in centres else array
    layout.encode(wanted, offered)
    for name in wanted.keys() & sender.memory.keys():
        sender.repay(name)
    inexact = {segment.name for segment in layout.segments if segment.codec is not TensorCodec.FP32}
    if inexact:
        came = layout.decode(offered)
        for name in inexact:
            sender.lose(name, wanted[name] - came[name].reshape(wanted[name].shape))
    return layout.hashes(offered) + small


def unpack(layout: Layout, template: Mapping[str, _Array], centres: Mapping[str, _Array], result: memoryview) -> Arrays:
    """What is large of the average.

    Args:
        layout: as for `pack`; so are ``centres``.
        template: arrays of the names and shapes that are to be there.
        centres: as above.
        result: `Layout.num_bytes`.

    Raises:
        ProtocolError: if the bytes are none, or not finite.
    """
    found: Arrays = {}
    for name, flat in layout.decode(result).items():
        if not np.isfinite(flat).all():
            raise ProtocolError(f"what came of {name[:80]!r} holds NaN or infinity")
        array = flat.reshape(template[name].shape)
        if name in centres:
            array += centres[name]
        if name.startswith("nonneg/"):
            np.maximum(array, 0, out=array)
        found[name] = array
    return found


def small_of(layout: Layout, content: bytes) -> bytes:
    """What follows the hashes.

    Raises:
        ProtocolError: if nothing can.
    """
    end = layout.num_parts * HASH_BYTES
    if len(content) < end:
        raise ProtocolError("a contribution does not name its parts")
    return content[end:]
