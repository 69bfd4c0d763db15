"""A DNS server for tests: it answers from a zone on a port of its own, by UDP and TCP."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rrset
import trio


class DnsServer:
    """`zone` maps a name and type to records, to an rcode, or to None, which is silence.

    A name that is there with another type has no such record, any other name does not exist.
    """

    def __init__(self, zone: dict[tuple[str, str], list[str] | int | None]) -> None:
        self.zone = zone
        self.ttl = 300
        self.truncate = False
        self.questions: Counter[tuple[str, str]] = Counter()
        self.tcp_questions = 0
        self.port = 0
        self.may_answer = trio.Event()
        self.may_answer.set()

    def answer(self, wire: bytes, *, tcp: bool = False) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        kind = dns.rdatatype.to_text(question.rdtype)
        name = question.name.to_text().rstrip(".").lower()
        self.questions[name, kind] += 1
        self.tcp_questions += tcp
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.RA
        if self.truncate and not tcp:
            reply.flags |= dns.flags.TC
            return reply.to_wire()
        for _ in range(20):
            records = self.zone.get((name, kind), [])
            if records is None:
                return None
            if isinstance(records, int):
                reply.set_rcode(dns.rcode.Rcode(records))
                break
            alias = self.zone.get((name, "CNAME"))
            if records or not isinstance(alias, list):
                if records:
                    reply.answer.append(
                        dns.rrset.from_text(name + ".", self.ttl, "IN", kind, *records)
                    )
                elif name not in {known for known, _ in self.zone}:
                    reply.set_rcode(dns.rcode.NXDOMAIN)
                break
            reply.answer.append(dns.rrset.from_text(name + ".", self.ttl, "IN", "CNAME", *alias))
            name = alias[0].rstrip(".").lower()
            if (name, "CUT") in self.zone:
                break  # as servers do that are not told about the alias's zone
        return reply.to_wire()

    async def serve_udp(self, sock: trio.socket.SocketType) -> None:
        while True:
            wire, client = await sock.recvfrom(4096)
            await self.may_answer.wait()
            if (reply := self.answer(wire)) is not None:
                await sock.sendto(reply, client)

    async def serve_tcp(self, stream: trio.SocketStream) -> None:
        async with stream:
            wire = b""
            while data := await stream.receive_some():
                wire += data
                if len(wire) >= 2 and len(wire) >= 2 + int.from_bytes(wire[:2], "big"):
                    reply = self.answer(wire[2:], tcp=True)
                    if reply is not None:
                        await stream.send_all(len(reply).to_bytes(2, "big") + reply)
                    wire = b""


@asynccontextmanager
async def open_dns_server(
    zone: dict[tuple[str, str], list[str] | int | None],
) -> AsyncIterator[DnsServer]:
    server = DnsServer(zone)
    while True:
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        server.port = udp.getsockname()[1]
        try:
            listeners = await trio.open_tcp_listeners(server.port, host="127.0.0.1")
            break
        except OSError:
            udp.close()  # The port is free for UDP only.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_udp, udp)
        nursery.start_soon(trio.serve_listeners, server.serve_tcp, listeners)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
            udp.close()
