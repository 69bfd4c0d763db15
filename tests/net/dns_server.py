"""A DNS server for tests: it answers from a zone on a port of its own, by UDP and TCP.

A zone maps a name and type to records, to an rcode, or to None, which is silence. A dict knows all
its names: one that is there with another type has no such record, any other does not exist. A
function has any number of names, and answers `NXDOMAIN` for those that do not exist.

A server with a function `secure` is a validating resolver: it says which names are in signed zones.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import trio

from mailerq.address import host_port

NXDOMAIN: Final = int(dns.rcode.NXDOMAIN)

Records = list[str] | int | None
Table = dict[tuple[str, str], Records]
Zone = Table | Callable[[str, str], Records]


class DnsServer:
    """Answers at `address`, a value for `dns-servers`, and counts `questions`."""

    def __init__(self, zone: Zone, host: str = "127.0.0.1") -> None:
        self.zone: Any = zone
        self.host = host
        self.ttl = 300
        self.truncate = False
        self.secure: Callable[[str, str], bool] = lambda name, kind: False
        self.questions: Counter[tuple[str, str]] = Counter()
        self.tcp_questions = 0
        self.port = 0
        self.may_answer = trio.Event()
        self.may_answer.set()

    @property
    def address(self) -> str:
        return host_port(self.host, self.port)

    def records(self, name: str, kind: str) -> Records:
        if callable(self.zone):
            made: Records = self.zone(name, kind)
            return made
        records: Records = self.zone.get((name, kind), [])
        if records == [] and (name, "CNAME") not in self.zone:
            return [] if name in {known for known, _ in self.zone} else NXDOMAIN
        return records

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
        secure = bool(query.flags & dns.flags.AD)  # otherwise the bit is not wanted
        for _ in range(20):
            records = self.records(name, kind)
            secure = secure and self.secure(name, kind)
            if records is None:
                return None
            if isinstance(records, int):
                reply.set_rcode(dns.rcode.Rcode(records))
                break
            if records:
                reply.answer.append(self._rrset(name, kind, records))
                break
            alias = self.records(name, "CNAME")
            if not isinstance(alias, list) or not alias:
                break
            reply.answer.append(dns.rrset.from_text(name + ".", self.ttl, "IN", "CNAME", *alias))
            name = alias[0].rstrip(".").lower()
            if isinstance(self.zone, dict) and (name, "CUT") in self.zone:
                break  # as servers do that are not told about the alias's zone
        if secure and reply.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            reply.flags |= dns.flags.AD
        return reply.to_wire()

    def _rrset(self, name: str, kind: str, records: list[str]) -> dns.rrset.RRset:
        r"""Records from text; ``\# length hex`` is sent as it is, whatever it is."""
        if not records[0].startswith(r"\#"):
            return dns.rrset.from_text(name + ".", self.ttl, "IN", kind, *records)
        number = dns.rdatatype.from_text(kind)
        found = dns.rrset.RRset(dns.name.from_text(name), dns.rdataclass.IN, number)
        found.ttl = self.ttl
        for record in records:
            data = bytes.fromhex(record.split(" ")[2])
            found.add(dns.rdata.GenericRdata(dns.rdataclass.IN, number, data))
        return found

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
    zone: Zone, host: str = "127.0.0.1", kind: type[DnsServer] = DnsServer
) -> AsyncIterator[DnsServer]:
    server = kind(zone, host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        udp = trio.socket.socket(family, socket.SOCK_DGRAM)
        await udp.bind((host, 0))
        server.port = udp.getsockname()[1]
        try:
            listeners = await trio.open_tcp_listeners(server.port, host=host)
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
