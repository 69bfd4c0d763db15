"""What a server refused, as a log may show it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from mailerq.wire import sasl
from mailerq.wire.events import Mail, Rcpt
from mailerq.wire.smtp import Reply

__all__ = ["CONTENT_LINE", "Refusals", "shown_command", "shown_mail"]

CONTENT_LINE: Final = b"(mail)"
"""Stands for what is refused of a mail; no line is like it, for each has its end."""

SHOWN_RECIPIENTS: Final = 3
"""Recipients of a refused mail that are named."""

Refusals = list[tuple[str, Reply]]
"""What was refused, and the reply: a command, or `CONTENT_LINE` and the envelope."""


def shown_command(line: bytes, known: Container[bytes]) -> str:
    """A command line; `known` are the verbs, in upper case.

    Secrets may stand behind AUTH, in each line of its exchange, and in what only looks like
    a command because the peer did not notice that AUTH was refused.
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
    """A mail, with its envelope where there is one."""
    shown = CONTENT_LINE.decode()
    if mail is None:
        return shown
    names = [f"<{rcpt.recipient}>" for rcpt in rcpts[:SHOWN_RECIPIENTS]]
    more = len(rcpts) - len(names)
    others = f" and {more} more" if more else ""
    return f"{shown} from <{mail.sender}> to {', '.join(names)}{others}"
