"""Runs the AMQP client of pika on trio, without a thread.

Theory of operation
-------------------
pika keeps the protocol, and asks an object for timers, name lookups and readiness of sockets.
`TrioServices` is that object: each timer and lookup is a task of one nursery, each watched
direction of a socket another. Callbacks of pika run in these tasks, one at a time.

What pika writes in one turn of the loop leaves in one send at the end of the turn.

Guarantees
----------
- An exception of a callback ends the connection (`TrioServices.failed`), and never the nursery.
- A file descriptor that pika closes is not watched any more, so a later socket with its number is
  not confused with it.
- Cancellation does not end timers, lookups and watches, so the connection can still be closed in an
  orderly way. `TrioConnection.release` ends them.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Any, Final, cast

import pika
import trio
from pika import frame, spec
from pika.adapters.base_connection import BaseConnection
from pika.adapters.utils import io_services_utils, nbio_interface
from pika.channel import ContentFrameAssembler
from pika.frame import Header

from mailerq.turns import EndOfTurn

__all__ = ["BoundedContent", "TrioConnection", "TrioServices"]

Callback = Callable[[], object]

# Each state of a connection is reported once, by mailerq.queues.rabbitmq.connection. pika logs
# every failure several times and with a traceback.
logging.getLogger("pika").setLevel(logging.CRITICAL + 1)

READ_BYTES: Final = 1 << 14
TURN_BYTES: Final = 1 << 15
"""Bytes of one read and of one turn of the loop. pika needs up to 15 µs for a frame of 8 bytes or
more, and a turn stays below 50 ms."""

FRAME_BYTES: Final = 1 << 17
"""The longest frame. It is the broker's default, and pika proposes no other."""


MAX_MESSAGE: Final = 512 << 20
"""Bytes of a message. No version of RabbitMQ takes a larger one, so none sends one."""


class BoundedContent(ContentFrameAssembler):  # type: ignore[misc]
    """Puts the frames of a message together, and refuses one that could fill the memory."""

    def process(self, frame: Any) -> Any:
        if isinstance(frame, Header) and frame.body_size > MAX_MESSAGE:
            raise ValueError(f"a message of {frame.body_size} bytes")
        return super().process(frame)


def without_headers(data: bytes) -> tuple[int, Any] | None:
    """Read the frame at the start, which has the properties of a message, without their headers.

    pika raises for a time beyond the year 9999, and for tables a thousand deep. Both pass brokers,
    and the message would end one connection after the other. Returns the bytes of the frame, and
    the frame; None if it is another one. AMQP 0-9-1, section 4.2.6.1.
    """
    head = spec.FRAME_HEADER_SIZE
    if len(data) < head + 14 or data[0] != spec.FRAME_HEADER:
        return None
    channel, size = struct.unpack_from(">HL", data, 1)
    (flags,) = struct.unpack_from(">H", data, head + 12)
    if not flags & spec.BasicProperties.FLAG_HEADERS:
        return None
    start = head + 14
    for flag in (
        spec.BasicProperties.FLAG_CONTENT_TYPE,
        spec.BasicProperties.FLAG_CONTENT_ENCODING,
    ):
        if flags & flag:
            start += 1 + data[start]
    (length,) = struct.unpack_from(">L", data, start)
    kept = b"".join(
        (
            data[head : head + 12],
            struct.pack(">H", flags & ~spec.BasicProperties.FLAG_HEADERS),
            data[head + 14 : start],
            data[start + 4 + length : head + size],
        )
    )
    end = bytes([spec.FRAME_END])
    _, found = frame.decode_frame(struct.pack(">BHL", data[0], channel, len(kept)) + kept + end)
    return head + size + spec.FRAME_END_SIZE, found


class _Task:
    """Work of a nursery that pika may cancel; the cancellation of the nursery does not end it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope(shield=True)
        self.over = False

    def cancel(self) -> bool:
        self.scope.cancel()
        was_over, self.over = self.over, True
        return not was_over


class _Watch(_Task):
    """One direction of a socket. The task stays while pika turns the watch on and off."""

    def __init__(self) -> None:
        super().__init__()
        self.callback: Callback | None = None
        self.wanted = trio.Event()


class TrioServices(
    io_services_utils.SocketConnectionMixin,  # type: ignore[misc]
    io_services_utils.StreamingConnectionMixin,  # type: ignore[misc]
    nbio_interface.AbstractIOServices,  # type: ignore[misc]
    nbio_interface.AbstractFileDescriptorServices,  # type: ignore[misc]
):
    """What pika needs of an event loop, as tasks of a nursery."""

    def __init__(self, nursery: trio.Nursery, failed: Callable[[Exception], None]) -> None:
        self._nursery = nursery
        self._failed = failed
        self._token = trio.lowlevel.current_trio_token()
        self._watches: dict[tuple[int, bool], _Watch] = {}
        self._tasks: set[_Task] = set()

    def get_native_ioloop(self) -> TrioServices:
        return self

    def run(self) -> None:
        raise NotImplementedError("trio runs the loop")

    def stop(self) -> None:
        raise NotImplementedError("trio runs the loop")

    def close(self) -> None:
        """End all timers, lookups and watches."""
        for task in (*self._tasks, *self._watches.values()):
            task.cancel()

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:
            self._failed(error)

    def add_callback_threadsafe(self, callback: Callback) -> None:
        self._token.run_sync_soon(self._call, callback)

    def call_later(self, delay: float, callback: Callback) -> _Task:
        timer = _Task()

        async def wait() -> None:
            with timer.scope:
                await trio.sleep(delay)
            self._tasks.discard(timer)
            if not timer.over:
                timer.over = True
                self._call(callback)

        self._tasks.add(timer)
        self._nursery.start_soon(wait)
        return timer

    def getaddrinfo(
        self,
        host: str,
        port: int | str,
        on_done: Callable[[object], None],
        family: int = 0,
        socktype: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> _Task:
        lookup = _Task()

        async def look() -> None:
            result: object
            with lookup.scope:
                try:
                    result = await trio.socket.getaddrinfo(
                        host, port, family, socktype, proto, flags
                    )
                except (OSError, UnicodeError) as error:
                    result = error
            self._tasks.discard(lookup)
            if not lookup.over:
                lookup.over = True
                self._call(lambda: on_done(result))

        self._tasks.add(lookup)
        self._nursery.start_soon(look)
        return lookup

    def set_reader(self, fd: int, on_readable: Callback) -> None:
        self._watch(fd, False, on_readable)

    def set_writer(self, fd: int, on_writable: Callback) -> None:
        self._watch(fd, True, on_writable)

    def remove_reader(self, fd: int) -> bool:
        return self._ignore(fd, False)

    def remove_writer(self, fd: int) -> bool:
        return self._ignore(fd, True)

    def _watch(self, fd: int, writes: bool, callback: Callback) -> None:
        watch = self._watches.get((fd, writes))
        if watch is None:
            watch = self._watches[fd, writes] = _Watch()
            self._nursery.start_soon(self._run, fd, writes, watch)
        watch.callback = callback
        watch.wanted.set()

    def _ignore(self, fd: int, writes: bool) -> bool:
        watch = self._watches.get((fd, writes))
        if watch is None or watch.callback is None:
            return False
        watch.callback = None
        watch.wanted = trio.Event()
        other = self._watches.get((fd, not writes))
        if other is None or other.callback is None:
            # pika removes both directions before it closes a socket.
            for direction in (False, True):
                if (over := self._watches.pop((fd, direction), None)) is not None:
                    over.cancel()
            trio.lowlevel.notify_closing(fd)
        return True

    async def _run(self, fd: int, writes: bool, watch: _Watch) -> None:
        wait = trio.lowlevel.wait_writable if writes else trio.lowlevel.wait_readable
        with watch.scope:
            while not watch.over:
                await watch.wanted.wait()
                try:
                    await wait(fd)
                except trio.ClosedResourceError:
                    continue  # the watch is over
                except OSError:
                    pass  # the callback finds out what is wrong
                if watch.callback is not None:
                    self._call(watch.callback)


class TrioConnection(BaseConnection):  # type: ignore[misc]
    """A connection of pika on trio. `opened`, `failed` and `closed` are called once each at most.

    `failed(connection, error)` is called instead of `opened(connection)`;
    `closed(connection, error)` after it.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        parameters: pika.ConnectionParameters,
        opened: Callable[[Any], None],
        failed: Callable[[Any, BaseException], None],
        closed: Callable[[Any, BaseException], None],
    ) -> None:
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._end_of_turn = EndOfTurn.of_this_loop()
        self._aborted = False
        self.defect: Exception | None = None
        """What a callback raised, if that is why the connection has ended."""
        self._services = TrioServices(nursery, self._callback_failed)
        super().__init__(parameters, opened, failed, closed, self._services)

    @property
    def buffered(self) -> int:
        """Bytes that the kernel has not taken yet."""
        sent = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self._unsent_bytes + cast("int", sent)

    def abort(self, reason: Exception) -> None:
        """End the connection without a word to the broker."""
        self.defect = self.defect or reason
        if not (self._aborted or self.is_closed):
            self._aborted = True
            self._terminate_stream(reason)

    def release(self) -> None:
        """End the tasks of the connection; nothing is called back any more."""
        self._services.close()

    def _callback_failed(self, error: Exception) -> None:
        self.abort(error)

    def _adapter_emit_data(self, data: bytes) -> None:
        if not self._unsent:
            self._end_of_turn.call(self._flush)
        self._unsent.append(data)
        self._unsent_bytes += len(data)

    def _flush(self, idle: bool) -> bool:
        unsent, self._unsent, self._unsent_bytes = self._unsent, [], 0
        if unsent and self._transport is not None:
            self._transport.write(b"".join(unsent))
            return True
        return False

    def _proto_connection_made(self, transport: Any) -> None:
        transport._MAX_RECV_BYTES = READ_BYTES
        transport._MAX_CONSUME_BYTES = TURN_BYTES
        super()._proto_connection_made(transport)

    def _proto_data_received(self, data: bytes) -> None:
        try:
            super()._proto_data_received(data)
            if len(self._frame_buffer) > FRAME_BYTES + READ_BYTES:
                raise ValueError("a frame is longer than agreed")
        except Exception as error:
            self.defect = self.defect or error  # pika ends the connection, and forgets why
            raise

    def _read_frame(self) -> tuple[int, Any]:
        try:
            return cast("tuple[int, Any]", super()._read_frame())
        except Exception:
            found = without_headers(self._frame_buffer)
            if found is None:
                raise
            return found

    @classmethod
    def create_connection(cls, *args: object, **more: object) -> object:
        raise NotImplementedError("a connection tries one broker")
