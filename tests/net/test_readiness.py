"""Streams wait for edges: none may be lost, and none may wake the wrong one."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from mailerq.net.stream import RECEIVE_BYTES, Stream, StreamLost
from tests.support import DEADLINE


@contextmanager
def connected() -> Iterator[tuple[Stream, socket.socket]]:
    """A stream on a TCP connection, and the peer's blocking socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = socket.create_connection(listening.getsockname())
        listening.setblocking(False)
        stream = Stream.accept(listening.fileno())
        assert stream is not None
        with peer:
            try:
                yield stream, peer
            finally:
                stream.close()


async def send(stream: Stream, data: bytes) -> None:
    stream.write(data)
    await stream.drain()


async def waiting() -> None:
    """Let all other tasks come to where they wait."""
    await trio.testing.wait_all_tasks_blocked()


async def test_what_came_before_the_first_wait_is_found() -> None:
    with connected() as (stream, peer):
        peer.sendall(b"early")
        assert await stream.receive() == b"early"


async def test_what_comes_during_a_wait_ends_it_each_time() -> None:
    with connected() as (stream, peer):
        received = []

        async def read() -> None:
            for _ in range(3):
                received.append(await stream.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for piece in (b"one", b"two", b"three"):
                await waiting()
                peer.sendall(piece)
        assert received == [b"one", b"two", b"three"]


async def test_the_end_is_seen_behind_the_last_bytes() -> None:
    with connected() as (stream, peer):
        peer.sendall(b"last words")
        peer.close()
        assert await stream.receive() == b"last words"
        assert await stream.receive() == b""
        assert await stream.receive() == b""


async def test_a_connection_that_cannot_be_watched_is_lost_and_the_next_is_not() -> None:
    for descriptors in (0, 1, 2):
        with (
            connected() as (stream, _),
            pytest.raises(StreamLost, match="Too many open files"),
            exhausted(but=descriptors),
        ):
            await stream.receive()
    with connected() as (stream, peer):
        peer.sendall(b"early")
        assert await stream.receive() == b"early"


@contextmanager
def exhausted(but: int) -> Iterator[None]:
    """This process has no descriptors left, or a few; all that it opens meanwhile it closes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1024) if not is_open(number)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[but], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not any(map(is_open, free[:but]))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


async def test_the_end_alone_ends_a_wait() -> None:
    with connected() as (stream, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive)
            await waiting()
            peer.shutdown(socket.SHUT_WR)
        assert await stream.receive() == b""


async def test_a_read_that_takes_all_it_asked_for_may_have_left_something_or_nothing() -> None:
    with connected() as (stream, peer):
        for size in (RECEIVE_BYTES, 2 * RECEIVE_BYTES, 2 * RECEIVE_BYTES + 1):
            received = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.sendall, bytes(size))
                while received < size:
                    received += len(await stream.receive())
            assert received == size
        with trio.move_on_after(0.01) as scope:
            await stream.receive()
        assert scope.cancelled_caught


async def test_urgent_data_leaves_nothing_behind_it_unread() -> None:
    with connected() as (stream, peer):
        received = b""
        peer.sendall(b"before")
        peer.send(b"!", socket.MSG_OOB)
        peer.sendall(b"after")
        with trio.fail_after(60):
            while not received.endswith(b"after"):
                received += await stream.receive()
        assert received == b"beforeafter"


async def test_a_wait_that_was_cancelled_loses_nothing() -> None:
    with connected() as (stream, peer):
        with trio.move_on_after(0.01) as scope:
            await stream.receive()
        assert scope.cancelled_caught
        peer.sendall(b"later")
        assert await stream.receive() == b"later"


async def test_a_writer_that_was_cancelled_can_write_later() -> None:
    with connected() as (stream, peer):
        with trio.move_on_after(0.01) as scope:
            while True:
                await send(stream, bytes(1 << 20))
        assert scope.cancelled_caught

        def drain() -> bytes:
            last = b""
            while not last.endswith(b"end"):
                last = last[-3:] + peer.recv(1 << 20)
            return last

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, stream, b"end")
            await trio.to_thread.run_sync(drain)


async def test_reading_and_writing_wait_side_by_side() -> None:
    data = bytes(1 << 24)
    with connected() as (stream, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, stream, data)
            await waiting()
            peer.sendall(b"meanwhile")
            assert await stream.receive() == b"meanwhile"
            received = 0
            while received < len(data):
                received += len(await trio.to_thread.run_sync(peer.recv, 1 << 20))


async def test_a_second_reader_is_an_error() -> None:
    with connected() as (stream, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive)
            await waiting()
            with pytest.raises(trio.BusyResourceError):
                await stream.receive()
            peer.sendall(b"x")


async def test_to_look_for_input_takes_it_from_nobody() -> None:
    with connected() as (stream, peer):
        received = []

        async def read() -> None:
            received.append(await stream.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await waiting()
            assert not stream.has_input
            peer.sendall(b"x")
            while not stream.has_input:
                pass
            assert stream.has_input
        assert received == [b"x"]


async def test_who_is_woken_finds_no_input_and_waits_again_for_it() -> None:
    with connected() as (stream, peer):
        stream.wake()  # Nobody waits: that is no news for the next one.
        found = []

        async def wait() -> None:
            found.append(await stream.wait_for_input())
            found.append(await stream.wait_for_input())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await waiting()
            stream.wake()
            await waiting()
            assert found == [False]
            peer.sendall(b"x")
        assert found == [False, True]
        assert stream.receive_nowait() == b"x"
        assert stream.receive_nowait() is None


async def test_known_input_is_what_the_loop_has_noticed() -> None:
    with connected() as (stream, peer):
        peer.sendall(b"a")
        assert await stream.receive() == b"a"
        assert stream.receive_known() is None
        with trio.move_on_after(0):
            await stream.wait_for_input()  # from here on the poller watches the socket
        peer.sendall(b"b")
        with trio.fail_after(DEADLINE):
            while (came := stream.receive_known()) is None:
                await trio.lowlevel.checkpoint()
        assert came == b"b"
        assert stream.receive_known() is None


async def test_a_reader_is_not_woken() -> None:
    with connected() as (stream, peer):
        received = []

        async def read() -> None:
            received.append(await stream.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await waiting()
            stream.wake()
            await waiting()
            peer.sendall(b"x")
        assert received == [b"x"]


async def test_more_streams_than_are_looked_at_in_one_go_all_wake() -> None:
    count = 300
    left, right = zip(*(socket.socketpair() for _ in range(count)), strict=True)
    streams = [Stream(sock) for sock in left]
    received = []

    async def read(stream: Stream) -> None:
        received.append(await stream.receive())

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(read, stream)
        await waiting()
        for sock in right:
            sock.send(b"x")
    assert received == [b"x"] * count
    for one in (*streams, *right):
        one.close()


async def test_a_copy_that_stays_open_does_not_disturb_the_next_one_of_that_number() -> None:
    first, peer = socket.socketpair()
    stream = Stream(first)
    with trio.move_on_after(0.01):
        await stream.receive()
    number = stream.fileno()
    copy = os.dup(number)  # as a plugin may make it
    stream.close()
    pair = socket.socketpair()
    mine, other = pair if pair[0].fileno() == number else pair[::-1]
    assert mine.fileno() == number
    following, received = Stream(mine), []

    async def read() -> None:
        received.append(await following.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await waiting()
        peer.send(b"for the copy")
        await waiting()
        assert received == []
        other.send(b"x")
    assert received == [b"x"]
    os.close(copy)
    following.close()
    peer.close()
    other.close()


def test_each_loop_has_its_own() -> None:
    async def echo() -> bytes:
        with connected() as (stream, peer):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, trio.run, inner)
                peer.sendall(b"outer")
                return await stream.receive()

    async def inner() -> None:
        with connected() as (stream, peer):
            peer.sendall(b"inner")
            assert await stream.receive() == b"inner"

    assert trio.run(echo) == b"outer"
    assert trio.run(echo) == b"outer"
