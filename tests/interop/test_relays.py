"""Other mail transfer agents relay to an engine: Postfix and Exim."""

from __future__ import annotations

import re
import smtplib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.message import Message
from mailerq.outbound import session as outgoing
from mailerq.queues import Publication
from tests.engine.kit import Certificate, inbox, open_dialog, serve
from tests.interop.kit import LOGIN, Exim, authority_file, postfix
from tests.support import configure, in_thread, public_directory, send, until_found

SHORT = b"Subject: short\r\n\r\n.dot\r\n" + 200 * b"hello\r\n"
MAIL = "Subject: relayed\r\nMessage-ID: <1@b.test>\r\n\r\n.dot\r\n" + 3000 * "hello\r\n"


HOLDERS = ("maildrop", "incoming", "active", "deferred", "defer", "bounce")
"""Directories of Postfix's queue with a file for each mail that it has."""


@pytest.fixture
def open_path() -> Iterator[Path]:
    with public_directory() as directory:
        yield directory


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate.make(tmp_path)


async def through_postfix(engine: Engine, directory: Path, number: int, **settings: str) -> None:
    """Give a Postfix three mails, of which one has two recipients, for the engine's port."""
    relay = postfix(directory, engine.addresses[number][1], **settings)
    await in_thread(relay.__enter__)

    def work() -> None:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=60) as client:  # type: ignore[attr-defined]
            client.sendmail("a@b.test", ["c@d.test", "e@d.test"], MAIL)
            client.sendmail("", ["f@d.test"], MAIL)
            client.sendmail("a@b.test", ["g@d.test"], "Subject: short\r\n\r\nhi\r\n")

    try:
        await in_thread(work)
        messages = await inbox(engine, 4)
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(relay.__exit__, None, None, None)
    assert sorted(message.recipient for message in messages) == [
        "c@d.test",
        "e@d.test",
        "f@d.test",
        "g@d.test",
    ]
    for message in messages:
        assert message.body is not None
        if message.recipient != "g@d.test":
            assert message.body.endswith(b"\r\n\r\n.dot\r\n" + 3000 * b"hello\r\n")
        assert message.envelope == ("" if message.recipient == "f@d.test" else "a@b.test")


async def test_postfix_relays(tmp_path: Path, open_path: Path) -> None:
    async with serve(tmp_path) as engine:
        await through_postfix(engine, open_path / "postfix", 0)


async def test_postfix_relays_through_tls_that_it_verifies(
    tmp_path: Path, open_path: Path, certificate: Certificate
) -> None:
    async with serve(tmp_path, **certificate.settings) as engine:
        tls = {
            "smtp_tls_security_level": "verify",
            "smtp_tls_verify_cert_match": "mx.test",
            "smtp_tls_CAfile": str(authority_file(certificate, open_path)),
        }
        await through_postfix(engine, open_path / "postfix", 0, **tls)
        assert engine.statistics()["incoming"]["tls"] >= 1


async def test_postfix_speaks_lmtp(tmp_path: Path, open_path: Path) -> None:
    async with serve(tmp_path, lmtp_port=(0,)) as engine:
        port = engine.addresses[1][1]
        options = {
            "default_transport": f"lmtp:inet:127.0.0.1:{port}",
            "relayhost": "",
            "lmtp_destination_recipient_limit": "10",
        }
        await through_postfix(engine, open_path / "postfix", 1, **options)


async def test_postfix_names_its_client_with_xclient(tmp_path: Path, open_path: Path) -> None:
    settings = {"smtp_xclient_range": ("127.0.0.0/8",), "smtp_local_domains": ("d.test",)}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert "XCLIENT" in await dialog.say("EHLO c.test")
        options = {"smtp_send_xforward_command": "no"}
        await through_postfix(engine, open_path / "postfix", 0, **options)


async def test_exim_relays(tmp_path: Path, open_path: Path) -> None:
    async with serve(tmp_path) as engine:
        exim = Exim.prepare(open_path / "exim", engine.addresses[0][1])
        await exim.send(MAIL.replace("\r\n", "\n").encode(), "c@d.test", "e@d.test")
        assert exim.log().count(" => ") == 1, exim.log()
        messages = await inbox(engine, 2)
    for message in messages:
        assert message.body is not None
        assert message.body.endswith(b"\r\n\r\n.dot\r\n" + 3000 * b"hello\r\n")


async def test_exim_relays_through_tls_with_a_login(
    tmp_path: Path, open_path: Path, certificate: Certificate
) -> None:
    settings = {"strangers": True, **certificate.settings, **LOGIN}
    async with serve(tmp_path, **settings) as engine:
        exim = Exim.prepare(
            open_path / "exim",
            engine.addresses[0][1],
            "hosts_require_tls = *\n  hosts_require_auth = *",
            "plain:\n  driver = plaintext\n  public_name = PLAIN\n  client_send = ^ann^s3cret",
        )
        await exim.send(b"Subject: x\n\nhi\n", "c@elsewhere.test")
        assert " => c@elsewhere.test " in exim.log(), exim.log()
        (message,) = await inbox(engine)
    assert message.properties["connection"]["user"] == "ann"
    assert message.properties["connection"]["secure"] is True


async def through_one_connection(directory: Path, port: int, receiver: Engine, count: int) -> None:
    """Send to a server that relays to `receiver`, most envelopes right behind a body."""
    directory.mkdir()
    settings = {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": port}
    async with serve(directory, **settings, domain_maxconnections=1) as sender:
        messages = [
            Message({"envelope": "a@b.test", "recipient": f"{n}@d.test"}, SHORT)
            for n in range(count)
        ]
        await sender.queues.publish([Publication("outbox", message) for message in messages])
        arrived = await inbox(receiver, count)
        with trio.fail_after(60):
            while sender.statistics()["outgoing"]["delivered"] < count:  # noqa: ASYNC110
                await trio.sleep(0.01)
        figures = sender.statistics()["outgoing"]
    assert sorted(message.recipient for message in arrived) == sorted(
        message.recipient for message in messages
    )
    assert all(message.body and message.body.endswith(SHORT[-1000:]) for message in arrived)
    assert figures["attempts"] == count
    assert figures["ahead"] > count / 2


@pytest.fixture
def all_are_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "PROMPT_SECONDS", 60.0)


@pytest.mark.usefixtures("all_are_prompt")
async def test_postfix_takes_an_envelope_behind_a_body(tmp_path: Path, open_path: Path) -> None:
    async with serve(tmp_path) as engine:
        relay = postfix(open_path / "postfix", engine.addresses[0][1])
        await in_thread(relay.__enter__)
        try:
            port: int = relay.port  # type: ignore[attr-defined]
            await through_one_connection(tmp_path / "sender", port, engine, 40)
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(relay.__exit__, None, None, None)


@pytest.mark.usefixtures("all_are_prompt")
async def test_exim_takes_an_envelope_behind_a_body(tmp_path: Path, open_path: Path) -> None:
    async with serve(tmp_path) as engine:
        exim = Exim.prepare(open_path / "exim", engine.addresses[0][1])
        with exim.listening() as port:
            await through_one_connection(tmp_path / "sender", port, engine, 20)


async def test_a_postfix_and_an_engine_that_send_each_other_everything_end(
    tmp_path: Path, open_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Postfix refuses the mail, and then the report about it, for too many hops; that is all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = open_path / "postfix"
    relay = postfix(directory, port, hopcount_limit="20")
    await in_thread(relay.__enter__)
    settings = {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": relay.port}  # type: ignore[attr-defined]
    try:
        async with Engine(configure(tmp_path, smtp_port=(port,), **settings)) as engine:
            code, _ = await send(engine.addresses[0], MAIL.encode())
            assert code == 250

            async def seen() -> tuple[int, int, int]:
                depths = await engine.queues.depths()
                held = sum(len(list((directory / "queue" / name).rglob("*"))) for name in HOLDERS)
                outgoing = engine.statistics()["outgoing"]
                waiting = sum(each.total for each in depths if each.queue == "outbox")
                return outgoing["failed"], waiting, held

            await until_found(seen, lambda found: found == (2, 0, 0))
            figures = engine.statistics()["outgoing"]
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(relay.__exit__, None, None, None)
    log = (directory / "maillog").read_text()
    assert figures["reports"] == 1
    assert 15 < figures["delivered"] < 25, "each of two mails goes round until the twentieth hop"
    assert caplog.text.count("554 5.4.0 Error: too many hops") == 2
    assert "non-delivery notification" not in log, "Postfix has nothing to bounce"
    senders = re.findall(r" from=<([^>]*)>, size=", log)
    assert set(senders) == {"a@b.test", ""}
    assert len(senders) == figures["delivered"]
