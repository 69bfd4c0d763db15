"""A connection for trio tasks, plain or TLS, with few task switches.

Theory of operation
-------------------
The socket is non-blocking. A read is tried when `mailerq.net.readiness` has reported input. On a
busy server most reads and sends are one system call without arming a wait, and they keep Python's
lock (see `_core_sockets.pxi`). A stream that has been served for `FAIR_SECONDS` lets other tasks
run, so that no peer can occupy the loop.

Output goes into one buffer, and three methods move it. `write` appends. `flush` sends what the
socket takes now. `drain` waits until the socket has taken all. Nobody has to call the last two for
the bytes to leave: the stream flushes at the end of the turn, and the rest follows when the socket
takes more. So all replies of a turn leave in one segment, together with those of other streams. A
reply that leaves in the middle of a turn wakes its peer alone. Replies that leave together find
peers awake, which answer at once, so the next turn has more work.

A writer bounds the buffer: while the stream `is_full`, drain before the next write. An empty buffer
keeps a reference to the bytes written, so a block of a body is not copied.

TLS uses two memory buffers between `ssl` and the same socket, so all of this applies to TLS too.
`ssl` reads no record ahead: while its buffer is empty there is nothing to read, and asking would
cost an exception. Such a stream is `_exhausted`.
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
from typing import TYPE_CHECKING, Any, Final, Self

import outcome
import trio

from mailerq.address import host_port, parse_ip
from mailerq.net.readiness import Socket, StreamLost
from mailerq.plugins import stray_close
from mailerq.sockets import (
    RECEIVE_BYTES,
    accept,
    connect,
    has_input,
    receive,
    round_trip,
    send,
    socket_error,
    socket_name,
)
from mailerq.turns import EndOfTurn

if TYPE_CHECKING:
    from mailerq.net.tracing import Tap

__all__ = ["LONG_BYTES", "RECEIVE_BYTES", "HandshakeFailed", "Stream", "StreamLost", "address_of"]

log = logging.getLogger("mailerq.net")

FAIR_SECONDS: Final = 0.005
"""A stream may read this long without waiting before other tasks run."""

BUSY_SECONDS: Final = 0.05
"""Pause before the next attempt to connect to a Unix socket whose backlog is full."""

LONG_BYTES: Final = 1 << 14
"""Output from this size on should leave at once: it is work enough for the peer."""

DER: Final = 2
"""`ssl.ENCODING_DER`, which has no public name."""

SPENT_BYTES: Final = 1 << 16
"""The connection ends if a peer sends more TLS messages than this without data. Tickets and key
updates cost the peer less than us, so a fast peer could block the loop with them."""

BUFFER_BYTES: Final = 1 << 22
"""A write that finds more unsent bytes than this loses the connection. Only a writer that does not
drain gets there: a plugin with much output for a peer that does not read."""


class CannotBind(OSError):
    """The requested local address cannot be used."""


class HandshakeFailed(StreamLost):
    """The TLS handshake failed; `verify_code` is OpenSSL's verdict on the certificate, or 0."""

    def __init__(self, text: str, verify_code: int = 0) -> None:
        super().__init__(text)
        self.verify_code = verify_code


_streams: Final[dict[int, Stream]] = {}
"""The open streams of all loops by their descriptors."""


class Stream:
    """A connected TCP or Unix socket or descriptor, which the stream owns from now on.

    Use a stream in one trio loop. One task at a time may read and one may drain; with TLS, the same
    task does both. Close the stream when no task waits in it. Any task of the loop may call the
    other methods at any time. A loss of the peer that `write` or `flush` meets is raised by the
    next operation that waits or reads. Pass `local` and `remote` if they are known, to save system
    calls.
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
        # If not empty: `_depart` or `call_when_writable` will flush it.
        self._unsent = b""
        self._placed = 0  # bytes of `_unsent` that are already sent
        self._departing = False  # `_depart` will be called soon
        self._drainer: trio.lowlevel.Task | None = None
        self._end_of_turn: EndOfTurn | None = None
        self._lost: str | None = None  # why output was cut off: nothing may follow
        self._untold = False  # the next operation raises `_lost`
        self._unread = b""
        self._take: Callable[[bytes], bool] | None = None
        self._taken = False
        self.tap: Tap | None = None
        """Gets all bytes in clear while somebody traces the session."""
        self._tls: ssl.SSLObject | None = None
        self._exhausted = False  # `ssl` has no whole record left to read
        self._held_back = 0  # bytes of tickets that leave with the next output
        self._spent = 0  # bytes of input for `ssl` since it has returned data
        self._most_spent = 0
        self._failed = False  # a fatal error of TLS: nothing resumes the session
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
        """Connect to an IP address, from `local_ip` if given, or to the path of a Unix socket.

        Raises OSError; `CannotBind` if `local_ip` is the cause.
        """
        if host.startswith("/"):
            return await cls._connect_unix(host)
        stream = cls.dial(host, port, local_ip=local_ip)
        try:
            await stream.connected()
        except BaseException:
            stream.close()
            raise
        return stream

    @classmethod
    def dial(cls, host: str, port: int, *, local_ip: str | None = None) -> Self:
        """Begin to connect to an IP address; await `connected` before any other use.

        Raises OSError; `CannotBind` if `local_ip` is the cause.
        """
        if "%" in host:
            fd = _dial_zone(host, port, local_ip)
        else:
            fd, bound = connect(host, port, local_ip)
            if not bound:
                raise CannotBind(-fd, os.strerror(-fd))
        return cls(fd)

    async def connected(self) -> None:
        """Wait until the peer has accepted the connection that `dial` began. Raises OSError."""
        try:
            self._socket.call_when_writable(self._end_drain)
        except StreamLost as error:
            cause = error.__cause__
            raise cause if isinstance(cause, OSError) else OSError(str(error)) from None
        self._drainer = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort_drain)
        if error_number := socket_error(self._fd):
            raise OSError(error_number, os.strerror(error_number))

    @classmethod
    async def _connect_unix(cls, path: str) -> Self:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            while True:
                try:
                    sock.connect(path)
                    return cls(sock, local=("", 0), remote=(path, 0))
                except BlockingIOError:
                    # The backlog of the server is full, and nothing says when it no longer is.
                    await trio.sleep(BUSY_SECONDS)

    def fileno(self) -> int:
        return self._fd

    @property
    def round_trip(self) -> float:
        """Seconds of a round trip to the peer, without the peer's own time."""
        return round_trip(self._fd)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent or received any more."""
        return self._fd < 0

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
    def session(self) -> ssl.SSLSession | None:
        """What resumes the TLS session in another connection; None before the peer's ticket.

        None as well after a fatal error (RFC 8446, section 6.2).
        """
        return self._tls.session if self._tls is not None and not self._failed else None

    @property
    def most_spent(self) -> int:
        """The most bytes of input that TLS took for itself at a time: a handshake, or tickets."""
        return max(self._spent, self._most_spent)

    @property
    def is_resumed(self) -> bool:
        """Whether TLS resumed an earlier session, so that no certificate was sent."""
        return self._tls is not None and bool(self._tls.session_reused)

    @property
    def peer_chain(self) -> list[bytes]:
        """The certificates that the peer has sent in DER, its own first, none of them checked."""
        if self._tls is None:
            return []
        # Public from Python 3.13 on.
        if (public := getattr(self._tls, "get_unverified_chain", None)) is not None:
            return list(public())
        chain: Any = self._tls._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
        return [each.public_bytes(DER) for each in chain or ()]

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
        data = await (self._receive_raw() if self._tls is None else self._receive_tls())
        if self.tap is not None:
            self.tap.received(data)
        return data

    async def receive_each(self, take: Callable[[bytes], bool]) -> None:
        """Call `take` with all input, and with b"" at the end, until `take` returns True.

        `take` may answer with `write`. It runs in another task of the loop while this task sleeps,
        so its input costs no task switch. Reading stops while the peer does not read its replies.
        Raises `StreamLost`, and the exceptions of `take`.
        """
        while True:
            if self.is_full:
                await self.drain()
            if not (self._socket.readable or self._unread or self._has_records()):
                self._take, self._taken = take, False
                try:
                    await self._socket.attend(self._look)
                finally:
                    self._take = None
                if self._taken:
                    return
                continue
            came = await self.receive()
            if self.is_full:  # a turn may have ended meanwhile
                await self.drain()
            if take(came):
                return

    def _look(self) -> bool:
        """Read input and pass it to `take`; return whether the task must wake."""
        while not self.is_full:
            came = self.receive_nowait()
            if came is None:
                return False
            assert self._take is not None
            self._taken = self._take(came)
            if self._taken or self._socket.readable or not came:
                return True
            if not self._has_records():
                return False
        return True

    def receive_nowait(self) -> bytes | None:
        """Read what there is: None without input, b"" at the end. Raises `StreamLost`."""
        came = self._receive_now() if self._tls is None else self._receive_tls_now()
        if self.tap is not None and came is not None:
            self.tap.received(came)
        return came

    def receive_known(self) -> bytes | None:
        """Read what the loop has noticed already, as `receive_nowait` does.

        Usually this costs no system call if there is nothing.
        """
        if not (self._socket.may_have_input() or self._unread or self._has_records()):
            return None
        return self.receive_nowait()

    def _receive_tls_now(self) -> bytes | None:
        self._raise_lost()
        while (came := self._decrypt()) is None:
            self._speak()
            data = self._receive_now()
            if not data:
                return data
            self._feed(data)
        return came

    def _feed(self, data: bytes) -> None:
        """Give input to `ssl`. Raises `StreamLost` for a peer that sends no data."""
        if self._spent > SPENT_BYTES:
            self._failed = True
            raise StreamLost(f"more than {SPENT_BYTES >> 10} kB of TLS messages without data")
        self._incoming.write(data)
        self._spent += len(data)
        self._exhausted = False

    def _has_records(self) -> bool:
        """Whether `ssl` may have something to read without further input."""
        return self._tls is not None and not self._exhausted

    def _decrypt(self) -> bytes | None:
        """Read from `ssl`: None without a whole record, b"" at the end. Raises `StreamLost`."""
        if self._exhausted:
            return None
        assert self._tls is not None
        try:
            came = self._tls.read(RECEIVE_BYTES)
        except ssl.SSLWantReadError:
            self._exhausted = True
            return None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as error:
            self._failed = True
            raise StreamLost(str(error)) from error
        if came:  # b"" comes again
            pending = self._incoming.pending
            self._exhausted = not pending
            self._most_spent = max(self._most_spent, self._spent - pending - len(came))
            self._spent = pending
            self._speak()
        return came

    def _speak(self) -> bool:
        """Send what `ssl` itself has to say to the peer, such as new keys, if there is anything."""
        if self._outgoing.pending <= self._held_back:
            return False
        self._held_back = 0
        self._buffer(self._outgoing.read())
        return True

    def _receive_now(self) -> bytes | None:
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
        """Wait for input; return False if `wake` ended the wait.

        With TLS there may be input that is not for the reader, or not whole: read, and wait again.
        """
        if self._unread or self._has_records():
            return True
        return await self._socket.wait_readable(wakeable=True)

    def interrupt(self, error: Exception) -> bool:
        """End the wait of a task in this stream with an exception; False if no task waits.

        Output that is not sent yet follows as after a cancelled `drain`.
        """
        if self._drainer is None:
            return self._socket.interrupt(error)
        task, self._drainer = self._drainer, None
        trio.lowlevel.reschedule(task, outcome.Error(error))
        return True

    def wake(self) -> None:
        """End `wait_for_input`. Call this on the thread of the waiting task."""
        self._socket.wake()

    @property
    def has_input(self) -> bool:
        """Whether the socket has bytes to read."""
        return has_input(self._fd)

    @property
    def is_stuck(self) -> bool:
        """Whether output waits because the peer does not read."""
        return bool(self._unsent) and not self._departing

    def unread(self, data: bytes) -> None:
        """Put received bytes back, for the next read or for TLS."""
        self._unread = data

    @property
    def is_full(self) -> bool:
        """Whether to drain before the next write: much waits, or the peer does not read."""
        return bool(self._unsent) and (not self._departing or len(self._unsent) >= LONG_BYTES)

    def write(self, data: bytes) -> None:
        """Put bytes into the buffer; they leave at the end of the turn, or behind earlier ones."""
        if self.tap is not None:
            self.tap.sent(data)
        if self._tls is not None:
            try:
                size = self._tls.write(data)
                while size < len(data):  # one record at a time
                    size += self._tls.write(memoryview(data)[size:])
            except ssl.SSLError as error:
                self._lose(str(error))
                return
            self._held_back = 0
            data = self._outgoing.read()
        self._buffer(data)

    def flush(self) -> None:
        """Send what the socket takes now; the rest follows when it takes more. Never raises."""
        self._departing = False
        if not self._unsent:
            return
        try:
            self._placed += send(self._fd, self._unsent, self._placed)
            if self._placed < len(self._unsent):
                self._socket.call_when_writable(self.flush)
                return
        except OSError as error:
            self._check_stray(error)
            self._lose(str(error))
        except StreamLost as error:  # the kernel cannot watch another socket
            self._lose(str(error))
        except Exception as error:
            log.exception("sending failed")
            self._lose(f"sending failed: {error!r}")
        else:
            self._unsent, self._placed = b"", 0
            self._end_drain()

    async def drain(self) -> None:
        """Wait until the socket has taken all bytes, also those written meanwhile.

        Not a checkpoint if that needs no wait. Raises `StreamLost`; how many bytes have arrived is
        then unknown. After a cancelled `drain` the rest follows as after `flush`.
        """
        self.flush()
        if self._unsent:
            if self._drainer is not None:
                raise trio.BusyResourceError("another task drains this stream")
            self._drainer = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_drain)
        if self._lost is not None:
            self._untold = False
            raise StreamLost(self._lost)

    def _abort_drain(self, _: object) -> trio.lowlevel.Abort:
        self._drainer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _end_drain(self) -> None:
        if self._drainer is not None:
            task, self._drainer = self._drainer, None
            trio.lowlevel.reschedule(task)

    def _buffer(self, data: bytes) -> None:
        if self._lost is not None:
            self._lose(self._lost)
        elif not self._unsent:
            if data:
                self._unsent = data
                self._departing = True
                if self._end_of_turn is None:
                    self._end_of_turn = EndOfTurn.of_this_loop()
                self._end_of_turn.call(self._depart)
        elif len(self._unsent) - self._placed > BUFFER_BYTES:
            self._lose("the peer does not read")
        else:
            self._unsent = self._unsent[self._placed :] + data
            self._placed = 0

    def _depart(self, idle: bool) -> bool:
        """Flush at the end of a turn; return whether a task may be ready now."""
        if not self._departing:
            return False
        self.flush()
        return bool(self._unsent) or self._untold

    def _lose(self, why: str) -> None:
        """Drop pending output, and let the next operation raise the reason."""
        self._unsent, self._placed = b"", 0
        self._lost, self._untold = why, True
        self._socket.alarm()
        self._end_drain()

    def _raise_lost(self) -> None:
        """Raise the error of an earlier send, once: a later read may still find earlier input."""
        if self._untold:
            self._untold = False
            raise StreamLost(self._lost)

    async def _send_tls(self) -> None:
        """Send what `ssl` has to say to the peer; wait if the peer does not read."""
        if self._speak() and self.is_full:
            await self.drain()

    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """Do the TLS handshake; everything afterwards is encrypted.

        A server's tickets leave with its next output: nobody waits for them, and a segment of their
        own would cost both sides more than making them. A client may offer a `session` of the same
        context to resume. Raises `StreamLost`, and ValueError for a `server_hostname` that cannot
        be sent.
        """
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._spent = 0
        tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
            session=session,
        )
        if server_side:  # the client speaks first
            await self._feed_handshake()
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_tls()
                await self._feed_handshake()
            except ssl.SSLError as error:
                if self._outgoing.pending:
                    await self._send_tls()  # the alert with the reason
                text, code = error.reason or str(error), 0
                if isinstance(error, ssl.SSLCertVerificationError):
                    text, code = f"{text}: {error.verify_message}", error.verify_code
                raise HandshakeFailed(f"TLS handshake failed: {text}", code) from error
        if server_side and tls.version() == "TLSv1.3":
            self._held_back = self._outgoing.pending
        await self._send_tls()
        self._tls = tls
        pending = self._incoming.pending
        self._exhausted = not pending
        self._most_spent, self._spent = self._spent - pending, pending
        if self.tap is not None:
            self.tap.secured(tls.version(), tls.cipher())

    async def _feed_handshake(self) -> None:
        """Wait for input of a handshake. Raises `StreamLost`."""
        data = await self._receive_raw()
        if not data:
            raise StreamLost("closed during the TLS handshake")
        self._incoming.write(data)  # `ssl` bounds the messages of a handshake
        self._spent += len(data)

    def close(self) -> None:
        """Close the socket; with TLS, send close_notify if no output was cut off and it fits."""
        if self.tap is not None:
            self.tap.ended()
            self.tap = None
        if self._fd < 0:
            return
        if self.is_full:
            self.flush()
        if self._tls is not None and not self.is_stuck and self._lost is None:
            # In one segment with the last output. Do not wait for close_notify of the peer.
            with suppress(ssl.SSLError, OSError):
                self._tls.unwrap()
            self._buffer(self._outgoing.read())
        self.flush()
        try:
            socket_error(self._fd)
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

    async def _receive_tls(self) -> bytes:
        while (came := self._decrypt()) is None:
            await self._send_tls()
            data = await self._receive_raw()
            if not data:
                return b""
            self._feed(data)
        return came

    async def _receive_raw(self) -> bytes:
        while True:
            if not (self._socket.readable or self._unread):
                self._served_since = 0.0
                await self._socket.wait_readable()
            data = self._receive_now()
            if data is not None:
                now = monotonic()
                if not self._served_since:
                    self._served_since = now
                elif now - self._served_since > FAIR_SECONDS:
                    await trio.lowlevel.checkpoint()
                    self._served_since = monotonic()
                return data


def _dial_zone(host: str, port: int, local_ip: str | None) -> int:
    """Begin to connect to an IPv6 address with a zone; returns the descriptor."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if local_ip is not None:
            try:
                sock.bind((local_ip, 0))
            except OSError as fault:
                raise CannotBind(*fault.args) from None
        with suppress(BlockingIOError):
            sock.connect((host, port))
        return sock.detach()


def _descriptor(sock: socket.socket) -> int:
    """Take over the descriptor of a socket."""
    sock.setblocking(False)
    return sock.detach()


def address_of(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Return the address and port of a socket name; an IPv4-mapped address becomes IPv4."""
    host, port = name[:2]
    return (str(parse_ip(host)) if host.startswith("::ffff:") else host), port
