"""A DNS server of one signed zone for tests: it answers with signatures and denials.

The zone is signed in this process; `anchor` is the line for a file of trust anchors. It may not be
below ``test``, which validating resolvers answer themselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.rrset
import dns.zone
from cryptography.hazmat.primitives.asymmetric import ec

from tests.net.dns_server import DnsServer, open_dns_server

ORIGIN = dns.name.from_text("signed.example.")
HEAD = """
@ 300 IN SOA ns hostmaster 1 3600 600 86400 60
@ 300 IN NS ns
ns 300 IN A 127.0.0.1
"""
IN = dns.rdataclass.IN


class SignedZone:
    """The records of a zone with their signatures."""

    def __init__(
        self,
        text: str,
        *,
        lifetime: timedelta = timedelta(days=1),
        broken: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.zone = dns.zone.from_text(HEAD + text, ORIGIN, relativize=False)
        for name, data in broken.items():  # TLSA records, whatever their data
            rdata = dns.rdata.GenericRdata(IN, dns.rdatatype.TLSA, data)
            node = self.zone.find_node(dns.name.from_text(name, ORIGIN), create=True)
            node.replace_rdataset(dns.rdataset.from_rdata(300, rdata))
        key = ec.generate_private_key(ec.SECP256R1())
        dnskey = dns.dnssec.make_dnskey(key.public_key(), dns.dnssec.Algorithm.ECDSAP256SHA256, 257)
        now = datetime.now(UTC)
        dns.dnssec.sign_zone(
            self.zone,
            keys=[(key, dnskey)],
            inception=now - timedelta(days=2),
            expiration=now + lifetime,
        )
        self.anchor = f"{ORIGIN} 3600 IN DNSKEY {dnskey.to_text()}\n"
        self.stripped: set[str] = set()
        """Names whose signatures somebody on the way removes."""
        self.failing: set[str] = set()

    def answer(self, reply: dns.message.Message, name: dns.name.Name, kind: int) -> None:
        if name.to_text() in self.failing:
            reply.set_rcode(dns.rcode.SERVFAIL)
            return
        if not name.is_subdomain(ORIGIN):
            reply.set_rcode(dns.rcode.NXDOMAIN)
            return
        for _ in range(8):
            if self._add(reply.answer, name, kind):
                return
            node = self.zone.get_node(name)
            alias = node and node.get_rdataset(IN, dns.rdatatype.CNAME)
            if not alias:
                break
            self._add(reply.answer, name, dns.rdatatype.CNAME)
            name = alias[0].target
        self._add(reply.authority, ORIGIN, dns.rdatatype.SOA)
        if name in self.zone.nodes or any(n.is_subdomain(name) for n in self.zone.nodes):
            self._deny(reply, name)
        else:
            reply.set_rcode(dns.rcode.NXDOMAIN)
            self._deny(reply, name)
            parent = name.parent()
            while parent not in self.zone.nodes:
                parent = parent.parent()
            self._deny(reply, dns.name.from_text("*", parent))

    def _deny(self, reply: dns.message.Message, name: dns.name.Name) -> None:
        """The NSEC record at a name, or the one before where the name would be."""
        before = max((n for n in self._with_nsec() if n <= name), default=ORIGIN)
        if not any(rrset.name == before for rrset in reply.authority if rrset.rdtype == 47):
            self._add(reply.authority, before, dns.rdatatype.NSEC)

    def _with_nsec(self) -> Iterator[dns.name.Name]:
        for name, node in self.zone.nodes.items():
            if node.get_rdataset(IN, dns.rdatatype.NSEC):
                yield name

    def _add(self, section: list[dns.rrset.RRset], name: dns.name.Name, kind: int) -> bool:
        """Add records and their signatures; False if there are none."""
        node = self.zone.get_node(name)
        found = node and node.get_rdataset(IN, kind)
        if not found:
            return False
        section.append(dns.rrset.from_rdata_list(name, found.ttl, list(found)))
        signatures = node.get_rdataset(IN, dns.rdatatype.RRSIG, kind)
        if signatures and name.to_text() not in self.stripped:
            section.append(dns.rrset.from_rdata_list(name, signatures.ttl, list(signatures)))
        return True


class SigningServer(DnsServer):
    """Answers from a `SignedZone`."""

    signed: SignedZone

    def answer(self, wire: bytes, *, tcp: bool = False) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        kind = dns.rdatatype.to_text(question.rdtype)
        self.questions[question.name.to_text().rstrip(".").lower(), kind] += 1
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.RA
        name = dns.name.from_text(question.name.to_text().lower())
        self.signed.answer(reply, name, question.rdtype)
        return reply.to_wire(max_size=65535 if tcp else 1200, prefer_truncation=True)


@asynccontextmanager
async def open_signing_server(zone: SignedZone) -> AsyncIterator[SigningServer]:
    async with open_dns_server({}, kind=SigningServer) as server:
        assert isinstance(server, SigningServer)
        server.signed = zone
        yield server
