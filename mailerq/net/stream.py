"""A TCP connection as trio tasks use it here: plain or TLS, and cheap in task switches.

Theory of operation
-------------------
The socket is non-blocking. A write waits only for what does not fit; a read is tried when
`mailerq.net.readiness` has heard that there is something. What `send_nowait` cannot place goes
out when the socket takes more, whatever the task does then. So on a busy server most of them
are one system call each, none to arm a wait, and they keep Python's lock (see
`_core_sockets.pxi`). So that a peer that always has more to say cannot keep the loop for itself,
a stream that was served for `FAIR_SECONDS` lets the others run.

A short write leaves when all tasks have had their turn, together with those of other streams
(`Departures`). A reply that is sent in the middle of a turn wakes a peer for itself; when many
leave one after the other, it is awake already, has more to say at once when it pauses, and so
has the next turn more to do.

TLS works on two memory buffers between `ssl` and the same socket, so that it shares all of
this.
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

from mailerq.address import parse_ip
from mailerq.net.readiness import Socket, StreamLost
from mailerq.plugins import stray_close
from mailerq.sockets import RECEIVE_BYTES, accept, has_input, receive, send, socket_name

__all__ = ["RECEIVE_BYTES", "Stream", "StreamLost", "address_of"]

log = logging.getLogger("mailerq.net")

FAIR_SECONDS: Final = 0.005
"""How long reads are served at once before others get a turn."""

LONG_BYTES: Final = 1 << 14
"""What is not shorter is sent at once: it is work enough for its peer."""


class CannotBind(OSError):
    """Nothing can be sent from the local address that was asked for."""


class Departures(trio.abc.Instrument):
    """The streams of a loop that have something to send when its tasks have had their turn."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._token = trio.lowlevel.current_trio_token()

    @classmethod
    def of_this_loop(cls) -> Departures:
        departures = _departures.get(None)
        if departures is None:
            departures = cls()
            _departures.set(departures)
            trio.lowlevel.add_instrument(departures)
        return departures

    def add(self, stream: Stream) -> None:
        self._streams.append(stream)

    def before_io_wait(self, timeout: float) -> None:
        """What trio calls before it looks for events, or sleeps for them."""
        if self._streams:
            streams, self._streams = self._streams, []
            smooth = [stream.depart() for stream in streams]
            if not all(smooth):
                # Some task has got something to do, after trio has looked whether any has.
                self._token.run_sync_soon(_nothing)


def _nothing() -> None:
    pass


_streams: Final[dict[int, Stream]] = {}
"""The open streams of all loops by their descriptors."""


_departures: Final = trio.lowlevel.RunVar[Departures | None]("departures", None)


class Stream:
    """One connected TCP socket, or its descriptor, which the stream owns from now on.

    It lives in one trio loop. One task at a time reads and one sends, with TLS the same one, and it
    is closed when none waits in it. `send_nowait`, `rouse`, `has_input` and `is_stuck` are for all
    tasks of the loop, at any time; `send_soon` for who would send. A `send_all` or `drain` that was
    cancelled has cut off what was to be sent; after that, close. That the peer has gone may be told
    by a later operation than the one that sent to it. `local` and `remote` save a question to the
    kernel where the addresses are known already.
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
        self._served_since = 0.0  # when reads began to be served at once, 0: not now
        self._sending = False
        self._departing = False  # `depart` is called soon
        # Not empty: it departs, or the socket is asked to call, or a `send_all` is under way.
        self._unsent = b""
        self._placed = 0  # bytes of `_unsent` that have been sent nevertheless
        self._departures: Departures | None = None
        self._lost: str | None = None  # what a send met, and the next operation is to raise
        self._unread = b""
        self._take: Callable[[bytes], bool] | None = None
        self._digested = False
        self._tls: ssl.SSLObject | None = None
        self._incoming: ssl.MemoryBIO  # those two from the handshake on
        self._outgoing: ssl.MemoryBIO

    @classmethod
    def accept(cls, listening: int, *, local: tuple[str, int] | None = None) -> Self | None:
        """The next connection of a listening socket, None when there is none. Raises OSError."""
        accepted = accept(listening)
        if accepted is None:
            return None
        fd, remote = accepted
        return cls(fd, local=local, remote=address_of(remote))

    @classmethod
    async def connect(cls, host: str, port: int, *, local_ip: str | None = None) -> Self:
        """Connect to an IP address, from `local_ip` where it is given.

        Raises OSError, which is `CannotBind` where `local_ip` is the cause.
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
        """This end's address and port."""
        if self._local is None:
            self._local = address_of(socket_name(self._fd, remote=False))
        return self._local

    @property
    def remote(self) -> tuple[str, int]:
        """The peer's address and port. Raises OSError when it is gone already."""
        if self._remote is None:
            self._remote = address_of(socket_name(self._fd, remote=True))
        return self._remote

    @property
    def cipher(self) -> tuple[str, str, int] | None:
        """Name, protocol and secret bits of the cipher, or None without TLS."""
        return self._tls.cipher() if self._tls is not None else None

    @property
    def tls_version(self) -> str | None:
        """What the peers agreed on, such as "TLSv1.3", or None without TLS."""
        return self._tls.version() if self._tls is not None else None

    @property
    def peer_name(self) -> str | None:
        """The first name in the peer's certificate, if one was asked for and verified."""
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

    async def digest(self, take: Callable[[bytes], bool]) -> None:
        """Have `take` called with all that comes in, b"" at its end, until it returns True.

        It may answer with `send_soon`, and is called in another task of the loop while this one
        sleeps, unless there is TLS: what it can deal with costs no switch of tasks. From a peer
        that does not read what it is sent, nothing more is taken. Raises `StreamLost`, and what
        `take` raises.
        """
        while True:
            if self._lags():
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
            if self._lags():  # a turn has ended meanwhile
                await self._send_now(b"")
            if take(came):
                return

    def _look(self) -> bool:
        """Something came in, or the end: whether the task is needed."""
        if self._lags():
            return True
        came = self.receive_nowait()
        if came is None:
            return False
        assert self._take is not None
        self._digested = self._take(came)
        return self._digested or self._socket.readable

    def _lags(self) -> bool:
        """Whether what was sent has to leave before there is more of it."""
        return bool(self._unsent) and (not self._departing or len(self._unsent) >= LONG_BYTES)

    def receive_nowait(self) -> bytes | None:
        """What a plain stream has now: None is nothing, b"" the end. Raises `StreamLost`."""
        self._tell_lost()
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        try:
            came = receive(self._fd)
        except OSError as error:
            self._suspect(error)
            raise StreamLost(str(error)) from error
        if came is None or (0 < len(came) < RECEIVE_BYTES and self._socket.empties):
            self._socket.readable = False
        return came

    async def wait_for_input(self) -> bool:
        """Wait until a plain stream has something to receive, or `rouse` is called: then False."""
        return bool(self._unread) or await self._socket.wait_readable(rousable=True)

    def rouse(self) -> None:
        """End `wait_for_input`. On the thread of who waits."""
        self._socket.rouse()

    @property
    def has_input(self) -> bool:
        """Whether bytes of the peer wait to be read."""
        return has_input(self._fd)

    @property
    def is_stuck(self) -> bool:
        """Whether the peer has yet to read before it can be sent more."""
        return self._sending or (bool(self._unsent) and not self._departing)

    def unread(self, data: bytes) -> None:
        """Put back what was received and is somebody else's: the next read, or TLS, gets it."""
        self._unread = data

    async def send_all(self, data: bytes) -> None:
        """Send all of it, at the latest when the other tasks have had their turn.

        Raises `StreamLost`; how much has arrived is then unknown.
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

        What the socket does not take then goes out when it does, or with the next `send_all` or
        `drain`. That the peer has gone is told by the next operation.
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
        """Wait until the socket has taken all that was sent. Raises `StreamLost`."""
        self._tell_lost()
        if self._unsent:
            await self._send_now(b"")

    def depart(self) -> bool:
        """The turn is over: what has waited for that goes now; whether all of it has gone."""
        if self._departing:
            self._departing = False
            try:
                self._send_unsent()
            except Exception as error:  # trio would never call again
                log.exception("sending failed")
                self._lose(f"sending failed: {error!r}")
            return not self._unsent and self._lost is None
        return True

    def send_nowait(self, data: bytes) -> None:
        """Send what the socket takes at once, and the rest as soon as it takes more.

        Where a `send_all` is under way, in another task, it comes behind that. A connection that
        is broken is not told here, but by the next operation. Closing drops what is left.
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
        """Shake hands; everything after that is encrypted. Raises `StreamLost`."""
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
                    await self._flush_tls()  # the alert that tells the peer why
                raise StreamLost(f"TLS handshake failed: {error.reason or error}") from error
        await self._flush_tls()
        self._tls = tls

    def close(self) -> None:
        """Close the socket; in TLS with a word of goodbye where it fits and nothing was cut off."""
        if self._fd < 0:
            return
        self.depart()
        if self._tls is not None and not (self._sending or self._unsent):
            with suppress(ssl.SSLError, OSError):  # The peer's own goodbye is not waited for.
                self._tls.unwrap()
            with suppress(OSError):
                send(self._fd, self._outgoing.read())
        try:
            socket_name(self._fd, remote=False)
        except OSError as error:
            self._suspect(error)
        self._socket.forget()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del _streams[fd]
            os.close(fd)

    def stray(self) -> None:
        """Somebody else has closed the descriptor: what has its number now is not to be touched."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del _streams[fd]
            self._socket.stray()
            peer = f"{self._remote[0]}:{self._remote[1]}" if self._remote else "a host"
            stray_close(f"the connection with {peer}")

    def _suspect(self, error: OSError) -> None:
        """An error may say that the descriptor is not ours any more."""
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
        self._tell_lost()
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
            if self._departures is None:
                self._departures = Departures.of_this_loop()
            self._departures.add(self)

    async def _send_now(self, data: bytes) -> None:
        self._departing = False
        if self._unsent:
            data = self._take_unsent() + data
        try:
            sent = send(self._fd, data)
            if sent < len(data):
                await self._send_rest(data, sent)
        except OSError as error:
            self._suspect(error)
            raise StreamLost(str(error)) from error

    def _tell_lost(self) -> None:
        """Raise what an earlier send met; once, because a read may find what came before that."""
        if self._lost is not None:
            lost, self._lost = self._lost, None
            raise StreamLost(lost)

    async def _send_rest(self, data: bytes, sent: int) -> None:
        """Send what did not fit, and then what `send_nowait` was given meanwhile."""
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
        """Send what waits for it, unless a `send_all` has taken it over or will."""
        if self._sending or not self._unsent:
            return
        try:
            self._placed += send(self._fd, self._unsent, self._placed)
        except OSError as error:
            self._suspect(error)
            self._lose(str(error))
        if self._placed == len(self._unsent):
            self._take_unsent()
            return
        # Where the kernel watches no more sockets, a `send_all` takes it along.
        with suppress(StreamLost):
            self._socket.call_when_writable(self._send_unsent)

    def _lose(self, why: str) -> None:
        """Give up what was to be sent, and let the next operation say so."""
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
    """Take the descriptor of a socket over."""
    sock.setblocking(False)
    return sock.detach()


def address_of(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """The address and port in a socket's name; one of IPv4 that came in by IPv6 as it is."""
    host, port = name[:2]
    return (str(parse_ip(host)) if host.startswith("::ffff:") else host), port
