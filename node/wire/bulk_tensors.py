"""Tensors in bulk: what `shoal.protocol.tensors` writes is offered, and pulled straight into the receiver's own array.

A tensor of a few megabytes belongs into a message, as its field. A large one is offered part by part, and the message
names the offers:

    async with offer_tensor(bulk, peer, encode_tensor(gradient)) as offered:
        await client(Exchange, host.at(peer)).take(Span(offered))

and the handler there calls `pull_tensor_into`. Where the wire has the array's own bytes (raw; fp32 of float32; fp16 of
float16), they go from the sender's array to the receiver's without a copy in between.

NumPy comes with ``shoal[train]``, so nothing that a bare node runs imports this module.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np
import trio

from shoal.node.wire.bulk import Bulk, BulkRef, Transport
from shoal.protocol.ids import PeerId
from shoal.protocol.tensors import Array, Tensor, TensorCodec, check_parts, check_target, decode_tensor_into


@dataclass(frozen=True, slots=True)
class OfferedTensor:
    """A `Tensor` whose parts are offered instead of attached; a field of a message, unchecked until it is pulled."""

    dtype: str
    shape: tuple[int, ...]
    codec: TensorCodec
    block_size: int
    parts: tuple[BulkRef, ...]


@asynccontextmanager
async def offer_tensor(bulk: Bulk, peer: PeerId, tensor: Tensor) -> AsyncIterator[OfferedTensor]:
    """Let one peer pull a tensor, as often as it likes, until the context ends; the end is that of `Bulk.offer`.

    Args:
        bulk: of this node.
        peer: who may.
        tensor: as `encode_tensor` made it; if it is a view of an array, that stays as it is meanwhile.
    """
    async with AsyncExitStack() as stack:
        parts = [await stack.enter_async_context(bulk.offer(peer, part)) for part in tensor.parts]
        yield OfferedTensor(tensor.dtype, tensor.shape, tensor.codec, tensor.block_size, tuple(parts))


async def pull_tensor_into(
    bulk: Bulk, peer: PeerId, offered: OfferedTensor, out: Array, *, timeout_s: float, transport: Transport = "auto"
) -> None:
    """Fill an array with an offered tensor. When it returns or raises, nothing writes into the array any more.

    Args:
        bulk: of this node.
        peer: who offers it.
        offered: what it says that it offers.
        out: of the tensor's dtype and shape, C-contiguous, writable and in native byte order; holds parts of the
            values if this raises.
        timeout_s: for all of it.
        transport: as for `Bulk.pull`.

    Raises:
        ProtocolError: as `decode_tensor_into`.
        UsageError: if ``out`` cannot be written to in place.
        RemoteError: as `Bulk.pull`.
    """
    check_target(offered.dtype, offered.shape, out)
    sizes = [part.num_bytes for part in offered.parts]
    shape, dtype = offered.shape, offered.dtype
    check_parts(dtype, shape, offered.codec, offered.block_size, sizes, max_bytes=max(out.nbytes, 1))
    if _travels_as_it_is(offered):
        (ref,) = offered.parts
        await bulk.pull(peer, ref, out.reshape(-1).view(np.uint8).data, timeout_s=timeout_s, transport=transport)
        return
    parts, deadline = [], trio.current_time() + timeout_s
    for ref in offered.parts:
        part = np.empty(ref.num_bytes, np.uint8)
        left_s = max(0.0, deadline - trio.current_time())
        await bulk.pull(peer, ref, part.data, timeout_s=left_s, transport=transport)
        parts.append(part.data)
    decode_tensor_into(Tensor(dtype, shape, offered.codec, offered.block_size, tuple(parts)), out)


def _travels_as_it_is(offered: OfferedTensor) -> bool:
    """Whether the bytes on the wire are those of the array."""
    codec, dtype = offered.codec, offered.dtype
    is_plain = codec is TensorCodec.RAW and dtype != "bool"  # a byte that is neither 0 nor 1 would be no bool
    is_same = (codec, dtype) in ((TensorCodec.FP32, "float32"), (TensorCodec.FP16, "float16"))
    return (is_plain or is_same) and sys.byteorder == "little"
