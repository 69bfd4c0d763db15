"""Two hosts of a domain: if TLS of the first fails, the mail goes to the second, and in TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from mailerq.outbound.policies import Policies
from mailerq.rules.security import Reason, StsMode, StsPolicy
from tests.net.certificate_kit import common_name_context
from tests.net.dns_server import Records
from tests.outbound.kit import Bench, PeerConnection, Script, open_bench
from tests.outbound.test_delivery_dane import Chain, make, open_world
from tests.outbound.tls_kit import (
    NAME,
    Certificates,
    FixedSts,
    NamedHosts,
    Recorded,
    TwoPeers,
    breaks,
    open_counts,
    starttls,
)

FIRST: Final = "mx0.d.test"
BAD, GOOD = "127.0.0.1", "127.0.0.2"
HOSTS: Final = {FIRST: BAD, NAME: GOOD}

FAULTS: Final = {
    "self-signed": Reason.NOT_TRUSTED,
    "wrong name": Reason.HOST_MISMATCH,
    "common name": Reason.HOST_MISMATCH,
    "expired": Reason.EXPIRED,
    "no starttls": Reason.NO_STARTTLS,
    "454": Reason.NO_STARTTLS,
    "reset": Reason.FAILURE,
    "garbage": Reason.FAILURE,
}
NO_TLS: Final = ("no starttls", "454", "reset", "garbage")
"""Faults that a host has without a look at its certificate."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def faulty(certificates: Certificates, fault: str) -> Script:
    return {
        "self-signed": lambda: starttls(certificates.server(FIRST, trusted=False)),
        "wrong name": lambda: starttls(certificates.server("mx.e.test")),
        "common name": lambda: starttls(common_name_context(certificates.trusted, FIRST)),
        "expired": lambda: starttls(certificates.server(FIRST, expired=True)),
        "no starttls": lambda: PeerConnection.serve,
        "454": lambda: starttls(certificates.server(FIRST), reply="454 4.7.0 not now\r\n"),
        "reset": lambda: breaks(None),
        "garbage": lambda: breaks(b"250 this is no TLS\r\n"),
    }[fault]()


def check_peers(peers: TwoPeers) -> None:
    """The first host has seen no mail, and the second one has seen it in TLS only."""
    bad, good = peers.at(BAD), peers.at(GOOD)
    assert bad.connections == good.connections == 1
    assert bad.mails == []
    told = [line.partition(" ")[0] for line in bad.commands if not line.startswith("(")]
    assert set(told) <= {"EHLO", "STARTTLS", "QUIT", ""}
    (mail,) = good.mails
    assert mail.body == b"hi\r\n"
    assert [line.partition(" ")[0] for line in good.commands[:4]] == [
        "EHLO", "STARTTLS", "(TLSv1.3)", "EHLO",
    ]  # fmt: skip


async def deliver(bench: Bench, peers: TwoPeers) -> None:
    """One mail goes to the second host, inside TLS, and never elsewhere."""
    bench.send()
    (result,) = await bench.results()
    assert (result["type"], result["to"]) == ("success", GOOD)
    assert result["cipher"]["version"] == "TLSv1.3"
    check_peers(peers)


@pytest.mark.parametrize(
    ("demand", "fault"),
    [
        *[(demand, fault) for demand in ("verified", "enforce") for fault in FAULTS],
        *[("required", fault) for fault in NO_TLS],  # any certificate will do
    ],
)
async def test_the_next_host_gets_the_mail_if_tls_of_the_first_is_not_as_demanded(
    certificates: Certificates, tmp_path: Path, demand: str, fault: str
) -> None:
    sts = FixedSts({})
    if demand == "enforce":
        sts.policies["d.test"] = StsPolicy("d.test", "1", StsMode.ENFORCE, ("*.d.test",))
    kind = "sts" if demand == "enforce" else "no-policy-found"
    peers = TwoPeers({BAD: faulty(certificates, fault), GOOD: starttls(certificates.server())})
    config: dict[str, Any] = {
        "resolver": NamedHosts(HOSTS, d_test=[FIRST, NAME]),
        "connection_ca_file": certificates.ca_file,
    }
    if demand != "enforce":
        config["connection_secure"] = demand
    with open_counts(tmp_path) as counts:
        policies = Policies(sts=sts, recorder=counts.reports)
        world = open_bench(*[peers.script] * 3, address="0.0.0.0", policies=policies, **config)
        async with world as bench:
            await deliver(bench, peers)
        rows = await counts.new_rows("d.test")
    assert [(row.kind, row.result, row.host, row.remote_ip, row.local_ip) for row in rows] == [
        (kind, "", "", "", ""),
        (kind, FAULTS[fault].value, FIRST, BAD, "127.0.0.1"),
    ]


@pytest.fixture(scope="module")
def chains() -> dict[str, Chain]:
    return {"first": make(FIRST), "second": make(NAME)}


DANE_FAULTS: Final = {
    "ee differs": Reason.FAILURE,
    "ta differs": Reason.NOT_TRUSTED,
    "ta, wrong name": Reason.HOST_MISMATCH,
    "no starttls": Reason.NO_STARTTLS,
    "454": Reason.NO_STARTTLS,
    "reset": Reason.FAILURE,
}


@pytest.mark.parametrize("fault", DANE_FAULTS)
async def test_the_next_host_gets_the_mail_if_the_records_of_the_first_do_not_match(
    certificates: Certificates, tmp_path: Path, chains: dict[str, Chain], fault: str
) -> None:
    """The records of each host are its own: those of the second do not help the first."""
    first, second = chains["first"], chains["second"]
    script, record = {
        "ee differs": (starttls(first.context), second.tlsa(3)),
        "ta differs": (starttls(first.context), second.tlsa(2)),
        "ta, wrong name": (starttls(second.context), second.tlsa(2)),
        "no starttls": (PeerConnection.serve, first.tlsa(3)),
        "454": (starttls(first.context, reply="454 4.7.0 not now\r\n"), first.tlsa(3)),
        "reset": (breaks(None), first.tlsa(3)),
    }[fault]
    peers = TwoPeers({BAD: script, GOOD: starttls(second.context)})
    more: dict[tuple[str, str], Records] = {
        ("d.test", "MX"): [f"5 {FIRST}.", f"10 {NAME}."],
        (FIRST, "A"): [BAD],
        (NAME, "A"): [GOOD],
        (f"_tcp.{FIRST}", "TLSA"): [record],
    }
    with open_counts(tmp_path) as counts:
        world = open_world(
            [second.tlsa(3)], *[peers.script] * 3, more=more, recorder=counts.reports,
            address="0.0.0.0",
        )  # fmt: skip
        async with world as (bench, _, _):
            await deliver(bench, peers)
            (result,) = await bench.results()
            assert result["certificate"]["verified"] is True
        rows = await counts.new_rows("d.test")
    assert [(row.kind, row.result, row.host, row.remote_ip) for row in rows] == [
        ("tlsa", "", "", ""),
        ("tlsa", DANE_FAULTS[fault].value, FIRST, BAD),
    ]
    good, bad = rows
    assert second.tlsa(3) in good.policy and record not in good.policy.replace(second.tlsa(3), "")
    assert record in bad.policy and FIRST in bad.policy


@pytest.mark.parametrize("demand", ["verified", "enforce"])
async def test_mail_waits_if_no_host_is_good_enough(
    certificates: Certificates, demand: str
) -> None:
    """Each host is tried, none gets mail, and the result is one for now (RFC 8461, section 5)."""
    sts = FixedSts({})
    if demand == "enforce":
        sts.policies["d.test"] = StsPolicy("d.test", "1", StsMode.ENFORCE, ("*.d.test",))
    recorder = Recorded()
    peers = TwoPeers(
        {BAD: faulty(certificates, "454"), GOOD: starttls(certificates.server("mx.e.test"))}
    )
    async with open_bench(
        *[peers.script] * 3,
        address="0.0.0.0",
        resolver=NamedHosts(HOSTS, d_test=[FIRST, NAME]),
        policies=Policies(sts=sts, recorder=recorder),
        connection_ca_file=certificates.ca_file,
        connection_secure="verified" if demand == "verified" else "opportunistic",
    ) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["status"]) == ("tls", "4.7.5")
        for address in (BAD, GOOD):
            peer = peers.at(address)
            assert (peer.connections, peer.mails) == (1, [])
            assert not any(line.startswith(("MAIL", "RCPT", "DATA")) for line in peer.commands)
    assert recorder.seen == [
        ("d.test", FIRST, Reason.NO_STARTTLS),
        ("d.test", NAME, Reason.HOST_MISMATCH),
    ]
