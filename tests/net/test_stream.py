"""Streams on real sockets, plain and TLS, in both directions."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from contextlib import suppress
from time import monotonic

import pytest
import trio
import trio.testing
import trustme

from mailerq import sockets
from mailerq.net import stream
from mailerq.net.stream import FAIR_SECONDS, LONG_BYTES, CannotBind, Stream, StreamLost


def pair() -> tuple[Stream, Stream]:
    left, right = socket.socketpair()
    return Stream(left), Stream(right)


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


async def read(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = await stream.receive()
        assert chunk
        data += chunk
    return data


async def send(stream: Stream, data: bytes) -> None:
    stream.write(data)
    await stream.drain()


async def test_bytes_arrive_in_both_directions_and_then_the_end() -> None:
    left, right = pair()
    left.write(b"ping")
    assert await right.receive() == b"ping"
    right.write(b"pong")
    assert await left.receive() == b"pong"
    left.close()
    assert await right.receive() == b""
    right.close()


async def test_more_than_fits_into_the_sockets_is_sent_whole() -> None:
    left, right = pair()
    data = bytes(range(256)) * 10000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, left, data)
        assert await read(right, len(data)) == data
    left.close()
    right.close()


async def shake_hands(
    server: Stream, client: Stream, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: server.start_tls(contexts[0], server_side=True))
        await client.start_tls(contexts[1], server_side=False, server_hostname="mx.test")


async def test_what_a_flush_cannot_send_comes_before_the_next_write() -> None:
    left, right = pair()
    data = bytes(range(256)) * 10000
    left.write(data)
    left.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, left, b"end")
        assert await read(right, len(data) + 3) == data + b"end"
    left.close()
    right.close()


@pytest.mark.parametrize("secure", [False, True])
async def test_what_a_flush_cannot_send_goes_out_while_the_peer_is_waited_for(
    secure: bool, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    left, right = pair()
    if secure:
        await shake_hands(left, right, contexts)
    data = bytes(range(256)) * 10000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.receive)
        await trio.testing.wait_all_tasks_blocked()
        left.write(data)
        left.flush()
        left.write(b"behind it")
        left.flush()
        with trio.fail_after(60):
            assert await read(right, len(data) + 9) == data + b"behind it"
        left.write(b", and later")
        left.flush()
        assert await read(right, 11) == b", and later"
        right.write(b"thanks")
    left.close()
    right.close()


@pytest.mark.parametrize("secure", [False, True])
async def test_a_write_that_comes_while_the_rest_of_another_goes_out_is_behind_it(
    secure: bool, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    left, right = pair()
    if secure:
        await shake_hands(left, right, contexts)
    data = bytes(range(256)) * 10000
    left.write(data)
    left.flush()
    received = await read(right, len(data) // 2)  # so the rest is under way without a task
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, left, data[::-1])
        await trio.testing.wait_all_tasks_blocked()
        left.write(b"end")
        left.flush()
        left.write(data)
        left.flush()
        received += await read(right, 3 * len(data) + 3 - len(received))
    assert received == data + data[::-1] + b"end" + data
    left.close()
    right.close()


async def test_what_a_flush_cannot_send_is_dropped_by_close() -> None:
    left, right = pair()
    data = bytes(range(256)) * 10000
    left.write(data)
    left.flush()
    left.close()
    left.write(b"too late")
    left.flush()
    received = b""
    while chunk := await right.receive():
        received += chunk
    assert len(received) < len(data)
    assert data.startswith(received)
    right.close()


async def test_a_peer_that_goes_while_the_rest_of_a_send_waits_is_no_error_until_then() -> None:
    left, right = pair()
    left.write(bytes(1 << 24))
    left.flush()
    right.close()
    await trio.testing.wait_all_tasks_blocked()
    left.write(b"x")
    with pytest.raises(StreamLost):
        await left.drain()
    left.close()


async def test_tls_that_was_cut_off_ends_without_a_goodbye(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    await shake_hands(server, client, contexts)
    with socket.socket(fileno=os.dup(client.fileno())) as raw:
        server.write(bytes(1 << 24))
        server.flush()
        received = raw.recv(1 << 24)  # there is room now, but in the middle of a record
        server.close()
        while chunk := raw.recv(1 << 24):
            received += chunk
    client.close()
    alert = bytes.fromhex("1703030013")  # the header of one in TLS 1.3, of 24 bytes in all
    assert received[-24:-19] != alert


async def test_a_peer_that_always_has_more_lets_others_run() -> None:
    left, right = pair()
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            others += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(2):  # trio shuffles who of two is first
            end = monotonic() + FAIR_SECONDS
            while monotonic() <= end:
                left.write(b"x")
                await right.receive()
            left.write(b"x")
            await right.receive()
        assert others > 0
        nursery.cancel_scope.cancel()
    left.close()
    right.close()


@pytest.mark.parametrize("size", [1, LONG_BYTES])
async def test_a_broken_connection_is_lost(size: int) -> None:
    left, right = pair()
    right.close()
    left.write(bytes(size))
    with pytest.raises(StreamLost):
        await left.drain()
    left.close()


async def test_what_is_short_leaves_when_all_had_their_turn_and_as_one() -> None:
    left, right = pair()
    left.write(b"one ")
    left.write(b"packet")
    assert not right.has_input
    await trio.testing.wait_all_tasks_blocked()
    assert await right.receive() == b"one packet"
    left.close()
    right.close()


async def test_what_is_short_does_not_wait_for_more_than_a_turn_of_a_busy_loop() -> None:
    left, right = pair()
    left.write(b"x")
    turns = 0
    while not right.has_input:
        await trio.lowlevel.checkpoint()
        turns += 1
    assert turns <= 2
    left.close()
    right.close()


async def test_many_short_ones_fill_the_buffer() -> None:
    left, right = pair()
    for count in range(LONG_BYTES):
        assert not left.is_full, count
        left.write(b"x")
    assert left.is_full
    await left.drain()
    assert not left.is_full
    assert right.has_input
    left.close()
    right.close()


async def test_closing_sends_what_has_not_left() -> None:
    left, right = pair()
    left.write(b"goodbye")
    left.close()
    assert await right.receive() == b"goodbye"
    right.close()


async def test_drain_waits_until_the_socket_has_taken_it() -> None:
    left, right = pair()
    left.write(bytes(1 << 24))  # more than the sockets take
    left.flush()
    drained = trio.Event()

    async def drain() -> None:
        await left.drain()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        assert not drained.is_set()
        while not drained.is_set():
            await right.receive()
    left.close()
    right.close()


async def test_what_a_send_met_is_told_once_and_what_came_before_it_can_be_read() -> None:
    left, right = pair()
    right.write(b"last words")
    await right.drain()
    with socket.socket(fileno=os.dup(left.fileno())) as copy:
        copy.shutdown(socket.SHUT_WR)
    left.write(b"x")
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(StreamLost):
        await left.receive()
    assert await left.receive() == b"last words"
    left.close()
    right.close()


async def test_what_does_not_fit_at_the_end_of_a_turn_follows() -> None:
    left, right = pair()
    with socket.socket(fileno=os.dup(left.fileno())) as copy:
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    data = bytes(range(256)) * (LONG_BYTES // 256 - 1)
    with trio.fail_after(60):
        left.write(data)  # nobody has waited on this stream before
        assert await read(right, len(data)) == data
    left.close()
    right.close()


async def test_a_defect_in_one_send_does_not_keep_the_others_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, broken_peer = pair()
    left, right = pair()

    def fail(fd: int, data: bytes, start: int = 0) -> int:
        if fd == broken.fileno():
            raise MemoryError
        return sockets.send(fd, data, start)

    monkeypatch.setattr(stream, "send", fail)
    for text in (b"one", b"two"):
        broken.write(b"x")
        left.write(text)
        assert await right.receive() == text
        with pytest.raises(StreamLost, match="MemoryError"):
            await broken.receive()
    assert "sending failed" in caplog.text
    for each in (broken, broken_peer, left, right):
        each.close()


async def test_who_waits_to_read_learns_that_what_was_sent_is_lost() -> None:
    left, right = pair()
    lost = trio.Event()

    async def read() -> None:
        with pytest.raises(StreamLost):
            await left.receive()
        lost.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        with socket.socket(fileno=os.dup(left.fileno())) as copy:
            copy.shutdown(socket.SHUT_WR)
        left.write(b"x")
        with trio.fail_after(60):
            await lost.wait()
    left.close()
    right.close()


async def test_connecting_to_nobody_raises_oserror() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await Stream.connect("127.0.0.1", sock.getsockname()[1])


async def test_connect_knows_both_ends() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        stream = await Stream.connect(*listening.getsockname(), local_ip="127.0.0.2")
        accepted, address = listening.accept()
        with accepted:
            assert address == stream.local
            assert stream.local[0] == "127.0.0.2"
            assert stream.remote == listening.getsockname()
        stream.close()


async def test_connecting_from_an_address_of_another_host_says_so() -> None:
    with pytest.raises(CannotBind) as caught:
        await Stream.connect("127.0.0.1", 25, local_ip="192.0.2.1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


class Enough(Exception):
    pass


@pytest.mark.parametrize("wait", ["connected", "receive", "receive_each", "drain"])
async def test_an_exception_ends_any_wait_in_a_stream(wait: str) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        full = [socket.socket() for _ in range(4 if wait == "connected" else 0)]
        for sock in full:  # the backlog: who comes behind waits
            sock.setblocking(False)
            sock.connect_ex(listening.getsockname())
        stream = Stream.dial(*listening.getsockname())
        if wait != "connected":
            await stream.connected()
        waits = {
            "connected": stream.connected,
            "receive": stream.receive,
            "receive_each": lambda: stream.receive_each(lambda data: True),
            "drain": stream.drain,
        }
        if wait == "drain":
            stream.write(bytes(1 << 24))
        assert not stream.interrupt(Enough()), "nobody waits"

        async def run() -> None:
            with pytest.raises(Enough):
                await waits[wait]()
            ended.set()

        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            assert stream.interrupt(Enough())
            with trio.fail_after(60):
                await ended.wait()
        stream.close()
        for sock in full:
            sock.close()


async def test_tls_carries_much_data_and_a_goodbye(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    data = bytes(range(256)) * 4000
    await shake_hands(server, client, contexts)
    assert client.cipher is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, client, data)
        assert await read(server, len(data)) == data
    server.write(b"thanks")
    assert await client.receive() == b"thanks"
    client.close()
    assert await server.receive() == b""
    server.close()


async def test_a_certificate_that_is_not_trusted_is_lost_on_both_sides(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()

    async def shake_hands_and_read() -> None:
        await server.start_tls(contexts[0], server_side=True)
        await server.receive()  # In TLS 1.3 the client's objection comes only here.

    async def serve() -> None:
        with pytest.raises(StreamLost):
            await shake_hands_and_read()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(StreamLost, match="CERTIFICATE_VERIFY_FAILED"):
            await client.start_tls(
                ssl.create_default_context(), server_side=False, server_hostname="mx.test"
            )
        client.close()
    server.close()


class TlsClient:
    """A TLS client on a socket of the kernel, which sees what arrives together."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="mx.test")

    async def send(self) -> None:
        await self.sock.send(self.outgoing.read())

    async def shake_hands(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.send()
                self.incoming.write(await self.sock.recv(1 << 16))
            else:
                await self.send()
                return

    async def arrived(self) -> bytes:
        """What arrives at once."""
        data = await self.sock.recv(1 << 16)
        self.incoming.write(data)
        return data


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tickets_leave_with_the_first_output_and_the_goodbye_with_the_last(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], version: ssl.TLSVersion
) -> None:
    left, right = socket.socketpair()
    server = Stream(left)
    contexts[1].maximum_version = version

    async def serve() -> None:
        await server.start_tls(contexts[0], server_side=True)
        await server.receive()

    try:
        client = TlsClient(right, contexts[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await client.shake_hands()
            await trio.testing.wait_all_tasks_blocked()
            unasked = waiting_for(client)
            nursery.cancel_scope.cancel()
        assert not unasked
        server.write(b"250 hello")
        server.flush()
        await client.arrived()
        assert client.tls.read() == b"250 hello"
        session = client.tls.session
        assert session is not None and session.has_ticket
        server.write(b"221 bye")
        server.close()
        await client.arrived()
        assert client.tls.read() == b"221 bye"
        assert client.tls.read() == b"", "the end that the peer has announced"
    finally:
        contexts[1].maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
        client.sock.close()


def waiting_for(client: TlsClient) -> bytes:
    """What is there to read now."""
    with socket.fromfd(client.sock.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            return sock.recv(1 << 16)
        except BlockingIOError:
            return b""


async def test_a_goodbye_is_not_sent_behind_output_that_was_cut_off(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    contexts[1].options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # some versions of Python set it
    left, right = socket.socketpair()
    server, client = Stream(left), TlsClient(right, contexts[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: server.start_tls(contexts[0], server_side=True))
        await client.shake_hands()
    server.write(bytes(4 << 20))
    server.close()
    got = 0
    while await client.arrived():
        with suppress(ssl.SSLWantReadError):
            while data := client.tls.read(1 << 16):
                got += len(data)
    assert 0 < got < 4 << 20
    client.incoming.write_eof()
    with pytest.raises(ssl.SSLError, match=r"(?i)eof"):
        client.tls.read()
    client.sock.close()


async def test_input_inside_tls_is_read_without_waiting(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    await shake_hands(server, client, contexts)
    assert client.receive_nowait() is None  # the tickets of TLS 1.3 are nothing to read
    server.write(b"one")
    server.flush()
    assert await client.wait_for_input()
    assert await until_read(client) == b"one"
    # Two records in one segment: the second is in no socket when the first is read.
    server.write(b"two")
    server.write(b"three")
    server.flush()
    assert await client.receive() == b"two"
    assert await client.wait_for_input()
    assert client.receive_nowait() == b"three"
    assert client.receive_nowait() is None
    server.close()
    assert await until_read(client) == b""
    client.close()


async def test_a_wait_for_input_inside_tls_is_woken_and_does_not_spin(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    await shake_hands(server, client, contexts)
    while client.receive_nowait() is not None:
        pass
    ended: list[bool] = []

    async def wait() -> None:
        ended.append(await client.wait_for_input())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        client.wake()
    assert ended == [False]
    server.close()
    client.close()


async def until_read(stream: Stream) -> bytes:
    with trio.fail_after(60):
        while (data := stream.receive_nowait()) is None:
            assert await stream.wait_for_input()
    return data


async def test_a_block_of_many_records_is_sent_whole(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    await shake_hands(server, client, contexts)
    data = bytes(range(256)) * 1000  # in one write, more than a record holds
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, client, data)
        assert await read(server, len(data)) == data
    server.close()
    client.close()


async def test_a_name_that_cannot_be_sent_is_a_mistake_of_the_caller(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    for name in (".test", "a" * 64 + ".test", "a..test"):
        with pytest.raises(ValueError, match=r"empty|label|dot"):
            await client.start_tls(contexts[1], server_side=False, server_hostname=name)
    server.close()
    client.close()


async def test_garbage_instead_of_a_handshake_is_lost(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    client.write(b"EHLO in.clear\r\n")
    with pytest.raises(StreamLost):
        await server.start_tls(contexts[0], server_side=True)
    server.close()
    client.close()


async def test_what_is_written_during_a_drain_comes_behind_it() -> None:
    left, right = pair()
    data = bytes(range(256)) * 10000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, left, data)
        await trio.testing.wait_all_tasks_blocked()
        left.write(b"behind ")
        left.flush()
        left.write(b"it")
        left.flush()
        assert await read(right, len(data) + 9) == data + b"behind it"
    left.close()
    right.close()
