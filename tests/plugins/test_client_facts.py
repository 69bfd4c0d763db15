"""What the engine knows of a client, as plugins in C and handlers in Python see it."""

from __future__ import annotations

import base64
import re
import ssl
from pathlib import Path

import pytest
import trio
import trustme

from mailerq.plugins import Connection
from tests.engine.kit import Certificate, Dialog, open_dialog, serve
from tests.plugins.kit import Calls
from tests.support import ROOT, compile_plugin

LOOPBACK = ("127.0.0.1",)


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("facts") / "plugins"
    compile_plugin(directory, "trace.c", (ROOT / "plugins" / "trace.c").read_text())
    return str(directory)


def take(calls: Calls, event: str) -> list[str]:
    """What trace.c said of an event, without its numbers."""
    return [
        match[1] for line in calls.take() if (match := re.search(rf"\d+/\d+ (in_{event} .*)", line))
    ]


async def test_a_client_is_known_by_its_address_and_its_greeting(
    tmp_path: Path, trace: str, calls: Calls
) -> None:
    seen: list[tuple[object, ...]] = []

    def note(connection: Connection, *_: object) -> None:
        seen.append((connection.address, connection.port, connection.helo, connection.login))

    async with serve(tmp_path, plugin_directory=trace) as engine:
        engine.on("connect", note)
        engine.on("mailfrom", note)
        stream = await trio.open_tcp_stream(*engine.addresses[0])
        port = stream.socket.getsockname()[1]
        dialog = Dialog(stream)
        async with stream:
            await dialog.reply()
            assert take(calls, "connect") == [f"in_connect from 127.0.0.1 port {port}"]
            await dialog.say("EHLO first.test", "HELO second.test", "MAIL FROM:<a@b.test>")
            assert take(calls, "mailfrom") == ["in_mailfrom <a@b.test> helo=second.test"]
            await dialog.say("QUIT")
    assert seen == [("127.0.0.1", port, None, None), ("127.0.0.1", port, "second.test", None)]


async def test_behind_a_proxy_the_client_is_the_proxys(
    tmp_path: Path, trace: str, calls: Calls
) -> None:
    settings = {"smtp_proxy": LOOPBACK, "smtp_local_domains": ("d.test",)}
    async with (
        serve(tmp_path, plugin_directory=trace, **settings) as engine,
        open_dialog(engine.addresses[0], greeted=False) as dialog,
    ):
        await dialog.send(b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 25\r\n")
        assert (await dialog.reply()).startswith("220")
        assert take(calls, "connect") == ["in_connect from 2001:db8::7 port 4711"]


async def test_xclient_names_another_client_which_has_greeted_nobody_yet(
    tmp_path: Path, trace: str, calls: Calls
) -> None:
    async with serve(tmp_path, plugin_directory=trace, smtp_xclient_range=LOOPBACK) as engine:
        facts: list[tuple[object, ...]] = []
        engine.on(
            "mailfrom",
            lambda connection, sender: facts.append(
                (connection.address, connection.port, connection.helo, connection.login)
            ),
        )
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.say("XCLIENT ADDR=192.0.2.7 PORT=99 LOGIN=ann", "EHLO theirs.test")
            await dialog.say("MAIL FROM:<a@b.test>")
            assert take(calls, "mailfrom") == [
                "in_mailfrom <a@b.test> helo=theirs.test, authenticated as ann"
            ]
    assert facts == [("192.0.2.7", 99, "theirs.test", "ann")]


async def test_tls_and_login_are_known_and_starttls_forgets_the_greeting(
    tmp_path: Path, trace: str, calls: Calls
) -> None:
    certificate = Certificate.make(tmp_path)
    settings = {**certificate.settings, "smtp_auth": ("hardcoded://ann:s3cret",)}
    facts: list[tuple[object, ...]] = []
    async with serve(tmp_path, plugin_directory=trace, **settings) as engine:
        engine.on(
            "secure",
            lambda connection: facts.append(
                (connection.tls_version, connection.tls_cipher, connection.helo)
            ),
        )
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.say("STARTTLS")
            await dialog.start_tls(certificate.trust)
            assert isinstance(dialog.stream, trio.SSLStream)
            cipher, version = dialog.stream.cipher()[0], dialog.stream.version()
            credentials = base64.b64encode(b"\0ann\0s3cret").decode()
            await dialog.say("EHLO secret.test", f"AUTH PLAIN {credentials}")
            assert take(calls, "secure") == [f"in_secure {version} {cipher}, certificate of nobody"]
            await dialog.say("MAIL FROM:<a@b.test>")
            assert take(calls, "mailfrom") == [
                "in_mailfrom <a@b.test> helo=secret.test, authenticated as ann"
            ]
    assert facts == [(version, cipher, None)]
    assert version.startswith("TLSv1.")


async def test_a_certificate_of_the_client_that_was_verified_is_named(
    tmp_path: Path, trace: str, calls: Calls
) -> None:
    certificate = Certificate.make(tmp_path)
    authority = trustme.CA()
    async with serve(tmp_path, plugin_directory=trace, **certificate.settings) as engine:
        context = engine._server.terms.tls
        assert context is not None
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        trust = certificate.trust
        authority.issue_cert("client.test").configure_cert(trust)
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.say("STARTTLS")
            await dialog.start_tls(trust)
            await dialog.say("EHLO c.test")
            (line,) = take(calls, "secure")
            assert line.endswith("certificate of client.test")
