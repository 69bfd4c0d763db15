"""The server side of SMTP (RFC 5321) as a state machine: bytes in, events and bytes out.

Theory of operation
-------------------
Pass the bytes of the socket to `ServerProtocol.receive_data`, call `next_event` until it returns
NEED_DATA, and send the bytes of `data_to_send`: all replies to one read leave in one write.

`next_event` itself answers commands that need no decision (NOOP, RSET, HELP, a syntax error, a
command out of turn). Every other command is an event that **pauses** the machine until the session
calls `accept` or `reject`. `accept` knows the normal reply to each event. So a session may wait for
a plugin or a disk without limit, while pipelined commands (RFC 2920) wait unread in the buffer.

Client and server must agree on the end of a mail, so the rules for pipelining are strict. Only
CR LF "." CR LF ends data. Nothing may follow DATA before the 354, and nothing may precede the
greeting. Clear text after STARTTLS is discarded (RFC 3207, section 4.2). A BDAT whose size is
unreadable or too large ends the session, because the end of its chunk is unknown or too far. A
refused chunk is read to its end before the reply.

`State` has the states of a session. The method of each command checks what the command needs.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from mailerq.address import parse_path
from mailerq.errors import AddressError
from mailerq.wire import sasl, smtp
from mailerq.wire.events import (
    CLOSED,
    NEED_DATA,
    Auth,
    Closing,
    Content,
    Data,
    Event,
    Hello,
    Mail,
    NoEvent,
    Rcpt,
    StartTls,
    XClient,
)
from mailerq.wire.extensions import Settings, hello_reply
from mailerq.wire.framing import Body, Sink
from mailerq.wire.parameters import (
    RCPT_KEYWORDS,
    MailParameters,
    ParameterError,
    RcptParameters,
    mail_keywords,
    parse_xclient,
    split_path,
)
from mailerq.wire.refusals import CONTENT_LINE, Refusals, shown_command, shown_mail
from mailerq.wire.smtp import LocalProtocolError, Reply

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
    "ServerProtocol",
    "Settings",
    "StartTls",
    "XClient",
]

ERROR_LIMIT: Final = 20
"""Errors in a row before the session is closed, as in Postfix."""

IDLE_COMMAND_LIMIT: Final = 100
"""Commands in a row without progress of a mail (NOOP, RSET, VRFY, a second EHLO, a tiny BDAT …)."""

TINY_CHUNK: Final = 64
"""Bytes of a chunk. A smaller one, except the last, counts as a command without progress."""

SOFT_ERROR_LIMIT: Final = ERROR_LIMIT // 2
SOFT_IDLE_COMMAND_LIMIT: Final = IDLE_COMMAND_LIMIT // 2
"""A session beyond one of these limits is a `nuisance`."""

DISCARD_LIMIT: Final = 1 << 20
"""Bytes of a line that is too long. The session closes if the line does not end before."""


class State(Enum):
    """The state of a session. The state of its transaction is `mail` and `rcpts`."""

    GREETING = auto()  # connected, banner not sent
    COMMAND = auto()
    AUTH = auto()  # within an AUTH exchange
    CONTENT = auto()  # after 354
    CHUNK = auto()  # within the bytes of a BDAT
    TLS = auto()  # STARTTLS accepted, handshake not done
    CLOSED = auto()


# Used a dozen times for each mail; an attribute of an Enum costs ten times as much.
_GREETING, _COMMAND, _AUTH, _CONTENT, _CHUNK, _TLS, _CLOSED = State


class ServerProtocol:
    """One session.

    `secure`: the session starts with TLS. `auth_in_clear`: AUTH is offered without TLS, too.
    `xclient`: the peer may name its client with XCLIENT, once.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        secure: bool = False,
        auth_in_clear: bool = False,
        xclient: bool = False,
    ) -> None:
        self.settings = settings
        self.secure = secure
        self.auth_in_clear = auth_in_clear
        self.xclient = xclient
        self.hello: Hello | None = None
        self.mail: Mail | None = None
        self.rcpts: list[Rcpt] = []
        self.authenticated = False
        self.state = _GREETING
        self.errors = 0
        """Errors in a row."""
        self.failures = 0
        """All errors so far."""
        self.steps = 0
        """Complete lines and mails so far; a mail by BDAT and its commands count once."""
        self.refusals: Refusals | None = None
        """Set this to a list to collect refused commands and mails."""
        self._line = b""
        self._idle_commands = 0
        self._refused_recipients = 0
        self._event: Event | None = None
        self._buffer = b""
        self._position = 0
        self._eof = False
        self._discarding = 0
        self._body = Body(settings.max_size)
        self._chunking = False
        self._chunk_left = 0
        self._chunk_is_last = False
        self._chunk_refusal: Reply | None = None
        self._exchange: sasl.Mechanism | None = None
        self._mechanism = ""
        self._closing: str | None = None
        self._out: list[bytes] = []

    @property
    def sender(self) -> str | None:
        """The sender of the current transaction, None without a transaction."""
        return self.mail.sender if self.mail is not None else None

    @property
    def recipients(self) -> list[str]:
        """The accepted recipients so far, in order."""
        return [rcpt.recipient for rcpt in self.rcpts]

    @property
    def in_content(self) -> bool:
        """Whether a mail is arriving; also true between its chunks."""
        return self.state is _CONTENT or self.state is _CHUNK or self._chunking

    @property
    def content_size(self) -> int:
        """Bytes of the current mail that are kept; 0 for a refused mail."""
        return self._body.kept

    @property
    def unfinished(self) -> bool:
        """Whether the peer has sent a part of a line or of a mail."""
        return self._position < len(self._buffer) or self._discarding > 0 or self.in_content

    @property
    def is_at_command(self) -> bool:
        """Whether the next byte of the peer begins a command."""
        return self.state is _COMMAND and not self.unfinished

    @property
    def nuisance(self) -> bool:
        """Whether the peer is beyond a soft limit, and should be answered slowly."""
        return self.errors > SOFT_ERROR_LIMIT or self._idle_commands > SOFT_IDLE_COMMAND_LIMIT

    # Methods for the session.

    def receive_data(self, data: bytes) -> None:
        """Add received bytes; b"" means that the peer has closed."""
        if not data:
            self._eof = True
            return
        waiting = self._buffer[self._position :]
        self._buffer = waiting + data if waiting else data
        self._position = 0

    def data_to_send(self) -> bytes:
        """Return the bytes to send to the peer, each once."""
        out = b"".join(self._out)
        self._out.clear()
        return out

    def write(self, data: bytes) -> None:
        """Queue raw bytes (`MQ_SmtpSend`)."""
        self._out.append(data)

    def send(self, reply: Reply) -> None:
        """Queue a reply without answering an event."""
        self._out.append(reply.wire)

    def greet(self, reply: Reply | None = None) -> None:
        """Send the banner, or `reply` to refuse the connection: then `Closing` follows."""
        if self.state is not _GREETING:
            raise LocalProtocolError("the banner has been sent")
        self.state = _COMMAND
        if reply is not None:
            self._close(reply, "refused on connecting")
        elif self._buffer:
            self._close(smtp.SYNCHRONIZATION, "spoke before the banner")
        else:
            self.send(smtp.greeting(self.settings.hostname, lmtp=self.settings.lmtp))

    def close(self, reply: Reply, reason: str) -> None:
        """End the session in any state with a last reply; `Closing` follows."""
        self._event = None
        self._close(reply, reason)

    def tls_started(self) -> None:
        """Start the session over after the handshake (RFC 3207, section 4.2)."""
        if self.state is not _TLS:
            raise LocalProtocolError("no STARTTLS was accepted")
        self.state = _COMMAND
        self.secure = True
        self.authenticated = False
        self.hello = None
        self._buffer = b""
        self._position = 0
        self._reset()

    def next_event(self) -> Event:
        """Return the next event that needs a decision, or NEED_DATA, CLOSED or Closing."""
        if self._event is not None:
            raise LocalProtocolError(f"{self._event} has not been answered")
        while self._closing is None:
            if self.state is _CONTENT:
                event = self._next_content()
            elif self.state is _CHUNK:
                event = self._next_chunk()
            else:
                event = self._next_command()
            if event is not None:
                if event is not NEED_DATA and event is not CLOSED:
                    self._event = event
                return event
        self.state = _CLOSED
        return Closing(self._closing)

    def accept(
        self,
        reply: Reply | None = None,
        *,
        each: Sequence[Reply] = (),
        sink: Sink | None = None,
    ) -> None:
        """Accept the event; `reply` replaces the normal reply.

        For `Content`, `each` may hold one reply for each recipient in order, good or bad (LMTP).
        For `Data`, `sink` may receive the mail if it is large.
        """
        event, self._event = self._event, None
        # `isinstance` would call the metaclass of msgspec, which is slow.
        if type(event) is Rcpt:
            self.rcpts.append(event)
            self.send(reply or smtp.RCPT_OK)
        elif type(event) is Mail:
            self.mail = event
            self.send(reply or smtp.MAIL_OK)
        elif type(event) is Data:
            self._begin_content(reply, sink)
        elif type(event) is Content:
            count = len(self.rcpts) if self.settings.lmtp else 1
            for answer in each or count * (reply or smtp.OK,):
                self.send(answer)
                if answer.code >= 400 and self.refusals is not None:
                    self.refusals.append((shown_mail(self.mail, self.rcpts), answer))
            self._reset()
            self.errors = self._idle_commands = 0
        elif type(event) is Hello:
            self.hello = event
            self._reset()
            auth = self._may_authenticate()
            usual = hello_reply(self.settings, event.extended, self.secure, auth, self.xclient)
            self.send(reply or usual)
        elif type(event) is Auth:
            self.authenticated = True
            self.send(reply or smtp.AUTH_OK)
        elif type(event) is StartTls:
            self.state = _TLS
            self.send(reply or smtp.TLS_READY)
        elif type(event) is XClient:
            # Only once: from now on the proxy may pass on commands of the client.
            self.xclient = False
            self.hello = None
            self.authenticated = False
            self._reset()
            self.send(reply or smtp.greeting(self.settings.hostname, lmtp=self.settings.lmtp))
        else:
            raise LocalProtocolError("there is nothing to accept")

    def _begin_content(self, reply: Reply | None, sink: Sink | None) -> None:
        assert self.mail is not None, "content comes within a transaction"
        self._body = Body(
            self.settings.max_size,
            sink,
            normalize=self.settings.normalize,
            binary=self.mail.parameters.body == "BINARYMIME",
        )
        if self._chunking:
            self.state = _CHUNK
        else:
            self.state = _CONTENT
            self._chunk_is_last = True  # a mail by DATA is one chunk
            self.send(reply or smtp.START_DATA)

    def reject(self, reply: Reply) -> None:
        """Refuse the event with a reply. A 421 closes the session (RFC 5321, section 3.8)."""
        event, self._event = self._event, None
        if event is None:
            raise LocalProtocolError("there is nothing to reject")
        if reply.code == 421:
            if isinstance(event, Content):
                self._line = shown_mail(self.mail, self.rcpts).encode()
            self._close(reply, "closed by a reply 421")
            return
        if isinstance(event, Content):
            self._content_failed(reply)
        elif isinstance(event, Data) and self._chunking:
            self._refuse_chunk(reply)
        elif isinstance(event, Data):
            self._reset()
            self._fail(reply)
        elif isinstance(event, Rcpt):
            self._recipient_failed(reply)
        else:
            self._fail(reply)

    # Commands.

    def _next_command(self) -> Event | None:
        """Process one line; return None if the line was answered here."""
        if self.state is _TLS:
            raise LocalProtocolError("call tls_started after the handshake")
        limit = smtp.AUTH_LIMIT if self.state is _AUTH else smtp.COMMAND_LIMIT
        end = self._buffer.find(b"\n", self._position)
        if end < 0:
            return self._incomplete(limit)
        line = self._line = self._buffer[self._position : end + 1]
        self._position = end + 1
        if not self._chunking:
            self.steps += 1
        if self._discarding or len(line) > limit:
            self._discarding = 0
            self._exchange = None
            self.state = _COMMAND
            return self._fail(smtp.LINE_TOO_LONG)
        if not line.endswith(b"\r\n") or line.count(b"\r") > 1:
            return self._fail(smtp.BARE_NEWLINE)
        if self.state is _AUTH:
            self._line = b"AUTH"
            return self._auth_response(line[:-2])
        verb, _, argument = line[:-2].partition(b" ")
        command = _COMMANDS.get(verb.upper())
        if command is None:
            return self._unknown_command(verb.upper())
        try:
            text = argument.lstrip(b" ").rstrip(b" \t").decode()
        except UnicodeDecodeError:
            return self._fail(smtp.NOT_UTF8)
        if "\0" in text:
            return self._fail(smtp.NOT_UTF8)
        return command(self, text)

    def _incomplete(self, limit: int) -> Event | None:
        waiting = len(self._buffer) - self._position
        if self._eof:
            return self._need_data()
        if waiting > limit or self._discarding:
            self._discarding += waiting
            self._buffer, self._position = b"", 0
            if self._discarding > DISCARD_LIMIT:
                return self._close(smtp.LINE_TOO_LONG, "sent a line without end")
        return NEED_DATA

    def _ehlo(self, argument: str) -> Event | None:
        if self.settings.lmtp:
            return self._fail(smtp.LHLO_EXPECTED)
        return self._introduce(argument, extended=True)

    def _helo(self, argument: str) -> Event | None:
        if self.settings.lmtp:
            return self._fail(smtp.LHLO_EXPECTED)
        return self._introduce(argument, extended=False)

    def _lhlo(self, argument: str) -> Event | None:
        if not self.settings.lmtp:
            return self._fail(smtp.UNKNOWN_COMMAND)
        return self._introduce(argument, extended=True)

    def _introduce(self, argument: str, *, extended: bool) -> Event | None:
        name, _, rest = argument.partition(" ")
        if not name or rest or not name.isprintable() or not name.isascii():
            return self._fail(smtp.HELLO_SYNTAX)
        if self.hello is not None and self._idled_out():
            return None
        return Hello(name, extended)

    def _xclient(self, argument: str) -> Event | None:
        if not self.xclient:
            return self._fail(smtp.NOT_IMPLEMENTED)
        if self.mail is not None:
            return self._fail(smtp.MAIL_NESTED)
        try:
            return XClient(parse_xclient(argument))
        except ParameterError as error:
            return self._fail(error.reply)

    def _starttls(self, argument: str) -> Event | None:
        if self.secure:
            return self._fail(smtp.TLS_ALREADY)
        if not self.settings.starttls:
            return self._fail(smtp.NOT_IMPLEMENTED)
        if argument:
            return self._fail(smtp.NO_ARGUMENT_EXPECTED)
        self._buffer, self._position = b"", 0
        return StartTls()

    def _auth(self, argument: str) -> Event | None:
        if not self.settings.mechanisms:
            return self._fail(smtp.NOT_IMPLEMENTED)
        if self.authenticated or self.mail is not None:
            return self._fail(smtp.AUTH_OUT_OF_TURN)
        if self.hello is None:
            return self._fail(smtp.HELLO_FIRST)
        if not self._may_authenticate():
            return self._fail(smtp.AUTH_NEEDS_TLS)
        name, _, initial = argument.partition(" ")
        if not name:
            return self._fail(smtp.AUTH_SYNTAX)
        self._mechanism = name.upper()
        if self._mechanism not in self.settings.mechanisms:
            return self._fail(smtp.AUTH_UNKNOWN)
        self._exchange = sasl.MECHANISMS[self._mechanism](self.settings.hostname)
        self.state = _AUTH
        challenge = next(self._exchange)
        if initial:
            return self._auth_response(b"" if initial == "=" else initial.encode())
        self._challenge(challenge)
        return None

    def _auth_response(self, line: bytes) -> Event | None:
        exchange = self._exchange
        assert exchange is not None, "within an exchange"
        if line == b"*":
            return self._auth_failed(smtp.AUTH_CANCELLED)
        try:
            challenge = exchange.send(binascii.a2b_base64(line, strict_mode=True))
        except StopIteration as done:
            self._exchange = None
            self.state = _COMMAND
            return Auth(self._mechanism, done.value)
        except (binascii.Error, sasl.BadResponse):
            return self._auth_failed(smtp.AUTH_BAD_RESPONSE)
        self._challenge(challenge)
        return None

    def _challenge(self, challenge: bytes) -> None:
        self.send(Reply(334, binascii.b2a_base64(challenge, newline=False).decode()))

    def _auth_failed(self, reply: Reply) -> Event | None:
        self._exchange = None
        self.state = _COMMAND
        return self._fail(reply)

    def _mail(self, argument: str) -> Event | None:
        if self.hello is None:
            return self._fail(smtp.HELLO_FIRST)
        if self.mail is not None:
            return self._fail(smtp.MAIL_NESTED)
        split = split_path(argument, "FROM:")
        if split is None:
            return self._fail(smtp.MAIL_SYNTAX)
        try:
            sender = parse_path(split[0], null=True)
            parameters = MailParameters.parse(
                split[1],
                mail_keywords(
                    extended=self.settings.extended, secure=self.secure, dsn=self.settings.dsn
                ),
            )
        except AddressError:
            return self._fail(smtp.BAD_SENDER)
        except ParameterError as error:
            return self._fail(error.reply)
        if parameters.size > self.settings.max_size > 0:
            return self._fail(smtp.TOO_BIG)
        if not parameters.utf8 and not sender.isascii():
            return self._fail(smtp.UTF8_NOT_ASKED_FOR)
        return Mail(sender, parameters)

    def _rcpt(self, argument: str) -> Event | None:
        if self.mail is None or self._chunking:
            return self._fail(smtp.MAIL_FIRST)
        split = split_path(argument, "TO:")
        if split is None:
            return self._fail(smtp.RCPT_SYNTAX)
        if len(self.rcpts) >= self.settings.max_recipients:
            # Not an error: clients find the limit by reaching it.
            self.send(smtp.TOO_MANY_RECIPIENTS)
            return None
        try:
            recipient = parse_path(split[0], postmaster=True)
            parameters = RcptParameters.parse(
                split[1],
                RCPT_KEYWORDS if self.settings.extended and self.settings.dsn else (),
                utf8=self.mail.parameters.utf8,
            )
        except AddressError:
            return self._recipient_failed(smtp.BAD_RECIPIENT)
        except ParameterError as error:
            return self._recipient_failed(error.reply)
        if not self.mail.parameters.utf8 and not recipient.isascii():
            return self._recipient_failed(smtp.UTF8_NOT_ASKED_FOR)
        return Rcpt(recipient, parameters)

    def _recipient_failed(self, reply: Reply) -> Event | None:
        self._refused_recipients += 1
        return self._fail(reply)

    def _why_not_data(self) -> Reply | None:
        """Return the reply if DATA or BDAT is out of turn, or None."""
        if self.mail is None:
            return smtp.MAIL_FIRST
        if not self.rcpts:
            return smtp.NO_VALID_RECIPIENTS if self._refused_recipients else smtp.RCPT_FIRST
        return None

    def _data(self, argument: str) -> Event | None:
        if argument:
            return self._fail(smtp.NO_ARGUMENT_EXPECTED)
        if self._chunking:
            return self._fail(smtp.BDAT_BEGUN)
        refusal = self._why_not_data()
        if refusal is not None:
            return self._fail(refusal)
        if self.mail is not None and self.mail.parameters.body == "BINARYMIME":
            return self._fail(smtp.BDAT_NEEDED)
        if self._position < len(self._buffer):
            return self._close(smtp.SYNCHRONIZATION, "sent data before the reply to DATA")
        return Data()

    def _bdat(self, argument: str) -> Event | None:
        """BDAT (RFC 3030, section 2). The chunk follows the line even if BDAT is refused."""
        match = _CHUNK_SIZE(argument) if self.settings.extended else None
        if match is None:
            return self._close(smtp.BDAT_SYNTAX, "sent a BDAT whose size cannot be read")
        size = int(match[1])
        self._chunk_is_last = match[2] is not None
        if size > self.settings.max_size > 0:
            self._repeat(smtp.TOO_BIG)
            return self._close(smtp.TOO_BIG, "sent a chunk over the limit")
        if size < TINY_CHUNK and not self._chunk_is_last and self._idled_out():
            return None
        self._chunk_left = size
        refusal = self._why_not_data()
        if refusal is not None:
            return self._refuse_chunk(refusal)
        if self._chunking:
            self.state = _CHUNK
            return None
        self._chunking = True
        return Data()

    def _refuse_chunk(self, reply: Reply) -> Event | None:
        """Read to the end of the chunk, then send the reply."""
        self._chunk_refusal = reply
        self.state = _CHUNK
        return None

    def _rset(self, argument: str) -> Event | None:
        if argument:
            return self._fail(smtp.NO_ARGUMENT_EXPECTED)
        if not self._idled_out():
            self._reset()
            self.send(smtp.OK)
        return None

    def _noop(self, argument: str) -> Event | None:
        if not self._idled_out():
            self.send(smtp.OK)
        return None

    def _help(self, argument: str) -> Event | None:
        if not self._idled_out():
            self.send(smtp.HELP)
        return None

    def _vrfy(self, argument: str) -> Event | None:
        if not argument:
            return self._fail(smtp.BAD_PARAMETER_VALUE)
        if not self._idled_out():
            self.send(smtp.CANNOT_VERIFY)
        return None

    def _quit(self, argument: str) -> Event | None:
        if argument:
            return self._fail(smtp.NO_ARGUMENT_EXPECTED)
        return self._close(smtp.BYE, "QUIT")

    def _unknown_command(self, verb: bytes) -> Event | None:
        if verb in _OTHER_PROTOCOLS:
            return self._close(smtp.NOT_SMTP, "speaks another protocol")
        known = verb in _KNOWN_ELSEWHERE
        return self._fail(smtp.NOT_IMPLEMENTED if known else smtp.UNKNOWN_COMMAND)

    # Content.

    def _next_content(self) -> Event | None:
        """Read the buffered bytes of a mail by DATA; return the mail at its end."""
        data = self._take_buffer()
        if not data:
            return self._need_data()
        rest = self._body.receive_stuffed(data)
        if rest is None:
            return self._need_data()
        self._buffer = rest
        return self._finish_content()

    def _next_chunk(self) -> Event | None:
        """Read the buffered bytes of a chunk; at its end reply, or return the mail."""
        if self._chunk_left:
            data = self._buffer[self._position : self._position + self._chunk_left]
            if not data:
                return self._need_data()
            self._position += len(data)
            self._chunk_left -= len(data)
            if self._chunk_refusal is None:
                self._body.add(data)
            return None
        refusal, self._chunk_refusal = self._chunk_refusal, None
        if refusal is not None:
            self.state = _COMMAND
            self.steps += 1
            return self._content_failed(refusal)
        if self._chunk_is_last or self._body.is_too_big:
            return self._finish_content()
        self.state = _COMMAND
        self.send(Reply(250, f"2.0.0 {self._body.size} octets received"))
        return None

    def _finish_content(self) -> Event | None:
        self.state = _COMMAND
        self.steps += 1
        self._line = CONTENT_LINE
        body = self._body.finish()
        if self._body.is_too_big:
            return self._content_failed(smtp.TOO_BIG)
        if self._body.is_bare:
            return self._content_failed(smtp.BARE_NEWLINE_IN_DATA)
        return Content(body)

    def _take_buffer(self) -> bytes:
        data = self._buffer[self._position :] if self._position else self._buffer
        self._buffer, self._position = b"", 0
        return data

    def _need_data(self) -> Event:
        if not self._eof:
            return NEED_DATA
        self.state = _CLOSED
        return CLOSED

    def _content_failed(self, reply: Reply) -> Event | None:
        """Refuse the whole mail, whichever chunk failed."""
        self._line = shown_mail(self.mail, self.rcpts).encode()
        self._repeat(reply)
        self._reset()
        return self._fail(reply)

    def _repeat(self, reply: Reply) -> None:
        """Send a refusal of the mail for all recipients except one.

        In LMTP the end of a mail has a reply for each recipient, and a chunk that is not the last
        has one (RFC 2033, sections 4.2 and 4.3).
        """
        if self.settings.lmtp and self._chunk_is_last:
            for _ in self.rcpts[1:]:
                self.send(reply)

    # Helpers of commands.

    def _may_authenticate(self) -> bool:
        return self.secure or self.auth_in_clear

    def _idled_out(self) -> bool:
        """Count a command without progress; return True, and close, if there were too many."""
        self._idle_commands += 1
        if self._idle_commands <= IDLE_COMMAND_LIMIT:
            return False
        self._close(smtp.TOO_MANY_COMMANDS, "too many commands without mail")
        return True

    def _reset(self) -> None:
        self.mail = None
        self.rcpts = []
        self._refused_recipients = 0
        if self._chunking:
            self._chunking = False
            self.steps += 1

    def _fail(self, reply: Reply) -> Event | None:
        """Answer with an error. Returns None, so that commands can end with this call."""
        self.errors += 1
        self.failures += 1
        if self.refusals is not None:
            self.refusals.append((shown_command(self._line, _VERBS), reply))
        if self.errors > ERROR_LIMIT:
            self.send(smtp.TOO_MANY_ERRORS)
            self._closing = "too many errors"
        else:
            self.send(reply)
        return None

    def _close(self, reply: Reply, reason: str) -> Event | None:
        """Answer with the last reply; `next_event` then returns Closing."""
        if self.refusals is not None and reply.code >= 400:
            self.refusals.append((shown_command(self._line, _VERBS), reply))
        self.send(reply)
        self._closing = reason
        return None


_OTHER_PROTOCOLS: Final = frozenset((b"GET", b"POST", b"PUT", b"HEAD", b"CONNECT", b"OPTIONS"))

_KNOWN_ELSEWHERE: Final = frozenset((b"EXPN", b"SEND", b"SOML", b"SAML", b"TURN", b"ETRN"))

_COMMANDS: Final[dict[bytes, Callable[[ServerProtocol, str], Event | None]]] = {
    b"EHLO": ServerProtocol._ehlo,
    b"HELO": ServerProtocol._helo,
    b"LHLO": ServerProtocol._lhlo,
    b"XCLIENT": ServerProtocol._xclient,
    b"STARTTLS": ServerProtocol._starttls,
    b"AUTH": ServerProtocol._auth,
    b"MAIL": ServerProtocol._mail,
    b"RCPT": ServerProtocol._rcpt,
    b"DATA": ServerProtocol._data,
    b"BDAT": ServerProtocol._bdat,
    b"RSET": ServerProtocol._rset,
    b"NOOP": ServerProtocol._noop,
    b"HELP": ServerProtocol._help,
    b"VRFY": ServerProtocol._vrfy,
    b"QUIT": ServerProtocol._quit,
}

_VERBS: Final = _COMMANDS.keys() | _KNOWN_ELSEWHERE

_CHUNK_SIZE: Final = re.compile(r"(\d{1,19})(?: +(LAST))?", re.IGNORECASE | re.ASCII).fullmatch
