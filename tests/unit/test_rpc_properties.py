"""Whatever happens between two connections, in whatever order: every call has one outcome, every stream its order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import Status
from shoal.protocol.limits import MAX_STREAM_HELD_BYTES
from shoal.protocol.rpc import (
    Answered,
    Called,
    Cancelled,
    Draining,
    Ended,
    Event,
    Failed,
    Message,
    RpcConnection,
    Writable,
)
from shoal.protocol.services import CallKind


@dataclass
class Stream:
    """One direction of a call: what was sent, and what came of it."""

    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    unread: list[Message] = field(default_factory=list)
    is_ended: bool = False  # by its sender
    is_whole: bool = False  # says its reader's side


@dataclass
class Made:
    """One call, as an onlooker sees it who knows both ends."""

    kind: CallKind
    requests: Stream = field(default_factory=Stream)
    answers: Stream = field(default_factory=Stream)
    replied: bytes | Status | None = None  # what the far side let it end in
    is_cancelled: bool = False  # by its caller
    is_withdrawn: bool = False  # says the server's side
    is_done: bool = False  # at the server's side
    outcomes: list[Answered | Failed | Ended] = field(default_factory=list)


class End:
    """One connection, with the calls that a shell would know of."""

    def __init__(self, *, compress: bool) -> None:
        self.connection = RpcConnection(compress=compress)
        self.ours: dict[int, Made] = {}  # until their outcome
        self.theirs: dict[int, Made] = {}  # until we are done
        self.wire = b""  # on its way to the other end

    def streams(self) -> list[tuple[int, bool, Made, Stream, Stream]]:
        """Of each open call: its id, whether it is ours, itself, the stream to the far side and that from it."""
        ours = [(call_id, True, made, made.requests, made.answers) for call_id, made in self.ours.items()]
        return ours + [(call_id, False, made, made.answers, made.requests) for call_id, made in self.theirs.items()]


class Link:
    """Two ends, the bytes between them, and a clock. Each verb is one thing that may happen, if it can."""

    TIMEOUTS_S = (math.inf, 1.0, 2.0, 60.0)
    SIZES = (0, 10, 100_000, 400_000, 1_500_000)
    PORTIONS = (10**9, 1, 50, 1000, 10**9)

    def __init__(self, *, compress: bool = False) -> None:
        self.ends = (End(compress=compress), End(compress=False))
        self.calls: list[Made] = []
        self.now = 0.0
        self.num_messages = 0

    def call(self, who: int, pick: int, choice: int) -> None:
        made = Made(CallKind(pick % 4))
        timeout_s = self.TIMEOUTS_S[choice % 4]
        body = str(len(self.calls)).encode()
        self.calls.append(made)
        call_id = self.ends[who].connection.call("a.b", body, timeout_s=timeout_s, now=self.now, kind=made.kind)
        assert call_id not in self.ends[who].ours
        self.ends[who].ours[call_id] = made

    def cancel(self, who: int, pick: int, _: int) -> None:
        end = self.ends[who]
        if end.ours:
            call_id = list(end.ours)[pick % len(end.ours)]
            end.connection.cancel(call_id)
            end.ours.pop(call_id).is_cancelled = True

    def reply(self, who: int, pick: int, choice: int) -> None:
        end = self.ends[who]
        if not end.theirs:
            return
        call_id = list(end.theirs)[pick % len(end.theirs)]
        made = end.theirs.pop(call_id)
        made.is_done = made.answers.is_ended = True
        if choice % 4 == 3:
            made.replied = Status.NOT_FOUND
            end.connection.fail(call_id, made.replied, "no")
        elif made.kind.streams_answers:
            end.connection.end(call_id, is_ours=False)
        else:
            made.replied = f"reply {call_id}".encode()
            end.connection.answer(call_id, made.replied)

    def send(self, who: int, pick: int, choice: int) -> None:
        end = self.ends[who]
        open_streams = [
            (call_id, is_ours, made, to)
            for call_id, is_ours, made, to, _ in end.streams()
            if (made.kind.streams_requests if is_ours else made.kind.streams_answers)
            and not to.is_ended
            and not end.connection.is_stopped(call_id, is_ours=is_ours)
        ]
        if open_streams:
            call_id, is_ours, made, to = open_streams[pick % len(open_streams)]
            self.num_messages += 1
            bulk = bytes(self.SIZES[choice % len(self.SIZES)])
            end.connection.send_message(call_id, str(self.num_messages).encode(), [bulk], is_ours=is_ours)
            if is_ours or not made.is_withdrawn:
                to.sent.append(self.num_messages)

    def finish(self, who: int, pick: int, _: int) -> None:
        end = self.ends[who]
        unfinished = [
            item for item in end.ours.items() if item[1].kind.streams_requests and not item[1].requests.is_ended
        ]
        if unfinished:
            call_id, made = unfinished[pick % len(unfinished)]
            made.requests.is_ended = True
            end.connection.end(call_id, is_ours=True)

    def read(self, who: int, pick: int, _: int) -> None:
        end = self.ends[who]
        with_messages = [entry for entry in end.streams() if entry[4].unread]
        if with_messages:
            call_id, is_ours, _made, _to, back = with_messages[pick % len(with_messages)]
            one = back.unread.pop(0)
            end.connection.consumed(call_id, one.num_bytes, is_ours=is_ours)

    def carry(self, who: int, _: int, choice: int) -> None:
        source, target = self.ends[who], self.ends[1 - who]
        waiting = source.connection.unsent_bytes
        data = b"".join(source.connection.data_to_send())
        assert len(data) == waiting
        source.wire += data
        num_bytes = self.PORTIONS[choice % len(self.PORTIONS)]
        arrived, source.wire = source.wire[:num_bytes], source.wire[num_bytes:]
        self.learn(target, target.connection.receive_data(arrived, self.now))

    def wait(self, who: int, pick: int, _: int) -> None:
        self.now += pick % 3 / 2
        end = self.ends[who]
        self.learn(end, end.connection.expire(self.now))
        assert end.connection.next_deadline() > self.now

    def learn(self, end: End, events: list[Event]) -> None:
        """Note what an end is told, which must fit to what was done."""
        for event in events:
            match event:
                case Called(call_id, body=body):
                    assert call_id not in end.theirs
                    end.theirs[call_id] = self.calls[int(bytes(body))]
                case Cancelled(call_id):
                    assert not end.theirs[call_id].is_withdrawn, "withdrawn twice"
                    end.theirs[call_id].is_withdrawn = True
                case Answered(call_id, body):
                    made = end.ours.pop(call_id)
                    assert body == made.replied
                    made.outcomes.append(event)
                case Failed(call_id, error):
                    made = end.ours.pop(call_id)
                    assert error.status in (made.replied, Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
                    made.outcomes.append(event)
                case Message(call_id, is_ours, body):
                    stream = end.ours[call_id].answers if is_ours else end.theirs[call_id].requests
                    assert is_ours or not end.theirs[call_id].is_withdrawn
                    stream.received.append(int(bytes(body)))
                    stream.unread.append(event)
                    assert stream.received == stream.sent[: len(stream.received)], "lost, doubled or out of order"
                    assert sum(one.num_bytes for one in stream.unread) <= MAX_STREAM_HELD_BYTES
                case Ended(call_id, is_ours):
                    made = end.ours.pop(call_id) if is_ours else end.theirs[call_id]
                    stream = made.answers if is_ours else made.requests
                    assert stream.is_ended
                    assert stream.received == stream.sent, "ended before all was there"
                    stream.is_whole = True
                    if is_ours:
                        made.outcomes.append(event)
                case Writable(call_id, is_ours):
                    assert call_id in (end.ours if is_ours else end.theirs)
                    assert not end.connection.is_stopped(call_id, is_ours=is_ours)
                case Draining():
                    raise AssertionError("nobody drains here")

    def settle(self) -> None:
        """Let everything come to its end: streams are finished and read, calls answered."""
        is_quiet = False
        while not is_quiet:
            is_quiet = True
            for who, end in enumerate(self.ends):
                for pick in reversed(range(len(end.ours))):
                    self.finish(who, pick, 0)
                while any(entry[4].unread for entry in end.streams()):
                    self.read(who, 0, 0)
                for pick in reversed(range(len(end.theirs))):
                    made = list(end.theirs.values())[pick]
                    if made.requests.is_whole or made.is_withdrawn or not made.kind.streams_requests:
                        self.reply(who, pick, 0)
                is_quiet = is_quiet and not end.connection.unsent_bytes and not end.wire
                self.carry(who, 0, len(self.PORTIONS) - 1)

    def cut(self) -> None:
        """The stream is gone; each end notices for itself."""
        for end in self.ends:
            self.learn(end, end.connection.close("cut"))
            assert all(made.is_withdrawn for made in end.theirs.values()), "a handler goes on for nobody"
            assert end.connection.num_open_calls == 0
            assert end.connection.data_to_send() == []
            assert end.connection.next_deadline() == math.inf


VERBS = (
    *(Link.call, Link.carry, Link.carry, Link.send, Link.send, Link.carry, Link.carry, Link.read, Link.send, Link.call),
    *(Link.finish, Link.reply, Link.cancel, Link.wait),
)
steps = st.lists(
    st.tuples(st.sampled_from(VERBS), st.integers(0, 1), st.integers(0, 7), st.integers(0, 59)),
    min_size=60,
    max_size=200,
)
Steps = list[tuple[Callable[[Link, int, int, int], None], int, int, int]]


def play(steps_taken: Steps, *, compress: bool) -> Link:
    link = Link(compress=compress)
    for verb, who, pick, choice in steps_taken:
        verb(link, who, pick, choice)
        for end in link.ends:
            assert end.connection.num_open_calls == len(end.ours)
    return link


def assert_one_outcome_each(link: Link) -> None:
    for made in link.calls:
        assert len(made.outcomes) == (0 if made.is_cancelled else 1), made


@given(steps, st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_call_has_one_outcome_wherever_the_stream_is_cut(steps_taken: Steps, compress: bool) -> None:
    link = play(steps_taken, compress=compress)
    link.cut()
    assert_one_outcome_each(link)


@given(steps, st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_call_has_the_outcome_it_was_given_and_streams_arrive_whole_if_nothing_is_cut(
    steps_taken: Steps, compress: bool
) -> None:
    link = play(steps_taken, compress=compress)
    link.settle()
    assert_one_outcome_each(link)
    for made in link.calls:
        assert made.is_done
        for outcome in made.outcomes:
            is_late = isinstance(outcome, Failed) and outcome.error.status is Status.DEADLINE_EXCEEDED
            assert is_late or isinstance(outcome, Failed) == (made.replied is Status.NOT_FOUND)
    for end in link.ends:
        assert end.connection.buffered_bytes == 0
        assert end.connection.close("done") == []
