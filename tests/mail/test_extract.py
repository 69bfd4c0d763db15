"""x-mq-* fields: out of the header, and into properties when who sent them is trusted."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.mail.extract import FIELDS, doubts, extract, rights_of
from mailerq.mail.headers import Header
from mailerq.message import Message

from .test_headers import MESSAGES, normalised

PLAIN = b"From: a@b.test\r\nSubject: about x-rays\r\n\r\nx-mq-body: stays\r\n"


def test_a_message_without_such_fields_comes_back_itself() -> None:
    assert extract(PLAIN, trusted=True) == ({}, PLAIN, ())
    assert extract(PLAIN, trusted=True).mime is PLAIN
    mentioned = b"Subject: x-mq-tag and x-normalize\r\n\r\n"
    assert extract(mentioned, trusted=True).mime is mentioned


def test_every_field_has_its_property_of_the_right_type() -> None:
    head = b"\r\n".join([
        b"x-mq-envelope: <bounce@list.test>",
        b"X-MQ-IP: 192.0.2.10",
        b"x-mq-ip:\r\n 2001:DB8::1",
        b"x-mq-pool: gold",
        b"x-mq-tag: spring",
        b"x-mq-tag : sale",
        b"x-mq-delayed: 2026-01-31 12:00:00",
        b"x-mq-maxdelivertime: 2026-02-01 12:00:00",
        b"x-mq-maxattempts: 7",
        b"x-mq-retries: 300, 600,3600",
        b"x-mq-inlinecss: 1",
        b"x-mq-keepmime: 0",
        b"x-normalize: 1",
        b"x-mq-results-queue: r",
        b"x-mq-success-queue:",
        b"x-mq-smarthost-hostname: relay.test",
        b"x-mq-smarthost-port: 2525",
        b"x-mq-smarthost-username: u",
        b"X-MQ-DSN-Notify: FAILURE",
        b"x-mq-dsn-envid: m-77",
        b"x-mq-My-Id: g\xc3\xbcltig\r\n\tund gefaltet",
    ])  # fmt: skip
    properties, mime, ignored = extract(head + b"\r\n" + PLAIN, trusted=True)
    assert mime == PLAIN
    assert ignored == []
    assert properties == {
        "envelope": "bounce@list.test",
        "ips": ["192.0.2.10", "2001:db8::1"],
        "pool": "gold",
        "tags": ["spring", "sale"],
        "delayed": "2026-01-31 12:00:00",
        "maxdelivertime": "2026-02-01 12:00:00",
        "maxattempts": 7,
        "retries": [300, 600, 3600],
        "inlinecss": True,
        "normalize": True,
        "queues": {"results": "r", "success": None},
        "smarthost": {"hostname": "relay.test", "port": 2525, "username": "u"},
        "dsn": {"notify": "FAILURE", "envid": "m-77"},
        "my-id": "gültig und gefaltet",
    }
    assert Message({"recipient": "a@b.test", **properties}).problem() is None


def test_from_strangers_they_are_taken_out_and_ignored() -> None:
    mime = b"x-mq-ip: 192.0.2.1\r\n" + PLAIN
    assert extract(mime, trusted=False) == ({}, PLAIN, [])


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (b"x-mq-ip: everywhere", "expected an IP address"),
        (b"x-mq-maxattempts: -1", "expected a whole number"),
        (b"x-mq-retries: 1,,2", "expected seconds, separated by commas"),
        (b"x-mq-delayed: tomorrow", "'tomorrow' is not a time of the form YYYY-MM-DD HH:MM:SS"),
        (b"x-mq-inlinecss: maybe", "expected 1 or 0"),
        (b"x-mq-envelope: a b@c.test", "'a b@c.test': 'a b' cannot stand before the @"),
        (b"x-mq-tag: a\0b", "holds control characters"),
        (b"x-mq-tag: a\x1b[2Jb", "holds control characters"),
        (b"x-mq-tag: \xff", "holds bytes that are not UTF-8"),
        (b"x-mq-recipient: a@b.test", "is no name for a property"),
        (b"x-mq-mime: x", "is no name for a property"),
        (b"x-mq-: x", "is no name for a property"),
        (b"x-mq-success-queue: " + 256 * b"x", "is longer than 255 bytes"),
        (b"x-mq-success-queue: \xe2\x80\xae", "holds control characters"),
        (b"x-mq-retry-queue: out", "is the outbox, where a result would be sent as mail"),
        (
            b"x-mq-retry-queue: out.wait.1",
            "is a part of the outbox, where a result would be sent as mail",
        ),
    ],
)
def test_what_cannot_be_used_is_ignored_and_said(field: bytes, reason: str) -> None:
    properties, mime, ignored = extract(field + b"\r\n" + PLAIN, trusted=True, outbox="out")
    assert (properties, mime) == ({}, PLAIN)
    assert ignored == [f"{field.partition(b':')[0].decode()}: {reason}"]


SAFE = rights_of(["safe"], longest=3600)


def test_what_is_safe_changes_only_the_mail_of_its_sender() -> None:
    head = b"\r\n".join([
        b"x-mq-tag: spring",
        b"x-mq-delayed: 1970-01-01 00:30:00",
        b"x-mq-maxdelivertime: 1970-01-01 01:00:00",
        b"x-mq-inlinecss: 1",
        b"x-normalize: 1",
        b"x-mq-dsn-notify: NEVER",
        b"x-mq-dsn-ret: HDRS",
        b"x-mq-my-id: 7",
    ])  # fmt: skip
    properties, mime, ignored = extract(head + b"\r\n" + PLAIN, trusted=True, rights=SAFE)
    assert (mime, ignored) == (PLAIN, [])
    assert properties == {
        "tags": ["spring"],
        "delayed": "1970-01-01 00:30:00",
        "maxdelivertime": "1970-01-01 01:00:00",
        "inlinecss": True,
        "normalize": True,
        "dsn": {"notify": "NEVER", "ret": "HDRS"},
        "my-id": "7",
    }


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("envelope: a@b.test", "envelope"),
        ("ip: 192.0.2.1", "ips"),
        ("pool: gold", "pool"),
        ("maxattempts: 1", "maxattempts"),
        ("retries: 1", "retries"),
        ("keepmime: 1", "keepmime"),
        ("results-queue: outbox", "queues"),
        ("failure-queue: q", "queues"),
        ("success-queue:", "queues"),
        ("retry-queue: q", "queues"),
        ("smarthost-name: 127.0.0.1", "smarthost"),
        ("smarthost-hostname: 127.0.0.1", "smarthost"),
        ("dsn-envelope: a@b.test", "dsn"),
        ("dsn-mta: x", "dsn"),
    ],
)
def test_what_is_not_safe_must_be_allowed_by_name(field: str, word: str) -> None:
    mime = f"x-mq-{field}\r\n".encode() + PLAIN
    name = field.partition(":")[0]
    assert extract(mime, trusted=True, rights=SAFE) == (
        {},
        PLAIN,
        [
            f"x-mq-{name}: may not be set by this client; add {word} to smtp-extract, or the"
            " client to smtp-extract-range or smtp-extract-logins"
        ],
    )
    for words in (["all"], [word], ["safe", word]):
        found = extract(mime, trusted=True, rights=rights_of(words, longest=0))
        assert word in found.properties
        assert found.ignored == []
    assert extract(mime, trusted=True, rights=rights_of(["none"], longest=0)).properties == {}


@pytest.mark.parametrize("name", [b"delayed", b"maxdelivertime"])
def test_times_are_bounded_by_how_long_the_operator_keeps_mail(name: bytes) -> None:
    mime = b"x-mq-" + name + b": 1970-01-01 01:00:01\r\n" + PLAIN
    properties, left, ignored = extract(mime, trusted=True, rights=SAFE)
    assert (properties, left) == ({}, PLAIN)
    reason = "is later than max-delivertime lets this client say"
    assert ignored == [f"x-mq-{name.decode()}: {reason}"]
    assert extract(mime, trusted=True, rights=SAFE, now=1).properties
    assert extract(mime, trusted=True).properties


def test_each_field_says_what_it_is_for_and_is_never_reserved() -> None:
    for name, known in FIELDS.items():
        assert known.meaning.endswith(".")
        assert extract(f"x-mq-{name}: ?\r\n\r\n".encode(), trusted=True).ignored != [
            f"x-mq-{name}: is no name for a property"
        ]


@pytest.mark.parametrize("words", [["nonsense"], ["none", "safe"], ["tag"], ["security"]])
def test_words_that_allow_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="none"):
        rights_of(words, longest=0)


@pytest.mark.parametrize("name", [b"requiretls", b"smtputf8", b"security", b"priority"])
def test_what_was_promised_to_a_sender_cannot_be_taken_back(name: bytes) -> None:
    found = extract(b"x-mq-" + name + b": 0\r\n" + PLAIN, trusted=True)
    assert found.properties == {}
    assert found.ignored == [f"x-mq-{name.decode()}: is no name for a property"]


def test_the_first_of_two_counts() -> None:
    found = extract(b"x-mq-pool: a\r\nx-mq-pool: b\r\n" + PLAIN, trusted=True)
    assert found.properties == {"pool": "a"}
    assert found.ignored == ["x-mq-pool: stands there more than once, the first counts"]


def test_a_smarthost_without_its_name_is_none() -> None:
    found = extract(b"x-mq-smarthost-port: 26\r\n" + PLAIN, trusted=True)
    assert found.properties == {}
    assert found.ignored == ["x-mq-smarthost-*: without x-mq-smarthost-hostname"]


def test_reasons_fit_on_one_line_of_a_log() -> None:
    (reason,) = extract(b"A: b\r\nx-mq-\x1b\xff: 1\r\n\r\n", trusted=True).ignored
    assert reason.isascii()
    assert reason.isprintable()


@given(MESSAGES, st.booleans())
@example(b"A: b\rx-mq-c: d\r\n\nx-mq-body: 1\r\n", False)
@example(b"x-mq-a: 1\r\njunk\r\nx-mq-b: 2\r\n\r\nx-mq-c: 3", False)
def test_none_is_left_and_nothing_else_is_lost(mime: bytes, trusted: bool) -> None:
    left = extract(mime, trusted=trusted).mime
    assert extract(left, trusted=True).mime is left
    assert extract(normalised(left), trusted=True).mime == normalised(left)
    before, after = Header(mime), Header(left)
    kept = [mime[f.start : f.end] for f in before.fields() if not f.name.startswith(b"x-mq-")]
    if after.end:  # where only lines that are no fields were left, there is no header now
        assert normalised(b"".join(kept)) == normalised(after.raw)
        assert left[after.body :] == mime[before.body :]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("maxattempt", "maxattempts"), ("Max-Attempts", "maxattempts"),
     ("sucess-queue", "success-queue"),
     ("smarthost-host-name", "smarthost-hostname"), ("my-id", None), ("campaign", None)],
)  # fmt: skip
def test_an_unknown_field_that_may_be_misspelt_is_told(name: str, meant: str | None) -> None:
    found = extract(f"x-mq-{name}: 7\r\n\r\n".encode(), trusted=True)
    assert found.properties == {name.lower(): "7"}
    expected = [(f"x-mq-{name.lower()}", f"x-mq-{meant}")] if meant else []
    assert list(doubts(found.properties)) == expected


def test_known_fields_are_not_misspelt() -> None:
    for name in FIELDS:
        for value in ("1", "192.0.2.1", "2026-01-31 12:00:00", "a@b.test"):
            found = extract(f"x-mq-{name}: {value}\r\n\r\n".encode(), trusted=True)
            assert list(doubts(found.properties)) == []
