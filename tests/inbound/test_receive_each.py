"""Input is handled while the task of a stream sleeps."""

from __future__ import annotations

import os
import socket
import ssl
import struct

import pytest
import trio
import trio.testing
import trustme

from mailerq.net.stream import Stream, StreamLost
from mailerq.sockets import RECEIVE_BYTES
from tests.net.stream_kit import echo


def pair() -> tuple[Stream, socket.socket]:
    left, right = socket.socketpair()
    right.setblocking(False)
    return Stream(left), right


async def read(peer: socket.socket, size: int) -> bytes:
    """So many bytes or more, fewer at the end."""
    data = b""
    while len(data) < size:
        await trio.lowlevel.wait_readable(peer)
        came = peer.recv(1 << 20)
        if not came:
            break
        data += came
    return data


async def test_what_is_answered_at_once_wakes_no_task() -> None:
    stream, peer = pair()
    async with echo(stream) as answering:
        for number in range(10):
            peer.send(b"%d" % number)
            assert await read(peer, 3) == b"<%d>" % number
        asleep = answering.steps
        peer.send(b"end")
    assert asleep == 0
    assert answering.steps == 1
    assert answering.seen == [*(b"%d" % number for number in range(10)), b"end"]
    stream.close()
    peer.close()


async def test_the_end_is_passed_on_too() -> None:
    stream, peer = pair()
    seen: list[bytes] = []

    def take(data: bytes) -> bool:
        seen.append(data)
        return not data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive_each, take)
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"last words")
        peer.close()
    assert seen == [b"last words", b""]
    stream.close()


async def test_all_of_what_comes_in_many_pieces_is_passed_on() -> None:
    stream, peer = pair()
    size = 5 * RECEIVE_BYTES
    count = 0

    def take(data: bytes) -> bool:
        nonlocal count
        count += len(data)
        return count == size

    async def send() -> None:
        left = size
        while left:
            await trio.lowlevel.wait_writable(peer)
            left -= peer.send(bytes(left))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive_each, take)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(send)
    assert count == size
    stream.close()
    peer.close()


async def test_a_defect_in_taking_is_raised_in_the_task_and_costs_others_nothing() -> None:
    stream, peer = pair()
    other, other_peer = pair()

    def fail(data: bytes) -> bool:
        raise ZeroDivisionError(data)

    async def digest() -> None:
        with pytest.raises(ZeroDivisionError, match="x"):
            await stream.receive_each(fail)
        assert stream.receive_nowait() is None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(digest)
        nursery.start_soon(other.receive_each, bool)
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"x")
        other_peer.send(b"y")
    for closing in (stream, peer, other, other_peer):
        closing.close()


async def test_a_peer_that_resets_is_lost() -> None:
    async with trio.open_nursery() as nursery:
        listening = socket.create_server(("127.0.0.1", 0))
        peer = socket.create_connection(listening.getsockname())
        stream = Stream(listening.accept()[0])
        listening.close()

        async def digest() -> None:
            with pytest.raises(StreamLost):
                await stream.receive_each(bool)

        nursery.start_soon(digest)
        await trio.testing.wait_all_tasks_blocked()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    stream.close()


async def test_what_was_sent_to_nobody_is_told_to_who_digests() -> None:
    stream, peer = pair()

    def take(data: bytes) -> bool:
        peer.close()
        stream.write(b"hello?")
        return False

    async with trio.open_nursery() as nursery:

        async def digest() -> None:
            with pytest.raises(StreamLost):
                await stream.receive_each(take)

        nursery.start_soon(digest)
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"x")
    stream.close()


async def test_to_digest_no_longer_loses_nothing() -> None:
    stream, peer = pair()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_each, bool)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    peer.send(b"later")
    assert await stream.receive() == b"later"
    stream.close()
    peer.close()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        server = listening.accept()[0]
    for end in (client, server):
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, size, 1 << 17)
    return server, client


async def streams(kind: str) -> tuple[Stream, Stream]:
    server, client = connected()
    if kind == "urgent":  # from then on a short read proves nothing
        client.send(b"!", socket.MSG_OOB)
    left, right = Stream(server), Stream(client)
    if kind == "tls":
        await encrypt(left, right)
    return left, right


KINDS = ("plain", "urgent", "tls")
PIECE = bytes(1000)
ANSWER = bytes(1 << 13)


class Digester:
    """Answers each piece with much, until a piece ends with a full stop, or all ends."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.taken = self.answers = 0

    async def run(self) -> None:
        await self.stream.receive_each(self.take)
        await self.stream.drain()
        self.stream.close()

    def take(self, data: bytes) -> bool:
        if data:
            self.taken += len(data)
            self.answers += 1
            self.stream.write(ANSWER)
        return not data or data.endswith(b".")


async def send_until_stuck(stream: Stream, peer: Stream) -> int:
    """Send small pieces until both ends wait for each other; how many bytes that were."""
    sent = 0
    while not (stream.is_stuck and peer.is_stuck):
        if not peer.is_stuck:
            sent += len(PIECE)
            assert sent < 1 << 22, "all is taken, though nothing is read of what is answered"
            peer.write(PIECE)
            peer.flush()
        await trio.lowlevel.checkpoint()
    return sent


@pytest.mark.parametrize("kind", KINDS)
async def test_from_a_peer_that_does_not_read_no_more_is_taken(kind: str) -> None:
    left, right = await streams(kind)
    digester = Digester(left)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(digester.run)
        sent = await send_until_stuck(left, right)
        assert 0 < digester.taken < sent
        got, ended = 0, False
        while data := await right.receive():
            got += len(data)
            if digester.taken == sent and not ended:
                right.write(b".")
                ended = True
    assert digester.taken == sent + 1
    assert got == digester.answers * len(ANSWER)
    right.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_who_has_said_all_gets_all_answers(kind: str) -> None:
    left, right = await streams(kind)
    digester = Digester(left)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(digester.run)
        while not left.is_stuck:
            if not right.is_stuck:
                right.write(PIECE)
                right.flush()
            await trio.lowlevel.checkpoint()
        with socket.socket(fileno=os.dup(right.fileno())) as copy:
            copy.shutdown(socket.SHUT_WR)
        got = 0
        while data := await right.receive():
            got += len(data)
    assert got == digester.answers * len(ANSWER)
    right.close()


async def encrypt(left: Stream, right: Stream) -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: left.start_tls(server, server_side=True))
        await right.start_tls(client, server_side=False, server_hostname="mx.test")


async def test_who_is_cancelled_while_it_is_taken_ends_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream, peer = pair()
    with trio.CancelScope() as scope:

        def take(data: bytes) -> bool:
            scope.cancel()
            return True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_each, take)
            await trio.testing.wait_all_tasks_blocked()
            peer.send(b"x")
    assert scope.cancelled_caught
    assert not caplog.records
    stream.close()
    peer.close()


async def test_tls_is_read_by_the_task() -> None:
    left, right = await streams("tls")

    def take(data: bytes) -> bool:
        left.write(b"<" + data + b">")
        return data == b"end"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.receive_each, take)
        for word in (b"one", b"two", b"end"):
            right.write(word)
            assert await right.receive() == b"<" + word + b">"
    left.close()
    right.close()
