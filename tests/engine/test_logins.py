"""TLS and logins in sessions: offers, refusals, and delays."""

from __future__ import annotations

import base64
import logging
import smtplib
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.errors import ConfigError
from mailerq.inbound import session as module
from mailerq.plugins import crypt
from tests.engine.kit import Certificate, Dialog, converse, inbox, open_dialog, serve
from tests.support import in_thread, until


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate.make(tmp_path)


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed logins are answered at once."""
    monkeypatch.setattr(module, "LOGIN_DELAY_SECONDS", 0.0)


def plain(login: str, password: str) -> str:
    return "AUTH PLAIN " + base64.b64encode(f"\0{login}\0{password}".encode()).decode()


LOGIN = {"smtp_auth": ("hardcoded://ann:s3cret",)}

# TLS.


async def test_what_came_in_clear_behind_starttls_is_thrown_away(
    tmp_path: Path, certificate: Certificate
) -> None:
    """CVE-2011-0411 and CVE-2024-34083."""
    async with serve(tmp_path, **certificate.settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.send(b"STARTTLS\r\nEHLO evil.test\r\nMAIL FROM:<evil@b.test>\r\n")
            assert (await dialog.reply()).startswith("220")
            await dialog.start_tls(certificate.trust)
            assert await dialog.codes("MAIL FROM:<a@b.test>") == [503]
            assert "STARTTLS" not in await dialog.say("EHLO c.test")
            assert (await dialog.mail("c@d.test")).startswith("250")
        (message,) = await inbox(engine)
    assert message.envelope == "a@b.test"
    assert message.properties["connection"]["secure"] is True


async def test_after_starttls_a_session_is_as_new(tmp_path: Path, certificate: Certificate) -> None:
    settings = {"strangers": True, **certificate.settings, **LOGIN}
    async with converse(tmp_path, **settings) as dialog:
        await dialog.say(plain("ann", "s3cret"), "MAIL FROM:<a@b.test>")
        assert await dialog.codes("RCPT TO:<c@elsewhere.test>", "STARTTLS") == [250, 220]
        await dialog.start_tls(certificate.trust)
        assert "AUTH PLAIN LOGIN" in await dialog.say("EHLO c.test")
        assert await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@elsewhere.test>") == [
            250,
            550,
        ]


async def test_a_new_certificate_serves_handshakes_to_come(
    tmp_path: Path, certificate: Certificate
) -> None:
    async def shown(dialog: Dialog) -> bytes:
        assert await dialog.codes("STARTTLS") == [220]
        await dialog.start_tls(certificate.trust)
        assert isinstance(dialog.stream, trio.SSLStream)
        return dialog.stream.getpeercert(binary_form=True)

    async with serve(tmp_path, **certificate.settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as first:
            before = await shown(first)
            certificate.issue()
            engine.reload()
            async with open_dialog(address) as second:
                assert await shown(second) != before
            certificate.chain.write_text("no certificate")
            with pytest.raises(ConfigError, match="smtp-certificate"):
                engine.reload()
            async with open_dialog(address) as third:
                assert await shown(third) != before
            await first.say("EHLO c.test")  # its session has gone on
            assert (await first.mail("c@d.test")).startswith("250")


async def test_a_handshake_has_its_time(tmp_path: Path, certificate: Certificate) -> None:
    settings = {"smtp_handshake_timeout": 0.1, "smtp_secure_port": (0,), **certificate.settings}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes("STARTTLS") == [220]
            await dialog.send(b"\x16")
            assert await dialog.closed()
        async with open_dialog(engine.addresses[1], greeted=False) as dialog:
            assert await dialog.closed()
        assert engine.statistics()["incoming"]["timeouts"] == 2


async def test_slow_handshakes_keep_nobody_out(
    tmp_path: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailerq.net.tls.GRACE_SECONDS", 0.05)
    settings = {"smtp_handshakes": 2, **certificate.settings}
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as one, open_dialog(address) as two:
            for slow in (one, two):
                assert await slow.codes("STARTTLS") == [220]
            async with open_dialog(address) as third:
                with trio.fail_after(10):
                    while await third.codes("STARTTLS") == [454]:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                await third.start_tls(certificate.trust)
                assert await third.codes("NOOP") == [250]
            assert await one.closed()  # it was there for longest
            await two.start_tls(certificate.trust)
            assert await two.codes("NOOP") == [250]


# AUTH.


async def test_in_clear_a_login_is_taken_on_loopback_only(
    tmp_path: Path, certificate: Certificate
) -> None:
    async with converse(tmp_path, **certificate.settings, **LOGIN) as dialog:
        assert "AUTH PLAIN LOGIN CRAM-MD5" in await dialog.say("EHLO c.test")
        assert await dialog.codes(plain("ann", "s3cret")) == [235]
    settings = {"smtp_xclient_range": ("127.0.0.0/8",), **certificate.settings, **LOGIN}
    async with converse(tmp_path, **settings) as dialog:
        await dialog.say("XCLIENT ADDR=192.0.2.1")
        assert "AUTH" not in await dialog.say("EHLO c.test")
        assert await dialog.codes(plain("ann", "s3cret"), "AUTH LOGIN", "STARTTLS") == [
            538,
            538,
            220,
        ]
        await dialog.start_tls(certificate.trust)
        await dialog.say("EHLO c.test")
        assert await dialog.codes(plain("ann", "s3cret")) == [235]


@pytest.mark.usefixtures("prompt")
async def test_logins_of_a_file_open_the_relay(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    stored = crypt(b"s3cret", b"$5$rounds=1000$salt")
    assert stored is not None
    file.write_text(f"ann:{stored.decode()}\n")
    settings: dict[str, Any] = {
        "strangers": True,
        "smtp_auth": (f"file://{file}", "hardcoded://bob:other"),
        "smtp_username": "eve",
        "smtp_password": "third",
    }
    async with serve(tmp_path, **settings) as engine:

        def work(login: str, password: str) -> None:
            with smtplib.SMTP(*engine.addresses[0]) as client:
                client.login(login, password)
                client.sendmail("a@b.test", "c@elsewhere.test", "Subject: x\r\n\r\nhi\r\n")

        for login, password in (("ann", "s3cret"), ("bob", "other"), ("eve", "third")):
            await in_thread(work, login, password)
            with pytest.raises(smtplib.SMTPAuthenticationError):
                await in_thread(work, login, password + "x")
        users = [message.properties["connection"]["user"] for message in await inbox(engine, 3)]
    assert users == ["ann", "bob", "eve"]


async def test_a_back_end_that_cannot_tell_is_no_refusal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "logins"
    file.touch()
    settings = {"smtp_auth": (f"file://{file}",), "smtp_client_logins": 1, "strangers": True}
    async with converse(tmp_path, **settings) as dialog:
        file.unlink()
        assert await dialog.codes(*3 * [plain("ann", "hunter2")]) == 3 * [454]
    assert "logins cannot be checked" in caplog.text
    assert "hunter2" not in caplog.text


class Delays:
    """What sessions have of trio: their delays take no time but that of a clock of its own.

    Other tasks sleep as well, and a busy machine is late.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)

    def current_time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await trio.lowlevel.checkpoint()


async def test_failed_logins_are_slowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    delays = Delays()
    async with converse(tmp_path, **LOGIN) as dialog:
        monkeypatch.setattr(module, "trio", delays)
        assert await dialog.codes(*6 * [plain("ann", "hunter2")]) == 6 * [535]
        monkeypatch.undo()
        assert await dialog.codes(plain("ann", "s3cret")) == [235]
    assert delays.slept == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert "hunter2" not in caplog.text


async def test_a_failed_login_takes_its_time_however_long_the_check_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays = Delays()

    async def refuse(*arguments: object) -> bool:
        delays.now += 0.2
        return False

    async with serve(tmp_path, **LOGIN) as engine:
        engine.on("authenticate", refuse)
        async with open_dialog(engine.addresses[0]) as dialog:
            monkeypatch.setattr(module, "trio", delays)
            assert await dialog.codes(plain("ann", "hunter2")) == [535]
            monkeypatch.undo()
    assert delays.slept == [pytest.approx(0.3)]


@pytest.mark.usefixtures("prompt")
async def test_failed_logins_of_a_client_are_bounded(tmp_path: Path) -> None:
    settings = {"strangers": True, "smtp_client_logins": 3, **LOGIN}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(plain("ann", "x"), plain("ann", "s3cret")) == [535, 235]
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(*2 * [plain("ann", "x")]) == [535, 535]
            assert (await dialog.say(plain("ann", "s3cret"))).startswith("421 4.7.0 Too many fail")
            assert await dialog.closed()


async def test_an_engine_that_stops_does_not_wait_for_a_failed_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIN_DELAY_SECONDS", 3600.0)
    monkeypatch.setattr(module, "LOGIN_DELAY_MAXIMUM", 3600.0)
    settings = {"smtp_auth": LOGIN["smtp_auth"], "shutdown_timeout": 3600.0}
    async with serve(tmp_path, **settings) as engine:
        dialog = await Dialog.open(engine.addresses[0])
        await dialog.reply()
        await dialog.say("EHLO c.test")
        await dialog.send(f"{plain('ann', 'x')}\r\n".encode())
        await until(lambda: engine.statistics()["incoming"]["failed_logins"] == 1)
    # Here the engine has stopped, an hour before the reply.
    await dialog.stream.aclose()
