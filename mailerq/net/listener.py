"""Listening sockets: they accept, bound what is open, and give each connection to a worker."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Final

import trio

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.net.session import Server, Session
from mailerq.net.slots import Slots
from mailerq.net.stream import Stream, address_of
from mailerq.net.worker import Worker
from mailerq.wire import smtp

__all__ = ["Listener", "bind", "tls_context"]

log = logging.getLogger("mailerq.server")

BACKLOG: Final = 4096
"""Connections that wait in the kernel; it takes the lesser of this and its own bound."""

ACCEPTS_IN_A_ROW: Final = 64
"""Connections accepted before the sessions get a turn."""

EXHAUSTED_SECONDS: Final = 0.1
"""How long no connection is accepted after the process ran out of descriptors or memory."""

_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def bind(config: Config) -> list[tuple[socket.socket, bool]]:
    """Open all listening sockets; each comes with whether TLS starts with the first byte.

    Raises `ConfigError` that names the setting and the address which cannot be had.
    """
    sockets: list[tuple[socket.socket, bool]] = []
    try:
        for port, secure, option in _ports(config):
            for ip in config.smtp_ip or _all_addresses():
                try:
                    sockets.append((_listen(ip, port), secure))
                except OSError as error:
                    reason = error.strerror or str(error)
                    hint = " (ports below 1024 need root)" if error.errno == errno.EACCES else ""
                    raise ConfigError(
                        config.origin(option),
                        f"{option}: cannot listen on {_join(ip, port)}: {reason}{hint}",
                    ) from None
    except BaseException:
        for sock, _ in sockets:
            sock.close()
        raise
    return sockets


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The server's side of TLS (1.2 and up), or None where no certificate is configured.

    Raises `ConfigError`.
    """
    if not config.smtp_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.smtp_certificate, config.smtp_key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            config.origin("smtp-certificate"),
            f"smtp-certificate: cannot use {config.smtp_certificate}: {error}",
        ) from None
    if config.smtp_ciphers:
        try:
            context.set_ciphers(config.smtp_ciphers)
        except ssl.SSLError as error:
            raise ConfigError(
                config.origin("smtp-ciphers"), f"smtp-ciphers: {config.smtp_ciphers}: {error}"
            ) from None
    return context


class Listener:
    """Accepts on all sockets and keeps account of the sessions. It lives on the home loop."""

    def __init__(
        self,
        shared: Server,
        workers: list[Worker],
        sockets: list[tuple[socket.socket, bool]],
        slots: Slots,
    ) -> None:
        self._shared = shared
        self._workers = workers
        self._home = workers[0]
        self._sockets = sockets
        self._slots = slots
        self._open = 0
        self._idle = trio.Event()
        self._sessions: dict[Session, None] = {}  # each worker adds and takes its own
        self._stop_at: float | None = None  # by time.monotonic: each loop has its own clock
        self._scope = trio.CancelScope()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, ports that were asked for as 0 with their real numbers."""
        return [sock.getsockname()[:2] for sock, _ in self._sockets]

    @property
    def open_sessions(self) -> int:
        return self._open

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept until `stop`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for sock, secure in self._sockets:
                    nursery.start_soon(self._accept, sock, secure)
                task_status.started()

    async def stop(self, seconds: float) -> None:
        """Close the ports and end the sessions: the idle ones now, the others within `seconds`."""
        self._scope.cancel()
        for sock, _ in self._sockets:
            sock.close()
        self._stop_at = time.monotonic() + seconds
        for worker in self._workers:
            worker.call(self._shut_down, worker)
        while self._open:
            self._idle = trio.Event()
            await self._idle.wait()

    def _shut_down(self, worker: Worker) -> None:
        for session in list(self._sessions):
            if session.worker is worker:
                session.shut_down(self._seconds_left())

    def _seconds_left(self) -> float:
        return max(0.0, (self._stop_at or 0.0) - time.monotonic())

    async def _accept(self, listening: socket.socket, secure: bool) -> None:
        name = address_of(listening.getsockname())
        local = None if name[0] in ("0.0.0.0", "::") else name
        while True:
            await trio.lowlevel.wait_readable(listening)
            for _ in range(ACCEPTS_IN_A_ROW):
                try:
                    sock, remote = listening.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _EXHAUSTED:
                        log.warning("cannot accept connections: %s", error.strerror)
                        await trio.sleep(EXHAUSTED_SECONDS)
                    break  # Otherwise the peer hung up before it was its turn.
                self._admit(Stream(sock, local=local, remote=address_of(remote)), secure)
            await trio.lowlevel.checkpoint()

    def _admit(self, stream: Stream, secure: bool) -> None:
        """Give the connection to the worker that has the fewest, or send it away."""
        client = stream.remote[0]
        if not self._shared.access.may_connect(client):
            log.info("connection from %s refused: not in smtp-range", client)
            refusal = smtp.NOT_ADMITTED
        elif not self._slots.take():
            log.warning("connection from %s refused: %s are open", client, self._slots)
            refusal = smtp.BUSY
        else:
            worker = min(self._workers, key=_load)
            worker.load += 1
            self._open += 1
            worker.spawn(self._session, worker, stream, secure)
            return
        self._shared.counters.refused_connections += 1
        if not secure:
            stream.send_nowait(refusal.wire)
        stream.close()

    async def _session(self, worker: Worker, stream: Stream, secure: bool) -> None:
        try:
            session = Session(self._shared, worker, stream, implicit_tls=secure)
        except OSError:  # The peer has hung up again.
            stream.close()
        else:
            self._sessions[session] = None
            if self._stop_at is not None:
                session.shut_down(self._seconds_left())
            await session.run()
            del self._sessions[session]
        finally:
            self._slots.release()
            self._home.call(self._ended, worker)

    def _ended(self, worker: Worker) -> None:
        worker.load -= 1
        self._open -= 1
        if not self._open:
            self._idle.set()


def _load(worker: Worker) -> int:
    return worker.load


def _ports(config: Config) -> Iterator[tuple[int, bool, str]]:
    for port in config.smtp_port:
        yield port, False, "smtp-port"
    for port in config.smtp_secure_port:
        yield port, True, "smtp-secure-port"


def _all_addresses() -> tuple[str, ...]:
    return ("0.0.0.0", "::") if socket.has_dualstack_ipv6() else ("0.0.0.0",)


def _listen(ip: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((ip, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _join(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
