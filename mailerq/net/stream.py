"""A TCP connection as trio tasks use it here: plain or TLS, and cheap in task switches.

Theory of operation
-------------------
The socket is non-blocking. Every operation is tried first, and only one that would block
waits in trio's event loop: on a busy server most reads and writes then are one system call
and no task switch. So that a peer that always has more to say cannot keep the loop for
itself, a stream that was served `FAIRNESS` times in a row lets the others run.

TLS works on two memory buffers between `ssl` and the same socket, so that it shares all of
this.
"""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from typing import Final, Self

import trio

__all__ = ["RECEIVE_BYTES", "Stream", "StreamLost", "address_of"]

RECEIVE_BYTES: Final = 65536
"""Bytes that one read takes at most."""

FAIRNESS: Final = 32
"""Reads in a row that were served at once before others get a turn."""


class StreamLost(Exception):
    """The connection broke: reset, timed out by the kernel, or TLS that makes no sense."""


class Stream:
    """One connected TCP socket; the stream owns it. One task uses it at a time, and closes it.

    `local` and `remote` save a question to the kernel where the addresses are known already.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        local: tuple[str, int] | None = None,
        remote: tuple[str, int] | None = None,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._local = local
        self._remote = remote
        self._served = 0
        self._unsent = b""
        self._unread = b""
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()

    @classmethod
    async def connect(cls, host: str, port: int, *, local_ip: str | None = None) -> Self:
        """Connect to an IP address, from `local_ip` where it is given. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if local_ip is not None:
                sock.bind((local_ip, 0))
            try:
                sock.connect((host, port))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error)) from None
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def fileno(self) -> int:
        return self._fd

    @property
    def local(self) -> tuple[str, int]:
        """This end's address and port."""
        if self._local is None:
            self._local = address_of(self._sock.getsockname())
        return self._local

    @property
    def remote(self) -> tuple[str, int]:
        """The peer's address and port. Raises OSError when it is gone already."""
        if self._remote is None:
            self._remote = address_of(self._sock.getpeername())
        return self._remote

    @property
    def cipher(self) -> tuple[str, str, int] | None:
        """Name, protocol and secret bits of the cipher, or None without TLS."""
        return self._tls.cipher() if self._tls is not None else None

    async def receive(self) -> bytes:
        """What has come in; waits for at least one byte, empty when the peer has closed.

        Raises `StreamLost`.
        """
        if self._tls is None:
            return await self._receive_raw()
        while True:
            try:
                return self._tls.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                await self._flush_tls()
                data = await self._receive_raw()
                if not data:
                    return b""
                self._incoming.write(data)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise StreamLost(str(error)) from error

    @property
    def has_input(self) -> bool:
        """Whether bytes of the peer wait to be read."""
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def unread(self, data: bytes) -> None:
        """Put back what was received and is somebody else's: the next read, or TLS, gets it."""
        self._unread = data

    async def send_all(self, data: bytes) -> None:
        """Send all of it. Raises `StreamLost`; how much has arrived is then unknown."""
        if self._tls is None:
            await self._send_raw(data)
            return
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise StreamLost(str(error)) from error
        await self._flush_tls()

    def send_nowait(self, data: bytes) -> None:
        """Send what the socket takes at once; the rest waits for the next `send_all`.

        A connection that is broken is not told here, but by the next operation.
        """
        try:
            if self._tls is not None:
                self._tls.write(data)
                data = self._outgoing.read()
            data = self._unsent + data
            self._unsent = data[self._sock.send(data) :]
        except BlockingIOError:
            self._unsent = data
        except (OSError, ssl.SSLError):
            self._unsent = b""

    async def start_tls(
        self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        """Shake hands; everything after that is encrypted. Raises `StreamLost`."""
        tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush_tls()
                data = await self._receive_raw()
                if not data:
                    raise StreamLost("closed during the TLS handshake") from None
                self._incoming.write(data)
            except ssl.SSLError as error:
                if self._outgoing.pending:
                    await self._flush_tls()  # the alert that tells the peer why
                raise StreamLost(f"TLS handshake failed: {error.reason or error}") from error
        await self._flush_tls()
        self._tls = tls

    def close(self) -> None:
        """Close the socket; in TLS with a word of goodbye where it fits."""
        if self._fd < 0:
            return
        if self._tls is not None:
            with suppress(ssl.SSLError, OSError):  # The peer's own goodbye is not waited for.
                self._tls.unwrap()
            with suppress(OSError):
                self._sock.send(self._outgoing.read())
        self._fd = -1
        self._sock.close()

    async def _receive_raw(self) -> bytes:
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        while True:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                self._served = 0
                await trio.lowlevel.wait_readable(self._fd)
            except OSError as error:
                raise StreamLost(str(error)) from error
            else:
                self._served += 1
                if self._served > FAIRNESS:
                    self._served = 0
                    await trio.lowlevel.checkpoint()
                return data

    async def _send_raw(self, data: bytes) -> None:
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise StreamLost(str(error)) from error
        if sent == len(data):
            return
        view = memoryview(data)
        while sent < len(data):
            try:
                await trio.lowlevel.wait_writable(self._fd)
                sent += self._sock.send(view[sent:])
            except BlockingIOError:
                continue
            except OSError as error:
                raise StreamLost(str(error)) from error

    async def _flush_tls(self) -> None:
        if self._outgoing.pending:
            await self._send_raw(self._outgoing.read())


def address_of(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """The address and port in a socket's name; one of IPv4 that came in by IPv6 as it is."""
    host, port = name[:2]
    return host.removeprefix("::ffff:"), port
