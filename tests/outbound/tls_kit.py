"""TLS peers on loopback, with real certificates, for the tests of deliveries."""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio
import trustme

from mailerq.config import Config
from mailerq.live import Live
from mailerq.message import Message
from mailerq.net.dane import Standing
from mailerq.net.https import Https
from mailerq.net.resolver import Host, NoHosts, Resolver
from mailerq.outbound.tls_reports import TlsReports
from mailerq.rules.security import DomainPolicy, StsPolicy, TlsaSet, TlsFailure
from mailerq.store.tls_counts import Session, TlsCounts
from tests.outbound.kit import Mail, Peer, PeerConnection, Script, StubResolver

NAME = "mx.d.test"


class Certificates:
    """Two authorities, of which one is trusted, and contexts of servers."""

    def __init__(self, directory: Path) -> None:
        self.trusted, self.other = trustme.CA(), trustme.CA()
        self.ca_file = str(directory / "ca.pem")
        self.trusted.cert_pem.write_to_path(self.ca_file)

    def server(
        self, *names: str, trusted: bool = True, expired: bool = False, client_ca: bool = False
    ) -> ssl.SSLContext:
        """The context of a server with a certificate for these names."""
        authority = self.trusted if trusted else self.other
        end = datetime.now(UTC) - timedelta(days=1) if expired else None
        begin = datetime.now(UTC) - timedelta(days=3) if expired else None
        certificate = authority.issue_cert(*(names or (NAME,)), not_before=begin, not_after=end)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        if client_ca:
            self.trusted.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def starttls(
    context: ssl.SSLContext,
    *,
    offers: Sequence[str] = ("PIPELINING",),
    inside: Sequence[str] = ("PIPELINING",),
    reply: str = "220 go\r\n",
) -> Script:
    """A peer that offers STARTTLS, and takes mail inside TLS and in clear."""

    async def script(peer: PeerConnection) -> None:
        await peer.send("220 mx.test ESMTP\r\n")
        await peer.line()
        lines = "".join(f"250-{name}\r\n" for name in offers)
        await peer.send(f"250-mx.test\r\n{lines}250 STARTTLS\r\n")
        line = await peer.line()
        if line != "STARTTLS":
            await _clear(peer, line)
            return
        await peer.send(reply)
        if not reply.startswith("220"):
            return
        try:
            await secure(peer, context)
        except (trio.BrokenResourceError, ssl.SSLError):
            return
        await peer.line()
        lines = "".join(f"250-{name}\r\n" for name in inside)
        await peer.send(f"250-mx.test\r\n{lines}250 HELP\r\n")
        await peer.talk()

    return script


async def secure(peer: PeerConnection, context: ssl.SSLContext) -> None:
    """Do the handshake of the peer."""
    stream = trio.SSLStream(peer.stream, context, server_side=True, https_compatible=True)
    await stream.do_handshake()
    peer.stream = stream
    peer.peer.commands.append(f"({stream.version()}{' resumed' if stream.session_reused else ''})")
    if (shown := stream.getpeercert()) is not None and shown:
        peer.peer.commands.append(f"(client {shown['subject']})")


async def _clear(peer: PeerConnection, line: str) -> None:
    """Go on in clear with a client that has already sent a line."""
    peer._buffer = line.encode() + b"\r\n" + peer._buffer
    peer.peer.commands.pop()
    await peer.talk()


def breaks(how: bytes | None) -> Script:
    """A peer that offers STARTTLS, says 220, and sends something else, or nothing and resets."""

    async def script(peer: PeerConnection) -> None:
        await peer.send("220 mx.test ESMTP\r\n")
        await peer.line()
        await peer.send("250-mx.test\r\n250-PIPELINING\r\n250 STARTTLS\r\n")
        line = await peer.line()
        if line != "STARTTLS":
            await _clear(peer, line)
            return
        await peer.send("220 go\r\n" if how is None else b"220 go\r\n")
        if how is not None:
            await peer.stream.receive_some()  # the ClientHello
            await peer.send(how)

    return script


class NamedHosts(StubResolver):
    """Domains with hosts of given names, all at one address, or each at one of its own."""

    def __init__(
        self, address: str | Mapping[str, str] = "127.0.0.1", **domains: list[str]
    ) -> None:
        super().__init__()
        self.names = {name.replace("_", "."): hosts for name, hosts in domains.items()}
        self.addresses = address

    def address(self, name: str) -> str:
        return self.addresses if isinstance(self.addresses, str) else self.addresses[name]

    async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
        await trio.lowlevel.checkpoint()
        found = self.names.get(domain)
        if found is None:
            return NoHosts(f"{domain} does not exist")
        return tuple(Host(name, self.address(name), number) for number, name in enumerate(found))

    async def host(self, name: str, *, trusted: bool) -> tuple[Host, ...] | NoHosts:
        return (Host(name, self.address(name)),)


class TwoPeers:
    """Hosts at addresses of their own: what each hears is kept apart. `script` plays them all."""

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self.scripts = scripts
        self._peers: dict[str, Peer] = {}

    def at(self, address: str) -> Peer:
        return self._peers[address]

    def mails(self, address: str) -> list[Mail]:
        """What a host has got; nothing if nobody has connected."""
        return self._peers[address].mails if address in self._peers else []

    async def script(self, peer: PeerConnection) -> None:
        assert isinstance(peer.stream, trio.SocketStream)
        address = peer.stream.socket.getsockname()[0]
        own = self._peers.setdefault(address, Peer(peer.peer.queues))
        own.connections += 1
        await self.scripts[address](PeerConnection(own, peer.stream, own.connections))


@dataclass
class Counts:
    """Real counts for TLS reports, in a file."""

    reports: TlsReports
    file: TlsCounts

    seen: Counter[Session] = field(default_factory=Counter)

    async def new_rows(self, domain: str) -> list[Session]:
        """What was counted of a domain since the last call; successes first."""
        await self.reports.flush()
        found = Counter[Session]()
        for day in self.file.days():
            for row, count in self.file.sessions(day, domain):
                found[row] += count
        new, self.seen = found - self.seen, found
        return sorted(new.elements(), key=lambda row: row[3:])


@contextmanager
def open_counts(directory: Path) -> Iterator[Counts]:
    async def publish(message: Message) -> None:
        raise AssertionError("it is not the time of reports")

    config = Config(hostname="me.test", tls_report=True, tls_report_from="tls@me.test")
    resolver = Resolver(config)
    with closing(TlsCounts(str(directory))) as file:
        yield Counts(
            TlsReports(Live(config), resolver, Https(resolver.addresses), file, publish), file
        )


@dataclass
class Recorded:
    """A recorder that keeps what it is told."""

    seen: list[tuple[str, str, str]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    ended: list[tuple[str, str]] = field(default_factory=list)

    def handshake(
        self,
        domain: str,
        policy: DomainPolicy,
        records: TlsaSet | None,
        host: str,
        remote_ip: str,
        local_ip: str,
        helo: str,
        failure: TlsFailure | None,
    ) -> None:
        self.seen.append((domain, host, "" if failure is None else str(failure.reason)))
        self.told.append(
            {"policy": policy, "records": records, "ip": remote_ip, "local": local_ip,
             "helo": helo, "failure": failure}
        )  # fmt: skip

    def report_ended(self, address: str, problem: str) -> None:
        self.ended.append((address, problem))


@dataclass
class FixedSts:
    """MTA-STS policies of some domains; an exception is raised."""

    policies: dict[str, StsPolicy | Exception]

    async def find(self, domain: str) -> StsPolicy | None:
        await trio.lowlevel.checkpoint()
        found = self.policies.get(domain)
        if isinstance(found, Exception):
            raise found
        return found


@dataclass
class FixedDane:
    """TLSA records of some hosts; `matches` says which of the sets a chain matches."""

    secure: set[str]
    records: dict[str, TlsaSet | Exception] = field(default_factory=dict)
    failure: TlsFailure | None = None
    verified: list[list[bytes]] = field(default_factory=list)

    async def is_secure(self, domain: str) -> bool:
        await trio.lowlevel.checkpoint()
        return domain in self.secure

    async def is_proved(self, host: str) -> bool:
        return await self.is_secure(host)

    async def names(self, domain: str) -> tuple[str, ...]:
        return ()

    def standing(self) -> Standing:
        return Standing(True, "DANE is in force")

    async def tlsa(self, host: str, port: int, names: Sequence[str] = ()) -> TlsaSet | None:
        await trio.lowlevel.checkpoint()
        found = self.records.get(host)
        if isinstance(found, Exception):
            raise found
        return found

    def verify(self, records: TlsaSet, chain: Sequence[bytes], *, now: float) -> TlsFailure | None:
        self.verified.append(list(chain))
        return self.failure
