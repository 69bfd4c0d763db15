"""Describe refused commands and mails for a log."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from mailerq.wire import sasl
from mailerq.wire.events import Mail, Rcpt
from mailerq.wire.smtp import Reply

__all__ = ["CONTENT_LINE", "Refusals", "shown_command", "shown_mail"]

CONTENT_LINE: Final = b"(mail)"
"""Replaces the command line for a refused mail. A command line differs: it has a line end."""

SHOWN_RECIPIENTS: Final = 3
"""Recipients of a refused mail to list."""

Refusals = list[tuple[str, Reply]]
"""Pairs of a refused command, or of `CONTENT_LINE` with an envelope, and the reply."""


def shown_command(line: bytes, known: Container[bytes]) -> str:
    """Return a command line without secrets; `known` are the verbs, in upper case.

    Secrets may follow AUTH, be in each line of its exchange, and be in lines of a peer that did
    not notice the refusal of AUTH.
    """
    if not line:
        return "(connection)"
    if line.startswith(CONTENT_LINE) and not line.endswith(b"\n"):
        return line.decode()
    verb, _, argument = line.strip().partition(b" ")
    verb = verb.upper()
    if verb == b"AUTH":
        name = argument.partition(b" ")[0].decode(errors="replace").upper()
        return f"AUTH {name}" if name in sasl.MECHANISMS else "AUTH"
    if verb in known:
        return line.decode(errors="backslashreplace").removesuffix("\r\n")
    return f"({len(line)} bytes that are no command)"


def shown_mail(mail: Mail | None, rcpts: Sequence[Rcpt]) -> str:
    """Describe a mail, with its envelope if there is one."""
    shown = CONTENT_LINE.decode()
    if mail is None:
        return shown
    names = [f"<{rcpt.recipient}>" for rcpt in rcpts[:SHOWN_RECIPIENTS]]
    more = len(rcpts) - len(names)
    others = f" and {more} more" if more else ""
    return f"{shown} from <{mail.sender}> to {', '.join(names)}{others}"
