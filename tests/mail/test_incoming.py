"""From one mail to one JSON document for each recipient."""

from __future__ import annotations

from itertools import count

import pytest
from msgspec.structs import replace

from mailerq.config import Config
from mailerq.mail.extract import FIELDS_LIMIT
from mailerq.mail.headers import HEADER_LIMIT, HOP_LIMIT
from mailerq.mail.incoming import Envelope, Problem, Reception, messages
from mailerq.rules.documents import problems

ENVELOPE = Envelope(
    "a@b.test",
    ["c@d.test"],
    {"connection": {"remote-ip": "192.0.2.7"}},
    protocol="ESMTP",
    helo="client.test",
    client_ip="192.0.2.7",
)

MIME = b"Message-ID: <1@b.test>\r\nSubject: x\r\n\r\nhi\r\n"


def build(mime: bytes = MIME, envelope: Envelope = ENVELOPE) -> Reception:
    numbers = count(1)
    made = messages(mime, envelope, hostname="mx.test", now=0, next_id=lambda: f"id{next(numbers)}")
    assert isinstance(made, Reception)
    return made


def refusal(mime: bytes, envelope: Envelope = ENVELOPE) -> Problem:
    made = messages(mime, envelope, hostname="mx.test", now=0, next_id=lambda: "id")
    assert isinstance(made, Problem)
    return made


def test_a_document_says_where_the_mail_came_from() -> None:
    (message,) = build().messages
    assert message.properties == {
        "message-id": "id1",
        "received": "1970-01-01 00:00:00",
        "hostname": "mx.test",
        "envelope": "a@b.test",
        "recipient": "c@d.test",
        "connection": {"remote-ip": "192.0.2.7"},
    }


def test_a_received_field_is_put_on_top_and_the_rest_stays_as_it_is() -> None:
    (message,) = build().messages
    assert message.body is not None
    assert message.body.startswith(b"Received: from client.test ([192.0.2.7])\r\n\tby mx.test")
    assert b"for <c@d.test>" in message.body
    assert message.body.endswith(b"+0000\r\n" + MIME)


def test_recipients_share_one_body_and_do_not_learn_of_each_other() -> None:
    made = build(envelope=replace(ENVELOPE, recipients=["c@d.test", "e@f.test"])).messages
    assert [message.recipient for message in made] == ["c@d.test", "e@f.test"]
    assert [message.properties["message-id"] for message in made] == ["id1", "id2"]
    assert made[0].body is made[1].body
    assert made[0].body is not None
    assert b"d.test" not in made[0].body


def test_a_message_id_is_added_where_there_is_none() -> None:
    (message,) = build(b"Subject: x\r\n\r\nhi\r\n").messages
    assert message.body is not None
    assert b"\r\nMessage-ID: <id1@mx.test>\r\nSubject: x\r\n\r\nhi\r\n" in message.body


def test_an_empty_mail_gets_a_header() -> None:
    (message,) = build(b"").messages
    assert message.body is not None
    assert message.body.endswith(b"Message-ID: <id1@mx.test>\r\n")


def test_mail_without_a_header_keeps_its_text_below_an_empty_line() -> None:
    (message,) = build(b"just text\r\n").messages
    assert message.body is not None
    assert message.body.endswith(b"\r\n\r\njust text\r\n")


def test_fields_of_a_trusted_client_become_properties() -> None:
    mime = b"X-MQ-Tag: spring\r\nx-mq-envelope: bounce@b.test\r\n" + MIME
    (message,) = build(mime, replace(ENVELOPE, trusted=True)).messages
    assert message.properties["tags"] == ["spring"]
    assert message.envelope == "bounce@b.test"
    assert message.body is not None
    assert b"x-mq" not in message.body.lower()


def test_fields_of_a_stranger_are_taken_out_and_ignored() -> None:
    (message,) = build(b"x-mq-smarthost-hostname: evil.test\r\n" + MIME).messages
    assert "smarthost" not in message.properties
    assert message.body is not None
    assert b"x-mq" not in message.body


def test_mail_that_is_looping_is_not_taken() -> None:
    hops = HOP_LIMIT * b"Received: from x by y; z\r\n"
    assert refusal(hops + MIME) is Problem.LOOP
    assert build(hops[: -len(b"Received: from x by y; z\r\n")] + MIME)


def test_a_mail_that_was_accepted_is_not_looping_when_it_is_sent() -> None:
    field = b"Received: from x by y; z\r\n"
    (message,) = build((HOP_LIMIT - 1) * field + MIME).messages
    config = Config(hostname="mx.test")
    assert not [*problems(message, config, now=0)]
    assert message.body is not None
    message.body = field + message.body
    assert "a mail loop" in "".join(problems(message, config, now=0))


def test_a_header_ends_within_its_limit() -> None:
    head = b"Subject: x\r\n"
    fill = b"A:" + (HEADER_LIMIT - len(head) - 6) * b"b" + b"\r\n"
    body = 100 * b"text\r\n"
    assert build(head + fill + b"\r\n" + body).messages[0].body
    assert refusal(head + b"xxx" + fill + b"\r\n" + body) is Problem.HEADER
    assert refusal(head + 2 * fill) is Problem.HEADER


def test_text_that_is_no_header_may_be_as_long_as_a_mail() -> None:
    (message,) = build(2 * HEADER_LIMIT * b"x").messages
    assert message.body is not None
    assert message.body.endswith(b"\r\n\r\n" + 2 * HEADER_LIMIT * b"x")


@pytest.mark.parametrize("trusted", [True, False])
def test_x_mq_fields_have_a_limit_together(trusted: bool) -> None:
    envelope = replace(ENVELOPE, trusted=trusted)
    field = b"x-mq-tag: spring\r\n"
    most = FIELDS_LIMIT // len(field)
    assert build(most * field + MIME, envelope)
    assert refusal((most + 1) * field + MIME, envelope) is Problem.FIELDS
    assert refusal(b"x-mq-tag:" + FIELDS_LIMIT * b"\r\n x" + b"\r\n" + MIME) is Problem.FIELDS


def test_messages_share_no_object_that_could_be_edited() -> None:
    mime = b"x-mq-tag: spring\r\n" + MIME
    envelope = replace(ENVELOPE, recipients=["c@d.test", "e@f.test"], trusted=True)
    one, two = build(mime, envelope).messages
    one.properties["tags"].append("edited")
    one.properties["connection"]["remote-ip"] = "edited"
    assert two.properties["tags"] == ["spring"]
    assert two.properties["connection"] == {"remote-ip": "192.0.2.7"}


@pytest.mark.parametrize(
    ("fields", "waived"),
    [
        (b"TLS-Required: No\r\n", True),
        (b"tls-required:\r\n no\r\n", True),
        (b"TLS-Required: Yes\r\n", False),
        (b"TLS-Required: No\r\nTLS-Required: No\r\n", False),
        (b"X-TLS-Required: No\r\n", False),
        (b"TLS-Required-Not: No\r\n", False),
        (b"", False),
    ],
)
def test_mail_that_rather_arrives_without_tls_has_a_property(fields: bytes, waived: bool) -> None:
    for trusted in (False, True):
        (message,) = build(fields + MIME, replace(ENVELOPE, trusted=trusted)).messages
        assert message.properties.get("tlsrequired", True) is not waived
    envelope = replace(ENVELOPE, properties={"requiretls": True})
    (message,) = build(fields + MIME, envelope).messages
    assert "tlsrequired" not in message.properties


def test_no_field_of_a_client_waives_tls_by_itself() -> None:
    (message,) = build(
        b"x-mq-tlsrequired: false\r\n" + MIME, replace(ENVELOPE, trusted=True)
    ).messages
    assert "tlsrequired" not in message.properties
