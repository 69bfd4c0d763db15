"""Reports to senders from a whole engine: from reception to the report, and loops that end."""

from __future__ import annotations

import email
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.message import Message
from mailerq.plugins import Connection, Reject
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.engine.kit import open_dialog
from tests.engine.test_operators import Commands, delivering, put_off
from tests.signing_kit import Keys, dkimpy_says, ed25519_pem, rsa_pem, signatures, tags
from tests.support import DEADLINE, configure, open_sink, send, until, until_found

BODY = b"Message-ID: <m1@b.test>\r\nSubject: Hi\r\n\r\nhello\r\n"
SENT = b"From: Ann <a@b.test>\r\n" + BODY
GONE = Reply(550, "5.1.1 no such user")


async def take(engine: Engine, queue: str, count: int) -> list[Message]:
    """Take messages out of a queue."""
    found = []
    with trio.fail_after(DEADLINE):
        async with engine.consume(queue) as leases:
            for _ in range(count):
                lease = await leases.receive()
                found.append(lease.message)
                await engine.ack(lease)
    return found


def told(body: bytes | None) -> list[dict[str, str]]:
    """The fields about each recipient of a report."""
    assert body is not None
    parts: Any = email.message_from_bytes(body).get_payload()
    return [dict(block.items()) for block in parts[1].get_payload()[1:]]


def refuse(event: object) -> Reply | None:
    return GONE if isinstance(event, server.Rcpt) and "gone" in event.recipient else None


async def test_mail_that_came_by_smtp_and_fails_comes_back(tmp_path: Path) -> None:
    async with delivering(tmp_path) as (engine, sink):
        sink.decide = refuse
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.codes(
                "MAIL FROM:<a@b.test> ENVID=QQ314159 RET=HDRS",
                "RCPT TO:<gone@d.test> NOTIFY=FAILURE ORCPT=rfc822;old@d.test",
                "RCPT TO:<gone2@d.test>",
                "RCPT TO:<gone3@d.test> NOTIFY=NEVER",
                "RCPT TO:<here@d.test>",
            )
            await dialog.say("DATA")
            await dialog.send(BODY + b".\r\n")
            assert (await dialog.reply()).startswith("250")
        await until_found(
            lambda: found(engine), lambda each: each == {"failed": 3, "waiting": 0, "leased": 0}
        )
    reports = [mail for mail in sink.mails if mail.sender == ""]
    assert {tuple(mail.recipients) for mail in reports} == {("a@b.test",)}
    fields = {each["Final-Recipient"]: each for mail in reports for each in told(mail.body)}
    assert fields.keys() == {"rfc822; gone@d.test", "rfc822; gone2@d.test"}
    first = fields["rfc822; gone@d.test"]
    assert first["Original-Recipient"] == "rfc822; old@d.test"
    assert first["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user"
    assert all(b"Original-Envelope-Id: QQ314159\r\n" in mail.body for mail in reports)
    assert all(b"Received-From-MTA: dns; [127.0.0.1]\r\n" in mail.body for mail in reports)
    assert all(b"Subject: Hi\r\n" in mail.body for mail in reports)


async def found(engine: Engine) -> dict[str, int]:
    figures = engine.statistics()
    depths = await engine.queues.depths()
    return {
        "failed": figures["outgoing"]["failed"],
        "waiting": sum(each.total for each in depths if each.queue == "outbox"),
        "leased": figures["queue"]["leased"].get("outbox", 0),
    }


async def test_recipients_that_a_plugin_refuses_after_the_250_share_a_report(
    tmp_path: Path,
) -> None:
    def message(connection: Connection, message: Message) -> Reject | None:
        name = message.recipient.partition("@")[0]
        if name == "later":
            return Reject(450, "4.7.0 not now")
        return Reject(554, "5.7.1 no spam") if name.startswith("bad") else None

    async with open_sink() as sink:
        config = configure(
            tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port, rabbitmq_dsn="dsn"
        )
        engine = Engine(config)
        engine.on("message", message)
        async with engine:
            names = ("good@d.test", "bad1@d.test", "bad2@d.test", "later@d.test")
            code, _ = await send(engine.addresses[0], BODY, recipients=names)
            assert code == 250
            (report,) = await take(engine, "dsn", 1)
            code, _ = await send(engine.addresses[0], BODY, sender="", recipients=names)
            assert code == 250
            code, _ = await send(engine.addresses[0], BODY, recipients=names[1:])
            assert code == 450
            await sink.wait_for(2)
            depths = {each.queue: each.total for each in await engine.queues.depths()}
            assert depths.get("dsn", 0) == 0, "neither the null sender, nor who saw the refusal"
    fields = told(report.body)
    assert [each["Final-Recipient"] for each in fields] == [
        "rfc822; bad1@d.test", "rfc822; bad2@d.test", "rfc822; later@d.test",
    ]  # fmt: skip
    assert [each["Status"] for each in fields] == ["5.7.1", "5.7.1", "4.7.0"]
    assert fields[0]["Diagnostic-Code"] == "X-mailerq; 554 5.7.1 no spam"
    assert (report.envelope, report.recipient) == ("", "a@b.test")


@pytest.mark.parametrize(
    ("parameters", "sender", "delivered"),
    [
        ("NOTIFY=SUCCESS", "a@b.test", True),
        ("NOTIFY=FAILURE,DELAY", "a@b.test", False),
        ("NOTIFY=NEVER", "a@b.test", False),
        ("", "a@b.test", False),
        ("NOTIFY=SUCCESS", "", False),
    ],
)
async def test_mail_that_a_queue_for_local_mail_has_is_delivered(
    tmp_path: Path, parameters: str, sender: str, delivered: bool
) -> None:
    settings: dict[str, Any] = {"smtp_local_domains": ("d.test",), "rabbitmq_local": "local"}
    async with delivering(tmp_path, **settings, rabbitmq_dsn="dsn") as (engine, sink):
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.codes(
                f"MAIL FROM:<{sender}> RET=FULL",
                f"RCPT TO:<c@d.test> {parameters} ORCPT=rfc822;x@d.test".replace("  ", " "),
                "RCPT TO:<else@where.test> NOTIFY=NEVER",
            )
            await dialog.say("DATA")
            await dialog.send(BODY + b".\r\n")
            assert (await dialog.reply()).startswith("250")
        await sink.wait_for(1)
        (kept,) = await take(engine, "local", 1)
        depths = {each.queue: each.total for each in await engine.queues.depths()}
        assert depths.get("dsn", 0) == delivered
        if not delivered:
            return
        (report,) = await take(engine, "dsn", 1)
    (fields,) = told(report.body)
    assert (fields["Action"], fields["Status"]) == ("delivered", "2.0.0")
    assert fields["Original-Recipient"] == "rfc822; x@d.test"
    assert fields["Final-Log-ID"] == kept.properties["message-id"]
    assert report.recipient == "a@b.test" and b"hello" not in (report.body or b"")


async def test_a_mail_that_an_operator_bounces_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with delivering(tmp_path) as (engine, sink):
        command = Commands(engine, capsys)
        sink.decide = lambda event: Reply(450, "no") if isinstance(event, server.Mail) else None
        await engine.publish({
            "envelope": "a@b.test", "recipient": "ann@d.test", "dsn": {"ret": "FULL"},
            "mime": BODY.decode(),
        })  # fmt: skip
        await until_found(lambda: found(engine), lambda each: each["waiting"] == 1)
        await until(lambda: engine.statistics()["outgoing"]["retried"] == 1)
        sink.decide = lambda event: None
        ((done),) = await command("bounce", "--recipient=ann@d.test", "--reason=spam", "--yes")
        assert done["done"] == 1
        (mail,) = await sink.wait_for(1)
    assert (mail.sender, mail.recipients) == ("", ["a@b.test"])
    (fields,) = told(mail.body)
    assert fields["Diagnostic-Code"].startswith("X-mailerq; 554 5.7.1 bounced by ")
    assert BODY in mail.body


async def test_two_servers_that_send_each_other_everything_end(tmp_path: Path) -> None:
    """The mail goes round until it has too many hops; its report does the same, and that is all."""
    engines = [
        Engine(configure(tmp_path / name, hostname=f"{name}.test", smtp_sink_address="127.0.0.1"))
        for name in ("a", "b")
    ]
    async with engines[0], engines[1]:
        for engine, other in (engines, engines[::-1]):
            ((_, port),) = other.addresses
            engine.reload(engine.config.replace(smtp_sink_port=port))
        code, _ = await send(engines[0].addresses[0], BODY)
        assert code == 250

        async def both() -> tuple[int, int, int]:
            each = [await found(engine) for engine in engines]
            failed, waiting = sum(e["failed"] for e in each), sum(e["waiting"] for e in each)
            reports = sum(engine.statistics()["outgoing"]["reports"] for engine in engines)
            return failed, waiting, reports

        with trio.fail_after(DEADLINE):
            assert await until_found(both, lambda seen: seen[:2] == (2, 0)) == (2, 0, 1)
        delivered = sum(engine.statistics()["outgoing"]["delivered"] for engine in engines)
        assert 150 < delivered < 220


async def test_texts_and_keys_are_read_at_the_start_and_again_at_a_reload(tmp_path: Path) -> None:
    texts, keys = tmp_path / "texts.toml", tmp_path / "keys"
    texts.write_text(
        '[[text]]\nlanguage = "en"\nevent = "failed"\nsubject = "Oh"\ntext = "x"\nname = "Post"\n'
    )
    keys.write_text("a AeJ2xBrJJPd1vlTV7pVf3OlB\n")
    files: dict[str, Any] = {"dsn_texts_file": str(texts), "verp_key_file": str(keys)}
    async with delivering(tmp_path, **files, verp_domains=("b.test",)) as (engine, sink):
        sink.decide = refuse
        await send(engine.addresses[0], BODY, recipients=("gone@d.test",))
        (mail,) = await sink.wait_for(1)
        assert b"\r\nSubject: Oh\r\n" in mail.body
        assert mail.recipients == ["a@b.test"]
        await send(engine.addresses[0], BODY, recipients=("here@d.test",))
        *_, mail = await sink.wait_for(2)
        assert mail.sender.startswith("a+a")
        assert mail.sender.endswith("-here=d.test@b.test")
        texts.write_text(texts.read_text().replace("Oh", "Ah"))
        keys.write_text("b n0mZVt0L4HcbOCzoUXHOZyTF\n")
        engine.reload()
        await send(engine.addresses[0], BODY, recipients=("here@d.test", "gone@d.test"))
        mails = (await sink.wait_for(4))[2:]
        assert {mail.sender[:3] for mail in mails} == {"a+b", ""}
        assert any(b"\r\nSubject: Ah\r\n" in mail.body for mail in mails)
        keys.write_text("nonsense")
        with pytest.raises(ConfigError, match="line 1: expected an id and a secret"):
            engine.reload()


async def test_a_start_with_unusable_texts_says_where(tmp_path: Path) -> None:
    texts = tmp_path / "texts.toml"
    texts.write_text("[[text]]\n")
    config: Config = configure(tmp_path, dsn_texts_file=str(texts))
    with pytest.raises(ConfigError, match=r"texts\.toml:1: a \[\[text\]\] needs a language"):
        async with Engine(config):
            pass


@pytest.mark.parametrize("whole", [False, True])
async def test_a_report_is_signed_by_the_keys_of_its_from_domain(
    tmp_path: Path, whole: bool
) -> None:
    keys = Keys(tmp_path / "dkim")
    for selector, pem in (("r1", rsa_pem()), ("e1", ed25519_pem())):
        keys.add("bounces.test", selector, pem)
    keys.add("b.test", "other", ed25519_pem(1))
    settings: dict[str, Any] = {
        "dkim_directory": str(keys.directory), "dsn_mta": "bounces.test",
        "dsn_ret": "FULL" if whole else "HDRS",
    }  # fmt: skip
    async with delivering(tmp_path, **settings) as (engine, sink):
        sink.decide = refuse
        await send(engine.addresses[0], SENT, recipients=("gone@d.test",))
        (mail,) = await sink.wait_for(1)
    assert (mail.sender, mail.recipients) == ("", ["a@b.test"])
    assert email.message_from_bytes(mail.body)["From"].endswith("<MAILER-DAEMON@bounces.test>")
    assert (SENT in mail.body) is whole
    assert {tags(each)["s"] for each in signatures(mail.body)} == {"r1", "e1"}
    assert dkimpy_says(mail.body, keys.records) == [True, True]
    changed = mail.body.replace(b"no such user", b"what a pity")
    assert dkimpy_says(changed, keys.records) == [False, False]


async def test_put_off_mail_makes_no_report(tmp_path: Path) -> None:
    async with delivering(tmp_path, dsn_notify_json=("FAILURE",)) as (engine, sink):
        await put_off(engine, sink, "ann")
        assert engine.statistics()["outgoing"]["reports"] == 0
