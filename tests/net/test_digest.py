"""What comes in is dealt with while the task of a stream sleeps."""

from __future__ import annotations

import socket
import ssl
import struct

import pytest
import trio
import trio.testing
import trustme

from mailerq.net.stream import Stream, StreamLost
from mailerq.sockets import RECEIVE_BYTES


class Steps(trio.abc.Instrument):
    """Counts how often a task runs."""

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task is self.task


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
    steps = Steps()
    seen = []

    def take(data: bytes) -> bool:
        seen.append(data)
        if data == b"end":
            return True
        stream.send_soon(b"<" + data + b">")
        return False

    async def serve() -> None:
        steps.task = trio.lowlevel.current_task()
        await stream.digest(take)

    trio.lowlevel.add_instrument(steps)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        for number in range(10):
            peer.send(b"%d" % number)
            assert await read(peer, 3) == b"<%d>" % number
        asleep = steps.count
        peer.send(b"end")
    trio.lowlevel.remove_instrument(steps)
    assert asleep == 0
    assert steps.count == 1
    assert seen == [*(b"%d" % number for number in range(10)), b"end"]
    stream.close()
    peer.close()


async def test_the_end_is_digested_too() -> None:
    stream, peer = pair()
    seen: list[bytes] = []

    def take(data: bytes) -> bool:
        seen.append(data)
        return not data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.digest, take)
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"last words")
        peer.close()
    assert seen == [b"last words", b""]
    stream.close()


async def test_all_of_what_comes_in_many_pieces_is_digested() -> None:
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
        nursery.start_soon(stream.digest, take)
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
            await stream.digest(fail)
        assert stream.receive_nowait() is None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(digest)
        nursery.start_soon(other.digest, bool)
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
                await stream.digest(bool)

        nursery.start_soon(digest)
        await trio.testing.wait_all_tasks_blocked()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    stream.close()


async def test_what_was_sent_to_nobody_is_told_to_who_digests() -> None:
    stream, peer = pair()

    def take(data: bytes) -> bool:
        peer.close()
        stream.send_soon(b"hello?")
        return False

    async with trio.open_nursery() as nursery:

        async def digest() -> None:
            with pytest.raises(StreamLost):
                await stream.digest(take)

        nursery.start_soon(digest)
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"x")
    stream.close()


async def test_to_digest_no_longer_loses_nothing() -> None:
    stream, peer = pair()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.digest, bool)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    peer.send(b"later")
    assert await stream.receive() == b"later"
    stream.close()
    peer.close()


async def test_from_a_peer_that_does_not_read_no_more_is_read() -> None:
    stream, peer = pair()
    taken = answers = 0
    answer = bytes(1 << 13)

    def take(data: bytes) -> bool:
        nonlocal taken, answers
        taken += len(data)
        answers += 1
        stream.send_soon(answer)
        return data.endswith(b".")

    async def digest() -> None:
        await stream.digest(take)
        await stream.drain()
        stream.close()

    def send() -> int:
        try:
            return peer.send(b"x")
        except BlockingIOError:
            return 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(digest)
        sent, ended = 0, False
        while more := send():
            sent += more
            await trio.testing.wait_all_tasks_blocked()
        assert 0 < taken < sent
        got = 0
        while data := await read(peer, 1):
            got += len(data)
            if taken == sent and not ended:
                sent += peer.send(b".")
                ended = True
    assert taken == sent
    assert got == answers * len(answer)
    peer.close()


async def test_tls_is_digested_by_the_task() -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    left, right = (Stream(end) for end in socket.socketpair())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: left.start_tls(server, server_side=True))
        await right.start_tls(client, server_side=False, server_hostname="mx.test")

    def take(data: bytes) -> bool:
        left.send_soon(b"<" + data + b">")
        return data == b"end"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.digest, take)
        for word in (b"one", b"two", b"end"):
            await right.send_all(word)
            assert await right.receive() == b"<" + word + b">"
    left.close()
    right.close()
