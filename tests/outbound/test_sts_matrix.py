"""States of real MTA-STS policies, with settings, TLSA records and two hosts: what goes where.

The policies come from name servers and a web server, and the rows from the counts of TLS reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from mailerq.outbound.policies import Policies
from mailerq.rules.security import PolicyUnknown, Reason, Tlsa, TlsaSet, TlsFailure
from tests.net.https_server import response
from tests.outbound.kit import PeerConnection, Script, open_bench
from tests.outbound.sts_kit import DAY, DOMAIN, StsBench, open_sts_bench, policy_text
from tests.outbound.test_trust_matrix import CLEAR, SECURE, VERIFIED, WAITS
from tests.outbound.tls_kit import (
    Certificates,
    Counts,
    FixedDane,
    NamedHosts,
    TwoPeers,
    breaks,
    open_counts,
    starttls,
)

FIRST: Final = f"mx0.{DOMAIN}"
SECOND: Final = f"mx.{DOMAIN}"
HOSTS: Final = {FIRST: "127.0.0.1", SECOND: "127.0.0.2"}

ENFORCED, NOTHING, UNKNOWN = "enforced", "nothing", "unknown"
STATES: Final = {
    "cached": ENFORCED,
    "cached, no record": ENFORCED,
    "cached, name servers fail": ENFORCED,
    "cached, new id, fetch fails": ENFORCED,
    "cached, new id, policy invalid": ENFORCED,
    "fetch fails": NOTHING,
    "policy invalid": NOTHING,
    "expired, no record": NOTHING,
    "expired, fetch fails": NOTHING,
    "expired, name servers fail": UNKNOWN,
    "name servers fail": UNKNOWN,
}
"""What is in force in each state (RFC 8461, sections 3.3 and 5.1)."""

TROUBLE: Final = {
    "fetch fails": Reason.STS_FETCH,
    "policy invalid": Reason.STS_INVALID,
}
"""What is reported of the ends of these states."""

FAULTS: Final = {
    "none": None,
    "self-signed": Reason.NOT_TRUSTED,
    "no starttls": Reason.NO_STARTTLS,
    "reset": Reason.FAILURE,
}
BROKEN: Final = ("no starttls", "reset")
LEVELS: Final = ("none", "opportunistic", "verified")
RECORDS: Final = ("none", "match", "differ")

SERVFAIL = 2


class Expected(NamedTuple):
    """How the mail goes, the host that gets it, and the rows of TLS reports."""

    how: str
    host: str = ""
    rows: tuple[tuple[str, str, str], ...] = ()


def expected(force: str, level: str, records: str, fault: str) -> Expected:
    """The rules of docs/security.md and docs/tls-reports.md, written a second time."""
    if force is UNKNOWN:
        return Expected(WAITS)
    webpki = level == "verified" or force is ENFORCED
    demanded = webpki or records != "none"
    if level == "none" and not demanded:
        return Expected(CLEAR, FIRST)
    kinds = ["sts"] * (force is ENFORCED) + ["tlsa"] * (records != "none") or ["no-policy-found"]
    successes = tuple((kind, "", "") for kind in kinds)
    how = VERIFIED if webpki or records != "none" else SECURE
    if fault in BROKEN or (webpki and fault != "none"):
        about = kinds if fault in BROKEN else kinds[:1]  # a certificate is a matter of MTA-STS
        reason = FAULTS[fault]
    elif records == "differ":
        about, reason = kinds, Reason.FAILURE
    else:
        return Expected(how, FIRST, successes)
    failures = tuple((kind, str(reason), FIRST) for kind in about)
    if demanded:
        return Expected(how, SECOND, successes + failures)
    return Expected(CLEAR, FIRST, failures)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def scripts(certificates: Certificates) -> dict[str, Script]:
    return {
        "none": starttls(certificates.server(FIRST)),
        "self-signed": starttls(certificates.server(FIRST, trusted=False)),
        "no starttls": PeerConnection.serve,
        "reset": breaks(None),
        "second": starttls(certificates.server(SECOND)),
    }


class DaneOfEach(FixedDane):
    """TLSA records of both hosts; those of the first one differ if the test wants that."""

    differs = False

    def verify(self, records: TlsaSet, chain: Sequence[bytes], *, now: float) -> TlsFailure | None:
        if self.differs and records.base_domain == FIRST:
            return TlsFailure(Reason.FAILURE, "the certificate matches no record")
        return None


def dane(records: str) -> DaneOfEach:
    made = DaneOfEach({DOMAIN})
    if records != "none":
        for host in HOSTS:
            made.records[host] = TlsaSet(host, frozenset((Tlsa(3, 1, 1, bytes(32)),)))
    made.differs = records == "differ"
    return made


async def bring_into(state: str, bench: StsBench) -> None:
    """Let a policy be fetched and expire, as the state wants, and have the trouble begin."""
    before, _, trouble = state.rpartition(", ")
    bench.publish("1", policy_text("enforce", f"*.{DOMAIN}"))
    if before or state == "cached":
        assert await bench.policies.find(DOMAIN) is not None
        bench.clock.now += 8 * DAY if before == "expired" else DAY
    if "new id" in state:
        bench.publish("2")
    match trouble:
        case "fetch fails":
            bench.web.answer = response(b"", status=503)
        case "policy invalid":
            bench.web.answer = response(b"version: STSv1\nmode: enforce\n")
        case "no record":
            bench.publish(None)
        case "name servers fail":
            bench.dns.zone["_mta-sts.d.example", "TXT"] = SERVFAIL


@pytest.mark.parametrize("state", STATES)
async def test_a_state_of_the_policy_weakens_nothing(
    certificates: Certificates, scripts: dict[str, Script], tmp_path: Path, state: str
) -> None:
    async with open_sts_bench(tmp_path) as sts:
        await bring_into(state, sts)
        force = STATES[state]
        try:
            found = await sts.policies.find(DOMAIN)
        except PolicyUnknown:
            assert force is UNKNOWN
        else:
            assert (found is not None) is (force is ENFORCED)
        trouble = TROUBLE.get(state.rpartition(", ")[2])
        assert [failed.reason for _, _, failed in sts.failures] == [trouble] * (trouble is not None)
        with open_counts(tmp_path / "queue") as counts:
            for told in sts.failures:
                counts.reports.policy_failed(*told)
            rows = [(row.kind, row.result) for row in await counts.new_rows(DOMAIN)]
            assert rows == [("sts", str(trouble))] * (trouble is not None)
            for cell in product([state], LEVELS, RECORDS, FAULTS):
                await check(cell, sts, certificates, scripts, counts)
        # Each cell has asked the real policies, and none has made them fetch again.
        assert len(sts.failures) == (trouble is not None)


async def check(
    cell: tuple[str, str, str, str],
    sts: StsBench,
    certificates: Certificates,
    scripts: dict[str, Script],
    counts: Counts,
) -> None:
    """Deliver one mail, and look where it went, how, and what was counted."""
    state, level, records, fault = cell
    wanted = expected(STATES[state], level, records, fault)
    peers = TwoPeers({HOSTS[FIRST]: scripts[fault], HOSTS[SECOND]: scripts["second"]})
    async with open_bench(
        *[peers.script] * 4,
        address="0.0.0.0",
        resolver=NamedHosts(HOSTS, d_example=[FIRST, SECOND]),
        policies=Policies(sts=sts.policies, dane=dane(records), recorder=counts.reports),
        connection_ca_file=certificates.ca_file,
        connection_secure=level,
    ) as bench:
        bench.send(f"c@{DOMAIN}")
        if wanted.how is WAITS:
            result = await bench.retried()
            assert (result["type"], result["status"]) == ("tls", "4.7.5"), cell
            assert bench.peer.connections == 0, cell
        else:
            (result,) = await bench.results()
            how = SECURE if "cipher" in result else CLEAR
            if how is SECURE and result["certificate"]["verified"]:
                how = VERIFIED
            got = [host for host, address in HOSTS.items() if peers.mails(address)]
            assert (result["type"], how, got) == ("success", wanted.how, [wanted.host]), cell
    rows = [(row.kind, row.result, row.host) for row in await counts.new_rows(DOMAIN)]
    assert sorted(rows) == sorted(wanted.rows), cell
