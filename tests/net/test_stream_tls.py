"""Input inside TLS: no task switch, no read that finds nothing, and what TLS itself has to say."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from contextlib import suppress
from functools import partial
from typing import Final

import pytest
import trio
import trio.testing
import trustme

from mailerq.net.stream import LONG_BYTES, Stream, StreamLost
from tests.engine.lag_kit import Meter, meter, no_turn_above
from tests.net.stream_kit import echo

MANY: Final = 40


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(context)
    context.num_tickets = 1
    return context


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
def client_context(authority: trustme.CA, request: pytest.FixtureRequest) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.minimum_version = context.maximum_version = request.param
    return context


class Client:
    """A TLS client whose records go out when and how the test wants."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="mx.test")

    async def shake_hands(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.send(self.outgoing.read())
                await self._hear()
        self.sock.send(self.outgoing.read())

    async def _hear(self) -> None:
        await trio.lowlevel.wait_readable(self.sock)
        self.incoming.write(self.sock.recv(1 << 16))

    async def read(self, size: int) -> bytes:
        """So many bytes or more, fewer at the end."""
        data = b""
        while len(data) < size:
            try:
                came = self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                await self._hear()
                continue
            if not came:
                break
            data += came
        return data

    def records(self, *pieces: bytes) -> bytes:
        """The bytes on the wire of pieces, each a record of its own."""
        for piece in pieces:
            self.tls.write(piece)
        return self.outgoing.read()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """Each read of `ssl`: by whom, and what was returned or raised."""
    found: list[tuple[object, object]] = []
    real = ssl.SSLObject.read

    def read(self: ssl.SSLObject, *arguments: int) -> bytes:
        try:
            data = real(self, *arguments)
        except Exception as error:
            found.append((self, error))
            raise
        found.append((self, data))
        return data

    monkeypatch.setattr(ssl.SSLObject, "read", read)
    return found


async def connected(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[Stream, Client]:
    left, right = socket.socketpair()
    stream, peer = Stream(left), Client(right, client)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: stream.start_tls(server, server_side=True))
            await peer.shake_hands()
    return stream, peer


async def test_input_inside_tls_wakes_no_task_and_asks_ssl_once_for_a_record(
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    reads: list[tuple[object, object]],
) -> None:
    stream, peer = await connected(server_context, client_context)
    async with echo(stream) as answering:
        reads.clear()
        for number in range(10):
            peer.sock.send(peer.records(b"%d" % number))
            assert await peer.read(3) == b"<%d>" % number
        asleep = answering.steps
        asked = [found for reader, found in reads if reader is not peer.tls]
        peer.sock.send(peer.records(b"end"))
    assert asleep == 0
    assert answering.steps == 1
    assert asked == [b"%d" % number for number in range(10)]
    assert answering.seen == [*asked, b"end"]
    stream.close()
    peer.sock.close()


async def test_records_are_received_whole_and_in_order_however_they_arrive(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    stream, peer = await connected(server_context, client_context)
    pieces = [bytes([number]) * (1 + 70 * number) for number in range(1, MANY)]
    seen = bytearray()
    whole = b"".join(pieces)

    def take(data: bytes) -> bool:
        seen.extend(data)
        return len(seen) == 3 * len(whole)

    async def send(data: bytes, step: int) -> None:
        left = memoryview(data)
        while left:
            await trio.lowlevel.wait_writable(peer.sock)
            left = left[peer.sock.send(left[:step]) :]

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_each, take)
            await trio.testing.wait_all_tasks_blocked()
            await send(peer.records(*pieces), 1 << 20)
            await send(peer.records(*pieces), 997)
            await send(peer.records(*pieces), 101)
    assert bytes(seen) == 3 * whole
    stream.close()
    peer.sock.close()


async def test_input_byte_by_byte_is_read_when_its_record_is_whole(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    stream, peer = await connected(server_context, client_context)
    seen = []

    def take(data: bytes) -> bool:
        seen.append(data)
        return True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive_each, take)
        wire = peer.records(b"hello")
        for at in range(len(wire)):
            await trio.testing.wait_all_tasks_blocked()
            assert seen == []
            peer.sock.send(wire[at : at + 1])
    assert seen == [b"hello"]
    stream.close()
    peer.sock.close()


async def test_a_goodbye_without_an_end_of_the_connection_ends_the_digestion(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    stream, peer = await connected(server_context, client_context)
    seen: list[bytes] = []

    def take(data: bytes) -> bool:
        seen.append(data)
        return not data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive_each, take)
        await trio.testing.wait_all_tasks_blocked()
        wire = peer.records(b"last words")
        with pytest.raises(ssl.SSLWantReadError):
            peer.tls.unwrap()
        peer.sock.send(wire + peer.outgoing.read())
    assert seen == [b"last words", b""]
    assert await stream.receive() == b""
    stream.close()
    peer.sock.close()


async def test_a_peer_that_does_not_read_its_replies_is_not_read_either(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    stream, peer = await connected(server_context, client_context)
    reply, count, asked = bytes(4 * LONG_BYTES), 64, 0

    def take(data: bytes) -> bool:
        nonlocal asked
        asked += len(data)
        stream.write(reply)
        return asked == count

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_each, take)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(count):
                peer.sock.send(peer.records(b"x"))
                await trio.testing.wait_all_tasks_blocked()
            stuck = asked
            assert len(await peer.read(count * len(reply))) == count * len(reply)
    assert stuck < count // 2
    assert asked == count
    stream.close()
    peer.sock.close()


async def test_broken_tls_is_lost_for_who_digests(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    stream, peer = await connected(server_context, client_context)

    async def receive() -> None:
        with pytest.raises(StreamLost):
            await stream.receive_each(bool)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            wire = bytearray(peer.records(b"hello"))
            wire[-1] ^= 1
            peer.sock.send(wire)
    stream.close()
    peer.sock.close()


def start_client(port: int) -> subprocess.Popen[bytes]:
    command = ["openssl", "s_client", "-msg", "-tls1_3", "-connect", f"127.0.0.1:{port}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
async def test_a_client_that_takes_new_keys_is_understood_and_gets_new_ones(
    server_context: ssl.SSLContext,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = start_client(listener.getsockname()[1])
        stream = Stream((await trio.to_thread.run_sync(listener.accept))[0])
    commands, output = client.stdin, client.stdout
    assert commands is not None and output is not None

    def wait_for(start: bytes, text: bytes) -> None:
        assert any(line.startswith(start) and text in line for line in output)

    async def heard(start: bytes, text: bytes) -> None:
        await trio.to_thread.run_sync(wait_for, start, text, abandon_on_cancel=True)

    def say(line: bytes) -> None:
        commands.write(line)
        commands.flush()

    seen: list[bytes] = []

    def take(data: bytes) -> bool:
        seen.append(data)
        stream.write(b"what?\n")
        return data == b"more\n" or not data

    try:
        with trio.fail_after(60):
            await stream.start_tls(server_context, server_side=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive_each, take)
                say(b"K\n")
                await heard(b"KEYUPDATE", b"")
                say(b"hello\n")
                await heard(b"<<<", b"KeyUpdate")
                say(b"more\n")
        assert seen == [b"hello\n", b"more\n"]
    finally:
        stream.close()
        client.kill()
        client.communicate()


@no_turn_above(0.05)
async def test_a_peer_that_sends_tickets_and_no_data_is_left_within_a_turn(
    authority: trustme.CA,
) -> Meter:
    """All of it is there to read at once: 5 MB would take a quarter of a second."""
    flood = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(flood)
    flood.num_tickets = 20_000
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    ours, theirs = socket.socketpair()
    stream, said = Stream(ours), trio.socket.from_stdlib_socket(theirs)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = flood.wrap_bio(incoming, outgoing, server_side=True)

    async def serve() -> None:
        while True:
            try:
                await trio.to_thread.run_sync(peer.do_handshake)  # many tickets take a while
                break
            except ssl.SSLWantReadError:
                await say(outgoing.read())
                incoming.write(await said.recv(65536))
        with suppress(OSError):
            await say(outgoing.read())

    async def say(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await said.send(view) :]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await stream.start_tls(context, server_side=False, server_hostname="mx.test")
        with meter() as turns, pytest.raises(StreamLost, match="64 kB of TLS messages"):
            with trio.fail_after(10):
                await stream.receive()
        assert stream.most_spent < 4 * 65536
        assert stream.session is None  # a peer like that resumes nothing
        stream.close()
    said.close()
    return turns


async def test_what_tls_takes_for_itself_is_measured(authority: trustme.CA) -> None:
    """A few tickets and many lines: only what comes between two reads of data counts."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    pair = [Stream(each) for each in socket.socketpair()]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(pair[0].start_tls, server, server_side=True))
        await pair[1].start_tls(context, server_side=False, server_hostname="mx.test")
    handshake = pair[1].most_spent
    assert 500 < handshake < 4000
    for _ in range(3000):
        pair[0].write(b"250 2.0.0 ok\r\n")
        pair[0].flush()
        assert await pair[1].receive() == b"250 2.0.0 ok\r\n"
    pair[0].write(bytes(200_000))
    got = 0
    while got < 200_000:
        got += len(await pair[1].receive())
    assert pair[1].most_spent == handshake
    assert pair[1].session is not None and pair[1].session.has_ticket
    for each in pair:
        each.close()
