"""Ask name servers, and know whether DNSSEC proves the answer.

Theory of operation
-------------------
An answer is *secure* if a validating resolver has proved it, a denial as well as records. The
resolver says so with the AD bit, and only to a query that has the bit (RFC 6840, section 5.7).
Anybody on the way could set it, so the bit counts only if all name servers are on loopback, or if
the operator trusts the way to them (`dns-trust-ad`). `mailerq.net.unbound` validates in this
process instead and trusts no server.

dnspython takes no answer with a record that is malformed. Of TLSA records such ones have to be
passed over, so these are asked for here, by TCP, because sets of them can be large.

An answer that is *insecure* comes from a zone without signatures, or from a resolver that does not
validate. An answer whose signatures are wrong, or missing though the zone has some, is none:
resolvers say SERVFAIL.

dnspython is imported with the first client: a process that only injects a mail never needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from mailerq.address import is_loopback
from mailerq.config import Config

if TYPE_CHECKING:
    import dns.asyncresolver
    import dns.message
    import dns.resolver

__all__ = [
    "MAX_ALIASES",
    "MAX_ANSWER",
    "MAX_TTL",
    "Answer",
    "DnsClient",
    "NoAnswer",
    "Stub",
    "answer_in",
]

MAX_TTL: Final = 3600.0
"""Maximum cache time of an answer, so that a mistake does not stay for long."""

MAX_ALIASES: Final = 8
"""CNAME records followed."""

LENIENT: Final = frozenset({"TLSA"})
"""Kinds of which malformed records do not spoil an answer; it has `MALFORMED` instead."""

MALFORMED: Final = b"malformed"

MAX_ANSWER: Final = 1 << 14
"""Bytes of an answer that is read; those of 64 KiB would stop the loop for a tenth of a second."""

MAX_REASON: Final = 200
"""Characters of a reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The records of one kind at a name; none if it has no such records.

    `name` is where CNAME records led to: in lower case, without the final dot. `ttl` is in seconds,
    at most `MAX_TTL`. `nonexistent`: there is no record of any kind.
    """

    records: tuple[Any, ...]
    ttl: float
    secure: bool
    name: str
    nonexistent: bool = False


class NoAnswer(Exception):
    """No answer: a timeout, a refusal, a broken reply, or one that DNSSEC proves to be wrong."""


class DnsClient(Protocol):
    """Asks name servers; belongs to one trio loop."""

    def untrusted(self) -> str:
        """Why no answer is ever secure; empty if answers can be. Raises `NoAnswer`."""

    async def ask(self, name: str, kind: str) -> Answer:
        """The records of a name, through CNAME records. Raises `NoAnswer`."""

    def close(self) -> None:
        """Free what the client keeps, after the lookups under way."""


class Stub:
    """Asks the resolvers in `dns-servers`, or those of the system."""

    def __init__(self, config: Config) -> None:
        self._servers = config.dns_servers
        self._timeout = config.dns_timeout
        self._lifetime = config.dns_timeout * config.dns_attempts
        self._wants_proof = config.dane
        self._trust_ad = config.dns_trust_ad
        self._resolver: dns.asyncresolver.Resolver | None = None
        self._trusted = False

    def untrusted(self) -> str:
        """See `DnsClient.untrusted`."""
        import dns.exception

        if not self._trust_ad:
            try:
                far = self._far_server(self._open())
            except dns.exception.DNSException as error:
                raise NoAnswer(_reason(error)) from None
            if far is not None:
                return f"the DNS server {far} is not on this host, so answers can be forged"
        return ""

    async def ask(self, name: str, kind: str) -> Answer:
        """See `DnsClient.ask`."""
        import dns.exception
        import dns.flags
        import dns.resolver

        if kind in LENIENT:
            return await self._ask_leniently(name, kind)
        ttl, secure, target = MAX_TTL, True, name
        try:
            resolver = self._open()
            for _ in range(MAX_ALIASES):
                found = await resolver.resolve(target, kind, search=False, raise_on_no_answer=False)
                ttl = min(ttl, found.chaining_result.minimum_ttl)
                secure = secure and self._trusted and bool(found.response.flags & dns.flags.AD)
                if found.chaining_result.cnames:
                    target = found.canonical_name.to_text(omit_final_dot=True).lower()
                    if found.rrset is None:
                        continue  # as servers do that are not told about the alias's zone
                return Answer(tuple(found.rrset or ()), ttl, secure, target)
        except dns.resolver.NXDOMAIN as error:
            secure = secure and self._trusted and _says_secure(error)
            return Answer((), ttl, secure, target, nonexistent=True)
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise NoAnswer(f"{name}: {_reason(error)}") from None
        raise NoAnswer(f"{name}: more than {MAX_ALIASES} aliases")

    def close(self) -> None:
        """See `DnsClient.close`."""

    async def _ask_leniently(self, name: str, kind: str) -> Answer:
        """The answer with its malformed records. Raises `NoAnswer`."""
        ttl, secure, target = MAX_TTL, True, name
        for _ in range(MAX_ALIASES):
            asked = target
            with trio.move_on_after(self._lifetime) as scope:
                answer = await self._ask_any(asked, kind)
            if scope.cancelled_caught:
                raise NoAnswer(f"{name}: no answer in time")
            ttl, secure = min(ttl, answer.ttl), secure and answer.secure
            target = answer.name
            if answer.records or answer.nonexistent or target == asked:
                return Answer(answer.records, ttl, secure, target, answer.nonexistent)
        raise NoAnswer(f"{name}: more than {MAX_ALIASES} aliases")

    async def _ask_any(self, name: str, kind: str) -> Answer:
        """The answer of the first server that has one. Raises `NoAnswer`."""
        import dns.exception
        import dns.flags
        import dns.message

        problem: Exception | None = None
        try:
            resolver = self._open()
            query = dns.message.make_query(name, kind, flags=resolver.flags or dns.flags.RD)
            servers = [_place(server, resolver.port) for server in resolver.nameservers]
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise NoAnswer(f"{name}: {_reason(error)}") from None
        for server in filter(None, servers):
            try:
                with trio.fail_after(self._timeout):
                    wire = await _exchange(query.to_wire(), *server)
                message = dns.message.from_wire(wire, continue_on_error=True)
                if not query.is_response(message):
                    raise NoAnswer(f"{name}: the answer is to another question")
                secure = self._trusted and bool(message.flags & dns.flags.AD)
                return answer_in(message, name, secure=secure)
            except trio.TooSlowError:
                problem = NoAnswer(f"{name}: no answer in time")
            except NoAnswer as error:
                problem = error
            except (dns.exception.DNSException, OSError, ValueError) as error:
                problem = NoAnswer(f"{name}: {_reason(error)}")
        raise problem or NoAnswer(f"{name}: no server can be asked by TCP")

    def _open(self) -> dns.asyncresolver.Resolver:
        if self._resolver is not None:
            return self._resolver
        import dns.asyncresolver
        import dns.flags
        import dns.nameserver

        resolver = dns.asyncresolver.Resolver(configure=not self._servers)
        if self._servers:
            resolver.nameservers = [
                dns.nameserver.Do53Nameserver(server.address, server.port)
                for server in self._servers
            ]
        resolver.timeout = self._timeout
        resolver.lifetime = self._lifetime
        if self._wants_proof and (self._trust_ad or self._far_server(resolver) is None):
            self._trusted = True
            resolver.flags = dns.flags.RD | dns.flags.AD
        self._resolver = resolver
        return resolver

    def _far_server(self, resolver: dns.asyncresolver.Resolver) -> str | None:
        """The first server that is not on loopback."""
        for server in resolver.nameservers:
            address = server if isinstance(server, str) else server.answer_nameserver()
            if not is_loopback(address):
                return address
        return None


def answer_in(message: dns.message.Message, name: str, *, secure: bool) -> Answer:
    """The answer in a message of a server that follows CNAME records itself.

    Parts of the message that could not be read are one malformed record. Raises `NoAnswer` for an
    rcode that is none.
    """
    import dns.exception
    import dns.message
    import dns.rcode

    if not isinstance(message, dns.message.QueryMessage):
        raise NoAnswer(f"{name}: the reply is no answer")
    rcode = message.rcode()
    if rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        raise NoAnswer(f"{name}: the name servers say {dns.rcode.to_text(rcode)}")
    try:
        chain = message.resolve_chaining()
    except dns.exception.DNSException as error:
        raise NoAnswer(f"{name}: {_reason(error)}") from None
    malformed = [MALFORMED] if message.errors else []
    return Answer(
        (*(chain.answer or ()), *malformed),
        min(MAX_TTL, chain.minimum_ttl),
        secure,
        chain.canonical_name.to_text(omit_final_dot=True).lower(),
        nonexistent=rcode == dns.rcode.NXDOMAIN,
    )


def _place(server: Any, port: int) -> tuple[str, int] | None:
    """The address and port of a server; None if it is asked through HTTPS."""
    if isinstance(server, str):
        return None if "/" in server else (server, port)
    return getattr(server, "address", None) and (server.address, server.port)


async def _exchange(query: bytes, address: str, port: int) -> bytes:
    """Ask a server by TCP (RFC 1035, section 4.2.2). Raises OSError, also for a huge answer."""
    async with await trio.open_tcp_stream(address, port) as stream:
        await stream.send_all(len(query).to_bytes(2, "big") + query)
        received = b""
        while len(received) < 2 or len(received) < 2 + int.from_bytes(received[:2], "big"):
            more = await stream.receive_some()
            if not more:
                raise OSError("the answer ends too early")
            received += more
            if len(received) > 2 + MAX_ANSWER:
                raise OSError(f"the answer has more than {MAX_ANSWER} bytes")
    return received[2 : 2 + int.from_bytes(received[:2], "big")]


def _says_secure(error: dns.resolver.NXDOMAIN) -> bool:
    import dns.flags

    responses = error.kwargs["responses"].values()
    return all(bool(response.flags & dns.flags.AD) for response in responses)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
