"""The events of the server machine: commands that need a decision of the session.

The session answers each event with `ServerProtocol.accept` or `ServerProtocol.reject`. `Closing`
and the members of `NoEvent` need no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

import msgspec

from mailerq.wire.parameters import MailParameters, RcptParameters
from mailerq.wire.sasl import Credentials

__all__ = [
    "CLOSED",
    "NEED_DATA",
    "Auth",
    "Closing",
    "Content",
    "Data",
    "Event",
    "Hello",
    "Mail",
    "NoEvent",
    "Rcpt",
    "StartTls",
    "XClient",
]


class Hello(msgspec.Struct, frozen=True):
    """EHLO or LHLO (`extended`), or HELO."""

    name: str
    extended: bool


@dataclass(frozen=True, slots=True)
class StartTls:
    """STARTTLS. After `accept`, send the reply, do the handshake, then call `tls_started`."""


@dataclass(frozen=True, slots=True)
class Auth:
    """The credentials of a complete AUTH exchange."""

    mechanism: str
    credentials: Credentials = field(repr=False)


@dataclass(frozen=True, slots=True)
class XClient:
    """XCLIENT: a proxy names its client. After `accept` the session starts over."""

    attributes: Mapping[str, str | None]


class Mail(msgspec.Struct, frozen=True):
    """MAIL FROM. `sender` has no angle brackets and is empty for the null sender."""

    sender: str
    parameters: MailParameters


class Rcpt(msgspec.Struct, frozen=True):
    """RCPT TO. `recipient` has no angle brackets and no source route."""

    recipient: str
    parameters: RcptParameters


class Data(msgspec.Struct, frozen=True):
    """DATA, or the first BDAT of a mail, with a sender and at least one recipient accepted."""


@dataclass(frozen=True, slots=True)
class Content:
    """The whole mail, without dot-stuffing. `ServerProtocol.mail` and `rcpts` are its envelope.

    Any answer ends the transaction.
    """

    body: bytes | memoryview = field(repr=False)
    """A view only if `ServerProtocol.accept` was given a sink that returns one."""


class Closing(msgspec.Struct, frozen=True):
    """The session ends: send the last bytes, then close. `reason` is for the log."""

    reason: str


class NoEvent(Enum):
    """No event needs a decision now."""

    NEED_DATA = auto()
    CLOSED = auto()


NEED_DATA: Final = NoEvent.NEED_DATA
"""All received bytes are processed: send the replies, then read."""

CLOSED: Final = NoEvent.CLOSED
"""The peer has closed the connection, perhaps in the middle of a mail."""

Event = Hello | StartTls | Auth | XClient | Mail | Rcpt | Data | Content | Closing | NoEvent
