"""Reports that come in: recognised, matched with proof, queued apart, and acted upon if wanted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Connection, Engine, Reject
from mailerq.errors import ConfigError
from mailerq.inbound import reports as inbound_reports
from mailerq.mail import verp
from mailerq.mail.trace import trace_field
from mailerq.message import Message
from mailerq.outbound import suppressing
from mailerq.store.row_file import AUDIT_NAME
from tests.engine.kit import open_dialog
from tests.mail import report_samples as samples
from tests.mail import report_shapes as shapes
from tests.support import DEADLINE, configure, open_sink, send, until

KEY = "a AeJ2xBrJJPd1vlTV7pVf3OlB"
KEYS = verp.parse_keys(KEY)
OTHER_KEYS = verp.parse_keys("a 0000000000000000000000000")

BASE = "news@list.test"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "keys"
    file.write_text(KEY)
    return {
        "rabbitmq_reports": "reports",
        "rabbitmq_local": "local",
        "smtp_local_domains": ("d.test",),
        "smtp_relay_range": (),
        "verp_key_file": str(file),
    }


def returned(
    recipient: str = "ann@example.org",
    *,
    keys: Any = KEYS,
    now: float | None = None,
    base: str = BASE,
) -> str:
    address = verp.encode(base, recipient, keys, now=time.time() if now is None else now)
    assert address is not None
    return address


async def take(engine: Engine, queue: str) -> Message:
    with trio.fail_after(DEADLINE):
        async with engine.consume(queue) as leases:
            lease = await leases.receive()
            await engine.ack(lease)
            return lease.message


async def report(engine: Engine) -> dict[str, Any]:
    message = await take(engine, "reports")
    value = message.properties["report"]
    assert isinstance(value, dict)
    return value


async def bounce(
    engine: Engine, mime: bytes = shapes.POSTFIX, *recipients: str, sender: str = ""
) -> str:
    code, text = await send(
        engine.addresses[0], mime, sender=sender, recipients=recipients or ("bounces@d.test",)
    )
    assert code == 250
    return text


# Which queue


async def test_a_report_for_a_local_recipient_goes_to_its_queue(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine)
        message = await take(engine, "reports")
        assert (message.envelope, message.recipient) == ("", "bounces@d.test")
        assert message.body is not None and message.body.endswith(shapes.POSTFIX)
        value = message.properties["report"]
        assert (value["type"], value["status"]) == ("delivery-status", "5.1.1")
        assert (value["matched-by"], value["proved"]) == ("envid", False)
        assert "verp" not in value
        assert json.loads(message.to_json())["report"] == value
        assert engine.statistics()["incoming"]["reports"] == 1


async def test_other_mail_goes_where_it_went(tmp_path: Path, settings: dict[str, Any]) -> None:
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, b"Subject: hi\r\n\r\nhello\r\n", sender="a@b.test")
        assert "report" not in (await take(engine, "local")).properties
        assert engine.statistics()["incoming"]["reports"] == 0


async def test_mail_of_the_null_sender_is_called_a_reply_and_goes_where_it_went(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    mail = b"Subject: away\r\n\r\nhello\r\n"
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, mail)
        message = await take(engine, "local")
        assert message.properties["report"] == {
            "type": "auto-reply", "auto-submitted": "null-sender", "subject": "away",
        }  # fmt: skip
        assert engine.statistics()["incoming"]["reports"] == 0
        # At a return address only replies and reports arrive.
        await bounce(engine, mail, returned())
        value = await report(engine)
        assert (value["type"], value["proved"]) == ("auto-reply", True)


@pytest.mark.parametrize("setting", [{"report_types": ("bounce",)}, {"rabbitmq_reports": ""}])
async def test_unwanted_replies_have_no_mark(
    tmp_path: Path, settings: dict[str, Any], setting: dict[str, Any]
) -> None:
    async with Engine(configure(tmp_path, **{**settings, **setting})) as engine:
        await bounce(engine, b"Subject: away\r\n\r\nhello\r\n")
        assert "report" not in (await take(engine, "local")).properties


async def test_a_reply_to_a_return_address_is_other_mail_if_replies_are_unwanted(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async with Engine(configure(tmp_path, **settings, report_types=("other",))) as engine:
        await bounce(engine, b"Subject: away\r\n\r\nhello\r\n", returned())
        assert (await report(engine))["type"] == "other"


async def test_without_the_setting_nothing_is_looked_at(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound_reports, "is_candidate", None)
    settings["rabbitmq_reports"] = ""
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine)
        assert "report" not in (await take(engine, "local")).properties


async def test_a_report_that_goes_on_is_left_alone(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The recipient is not local: a client that may relay sends a bounce to somebody else."""
    settings |= {"smtp_relay_range": ("127.0.0.0/8",), "rabbitmq_inbox": "inbox"}
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, shapes.POSTFIX, "somebody@elsewhere.test")
        assert "report" not in (await take(engine, "inbox")).properties


async def test_only_the_wanted_types_go_to_the_queue(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings["report_types"] = ("complaint",)
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine)
        assert "report" not in (await take(engine, "local")).properties
        await bounce(engine, shapes.YAHOO_COMPLAINT, sender="feedback@yahoo.example")
        assert (await report(engine))["type"] == "complaint"


async def test_each_recipient_has_its_own_way(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"smtp_relay_domains": ("r.test",), "rabbitmq_inbox": "inbox"}
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, shapes.POSTFIX, "a@d.test", "b@r.test", returned("cy@example.org"))
        found = [await take(engine, "reports") for _ in range(2)]
        assert [each.properties["report"]["matched-by"] for each in found] == ["envid", "verp"]
        assert "report" not in (await take(engine, "inbox")).properties


async def test_mailboxes_behind_lmtp_get_their_reports(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Only return addresses and what smtp-local-addresses names are read by a program there."""
    addresses = tmp_path / "addresses"
    addresses.write_text("bounces@d.test\n")
    settings |= {
        "rabbitmq_local": "",
        "local_delivery": "lmtp://127.0.0.1:1",
        "smtp_sink_address": "127.0.0.1",
        "smtp_local_addresses": str(addresses),
    }
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(
            engine, shapes.POSTFIX, "ann@d.test", "bounces@d.test", returned(base="x@d.test")
        )
        found = [(await take(engine, "reports")).recipient for _ in range(2)]
        assert found[0] == "bounces@d.test"
        assert found[1].startswith("x+")
        assert engine.statistics()["incoming"]["reports"] == 2


async def test_a_mail_that_cannot_be_read_takes_the_usual_way(
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(inbound_reports, "recognise", fail)
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine)
        assert "report" not in (await take(engine, "local")).properties
    assert "a mail cannot be read as a report" in caplog.text


async def test_a_report_that_says_very_much_is_taken(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Its property has less room than that takes."""
    group = (
        "Final-Recipient: rfc822; a@b.test\r\nDiagnostic-Code: x; {}\r\nFinal-Log-ID: {}\r\n\r\n"
    )
    groups = 80 * group.format(800 * "\U0001f4e7", 800 * "\U0001f4e7")
    mime = b"Content-Type: message/delivery-status\r\n\r\n" + groups.encode()
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, mime)
        value = await report(engine)
        assert value["problem"] == "the report says more than 65536 bytes: a part is left out"
        assert value["recipient"] == "a@b.test"
        assert value["recipient-count"] > 30


async def test_a_large_report_is_read_in_a_thread(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["smtp_spill_size"] = 1 << 16
    async with Engine(configure(tmp_path, **settings)) as engine:
        for size in (50_000, 3_000_000):
            await bounce(engine, shapes.POSTFIX + size // 10 * b"12345678\r\n")
            assert (await report(engine))["status"] == "5.1.1"


# Return addresses


async def test_a_return_address_of_ours_is_proof(tmp_path: Path, settings: dict[str, Any]) -> None:
    """It is local wherever its domain is."""
    async with Engine(configure(tmp_path, **settings)) as engine:
        address = returned()
        await bounce(engine, shapes.POSTFIX, address.upper())
        value = await report(engine)
        assert (value["matched-by"], value["proved"]) == ("verp", True)
        assert value["verp"]["verified"] is True
        assert value["verp"]["recipient"].lower() == "ann@example.org"
        assert value["verp"]["envelope"].lower() == BASE


async def test_all_mail_to_a_return_address_goes_to_the_queue(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(
            engine, b"Subject: hi\r\n\r\nplease stop", returned(), sender="ann@example.org"
        )
        value = await report(engine)
        assert (value["type"], value["matched-by"], value["proved"]) == ("other", "verp", True)


async def test_a_forged_or_expired_return_address_is_refused_at_once(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    forged = returned(base="news@d.test", keys=OTHER_KEYS)
    expired = returned(base="news@d.test", now=time.time() - 32 * 86400)
    foreign = returned(keys=OTHER_KEYS)
    async with (
        Engine(configure(tmp_path, **settings)) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        await dialog.say("MAIL FROM:<>")
        replies = [await dialog.say(f"RCPT TO:<{each}>") for each in (forged, expired, foreign)]
        assert replies == [
            "550 5.7.1 This return address was not issued here",
            "550 5.7.1 This return address has expired",
            "550 5.7.1 Relaying denied",
        ]
        tag = (
            f"RCPT TO:<{'x+' + 20 * 'a'}@d.test>"  # a plain extension, without the form of a token
        )
        assert await dialog.codes(tag, f"RCPT TO:<{returned(base='news@d.test')}>") == [250, 250]


async def test_return_addresses_of_others_are_relayed(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"smtp_relay_range": ("127.0.0.0/8",), "rabbitmq_inbox": "inbox"}
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, shapes.POSTFIX, returned(keys=OTHER_KEYS))
        assert "report" not in (await take(engine, "inbox")).properties


async def test_a_return_address_needs_no_other_local_queue(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"rabbitmq_local": "", "smtp_local_domains": ()}
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, shapes.POSTFIX, returned())
        assert (await report(engine))["proved"] is True


async def test_the_limit_of_recipients_counts_return_addresses(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings["smtp_client_recipients"] = 1
    async with (
        Engine(configure(tmp_path, **settings)) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        rcpt = f"RCPT TO:<{returned()}>"
        assert await dialog.codes("MAIL FROM:<>", rcpt, rcpt) == [250, 250, 450]


async def test_explain_says_what_becomes_of_mail_to_a_return_address(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    forged = returned(base="news@d.test", keys=OTHER_KEYS)
    async with Engine(configure(tmp_path, **settings)) as engine:
        answers = [
            await engine._explain({"recipient": each})
            for each in (returned(), forged, "bounces@d.test")
        ]
    assert [(answer["decision"], answer["reason"]) for answer in answers] == [
        (
            "local",
            "a return address that this server has signed: goes to the queue reports,"
            " see rabbitmq-reports",
        ),
        ("fail", "refused on arrival: the return address is forged"),
        ("local", "goes to the queue local, see rabbitmq-local; reports go to reports"),
    ]


# The trace field


async def test_mail_goes_out_with_a_trace_that_comes_back_as_proof(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"trace_header": "X-Trace", "smtp_sink_address": "127.0.0.1"}
    async with open_sink() as sink:
        config = configure(tmp_path, **settings, smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            recipient = "a.quite.long.name@a-long-host-name.in.a-long-domain.example.org"
            await engine.publish(
                {"envelope": BASE, "recipient": recipient, "mime": "Subject: hi\r\n\r\nhello"}
            )
            await engine.publish(
                {
                    "envelope": BASE,
                    "recipient": recipient,
                    "mime": "Subject: hi\r\n\r\n" + 400_000 * "x",
                    "message-id": "m2",
                }
            )
            mails = await sink.wait_for(2)
            for mail in mails:
                head = mail.body.partition(b"\r\n\r\n")[0]
                assert head.startswith(b"X-Trace:")
                assert max(map(len, head.split(b"\r\n"))) <= 78
                complaint = shapes.YAHOO_COMPLAINT.replace(
                    b"Message-ID: <83.jo@list.test>", head.replace(b"\r\n ", b" ")
                )
                await bounce(engine, complaint, sender="feedback@yahoo.example")
                value = await report(engine)
                assert (value["matched-by"], value["proved"]) == ("trace", True)
                assert value["trace"] == {"recipient": recipient}
            assert value["message-id"] in ("m2", value["message-id"])


async def test_mail_has_no_trace_unless_wanted(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"smtp_sink_address": "127.0.0.1"}
    async with (
        open_sink() as sink,
        Engine(configure(tmp_path, **settings, smtp_sink_port=sink.port)) as engine,
    ):
        await engine.publish({"recipient": "c@d.example", "mime": "Subject: hi\r\n\r\nhello"})
        (mail,) = await sink.wait_for(1)
        assert mail.body.startswith(b"Subject: hi")


async def test_made_mail_has_a_trace(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"trace_header": "X-Trace", "smtp_sink_address": "127.0.0.1"}
    async with (
        open_sink() as sink,
        Engine(configure(tmp_path, **settings, smtp_sink_port=sink.port)) as engine,
    ):
        mime = {"subject": "hi", "text": "hello"}
        await engine.publish({"recipient": "c@e.test", "envelope": BASE, "mime": mime})
        (mail,) = await sink.wait_for(1)
        assert mail.body.startswith(b"X-Trace:")
        assert b"\r\nSubject: hi\r\n" in mail.body


# Suppressions


def traced(recipient: str, mime: bytes = shapes.YAHOO_COMPLAINT, keys: Any = KEYS) -> bytes:
    field = trace_field("X-Trace", "7f", recipient, keys, now=time.time())
    old = b"Message-ID: <83.jo@list.test>\r\n"
    assert old in mime
    return mime.replace(old, field + old)


async def suppressed(engine: Engine, recipient: str) -> bool:
    await engine.publish({"recipient": recipient, "mime": "Subject: hi\r\n\r\nhello"})
    message = await take(engine, "results")
    return message.results[-1]["state"] == "suppression"


WISHES: dict[str, Any] = {
    "suppress_bounces": "hard",
    "suppress_complaints": True,
    "trace_header": "X-Trace",
    "rabbitmq_results": "results",
    "smtp_sink_address": "127.0.0.1",
}


async def test_a_proved_hard_bounce_suppresses_its_recipient(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with open_sink() as sink:
        config = configure(tmp_path, **settings, **WISHES, smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            await bounce(engine, shapes.POSTFIX, returned("Ann@Example.org"))
            # The reply came after the row.
            assert engine.statistics()["rows"]["suppressed"] == 1
            assert await suppressed(engine, "ann@example.org")
            await bounce(engine, shapes.POSTFIX, returned("Ann@Example.org"))
            assert engine.statistics()["rows"]["suppressed"] == 1
        (line,) = (Path(config.queue_directory) / AUDIT_NAME).read_text().splitlines()
        entry = json.loads(line)
        assert entry["who"] == "reports"
        assert entry["why"] == "hard bounce 5.1.1, reported by mx.example.org"
        assert entry["values"] == ["ann@example.org"]
    assert "<Ann@example.org> is to be suppressed: hard bounce 5.1.1" in caplog.text


async def test_a_proved_complaint_suppresses_whom_we_sent_to(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Not whom the complaint names."""
    async with open_sink() as sink:
        config = configure(tmp_path, **settings, **WISHES, smtp_sink_port=sink.port)
        async with Engine(config) as engine:
            await bounce(engine, traced("jane@yahoo.example"), sender="feedback@yahoo.example")
            assert await suppressed(engine, "jane@yahoo.example")
            assert not await suppressed(engine, "jo@yahoo.example")


@pytest.mark.parametrize(
    ("mime", "recipient"),
    [
        (shapes.POSTFIX, "bounces@d.test"),
        (shapes.QMAIL, "bounces@d.test"),
        (shapes.YAHOO_COMPLAINT, "bounces@d.test"),
        (traced("ann@example.org", keys=OTHER_KEYS), "bounces@d.test"),
        (shapes.EXIM_DELAYED, returned("dora@example.org")),
        (shapes.GMAIL_OLD, returned("ida@example.net")),
        (shapes.POSTFIX, returned("zoe@example.net")),
        (shapes.OUT_OF_OFFICE, returned("lea@example.org")),
        (samples.AUTH_FAILURE, returned("someuser@receiver.example")),
    ],
    ids=[
        "forged", "forged text", "forged complaint", "forged trace", "delay", "spam",
        "about another", "out of office", "no complaint of a person",
    ],
)  # fmt: skip
async def test_nothing_else_suppresses_anybody(
    tmp_path: Path, settings: dict[str, Any], mime: bytes, recipient: str
) -> None:
    async with Engine(configure(tmp_path, **settings, **WISHES)) as engine:
        await bounce(engine, mime, recipient)
        await take(engine, "reports")
        assert engine.statistics()["rows"]["suppressed"] == 0


async def test_what_is_not_proved_suppresses_if_the_operator_says_so(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = configure(tmp_path, **settings, **WISHES, suppress_unproved=True)
    async with Engine(config) as engine:
        await bounce(engine, shapes.QMAIL)
        await bounce(engine, shapes.YAHOO_COMPLAINT, sender="feedback@yahoo.example")
        assert engine.statistics()["rows"]["suppressed"] == 3
    entries = (Path(config.queue_directory) / AUDIT_NAME).read_text().splitlines()
    assert [json.loads(line)["why"] for line in entries] == [
        "hard bounce 5.1.1, not proved",
        "complaint (abuse), not proved",
    ]


async def test_rows_that_cannot_be_written_cost_no_report(
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are written when the disk has room again."""
    monkeypatch.setattr(suppressing, "RETRY_SECONDS", 0.05)
    full = True
    async with Engine(configure(tmp_path, **settings, **WISHES)) as engine:
        keeper = engine._keeper
        add = keeper.add

        async def add_or_fail(*arguments: Any, **more: Any) -> Any:
            if full:
                raise OSError(28, "No space left on device")
            return await add(*arguments, **more)

        monkeypatch.setattr(keeper, "add", add_or_fail)
        for recipient in ("ann@example.org", "ann@example.com"):
            await bounce(engine, shapes.POSTFIX, returned(recipient))
            assert (await report(engine))["proved"] is True
        assert engine.statistics()["rows"]["suppressed"] == 0
        full = False
        await until(lambda: engine.statistics()["rows"]["suppressed"] == 2)
    assert "recipients cannot be suppressed now: " in caplog.text


async def test_reports_of_all_workers_suppress(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = configure(tmp_path, **settings, **WISHES, smtp_threads=3)
    async with Engine(config) as engine, trio.open_nursery() as nursery:
        for number in range(6):
            address = returned(f"ann@{number}.test")
            nursery.start_soon(bounce, engine, shapes.POSTFIX, address)
        await until(lambda: engine.statistics()["rows"]["suppressed"] == 6)


# Plugins and handlers


async def test_handlers_see_the_report_and_may_send_it_another_way(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async with Engine(configure(tmp_path, **settings)) as engine:
        seen = []

        def look(connection: Connection, message: Message) -> Reject | None:
            value = message.properties.get("report")
            seen.append(value and value["type"])
            if message.recipient == "keep@d.test":
                del message.properties["report"]
            if message.recipient == "refuse@d.test":
                return Reject(550, "5.7.1 no reports here")
            return None

        engine.on("message", look)
        await bounce(engine, shapes.POSTFIX, "keep@d.test", "refuse@d.test", "bounces@d.test")
        assert seen == 3 * ["delivery-status"]
        assert (await take(engine, "reports")).recipient == "bounces@d.test"
        message = await take(engine, "local")
        assert (message.recipient, "report" in message.properties) == ("keep@d.test", False)


async def test_a_handler_may_make_a_recipient_local_or_not(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"smtp_relay_range": ("127.0.0.0/8",), "rabbitmq_inbox": "inbox"}
    async with Engine(configure(tmp_path, **settings)) as engine:

        def turn(connection: Connection, message: Message) -> None:
            message.local = not message.local

        engine.on("message", turn)
        address = returned(base="x@d.test")
        await bounce(engine, shapes.POSTFIX, "ann@elsewhere.test", "bounces@d.test", address)
        assert (await take(engine, "reports")).recipient == "ann@elsewhere.test"
        for recipient in ("bounces@d.test", address):
            message = await take(engine, "inbox")
            assert (message.recipient, "report" in message.properties) == (recipient, False)


async def test_a_field_of_a_client_makes_no_report(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"smtp_relay_range": ("127.0.0.0/8",), "smtp_extract": ("all",)}
    async with Engine(configure(tmp_path, **settings)) as engine:
        await bounce(engine, b"x-mq-report: mine\r\nSubject: x\r\n\r\nhi", sender="a@b.test")
        assert "report" not in (await take(engine, "local")).properties


# Settings


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rabbitmq_reports": "outbox"}, "rabbitmq-reports is the outbox"),
        ({"suppress_complaints": True}, "suppress-complaints needs rabbitmq-reports"),
        ({"suppress_bounces": "hard"}, "suppress-bounces needs rabbitmq-reports"),
        ({"suppress_bounces": "soft"}, "none of off, hard"),
        ({"suppress_bounces": "hard", "rabbitmq_reports": "r"}, "nothing can be proved"),
        ({"suppress_unproved": True}, "suppress-unproved needs"),
        ({"trace_header": "X-Trace"}, "trace-header needs verp-key-file"),
        ({"trace_header": "x-mq-trace"}, "servers take x-mq-\\* fields out"),
        ({"trace_header": "a b"}, "cannot be the name of a header field"),
        ({"report_types": ("bounces",)}, "'bounces' is none of"),
        ({"report_types": ()}, "needs a value"),
        (
            {"rabbitmq_reports": "failure", "rabbitmq_failure": "failure", "failure_maxage": 9},
            "would delete received mail: rabbitmq-reports",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, wrong: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        configure(tmp_path, **wrong)


async def test_keys_change_with_a_reload(tmp_path: Path, settings: dict[str, Any]) -> None:
    async with Engine(configure(tmp_path, **settings)) as engine:
        address = returned(base="news@d.test", keys=OTHER_KEYS)

        async def code() -> int:
            async with open_dialog(engine.addresses[0]) as dialog:
                return (await dialog.codes("MAIL FROM:<>", f"RCPT TO:<{address}>"))[1]

        assert await code() == 550
        Path(settings["verp_key_file"]).write_text("a 0000000000000000000000000\n")
        engine.reload()
        assert await code() == 250
