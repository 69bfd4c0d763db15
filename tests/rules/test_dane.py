"""Which TLSA records count, and whether a certificate chain fits them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from mailerq.rules.dane import MAX_FULL, MAX_SIGNATURES, is_usable, tlsa_set, verify
from mailerq.rules.security import Reason, Tlsa, TlsaSet
from mailerq.rules.trust_paths import key_part
from tests.support import least_seconds

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()
DAY = timedelta(days=1)
HOST = "mx.d.test"
TURN = 0.05
"""Seconds of the loop."""

DER = serialization.Encoding.DER
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def at(days: float) -> datetime:
    return datetime.fromtimestamp(NOW, UTC) + DAY * days


@dataclass
class Cert:
    """A certificate, its key, and who has signed it."""

    name: str
    issuer: Cert | None = None
    names: Sequence[str] = ()
    ca: bool | None = None
    path_length: int | None = None
    days: tuple[float, float] = (-10, 10)
    usages: Sequence[Any] = ()
    cert_sign: bool | None = None
    permitted: Sequence[str] = ()
    excluded: Sequence[str] = ()
    critical: str = ""
    digest: Any = field(default_factory=hashes.SHA256)
    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    signer: Any = None
    der: bytes = b""

    def __post_init__(self) -> None:
        above = self.issuer or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(self.name))
            .issuer_name(_name(above.name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(at(self.days[0]))
            .not_valid_after(at(self.days[1]))
        )
        if self.names:
            san = x509.SubjectAlternativeName([x509.DNSName(name) for name in self.names])
            builder = builder.add_extension(san, critical=False)
        if self.ca is not None:
            basic = x509.BasicConstraints(self.ca, self.path_length)
            builder = builder.add_extension(basic, critical=True)
        if self.usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.usages), critical=False)
        if self.cert_sign is not None:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=self.cert_sign, crl_sign=False,
                content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, encipher_only=False, decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        if self.permitted or self.excluded:
            limits = x509.NameConstraints(_trees(self.permitted), _trees(self.excluded))
            builder = builder.add_extension(limits, critical=True)
        if self.critical:
            oid = x509.ObjectIdentifier(self.critical)
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, b"\5\0"), critical=True)
        signer = self.signer or above.key
        digest = None if isinstance(signer, ed25519.Ed25519PrivateKey) else self.digest
        self.der = builder.sign(signer, digest).public_bytes(DER)

    @property
    def spki(self) -> bytes:
        der: bytes = self.key.public_key().public_bytes(DER, SPKI)
        return der

    def tlsa(self, usage: int, selector: int, matching: int) -> Tlsa:
        data = self.spki if selector else self.der
        digests = {1: hashlib.sha256, 2: hashlib.sha512}
        return Tlsa(
            usage, selector, matching, digests[matching](data).digest() if matching else data
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _trees(names: Sequence[str]) -> list[x509.DNSName] | None:
    return [x509.DNSName(name) for name in names] or None


def judge(
    records: TlsaSet | Tlsa | Sequence[Tlsa], *chain: Cert | bytes, names: Sequence[str] = ()
) -> tuple[str, str]:
    """The result type and the text of a verdict; empty if the chain fits."""
    if isinstance(records, Tlsa):
        records = [records]
    if not isinstance(records, TlsaSet):
        found = tlsa_set(HOST, records, names)
        assert found is not None
        records = found
    ders = [each.der if isinstance(each, Cert) else each for each in chain]
    failure = verify(records, ders, NOW)
    return ("", "") if failure is None else (failure.reason.value, failure.text)


GOOD = ("", "")
ROOT = Cert("root", ca=True)
MIDDLE = Cert("middle", ROOT, ca=True)
LEAF = Cert("leaf", MIDDLE, names=[HOST])
OTHER = Cert("other", names=["elsewhere.test"], days=(-20, -10))
EXPIRED_ROOT = replace(ROOT, days=(-20, -1), der=b"")


# -- which records count ------------------------------------------------------------------------


def test_no_record_demands_nothing() -> None:
    assert tlsa_set(HOST, []) is None


@pytest.mark.parametrize(
    ("usage", "selector", "matching"), [*itertools.product(range(5), repeat=3)]
)
def test_usages_selectors_and_matching_types_of_smtp(
    usage: int, selector: int, matching: int
) -> None:
    data = {0: LEAF.spki if selector else LEAF.der, 1: bytes(32), 2: bytes(64)}.get(matching, b"?")
    usable = usage in (2, 3) and selector in (0, 1) and matching in (0, 1, 2)
    assert is_usable(Tlsa(usage, selector, matching, data)) is usable


@pytest.mark.parametrize(
    "record",
    [
        Tlsa(3, 1, 1, b""),
        Tlsa(3, 1, 1, bytes(31)),
        Tlsa(3, 1, 2, bytes(32)),
        Tlsa(3, 0, 0, b""),
        Tlsa(3, 0, 0, LEAF.der[:-1]),
        Tlsa(2, 0, 0, LEAF.der + b"\0"),
        Tlsa(2, 1, 0, LEAF.spki[:-1]),
        Tlsa(2, 1, 0, b"\x30\x80\0\0"),
    ],
)
def test_records_with_broken_data_are_unusable(record: Tlsa) -> None:
    assert not is_usable(record)


def test_records_of_which_none_is_usable_demand_encryption_alone() -> None:
    records = tlsa_set(HOST, [Tlsa(1, 1, 1, bytes(32)), Tlsa(3, 1, 9, b"x")], ["d.test"])
    assert records == TlsaSet(HOST, frozenset())
    assert records.demands.encrypts
    assert judge(records, OTHER) == GOOD


def test_only_the_strongest_digest_of_a_kind_counts_and_whole_data() -> None:
    weak, strong = LEAF.tlsa(3, 1, 1), OTHER.tlsa(3, 1, 2)
    kept = [LEAF.tlsa(3, 1, 0), LEAF.tlsa(3, 0, 1), LEAF.tlsa(2, 1, 1)]
    records = tlsa_set(HOST, [weak, strong, *kept])
    assert records is not None and records.records == {strong, *kept}
    assert judge([weak, strong], LEAF, MIDDLE)[0] == "validation-failure"
    assert judge([weak], LEAF, MIDDLE) == GOOD


def test_an_unusable_strong_digest_does_not_hide_a_weaker_one() -> None:
    assert judge([LEAF.tlsa(3, 1, 1), Tlsa(3, 1, 2, bytes(63))], LEAF) == GOOD


def test_whole_data_beyond_the_limit_counts_unread() -> None:
    many = [Tlsa(3, 1, 0, LEAF.spki[:-4] + i.to_bytes(4, "big")) for i in range(MAX_FULL)]
    assert judge([*many, LEAF.tlsa(3, 1, 0)], LEAF) == GOOD
    broken = Tlsa(3, 1, 0, b"broken")
    for records in ([*many, broken], [broken] * 50 + [broken]):
        found = tlsa_set(HOST, records)
        assert found is not None and (broken in found.records) is (many[0] in records)


def test_names_count_only_where_a_record_needs_them() -> None:
    for usage, names in ((3, ()), (2, ("d.test",))):
        records = tlsa_set(HOST, [Tlsa(usage, 1, 1, bytes(32))], ["d.test", HOST])
        assert records is not None and records.names == names


# -- DANE-EE(3) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("selector", "matching"), [*itertools.product((0, 1), (0, 1, 2))])
def test_the_end_entity_matches_whatever_its_name_and_dates(selector: int, matching: int) -> None:
    record = OTHER.tlsa(3, selector, matching)
    assert judge(record, OTHER) == GOOD
    assert judge([record, LEAF.tlsa(3, selector, matching)], OTHER, ROOT) == GOOD
    reason, text = judge(record, LEAF, MIDDLE, OTHER)  # only the leaf counts
    assert reason == "validation-failure"
    assert text == f"the certificate does not match the TLSA record of {HOST}"


def test_a_peer_without_certificate_matches_nothing() -> None:
    assert judge(LEAF.tlsa(3, 1, 1))[0] == "validation-failure"


def test_keys_that_the_library_does_not_know_match_byte_by_byte() -> None:
    """A certificate with a key of an unknown kind, as those after quantum computers have."""
    at = LEAF.der.index(LEAF.spki)
    spki = LEAF.spki.replace(bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d027f"))
    der = LEAF.der[:at] + spki + LEAF.der[at + len(spki) :]
    assert key_part(der) == spki != LEAF.spki
    assert judge(Tlsa(3, 1, 1, hashlib.sha256(spki).digest()), der) == GOOD


# -- DANE-TA(2) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("selector", "matching"), [*itertools.product((0, 1), (0, 1, 2))])
@pytest.mark.parametrize("anchor", [ROOT, MIDDLE], ids=["root", "intermediate"])
def test_a_presented_authority_is_the_anchor(anchor: Cert, selector: int, matching: int) -> None:
    record = anchor.tlsa(2, selector, matching)
    assert judge(record, LEAF, MIDDLE, ROOT) == GOOD
    assert judge(record, LEAF, ROOT, OTHER, MIDDLE) == GOOD  # in any order
    assert judge(record, OTHER, MIDDLE, ROOT)[0] == "certificate-not-trusted"


@pytest.mark.parametrize("selector", [0, 1])
def test_a_record_holds_the_authority_itself(selector: int) -> None:
    assert judge(ROOT.tlsa(2, selector, 0), LEAF, MIDDLE) == GOOD
    assert judge(MIDDLE.tlsa(2, selector, 0), LEAF) == GOOD
    assert judge(OTHER.tlsa(2, selector, 0), LEAF, MIDDLE)[0] == "certificate-not-trusted"


def test_a_digest_of_an_authority_that_is_not_presented_leads_nowhere() -> None:
    reason, text = judge(ROOT.tlsa(2, 0, 1), LEAF, MIDDLE)
    assert (reason, text) == (
        "certificate-not-trusted",
        f"the certificate does not lead to the TLSA record of {HOST}",
    )


def test_a_forged_signature_leads_nowhere() -> None:
    stranger = Cert("middle", ROOT, ca=True, signer=ec.generate_private_key(ec.SECP256R1()))
    leaf = Cert("leaf", stranger, names=[HOST])
    assert judge(ROOT.tlsa(2, 0, 1), leaf, stranger, ROOT)[0] == "certificate-not-trusted"
    assert judge(ROOT.tlsa(2, 1, 0), leaf, stranger)[0] == "certificate-not-trusted"


def test_a_leaf_that_is_the_anchor_is_checked_for_name_and_dates() -> None:
    own = Cert("own", names=[HOST])
    assert judge(own.tlsa(2, 1, 1), own) == GOOD
    assert judge(OTHER.tlsa(2, 1, 1), OTHER)[0] == "certificate-expired"
    wrong = Cert("own", names=["elsewhere.test"])
    assert judge(wrong.tlsa(2, 1, 1), wrong)[0] == "certificate-host-mismatch"


def test_dates_count_for_the_whole_chain() -> None:
    old = Cert("leaf", MIDDLE, names=[HOST], days=(-9, -1))
    assert judge(ROOT.tlsa(2, 1, 1), old, MIDDLE, ROOT) == (
        "certificate-expired",
        "the certificate expired on 2026-05-31",
    )
    middle = Cert("middle", ROOT, ca=True, days=(-9, -1))
    leaf = Cert("leaf", middle, names=[HOST])
    assert judge(ROOT.tlsa(2, 1, 1), leaf, middle, ROOT)[0] == "certificate-expired"
    assert judge(ROOT.tlsa(2, 1, 1), LEAF, MIDDLE, EXPIRED_ROOT)[0] == "certificate-expired"
    assert judge(ROOT.tlsa(2, 1, 0), LEAF, MIDDLE) == GOOD  # a key has no dates
    young = Cert("leaf", MIDDLE, names=[HOST], days=(1, 9))
    assert judge(ROOT.tlsa(2, 1, 1), young, MIDDLE, ROOT) == (
        "validation-failure",
        "the certificate is not valid before 2026-06-02",
    )


def test_of_two_certificates_for_one_authority_one_that_is_good_will_do() -> None:
    both = [EXPIRED_ROOT, ROOT]
    for order in (both, both[::-1]):
        assert judge(ROOT.tlsa(2, 1, 1), LEAF, MIDDLE, *order) == GOOD


@pytest.mark.parametrize(
    ("names", "more", "good"),
    [
        ([HOST], [], True),
        (["MX.D.test"], [], True),
        (["*.d.test"], [], True),
        (["d.test"], [], False),
        (["d.test"], ["d.test"], True),
        (["*.test"], ["d.test"], False),
        (["m*.d.test", "*.*.test", "*"], [], False),
        (["elsewhere.test", HOST], [], True),
        (["e.test", "f.test", "g.test", "h.test"], [], False),
        ([f"{HOST}.evil.test", "x" + HOST], [], False),
    ],
)
def test_the_names_of_the_certificate_count(
    names: list[str], more: list[str], *, good: bool
) -> None:
    leaf = Cert(HOST, MIDDLE, names=names)
    reason, text = judge(ROOT.tlsa(2, 1, 1), leaf, MIDDLE, ROOT, names=more)
    assert reason == ("" if good else "certificate-host-mismatch"), text
    if not good:
        assert names[0] in text and HOST in text


def test_a_common_name_is_no_name_of_a_host() -> None:
    leaf = Cert(HOST, MIDDLE)
    reason, text = judge(ROOT.tlsa(2, 1, 1), leaf, MIDDLE, ROOT)
    assert (reason, text) == (
        "certificate-host-mismatch", f"the certificate names nothing, not {HOST}"
    )  # fmt: skip
    assert judge(leaf.tlsa(3, 1, 1), leaf) == GOOD  # no name counts there


SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def test_a_certificate_for_clients_is_not_for_servers() -> None:
    for usages, reason in (([SERVER], ""), ([CLIENT, SERVER], ""), ([CLIENT], Reason.FAILURE)):
        leaf = Cert("leaf", MIDDLE, names=[HOST], usages=usages)
        assert judge(ROOT.tlsa(2, 1, 1), leaf, MIDDLE, ROOT)[0] == reason
        assert judge(leaf.tlsa(3, 1, 1), leaf) == GOOD


@pytest.mark.parametrize(
    ("middle", "good"),
    [
        ({"ca": True, "cert_sign": True}, True),
        ({"ca": True, "cert_sign": False}, False),
        ({"ca": False}, False),
        ({"ca": None}, False),
        ({"ca": True, "permitted": ["d.test"]}, True),
        ({"ca": True, "permitted": [".d.test", "x.test"]}, True),
        ({"ca": True, "permitted": ["e.test"]}, False),
        ({"ca": True, "excluded": ["d.test"]}, False),
        ({"ca": True, "excluded": ["e.test"]}, True),
        ({"ca": True, "critical": "1.2.3.4"}, False),
    ],
)
def test_what_an_issuer_may_do_counts(middle: dict[str, Any], *, good: bool) -> None:
    issuer = Cert("middle", ROOT, **middle)
    leaf = Cert("leaf", issuer, names=[HOST])
    for record, chain in (
        (ROOT.tlsa(2, 1, 1), (leaf, issuer, ROOT)),
        (ROOT.tlsa(2, 1, 0), (leaf, issuer)),
    ):
        assert (judge(record, *chain) == GOOD) is good


def test_an_anchor_may_be_a_certificate_without_extensions() -> None:
    old = Cert("root")
    leaf = Cert("leaf", old, names=[HOST])
    assert judge(old.tlsa(2, 0, 1), leaf, old) == GOOD


def test_the_length_of_the_path_counts() -> None:
    for length, good in ((0, False), (1, True), (None, True)):
        root = Cert("root", ca=True, path_length=length)
        middle = Cert("middle", root, ca=True, path_length=0)
        leaf = Cert("leaf", middle, names=[HOST])
        assert (judge(root.tlsa(2, 1, 1), leaf, middle, root) == GOOD) is good


def resigned(leaf: Cert, key: rsa.RSAPrivateKey) -> bytes:
    """The certificate with a SHA-1 signature, which the library does not make."""
    sha256, sha1 = (bytes.fromhex(f"06092a864886f70d0101{last}0500") for last in ("0b", "05"))
    signed = x509.load_der_x509_certificate(leaf.der).tbs_certificate_bytes
    changed = signed.replace(sha256, sha1)
    signature = key.sign(changed, padding.PKCS1v15(), hashes.SHA1())
    size = len(signature)
    return leaf.der[:-size].replace(signed, changed).replace(sha256, sha1) + signature


def test_digests_that_can_be_forged_do_not_count() -> None:
    key = rsa.generate_private_key(65537, 2048)
    root = Cert("root", ca=True, key=key)
    leaf = Cert("leaf", root, names=[HOST], digest=hashes.SHA384())
    assert judge(root.tlsa(2, 1, 1), leaf, root) == GOOD
    der = resigned(Cert("leaf", root, names=[HOST]), key)
    forged = x509.load_der_x509_certificate(der)
    key.public_key().verify(
        forged.signature, forged.tbs_certificate_bytes, padding.PKCS1v15(), hashes.SHA1()
    )
    assert judge(root.tlsa(2, 1, 1), der, root)[0] == "certificate-not-trusted"
    assert judge(Tlsa(3, 0, 1, hashlib.sha256(der).digest()), der) == GOOD


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "p384"])
def test_kinds_of_keys(kind: str) -> None:
    key: Any = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    }[kind]()
    root = Cert("root", ca=True, key=key)
    leaf = Cert("leaf", root, names=[HOST])
    assert judge(root.tlsa(2, 1, 1), leaf, root) == GOOD
    assert judge(root.tlsa(2, 1, 0), leaf) == GOOD
    forged = Cert("leaf", root, names=[HOST], signer=ec.generate_private_key(ec.SECP256R1()))
    assert judge(root.tlsa(2, 1, 1), forged, root)[0] == "certificate-not-trusted"


# -- hostile input --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [LEAF, MIDDLE], ids=["leaf", "issuer"])
def test_each_byte_of_a_certificate_may_be_wrong(which: Cert) -> None:
    """The library reads some parts late, and raises then."""
    records = [ROOT.tlsa(2, 0, 1)]
    signature = which.der.index(x509.load_der_x509_certificate(which.der).signature)
    for place in range(len(which.der)):
        if place == signature - 1:
            continue  # how many bits of the last byte do not count
        for wrong in (which.der[place] ^ 1, 0xFF, 0x0C):
            der = which.der[:place] + bytes([wrong]) + which.der[place + 1 :]
            chain = [der, MIDDLE.der, ROOT.der] if which is LEAF else [LEAF.der, der, ROOT.der]
            if der != which.der:
                assert judge(records, *chain) != GOOD, place


@given(st.lists(st.binary(max_size=200), max_size=5), st.data())
def test_any_bytes_are_judged_and_never_good(chain: list[bytes], data: st.DataObject) -> None:
    """Garbage, and certificates with some bytes changed."""
    der = bytearray(LEAF.der)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(der) - 1))
        der[place] ^= data.draw(st.integers(1, 255))
    spare = LEAF.der.index(x509.load_der_x509_certificate(LEAF.der).signature) - 1
    der[spare] = LEAF.der[spare]  # how many bits of the last byte do not count
    for presented in ([*chain, LEAF.der], [bytes(der), MIDDLE.der, ROOT.der]):
        if presented[0] == LEAF.der:
            continue
        assert judge([LEAF.tlsa(3, 0, 1), ROOT.tlsa(2, 0, 1)], *presented) != GOOD


@given(st.binary(max_size=100))
def test_any_record_is_read(data: bytes) -> None:
    for usage, selector, matching in itertools.product((2, 3), (0, 1), (0, 1, 2)):
        record = Tlsa(usage, selector, matching, data)
        records = tlsa_set(HOST, [record])
        assert records is not None
        assert bool(records.records) is is_usable(record)
        if records.records:
            assert judge(records, LEAF, MIDDLE, ROOT) != GOOD


@given(
    st.lists(
        st.builds(Tlsa, st.integers(0, 4), st.integers(0, 2), st.integers(0, 3), st.binary()),
        max_size=8,
    ),
    st.lists(
        st.sampled_from([LEAF.tlsa(3, 1, 1), LEAF.tlsa(3, 1, 2), ROOT.tlsa(2, 0, 1)]), min_size=1
    ),
    st.randoms(use_true_random=False),
)
def test_more_records_never_make_a_peer_unauthenticated(
    junk: list[Tlsa], good: list[Tlsa], random: Any
) -> None:
    """While one record is usable, something must match; the order does not matter."""
    both = [*junk, *good]
    random.shuffle(both)
    records = tlsa_set(HOST, both)
    assert records is not None and records.records
    assert records == tlsa_set(HOST, [*good, *junk])
    assert judge(records, OTHER) != GOOD


@settings(max_examples=20)
@given(st.integers(0, 2**64))
def test_a_strong_digest_that_does_not_match_is_not_replaced_by_a_weak_one(seed: int) -> None:
    strong = Tlsa(3, 1, 2, hashlib.sha512(str(seed).encode()).digest())
    assert judge([LEAF.tlsa(3, 1, 1), strong], LEAF) != GOOD


def timed(records: Sequence[Tlsa], chain: Sequence[bytes]) -> tuple[float, str]:
    """Processor seconds for the set and a verdict, and the result type."""
    reasons: list[str] = []

    def work() -> None:
        found = tlsa_set(HOST, records)
        assert found is not None
        failure = verify(found, chain, NOW)
        reasons.append("" if failure is None else failure.reason)

    seconds = least_seconds(work)
    (reason,) = set(reasons)
    return seconds, reason


def test_many_records_are_judged_in_time() -> None:
    """An answer has at most 64 KiB."""
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(10_000)]
    many = [Tlsa(2 + i % 2, i % 2, 1, digest) for i, digest in enumerate(digests)]
    seconds, reason = timed(many, [LEAF.der, MIDDLE.der, ROOT.der])
    assert (reason, seconds < TURN) == ("certificate-not-trusted", True), seconds
    assert timed([*many, LEAF.tlsa(3, 1, 1)], [LEAF.der])[1] == ""
    keys = [Tlsa(2, 1, 0, LEAF.spki[:-4] + i.to_bytes(4, "big")) for i in range(10_000)]
    seconds, reason = timed(keys, [LEAF.der, MIDDLE.der, ROOT.der])
    assert (reason, seconds < TURN) == ("certificate-not-trusted", True), seconds
    middle = Cert("middle", ROOT, ca=True).der
    whole = [Tlsa(2, 0, 0, middle[:-4] + i.to_bytes(4, "big")) for i in range(10_000)]
    seconds, reason = timed(whole, [LEAF.der])
    assert (reason, seconds < TURN) == ("certificate-not-trusted", True), seconds


def test_long_chains_are_judged_in_time() -> None:
    """All may have issued each other, by the slowest keys; a handshake takes 100 KB at most."""
    key = ec.generate_private_key(ec.SECP521R1())
    chain = [Cert("same", ca=True, key=key) for _ in range(200)]
    seconds, reason = timed([OTHER.tlsa(2, 0, 1)], [cert.der for cert in chain])
    assert (reason, seconds < TURN) == ("certificate-not-trusted", True), seconds
    deep, top = [], None
    for number in range(MAX_SIGNATURES + 5):
        top = Cert(f"n{number}", top, ca=True)
        deep.append(top)
    leaf = Cert("leaf", top, names=[HOST])
    seconds, reason = timed([deep[0].tlsa(2, 0, 1)], [c.der for c in [leaf, *reversed(deep)]])
    assert (reason, seconds < TURN) == ("certificate-not-trusted", True), seconds


def test_huge_certificates_are_judged_in_time() -> None:
    names = [f"n{number}.elsewhere.test" for number in range(4000)]
    leaf = Cert("leaf", MIDDLE, names=names)
    trees = [f"n{number}.elsewhere.test" for number in range(3000)]
    middle = Cert("middle", ROOT, ca=True, key=MIDDLE.key, excluded=trees)
    seconds, reason = timed([ROOT.tlsa(2, 0, 1)], [leaf.der, middle.der, ROOT.der])
    assert (reason, seconds < TURN) == ("certificate-host-mismatch", True), seconds
    leaf = Cert("leaf", MIDDLE, names=[*names, HOST])
    assert timed([ROOT.tlsa(2, 0, 1)], [leaf.der, middle.der, ROOT.der])[1] == ""


def test_huge_keys_are_not_used() -> None:
    numbers = rsa.RSAPublicNumbers(e=65537, n=(1 << 16000) + 1)
    spki = numbers.public_key().public_bytes(DER, SPKI)
    signed = Cert("leaf", names=[HOST], key=rsa.generate_private_key(65537, 2048))
    seconds, reason = timed([Tlsa(2, 1, 0, spki)], [signed.der])
    assert (reason, seconds < TURN) == ("certificate-not-trusted", True), seconds
