"""Settings, MTA-STS, TLSA records and peers in all combinations: what goes how, and what waits."""

from __future__ import annotations

from typing import Final

import pytest

from mailerq.outbound.policies import Policies
from mailerq.rules.security import (
    PolicyUnknown,
    Reason,
    StsMode,
    StsPolicy,
    Tlsa,
    TlsaSet,
    TlsFailure,
)
from tests.net.certificate_kit import common_name_context
from tests.outbound.kit import PeerConnection, Script, open_bench
from tests.outbound.test_delivery_tls import settings
from tests.outbound.tls_kit import NAME, Certificates, FixedDane, FixedSts, breaks, starttls

LEVELS: Final = ("none", "opportunistic", "required", "verified")
POLICIES: Final = ("none", "testing", "enforce", "unknown")
RECORDS: Final = ("none", "match", "differ", "unusable", "unknown")
BAD_NAMES: Final = ("wrong name", "common name")
"""Certificates of the trusted authority: for another host, and without an alternative name."""

PEERS: Final = ("good", "self-signed", *BAD_NAMES, "no starttls", "454", "reset")
CLEAR, SECURE, VERIFIED, WAITS = "clear", "TLS", "TLS, verified", "waits"

RECORD: Final = TlsaSet(NAME, frozenset((Tlsa(3, 1, 1, bytes(32)),)))


def expected(level: str, policy: str, records: str, peer: str) -> str:
    """The rules of docs/security.md, written a second time."""
    if "unknown" in (policy, records) or records == "differ":
        return WAITS
    webpki = level == "verified" or policy == "enforce"
    demanded = webpki or level == "required" or records != "none"
    if peer not in ("good", "self-signed", *BAD_NAMES):
        return WAITS if demanded else CLEAR
    if webpki and peer != "good":
        return WAITS
    if level == "none" and not demanded:
        return CLEAR
    return VERIFIED if webpki or records == "match" else SECURE


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def scripts(certificates: Certificates) -> dict[str, Script]:
    good = certificates.server()
    return {
        "good": starttls(good),
        "self-signed": starttls(certificates.server(trusted=False)),
        "wrong name": starttls(certificates.server("mx.e.test")),
        "common name": starttls(common_name_context(certificates.trusted, NAME)),
        "no starttls": PeerConnection.serve,
        "454": starttls(good, reply="454 4.7.0 not now\r\n"),
        "reset": breaks(None),
    }


def sources(policy: str, records: str) -> Policies:
    sts = FixedSts({})
    if policy == "unknown":
        sts.policies["d.test"] = PolicyUnknown("the TXT record cannot be looked up")
    elif policy != "none":
        sts.policies["d.test"] = StsPolicy("d.test", "1", StsMode(policy), (NAME,))
    dane = FixedDane({"d.test"})
    if records == "unknown":
        dane.records[NAME] = PolicyUnknown("SERVFAIL")
    elif records == "unusable":
        dane.records[NAME] = TlsaSet(NAME, frozenset())
    elif records != "none":
        dane.records[NAME] = RECORD
        if records == "differ":
            dane.failure = TlsFailure(Reason.FAILURE, "the certificate matches no record")
    return Policies(sts=sts, dane=dane)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
async def test_nothing_is_weaker_than_any_of_its_sources(
    certificates: Certificates, scripts: dict[str, Script], level: str, policy: str
) -> None:
    for records in RECORDS:
        for peer in PEERS:
            found = settings(
                certificates, connection_secure=level, policies=sources(policy, records)
            )
            async with open_bench(*[scripts[peer]] * 3, **found) as bench:
                bench.send()
                wanted = expected(level, policy, records, peer)
                cell = (level, policy, records, peer)
                if wanted is WAITS:
                    result = await bench.retried()
                    assert (result["type"], result["status"]) == ("tls", "4.7.5"), cell
                    assert bench.peer.mails == [], cell
                    assert not any(line.startswith("MAIL") for line in bench.peer.commands), cell
                    continue
                (result,) = await bench.results()
                how = SECURE if "cipher" in result else CLEAR
                if how is SECURE and result["certificate"]["verified"]:
                    how = VERIFIED
                assert (result["type"], how) == ("success", wanted), cell
                assert len(bench.peer.mails) == 1, cell
