"""Mail that cannot go costs this host, and other mail, almost nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from tests.engine.kit import Dialog
from tests.net.dns_server import open_dns_server
from tests.support import Sink, configure, open_sink, until

WAITING = 300
HELD = 100
"""Messages in memory at a time (rabbitmq-qos): less than wait, as on a real host."""

AT_ONCE_SECONDS = 20.0
"""For one message. A few milliseconds are enough on an idle host, and timeouts here are minutes."""

BAD_HOST = "127.0.0.2"


@dataclass
class Host:
    """A peer at an address and port of its own; `script` plays each of its connections."""

    script: Callable[[Host, trio.SocketStream], Awaitable[None]]
    address: str
    port: int = 0
    connections: int = 0
    mails: int = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        async with stream:
            try:
                await self.script(self, stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # The engine stops, or has had enough.

    def mail(self, number: int) -> dict[str, Any]:
        return mail_to(self.address, self.port, f"r{number}@b.test")


def mail_to(address: str, port: int, recipient: str) -> dict[str, Any]:
    return {
        "envelope": "a@b.test",
        "recipient": recipient,
        "mime": "Subject: x\r\n\r\nhi\r\n",
        "smarthost": {"hostname": address, "port": port},
    }


async def silent(host: Host, stream: trio.SocketStream) -> None:
    """Say nothing until the client goes."""
    while await stream.receive_some():
        pass


async def says_421(host: Host, stream: trio.SocketStream) -> None:
    await stream.send_all(b"421 4.3.2 later\r\n")


async def converse(host: Host, stream: trio.SocketStream) -> None:
    """Speak SMTP up to the end of the first mail, which is not answered."""
    await stream.send_all(b"220 mx.test\r\n")
    buffer, in_body = b"", False
    while data := await stream.receive_some():
        buffer += data
        while (end := b"\r\n.\r\n" if in_body else b"\r\n") in buffer:
            line, _, buffer = buffer.partition(end)
            verb = line[:4].upper()
            if in_body:
                host.mails += 1
                return
            in_body = verb == b"DATA"
            hello = b"250-mx.test\r\n250-PIPELINING\r\n250 8BITMIME\r\n"
            replies = {b"EHLO": hello, b"DATA": b"354 go\r\n"}
            await stream.send_all(replies.get(verb, b"250 ok\r\n"))
    raise trio.ClosedResourceError


async def slow(host: Host, stream: trio.SocketStream) -> None:
    """Take a mail, and do not come to an end with it."""
    await converse(host, stream)
    await silent(host, stream)


async def closing(host: Host, stream: trio.SocketStream) -> None:
    """Take one mail, and close."""
    await converse(host, stream)
    await stream.send_all(b"250 2.0.0 taken\r\n")


@asynccontextmanager
async def open_hosts(
    script: Callable[[Host, trio.SocketStream], Awaitable[None]] | None, *addresses: str
) -> AsyncIterator[list[Host]]:
    """Peers of one kind; without a script they refuse connections."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        hosts = []
        for address in addresses:
            if script is None:
                sock = stack.enter_context(trio.socket.socket())
                await sock.bind((address, 0))
                hosts.append(Host(silent, address, sock.getsockname()[1]))
            else:
                host = Host(script, address)
                listen = partial(trio.serve_tcp, host.serve, 0, host=address, backlog=1000)
                (listener,) = await nursery.start(listen)
                host.port = listener.socket.getsockname()[1]
                hosts.append(host)
        yield hosts
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_engine(directory: Path, **settings: Any) -> AsyncIterator[Engine]:
    config = configure(
        directory, smtp_out_forbidden=(), rabbitmq_qos=HELD, shutdown_timeout=0.1, **settings
    )
    async with Engine(config) as engine:
        yield engine


async def publish(engine: Engine, documents: list[dict[str, Any]]) -> None:
    async with trio.open_nursery() as nursery:
        for document in documents:
            nursery.start_soon(engine.publish, document)


async def arrives_at_once(engine: Engine, sink: Sink, fresh: dict[str, Any] | None = None) -> bool:
    """Whether a fresh message for another host is there before any timeout."""
    with trio.move_on_after(AT_ONCE_SECONDS) as waiting:
        await engine.publish(fresh or mail_to("127.0.0.1", sink.port, "fresh@d.test"))
        await sink.wait_for(1)
    return not waiting.cancelled_caught


@pytest.mark.parametrize("script", [None, says_421, silent, slow])
async def test_a_message_leaves_at_once_while_others_wait_for_a_bad_peer(
    tmp_path: Path, script: Callable[[Host, trio.SocketStream], Awaitable[None]] | None
) -> None:
    async with (
        open_sink() as sink,
        open_hosts(script, BAD_HOST) as (bad,),
        open_engine(tmp_path) as engine,
    ):
        await publish(engine, [bad.mail(number) for number in range(WAITING)])
        if script is not None:
            await until(lambda: bad.connections > 0)
        assert await arrives_at_once(engine, sink)


@pytest.mark.parametrize("script", [None, says_421, silent, slow])
async def test_what_waits_is_neither_read_nor_written_nor_tried(
    tmp_path: Path, script: Callable[[Host, trio.SocketStream], Awaitable[None]] | None
) -> None:
    # One connection: each further one, a second later, takes a message of those in memory.
    settings = {"domain_maxconnections": 1}
    async with open_hosts(script, BAD_HOST) as (bad,), open_engine(tmp_path, **settings) as engine:
        await publish(engine, [bad.mail(number) for number in range(WAITING)])
        await until(lambda: bad.connections > 0 or results_of(engine)["attempts"] > 0)
        before = await settled(engine)
        assert results_of(engine)["attempts"] <= HELD
        assert before["read_messages"] <= HELD
        assert before["messages"] <= WAITING + HELD
        await trio.sleep(1.0)  # for a look at what happens in it
        assert work_of(engine) == before


def work_of(engine: Engine) -> dict[str, int]:
    queue = engine.statistics()["queue"]
    return {name: queue[name] for name in ("commits", "messages", "reads", "read_messages")}


async def settled(engine: Engine) -> dict[str, int]:
    """What the queue has done when it has done nothing more for a while.

    A write may take longer than that. It counts when it has ended, and until then a result waits.
    """
    with trio.fail_after(60):
        before, calm = work_of(engine), 0
        while calm < 3:
            await trio.sleep(0.3)
            found = work_of(engine)
            quiet = found == before and not results_of(engine)["unsettled"]
            calm = calm + 1 if quiet else 0
            before = found
    return before


async def test_silent_hosts_take_no_connection_that_others_need(tmp_path: Path) -> None:
    addresses = [f"127.0.3.{number}" for number in range(1, 61)]
    async with (
        open_sink() as sink,
        open_hosts(silent, *addresses) as hosts,
        open_engine(tmp_path, smtp_connections=40) as engine,
    ):
        await publish(engine, [host.mail(number) for number in range(5) for host in hosts])
        await until(lambda: any(host.connections for host in hosts))
        await settled(engine)
        banners = []
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(greet, engine, banners)
        assert [banner[:3] for banner in banners] == 10 * ["220"]
        assert await arrives_at_once(engine, sink)


async def greet(engine: Engine, banners: list[str]) -> None:
    client = await Dialog.open(engine.addresses[0])
    try:
        banners.append(await client.reply())
    finally:
        await trio.aclose_forcefully(client.stream)


async def test_a_message_leaves_at_once_while_other_domains_cannot_be_looked_up(
    tmp_path: Path,
) -> None:
    def zone(name: str, kind: str) -> list[str] | None:
        if name.endswith("dead.test"):
            return None
        return {"MX": ["10 mx.d.test."], "A": ["127.0.0.1"]}.get(kind, [])

    def mail(domain: str) -> dict[str, Any]:
        return {"envelope": "a@b.test", "recipient": f"c@{domain}", "mime": "Subject: x\r\n\r\nhi"}

    async with (
        open_sink() as sink,
        open_dns_server(zone) as dns,
        open_engine(
            tmp_path, dns_servers=(dns.address,), smtp_out_port=sink.port, smtp_connections=40
        ) as engine,
    ):
        await publish(engine, [mail(f"d{number}.dead.test") for number in range(WAITING)])
        await until(lambda: dns.questions.total() > 0)
        assert await arrives_at_once(engine, sink, mail("d.test"))


async def test_a_peer_that_closes_after_each_mail_costs_no_attempt(tmp_path: Path) -> None:
    count = 60
    async with open_hosts(closing, BAD_HOST) as (host,), open_engine(tmp_path) as engine:
        await publish(engine, [host.mail(number) for number in range(count)])
        await until(lambda: results_of(engine)["attempts"] >= count)
        assert results_of(engine)["retried"] == 0
        assert host.mails == count


def results_of(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine.statistics()["outgoing"]
    return found
