"""Mail made of properties through a whole engine: published, by SMTP, large, after a restart."""

from __future__ import annotations

import email
import email.policy
from pathlib import Path
from typing import Any

import pytest

from mailerq import Engine
from mailerq.errors import MessageError
from tests.support import Sink, configure, open_sink, send

BASE = {"envelope": "a@b.test", "recipient": "c@d.test"}
TEMPLATE = "Subject: Hi {$name}\r\n\r\nDear {$name}\r\n"


def settings(sink: Sink) -> dict[str, Any]:
    return {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": sink.port}


async def test_documents_are_published_and_sent_as_mails(tmp_path: Path) -> None:
    large = (
        "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n"
        + TEMPLATE.replace("\r\n\r\n", "\r\n\r\n--b\r\n\r\n")
        + "--b\r\nContent-Disposition: attachment\r\n\r\n"
        + (76 * "x" + "\r\n") * 40_000
        + "--b--\r\n"
    )
    async with open_sink() as sink, Engine(configure(tmp_path, **settings(sink))) as engine:
        await engine.publish({**BASE, "mime": TEMPLATE, "data": {"name": "Ann"}})
        await engine.publish({**BASE, "mime": {"subject": "Hi Ann", "text": "Dear Ann\r\n"}})
        await engine.publish({**BASE, "mime": large, "data": {"name": "Ann"}})
        mails = await sink.wait_for(3)
    for mail in mails:
        assert b"Subject: Hi Ann\r\n" in mail.body and b"\r\nDear Ann\r\n" in mail.body
        assert b"\r\nMessage-ID: <" in mail.body and b"\r\nDate: " in mail.body
    assert max(len(mail.body) for mail in mails) > 3_000_000


async def test_a_form_that_cannot_be_sent_is_refused_when_it_is_published(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path)) as engine:
        for properties, problem in (
            ({"mime": {"content": {"blocks": []}}}, "property mime.content: is an object"),
            ({"mime": "x", "headers": {"add": {"a b": ""}}}, "property headers.add: 'a b'"),
            ({"mime": "x", "data": []}, "property data: expected an object"),
        ):
            with pytest.raises(MessageError, match=problem):
                await engine.publish({**BASE, **properties})


async def test_fields_of_a_mail_ask_for_style_sheets_to_move(tmp_path: Path) -> None:
    pytest.importorskip("css_inline")
    mime = (
        b"x-mq-inlinecss: 1\r\nx-normalize: 1\r\nSubject: x\r\nContent-Type: text/html\r\n\r\n"
        b"<html><head><style>p{color:red}</style></head><body><p>hi</p></body></html>\r\n"
    )
    async with open_sink() as sink, Engine(configure(tmp_path, **settings(sink))) as engine:
        code, _ = await send(engine.addresses[0], mime)
        assert code == 250
        (mail,) = await sink.wait_for(1)
    parsed = email.message_from_bytes(mail.body, policy=email.policy.default)
    assert '<p style="color: red;">hi</p>' in parsed.get_payload()
    assert "x-mq-inlinecss" not in parsed


async def test_what_waits_over_a_restart_is_made_of_the_stored_document(tmp_path: Path) -> None:
    document = {
        **BASE,
        "mime": {"subject": "Grüße", "text": "hi", "attachments": [{"data": "AAEC"}]},
        "data": {"name": "Ann"},
    }
    async with open_sink() as sink:
        # It may have been tried before the engine stops, and is not to wait longer for that.
        refused = {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": 1, "retry_interval": (0,)}
        async with Engine(configure(tmp_path, **refused)) as engine:
            await engine.publish(document)
        async with Engine(configure(tmp_path, **settings(sink))) as engine:
            (mail,) = await sink.wait_for(1)
    parsed = email.message_from_bytes(mail.body, policy=email.policy.default)
    assert parsed["subject"] == "Grüße"
