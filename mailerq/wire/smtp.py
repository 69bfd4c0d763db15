"""SMTP replies, the table of all replies that are made here, and the limits of lines.

A reply is a code and lines of text (RFC 5321, section 4.2). An enhanced status code (RFC 2034,
RFC 3463), if any, starts the text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

__all__ = [
    "STATUS",
    "LocalProtocolError",
    "Reply",
    "status_for",
]

COMMAND_LIMIT: Final = 4096
"""Bytes of a command line with CRLF. RFC 5321 requires 512; extensions add about 2,000."""

AUTH_LIMIT: Final = 12288 + 2
"""Bytes of a line of an AUTH exchange (RFC 4954, section 4)."""

REPLY_LINE_LIMIT: Final = 998
"""Bytes of a reply line. RFC 5321, section 4.5.3.1.5, allows 512; peers accept more."""

STATUS: Final = re.compile(r"([245])(\.\d{1,3}\.\d{1,3})(?= |$)")
"""An enhanced status code at the start of a text: its class, and the rest of it."""

REPLY_LINE: Final = re.compile(rb"([2-5]\d\d)(?:([ -])(.*))?", re.DOTALL)
"""A line of a reply, without its end: the code, what follows the code, and the text."""

MAX_KNOWN_LINE: Final = 200
"""Cache reply lines up to this many bytes: a peer repeats most of its replies."""

MAX_KNOWN_REPLY: Final = 1000
"""Cache replies of several lines up to this many bytes: that to EHLO comes on each connection."""

_LONG_REPLY: Final = re.compile(
    rb"([2-5]\d\d)-[^\n]*\n(?:\1-[^\n]*\n){0,62}\1(?: [^\n]*)?\n"  # 64 lines
)

_UNREAD: Final = "?"

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")


class LocalProtocolError(RuntimeError):
    """The caller used a protocol machine out of turn: a defect of this program."""


class Reply:
    """A reply of the server or of a peer. Treat a reply as immutable: replies of peers are shared.

    A line feed separates the lines of `text`. Other control characters become question marks, so
    text of plugins and peers is safe to send and to log.
    """

    __slots__ = ("_status", "_wire", "code", "text")

    def __init__(self, code: int, text: str) -> None:
        if not text.isprintable() and not text.replace("\n", "").isprintable():
            lines = text.replace("\r\n", "\n").split("\n")
            text = "\n".join([_CONTROLS.sub("?", line) for line in lines])
        self.code = code
        self.text = text
        self._wire: bytes | None = None  # made when asked for
        self._status: str | None = _UNREAD

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reply):
            return NotImplemented
        return self.code == other.code and self.text == other.text

    def __hash__(self) -> int:
        return hash((self.code, self.text))

    def __repr__(self) -> str:
        return f"Reply({self.code}, {self.text!r})"

    @property
    def wire(self) -> bytes:
        """The bytes to send."""
        if self._wire is None:
            self._wire = _wire(self.code, self.text)
        return self._wire

    @property
    def status(self) -> str | None:
        """The enhanced status code at the start of the text, or None."""
        if self._status is _UNREAD:
            match = STATUS.match(self.text)
            self._status = match[0] if match else None
        return self._status

    @property
    def description(self) -> str:
        """The text without its status code, on one line."""
        status = self.status
        if status is None:
            return self.text.replace("\n", " ")
        return " ".join([line.removeprefix(status).lstrip() for line in self.text.split("\n")])


def _wire(code: int, text: str) -> bytes:
    lines = [line.encode(errors="replace")[: REPLY_LINE_LIMIT - 6] for line in text.split("\n")]
    head = b"".join(b"%d-%b\r\n" % (code, line) for line in lines[:-1])
    return b"%b%d %b\r\n" % (head, code, lines[-1])


def reply_of(line: bytes) -> Reply | None:
    """Parse a line without its end. None: more lines follow, or the line is no reply."""
    return (_reply_of if len(line) <= MAX_KNOWN_LINE else _reply_of.__wrapped__)(line)


@lru_cache(maxsize=1000)
def _reply_of(line: bytes) -> Reply | None:
    match = REPLY_LINE.fullmatch(line)
    if match is None or match[2] == b"-":
        return None
    return Reply(int(match[1]), (match[3] or b"").decode(errors="replace"))


def long_reply_of(data: bytes) -> tuple[Reply, int] | None:
    r"""Parse the reply of several lines at the start of some bytes; returns the reply and its size.

    None: the bytes have to be read line by line. They are more than `MAX_KNOWN_REPLY`, are
    not ASCII, or do not begin with a whole reply of several lines.

    >>> long_reply_of(b"250-mx.test\r\n250 SIZE\r\n250")
    (Reply(250, 'mx.test\nSIZE'), 23)
    """
    known = data[3:4] == b"-" and len(data) <= MAX_KNOWN_REPLY
    return _long_reply_of(data) if known else None


@lru_cache(maxsize=256)
def _long_reply_of(data: bytes) -> tuple[Reply, int] | None:
    match = _LONG_REPLY.match(data)
    if match is None or not data.isascii():
        return None
    lines = match[0].decode("ascii").split("\n")
    texts = [line.removesuffix("\r")[4:] for line in lines[:-1]]
    return Reply(int(match[1]), "\n".join(texts)), match.end()


_STATUS_OF: Final = {
    421: "4.3.2",  # RFC 3463, section 3.4: system not accepting messages
    450: "4.2.0",
    452: "4.3.1",  # section 3.4: mail system full
    454: "4.7.0",  # RFC 4954, section 6: temporary authentication failure
    535: "5.7.8",  # RFC 4954, section 6: credentials invalid
    550: "5.7.1",  # section 3.8: delivery not authorised
    552: "5.2.2",  # section 3.3: mailbox full
}


def status_for(code: int) -> str:
    """The enhanced status code for a refusal without one: x.7.1, refused by policy, for most.

    >>> status_for(452), status_for(554)
    ('4.3.1', '5.7.1')
    """
    return _STATUS_OF.get(code) or f"{code // 100}.7.1"


# The replies of the server, in the order of a session. A text with a value is a function.

CLOSING = Reply(421, "4.3.2 Service shutting down, try again later")
LOCAL_FAILURE = Reply(421, "4.3.0 Local error, closing connection")
BUSY = Reply(421, "4.7.0 Too many connections, try again later")
NOT_ADMITTED = Reply(554, "5.7.1 No SMTP service for your address")
TOO_MANY_CONNECTIONS = Reply(421, "4.7.0 Too many connections from your address")
CONNECTS_TOO_OFTEN = Reply(421, "4.7.0 Too many connections from your address in a minute")
TIMED_OUT = Reply(421, "4.4.2 Timeout, closing connection")
TOO_MANY_ERRORS = Reply(421, "4.7.0 Too many errors, closing connection")
TOO_MANY_COMMANDS = Reply(421, "4.7.0 Too many commands without mail, closing connection")
ERRORS_TOO_OFTEN = Reply(421, "4.7.0 Too many errors from your address in a minute")
LOGINS_TOO_OFTEN = Reply(421, "4.7.0 Too many failed logins from your address, try again later")
NOT_SMTP = Reply(421, "4.7.0 This is an SMTP server, closing connection")
LINE_TOO_LONG = Reply(500, "5.5.2 Line too long")
BARE_NEWLINE = Reply(500, "5.5.2 Lines end in CR LF")
NOT_UTF8 = Reply(500, "5.5.2 Command holds bytes that are not text")
UNKNOWN_COMMAND = Reply(500, "5.5.2 Command not recognized")
NOT_IMPLEMENTED = Reply(502, "5.5.1 Command not implemented")
NO_ARGUMENT_EXPECTED = Reply(501, "5.5.4 This command takes no argument")
HELLO_SYNTAX = Reply(501, "5.5.4 Syntax: EHLO hostname")
LHLO_EXPECTED = Reply(500, "5.5.1 This is LMTP, send LHLO")
HELLO_FIRST = Reply(503, "5.5.1 Send EHLO or HELO first")
SYNCHRONIZATION = Reply(554, "5.5.0 Sent before its turn, closing connection")
OK = Reply(250, "2.0.0 Ok")
BYE = Reply(221, "2.0.0 Bye")
HELP = Reply(214, "2.0.0 EHLO HELO MAIL RCPT DATA RSET NOOP VRFY HELP QUIT, see RFC 5321")
CANNOT_VERIFY = Reply(252, "2.5.1 Cannot verify, send mail and it will be tried")
TLS_READY = Reply(220, "2.0.0 Ready to start TLS")
TLS_ALREADY = Reply(503, "5.5.1 TLS is already in use")
TLS_UNAVAILABLE = Reply(454, "4.7.0 TLS is not available now")
AUTH_SYNTAX = Reply(501, "5.5.4 Syntax: AUTH mechanism [initial-response]")
AUTH_UNKNOWN = Reply(504, "5.5.4 Mechanism not offered")
AUTH_NEEDS_TLS = Reply(538, "5.7.11 Encryption required, send STARTTLS first")
AUTH_OUT_OF_TURN = Reply(503, "5.5.1 Already authenticated, or within a mail")
AUTH_BAD_RESPONSE = Reply(501, "5.5.2 Cannot decode the response")
AUTH_CANCELLED = Reply(501, "5.7.0 Authentication cancelled")
AUTH_OK = Reply(235, "2.7.0 Authentication succeeded")
AUTH_UNAVAILABLE = Reply(454, "4.7.0 Cannot check credentials now, try again later")
AUTH_FAILED = Reply(535, "5.7.8 Authentication credentials invalid")
MAIL_SYNTAX = Reply(501, "5.5.4 Syntax: MAIL FROM:<address> [parameters]")
MAIL_NESTED = Reply(503, "5.5.1 Sender already given, send RSET to start anew")
MAIL_OK = Reply(250, "2.1.0 Ok")
MESSAGES_TOO_OFTEN = Reply(450, "4.7.1 Too many messages from your address in a minute")
MAIL_FIRST = Reply(503, "5.5.1 Send MAIL first")
BAD_SENDER = Reply(553, "5.1.7 Sender address is malformed")
RCPT_SYNTAX = Reply(501, "5.5.4 Syntax: RCPT TO:<address> [parameters]")
RCPT_OK = Reply(250, "2.1.5 Ok")
BAD_RECIPIENT = Reply(553, "5.1.3 Recipient address is malformed")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3 Too many recipients, send the rest separately")
RETURN_FORGED = Reply(550, "5.7.1 This return address was not issued here")
RETURN_EXPIRED = Reply(550, "5.7.1 This return address has expired")
RECIPIENTS_TOO_OFTEN = Reply(450, "4.7.1 Too many recipients from your address in a minute")
NO_RELAY = Reply(550, "5.7.1 Relaying denied")
NO_WAY = Reply(451, "4.3.5 Mail for this address has nowhere to go, the server is misconfigured")
BAD_PARAMETER_VALUE = Reply(501, "5.5.4 Parameter value not understood")
UNKNOWN_PARAMETER = Reply(555, "5.5.4 Parameter not recognized")
UTF8_NOT_ASKED_FOR = Reply(553, "5.6.7 Address is not ASCII, and MAIL was without SMTPUTF8")
TOO_BIG = Reply(552, "5.3.4 Message too big")
RCPT_FIRST = Reply(503, "5.5.1 Send RCPT first, no recipient was accepted")
NO_VALID_RECIPIENTS = Reply(554, "5.5.1 No valid recipients")
BDAT_SYNTAX = Reply(501, "5.5.4 Syntax: BDAT size [LAST], closing connection")
BDAT_BEGUN = Reply(503, "5.5.1 DATA after BDAT")
BDAT_NEEDED = Reply(503, "5.5.1 BINARYMIME needs BDAT")
NO_MEMORY = Reply(452, "4.3.1 Insufficient system storage, try again later")
START_DATA = Reply(354, "End data with <CR><LF>.<CR><LF>")
BARE_NEWLINE_IN_DATA = Reply(550, "5.6.0 Message holds a bare CR or LF, lines end in CR LF")
TOO_MANY_HOPS = Reply(554, "5.4.6 Too many Received lines, mail is looping")
HEADER_TOO_BIG = Reply(552, "5.3.4 Header too big")
TOO_MANY_FIELDS = Reply(552, "5.3.4 Too many x-mq-* fields")
GIVEN_UP = Reply(451, "4.3.0 Local problem, please try again later")
QUEUE_UNAVAILABLE = Reply(451, "4.3.0 Queue not available, try again later")


@lru_cache(maxsize=16)
def greeting(hostname: str, *, lmtp: bool = False) -> Reply:
    return Reply(220, f"{hostname} {'LMTP' if lmtp else 'ESMTP'} mailerq")


def not_now(reason: str) -> Reply:
    """A mail cannot be taken now, for a `reason` on this host."""
    return Reply(451, f"4.3.0 {reason}")


def not_taken(reason: str) -> Reply:
    """A mail is never taken as it is."""
    return Reply(554, f"5.6.0 {reason}")


# The replies that deliveries make themselves, where no peer has refused the mail.

ADDRESS_NOT_ASCII = Reply(553, "5.6.7 Address is not ASCII and the peer does not offer SMTPUTF8")
HEADER_NOT_ASCII = Reply(553, "5.6.7 Header is not ASCII and the peer does not offer SMTPUTF8")
NOT_CONVERTIBLE = Reply(
    554, "5.6.3 the mail is 8-bit, cannot be converted, and the peer does not offer 8BITMIME"
)
OWN_FAULT = Reply(451, "4.3.0 internal error, see the application log")
NO_MECHANISM = Reply(454, "4.7.0 the peer offers no mechanism of AUTH for the login")
NO_STARTTLS = Reply(454, "4.7.5 TLS is demanded, and the peer does not offer STARTTLS")
NO_REQUIRETLS = Reply(450, "4.7.30 the sender requires TLS all the way, and the peer does not")
REQUIRETLS_FAILED = Reply(550, "5.7.30 the sender requires TLS all the way")
NO_BINARY = Reply(554, "5.6.3 the mail is binary, and the peer does not offer BINARYMIME")


def too_big_for_peer(size: int, limit: int) -> Reply:
    return Reply(552, f"5.3.4 Message has {size} bytes, the peer takes {limit}")


def tls_failed(reason: str) -> Reply:
    """A connection does not prove what is demanded (RFC 3463, section 3.8: X.7.5)."""
    return Reply(454, f"4.7.5 {reason}")


def requiretls_failed(reason: str) -> Reply:
    """A promise of RFC 8689 cannot be kept for now."""
    return Reply(450, f"4.7.30 {reason}")


def no_such_domain(reason: str) -> Reply:
    return Reply(550, f"5.1.2 {reason}")


def null_mx(domain: str) -> Reply:
    return Reply(556, f"5.1.10 {domain} accepts no mail (null MX)")


def loops_back(domain: str) -> Reply:
    return Reply(554, f"5.4.6 Mail for {domain} loops back to this host")


def forbidden_hosts(name: str, addresses: str) -> Reply:
    text = f"5.7.1 {name} is at {addresses}, where smtp-out-forbidden lets no mail go"
    return Reply(550, text)


def bounced(text: str) -> Reply:
    """An operator has given a message up."""
    return Reply(554, f"5.7.1 {text}")
