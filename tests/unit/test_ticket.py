"""A ticket names one run, whole, or is refused in words that help."""

from __future__ import annotations

import base64
import string
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node.mesh.addresses import usefulness
from shoal.protocol.codec import encode
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId, SwarmId
from shoal.training.ticket import MAX_ADDRESSES, MAX_TICKET_CHARS, Ticket, in_turns

SWARM = SwarmId.of_manifest(b"a run")
ADDRESS = f"/ip4/192.0.2.7/tcp/4001/p2p/{PeerId.of_public_key(bytes(32))}"
TICKET = Ticket(SWARM, (ADDRESS,))
ALPHABET = string.ascii_lowercase + "234567"


def sealed(payload: bytes) -> str:
    """A ticket around anything, its checksum right."""
    raw = zlib.crc32(payload).to_bytes(4, "big") + payload
    return "shoal1" + base64.b32encode(raw).decode().rstrip("=").lower()


@given(st.binary(max_size=50), st.lists(st.text(max_size=60), max_size=8).map(tuple))
def test_a_ticket_comes_back_as_it_was_written(manifest: bytes, addresses: tuple[str, ...]) -> None:
    ticket = Ticket(SwarmId.of_manifest(manifest), addresses)
    assert Ticket.parse(str(ticket)) == ticket


def test_a_ticket_is_one_word_that_survives_a_mail() -> None:
    text = str(TICKET)
    assert text.startswith("shoal1")
    assert set(text) <= set(string.ascii_lowercase + string.digits)
    assert Ticket.parse(f"  {text}\n") == TICKET


@pytest.mark.parametrize("other", ["a", "2", "0", "8", "=", "-", "é", " ", "\x00"])
def test_a_character_that_is_another_is_damage_wherever_it_stands(other: str) -> None:
    text = str(TICKET)
    for at in range(len(text)):
        if text[at] != other:
            refused(text[:at] + other + text[at + 1 :])


def test_every_mistyped_letter_is_damage() -> None:
    text = str(TICKET)
    for at in range(6, len(text)):
        for other in ALPHABET:
            if other != text[at]:
                refused(text[:at] + other + text[at + 1 :])


def test_a_lost_or_a_doubled_or_two_swapped_characters_are_damage() -> None:
    text = str(TICKET)
    for at in range(len(text)):
        refused(text[:at] + text[at + 1 :])
        refused(text[:at] + text[at] + text[at:])
        if at and text[at - 1] != text[at]:
            refused(text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :])


def test_a_ticket_that_was_cut_is_damage() -> None:
    text = str(TICKET)
    for end in range(len(text)):
        refused(text[:end])


@given(st.text(max_size=200))
def test_garbage_is_no_ticket(garbage: str) -> None:
    refused(garbage)


@given(st.text(max_size=200))
def test_garbage_that_starts_well_is_no_ticket(garbage: str) -> None:
    refused("shoal1" + garbage)


@given(st.binary(max_size=200))
def test_garbage_under_a_good_checksum_makes_no_sense(payload: bytes) -> None:
    refused(sealed(payload))


@pytest.mark.parametrize(
    "payload",
    [
        {"swarm": "not a cid", "addresses": []},
        {"swarm": SWARM},
        {"swarm": SWARM, "addresses": "one"},
        {"swarm": SWARM, "addresses": [1]},
        [SWARM, []],
    ],
    ids=repr,
)
def test_a_whole_ticket_that_says_something_else_makes_no_sense(payload: object) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        Ticket.parse(sealed(encode(payload)))


def test_a_later_version_may_say_more() -> None:
    assert Ticket.parse(sealed(encode({"swarm": SWARM, "addresses": [ADDRESS], "key": b"secret"}))) == TICKET


def test_a_ticket_longer_than_any_is_not_even_looked_at() -> None:
    refused("shoal1" + "a" * MAX_TICKET_CHARS)


def refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Ticket.parse(text)
    assert "ticket" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_ticket_takes_as_many_addresses_as_can_be_read_again() -> None:
    long = [f"/dns4/{'x' * 400}{number}/tcp/4001/p2p/{ADDRESS[-52:]}" for number in range(20)]
    ticket = Ticket.of(SWARM, long)
    assert ticket.addresses == tuple(long[: len(ticket.addresses)])
    assert 4 <= len(ticket.addresses) < MAX_ADDRESSES
    assert Ticket.parse(str(ticket)) == ticket
    assert Ticket.of(SWARM, [ADDRESS] * 50).addresses == (ADDRESS,)
    many = [f"/ip4/192.0.2.{number}/tcp/4001" for number in range(50)]
    assert Ticket.of(SWARM, many).addresses == tuple(many[:MAX_ADDRESSES])


def test_the_most_useful_addresses_come_first_and_of_each_member_one_before_the_second_of_any() -> None:
    name = ADDRESS.partition("/p2p/")[2]
    ours = ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/5.1.0.1/tcp/1", "/ip4/5.1.0.2/tcp/1"]
    theirs = ["/ip6/2a00::1/tcp/1", f"/ip4/5.1.0.7/tcp/1/p2p/{name}/p2p-circuit", "/ip4/10.0.0.2/tcp/1"]
    assert in_turns([ours, theirs], usefulness) == [
        *("/ip4/5.1.0.1/tcp/1", "/ip6/2a00::1/tcp/1", "/ip4/5.1.0.2/tcp/1", theirs[1]),
        *("/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1", "/ip4/127.0.0.1/tcp/1"),
    ]
