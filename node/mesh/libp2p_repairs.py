"""Repairs of the libp2p package, each with its upstream symptom, kept in one place.

They are made for one version of the package and refuse to touch another, so that an upgrade has to look at them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import libp2p.kad_dht.kad_dht
import libp2p.kad_dht.peer_routing
import libp2p.kad_dht.provider_store
import libp2p.peer.peerstore
import trio
from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.peer.envelope import Envelope
from libp2p.peer.peerdata import PeerData
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.exceptions import (
    MultiselectClientError,
    MultiselectCommunicatorError,
    ProtocolNotSupportedError,
)
from libp2p.protocol_muxer.multiselect_client import (
    DEFAULT_NEGOTIATE_TIMEOUT,
    MULTISELECT_PROTOCOL_ID,
    PROTOCOL_NOT_FOUND_MSG,
    MultiselectClient,
)
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import DEFAULT_WINDOW_SIZE, Yamux, YamuxStream
from libp2p.utils import encode_delim
from multiaddr import Multiaddr

log = logging.getLogger(__name__)

REPAIRED_VERSION: Final = "0.8.1"

MAX_KEPT_ADDRESSES: Final = 16
"""Of a peer, as libp2p keeps them; likewise below."""
MAX_KEPT_ADDRESS_BYTES: Final = 256
MAX_KEPT_PROTOCOLS: Final = 64
MAX_KEPT_PROTOCOL_CHARS: Final = 128
MAX_KEPT_RECORD_BYTES: Final = 8192
MAX_DHT_QUESTION_BYTES: Final = 16 * 1024
MAX_DHT_ANSWER_BYTES: Final = 256 * 1024


def apply_repairs() -> None:
    """Repair the installed libp2p; does nothing, and says so, if its version is another than `REPAIRED_VERSION`."""
    version = importlib.metadata.version("libp2p")
    if version != REPAIRED_VERSION:
        log.warning("libp2p is %s, not %s: its repairs are left out", version, REPAIRED_VERSION)
        return
    _hold_peers_to_their_windows()
    _let_few_windows_grow()
    _take_no_frame_that_fits_no_window()
    _see_ipv6_addresses()
    _dial_nobody_unasked()
    _finish_frames_once_begun()
    _propose_with_the_greeting()
    _take_no_offence_at_old_records()
    _keep_little_of_a_peer()
    _read_short_dht_messages()


def announce_as_told(host: IHost, addresses: Callable[[], Iterable[str]]) -> None:
    """Let a host announce these full multiaddrs, as they are.

    Symptom: an address listened on as 0.0.0.0 is announced as that, and a circuit's address (``RELAY/p2p-circuit``)
    loses its circuit on the way through `get_addrs`, which leaves the relay's address with this node's name on it.
    """
    host.get_addrs = lambda: [Multiaddr(address) for address in addresses()]  # type: ignore[method-assign]


def _see_ipv6_addresses() -> None:
    # Symptom: a connection over IPv6 has no remote address, so identify tells the peer none, and nothing knows how it
    # is reached. The socket names an IPv6 peer with four values, and only two are taken for an address.
    def get_remote_address(stream: TrioTCPStream) -> tuple[str, int] | None:
        if stream._cached_remote_address is None:
            try:
                ip, port = stream.stream.socket.getpeername()[:2]
            except OSError:
                return None
            stream._cached_remote_address = (str(ip).removeprefix("::ffff:"), int(port))
        return stream._cached_remote_address

    TrioTCPStream.get_remote_address = get_remote_address  # type: ignore[method-assign,assignment]


def _dial_nobody_unasked() -> None:
    # Symptom: whenever a peer goes, the swarm dials others that it once heard of, up to 150 of them.
    async def maybe_connect(connector: AutoConnector) -> None:
        pass

    AutoConnector.maybe_connect = maybe_connect  # type: ignore[method-assign,assignment]


@dataclass(slots=True)
class _Written:
    """How the writing of one frame ended."""

    ended: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None


def _finish_frames_once_begun() -> None:
    # Symptom: a write that is cancelled ends the whole connection some moments later, with every stream on it. Noise
    # has counted the message by then, and part of it may be on the wire, so the far side can decrypt nothing more. So a
    # frame whose turn has come is written by a task of the connection's own, for which its caller only waits.
    async def write(muxed: Yamux, data: bytes, turn: trio.Semaphore, written: _Written) -> None:
        written.error = MuxedStreamError("the connection ended")
        try:
            await muxed.secured_conn.write(data)
            written.error = None
        except Exception as error:  # raised again where the write was asked for
            written.error = error
        finally:
            turn.release()
            written.ended.set()

    async def write_frame(muxed: Yamux, data: bytes) -> None:
        turn: trio.Semaphore = vars(muxed).setdefault("_shoal_turn", trio.Semaphore(1))
        await turn.acquire()
        written = _Written()
        nursery = muxed._nursery
        if nursery is None or nursery.cancel_scope.cancel_called:
            await write(muxed, data, turn, written)
        else:
            try:
                nursery.start_soon(write, muxed, data, turn, written)
            except RuntimeError as error:  # the nursery has closed
                turn.release()
                raise MuxedStreamError("the connection ended") from error
            await written.ended.wait()
        if written.error is not None:
            raise written.error

    Yamux._write_frame = write_frame  # type: ignore[method-assign,assignment]


def _take_no_offence_at_old_records() -> None:
    # Symptom: "Received an invalid-signed-record, skipping peer": a look-up leaves out a peer, and a provider, that
    # another node names by an older signed record than this node has. A record that is only old changes nothing.
    consume = PeerStore.consume_peer_record
    if consume.__name__ == "consume_newer":
        return  # repaired already

    def consume_newer(store: PeerStore, envelope: Envelope, ttl: int) -> bool:
        if len(envelope.raw_payload) > MAX_KEPT_RECORD_BYTES:
            return False
        record = envelope.record()
        known = store.peer_record_map.get(record.peer_id)
        is_own = libp2p.peer.peerstore._peer_record_signer_matches(envelope)
        if known is not None and known.seq > record.seq and is_own:
            return True
        return consume(store, envelope, ttl)

    PeerStore.consume_peer_record = consume_newer  # type: ignore[method-assign,assignment]


def _keep_little_of_a_peer() -> None:
    # Symptom: a peer that names 30,000 addresses or protocols of its own has them kept, and told to others; twice if
    # they are signed. There is no bound but that of the message.
    add, add_protocols, set_protocols = PeerData.add_addrs, PeerData.add_protocols, PeerData.set_protocols
    if add.__name__ == "add_few":
        return  # repaired already

    def add_few(data: PeerData, addresses: Sequence[Multiaddr]) -> None:
        room = max(0, MAX_KEPT_ADDRESSES - len(data.addrs))
        new = [each for each in addresses[:MAX_KEPT_ADDRESSES] if len(each.to_bytes()) <= MAX_KEPT_ADDRESS_BYTES]
        add(data, [each for each in new if each not in data.addrs][:room])

    def short(protocols: Sequence[str]) -> list[str]:
        return [each for each in protocols[:MAX_KEPT_PROTOCOLS] if len(each) <= MAX_KEPT_PROTOCOL_CHARS]

    def add_few_protocols(data: PeerData, protocols: Sequence[str]) -> None:
        add_protocols(data, short(protocols)[: max(0, MAX_KEPT_PROTOCOLS - len(data.protocols))])

    def set_few_protocols(data: PeerData, protocols: Sequence[str]) -> None:
        set_protocols(data, short(protocols))

    PeerData.add_addrs = add_few  # type: ignore[method-assign,assignment]
    PeerData.add_protocols = add_few_protocols  # type: ignore[method-assign,assignment]
    PeerData.set_protocols = set_few_protocols  # type: ignore[method-assign,assignment]


def _read_short_dht_messages() -> None:
    # Symptom: whoever asks, adds a provider or answers in the DHT may send 4 MiB at a time, all of which is parsed on
    # the loop: 66 MB of memory and half a second each. A question takes 3 kB, the longest honest answer some 100.
    vars(libp2p.kad_dht.kad_dht)["MAX_DHT_MESSAGE_SIZE"] = MAX_DHT_QUESTION_BYTES
    vars(libp2p.kad_dht.provider_store)["MAX_DHT_MESSAGE_SIZE"] = MAX_DHT_ANSWER_BYTES
    vars(libp2p.kad_dht.peer_routing)["MAX_DHT_MESSAGE_SIZE"] = MAX_DHT_ANSWER_BYTES


def _propose_with_the_greeting() -> None:
    # Symptom: agreeing on a protocol takes two round trips, since the proposal waits for the answer to the greeting; a
    # connection takes three such agreements and every stream one. Multistream-select allows to send both at once.
    async def select_one_of(
        multiselect: MultiselectClient,
        protocols: Sequence[TProtocol],
        communicator: MultiselectCommunicator,
        negotiate_timeout: float = DEFAULT_NEGOTIATE_TIMEOUT,
    ) -> TProtocol:
        first, *others = protocols
        with trio.move_on_after(negotiate_timeout):
            try:
                greeting = encode_delim(MULTISELECT_PROTOCOL_ID.encode()) + encode_delim(first.encode())
                await communicator.read_writer.write(greeting)
            except (IOException, ValueError) as error:
                raise MultiselectClientError(f"the proposal of {first} could not be written: {error}") from error
            try:
                answers = await communicator.read(), await communicator.read()
                if answers[0] != MULTISELECT_PROTOCOL_ID:
                    raise MultiselectClientError(f"not multistream-select, but {answers[0][:60]!r}")
                if answers[1] == first:
                    return first
                if answers[1] != PROTOCOL_NOT_FOUND_MSG:
                    raise MultiselectClientError(f"{answers[1][:60]!r} is no answer to the proposal of {first}")
                for protocol in others:
                    with contextlib.suppress(ProtocolNotSupportedError):
                        return await multiselect.try_select(communicator, protocol)
            except (MultiselectCommunicatorError, UnicodeDecodeError) as error:
                raise MultiselectClientError(f"no answer to the proposal of {first}: {error}") from error
            raise ProtocolNotSupportedError(f"none of {', '.join(protocols)} is supported")
        raise MultiselectClientError(f"no answer to the proposal of {first} within {negotiate_timeout} s")

    MultiselectClient.select_one_of = select_one_of  # type: ignore[method-assign,assignment]


class _WindowExceededError(trio.TooSlowError):
    """A peer sent more than it was allowed to; of the class at which libp2p's muxer closes a connection."""


def _hold_peers_to_their_windows() -> None:
    # Symptom: a peer that ignores yamux's flow control fills the memory of this node by a stream that is not read as
    # fast: the muxer logs "peer exceeded receive window", for each frame anew, and keeps the bytes.
    def set_window(stream: YamuxStream, num_bytes: int) -> None:
        if num_bytes < 0:
            log.warning("%s sends more than it may; its connection is closed", stream.conn.peer_id)
            raise _WindowExceededError
        vars(stream)["recv_window"] = num_bytes

    window = property(lambda stream: vars(stream)["recv_window"], set_window)
    YamuxStream.recv_window = window  # type: ignore[assignment]  # an attribute of each stream, seen by this from now on


def let_windows_grow(muxed: object, may_grow: Callable[[], bool]) -> None:
    """Let the windows of a connection's streams grow only as long as this says so."""
    vars(muxed)["_shoal_may_grow"] = may_grow


def _let_few_windows_grow() -> None:
    # Symptom: whoever sends fast has windows of up to 16 MiB on every stream, and may fill them once nobody reads.
    grow = YamuxStream._apply_autotune_epoch
    if grow.__name__ == "grow_if_it_may":
        return  # repaired already

    def grow_if_it_may(stream: YamuxStream, buffered: int) -> int:
        may_grow: Callable[[], bool] | None = vars(stream.conn).get("_shoal_may_grow")
        return grow(stream, buffered) if may_grow is None or may_grow() else 0

    YamuxStream._apply_autotune_epoch = grow_if_it_may  # type: ignore[method-assign,assignment]


def _take_no_frame_that_fits_no_window() -> None:
    # Symptom: a frame is read whole, in three copies, before it is seen that it exceeds its stream's window: up to
    # 16 MiB, of which the last byte may take a minute to come. It is in no buffer meanwhile that anybody counts.
    read = Yamux._read_data_body
    if read.__name__ == "read_if_it_fits":
        return  # repaired already

    async def read_if_it_fits(muxed: Yamux, length: int) -> bytes:
        if length > DEFAULT_WINDOW_SIZE and length > max(
            (stream.recv_window for stream in muxed.streams.values()), default=0
        ):
            log.warning("%s sends a frame of %d bytes; its connection is closed", muxed.peer_id, length)
            raise _WindowExceededError
        return await read(muxed, length)

    Yamux._read_data_body = read_if_it_fits  # type: ignore[method-assign,assignment]
