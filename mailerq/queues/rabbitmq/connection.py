"""One connection to a RabbitMQ broker, and its channels, as awaited calls.

Theory of operation
-------------------
`connect` opens a connection by `adapter` and keeps it for the duration of its context. `Channel`
turns the callbacks of pika into awaited values. All failures of the broker, the network and a
channel are a `BrokerError`, whose text says what an operator can do.

A connection ends once: `Connection.reason` says why, all calls under way raise it, and
`Connection.wait_closed` returns. A broker that runs out of memory or disk blocks a connection that
publishes: `Connection.blocked` says so, and nothing more should be published until it is None.

Guarantees
----------
- A call under way that is cancelled has no effect on others. The messages of a cancelled
  `Channel.fetch` go back to their queue.
- The end of the context of `connect` closes the connection within `CLOSE_SECONDS`, also when the
  context is cancelled.
"""

from __future__ import annotations

import math
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import pika
import trio
from pika import exceptions, spec

from mailerq.errors import QueueError
from mailerq.queues.rabbitmq.adapter import BoundedContent, TrioConnection
from mailerq.queues.rabbitmq.addresses import Address

__all__ = [
    "BrokerError",
    "Channel",
    "Connection",
    "Declared",
    "Delivery",
    "connect",
]

OPEN_SECONDS: Final = 15.0
"""For name lookup, TCP, TLS and the AMQP handshake together."""

CLOSE_SECONDS: Final = 2.0

HEARTBEAT_SECONDS: Final = 30
"""pika notices a silent broker 5 seconds later at the earliest, and within twice that time."""

FETCH_SECONDS: Final = 2.0
"""How long `Channel.fetch` waits for messages that were ready a moment before."""

NEEDED: Final = ("publisher_confirms", "basic.nack", "consumer_cancel_notify", "connection.blocked")
"""Capabilities that the backend relies on; every RabbitMQ since 3.3 has them."""

ACCESS_REFUSED: Final = 403
NOT_FOUND: Final = 404
RESOURCE_LOCKED: Final = 405
PRECONDITION_FAILED: Final = 406
NOT_ALLOWED: Final = 530
CONNECTION_FORCED: Final = 320

_MEANINGS: Final = {
    ACCESS_REFUSED: "the user lacks the right, see `rabbitmqctl set_permissions`",
    NOT_FOUND: "it is not there; rabbitmq-declare would create it",
    RESOURCE_LOCKED: "another connection has it for itself",
    PRECONDITION_FAILED: "it exists with other arguments: delete it, fit rabbitmq-queue-type to "
    "it, or use it as it is with rabbitmq-declare: false",
    CONNECTION_FORCED: "the broker shuts down, or an operator closed the connection",
}
_NAME = "rabbitmq-address needs a name that the certificate has, "
_AUTHORITY = (
    "make its authority known to this host, by the system's certificates or SSL_CERT_FILE, "
)
_HELP_FOR_CERTIFICATES: Final = {
    9: "look at the clocks of both hosts, ",
    10: "the broker needs a new one, ",
    18: _AUTHORITY,
    19: _AUTHORITY,
    20: _AUTHORITY,
    21: _AUTHORITY,
    62: _NAME,
    64: _NAME,
}
"""What to do, by the number that OpenSSL has for the fault (openssl-verification-options)."""

TEXT_LIMIT: Final = 300


class BrokerError(QueueError):
    """The broker refused something, or cannot be reached; the text says what to do.

    `code` is the reply code of AMQP 0-9-1 (section 1.4.2.1 of its reference), 0 if the broker said
    nothing.
    """

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Declared(NamedTuple):
    """What the broker says of a queue."""

    messages: int
    """Messages that are ready, without those that consumers hold."""
    consumers: int


@dataclass(slots=True, eq=False)
class Delivery:
    """A message that came from a queue, until it is acknowledged on its channel."""

    channel: Channel
    tag: int
    redelivered: bool
    properties: spec.BasicProperties
    body: bytes
    identity: str = ""
    """The identity of the message, once a taker has computed it."""


@asynccontextmanager
async def connect(
    address: Address,
    *,
    context: ssl.SSLContext | None = None,
    open_seconds: float = OPEN_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    name: str = "mailerq",
) -> AsyncIterator[Connection]:
    """Keep a connection to a broker for the duration of the context. Raises `BrokerError`.

    `context` is for ``amqps``; without one, the certificate is verified with the authorities of the
    system. `name` is what the broker shows of the connection. When the connection ends, the context
    goes on: see `Connection.wait_closed`.
    """
    if address.tls and context is None:
        context = ssl.create_default_context()
        context.hostname_checks_common_name = False
    parameters = pika.ConnectionParameters(
        host=address.host,
        port=address.port,
        virtual_host=address.vhost,
        credentials=pika.PlainCredentials(address.user, address.password),
        heartbeat=heartbeat_seconds,
        # The deadlines are ours. pika's own would end in an error with less to say.
        socket_timeout=open_seconds + 5,
        stack_timeout=open_seconds + 10,
        blocked_connection_timeout=None,
        client_properties={"connection_name": name, "product": "mailerq"},
        ssl_options=None if context is None else pika.SSLOptions(context, address.host),
    )
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        connection = Connection(nursery, address, parameters)
        try:
            with trio.move_on_after(open_seconds) as scope:
                await connection.wait_opened()
            if scope.cancelled_caught:
                raise BrokerError(
                    f"{address} did not open a connection within {open_seconds:g} seconds"
                )
            yield connection
        except BaseException as error:
            failure = error  # the nursery would wrap it
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await connection.close()
            connection.abort("the connection is closed")
            # The socket is closed in the next turn of the loop.
            with trio.CancelScope(shield=True):
                await connection.released()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # the error refers to this frame


class _Reply:
    """The answer to one call."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._value: Any = None
        self._error: BrokerError | None = None
        self.abandoned = False

    def set(self, value: Any = None) -> None:
        self._value = value
        self._event.set()

    def fail(self, error: BrokerError) -> None:
        self._error = error
        self._event.set()

    async def wait(self) -> Any:
        try:
            await self._event.wait()
        except trio.Cancelled:
            self.abandoned = True
            raise
        if self._error is not None:
            raise BrokerError(str(self._error), self._error.code)
        return self._value


class Connection:
    """A connection, on one trio loop; made by `connect`."""

    def __init__(
        self, nursery: trio.Nursery, address: Address, parameters: pika.ConnectionParameters
    ) -> None:
        self.address = address
        self.reason: BrokerError | None = None
        """Why the connection is over."""
        self.blocked: str | None = None
        """What the broker says is short while it takes no publications, else None."""
        self.on_blocked: list[Callable[[], None]] = []
        """Called when `blocked` has changed."""
        self._opened = trio.Event()
        self._closed = trio.Event()
        self._terminated = trio.Event()
        self._replies: set[_Reply] = set()
        self._connection = TrioConnection(
            nursery, parameters, self._on_opened, self._on_closed, self._on_closed
        )
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)

    def __repr__(self) -> str:
        return f"<connection to {self.address}>"

    async def wait_opened(self) -> None:
        """Wait until the broker has accepted the connection. Raises `BrokerError`."""
        await self._opened.wait()
        if self.reason is not None:
            raise self.reason

    async def wait_closed(self) -> BrokerError:
        """Wait for the end of the connection; return the reason."""
        await self._closed.wait()
        assert self.reason is not None
        return self.reason

    @property
    def is_open(self) -> bool:
        return self._opened.is_set() and self.reason is None

    @property
    def buffered(self) -> int:
        """Bytes written that the kernel has not taken: with many, do not publish more."""
        return self._connection.buffered

    @property
    def version(self) -> tuple[int, ...]:
        """The version of the broker, such as (3, 10, 8); empty if it names none."""
        found = re.match(r"\d{1,9}(?:\.\d{1,9}){0,3}", self._server("version"))
        return tuple(map(int, found[0].split("."))) if found else ()

    @property
    def product(self) -> str:
        """The name and version of the broker, as it says."""
        return f"{self._server('product')} {self._server('version')}".strip()

    @property
    def cluster_name(self) -> str:
        """The name of the broker's cluster, or of a broker alone."""
        return self._server("cluster_name")

    def _server(self, key: str) -> str:
        properties = self._connection.server_properties
        value = properties.get(key, "") if isinstance(properties, Mapping) else ""
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        return _printable(str(value))

    async def channel(self) -> Channel:
        """Open a channel. Raises `BrokerError`."""
        channel = Channel(self)
        await channel.open(self._connection)
        return channel

    async def close(self) -> None:
        """Close the connection in an orderly way, and wait for the broker."""
        if self._connection.is_open:
            self._connection.close()
        elif not self._connection.is_closing:
            self.abort("the connection is closed")
        await self._closed.wait()

    def abort(self, text: str) -> None:
        """End the connection at once."""
        self._connection.abort(BrokerError(text))
        self._end(BrokerError(text))

    async def released(self) -> None:
        """Wait until the socket of a connection that is over is closed; end what is left of it."""
        with trio.move_on_after(CLOSE_SECONDS):
            await self._terminated.wait()
        self._connection.release()

    def _on_opened(self, connection: TrioConnection) -> None:
        capabilities = self._connection.server_capabilities or {}
        missing = [name for name in NEEDED if not capabilities.get(name)]
        if missing:
            self.abort(f"{self.address} is no RabbitMQ: it lacks {', '.join(missing)}")
        self._opened.set()

    def _on_closed(self, connection: TrioConnection, error: BaseException) -> None:
        self._end(self._error_of(connection.defect or error))
        self._terminated.set()

    def _end(self, reason: BrokerError) -> None:
        if self.reason is None:
            self.reason = reason
            replies, self._replies = self._replies, set()
            for reply in replies:
                reply.fail(reason)
            self._opened.set()
            self._closed.set()

    def _on_blocked(self, connection: TrioConnection, method: Any) -> None:
        self.blocked = _printable(str(method.method.reason)) or "an unknown resource"
        self._tell_blocked()

    def _on_unblocked(self, connection: TrioConnection, method: Any) -> None:
        self.blocked = None
        self._tell_blocked()

    def _tell_blocked(self) -> None:
        for callback in tuple(self.on_blocked):
            callback()

    def _reply(self) -> _Reply:
        if self.reason is not None:
            raise BrokerError(str(self.reason), self.reason.code)
        reply = _Reply()
        self._replies.add(reply)
        return reply

    def _error_of(self, error: BaseException) -> BrokerError:
        """One clear message for what pika reports."""
        address = self.address
        error = _cause_of(error)
        match error:
            case BrokerError():
                return error
            case exceptions.ProbableAuthenticationError() | exceptions.AuthenticationError():
                return BrokerError(
                    f"{address} refuses user {address.user!a}: a wrong password, or a login that "
                    "is only allowed on the broker's own host",
                    ACCESS_REFUSED,
                )
            case exceptions.ProbableAccessDeniedError():
                return BrokerError(
                    f"{address} has no vhost {address.vhost!a} for user {address.user!a}",
                    NOT_ALLOWED,
                )
            case exceptions.ConnectionClosed(reply_code=int(code), reply_text=text):
                if isinstance(error, exceptions.ConnectionClosedByClient):
                    return BrokerError("the connection is closed")
                return BrokerError(f"{address} closed the connection: {_explain(code, text)}", code)
            case exceptions.AMQPHeartbeatTimeout():
                return BrokerError(f"{address} has been silent for too long")
            case exceptions.IncompatibleProtocolError() | exceptions.ProtocolSyntaxError():
                hint = "" if address.tls else "; does it expect TLS (amqps)?"
                return BrokerError(f"{address} does not speak AMQP 0-9-1{hint}")
            case ssl.SSLCertVerificationError(verify_code=int(number), verify_message=problem):
                problem = _printable(problem).rstrip(".")
                help = _HELP_FOR_CERTIFICATES.get(number, "")
                return BrokerError(
                    f"the certificate of {address} is not trusted: {problem}; {help}"
                    "rabbitmq-verify: false would accept it"
                )
            case ssl.SSLError(reason="WRONG_VERSION_NUMBER" | "RECORD_LAYER_FAILURE"):
                return BrokerError(
                    f"{address} does not speak TLS; does it expect amqp, in place of amqps?"
                )
            case ssl.SSLError():
                return BrokerError(
                    f"TLS with {address} failed: {_printable(str(error))}; does it expect amqp?"
                )
            case socket.gaierror():
                return BrokerError(
                    f"the host of {address} cannot be looked up: {error.strerror or error}"
                )
            case OSError():
                return BrokerError(f"{address}: {error.strerror or error}")
            case exceptions.StreamLostError():
                return BrokerError(f"the connection to {address} was lost")
        return BrokerError(f"{address}: {type(error).__name__}: {_printable(str(error))}")


class Channel:
    """A channel. Calls raise `BrokerError`; a refusal of the broker ends the channel."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reason: BrokerError | None = None
        """Why the channel is over."""
        self.on_closed: Callable[[BrokerError], None] = lambda reason: None
        self.on_return: Callable[[int, str, spec.BasicProperties], None] = (
            lambda code, queue, properties: None
        )
        """Called for a `mandatory` publication that no queue takes, before its confirmation."""
        self._channel: Any = None
        self._replies: set[_Reply] = set()
        self._consumers: dict[str, Callable[[], None]] = {}
        self._number = 0
        self._fetch_lock = trio.Semaphore(1)  # compiled tasks cannot own a `trio.Lock`
        self._closed = trio.Event()

    async def open(self, connection: Any) -> None:
        reply = self._reply()
        try:
            channel = connection.channel(on_open_callback=reply.set)
        except exceptions.AMQPError as error:
            raise self.connection._error_of(error) from None
        self._channel = channel
        channel._content_assembler = BoundedContent()
        channel.add_on_close_callback(self._on_closed)
        channel.add_on_return_callback(self._on_return)
        channel.add_on_cancel_callback(self._on_cancelled)
        await self._wait(reply)

    @property
    def is_open(self) -> bool:
        return self.reason is None and self.connection.is_open

    async def wait_closed(self) -> BrokerError:
        """Wait for the end of the channel; return the reason."""
        await self._closed.wait()
        assert self.reason is not None
        return self.reason

    async def close(self) -> None:
        """Close the channel; unacknowledged messages go back to their queues."""
        if self.is_open and self._channel.is_open:
            self._channel.close()
            await self._closed.wait()

    def _on_closed(self, channel: Any, error: BaseException) -> None:
        if self.reason is not None:
            return
        match error:
            case exceptions.ChannelClosedByBroker(reply_code=int(code), reply_text=text):
                reason = BrokerError(f"{self.connection.address}: {_explain(code, text)}", code)
            case exceptions.ChannelClosedByClient():
                reason = BrokerError("the channel is closed")
            case _:
                # The channel ends first, but knows less.
                defect = getattr(self.connection._connection, "defect", None)
                reason = self.connection._error_of(defect or error)
        self.reason = reason
        replies, self._replies = self._replies, set()
        for reply in replies:
            reply.fail(reason)
        self._closed.set()
        consumers, self._consumers = self._consumers, {}
        for on_cancelled in consumers.values():
            on_cancelled()
        self.on_closed(reason)

    def _on_return(
        self, channel: Any, method: spec.Basic.Return, properties: spec.BasicProperties, body: bytes
    ) -> None:
        self.on_return(int(method.reply_code), str(method.routing_key), properties)

    def _reply(self) -> _Reply:
        if self.reason is not None:
            raise BrokerError(str(self.reason), self.reason.code)
        reply = self.connection._reply()
        self._replies.add(reply)
        return reply

    async def _wait(self, reply: _Reply) -> Any:
        try:
            return await reply.wait()
        finally:
            self._replies.discard(reply)
            self.connection._replies.discard(reply)

    async def _call(self, method: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Call a method of pika that takes a callback; return what the callback gets."""
        reply = self._reply()
        try:
            method(*args, callback=reply.set, **more)
        except exceptions.AMQPError as error:
            self._replies.discard(reply)
            self.connection._replies.discard(reply)
            raise self.connection._error_of(error) from None
        return await self._wait(reply)

    async def declare(
        self,
        queue: str,
        *,
        passive: bool = False,
        durable: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> Declared:
        """Declare a queue, or ask for it if `passive`; return its depth."""
        frame = await self._call(
            self._channel.queue_declare,
            queue,
            passive=passive,
            durable=durable,
            arguments=dict(arguments or {}),
        )
        return Declared(frame.method.message_count, frame.method.consumer_count)

    async def declare_exchange(self, exchange: str) -> None:
        """Declare a durable direct exchange."""
        await self._call(self._channel.exchange_declare, exchange, "direct", durable=True)

    async def bind(self, queue: str, exchange: str) -> None:
        """Let an exchange pass on what is published under the name of a queue."""
        await self._call(self._channel.queue_bind, queue, exchange, queue)

    async def purge(self, queue: str) -> int:
        """Delete the messages that are ready in a queue; return their number."""
        frame = await self._call(self._channel.queue_purge, queue)
        return cast("int", frame.method.message_count)

    async def delete(self, queue: str, *, if_idle: bool = False) -> None:
        """Delete a queue; `if_idle`: only one without messages and consumers (classic only)."""
        await self._call(self._channel.queue_delete, queue, if_unused=if_idle, if_empty=if_idle)

    async def prefetch(self, count: int) -> None:
        """Limit the unacknowledged messages of each consumer."""
        await self._call(self._channel.basic_qos, prefetch_count=count)

    async def confirm(self, on_confirmed: Callable[[int, bool, bool], None]) -> None:
        """Have publications confirmed.

        `on_confirmed(tag, multiple, taken)`: publication `tag` of this channel, counted from 1, or
        all up to that one, is safe, or refused if not `taken`.
        """

        def confirmed(frame: Any) -> None:
            method = frame.method
            on_confirmed(method.delivery_tag, method.multiple, isinstance(method, spec.Basic.Ack))

        await self._call(self._channel.confirm_delivery, confirmed)

    def publish(
        self, exchange: str, queue: str, body: bytes, properties: spec.BasicProperties
    ) -> None:
        """Write a `mandatory` publication into the buffer of the connection."""
        if not self.is_open:
            raise BrokerError(str(self.reason or self.connection.reason))
        self._channel.basic_publish(exchange, queue, body, properties, mandatory=True)

    async def consume(
        self,
        queue: str,
        on_delivery: Callable[[Delivery], None],
        on_cancelled: Callable[[], None],
    ) -> str:
        """Start to consume; return the tag of the consumer.

        `on_cancelled` is called when the broker ends it: the queue was deleted, or lost its host.
        """
        consumer = self._new_consumer(on_cancelled)
        await self._consume(consumer, queue, on_delivery)
        return consumer

    def _new_consumer(self, on_cancelled: Callable[[], None]) -> str:
        self._number += 1
        consumer = f"mailerq.{self._number}"
        self._consumers[consumer] = on_cancelled
        return consumer

    async def _consume(
        self, consumer: str, queue: str, on_delivery: Callable[[Delivery], None]
    ) -> None:
        def delivered(_: Any, method: Any, properties: spec.BasicProperties, body: bytes) -> None:
            again = bool(method.redelivered)
            on_delivery(Delivery(self, method.delivery_tag, again, properties, body))

        await self._call(self._channel.basic_consume, queue, delivered, consumer_tag=consumer)

    async def cancel(self, consumer: str) -> None:
        """End a consumer. What it holds stays with it until acknowledged."""
        if self._consumers.pop(consumer, None) is not None:
            await self._call(self._channel.basic_cancel, consumer)

    def _on_cancelled(self, frame: Any) -> None:
        on_cancelled = self._consumers.pop(str(frame.method.consumer_tag), None)
        if on_cancelled is not None:
            on_cancelled()

    async def fetch(
        self, queue: str, limit: int, most_bytes: float = math.inf
    ) -> tuple[list[Delivery], int]:
        """Take up to `limit` messages that are ready; return them, and how many are left.

        Those beyond `most_bytes` bytes of bodies, but not the first one, go back at once.

        This takes five round trips, however many messages come; ``basic.get`` would take one for
        each, and in a quorum queue a write. Several tasks may fetch at a time.
        """
        ready = (await self.declare(queue, passive=True)).messages
        wanted = min(limit, ready)
        if not wanted:
            return [], 0
        deliveries: list[Delivery] = []
        over = trio.Event()

        size = 0

        def delivered(delivery: Delivery) -> None:
            nonlocal size
            size += len(delivery.body)
            if over.is_set() or (deliveries and size > most_bytes):
                self.nack(delivery.tag)
                over.set()
                return
            deliveries.append(delivery)
            if len(deliveries) >= wanted:
                over.set()

        consumer = ""
        try:
            async with self._fetch_lock:
                # The limit is that of consumers that begin from now on.
                await self.prefetch(wanted)
                consumer = self._new_consumer(over.set)
                await self._consume(consumer, queue, delivered)
            with trio.move_on_after(FETCH_SECONDS):  # another process may have taken some
                await over.wait()
            await self.cancel(consumer)
        except BaseException:
            with trio.move_on_after(CLOSE_SECONDS, shield=True), suppress(BrokerError):
                await self.cancel(consumer)  # what is on its way goes back by itself
            for delivery in deliveries:
                self.nack(delivery.tag)
            raise
        return deliveries, ready - len(deliveries)

    def ack(self, tag: int) -> None:
        """Acknowledge a message. If the channel is over, the message comes again."""
        if self.is_open and self._channel.is_open:
            self._channel.basic_ack(tag)

    def nack(self, tag: int) -> None:
        """Return a message to its queue."""
        if self.is_open and self._channel.is_open:
            self._channel.basic_nack(tag, requeue=True)


def _cause_of(error: BaseException) -> BaseException:
    """The innermost error of what pika wraps."""
    for _ in range(8):
        inner = getattr(error, "exceptions", None) or getattr(error, "exception", None)
        if isinstance(inner, list | tuple):
            inner = inner[-1]
        if not isinstance(inner, BaseException) and error.args:
            inner = error.args[0]
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _explain(code: int, text: object) -> str:
    shown = f"{code} {_printable(str(text))}"
    return f"{shown} ({_MEANINGS[code]})" if code in _MEANINGS else shown


def _printable(text: str) -> str:
    text = text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "…"
    return "".join(char if char.isprintable() else "?" for char in text)
