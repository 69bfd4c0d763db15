"""Any sequence of write, flush and drain delivers the bytes in order, and each leaves by itself."""

from __future__ import annotations

import os
import random
import socket
import ssl
from collections.abc import Iterator, Sequence

import pytest
import trio
import trio.testing
import trustme
from hypothesis import given
from hypothesis import strategies as st

from mailerq import sockets
from mailerq.net import stream
from mailerq.net.stream import BUFFER_BYTES, LONG_BYTES, Stream, StreamLost

BYTES = random.Random(1).randbytes(1 << 20)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from([0, 1, 100, LONG_BYTES - 1, 3 * LONG_BYTES])),
        st.tuples(st.sampled_from(["flush", "drain", "give up", "turn", "read"]), st.just(0)),
    ),
    max_size=20,
)
LIMITS = st.lists(st.integers(0, 2 * LONG_BYTES), max_size=20)
"""Bytes that the socket takes at most of each send."""


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


def pair() -> tuple[Stream, Stream]:
    left, right = socket.socketpair()
    return Stream(left), Stream(right)


async def encrypt(
    left: Stream, right: Stream, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: left.start_tls(contexts[0], server_side=True))
        await right.start_tls(contexts[1], server_side=False, server_hostname="mx.test")


class Reader:
    """The peer, which reads when it is told to."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._may_read = trio.Semaphore(0)
        self.eager = False
        self.received = b""

    def read(self) -> None:
        self._may_read.release()

    async def run(self) -> None:
        while True:
            if not self.eager:
                await self._may_read.acquire()
            try:
                data = await self._stream.receive()
            except StreamLost:
                return
            if not data:
                return
            self.received += data


async def converse(
    steps: Sequence[tuple[str, int]], contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None
) -> tuple[int, bytes]:
    """Take the steps; return how many bytes were written, and which have arrived."""
    left, right = pair()
    if contexts is not None:
        await encrypt(left, right, contexts)
    reader, written = Reader(right), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        for step, size in steps:
            if step == "write":
                left.write(BYTES[written : written + size])
                written += size
            elif step == "flush":
                left.flush()
            elif step == "drain":
                reader.eager = True
                reader.read()
                await left.drain()
                assert not left.is_full
                reader.eager = False
            elif step == "give up":
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await left.drain()
            elif step == "turn":
                await trio.lowlevel.checkpoint()
            else:
                reader.read()
        reader.eager = True
        reader.read()
        with trio.fail_after(20):
            while len(reader.received) < written:
                await trio.testing.wait_all_tasks_blocked()
        left.close()
    right.close()
    return written, reader.received


@pytest.mark.parametrize("secure", [False, True])
@given(steps=STEPS, limits=LIMITS)
def test_all_bytes_arrive_in_order(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    secure: bool,
    steps: list[tuple[str, int]],
    limits: list[int],
) -> None:
    remaining: Iterator[int] = iter(limits)

    def send(fd: int, data: bytes, start: int = 0) -> int:
        limit = next(remaining, len(data))
        return sockets.send(fd, data[: start + limit], start) if limit else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "send", send)
        written, received = trio.run(converse, steps, contexts if secure else None)
    assert received == BYTES[:written]


async def test_writing_sends_nothing_before_the_end_of_the_turn() -> None:
    left, right = pair()
    left.write(bytes(2 * LONG_BYTES))
    assert not right.has_input
    left.flush()
    assert right.has_input
    left.close()
    right.close()


async def test_a_flush_sends_what_was_written_in_pieces_as_one() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sender = Stream(left)
    for piece in (b"250 1\r\n", b"250 2\r\n", b"354 3\r\n"):
        sender.write(piece)
    sender.flush()
    with right:
        assert right.recv(100) == b"250 1\r\n250 2\r\n354 3\r\n"
    sender.close()


async def test_an_empty_buffer_keeps_a_block_without_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, right = pair()
    block, sent = bytes(1 << 17), []

    def send(fd: int, data: bytes, start: int = 0) -> int:
        sent.append(data)
        return sockets.send(fd, data, start)

    monkeypatch.setattr(stream, "send", send)
    left.write(block)
    left.flush()
    assert [data is block for data in sent] == [True]
    left.close()
    right.close()


async def test_a_stream_is_full_until_its_peer_reads() -> None:
    left, right = pair()
    while not left.is_stuck:
        left.write(bytes(1000))
        left.flush()
    assert left.is_full
    with trio.move_on_after(0) as scope:
        await left.drain()
    assert scope.cancelled_caught
    assert left.is_full
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.drain)
        while left.is_full:
            await right.receive()
    left.close()
    right.close()


@pytest.mark.parametrize("secure", [False, True])
async def test_who_writes_without_end_to_a_peer_that_does_not_read_is_lost(
    secure: bool, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    left, right = pair()
    if secure:
        await encrypt(left, right, contexts)
    block = bytes(BUFFER_BYTES // 4)
    for _ in range(8):
        left.write(block)
        left.flush()
    with pytest.raises(StreamLost, match="does not read"):
        await left.receive()
    with pytest.raises(StreamLost, match="does not read"):
        await left.drain()
    with socket.socket(fileno=os.dup(right.fileno())) as raw:
        received = 0
        while right.has_input:
            received += len(raw.recv(1 << 20))
        assert received < 8 * len(block)
        left.write(b"nothing may come behind a gap")
        left.close()
        assert raw.recv(1 << 20) == b""
    right.close()


async def test_a_drain_ends_when_another_write_loses_the_connection() -> None:
    left, right = pair()
    left.write(bytes(2 * BUFFER_BYTES))

    async def drain() -> None:
        with pytest.raises(StreamLost, match="does not read"):
            await left.drain()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            left.write(b"x")
    left.close()
    right.close()


async def test_one_task_at_a_time_drains() -> None:
    left, right = pair()
    left.write(bytes(BUFFER_BYTES))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.drain)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await left.drain()
        while left.is_stuck:
            await right.receive()
    left.close()
    right.close()


async def test_a_drain_ends_when_foreign_code_closes_the_descriptor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left, right = pair()
    other = socket.socket()
    left.write(bytes(BUFFER_BYTES))

    async def drain() -> None:
        with pytest.raises(StreamLost):
            await left.drain()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            fd = left.fileno()
            os.dup2(other.fileno(), fd)
            again = Stream(fd)
    assert "closed" in caplog.text
    for each in (left, right, other, again):
        each.close()


@pytest.mark.parametrize("way", ["drain", "flush", "end of turn"])
async def test_output_that_met_a_lost_peer_is_told(way: str) -> None:
    left, right = pair()
    right.close()
    for _ in range(2):
        left.write(b"x")
        if way == "flush":
            left.flush()
        elif way == "end of turn":
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamLost):
            await left.drain()
    left.close()
