"""The fields of signatures: what they sign, their form, and the vectors of RFC 8463."""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail.dkim import (
    MAX_INSTANCES,
    HeaderFields,
    Terms,
    body_hash,
    field_size,
    names_to_sign,
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

RFC_SIGNATURE = b"""\
DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=brisbane; t=1528637909; h=from : to :
 subject : date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=""".replace(b"\n", b"\r\n")

RFC_KEY = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="
RFC_PUBLIC = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
RFC_VALUE = (
    "/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11BusFa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw=="
)


def test_the_ed25519_signature_of_the_standard() -> None:
    key = SigningKey(in_pem(Ed25519PrivateKey.from_private_bytes(base64.b64decode(RFC_KEY))))
    assert key.public == RFC_PUBLIC
    fields = HeaderFields(RFC_MAIL)
    hash = body_hash([RFC_MAIL[fields.body :]], relaxed=True)
    assert base64.b64encode(hash) == b"2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8="
    names = ((b"from", 1), (b"to", 1), (b"subject", 1), (b"date", 1), (b"message-id", 1))
    data = signed_data(fields, names, RFC_SIGNATURE, relaxed=True)
    assert base64.b64encode(key.sign(data)).decode() == RFC_VALUE
    record = {"brisbane._domainkey.football.example.com": key.record}
    assert dkimpy_says(RFC_SIGNATURE + RFC_VALUE.encode() + b"\r\n" + RFC_MAIL, record) == [True]


def field_of(mail: bytes, terms: Terms, hash: bytes = bytes(32), now: float = 1e9) -> bytes:
    fields = HeaderFields(mail)
    return unsigned_field(terms, fields.names(terms.extra), hash, now)


MAIL = (
    b"Received: x\r\nFrom: a@b.test\r\nTO: 1\r\nTo : 2\r\nMessage-ID: <1>\r\nX-Own: 1\r\n"
    b"List-Unsubscribe: u\r\nList-Unsubscribe-Post: p\r\nBcc: z\r\nResent-To: q\r\n\r\nx\r\n"
)


def test_fields_that_may_not_be_added_are_named_once_more_than_they_are_there() -> None:
    names = dict(names_to_sign(HeaderFields(MAIL), ()))
    assert (names[b"from"], names[b"to"], names[b"cc"], names[b"subject"]) == (2, 3, 1, 1)
    assert (names[b"message-id"], names[b"list-unsubscribe-post"]) == (1, 1)
    assert names[b"list-unsubscribe"] == 1
    for name in (b"received", b"bcc", b"x-own", b"resent-to", b"sender"):
        assert name not in names


def test_more_fields_are_signed_where_they_are_there() -> None:
    names = dict(names_to_sign(HeaderFields(MAIL), (b"x-own", b"x-none", b"received", b"from")))
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
    assert dict(fields.names(()))[b"to"] == MAX_INSTANCES + 1
    assert len(fields.forms(b"to", relaxed=True)) == MAX_INSTANCES


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
    key = SigningKey(rsa_pem())
    terms = Terms("d.test", "s", "rsa-sha256", relaxed_header, relaxed_body, (b"x-y",))
    fields = HeaderFields(mail)
    hash = body_hash([mail[fields.body :]], relaxed=relaxed_body)
    field = unsigned_field(terms, fields.names(terms.extra), hash, 1e9)
    data = signed_data(fields, fields.names(terms.extra), field, relaxed=relaxed_header)
    whole = signed_field(field, key.sign(data)) + mail
    assert dkimpy_says(whole, {"s._domainkey.d.test": key.record}) == [True]


@given(st.binary(max_size=200))
def test_any_bytes_have_fields_that_are_in_the_mail(mail: bytes) -> None:
    fields = HeaderFields(mail)
    assert 0 <= fields.body <= len(mail)
    for name in fields:
        assert name == name.lower()
        for whole in fields.whole(name):
            assert whole in mail
            assert whole.lower().startswith(name)
