"""What connections must prove: demands only add up, and a proof covers what it has shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.rules.security import (
    LEVELS,
    NOTHING,
    Demands,
    DomainPolicy,
    Level,
    Proof,
    StsMode,
    StsPolicy,
    Tlsa,
    TlsaSet,
    covers,
    missing,
)
from mailerq.wire.login import Login

HOSTS = ("mx1.d.test", "mx2.d.test", "a.m.test")
POLICIES = (
    StsPolicy("d.test", "1", StsMode.ENFORCE, ("mx1.d.test",)),
    StsPolicy("d.test", "2", StsMode.ENFORCE, ("mx1.d.test", "mx2.d.test")),
    StsPolicy("e.test", "1", StsMode.ENFORCE, ("*.m.test",)),
)
RECORDS = tuple(
    TlsaSet(host, frozenset((Tlsa(3, 1, 1, bytes((number,)) * 32),)))
    for number, host in enumerate(HOSTS)
)
LOGINS = (Login("ann", "a"), Login("bob", "b"))

demands_of_any_kind = st.builds(
    Demands,
    st.sampled_from(Level),
    st.frozensets(st.sampled_from(POLICIES)),
    st.frozensets(st.sampled_from(RECORDS)),
    st.booleans(),
    st.frozensets(st.sampled_from(LOGINS)),
    st.booleans(),
)
proofs = st.builds(
    Proof,
    st.sampled_from(HOSTS),
    st.booleans(),
    st.booleans(),
    st.frozensets(st.sampled_from(RECORDS)),
    st.booleans(),
    st.frozensets(st.sampled_from(LOGINS)),
)


@given(demands_of_any_kind, demands_of_any_kind, demands_of_any_kind)
def test_the_order_of_the_sources_does_not_matter(a: Demands, b: Demands, c: Demands) -> None:
    assert a | b == b | a
    assert hash(a | b) == hash(b | a)
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert a | NOTHING == NOTHING | a == a


@given(proofs, demands_of_any_kind, demands_of_any_kind)
def test_a_source_only_adds(proof: Proof, a: Demands, b: Demands) -> None:
    both = a | b
    assert covers(proof, both) <= (covers(proof, a) and covers(proof, b))
    assert both.encrypts >= (a.encrypts or b.encrypts)
    # With TLSA records a certificate for REQUIRETLS needs no known authority beside them.
    assert both.webpki >= (a.webpki or b.webpki) or (both.requiretls and both.tlsa)
    assert both.level == max(a.level, b.level)


@given(proofs, demands_of_any_kind, demands_of_any_kind)
def test_a_proof_that_covers_each_of_two_covers_both(proof: Proof, a: Demands, b: Demands) -> None:
    assert covers(proof, a | b) == (covers(proof, a) and covers(proof, b))


@given(demands_of_any_kind, demands_of_any_kind)
def test_only_what_the_domain_has_published_can_be_waived(a: Demands, b: Demands) -> None:
    waived = (a | b).waived()
    assert waived == a.waived() | b.waived()
    assert not waived.sts and not waived.tlsa
    assert (waived.level, waived.requiretls, waived.logins) == (
        max(a.level, b.level), a.requiretls or b.requiretls, a.logins | b.logins,
    )  # fmt: skip
    assert (a | b).may_waive == (a.may_waive and b.may_waive)


@given(proofs, demands_of_any_kind)
def test_nothing_in_clear_covers_a_demand_of_tls(proof: Proof, demands: Demands) -> None:
    if demands.encrypts and not proof.encrypted:
        assert not covers(proof, demands)
    if not demands.encrypts and not demands.logins:
        assert covers(proof, demands)


@given(demands_of_any_kind)
def test_what_is_demanded_is_tried(demands: Demands) -> None:
    assert demands.tries >= demands.encrypts
    assert not demands.webpki or demands.encrypts
    assert str(demands)


@pytest.mark.parametrize("word", LEVELS)
def test_a_level_includes_the_lower_ones(word: str) -> None:
    level = LEVELS[word]
    for other in Level:
        proof = {
            Level.NONE: Proof("h"),
            Level.OPPORTUNISTIC: Proof("h"),
            Level.REQUIRED: Proof("h", encrypted=True),
            Level.VERIFIED: Proof("h", encrypted=True, webpki=True),
        }[other]
        if level <= other:
            assert covers(proof, Demands(level))
    assert Demands(level).tries is (level > Level.NONE)
    assert Demands(level).encrypts is (level >= Level.REQUIRED)


def test_a_sender_may_do_without_tls_only_where_nothing_demands_it() -> None:
    plain = Demands(plain=True)
    assert not (plain | Demands(Level.OPPORTUNISTIC)).tries
    assert (plain | Demands(Level.REQUIRED)).tries
    assert (plain | Demands(sts=frozenset(POLICIES[:1]))).tries


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("mx.d.test", True),
        ("MX.D.TEST.", True),
        ("x.mail.d.test", True),
        ("x.y.mail.d.test", False),
        ("mail.d.test", False),
        ("d.test", False),
        ("evil-mx.d.test", False),
        ("192.0.2.1", False),
        ("", False),
        (".", False),
        ("*.mail.d.test", True),  # a name like any other below mail.d.test
    ],
)
def test_a_pattern_stands_for_one_label(host: str, allowed: bool) -> None:
    policy = StsPolicy("d.test", "1", StsMode.ENFORCE, ("mx.d.test", "*.mail.d.test"))
    assert policy.allows(host) is allowed


def test_only_an_enforced_policy_demands_something() -> None:
    for mode in StsMode:
        policy = DomainPolicy(StsPolicy("d.test", "1", mode, ("mx.d.test",)))
        assert policy.demands.encrypts is (mode is StsMode.ENFORCE)
        assert policy.proves_hosts is (mode is StsMode.ENFORCE)
    assert DomainPolicy(secure=True).proves_hosts
    assert DomainPolicy(secure=True).demands is NOTHING


def test_records_of_which_none_is_usable_demand_tls_and_no_certificate() -> None:
    demands = TlsaSet("mx1.d.test", frozenset()).demands
    assert covers(Proof("mx1.d.test", encrypted=True), demands)
    assert not covers(Proof("mx1.d.test"), demands)


def test_requiretls_takes_tlsa_records_or_a_known_authority() -> None:
    wanted = Demands(requiretls=True)
    proof = Proof("mx1.d.test", encrypted=True, requiretls=True)
    assert list(missing(proof, wanted)) == ["a valid certificate"]
    for more in ({"webpki": True}, {"tlsa": frozenset(RECORDS[:1])}):
        assert covers(Proof("mx1.d.test", encrypted=True, requiretls=True, **more), wanted)
    assert list(missing(Proof("mx1.d.test", encrypted=True, webpki=True), wanted)) == ["REQUIRETLS"]


def test_a_text_names_what_is_missing_and_hides_the_password() -> None:
    demands = Demands(
        Level.VERIFIED, frozenset(POLICIES[:1]), frozenset(RECORDS[:1]), True, frozenset(LOGINS[:1])
    )
    said = "; ".join(missing(Proof("mx2.d.test"), demands))
    assert "the MTA-STS policy of d.test (id 1)" in said
    assert "the TLSA records of mx1.d.test" in said
    assert "ann" not in repr(demands)
