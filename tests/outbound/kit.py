"""What the tests of deliveries run against: a scriptable peer, a resolver, a worker."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import trio
import trio.testing

from mailerq.address import parse_ip
from mailerq.config import Config
from mailerq.live import Live
from mailerq.message import Message
from mailerq.net.logs import LogFile
from mailerq.net.resolver import Host, NoHosts
from mailerq.net.slots import Slots
from mailerq.outbound.cells import Busy, Count, MemoryCells, Rate, boot_time
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.outbound.limits import Limits
from mailerq.outbound.openings import Openings
from mailerq.outbound.policies import NO_POLICIES, Policies
from mailerq.rules.shaping import Shaping
from mailerq.storage import Storage
from tests.outbound.memory_queues import MemoryQueues
from tests.support import DEADLINE


class StubPlugins:
    """Plugins of which each event may have one handler, and its end of a connection."""

    def __init__(self, **handlers: Callable[[Message], Any]) -> None:
        self.handlers = handlers
        self.open = 0
        self.output = b""
        self.on_output: Callable[[], None] = lambda: None

    def send(self, output: bytes) -> None:
        """What the core does when a plugin sends outside of an event."""
        self.output += output
        self.on_output()

    def message_id(self) -> str:
        return "stub-id"

    def listens(self, event: str) -> bool:
        return event in self.handlers

    def connection(self, fd: int, **options: Any) -> StubPlugins:
        assert fd > 0
        self.on_output = options["on_output"]
        self.open += 1
        return self

    async def out_data(self, message: Message, document: Message) -> Any:
        return await self._call("out_data", message)

    async def out_sent(self, message: Message, document: Message) -> None:
        await self._call("out_sent", message)

    async def _call(self, event: str, message: Message) -> Any:
        answer = self.handlers.get(event, lambda message: None)(message)
        return await answer if isinstance(answer, Awaitable) else answer

    def take_output(self) -> bytes:
        output, self.output = self.output, b""
        return output

    async def close(self) -> None:
        self.open -= 1


class StubWorker:
    """A worker in the loop of the test."""

    def __init__(self, index: int, nursery: trio.Nursery, context: Any) -> None:
        self.index = index
        self.load = 0
        self.traces = ()
        self.context = context
        self.nursery = nursery
        self.token = trio.lowlevel.current_trio_token()
        self.thread = threading.get_ident()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        if threading.get_ident() == self.thread:
            function(*args)
        else:
            self.token.run_sync_soon(function, *args)

    def spawn(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        self.call(self.nursery.start_soon, function, *args)


Script = Callable[["PeerConnection"], Awaitable[None]]


@dataclass
class Mail:
    connection: int
    envelope: str
    recipient: str
    body: bytes
    at: float = field(default_factory=monotonic)


class PeerConnection:
    """The peer's end of one connection; a script plays it."""

    def __init__(self, peer: Peer, stream: trio.SocketStream, number: int) -> None:
        self.peer = peer
        self.stream: trio.abc.Stream = stream
        self.number = number
        self.answers = peer.answers
        self._buffer = b""

    async def send(self, data: str | bytes) -> None:
        await self.stream.send_all(data.encode() if isinstance(data, str) else data)

    async def line(self) -> str:
        """The next command; empty when the client has closed."""
        while b"\r\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                return ""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        self.peer.commands.append(line.decode())
        self.peer.queues.touch()
        return line.decode()

    async def body(self) -> bytes:
        while not (self._buffer.startswith(b".\r\n") or b"\r\n.\r\n" in self._buffer):
            data = await self.stream.receive_some()
            if not data:
                raise trio.BrokenResourceError
            self._buffer += data
        if self._buffer.startswith(b".\r\n"):
            body, self._buffer = b"", self._buffer[3:]
        else:
            body, _, self._buffer = self._buffer.partition(b"\r\n.\r\n")
            body += b"\r\n"
        return body.replace(b"\r\n..", b"\r\n.").removeprefix(b".")

    async def chunk(self, size: int) -> bytes:
        """What follows BDAT."""
        while len(self._buffer) < size:
            data = await self.stream.receive_some()
            if not data:
                raise trio.BrokenResourceError
            self._buffer += data
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        return body

    async def take(self, reply: str = "250 taken\r\n") -> bytes:
        """Answer a body that no envelope follows, and the RSET or QUIT that proves the reply."""
        body = await self.body()
        await self.prove(reply)
        return body

    async def prove(self, reply: str = "250 taken\r\n") -> None:
        """Answer the body that was read, and the RSET or QUIT that proves the reply."""
        await self.send(reply)
        proof = await self.line()
        await self.send({"RSET": "250 reset\r\n", "QUIT": "221 bye\r\n"}[proof])

    async def hello(self) -> None:
        await self.send("220 mx.test ESMTP\r\n")
        await self.line()
        extensions = "".join(f"250-{name}\r\n" for name in self.peer.extensions)
        await self.send(f"250-mx.test\r\n{extensions}250 HELP\r\n")

    async def serve(self) -> None:
        """Play a server that takes what `Peer.answers` does not refuse."""
        await self.hello()
        await self.talk()

    async def talk(self) -> None:
        """`serve` behind the reply to EHLO."""
        envelope = recipient = ""
        sender_stands = False
        while line := await self.line():
            verb = line.split()[0].partition(":")[0]
            if verb == "MAIL":
                envelope = line.partition("<")[2].partition(">")[0]
            elif verb == "RCPT":
                recipient = line.partition("<")[2].partition(">")[0]
            reply = self.answer(verb, envelope, recipient)
            if verb == "MAIL":
                sender_stands = reply.startswith("250")
            elif verb in ("RCPT", "DATA") and not sender_stands:
                reply = "503 MAIL first"
            if verb != "BDAT":
                await self.send(reply + "\r\n")
            if reply.startswith(("421", "221")):
                return
            if verb == "BDAT" or reply.startswith("354"):
                chunked = verb == "BDAT"
                body = await self.chunk(int(line.split()[1])) if chunked else await self.body()
                reply = self.answer(".", envelope, recipient)
                if reply.startswith("250"):
                    self.peer.mails.append(Mail(self.number, envelope, recipient, body))
                await self.send(reply + "\r\n")
                self.peer.queues.touch()
                if reply.startswith("421"):
                    return

    def answer(self, verb: str, envelope: str, recipient: str) -> str:
        answers = self.answers.get((verb, recipient)) or self.answers.get((verb, ""))
        if answers:
            return answers.pop(0)
        return {"DATA": "354 go", "QUIT": "221 bye", ".": "250 2.0.0 taken"}.get(verb, "250 ok")


@dataclass
class Peer:
    """A server for mail. `scripts` play its first connections, the last one all others."""

    queues: MemoryQueues
    scripts: list[Script] = field(default_factory=list)
    extensions: Sequence[str] = ("PIPELINING", "8BITMIME", "SIZE 1000000")
    answers: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    connections: int = 0
    open: int = 0
    most: int = 0
    commands: list[str] = field(default_factory=list)
    mails: list[Mail] = field(default_factory=list)

    async def handle(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open += 1
        self.most = max(self.most, self.open)
        script = self.scripts.pop(0) if self.scripts else PeerConnection.serve
        try:
            async with stream:
                await script(PeerConnection(self, stream, self.connections))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # Clients do what they want.
        finally:
            self.open -= 1
            self.queues.touch()


class StubResolver:
    """Knows the hosts of some domains; all others do not exist."""

    def __init__(self, **domains: list[str] | NoHosts) -> None:
        self.domains = {name.replace("_", "."): hosts for name, hosts in domains.items()}

    async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
        await trio.lowlevel.checkpoint()
        found = self.domains.get(domain, NoHosts(f"{domain} does not exist"))
        if isinstance(found, NoHosts):
            return found
        return tuple(Host(f"mx{i}.{domain}", address, i) for i, address in enumerate(found))

    async def host(self, name: str, *, trusted: bool) -> tuple[Host, ...] | NoHosts:
        return (Host(name, name),)

    def host_at_address(self, name: str, *, trusted: bool) -> tuple[Host, ...] | NoHosts | None:
        try:
            parse_ip(name)
        except ValueError:
            return None
        return (Host(name, name),)


class NotedCells(MemoryCells):
    """Cells that note when they let something go."""

    def __init__(self) -> None:
        super().__init__(self._look)
        self.clock = boot_time
        self.granted: dict[str, list[tuple[float, float]]] = {}
        """Of each rate: the times that it has counted, and when they were known to the taker."""
        self._seen = 0

    def _look(self) -> int:
        self._seen = self.clock()
        return self._seen

    def take(self, wants: Sequence[Rate | Count]) -> Busy | None:
        busy = super().take(wants)
        if busy is None:
            for want in wants:
                if isinstance(want, Rate) and want.cost:
                    self.granted.setdefault(want.key, []).append((self._seen / 1e9, monotonic()))
        return busy


@dataclass
class Bench:
    """A dispatcher with everything around it."""

    queues: MemoryQueues
    peer: Peer
    port: int
    dispatcher: Dispatcher
    worker: StubWorker
    cells: NotedCells

    def send(self, recipient: str = "c@d.test", body: str | None = "hi\r\n", **more: Any) -> None:
        message = Message({"envelope": "a@b.test", "recipient": recipient, **more})
        message.body = None if body is None else body.encode()
        self.queues.put(message)
        self.queues.touch()

    async def results(self, queue: str = "results", count: int = 1) -> list[dict[str, Any]]:
        """The last result of each of `count` messages, once they are there."""
        await self.queues.until(lambda queues: len(queues[queue]) >= count)
        assert len(self.queues[queue]) == count
        return [message.results[-1] for message in self.queues[queue]]

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the statistics are as they should be."""
        end = trio.current_time() + DEADLINE
        while not condition(figures := self.dispatcher.statistics()):
            assert trio.current_time() < end, figures
            with trio.move_on_after(0.1):  # something may go on all the time
                await trio.testing.wait_all_tasks_blocked(0.002)

    async def pass_time(self, seconds: float) -> None:
        """Let time pass once nothing is under way, for hosts that are down as well."""
        pauses = self.dispatcher.flows.pauses
        await self.queues.until(lambda queues: not queues.leased and (not queues.due or pauses))
        self.queues.pass_time(seconds)
        self.dispatcher.flush()
        await trio.testing.wait_all_tasks_blocked()

    async def retried(self) -> dict[str, Any]:
        (result,) = await self.results("retry")
        return result


@asynccontextmanager
async def open_bench(
    *scripts: Script,
    plugins: StubPlugins | None = None,
    resolver: StubResolver | None = None,
    address: str = "127.0.0.1",
    send_log: LogFile | None = None,
    slots: Slots | None = None,
    policies: Policies = NO_POLICIES,
    storage: Storage | None = None,
    **settings: Any,
) -> AsyncIterator[Bench]:
    queues = MemoryQueues()
    peer = Peer(queues, list(scripts))
    plugins = plugins or StubPlugins()
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, peer.handle, 0, host=address)
        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        settings.setdefault("smtp_out_port", port)
        settings.setdefault("smarthost_port", port)
        if resolver is None:
            settings |= {"smtp_sink_address": address, "smtp_sink_port": port}
        config = Config(
            **{
                "hostname": "me.test",
                "rabbitmq_results": "results",
                "rabbitmq_success": "success",
                "rabbitmq_failure": "failure",
                "rabbitmq_retry": "retry",
                "retry_interval": (600,),
                "dsn_wait": 0.0,
                **settings,
            }
        )
        worker = StubWorker(0, nursery, plugins)
        cells = NotedCells()
        limits = Limits(Shaping.of(config), cells=cells, clock=lambda: queues.now)
        nursery.start_soon(limits.run)
        dispatcher = Dispatcher(
            Live(config),
            queues,
            worker,  # type: ignore[arg-type]
            plugins=plugins,  # type: ignore[arg-type]
            resolver=resolver or StubResolver(),  # type: ignore[arg-type]
            openings=Openings(slots or Slots(100), worker),  # type: ignore[arg-type]
            limits=limits,
            send_log=send_log,
            policies=policies,
            clock=lambda: queues.now,
            lot=lambda: 0.5,
            storage=storage,
        )

        def check_times() -> None:
            limits.look()
            dispatcher.wake()

        queues.on_time = check_times
        await nursery.start(dispatcher.run)
        try:
            yield Bench(queues, peer, port, dispatcher, worker, cells)
        finally:
            with trio.CancelScope(shield=True):
                with trio.fail_after(DEADLINE):
                    await dispatcher.stop(0)
            nursery.cancel_scope.cancel()
