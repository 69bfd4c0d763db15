"""The calls on sockets of `net/stream.py`, which never block."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import struct
import time
from contextlib import ExitStack

import pytest

from mailerq import _core


def test_receive_tells_nothing_yet_from_the_end() -> None:
    left, right = socket.socketpair()
    with left:
        left.setblocking(False)
        with right:
            assert _core.receive(left.fileno()) is None
            assert not _core.has_input(left.fileno())
            right.send(b"x\0y")
            assert _core.has_input(left.fileno())
            assert _core.receive(left.fileno()) == b"x\0y"
        assert _core.receive(left.fileno()) == b""
        assert not _core.has_input(left.fileno())


def test_send_says_how_much_was_taken() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        assert _core.send(left.fileno(), b"hello", 2) == 3
        assert right.recv(10) == b"llo"
        data, sent = bytes(1 << 24), 0
        while taken := _core.send(left.fileno(), data, sent):
            sent += taken
        assert 0 < sent < len(data)
        with pytest.raises(ValueError, match="outside"):
            _core.send(left.fileno(), b"hello", 6)
        with pytest.raises(ValueError, match="outside"):
            _core.send(left.fileno(), b"hello", -1)


def test_a_socket_that_somebody_made_blocking_is_not_waited_for() -> None:
    left, right = socket.socketpair()
    seconds = 5
    with left, right:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # so that a wait would end
            left.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
        assert left.getblocking()
        began = time.monotonic()
        assert _core.receive(left.fileno()) is None
        assert not _core.has_input(left.fileno())
        for size in (1 << 16, 1):  # without Python's lock, and with it
            while _core.send(left.fileno(), bytes(size)):
                pass
        assert time.monotonic() - began < seconds


def test_a_broken_connection_is_an_error_and_no_signal() -> None:
    left, right = socket.socketpair()
    with left:
        right.close()
        with pytest.raises(BrokenPipeError):
            _core.send(left.fileno(), b"x")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accept_and_name_know_both_ends(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {host} here: {error.strerror}")
    with listening:
        listening.setblocking(False)
        assert _core.accept(listening.fileno()) is None
        with socket.create_connection(listening.getsockname()[:2]) as peer:
            # The peer's end may be ready before ours is.
            select.select([listening], [], [])
            accepted = _core.accept(listening.fileno())
            assert accepted is not None
            fd, remote = accepted
            with socket.socket(fileno=fd):
                assert not os.get_blocking(fd)
                assert not os.get_inheritable(fd)
                assert remote == peer.getsockname()[:2] == _core.socket_name(fd, True)
                assert _core.socket_name(fd, False) == peer.getpeername()[:2]


def test_a_round_trip_to_this_host_is_short_and_other_sockets_have_none() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert 0 < _core.round_trip(client.fileno()) < 0.1
    left, right = socket.socketpair()
    with left, right:
        assert _core.round_trip(left.fileno()) == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_begins_without_waiting(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("this host has no IPv6")
    with server:
        fd, bound = _core.connect(address, server.getsockname()[1], address)
        assert bound
        with socket.socket(fileno=fd) as client, server.accept()[0] as accepted:
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getpeername()[:2] == client.getsockname()[:2]
            assert _core.socket_error(fd) == 0


def test_a_connection_that_is_refused_has_an_error_once() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        fd, _ = _core.connect("127.0.0.1", nobody.getsockname()[1])
        with socket.socket(fileno=fd), select.epoll() as epoll:
            epoll.register(fd, select.EPOLLOUT)
            assert epoll.poll(60)
            assert _core.socket_error(fd) == errno.ECONNREFUSED
            assert _core.socket_error(fd) == 0


@pytest.mark.parametrize("text", ["", "localhost", "127.0.0.1 ", "fe80::1%lo", "1.2.3"])
def test_a_connection_needs_an_address_without_a_zone(text: str) -> None:
    with pytest.raises(OSError) as caught:
        _core.connect(text, 25)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("local", ["192.0.2.1", "nowhere"])
def test_a_local_address_that_cannot_be_bound_is_told_from_the_remote_one(local: str) -> None:
    number, bound = _core.connect("127.0.0.1", 25, local)
    assert not bound
    assert -number in (errno.EADDRNOTAVAIL, errno.EINVAL)


def test_what_is_no_socket_is_an_error() -> None:
    name = lambda fd: _core.socket_name(fd, False)  # noqa: E731
    for call in (_core.receive, _core.accept, _core.socket_error, name):
        with pytest.raises(OSError) as caught:
            call(-1)
        assert caught.value.errno == errno.EBADF


def test_an_epoll_descriptor_tells_what_happened() -> None:
    left, right = socket.socketpair()
    with left, right, select.epoll() as epoll:
        fd = left.fileno()
        assert _core.happenings(epoll.fileno()) == []
        _core.watch(epoll.fileno(), fd, select.EPOLLIN | select.EPOLLET, known=False)
        assert _core.happenings(epoll.fileno()) == []
        right.send(b"x")
        assert _core.happenings(epoll.fileno()) == [(fd, select.EPOLLIN)]
        assert _core.happenings(epoll.fileno()) == [], "it is told once"
        _core.watch(epoll.fileno(), fd, select.EPOLLIN | select.EPOLLOUT, known=True)
        assert _core.happenings(epoll.fileno()) == [(fd, select.EPOLLIN | select.EPOLLOUT)]
        with pytest.raises(FileExistsError):
            _core.watch(epoll.fileno(), fd, select.EPOLLIN, known=False)
        with pytest.raises(FileNotFoundError):
            _core.watch(epoll.fileno(), right.fileno(), select.EPOLLIN, known=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.happenings(-1)


def test_what_epoll_has_told_is_not_lost_in_a_collection_of_garbage() -> None:
    pairs = [socket.socketpair() for _ in range(100)]
    with select.epoll() as epoll, select.epoll() as other, ExitStack() as stack:
        for left, right in pairs:
            stack.enter_context(left)
            stack.enter_context(right).send(b"x")
            _core.watch(epoll.fileno(), left.fileno(), select.EPOLLIN, known=False)
            _core.watch(other.fileno(), right.fileno(), select.EPOLLOUT, known=False)

        def meanwhile(phase: str, _: dict[str, int]) -> None:
            if phase == "start":
                _core.happenings(other.fileno())

        threshold = gc.get_threshold()
        gc.callbacks.append(meanwhile)
        gc.set_threshold(10)
        try:
            told = _core.happenings(epoll.fileno())
        finally:
            gc.set_threshold(*threshold)
            gc.callbacks.remove(meanwhile)
        assert dict(told) == {left.fileno(): select.EPOLLIN for left, _ in pairs}
