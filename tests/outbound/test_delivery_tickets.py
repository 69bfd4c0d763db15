"""Session tickets of hostile peers: little is kept of them, and they prove nothing new."""

from __future__ import annotations

from typing import Any, Final

import pytest

from mailerq.net import client_tls
from mailerq.net.client_tls import MAX_TICKET_BYTES, TICKET_SECONDS
from tests.engine.lag_kit import Meter, meter, no_turn_above
from tests.outbound.kit import open_bench
from tests.outbound.test_delivery_tls import settings
from tests.outbound.tickets_kit import TicketPeer, ticket
from tests.outbound.tls_kit import NAME, Certificates, NamedHosts, starttls

LONGEST_TURN: Final = 0.05
"""Seconds of one turn of the loop."""

RESUMED: Final = "(TLSv1.3 resumed)"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def one_mail(certificates: Certificates, **more: Any) -> dict[str, Any]:
    """Settings with a connection for each mail."""
    return settings(certificates, connection_maxmessages=1, **more)


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize(
    ("messages", "kept"),
    [
        ([], 0),
        ([ticket()], 1),
        ([ticket(size=1)], 1),
        ([ticket(size=8000)], 1),
        ([ticket(size=MAX_TICKET_BYTES)], 0),
        ([ticket(size=60_000)], 0),
        ([ticket()] * 20, 1),
        ([ticket(size=60_000), ticket()], 0),
        ([ticket(lifetime=2**32 - 1)], 1),
        ([ticket(lifetime=0)], 1),
    ],
    ids=[
        "none", "one", "tiny", "long", "too long", "huge", "many", "huge, then small", "for ever",
        "for no time",
    ],
)  # fmt: skip
async def test_only_tickets_of_a_usual_size_are_kept_and_mail_goes_with_any(
    certificates: Certificates, messages: list[bytes], kept: int
) -> Meter:
    """The peer does not know its tickets afterwards, so the next handshake is a whole one."""
    peer = TicketPeer(certificates.trusted, NAME, messages)
    config = one_mail(certificates, connection_secure="verified")
    async with open_bench(peer.script, peer.script, **config) as bench:
        with meter() as turns:
            for number in (1, 2):
                bench.send()
                results = await bench.results(count=number)
                assert results[-1]["certificate"]["verified"] is True
                await bench.until(lambda _: not bench.peer.open)
                assert len(bench.dispatcher.tls.tickets) == kept
        assert peer.handshakes == 2
    return turns


GOOD: Final = ticket()


@pytest.mark.parametrize(
    "message",
    [
        GOOD[:-1],
        GOOD + b"x",
        GOOD[:4] + b"\0" * 9 + b"\0\0\0\0",
        ticket(size=0),
        GOOD[:12] + b"\xff" + GOOD[13:],
        b"\x04\xff\xff\xff" + GOOD[4:],
        b"\x04\x00\x00\x00",
    ],
    ids=["cut", "longer", "empty parts", "no ticket", "long nonce", "endless", "empty"],
)
async def test_a_malformed_ticket_ends_the_connection_and_nothing_else(
    certificates: Certificates, message: bytes
) -> None:
    """The next host is tried, and no ticket of the connection is kept (RFC 8446, section 6.2)."""
    bad = TicketPeer(certificates.trusted, "mx0.d.test", [message])
    config = one_mail(certificates, connection_secure="verified", smtp_out_timeout=1.0)
    config["resolver"] = NamedHosts(d_test=["mx0.d.test", NAME])
    good = starttls(certificates.server())
    async with open_bench(bad.script, good, **config) as bench:
        bench.send()
        (result,) = await bench.results()
        assert result["certificate"]["altnames"] == [NAME]
        assert bad.handshakes == 1
        await bench.until(lambda _: not bench.peer.open)
        assert "mx0.d.test" not in str(list(bench.dispatcher.tls.tickets._kept))


async def test_a_peer_that_sends_tickets_without_end_is_left(certificates: Certificates) -> None:
    flood = certificates.server("mx0.d.test")
    flood.num_tickets = 20_000
    config = one_mail(certificates, connection_secure="verified")
    config["resolver"] = NamedHosts(d_test=["mx0.d.test", NAME])
    async with open_bench(starttls(flood), starttls(certificates.server()), **config) as bench:
        bench.send()
        (result,) = await bench.results()
        assert result["certificate"]["altnames"] == [NAME]
        assert "mx0.d.test" not in str(list(bench.dispatcher.tls.tickets._kept))


@pytest.mark.parametrize("kind", ["self-signed", "wrong name", "expired"])
async def test_another_certificate_is_checked_whatever_the_ticket_has_proved(
    certificates: Certificates, kind: str
) -> None:
    """The peer does not resume: it shows another certificate."""
    bad = {
        "self-signed": certificates.server(trusted=False),
        "wrong name": certificates.server("mx.e.test"),
        "expired": certificates.server(expired=True),
    }[kind]
    good = certificates.server()
    config = one_mail(certificates, connection_secure="verified")
    scripts = [starttls(good), starttls(good), starttls(bad), starttls(bad)]
    async with open_bench(*scripts, **config) as bench:
        for number in (1, 2):
            bench.send()
            await bench.results(count=number)
        assert bench.peer.commands.count(RESUMED) == 1
        bench.send()
        assert (await bench.retried())["type"] == "tls"
        assert len(bench.peer.mails) == 2


async def test_a_ticket_serves_no_other_host_of_the_same_peer(certificates: Certificates) -> None:
    """One server, one key for tickets, two names: the certificate is good for one only."""
    good = starttls(certificates.server())
    config = one_mail(certificates, connection_secure="verified")
    config["resolver"] = NamedHosts(d_test=[NAME], e_test=["mx.e.test"])
    async with open_bench(*[good] * 5, **config) as bench:
        bench.send("c@d.test")
        await bench.results()
        bench.send("c@e.test")
        assert (await bench.retried())["type"] == "tls"
        bench.send("c@d.test")
        await bench.results(count=2)
        assert bench.peer.commands.count(RESUMED) == 1
        assert {mail.recipient for mail in bench.peer.mails} == {"c@d.test"}


async def test_sessions_that_resume_each_other_prove_nothing_for_longer_than_one(
    certificates: Certificates,
) -> None:
    """Each resumed session brings a new ticket: the time still counts from the certificate."""
    good = starttls(certificates.server())
    config = one_mail(certificates, connection_secure="verified")
    async with open_bench(*[good] * 9, **config) as bench:
        now = 0.0
        bench.dispatcher.tls.tickets._clock = lambda: now
        step = TICKET_SECONDS * 0.4
        for number in range(1, 7):
            bench.send()
            await bench.results(count=number)
            await bench.until(lambda _: not bench.peer.open)
            now += step
        seen = [line for line in bench.peer.commands if line.startswith("(TLS")]
        assert seen == ["(TLSv1.3)", RESUMED, RESUMED] * 2
        assert client_tls.MAX_TICKETS >= len(bench.dispatcher.tls.tickets) == 1
