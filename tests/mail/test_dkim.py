"""The fields of signatures: what they sign, their form, and the vectors of RFC 8463."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail.dkim import (
    MAX_INSTANCES,
    HeaderFields,
    Terms,
    body_hash,
    field_size,
    signed_data,
    signed_field,
    unsigned_field,
)
from mailerq.store.signing_keys import SigningKey
from tests.signing_kit import dkimpy_says, in_pem, rsa_pem

# RFC 8463, appendix A
RFC_MAIL = b"""\
From: Joe SixPack <joe@football.example.com>
To: Suzie Q <suzie@shopping.example.net>
Subject: Is dinner ready?
Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)
Message-ID: <20030712040037.46341.5F8J@football.example.com>

Hi.

We lost the game.  Are you hungry yet?

Joe.
""".replace(b"\n", b"\r\n")

# The two signatures of the appendix, without and with their values.
RFC_ED25519 = b"""\
DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=brisbane; t=1528637909; h=from : to :
 subject : date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=""".replace(b"\n", b"\r\n")
RFC_ED25519_VALUE = b"""\
/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11Bus
 Fa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw==
""".replace(b"\n", b"\r\n")

RFC_RSA = b"""\
DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=test; t=1528637909; h=from : to : subject :
 date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=""".replace(b"\n", b"\r\n")
RFC_RSA_VALUE = b"""\
F45dVWDfMbQDGHJFlXUNB2HKfbCeLRyhDXgFpEL8GwpsRe0IeIixNTe3
 DhCVlUrSjV4BwcVcOF6+FF3Zo9Rpo1tFOeS9mPYQTnGdaSGsgeefOsk2Jz
 dA+L10TeYt9BgDfQNZtKdN1WO//KgIqXP7OdEFE4LjFYNcUxZQ4FADY+8=
""".replace(b"\n", b"\r\n")

RFC_ED25519_KEY = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="
RFC_RSA_KEY = b"""\
-----BEGIN RSA PRIVATE KEY-----
MIICXQIBAAKBgQDkHlOQoBTzWRiGs5V6NpP3idY6Wk08a5qhdR6wy5bdOKb2jLQi
Y/J16JYi0Qvx/byYzCNb3W91y3FutACDfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqM
KrM3rG4hstT5QjvHO9PzoxZyVYLzBfO2EeC3Ip3G+2kryOTIKT+l/K4w3QIDAQAB
AoGAH0cxOhFZDgzXWhDhnAJDw5s4roOXN4OhjiXa8W7Y3rhX3FJqmJSPuC8N9vQm
6SVbaLAE4SG5mLMueHlh4KXffEpuLEiNp9Ss3O4YfLiQpbRqE7Tm5SxKjvvQoZZe
zHorimOaChRL2it47iuWxzxSiRMv4c+j70GiWdxXnxe4UoECQQDzJB/0U58W7RZy
6enGVj2kWF732CoWFZWzi1FicudrBFoy63QwcowpoCazKtvZGMNlPWnC7x/6o8Gc
uSe0ga2xAkEA8C7PipPm1/1fTRQvj1o/dDmZp243044ZNyxjg+/OPN0oWCbXIGxy
WvmZbXriOWoSALJTjExEgraHEgnXssuk7QJBALl5ICsYMu6hMxO73gnfNayNgPxd
WFV6Z7ULnKyV7HSVYF0hgYOHjeYe9gaMtiJYoo0zGN+L3AAtNP9huqkWlzECQE1a
licIeVlo1e+qJ6Mgqr0Q7Aa7falZ448ccbSFYEPD6oFxiOl9Y9se9iYHZKKfIcst
o7DUw1/hz2Ck4N5JrgUCQQCyKveNvjzkkd8HjYs0SwM0fPjK16//5qDZ2UiDGnOe
uEzxBDAr518Z8VFbR41in3W4Y3yCDgQlLlcETrS+zYcL
-----END RSA PRIVATE KEY-----
"""
"""The RSA key that is printed in the appendix, and so protects nothing."""

RFC_RECORDS = {
    "brisbane._domainkey.football.example.com": (
        "v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
    ),
    "test._domainkey.football.example.com": (
        "v=DKIM1; k=rsa; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDkHlOQoBTzWR"
        "iGs5V6NpP3idY6Wk08a5qhdR6wy5bdOKb2jLQiY/J16JYi0Qvx/byYzCNb3W91y3FutAC"
        "DfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqMKrM3rG4hstT5QjvHO9PzoxZyVYLzBfO2EeC3"
        "Ip3G+2kryOTIKT+l/K4w3QIDAQAB"
    ),
}

RFC_NAMES = ((b"from", 2), (b"to", 1), (b"subject", 2), (b"date", 2), (b"message-id", 1))


@pytest.mark.parametrize(
    ("selector", "pem", "field", "value"),
    [
        pytest.param("brisbane", None, RFC_ED25519, RFC_ED25519_VALUE, id="ed25519"),
        pytest.param("test", RFC_RSA_KEY, RFC_RSA, RFC_RSA_VALUE, id="rsa"),
    ],
)
def test_the_signatures_of_the_standard(
    selector: str, pem: bytes | None, field: bytes, value: bytes
) -> None:
    if pem is None:
        pem = in_pem(Ed25519PrivateKey.from_private_bytes(base64.b64decode(RFC_ED25519_KEY)))
    key = SigningKey(pem)
    assert key.record == RFC_RECORDS[f"{selector}._domainkey.football.example.com"]
    fields = HeaderFields(RFC_MAIL)
    hash = body_hash([RFC_MAIL[fields.body :]], relaxed=True)
    assert base64.b64encode(hash) == b"2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8="
    data = signed_data(fields, RFC_NAMES, field, relaxed=True)
    assert key.sign(data) == base64.b64decode(b"".join(value.split()))


def test_the_mail_of_the_standard_has_two_signatures_that_hold() -> None:
    mail = RFC_ED25519 + RFC_ED25519_VALUE + RFC_RSA + RFC_RSA_VALUE + RFC_MAIL
    assert dkimpy_says(mail, RFC_RECORDS) == [True, True]
    assert dkimpy_says(mail.replace(b"hungry", b"angry"), RFC_RECORDS) == [False, False]


def field_of(mail: bytes, terms: Terms, hash: bytes = bytes(32), now: float = 1e9) -> bytes:
    fields = HeaderFields(mail)
    return unsigned_field(terms, fields.names(terms.extra), hash, now)


def signed_mail(mail: bytes, terms: Terms) -> bytes:
    """A mail with a signature of an RSA key above it."""
    fields = HeaderFields(mail)
    names = fields.names(terms.extra)
    hash = body_hash([mail[fields.body :]], relaxed=terms.relaxed_body)
    field = unsigned_field(terms, names, hash, 1e9)
    data = signed_data(fields, names, field, relaxed=terms.relaxed_header)
    return signed_field(field, SigningKey(rsa_pem()).sign(data)) + mail


MAIL = (
    b"Received: x\r\nFrom: a@b.test\r\nTO: 1\r\nTo : 2\r\nMessage-ID: <1>\r\nX-Own: 1\r\n"
    b"List-Unsubscribe: u\r\nList-Unsubscribe-Post: p\r\nBcc: z\r\nResent-To: q\r\n\r\nx\r\n"
)


def test_fields_that_may_not_be_added_are_named_once_more_than_they_are_there() -> None:
    names = dict(HeaderFields(MAIL).names(()))
    assert (names[b"from"], names[b"to"], names[b"cc"], names[b"subject"]) == (2, 3, 1, 1)
    assert (names[b"message-id"], names[b"list-unsubscribe-post"]) == (1, 1)
    assert names[b"list-unsubscribe"] == 1
    for name in (b"received", b"bcc", b"x-own", b"resent-to", b"sender"):
        assert name not in names


def test_more_fields_are_signed_where_they_are_there() -> None:
    names = dict(HeaderFields(MAIL).names((b"x-own", b"x-none", b"received", b"from")))
    assert names[b"x-own"] == 1 and names[b"from"] == 2
    assert b"x-none" not in names and b"received" not in names


def test_fields_of_one_name_are_signed_from_the_bottom_up() -> None:
    fields = HeaderFields(b"To: 1\r\nTo: 2\r\nTo: 3\r\nFrom: x\r\n\r\n")
    data = signed_data(fields, ((b"to", 2), (b"from", 5)), b"X: y", relaxed=True)
    assert data == b"to:3\r\nto:2\r\nfrom:x\r\nx:y"


def test_a_header_of_strange_length_makes_no_strange_signature() -> None:
    mail = b"From: a@b.test\r\n" + b"To: x\r\n" * 50_000 + b"\r\nx\r\n"
    fields = HeaderFields(mail)
    assert fields.count(b"to") == 50_000
    assert dict(fields.names(()))[b"to"] == MAX_INSTANCES
    assert len(fields.forms(b"to", relaxed=True)) == MAX_INSTANCES


@pytest.mark.parametrize("relaxed", [True, False], ids=["relaxed", "simple"])
@pytest.mark.parametrize(
    ("count", "named"), [(99, 100), (100, 101), (101, 100), (102, 100), (150, 100)]
)
@pytest.mark.parametrize("name", [b"To", b"List-Id", b"X-Own"])
def test_a_name_stands_only_for_fields_whose_text_is_signed(
    name: bytes, count: int, named: int, relaxed: bool
) -> None:
    lines = b"".join(b"%b:  a%d@b.test\r\n" % (name, number) for number in range(count))
    mail = b"From: a@b.test\r\n" + lines + b"\r\nx\r\n"
    if name != b"To":
        named = min(count, MAX_INSTANCES)
    terms = Terms("d.test", "s", "rsa-sha256", relaxed, True, (b"x-own",))
    names = HeaderFields(mail).names(terms.extra)
    assert dict(names)[name.lower()] == named
    whole = signed_mail(mail, terms)
    assert dkimpy_says(whole, {"s._domainkey.d.test": SigningKey(rsa_pem()).record}) == [True]


def test_the_tags_of_a_signature() -> None:
    text = field_of(MAIL, Terms("d.test", "s", lifetime=60, report=True)).decode()
    assert "v=1; a=rsa-sha256; c=relaxed/simple; d=d.test; s=s;" in text.replace("\r\n\t", " ")
    assert "t=1000000000; x=1000000060; r=y;" in text.replace("\r\n\t", " ")
    assert text.endswith("\r\n\tb=")
    until = field_of(MAIL, Terms("d.test", "s", lifetime=60, until=1e9 + 5)).decode()
    assert "x=1000000005;" in until
    past = field_of(MAIL, Terms("d.test", "s", until=1.0)).decode()
    assert "x=1000000001;" in past, "a time after t"


@given(
    st.from_regex(r"[a-z]{1,60}(\.[a-z]{1,60}){0,3}", fullmatch=True),
    st.lists(st.from_regex(rb"x-[a-z]{1,70}", fullmatch=True), max_size=20, unique=True),
    st.sampled_from([64, 128, 256, 512]),
)
def test_lines_are_short_and_the_size_is_known_before(
    domain: str, extra: list[bytes], size: int
) -> None:
    mail = b"".join(b"%b: x\r\n" % name for name in extra) + MAIL
    terms = Terms(domain, "s", extra=tuple(extra))
    names = HeaderFields(mail).names(terms.extra)
    whole = signed_field(unsigned_field(terms, names, bytes(32), 1e9), bytes(size))
    assert len(whole) == field_size(terms, names, size)
    assert whole.endswith(b"\r\n")
    for line in whole[:-2].split(b"\r\n"):
        assert len(line) <= 78 or b"d=" in line
    assert all(line[:1] == b"\t" for line in whole[:-2].split(b"\r\n")[1:])


FIELD = st.tuples(
    st.sampled_from([b"From", b"to", b"Subject", b"X-Y", b"List-Id", b"Cc"]),
    st.lists(st.sampled_from([b" a", b"\tb ", b"\r\n c", b"  ", b"\xe4"]), max_size=4).map(
        b"".join
    ),
)


@given(st.lists(FIELD, max_size=8), st.booleans(), st.booleans())
def test_dkimpy_takes_what_is_signed(
    more: list[tuple[bytes, bytes]], relaxed_header: bool, relaxed_body: bool
) -> None:
    mail = b"From: a@b.test\r\n" + b"".join(name + b":" + value + b"\r\n" for name, value in more)
    # A folded line of blanks alone would be an empty line for some.
    mail = mail.replace(b"\r\n  \r\n", b"\r\n x\r\n") + b"\r\n text \r\n\r\n"
    terms = Terms("d.test", "s", "rsa-sha256", relaxed_header, relaxed_body, (b"x-y",))
    whole = signed_mail(mail, terms)
    assert dkimpy_says(whole, {"s._domainkey.d.test": SigningKey(rsa_pem()).record}) == [True]


@given(st.binary(max_size=200))
def test_any_bytes_have_fields_that_are_in_the_mail(mail: bytes) -> None:
    fields = HeaderFields(mail)
    assert 0 <= fields.body <= len(mail)
    for name in fields:
        assert name == name.lower()
        for whole in fields.whole(name):
            assert whole in mail
            assert whole.lower().startswith(name)
