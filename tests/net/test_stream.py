"""Streams on real sockets, plain and TLS, in both directions."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio
import trio.testing
import trustme

from mailerq.net.stream import FAIRNESS, Stream, StreamLost


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


async def test_bytes_arrive_in_both_directions_and_then_the_end() -> None:
    left, right = pair()
    await left.send_all(b"ping")
    assert await right.receive() == b"ping"
    await right.send_all(b"pong")
    assert await left.receive() == b"pong"
    left.close()
    assert await right.receive() == b""
    right.close()


async def test_more_than_fits_into_the_sockets_is_sent_whole() -> None:
    left, right = pair()
    data = bytes(range(256)) * 40000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, data)
        assert await read(right, len(data)) == data
    left.close()
    right.close()


async def test_what_send_nowait_cannot_send_comes_with_the_next_send() -> None:
    left, right = pair()
    data = bytes(range(256)) * 40000
    left.send_nowait(data)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, b"end")
        assert await read(right, len(data) + 3) == data + b"end"
    left.close()
    right.close()


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
        for _ in range(2 * (FAIRNESS + 1)):  # trio shuffles who of two is first
            await left.send_all(b"x")
            await right.receive()
        assert others > 0
        nursery.cancel_scope.cancel()
    left.close()
    right.close()


async def test_a_broken_connection_is_lost() -> None:
    left, right = pair()
    right.close()
    with pytest.raises(StreamLost):
        await left.send_all(b"x")
    left.close()


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


async def test_tls_carries_much_data_and_a_goodbye(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    data = bytes(range(256)) * 4000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: server.start_tls(contexts[0], server_side=True))
        await client.start_tls(contexts[1], server_side=False, server_hostname="mx.test")
    assert client.cipher is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, data)
        assert await read(server, len(data)) == data
    await server.send_all(b"thanks")
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


async def test_garbage_instead_of_a_handshake_is_lost(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = pair()
    await client.send_all(b"EHLO in.clear\r\n")
    with pytest.raises(StreamLost):
        await server.start_tls(contexts[0], server_side=True)
    server.close()
    client.close()


async def test_what_send_nowait_is_given_during_a_send_comes_behind_it() -> None:
    left, right = pair()
    data = bytes(range(256)) * 40000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, data)
        await trio.testing.wait_all_tasks_blocked()
        left.send_nowait(b"behind ")
        left.send_nowait(b"it")
        assert await read(right, len(data) + 9) == data + b"behind it"
    left.close()
    right.close()
