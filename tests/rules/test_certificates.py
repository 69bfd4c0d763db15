"""What is said about certificates, and the verdicts on chains that nobody has checked."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mailerq.rules.certificates import authorities, facts_of, reason_of, webpki_failure
from mailerq.rules.security import Reason

NAME = "mx.d.test"


def der(blob: trustme.Blob) -> bytes:
    return x509.load_pem_x509_certificate(blob.bytes()).public_bytes(Encoding.DER)


def chain_of(authority: trustme.CA, *names: str, **more: Any) -> list[bytes]:
    issued = authority.issue_cert(*(names or (NAME,)), **more)
    return [der(each) for each in issued.cert_chain_pems]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def verdict(authority: trustme.CA, chain: list[bytes], host: str = NAME) -> Reason | None:
    found = webpki_failure(chain, host, authorities([der(authority.cert_pem)]), now=time.time())
    return None if found is None else found[0]


def test_a_chain_of_a_known_authority_is_good(authority: trustme.CA) -> None:
    assert verdict(authority, chain_of(authority)) is None
    between = authority.create_child_ca()
    assert verdict(authority, chain_of(between)) is None
    assert verdict(authority, chain_of(authority, "*.d.test")) is None
    assert verdict(authority, chain_of(authority, "192.0.2.1"), "192.0.2.1") is None


def test_each_fault_has_a_word(authority: trustme.CA) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    expired = chain_of(authority, not_before=past - timedelta(days=1), not_after=past)
    assert verdict(authority, expired) is Reason.EXPIRED
    assert verdict(authority, chain_of(authority, "mx.e.test")) is Reason.HOST_MISMATCH
    assert verdict(authority, chain_of(authority, "*.test")) is Reason.HOST_MISMATCH
    assert verdict(authority, chain_of(trustme.CA())) is Reason.NOT_TRUSTED
    assert verdict(authority, []) is Reason.FAILURE
    assert verdict(authority, [b"nonsense"]) is Reason.FAILURE
    between = chain_of(authority.create_child_ca())
    assert verdict(authority, between[:1]) is Reason.NOT_TRUSTED


def test_without_an_authority_nothing_is_trusted(authority: trustme.CA) -> None:
    assert authorities([]) is None
    assert authorities([b"nonsense"]) is None
    found = webpki_failure(chain_of(authority), NAME, None, now=time.time())
    assert found is not None
    assert found[0] is Reason.NOT_TRUSTED


def test_the_verdicts_of_openssl_have_words() -> None:
    assert [reason_of(code) for code in (10, 62, 64, 18, 19, 20, 21, 7, 0)] == [
        Reason.EXPIRED, Reason.HOST_MISMATCH, Reason.HOST_MISMATCH,
        *[Reason.NOT_TRUSTED] * 4, Reason.FAILURE, Reason.FAILURE,
    ]  # fmt: skip


def test_results_say_whose_certificate_it_is(authority: trustme.CA) -> None:
    facts = facts_of(chain_of(authority, NAME, "192.0.2.1", organization_name="D")[0])
    assert facts is not None
    shown = facts.to_dict(verified=True)
    assert shown["verified"] is True
    assert shown["altnames"] == [NAME, "192.0.2.1"]
    assert shown["subject"]["organization"] == "D"
    assert shown["self-signed"] is False
    root = facts_of(der(authority.cert_pem))
    assert root is not None
    assert root.self_signed
    assert root.altnames == ()
