"""A client for session tests: sends exactly the given bytes, and reads whole replies."""

from __future__ import annotations

import resource
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
import trustme

from mailerq import Engine
from mailerq.message import Message
from tests.support import DEADLINE, configure


@dataclass
class Dialog:
    """One connection."""

    stream: trio.abc.Stream
    received: bytes = b""

    @classmethod
    async def open(cls, address: tuple[str, int]) -> Dialog:
        return cls(await trio.open_tcp_stream(*address))

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def reply(self) -> str:
        """The next reply, lines joined by LF; empty at the end of the connection."""
        lines = []
        with trio.fail_after(DEADLINE):
            while True:
                line, end, rest = self.received.partition(b"\r\n")
                if end:
                    self.received = rest
                    lines.append(line.decode())
                    if line[3:4] == b" ":
                        return "\n".join(lines)
                    continue
                try:
                    data = await self.stream.receive_some()
                except trio.BrokenResourceError:
                    data = b""
                if not data:
                    assert not self.received
                    return "\n".join(lines)
                self.received += data

    async def receive_until(self, end: bytes) -> None:
        """Receive, and keep for `reply`, until it ends so."""
        with trio.fail_after(DEADLINE):
            while not self.received.endswith(end):
                data = await self.stream.receive_some()
                assert data, "the connection ended"
                self.received += data

    async def say(self, *lines: str) -> str:
        """Send lines one by one; the reply to the last of them."""
        reply = ""
        for line in lines:
            await self.send(f"{line}\r\n".encode())
            reply = await self.reply()
        return reply

    async def codes(self, *lines: str) -> list[int]:
        """Send lines one by one: the codes of their replies, 0 for a connection that ended."""
        return [int((await self.say(line))[:3] or 0) for line in lines]

    async def closed(self) -> bool:
        """Whether there is nothing more to read but the end."""
        return await self.reply() == ""

    async def start_tls(self, context: ssl.SSLContext) -> None:
        self.stream = trio.SSLStream(
            self.stream, context, server_hostname="mx.test", https_compatible=True
        )
        await self.stream.do_handshake()

    async def mail(self, *recipients: str, body: bytes = b"Subject: x\r\n\r\nhi\r\n") -> str:
        """A whole transaction: the reply to its end."""
        commands = ["MAIL FROM:<a@b.test>", *(f"RCPT TO:<{name}>" for name in recipients)]
        for command in commands:
            reply = await self.say(command)
            if not reply.startswith("250"):
                return reply
        assert (await self.say("DATA")).startswith("354")
        await self.send(body + b".\r\n")
        return await self.reply()


@asynccontextmanager
async def open_dialog(
    address: tuple[str, int], *, greeted: bool = True, hello: str = "EHLO c.test"
) -> AsyncIterator[Dialog]:
    """A connection, by default behind the banner and the reply to EHLO."""
    dialog = await Dialog.open(address)
    try:
        if greeted:
            assert (await dialog.reply()).startswith("220")
            await dialog.say(hello)
        yield dialog
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await trio.aclose_forcefully(dialog.stream)


@asynccontextmanager
async def serve(
    directory: Path, *, strangers: bool = False, **settings: Any
) -> AsyncIterator[Engine]:
    """An engine that keeps what it takes in the inbox; `strangers`: clients may not relay."""
    defaults: dict[str, Any] = {"rabbitmq_inbox": "inbox"}
    if strangers:
        defaults |= {"smtp_relay_range": (), "smtp_local_domains": ("d.test",)}
    async with Engine(configure(directory, **{**defaults, **settings})) as engine:
        yield engine


async def inbox(engine: Engine, count: int = 1) -> list[Message]:
    """Take messages out of the inbox."""
    messages = []
    with trio.fail_after(DEADLINE):
        async with engine.consume("inbox") as leases:
            for _ in range(count):
                lease = await leases.receive()
                messages.append(lease.message)
                await engine.ack(lease)
    return messages


@dataclass
class Certificate:
    """A certificate for mx.test and 127.0.0.1, and a client's context that trusts it."""

    authority: trustme.CA
    chain: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> Certificate:
        certificate = cls(trustme.CA(), directory / "chain.pem", directory / "key.pem")
        certificate.issue()
        return certificate

    def issue(self) -> None:
        """Write a new one over it."""
        issued = self.authority.issue_cert("mx.test", "127.0.0.1")
        issued.private_key_pem.write_to_path(str(self.key))
        self.chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    @property
    def settings(self) -> dict[str, str]:
        return {"smtp_certificate": str(self.chain), "smtp_key": str(self.key)}

    @property
    def switches(self) -> list[str]:
        """The same for the command line."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]

    @property
    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


def lines_of(path: Path) -> list[str]:
    """The lines of a log without their dates."""
    return [line.partition("] ")[2] for line in path.read_text().splitlines()]


@asynccontextmanager
async def converse(
    directory: Path, *, greeted: bool = True, **settings: Any
) -> AsyncIterator[Dialog]:
    """An engine of its own, and one connection to it."""
    async with (
        serve(directory, **settings) as engine,
        open_dialog(engine.addresses[0], greeted=greeted) as dialog,
    ):
        yield dialog


FEW_DESCRIPTORS = 3
"""Fewer than any process has, but not fewer than a poll(2) of its own threads may name."""


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing: every call for a descriptor fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
