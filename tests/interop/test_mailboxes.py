"""Deliveries to a mailbox server: Dovecot takes local mail by LMTP."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.message import Message
from tests.engine.kit import open_dialog
from tests.interop.kit import program
from tests.support import DEADLINE, configure, public_directory, until

CONFIG = """
base_dir = {directory}/run
log_path = {directory}/log
protocols = lmtp
ssl = no
mail_location = maildir:~/mail
default_internal_user = {account}
default_login_user = {account}
first_valid_uid = 1
passdb {{
  driver = passwd-file
  args = username_format=%n {directory}/users
}}
userdb {{
  driver = passwd-file
  args = username_format=%n {directory}/users
}}
service lmtp {{
  unix_listener {directory}/lmtp {{
    mode = 0666
  }}
}}
"""


@contextmanager
def dovecot(directory: Path) -> Iterator[Path]:
    """A Dovecot with the mailbox of ann; yield the socket of its LMTP service."""
    command = program("dovecot")
    if os.geteuid() != 0:
        pytest.skip("Dovecot needs root to read the mailboxes of other accounts")
    account = pwd.getpwnam("nobody")
    home = directory / "ann"
    home.mkdir()
    os.chown(home, account.pw_uid, account.pw_gid)
    (directory / "users").write_text(
        f"ann:{{plain}}x:{account.pw_uid}:{account.pw_gid}::{home}::\n"
    )
    config = directory / "dovecot.conf"
    config.write_text(CONFIG.format(directory=directory, account="nobody"))
    with subprocess.Popen([command, "-F", "-c", config]) as process:
        try:
            yield directory / "lmtp"
        finally:
            process.terminate()


async def test_dovecot_gets_mail_for_local_domains(tmp_path: Path) -> None:
    with public_directory() as directory, dovecot(directory) as socket:
        await until(socket.exists)
        config = configure(
            tmp_path,
            smtp_local_domains=("d.test",),
            local_delivery=f"lmtp://{socket}",
            rabbitmq_results="results",
        )
        results: dict[str, Message] = {}
        async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
            body = b"Subject: local\r\n\r\n.dot\r\n" + 3000 * b"hello\r\n"
            for recipient in ("ann@d.test", "nobody@d.test", "ann@d.test"):
                stuffed = body.replace(b"\r\n.", b"\r\n..")
                assert (await dialog.mail(recipient, body=stuffed)).startswith("250")
            with trio.fail_after(DEADLINE):
                async with engine.consume("results") as leases:
                    for _ in range(3):
                        lease = await leases.receive()
                        results[lease.message.recipient] = lease.message
                        await engine.ack(lease)
        mails = [path.read_bytes() for path in (directory / "ann/mail/new").iterdir()]
    log = {name: message.results[-1] for name, message in results.items()}
    assert log["ann@d.test"]["type"] == "success", log
    assert (log["nobody@d.test"]["code"], log["nobody@d.test"]["state"]) == (550, "rcpt to")
    assert len(mails) == 2
    for mail in mails:
        assert mail.replace(b"\r\n", b"\n").endswith(body.replace(b"\r\n", b"\n"))
        assert b"Return-Path: <a@b.test>" in mail
