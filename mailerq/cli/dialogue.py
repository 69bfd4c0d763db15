"""``sendmail -bs``: SMTP on standard input and output, for programs that write to a pipe.

The caller is a user of this host, as with ``mailerq rcpt@…``, and the mail takes the same ways:
into the queue if this user may write there, otherwise through the configured port. So there is no
login and no TLS, any recipient is accepted, and plugins see only mail that goes through the port.
A 250 after the mail means that the mail is safe.

A program may write all commands at once, in lines that end with LF. No other host is involved that
could disagree about the end of a mail.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Final

from mailerq.cli.inject import Refused
from mailerq.config import Config
from mailerq.wire import server, smtp
from mailerq.wire._lines import Buffer

__all__ = ["serve"]

READ_BYTES: Final = 1 << 16

Take = Callable[[Buffer, str, Sequence[str]], dict[str, Any]]
"""Stores a mail: content, which is taken, sender, recipients. Raises `Refused`."""


def serve(config: Config, take: Take) -> int:
    """Serve until the peer sends QUIT or closes; return the exit status."""
    machine = server.ServerProtocol(
        server.Settings(
            hostname=config.hostname,
            max_size=config.smtp_maxsize,
            max_recipients=config.smtp_maxrecipients,
            extended=False,  # extensions that the port may not offer
            normalize=True,
        )
    )
    machine.greet()
    while True:
        match event := machine.next_event():
            case server.NEED_DATA:
                _send(machine)
                machine.receive_data(_read(machine, sys.stdin.buffer))
            case server.CLOSED | server.Closing():
                _send(machine)
                return os.EX_OK
            case server.Content():
                _answer(machine, event, take)
            case _:
                machine.accept()


def _read(machine: server.ServerProtocol, file: BinaryIO) -> bytes:
    """Read one command, or many lines of a mail, but no byte after them."""
    lines = [_line(file)]
    size = len(lines[0])
    while machine.in_content and lines[-1] not in (b"", b".\r\n") and size < READ_BYTES:
        lines.append(_line(file))
        size += len(lines[-1])
    return b"".join(lines)


def _line(file: BinaryIO) -> bytes:
    line = file.readline(READ_BYTES)
    if line.endswith(b"\n") and not line.endswith(b"\r\n"):
        line = line[:-1] + b"\r\n"
    return line


def _send(machine: server.ServerProtocol) -> None:
    sys.stdout.buffer.write(machine.data_to_send())
    sys.stdout.buffer.flush()


def _answer(machine: server.ServerProtocol, event: server.Content, take: Take) -> None:
    assert machine.sender is not None, "the machine asks for MAIL"
    mail = Buffer()
    mail.add(event.body)
    try:
        take(mail, machine.sender, machine.recipients)
    except Refused as refused:
        later = refused.status in (os.EX_TEMPFAIL, os.EX_CONFIG)
        machine.reject((smtp.not_now if later else smtp.not_taken)(str(refused)))
    else:
        machine.accept(smtp.OK)
