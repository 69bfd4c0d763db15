"""A broker by byte: speaks AMQP as a test wants, also badly."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from pamqp import commands, frame, header, heartbeat

from mailerq.queues.rabbitmq.addresses import Address

__all__ = ["FakeBroker", "Peer", "fake_broker"]

CAPABILITIES = {
    "publisher_confirms": True,
    "basic.nack": True,
    "consumer_cancel_notify": True,
    "connection.blocked": True,
}


class Peer:
    """One connection of the fake broker."""

    def __init__(self, broker: FakeBroker, stream: trio.abc.Stream) -> None:
        self.broker, self.stream = broker, stream
        self.seen: list[str] = []
        self._lock = trio.Lock()

    async def send(self, *frames: Any, channel: int = 0) -> None:
        await self.write(b"".join(frame.marshal(each, channel) for each in frames))

    async def write(self, data: bytes) -> None:
        step = 1 if self.broker.one_byte else len(data)
        async with self._lock:
            for at in range(0, len(data), step):
                await self.stream.send_all(data[at : at + step])

    async def deliver(
        self, method: Any, body: bytes, properties: commands.Basic.Properties, channel: int = 1
    ) -> None:
        from pamqp.body import ContentBody

        head = header.ContentHeader(0, len(body), properties)
        await self.send(method, head, ContentBody(body), channel=channel)

    async def run(self) -> None:
        broker = self.broker
        data = b""
        while len(data) < 8:
            data += await self._read()
        assert data[:4] == b"AMQP"
        data = data[8:]
        if broker.greeting is not None:
            await self.write(broker.greeting)
            return
        properties = {
            "product": "RabbitMQ", "version": broker.version, "capabilities": broker.capabilities
        }  # fmt: skip
        start = commands.Connection.Start(
            server_properties=properties, mechanisms="PLAIN", locales="en_US"
        )
        await self.send(start)
        while True:
            while data:
                count, channel, each = frame.unmarshal(data)
                data = data[count:]
                await self._answer(channel, each)
            data += await self._read()

    async def _read(self) -> bytes:
        data = await self.stream.receive_some()
        if not data:
            raise EOFError
        return bytes(data)

    async def _answer(self, channel: int, each: Any) -> None:
        name = getattr(each, "name", "")
        self.seen.append(name)
        if self.broker.answer is not None and (replies := self.broker.answer(self, each)):
            if replies != (None,):
                for reply in replies:
                    own = 0 if reply.name.startswith("Connection.") else channel
                    await self.send(reply, channel=own)
            return
        match name:
            case "Connection.StartOk":
                await self.send(commands.Connection.Tune(100, 131072, self.broker.heartbeat))
            case "Connection.Open":
                await self.send(commands.Connection.OpenOk())
            case "Connection.Close":
                await self.send(commands.Connection.CloseOk())
            case "Channel.Open":
                await self.send(commands.Channel.OpenOk(), channel=channel)
            case "Channel.Close":
                await self.send(commands.Channel.CloseOk(), channel=channel)
            case "Confirm.Select":
                await self.send(commands.Confirm.SelectOk(), channel=channel)
            case "Queue.Declare":
                await self.send(commands.Queue.DeclareOk(each.queue, 0, 0), channel=channel)
            case "Heartbeat":
                await self.send(heartbeat.Heartbeat())


Answer = Callable[[Peer, Any], Sequence[Any]]


class FakeBroker:
    """`answer` gets each frame; it returns frames to send, ``(None,)`` for silence, or nothing for
    the usual answer."""

    def __init__(self) -> None:
        self.address: Address
        self.greeting: bytes | None = None
        self.version = "3.10.8"
        self.capabilities: dict[str, bool] = dict(CAPABILITIES)
        self.heartbeat = 0
        self.one_byte = False
        self.answer: Answer | None = None
        self.peers: list[Peer] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        peer = Peer(self, stream)
        self.peers.append(peer)
        try:
            await peer.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass
        finally:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def fake_broker(context: ssl.SSLContext | None = None) -> AsyncIterator[FakeBroker]:
    broker = FakeBroker()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    broker.address = Address("127.0.0.1", port, "user", "secret", "/", context is not None)
    served: trio.abc.Listener[Any] = listener
    if context is not None:
        served = trio.SSLListener(listener, context)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, broker.serve, [served])
        try:
            yield broker
        finally:
            nursery.cancel_scope.cancel()
