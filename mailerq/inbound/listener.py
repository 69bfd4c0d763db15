"""Listening sockets: accept connections, limit them, and hand each one to a worker."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import trio

from mailerq.address import host_port
from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.inbound.deadlines import Deadlines, Watched
from mailerq.inbound.services import Services
from mailerq.inbound.session import Session
from mailerq.net.slots import Slots
from mailerq.net.stream import Stream, address_of
from mailerq.net.worker import Worker
from mailerq.plugins import stray_close
from mailerq.wire import smtp
from mailerq.wire.smtp import Reply

__all__ = ["PORT_OPTIONS", "Listener", "Port", "bind", "reserve", "unusable"]

log = logging.getLogger("mailerq.server")

BACKLOG: Final = 4096
"""Connections that wait in the kernel, which may have a lower limit."""

ACCEPTS_IN_A_ROW: Final = 64
"""Connections accepted before the sessions get a turn."""

EXHAUSTED_SECONDS: Final = 0.1
"""Pause before the next accept when the process has no descriptors or memory left."""

REMIND_SECONDS: Final = 60.0
"""Log the same trouble once in this time."""

_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_STRAY: Final = (errno.EBADF, errno.ENOTSOCK, errno.EINVAL)
"""Errors of accept(2) for a descriptor that is closed or no longer a listening socket."""


@dataclass(frozen=True, slots=True)
class Port:
    """A listening socket. `secure`: TLS starts with the first byte; `lmtp`: it speaks LMTP."""

    sock: socket.socket
    secure: bool = False
    lmtp: bool = False

    @property
    def address(self) -> tuple[str, int]:
        """The address it listens on; port 0 in the settings is the real number here."""
        return address_of(self.sock.getsockname())


def bind(config: Config, *, shared: bool = False) -> list[Port]:
    """Open all listening sockets: SMTP first, then the secure ones, then LMTP.

    `shared` lets other processes of the same user listen on them too. The kernel spreads
    connections over the processes, so these sockets listen only once the `Listener` runs. Raises
    `ConfigError` with the setting and the address that cannot be used.
    """
    ports: list[Port] = []
    try:
        for sock, option in _open(config, shared=shared, listening=not shared):
            ports.append(
                Port(sock, secure=option == "smtp_secure_port", lmtp=option == "lmtp_port")
            )
    except BaseException:
        for opened in ports:
            opened.sock.close()
        raise
    return ports


@contextmanager
def reserve(config: Config) -> Iterator[Config]:
    """Keep the addresses for processes that will share them; the sockets do not listen yet.

    Yields the settings with real numbers instead of port 0. Raises `ConfigError`, also if another
    program listens on one of the addresses.
    """
    with ExitStack() as stack:
        changes = {}
        for option in PORT_OPTIONS:
            if 0 in (asked := getattr(config, option)):
                changes[option] = tuple(port or _any_port(config, option, stack) for port in asked)
        config = config.replace(**changes) if changes else config
        for port in bind(config):  # not shared: fails where another program listens
            port.sock.close()
        for sock, _ in _open(config, shared=True, listening=False):
            stack.enter_context(sock)
        yield config


def unusable(config: Config) -> Iterator[tuple[int, ConfigError]]:
    """Each port that `bind` could not open, and the reason. Programs that listen notice nothing."""
    for option, ip, port in _wanted(config):
        try:
            _socket(ip, port, shared=False, listening=False).close()
        except OSError as error:
            yield port, _no_port(config, option, ip, port, error)


def _wanted(config: Config) -> Iterator[tuple[str, str, int]]:
    """Each port with its setting and an address."""
    for option in PORT_OPTIONS:
        for port in getattr(config, option):
            for ip in config.smtp_ip or _all_addresses():
                yield option, ip, port


def _open(config: Config, *, shared: bool, listening: bool) -> Iterator[tuple[socket.socket, str]]:
    """A socket for each port and address, with the setting of the port."""
    for option, ip, port in _wanted(config):
        try:
            yield _socket(ip, port, shared=shared, listening=listening), option
        except OSError as error:
            raise _no_port(config, option, ip, port, error) from None


def _no_port(config: Config, option: str, ip: str, port: int, error: OSError) -> ConfigError:
    key = option.replace("_", "-")
    if error.errno == errno.EADDRNOTAVAIL:
        key = "smtp-ip"  # foreign addresses have no free port
    reason = error.strerror or str(error)
    hint = " (ports below 1024 need root)" if error.errno == errno.EACCES else ""
    return ConfigError(
        config.origin(key), f"{key}: cannot listen on {host_port(ip, port)}: {reason}{hint}"
    )


class Listener:
    """Accepts on all sockets and tracks the sessions. It runs on the home loop."""

    def __init__(
        self,
        services: Services,
        workers: list[Worker],
        ports: list[Port],
        slots: Slots,
    ) -> None:
        self._services = services
        self._workers = workers
        self._home = workers[0]
        self._ports = ports
        self.addresses = [port.address for port in ports]
        """Its addresses, in the order of the ports."""
        self._slots = slots
        self._spare = _Spare()
        self._reminded = -REMIND_SECONDS
        self._open = 0
        self._idle = trio.Event()
        self._deadlines = {worker: Deadlines(services) for worker in workers}
        self._stop_at: float | None = None  # in time.monotonic: each loop has its own clock
        self._scope = trio.CancelScope()

    @property
    def open_sessions(self) -> int:
        return self._open

    def sessions_of(self, worker: Worker) -> list[Watched]:
        """The open sessions of a worker, on its thread."""
        return list(self._deadlines[worker].sessions)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept until `stop`."""
        await trio.lowlevel.checkpoint_if_cancelled()  # cancelled: the workers take no more tasks
        for worker, deadlines in self._deadlines.items():
            worker.spawn(deadlines.run)
        with ExitStack() as copies, self._scope:
            # A copy keeps its port open, and known to the loop, if a plugin closes the original.
            both = [(port, copies.enter_context(port.sock.dup())) for port in self._ports]
            for port in self._ports:
                port.sock.listen(BACKLOG)
            async with trio.open_nursery() as nursery:
                for port, copy in both:
                    nursery.start_soon(self._accept, port, copy)
                task_status.started()

    async def stop(self, seconds: float) -> None:
        """Close the ports and end the sessions: idle ones now, the others within `seconds`."""
        self._scope.cancel()
        for port in self._ports:
            with suppress(OSError):
                port.sock.close()
        self._stop_at = time.monotonic() + seconds
        for worker in self._workers:
            worker.call(self._shut_down, worker)
        while self._open:
            self._idle = trio.Event()
            await self._idle.wait()
        for worker, deadlines in self._deadlines.items():
            worker.call(deadlines.stop)
        self._spare.close()

    def _shut_down(self, worker: Worker) -> None:
        self._deadlines[worker].shut_down(self._seconds_left())

    def _seconds_left(self) -> float:
        return max(0.0, (self._stop_at or 0.0) - time.monotonic())

    async def _accept(self, port: Port, copy: socket.socket) -> None:
        local = None if port.address[0] in ("0.0.0.0", "::") else port.address
        while True:
            try:
                await trio.lowlevel.wait_readable(port.sock)
                await self._accept_some(port, local)
            except (OSError, trio.ClosedResourceError) as error:
                # EPERM: the number now belongs to a file that cannot be waited for.
                if isinstance(error, OSError) and error.errno not in (*_STRAY, errno.EPERM):
                    raise
                port = await self._mend(port, copy)
            await trio.lowlevel.checkpoint()

    async def _accept_some(self, port: Port, local: tuple[str, int] | None) -> None:
        for _ in range(ACCEPTS_IN_A_ROW):
            try:
                stream = Stream.accept(port.sock.fileno(), local=local)
            except OSError as error:
                if error.errno in _STRAY:
                    raise
                if error.errno in _EXHAUSTED:
                    self._turn_away(port, error)
                    await trio.sleep(EXHAUSTED_SECONDS)
                return  # The peer hung up while it waited.
            if stream is None:
                return
            self._admit(stream, port)

    async def _mend(self, port: Port, copy: socket.socket) -> Port:
        """The same port with an open descriptor, once there is one. Raises OSError."""
        port.sock.detach()  # another file may have the number now
        while True:
            try:
                mended = replace(port, sock=copy.dup())
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._warn(f"cannot accept connections: {error.strerror}")
                await trio.sleep(EXHAUSTED_SECONDS)
            else:
                self._ports[self._ports.index(port)] = mended
                stray_close(f"the port {host_port(*mended.address)}")
                return mended

    def _turn_away(self, port: Port, error: OSError) -> None:
        """No descriptor is left: answer waiting clients with the spare one."""
        self._warn(f"cannot accept connections: {error.strerror}")
        with self._spare:
            for _ in range(ACCEPTS_IN_A_ROW):
                try:
                    stream = Stream.accept(port.sock.fileno())
                except OSError:
                    return
                if stream is None:
                    return
                self._refuse(stream, port, smtp.BUSY)

    def _warn(self, text: str) -> None:
        """Log trouble that may concern thousands of connections, but not for each one."""
        if time.monotonic() - self._reminded > REMIND_SECONDS:
            self._reminded = time.monotonic()
            log.warning("%s", text)

    def _admit(self, stream: Stream, port: Port) -> None:
        """Give the connection to the worker with the fewest, or refuse it."""
        peer = stream.remote[0]
        services = self._services
        # A proxy first names its client; then the session decides.
        proxied = services.terms.access.is_proxy(peer)
        answer = None if proxied else services.admit(peer, peer)
        refusal = answer if isinstance(answer, Reply) else None
        admitted = answer if isinstance(answer, str) else None
        if refusal is None and not self._slots.take():
            refusal = smtp.BUSY
            self._warn(f"connections are refused: {self._slots} are open")
            if admitted is not None:
                services.clients.left(admitted)
        if refusal is not None:
            log.debug("connection from %s refused: %s", peer, refusal.text)
            if services.refused_log is not None:
                services.refused_log.write(
                    f"[{peer}] (connection) -> {refusal.code} {refusal.text}"
                )
            self._refuse(stream, port, refusal)
            return
        worker = min(self._workers, key=_load)
        worker.load += 1
        self._open += 1
        lost = partial(self._lost, worker, stream, admitted)
        worker.spawn(self._session, worker, stream, port, admitted, lost=lost)

    def _refuse(self, stream: Stream, port: Port, refusal: Reply) -> None:
        self._services.counters.refused_connections += 1
        if not port.secure:
            stream.write(refusal.wire)
        stream.close()

    def _lost(self, worker: Worker, stream: Stream, admitted: str | None) -> None:
        """Give up a new connection: a defect has ended its worker, and ends the engine."""
        if admitted is not None:
            self._services.clients.left(admitted)
        stream.close()
        self._slots.release()
        self._home.call(self._ended, worker)

    async def _session(
        self, worker: Worker, stream: Stream, port: Port, admitted: str | None
    ) -> None:
        sessions = self._deadlines[worker].sessions
        try:
            session = Session(
                self._services,
                worker,
                stream,
                admitted=admitted,
                secure=port.secure,
                lmtp=port.lmtp,
            )
        except OSError:  # The peer hung up.
            if admitted is not None:
                self._services.clients.left(admitted)
            stream.close()
        else:
            sessions[session] = None
            if self._stop_at is not None:
                session.shut_down(self._seconds_left())
            try:
                await session.run()
            except Exception:
                log.exception("a session could not be ended in order")
            finally:
                del sessions[session]
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


class _Spare:
    """A spare descriptor, to refuse clients when no other is left."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._take()

    def _take(self) -> None:
        with suppress(OSError):
            self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> None:
        self.close()

    def __exit__(self, *error: object) -> None:
        self._take()


PORT_OPTIONS: Final = ("smtp_port", "smtp_secure_port", "lmtp_port")


def _all_addresses() -> tuple[str, ...]:
    return ("0.0.0.0", "::") if socket.has_dualstack_ipv6() else ("0.0.0.0",)


def _socket(ip: str, port: int, *, shared: bool, listening: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit the option
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((ip, port))
        if listening:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _any_port(config: Config, option: str, stack: ExitStack) -> int:
    """A port that is free on the first address; it stays reserved until `stack` ends."""
    ip = (config.smtp_ip or _all_addresses())[0]
    try:
        sock = stack.enter_context(_socket(ip, 0, shared=True, listening=False))
    except OSError as error:
        raise _no_port(config, option, ip, 0, error) from None
    return address_of(sock.getsockname())[1]
