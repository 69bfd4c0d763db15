"""A TCP connection for trio tasks, plain or TLS, with few task switches.

Theory of operation
-------------------
The socket is non-blocking. A write waits only for the rest that does not fit. A read is tried when
`mailerq.net.readiness` has reported input. Bytes that `send_nowait` cannot send leave when the
socket takes more, whatever the task does then. So on a busy server most reads and writes are one
system call without arming a wait, and they keep Python's lock (see `_core_sockets.pxi`). A stream
that has been served for `FAIR_SECONDS` lets other tasks run, so that no peer can occupy the loop.

Short writes wait until all tasks have had their turn, and leave together with those of other
streams (`mailerq.turns`). A reply that leaves in the middle of a turn wakes its peer alone. Replies
that leave together find peers awake, which answer at once, so the next turn has more work.

TLS uses two memory buffers between `ssl` and the same socket, so all of this applies to TLS too.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import Any, Final, Self

import trio

from mailerq.address import host_port, parse_ip
from mailerq.net.readiness import Socket, StreamLost
from mailerq.plugins import stray_close
from mailerq.sockets import RECEIVE_BYTES, accept, has_input, receive, send, socket_name
from mailerq.turns import EndOfTurn

__all__ = ["RECEIVE_BYTES", "Stream", "StreamLost", "address_of"]

log = logging.getLogger("mailerq.net")

FAIR_SECONDS: Final = 0.005
"""A stream may read this long without waiting before other tasks run."""

LONG_BYTES: Final = 1 << 14
"""Writes from this size on leave at once: they are work enough for the peer."""


class CannotBind(OSError):
    """The requested local address cannot be used."""


_streams: Final[dict[int, Stream]] = {}
"""The open streams of all loops by their descriptors."""


class Stream:
    """A connected TCP socket or descriptor, which the stream owns from now on.

    Use a stream in one trio loop. One task at a time may read and one may send; with TLS, the same
    task does both. Close the stream when no task waits in it. Any task of the loop may call
    `send_nowait`, `rouse`, `has_input` and `is_stuck` at any time; only the sending task may call
    `send_soon`. After a cancelled `send_all` or `drain` the output is cut off: close the stream.
    The loss of the peer may be raised by a later operation than the send. Pass `local` and `remote`
    if they are known, to save system calls.
    """

    def __init__(
        self,
        sock: socket.socket | int,
        *,
        local: tuple[str, int] | None = None,
        remote: tuple[str, int] | None = None,
    ) -> None:
        self._fd = sock if isinstance(sock, int) else _descriptor(sock)
        if (former := _streams.get(self._fd)) is not None:
            former.stray()
        _streams[self._fd] = self
        self._socket = Socket(self._fd)
        self._local = local
        self._remote = remote
        self._served_since = 0.0  # start of a run of reads without waiting; 0: none
        self._sending = False
        self._departing = False  # `_depart` will be called soon
        # If not empty: `_depart`, `call_when_writable` or a running `send_all` will send it.
        self._unsent = b""
        self._placed = 0  # bytes of `_unsent` that are already sent
        self._end_of_turn: EndOfTurn | None = None
        self._lost: str | None = None  # the error of a send, for the next operation to raise
        self._unread = b""
        self._take: Callable[[bytes], bool] | None = None
        self._digested = False
        self._tls: ssl.SSLObject | None = None
        self._incoming: ssl.MemoryBIO  # set by the handshake, as the next one
        self._outgoing: ssl.MemoryBIO

    @classmethod
    def accept(cls, listening: int, *, local: tuple[str, int] | None = None) -> Self | None:
        """Accept a connection; return None if no connection waits. Raises OSError."""
        accepted = accept(listening)
        if accepted is None:
            return None
        fd, remote = accepted
        return cls(fd, local=local, remote=address_of(remote))

    @classmethod
    async def connect(cls, host: str, port: int, *, local_ip: str | None = None) -> Self:
        """Connect to an IP address, from `local_ip` if given.

        Raises OSError; `CannotBind` if `local_ip` is the cause.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if local_ip is not None:
                try:
                    sock.bind((local_ip, 0))
                except OSError as fault:
                    raise CannotBind(*fault.args) from None
            try:
                sock.connect((host, port))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error)) from None
            return cls(sock)

    def fileno(self) -> int:
        return self._fd

    @property
    def local(self) -> tuple[str, int]:
        """The address and port of this end."""
        if self._local is None:
            self._local = address_of(socket_name(self._fd, remote=False))
        return self._local

    @property
    def remote(self) -> tuple[str, int]:
        """The address and port of the peer. Raises OSError if the peer is already gone."""
        if self._remote is None:
            self._remote = address_of(socket_name(self._fd, remote=True))
        return self._remote

    @property
    def cipher(self) -> tuple[str, str, int] | None:
        """The name, protocol and secret bits of the cipher; None without TLS."""
        return self._tls.cipher() if self._tls is not None else None

    @property
    def tls_version(self) -> str | None:
        """The version of TLS, such as "TLSv1.3"; None without TLS."""
        return self._tls.version() if self._tls is not None else None

    @property
    def peer_name(self) -> str | None:
        """The first name in the certificate of the peer, if one was requested and verified."""
        certificate: Mapping[str, Any] | None = None
        if self._tls is not None:
            certificate = self._tls.getpeercert()
        if not certificate:
            return None
        names = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"]
        for group in certificate.get("subject", ()):
            names += [name for kind, name in group if kind == "commonName"]
        return names[0] if names else None

    async def receive(self) -> bytes:
        """Wait for input and return it; b"" when the peer has closed. Raises `StreamLost`."""
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

    async def digest(self, take: Callable[[bytes], bool]) -> None:
        """Call `take` with all input, and with b"" at the end, until `take` returns True.

        `take` may answer with `send_soon`. Without TLS, `take` runs in another task of the loop
        while this task sleeps, so its input costs no task switch. Reading stops while the peer does
        not read its replies. Raises `StreamLost`, and the exceptions of `take`.
        """
        while True:
            if self._must_flush():
                await self._send_now(b"")
            if self._tls is None and not (self._socket.readable or self._unread):
                self._take, self._digested = take, False
                try:
                    await self._socket.attend(self._look)
                finally:
                    self._take = None
                if self._digested:
                    return
                continue
            came = await self.receive()
            if self._must_flush():  # a turn may have ended meanwhile
                await self._send_now(b"")
            if take(came):
                return

    def _look(self) -> bool:
        """Read input and pass it to `take`; return whether the task must wake."""
        if self._must_flush():
            return True
        came = self.receive_nowait()
        if came is None:
            return False
        assert self._take is not None
        self._digested = self._take(came)
        return self._digested or self._socket.readable

    def _must_flush(self) -> bool:
        """Whether pending output must leave before more input is read."""
        return bool(self._unsent) and (not self._departing or len(self._unsent) >= LONG_BYTES)

    def receive_nowait(self) -> bytes | None:
        """Read from a plain stream now: None without input, b"" at the end. Raises `StreamLost`."""
        self._raise_lost()
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        try:
            came = receive(self._fd)
        except OSError as error:
            self._check_stray(error)
            raise StreamLost(str(error)) from error
        if came is None or (0 < len(came) < RECEIVE_BYTES and self._socket.empties):
            self._socket.readable = False
        return came

    async def wait_for_input(self) -> bool:
        """Wait for input on a plain stream; return False if `rouse` ended the wait."""
        return bool(self._unread) or await self._socket.wait_readable(rousable=True)

    def rouse(self) -> None:
        """End `wait_for_input`. Call this on the thread of the waiting task."""
        self._socket.rouse()

    @property
    def has_input(self) -> bool:
        """Whether the socket has bytes to read."""
        return has_input(self._fd)

    @property
    def is_stuck(self) -> bool:
        """Whether output waits because the peer does not read."""
        return self._sending or (bool(self._unsent) and not self._departing)

    def unread(self, data: bytes) -> None:
        """Put received bytes back, for the next read or for TLS."""
        self._unread = data

    async def send_all(self, data: bytes) -> None:
        """Send all bytes, at the latest when the other tasks have had their turn.

        Raises `StreamLost`; how many bytes have arrived is then unknown.
        """
        if self._tls is None:
            await self._send_raw(data)
            return
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise StreamLost(str(error)) from error
        await self._flush_tls()

    def send_soon(self, data: bytes) -> None:
        """Send when the other tasks have had their turn.

        Bytes that the socket does not take then leave when it does, or with the next `send_all` or
        `drain`. The next operation raises the loss of the peer.
        """
        if self._tls is not None:
            try:
                self._tls.write(data)
            except ssl.SSLError as error:
                self._lose(str(error))
                return
            data = self._outgoing.read()
        self._unsent += data
        self._depart_soon()

    async def drain(self) -> None:
        """Wait until the socket has taken all output. Raises `StreamLost`."""
        self._raise_lost()
        if self._unsent:
            await self._send_now(b"")

    def _depart(self, idle: bool) -> bool:
        """Send pending output at the end of a turn; return whether a task may be ready now."""
        if self._departing:
            self._departing = False
            try:
                self._send_unsent()
            except Exception as error:
                log.exception("sending failed")
                self._lose(f"sending failed: {error!r}")
            return bool(self._unsent) or self._lost is not None
        return False

    def send_nowait(self, data: bytes) -> None:
        """Send what the socket takes now, and the rest when it takes more.

        While another task runs `send_all`, the bytes follow its bytes. The next operation raises
        the loss of the connection. Closing drops unsent bytes.
        """
        try:
            if self._tls is not None:
                self._tls.write(data)
                data = self._outgoing.read()
        except ssl.SSLError:
            return
        self._unsent = self._take_unsent() + data
        if not self._sending:
            self._send_unsent()

    async def start_tls(
        self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        """Do the TLS handshake; everything afterwards is encrypted. Raises `StreamLost`."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
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
                    await self._flush_tls()  # the alert with the reason
                raise StreamLost(f"TLS handshake failed: {error.reason or error}") from error
        await self._flush_tls()
        self._tls = tls

    def close(self) -> None:
        """Close the socket; with TLS, send close_notify if no output was cut off and it fits."""
        if self._fd < 0:
            return
        self._depart(idle=False)
        if self._tls is not None and not (self._sending or self._unsent):
            with suppress(ssl.SSLError, OSError):  # do not wait for close_notify of the peer
                self._tls.unwrap()
            with suppress(OSError):
                send(self._fd, self._outgoing.read())
        try:
            socket_name(self._fd, remote=False)
        except OSError as error:
            self._check_stray(error)
        self._socket.forget()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del _streams[fd]
            os.close(fd)

    def stray(self) -> None:
        """Drop the descriptor, which foreign code has closed: another file may have its number."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del _streams[fd]
            self._socket.stray()
            peer = host_port(*self._remote) if self._remote else "a host"
            stray_close(f"the connection with {peer}")

    def _check_stray(self, error: OSError) -> None:
        """Drop the descriptor if an error shows that foreign code has closed it."""
        if error.errno in (errno.EBADF, errno.ENOTSOCK):
            self.stray()

    async def _receive_raw(self) -> bytes:
        while True:
            if not (self._socket.readable or self._unread):
                self._served_since = 0.0
                await self._socket.wait_readable()
            data = self.receive_nowait()
            if data is not None:
                now = monotonic()
                if not self._served_since:
                    self._served_since = now
                elif now - self._served_since > FAIR_SECONDS:
                    await trio.lowlevel.checkpoint()
                    self._served_since = monotonic()
                return data

    async def _send_raw(self, data: bytes) -> None:
        self._raise_lost()
        if not self._departing:
            if len(data) >= LONG_BYTES or self._unsent or self._sending:
                await self._send_now(data)
                return
            self._depart_soon()
        self._unsent += data
        if len(self._unsent) >= LONG_BYTES:
            await self._send_now(b"")

    def _depart_soon(self) -> None:
        if not self._departing:
            self._departing = True
            if self._end_of_turn is None:
                self._end_of_turn = EndOfTurn.of_this_loop()
            self._end_of_turn.call(self._depart)

    async def _send_now(self, data: bytes) -> None:
        self._departing = False
        if self._unsent:
            data = self._take_unsent() + data
        try:
            sent = send(self._fd, data)
            if sent < len(data):
                await self._send_rest(data, sent)
        except OSError as error:
            self._check_stray(error)
            raise StreamLost(str(error)) from error

    def _raise_lost(self) -> None:
        """Raise the error of an earlier send, once: a later read may still find earlier input."""
        if self._lost is not None:
            lost, self._lost = self._lost, None
            raise StreamLost(lost)

    async def _send_rest(self, data: bytes, sent: int) -> None:
        """Send the rest that did not fit, and then the bytes of `send_nowait` calls meanwhile."""
        self._sending = True
        while True:
            while sent < len(data):
                await self._socket.wait_writable()
                sent += send(self._fd, data, sent)
            if not self._unsent:
                break
            data, sent = self._take_unsent(), 0
        self._sending = False

    def _send_unsent(self) -> None:
        """Send pending output, unless a running `send_all` will."""
        if self._sending or not self._unsent:
            return
        try:
            self._placed += send(self._fd, self._unsent, self._placed)
        except OSError as error:
            self._check_stray(error)
            self._lose(str(error))
        if self._placed == len(self._unsent):
            self._take_unsent()
            return
        # If the kernel cannot watch another socket, the next `send_all` sends the rest.
        with suppress(StreamLost):
            self._socket.call_when_writable(self._send_unsent)

    def _lose(self, why: str) -> None:
        """Drop pending output, and let the next operation raise the reason."""
        self._take_unsent()
        self._lost = why
        self._socket.alarm()

    def _take_unsent(self) -> bytes:
        data = self._unsent[self._placed :]
        self._unsent, self._placed = b"", 0
        return data

    async def _flush_tls(self) -> None:
        if self._outgoing.pending:
            await self._send_raw(self._outgoing.read())


def _descriptor(sock: socket.socket) -> int:
    """Take over the descriptor of a socket."""
    sock.setblocking(False)
    return sock.detach()


def address_of(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Return the address and port of a socket name; an IPv4-mapped address becomes IPv4."""
    host, port = name[:2]
    return (str(parse_ip(host)) if host.startswith("::ffff:") else host), port
