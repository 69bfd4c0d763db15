"""Clients that people use send mail to an engine, in all the ways that they know."""

from __future__ import annotations

import ipaddress
import json
import smtplib
import subprocess
from pathlib import Path

import pytest
import trio

from tests.engine.kit import Certificate, inbox, serve
from tests.interop.kit import LOGIN, MAIL, authority_file, only_message, program, run, succeed
from tests.support import in_thread

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate.make(tmp_path)


# swaks


def swaks(port: int, *more: str) -> list[str]:
    return [
        *(program("swaks"), "--server", "127.0.0.1", "--port", str(port), "--helo", "c.test"),
        *("--from", "a@b.test", "--to", "c@d.test,e@d.test", "--body", "hello", *more),
    ]


async def test_swaks_sends_mail(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        text = await succeed(*swaks(engine.addresses[0][1]))
        assert "<~  250" in text or "<-  250" in text
        messages = await inbox(engine, 2)
    assert [message.recipient for message in messages] == ["c@d.test", "e@d.test"]
    assert all(b"\r\nhello\r\n" in (message.body or b"") for message in messages)


async def test_swaks_pipelines(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        await succeed(*swaks(engine.addresses[0][1], "--pipeline"))
        assert len(await inbox(engine, 2)) == 2


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
async def test_swaks_logs_in_behind_starttls(
    tmp_path: Path, certificate: Certificate, mechanism: str
) -> None:
    settings = {"strangers": True, "smtp_local_domains": (), **certificate.settings, **LOGIN}
    async with serve(tmp_path, **settings) as engine:
        port = engine.addresses[0][1]
        login = ("--tls", "--auth", mechanism, "--auth-user", "ann", "--auth-password")
        await succeed(*swaks(port, *login, "s3cret"))
        messages = await inbox(engine, 2)
        assert (await run(*swaks(port, *login, "wrong"))).status == 28  # no authentication
        assert (await run(*swaks(port, "--tls"))).status == 24  # no recipient accepted
    for message in messages:
        assert message.properties["connection"]["user"] == "ann"
        assert message.properties["connection"]["secure"] is True


async def test_swaks_speaks_tls_from_the_first_byte(
    tmp_path: Path, certificate: Certificate
) -> None:
    settings = {"smtp_secure_port": (0,), **certificate.settings}
    async with serve(tmp_path, **settings) as engine:
        await succeed(*swaks(engine.addresses[1][1], "--tls-on-connect"))
        assert len(await inbox(engine, 2)) == 2


async def test_swaks_speaks_lmtp(tmp_path: Path) -> None:
    async with serve(tmp_path, lmtp_port=(0,)) as engine:
        text = await succeed(*swaks(engine.addresses[1][1], "--protocol", "LMTP"))
        assert text.count(" for c@d.test") == text.count(" for e@d.test") == 1
        assert len(await inbox(engine, 2)) == 2


@pytest.mark.parametrize("version", ["1", "2"])
async def test_swaks_stands_in_for_a_proxy(tmp_path: Path, version: str) -> None:
    settings = {"smtp_proxy": LOOPBACK, "smtp_local_domains": ("d.test",)}
    async with serve(tmp_path, **settings) as engine:
        header = (
            *(
                "--proxy-version",
                version,
                "--proxy-family",
                "TCP4" if version == "1" else "AF_INET",
            ),
            *("--proxy-source", "192.0.2.7", "--proxy-source-port", "40000"),
            *("--proxy-dest", "198.51.100.1", "--proxy-dest-port", "25"),
        )
        if version == "2":
            header += ("--proxy-protocol", "STREAM", "--proxy-command", "PROXY")
        await succeed(*swaks(engine.addresses[0][1], *header))
        for message in await inbox(engine, 2):
            connection = message.properties["connection"]
            assert (connection["remote-ip"], connection["remote-port"]) == ("192.0.2.7", 40000)


async def test_swaks_says_who_its_client_is(tmp_path: Path) -> None:
    settings = {"smtp_xclient_range": LOOPBACK, "smtp_local_domains": ("d.test",)}
    async with serve(tmp_path, **settings) as engine:
        words = ("--xclient-addr", "192.0.2.7", "--xclient-name", "client.test")
        await succeed(*swaks(engine.addresses[0][1], *words))
        for message in await inbox(engine, 2):
            assert message.properties["connection"]["remote-ip"] == "192.0.2.7"


# curl


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
async def test_curl_sends_mail(tmp_path: Path, certificate: Certificate, scheme: str) -> None:
    settings = {"strangers": True, "smtp_secure_port": (0,), **certificate.settings, **LOGIN}
    async with serve(tmp_path, **settings) as engine:
        port = engine.addresses[scheme == "smtps"][1]
        await succeed(
            *(program("curl"), "--silent", "--show-error", f"{scheme}://127.0.0.1:{port}/c.test"),
            *("--ssl-reqd", "--cacert", authority_file(certificate, tmp_path)),
            *("--user", "ann:s3cret", "--mail-from", "a@b.test", "--mail-rcpt", "c@d.test"),
            *("--crlf", "--upload-file", "-"),
            input=MAIL,
        )
        message = await only_message(engine)
    assert message.body is not None
    assert message.body.endswith(b"\r\n\r\nhello\r\n.dot\r\n")
    assert message.properties["connection"]["secure"] is True


async def test_curl_is_told_why_not(tmp_path: Path) -> None:
    async with serve(tmp_path, strangers=True) as engine:
        url = f"smtp://127.0.0.1:{engine.addresses[0][1]}"
        outcome = await run(
            *(program("curl"), "--silent", "--verbose", url, "--mail-from", "a@b.test"),
            *("--mail-rcpt", "c@elsewhere.test", "--upload-file", "-"),
            input=MAIL,
        )
    assert outcome.status == 55
    assert "550 5.7.1 Relaying denied" in outcome.text


# msmtp


@pytest.mark.parametrize("starttls", [True, False])
async def test_msmtp_sends_mail(tmp_path: Path, certificate: Certificate, starttls: bool) -> None:
    settings = {"strangers": True, "smtp_secure_port": (0,), **certificate.settings, **LOGIN}
    async with serve(tmp_path, **settings) as engine:
        port = engine.addresses[not starttls][1]
        await succeed(
            *(program("msmtp"), "--host=127.0.0.1", f"--port={port}", "--tls=on", "--auth=plain"),
            *(f"--tls-starttls={'on' if starttls else 'off'}", "--user=ann"),
            *(f"--tls-trust-file={authority_file(certificate, tmp_path)}", "--from=a@b.test"),
            *("--passwordeval=echo s3cret", "c@d.test"),
            input=MAIL,
        )
        message = await only_message(engine)
    assert message.properties["connection"]["user"] == "ann"
    assert message.body is not None
    assert message.body.endswith(b"\r\n\r\nhello\r\n.dot\r\n")


# git send-email


async def test_git_sends_a_patch(tmp_path: Path, certificate: Certificate) -> None:
    git = program("git")
    folder = (await succeed(git, "--exec-path")).strip()
    if not Path(folder, "git-send-email").exists():
        pytest.skip("git send-email is not installed: tools/packages test does that")
    patch = tmp_path / "0001-change.patch"
    patch.write_text(
        "From 0123456789012345678901234567890123456789 Mon Sep 17 00:00:00 2001\n"
        "From: Ann <a@b.test>\nDate: Tue, 24 Nov 2026 00:00:00 +0000\n"
        "Subject: [PATCH] change\n\n---\n a | 2 +-\n\n-.one\n+..two\n-- \n2.39\n"
    )
    async with serve(tmp_path, strangers=True, **certificate.settings, **LOGIN) as engine:
        await succeed(
            *(git, "send-email", "--quiet", "--confirm=never", "--suppress-cc=all"),
            *("--from=a@b.test", "--to=c@elsewhere.test", "--smtp-server=127.0.0.1"),
            *(f"--smtp-server-port={engine.addresses[0][1]}", "--smtp-encryption=tls"),
            *(f"--smtp-ssl-cert-path={authority_file(certificate, tmp_path)}", "--smtp-user=ann"),
            *("--smtp-pass=s3cret", "--smtp-domain=c.test", patch),
            env={
                f"GIT_{who}_{what}": text
                for who in ("AUTHOR", "COMMITTER")
                for what, text in (("NAME", "Ann"), ("EMAIL", "a@b.test"))
            },
        )
        message = await only_message(engine)
    assert message.properties["connection"]["user"] == "ann"
    assert message.body is not None
    assert b"\r\n-.one\r\n+..two\r\n" in message.body


# openssl


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_shakes_hands(tmp_path: Path, certificate: Certificate, version: str) -> None:
    settings = {"smtp_secure_port": (0,), **certificate.settings}
    async with serve(tmp_path, **settings) as engine:
        for number, more in enumerate((["-starttls", "smtp"], [])):
            address = f"127.0.0.1:{engine.addresses[number][1]}"
            authority = str(authority_file(certificate, tmp_path))
            text = await succeed(
                *(
                    program("openssl"),
                    "s_client",
                    "-connect",
                    address,
                    version,
                    "-crlf",
                    "-ign_eof",
                ),
                *(
                    "-CAfile",
                    authority,
                    "-verify_return_error",
                    "-verify_hostname",
                    "mx.test",
                    *more,
                ),
                input=b"EHLO c.test\nQUIT\n",
            )
            assert "Verify return code: 0 (ok)" in text
            assert "221 2.0.0" in text


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
async def test_old_versions_of_tls_are_not_spoken(
    tmp_path: Path, certificate: Certificate, version: str
) -> None:
    async with serve(tmp_path, **certificate.settings) as engine:
        address = f"127.0.0.1:{engine.addresses[0][1]}"
        outcome = await run(
            *(program("openssl"), "s_client", "-starttls", "smtp", "-connect", address, version),
            *("-cipher", "DEFAULT@SECLEVEL=0"),
        )
    assert outcome.status != 0


# smtplib


async def test_smtplib_sends_what_is_not_ascii(tmp_path: Path, certificate: Certificate) -> None:
    async with serve(tmp_path, **certificate.settings, dsn_advertise=True) as engine:

        def work() -> None:
            with smtplib.SMTP(*engine.addresses[0]) as client:
                client.starttls(context=certificate.trust)
                client.sendmail(
                    "jürgen@b.test",
                    ["ö@d.test", "c@d.test"],
                    "Subject: grün\r\n\r\nhi\r\n".encode(),
                    mail_options=("SMTPUTF8", "BODY=8BITMIME"),
                    rcpt_options=("NOTIFY=NEVER",),
                )

        await in_thread(work)
        first, second = await inbox(engine, 2)
    assert (first.envelope, first.recipient) == ("jürgen@b.test", "ö@d.test")
    assert first.properties["dsn"] == second.properties["dsn"] == {"notify": "NEVER"}


# nodemailer

SCRIPT = """
const mailer = require('nodemailer');
const options = JSON.parse(process.argv[2]);
const transport = mailer.createTransport(options);
const message = {
  from: 'a@b.test', to: 'c@d.test, e@d.test', subject: 'grün', text: '.dot\\nhello\\n',
};
transport.sendMail(message).then(
  info => { console.log(info.response); transport.close(); },
  error => { console.log(error.code, error.response); process.exit(1); });
"""


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nodemailer in it."""
    directory = tmp_path_factory.mktemp("node")
    command = ["install", "--silent", "--no-audit", "--no-fund", "nodemailer"]
    program("node")
    try:
        subprocess.run(
            [program("npm"), *command],
            cwd=directory,
            check=True,
            timeout=60,
            capture_output=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("nodemailer cannot be installed here")
    (directory / "send.js").write_text(SCRIPT)
    return directory


@pytest.mark.parametrize("secure", [False, True])
async def test_nodemailer_sends_mail(
    tmp_path: Path, certificate: Certificate, node: Path, secure: bool
) -> None:
    settings = {"strangers": True, "smtp_secure_port": (0,), **certificate.settings, **LOGIN}
    async with serve(tmp_path, **settings) as engine:
        options = {
            "host": "127.0.0.1",
            "port": engine.addresses[secure][1],
            "secure": secure,
            "requireTLS": True,
            "auth": {"user": "ann", "pass": "s3cret"},
            "tls": {"servername": "mx.test"},
        }
        env = {"NODE_EXTRA_CA_CERTS": str(authority_file(certificate, tmp_path))}
        text = await succeed(program("node"), node / "send.js", json.dumps(options), env=env)
        assert "Message accepted" in text or "2.0.0" in text
        first, second = await inbox(engine, 2)
    assert {first.recipient, second.recipient} == {"c@d.test", "e@d.test"}
    assert first.properties["connection"]["secure"] is True
    await trio.lowlevel.checkpoint()
