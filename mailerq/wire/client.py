"""Speak SMTP to a server: bytes in, events out, as a pure state machine.

Theory of operation
-------------------
`ClientProtocol` knows which replies are due, in order; that queue is its state. A complete
reply takes the first of them off and may put a command into the output and its reply onto
the queue. Where the peer offers PIPELINING (RFC 2920), RSET, MAIL, RCPT and DATA go out
together; otherwise the reply to each calls for the next.

A mail ends in exactly one event: `Accepted`, `Refused` or `Failed`. The first refusal of a
mail is the one that counts; what was pipelined behind it is read and dropped before
`Refused` is reported, so that the session can take the next mail. Two things that the peer
may then say need care. If it answers DATA with 354 although no recipient stands, a lone
dot ends a mail that goes to nobody. If it refused the sender, took the recipient *and*
says 354, that dot might deliver an empty mail, so the session is given up instead.

A transaction that the peer may still hold open is ended by RSET, sent with the next mail
and not before: many sessions see no next mail.

Where the peer offers PIPELINING the commands of the next mail may go out right behind the body
(RFC 2920, section 3.1, allows a body to begin a group): `mail` while `may_go_ahead`. A mail then
costs one round trip. What ends the session before the reply to the body is the end of the first
mail only; who sent the next one ahead must give it again elsewhere.

A driver does this::

    while (event := protocol.next_event()) is NEED_DATA:
        while data := protocol.data_to_send():
            send(data)
        protocol.receive_data(receive())

Everything that a peer can make grow is bounded by the constants below.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum, StrEnum, auto
from typing import Final

import msgspec

from mailerq.wire._lines import BARE, look
from mailerq.wire.framing import BLOCK_BYTES, in_pairs
from mailerq.wire.parameters import dsn_parameters
from mailerq.wire.smtp import LocalProtocolError, Reply

__all__ = [
    "CLOSED",
    "NEED_DATA",
    "Accepted",
    "ClientProtocol",
    "Event",
    "Failed",
    "NoEvent",
    "Problem",
    "Ready",
    "Refused",
    "SendBody",
    "Step",
    "encode_body",
]

MAX_REPLY_LINE: Final = 2048
"""Bytes of a reply line. RFC 5321 allows 512, some servers send long links; more is abuse."""

MAX_REPLY_LINES: Final = 128
"""Lines of one reply. The longest EHLO replies that are seen have two dozen."""

JOIN_BYTES: Final = 65536
"""Pieces of output below this are joined into one write; larger ones are not copied."""

MAX_MTA_NAME: Final = 255
"""Characters of a host name; it is kept with every result."""

_REPLY_LINE: Final = re.compile(rb"([2-5]\d\d)(?:([ -])(.*))?", re.DOTALL)

# What may stand between the angle brackets without ending them or the line: no controls,
# no space or bracket outside a quoted local part. Stricter rules are made elsewhere; this
# is what keeps an address from becoming a command.
_SAFE_ADDRESS: Final = re.compile(
    r'[^\x00-\x20\x7f-\x9f<>"]*|"(?:[^"\\\x00-\x1f\x7f-\x9f]|\\[^\x00-\x1f\x7f-\x9f])*"@[^\x00-\x20\x7f-\x9f<>"]+'
)

MAX_ADDRESS: Final = 1024
"""Characters of an address. The standard's limit is 254; the peer may judge that."""


class Step(StrEnum):
    """What the reply that is due answers; the values are the states of the newer results."""

    INTRO = "intro"
    EHLO = "ehlo"
    HELO = "helo"
    RESET = "reset"
    MAILFROM = "mailfrom"
    RCPTTO = "rcptto"
    DATA = "data"
    MESSAGE = "message"
    QUIT = "quit"
    IDLE = "idle"


# Each is asked for several times a mail, and as an attribute of an Enum costs ten times as much.
_INTRO, _EHLO, _HELO, _RESET, _MAILFROM, _RCPTTO, _DATA, _MESSAGE, _QUIT, _IDLE = Step


class Problem(StrEnum):
    """Why a session is of no more use. `TIMEOUT` is found by who has a clock."""

    LOST = "lost"
    INVALID = "invalid"
    OVERFLOW = "overflow"
    TIMEOUT = "timeout"


class Ready(msgspec.Struct, frozen=True):
    """The session is open and takes a mail. `mta` is the name in the peer's banner."""

    mta: str | None


class SendBody(msgspec.Struct, frozen=True):
    """The peer said 354: call `ClientProtocol.send_body`."""


class Accepted(msgspec.Struct, frozen=True):
    """The peer took the mail over; it is its duty now."""

    reply: Reply


class Refused(msgspec.Struct, frozen=True):
    """The peer said no to `step`; at INTRO, EHLO and HELO to the whole session.

    `reply` is our own where nothing was sent because the peer could not take it.
    """

    step: Step
    reply: Reply


class Failed(msgspec.Struct, frozen=True):
    """The session broke while the reply to `step` was due; IDLE: none was."""

    step: Step
    problem: Problem
    description: str


class NoEvent(Enum):
    """Nothing happened, or nothing more will."""

    NEED_DATA = auto()
    CLOSED = auto()


NEED_DATA: Final = NoEvent.NEED_DATA
"""Nothing to report: send what `ClientProtocol.data_to_send` has, then feed what comes in."""

CLOSED: Final = NoEvent.CLOSED
"""The session ended after QUIT."""

Event = Ready | SendBody | Accepted | Refused | Failed | NoEvent

_SEND_BODY: Final = SendBody()


class _Violation(Exception):
    """The peer broke the protocol; caught in `ClientProtocol.next_event`."""

    def __init__(self, problem: Problem, description: str) -> None:
        self.problem = problem
        self.description = description


class ClientProtocol:
    r"""One SMTP session from the client's side, without the connection.

    >>> protocol = ClientProtocol("me.test")
    >>> protocol.receive_data(b"220 mx.test ESMTP\r\n")
    >>> protocol.next_event(), protocol.data_to_send()
    (<NoEvent.NEED_DATA: 1>, b'EHLO me.test\r\n')
    >>> protocol.receive_data(b"250-mx.test\r\n250 PIPELINING\r\n")
    >>> protocol.next_event()
    Ready(mta='mx.test')
    >>> protocol.mail("a@b.test", "c@d.test")
    True
    >>> protocol.data_to_send()
    b'MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n'
    """

    def __init__(self, hostname: str) -> None:
        self.mta: str | None = None
        """The name in the peer's banner."""
        self.extensions: dict[str, str] = {}
        """What the peer's EHLO reply offered: upper-case keyword -> its parameters."""
        self.replies = 0
        """Complete replies so far; a deadline per reply starts anew when it grows."""
        self._hostname = hostname.encode()
        self._due: deque[Step] = deque((_INTRO,))
        self._later: deque[tuple[Step, bytes]] = deque()
        self._output: list[bytes] = []
        self._blocks: Iterator[bytes] = iter(())  # of a large body, whose end is in `_output`
        self._input = b""
        self._at = 0
        self._lines: list[str] = []
        self._code = b""
        self._eof = False
        self._refusal: Refused | None = None
        self._recipient_stands = False
        self._transaction_open = False
        self._body_due = False
        self._over: Event | None = None

    @property
    def step(self) -> Step:
        """The step whose reply is due, DATA while the body is; IDLE when nothing is."""
        if self._due:
            return self._due[0]
        return _DATA if self._body_due else _IDLE

    @property
    def reusable(self) -> bool:
        """True when the session is open and nothing is under way: `mail` may be called."""
        return not (self._due or self._body_due or self._refusal or self._over)

    @property
    def ended(self) -> bool:
        """True when the session is of no more use."""
        return self._over is not None

    @property
    def may_go_ahead(self) -> bool:
        """True when only the reply to a body is due, and the peer pipelines: so `mail` may, too."""
        return (
            len(self._due) == 1
            and self._due[0] is _MESSAGE
            and self._refusal is None
            and "PIPELINING" in self.extensions
        )

    # Output

    def mail(
        self,
        envelope: str,
        recipient: str,
        *,
        size: int | None = None,
        eight_bit: bool = False,
        utf8: bool = False,
        dsn: Mapping[str, object] | None = None,
    ) -> bool:
        """Begin to send a mail of `size` bytes; one recipient.

        `eight_bit` is about all of it, `utf8` about its header. `dsn` is the property of that
        name, which goes on to a peer that knows what to do with it. What the peer cannot
        take, or what would not be one command on the wire, ends in `Refused` without a byte
        sent. A mail that would end so is not begun while the reply to another one is due: False,
        and it is to be given again after that reply.
        """
        ahead = self.may_go_ahead
        if not (ahead or self.reusable):
            raise LocalProtocolError("a mail is under way, or the session is not open")
        utf8 = utf8 or not (envelope.isascii() and recipient.isascii())
        objection = self._objection(envelope, recipient, size, utf8=utf8)
        if objection is not None:
            if not ahead:
                self._refusal = objection
            return not ahead
        parameters = f" SIZE={size}" if size is not None and "SIZE" in self.extensions else ""
        if eight_bit and "8BITMIME" in self.extensions:
            parameters += " BODY=8BITMIME"
        if utf8:
            parameters += " SMTPUTF8"
        recipient_parameters = ""
        if dsn and "DSN" in self.extensions:
            sender_parameters, recipient_parameters = dsn_parameters(dsn)
            parameters += sender_parameters
        if self._transaction_open and not ahead:
            self._later.append((_RESET, b"RSET\r\n"))
        self._transaction_open = False
        self._later.append((_MAILFROM, f"MAIL FROM:<{envelope}>{parameters}\r\n".encode()))
        rcpt = f"RCPT TO:<{recipient}>{recipient_parameters}\r\n"
        self._later.append((_RCPTTO, rcpt.encode()))
        self._later.append((_DATA, b"DATA\r\n"))
        self._recipient_stands = False
        self._send_commands()
        return True

    def send_body(self, body: bytes) -> None:
        """Send the mail itself and the dot that ends it; answers `SendBody`."""
        if not self._body_due:
            raise LocalProtocolError("the peer has not asked for a body")
        if len(self._input) > self._at:
            return  # It answers already: `next_event` finds out that this is too early.
        self._body_due = False
        blocks, end = encode_body(body)
        if len(body) <= BLOCK_BYTES:
            self._output += blocks
        else:
            self._blocks = blocks
        self._output.append(end)
        self._due.append(_MESSAGE)

    def quit(self) -> None:
        """Say QUIT; the session then ends in `Closed`."""
        if self._body_due or self._over or _QUIT in self._due:
            raise LocalProtocolError("QUIT cannot be sent now")
        self._later.clear()
        self._output.append(b"QUIT\r\n")
        self._due.append(_QUIT)

    def data_to_send(self) -> bytes:
        """Take the next piece of output; empty when there is none."""
        output = self._output
        if not output:
            return b""
        if block := next(self._blocks, b""):
            return block
        size, count = len(output[0]), 1
        while count < len(output) and (size := size + len(output[count])) <= JOIN_BYTES:
            count += 1
        data = output[0] if count == 1 else b"".join(output[:count])
        del output[:count]
        return data

    def _objection(
        self, envelope: str, recipient: str, size: int | None, *, utf8: bool
    ) -> Refused | None:
        """What speaks against sending this mail, found before anything is on the wire."""
        if not _is_safe(envelope):
            return Refused(_MAILFROM, Reply(553, "5.1.7 Sender address is malformed"))
        if not recipient or not _is_safe(recipient):
            return Refused(_RCPTTO, Reply(553, "5.1.3 Recipient address is malformed"))
        if utf8 and "SMTPUTF8" not in self.extensions:
            text = "5.6.7 Address is not ASCII and the peer does not offer SMTPUTF8"
            if not envelope.isascii():
                return Refused(_MAILFROM, Reply(553, text))
            if not recipient.isascii():
                return Refused(_RCPTTO, Reply(553, text))
            text = "5.6.7 Header is not ASCII and the peer does not offer SMTPUTF8"
            return Refused(_MAILFROM, Reply(553, text))
        limit = self.extensions.get("SIZE", "")
        if size is not None and limit.isdecimal() and len(limit) <= 20 and 0 < int(limit) < size:
            text = f"5.3.4 Message has {size} bytes, the peer takes {int(limit)}"
            return Refused(_MAILFROM, Reply(552, text))
        return None

    def _send_commands(self) -> None:
        pipelining = "PIPELINING" in self.extensions
        while self._later:
            step, command = self._later.popleft()
            self._output.append(command)
            self._due.append(step)
            if not pipelining:
                return

    # Input

    def receive_data(self, data: bytes) -> None:
        """Feed what the peer sent; empty when it has closed the connection."""
        if not data:
            self._eof = True
        elif self._at == len(self._input):
            self._input = data
            self._at = 0
        else:
            self._input = self._input[self._at :] + data
            self._at = 0

    def next_event(self) -> Event:
        """What has happened since the last call."""
        if self._over is not None:
            return self._over
        if self._refusal is not None and not self._due:
            return self._report_refusal()
        try:
            while (reply := self._next_reply()) is not None:
                self.replies += 1
                if (event := self._take(reply)) is not None:
                    return event
        except _Violation as violation:
            return self.abort(violation.problem, violation.description)
        if self._eof:
            return self.abort(Problem.LOST, "connection closed by the peer")
        return NEED_DATA

    def abort(self, problem: Problem, description: str) -> Event:
        """The session is over, for a reason that the machine or its driver found.

        Returns what that means for the mail under way: a refusal that was seen before
        still is the peer's answer to it.
        """
        if self._over is None:
            event: Event = Failed(self.step, problem, description)
            if self.step is _QUIT:
                event = CLOSED
            elif self._refusal is not None:
                event = self._refusal
            self._finish(event)
        assert self._over is not None
        return self._over

    def _finish(self, event: Event) -> Event:
        self._over = event
        self._output.clear()
        self._blocks = iter(())
        self._later.clear()
        self._due.clear()
        self._body_due = False
        return event

    def _next_reply(self) -> Reply | None:
        """Take a complete reply off the input."""
        while True:
            end = self._input.find(b"\n", self._at, self._at + MAX_REPLY_LINE)
            if end < 0:
                if len(self._input) - self._at >= MAX_REPLY_LINE:
                    raise _Violation(Problem.OVERFLOW, f"reply line above {MAX_REPLY_LINE} bytes")
                return None
            line = self._input[self._at : end].removesuffix(b"\r")
            self._at = end + 1
            match = _REPLY_LINE.fullmatch(line)
            if match is None or (self._lines and match[1] != self._code):
                raise _Violation(Problem.INVALID, f"not a reply: {line[:100]!r}")
            text = (match[3] or b"").decode(errors="replace")
            if match[2] != b"-":
                if not self._lines:
                    return Reply(int(match[1]), text)
                self._lines.append(text)
                reply = Reply(int(match[1]), "\n".join(self._lines))
                self._lines = []
                return reply
            self._code = match[1]
            self._lines.append(text)
            if len(self._lines) >= MAX_REPLY_LINES:
                raise _Violation(Problem.OVERFLOW, f"reply of more than {MAX_REPLY_LINES} lines")

    def _take(self, reply: Reply) -> Event | None:
        """Let the reply to the first step that is due do what it does."""
        if not self._due:
            return self._take_unasked(reply)
        step = self._due.popleft()
        if step is _QUIT:
            return self._finish(CLOSED)
        kind = reply.code // 100
        if reply.code == 421:
            return self._finish(self._refusal or Refused(step, reply))
        if kind == 3 and (step is not _DATA or reply.code != 354):
            raise self._invalid(step, reply)
        if step is _MAILFROM:
            self._transaction_open = kind == 2
        elif step is _RCPTTO:
            self._recipient_stands = kind == 2
        elif step is _DATA:
            if kind == 2:
                raise self._invalid(step, reply)
            if kind == 3:
                return self._begin_body()
        elif step is _MESSAGE:
            self._transaction_open = False
            if self._refusal is None:
                return Accepted(reply) if kind == 2 else Refused(step, reply)
        elif step is _RESET:
            if kind != 2:
                raise self._invalid(step, reply)
        else:
            return self._take_hello(step, reply, kind)
        if kind != 2 and self._refusal is None:
            self._refusal = Refused(step, reply)
            self._later.clear()
        if self._due:
            return None
        if self._refusal is not None:
            return self._report_refusal()
        self._send_commands()
        return None

    def _take_hello(self, step: Step, reply: Reply, kind: int) -> Event | None:
        if kind == 2 and step is _INTRO:
            self.mta = next(iter(reply.text[:MAX_MTA_NAME].split()), None)
            self._output.append(b"EHLO %b\r\n" % self._hostname)
            self._due.append(_EHLO)
            return None
        if kind == 5 and step is _EHLO:
            self._output.append(b"HELO %b\r\n" % self._hostname)
            self._due.append(_HELO)
            return None
        if kind != 2:
            return self._finish(Refused(step, reply))
        if step is _EHLO:
            for line in reply.text.split("\n")[1:]:
                keyword, _, parameters = line.strip().partition(" ")
                self.extensions[keyword.upper()] = parameters.strip()
        return Ready(self.mta)

    def _begin_body(self) -> Event | None:
        if self._refusal is None:
            self._body_due = True
            if len(self._input) > self._at:
                raise _Violation(Problem.INVALID, "answered before the end of the message")
            return _SEND_BODY
        if self._recipient_stands:
            return self._finish(self._refusal)
        self._output.append(b".\r\n")
        self._due.append(_MESSAGE)
        return None

    def _take_unasked(self, reply: Reply) -> Event:
        if self._body_due and reply.code >= 400:
            return self._finish(Refused(_DATA, reply))
        if self._body_due:
            raise _Violation(Problem.INVALID, "answered before the end of the message")
        problem = Problem.LOST if reply.code == 421 else Problem.INVALID
        raise _Violation(problem, f"spoke unasked: {reply.code} {reply.description}")

    def _report_refusal(self) -> Event:
        refusal = self._refusal
        assert refusal is not None
        self._refusal = None
        return refusal

    def _invalid(self, step: Step, reply: Reply) -> _Violation:
        self._due.appendleft(step)
        return _Violation(Problem.INVALID, f"{reply.code} {reply.description}")


def _is_safe(address: str) -> bool:
    return len(address) <= MAX_ADDRESS and _SAFE_ADDRESS.fullmatch(address) is not None


def encode_body(body: bytes) -> tuple[Iterator[bytes], bytes]:
    r"""A message as it follows DATA (RFC 5321, section 4.5.2): its blocks, and what ends it.

    A bare CR or LF becomes CRLF, a dot that begins a line is doubled, and the last line is
    ended, so that only the final CRLF.CRLF can end the mail. Each block, of `BLOCK_BYTES`, is
    made when it is asked for: so neither time nor memory grows with the mail.

    >>> blocks, end = encode_body(b".a\n.b")
    >>> list(blocks), end
    ([b'..a\r\n..b'], b'\r\n.\r\n')
    """
    ended = not body or body.endswith((b"\r", b"\n"))
    return _encode(body), b".\r\n" if ended else b"\r\n.\r\n"


def _encode(body: bytes) -> Iterator[bytes]:
    end = 0
    begins_line = True
    while end < len(body):
        start, end = end, end + BLOCK_BYTES
        if body.startswith(b"\r\n", end - 1):
            end += 1  # a pair stays whole
        block = body[start:end]
        found = look(block)
        if found & BARE:
            block = in_pairs(block)
        if found:
            block = block.replace(b"\r\n.", b"\r\n..")
        if begins_line and block.startswith(b"."):
            block = b"." + block
        begins_line = block.endswith(b"\r\n")
        yield block
