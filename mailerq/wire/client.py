"""Speak SMTP to a server: bytes in, events out, as a pure state machine.

Theory of operation
-------------------
The state of `ClientProtocol` is the queue of replies that are due. A complete reply removes the
first of them, and may add a command to the output and its reply to the queue. If the peer offers
PIPELINING (RFC 2920), RSET, MAIL, RCPT and DATA go out together; otherwise each waits for the reply
to the one before.

A mail ends in exactly one event: `Accepted`, `Refused` or `Failed`. The first refusal of a mail
counts. The replies to commands pipelined behind the refused one are read before `Refused` is
reported, so that the session can take the next mail. If the peer answers DATA with 354 although the
recipient was refused, a lone dot ends a mail without recipients.

RSET ends a transaction that the peer may still hold open. RSET goes out with the next mail and not
before: many sessions see no next mail.

If the peer offers PIPELINING, the commands of the next mail may go out right behind the body (RFC
2920, section 3.1, allows a body to begin a group): call `mail` while `may_go_ahead`. A mail then
costs one round trip. If the session ends before the reply to the body is reported, only the first
mail ends; the driver must send the next one elsewhere.

A binary mail goes out as one chunk if the peer offers CHUNKING and BINARYMIME (RFC 3030): BDAT with
LAST and the size of the body, then the bytes as they are. One chunk needs one reply, and leaves no
doubt about which chunks the peer has. The chunk waits for the reply to RCPT, and no envelope goes
ahead of or behind it. Other mail goes out by DATA: BDAT saves the dots, but has no 354, and so
proves less of the peer's position.

LMTP (RFC 2033) begins with LHLO. Its dot gets a reply for each recipient, and a mail has one. Its
DATA is never answered by 354 when the recipient was refused.

With `tls` a session says STARTTLS (RFC 3207) if the peer offers it: 220 is reported as `StartTls`,
and the driver does the handshake and calls `secured`. Nothing that came in clear counts then: EHLO
goes out again. Input ahead of the reply to STARTTLS, or behind it, may be that of somebody else on
the way (CVE-2011-0411), and ends the session, as does a refusal. `must_tls`: so does no offer.

A session with a login proves it by AUTH (RFC 4954) before it is `Ready`. 334 and 235 answer AUTH
only, and no other reply lets the session go on. If the peer repeats the password, no event has it.

In step
-------
Replies do not name their command. A peer that answers one command twice, late or not at all, or
that speaks unasked, shifts every later reply. Three replies show the peer's position: 354 answers
DATA only; 503, or the status 5.5.1 (RFC 3463, section 3.6), answers a command whose predecessor was
refused; 221 answers QUIT only. Hence one rule: **a reply that ends a mail for good counts only when
later replies prove that the session is in step.** So a command follows each body: the next
envelope, QUIT behind the last mail of a session, else RSET; busy servers that limit NOOP allow one
RSET a mail. QUIT goes out with the body if the peer offers PIPELINING. RSET waits for the reply:
many peers close after their reply to the last mail of a session, and a 250 that may be the answer
to RSET would then prove nothing.

- *RSET* proves an acceptance. If the 2xx before were not the reply to the body, the reply to the
  body would be in the place of the reply to RSET: either it is no 2xx, or the mail was accepted all
  the same.
- *QUIT* proves any reply: 221 in its place shows that no reply was left over. QUIT follows a body
  that is refused with 5xx.
- *An envelope is ahead.* The reply to the dot is held until MAIL, RCPT and DATA are answered, for
  that reply may answer MAIL. Four sequences prove that it does not: MAIL and RCPT accepted, and 354
  to DATA; MAIL and RCPT accepted, and DATA refused; RCPT refused, and 503 to DATA; MAIL refused
  behind a body that was accepted, and 503 to RCPT and DATA. Only the first sequence proves a 5xx;
  after the others a 5xx needs QUIT. If the session ends earlier, a status other than that of an
  earlier MAIL proves an acceptance: for example 2.0.0 after 2.1.0.
- *An envelope is refused with 5xx.* 5xx to every command pipelined behind proves the refusal: the
  one meant for this mail is among them. 354 proves it too. If nothing was pipelined behind, QUIT
  must prove it. If the session ends earlier, the refusal counts on a new connection only.
- *The peer closes instead of answering RSET or QUIT.* That proves the reply to a body, which cannot
  be the answer to either.
- *The peer was out of step before* (`careful`), or answered no dot that had output behind it.
  Nothing goes out with a body then, and QUIT follows the reply to the body. 421 and silence prove
  as much as the end of the stream: otherwise a peer that always leaves this way would get the mail
  again and again.
- *BDAT.* RSET or QUIT proves the reply to a chunk, as it proves the reply to a dot. If a reply came
  twice before, the one to RCPT is in the place of the one to BDAT, and the one to BDAT in the place
  of the proof. An envelope that is refused with 5xx needs QUIT: MAIL and RCPT alone get two replies
  also from a peer that reads the body before as commands.
- *Impossible replies* end the session: 354 for anything but DATA, 2xx for DATA, 221 for anything
  but QUIT, 503 for a command whose predecessors were accepted, BDAT included, RCPT accepted or 354
  after MAIL was refused, 4xx behind 5xx, RSET refused, a reply when none is due.

Without proof the mail ends in `Failed`, and the driver tries again: a duplicate is better than a
loss. `out_of_step` asks the driver to be careful with the host for a while. 4xx needs no proof: the
mail is tried again anyway.

Guarantees
----------
Assume a peer that does one thing wrong: it answers a command late, twice or not at all, or speaks
unasked, anywhere. Then a mail is `Accepted` only if the peer accepted it, and `Refused` with 5xx
only if the peer refused it with 5xx, though perhaps at another step.
``tests/wire/test_client_step.py`` enumerates this.

No client can detect a peer that says something unasked *in the place* of its reply to the dot, and
never sends that reply: the peer continues in step, or leaves as the rules above allow. Every byte
is then that of a peer in step. ``tests/wire/test_client_proof.py`` lists all sequences that are
believed, and shows this for each such case.

The loop of a driver::

    while (event := protocol.next_event()) is NEED_DATA:
        while data := protocol.data_to_send():
            send(data)
        protocol.receive_data(receive())

The constants below bound everything that a peer can make grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

from mailerq.wire import smtp
from mailerq.wire.client_events import (
    CLOSED,
    NEED_DATA,
    Accepted,
    Event,
    Failed,
    NoEvent,
    Problem,
    Ready,
    Refused,
    SendBody,
    StartTls,
    Step,
)
from mailerq.wire.extensions import offers, session_limits
from mailerq.wire.framing import BLOCK_BYTES, InBlocks, encode
from mailerq.wire.login import (
    MECHANISMS,
    Exchange,
    Login,
    hidden,
    mechanism_of,
    next_move,
)
from mailerq.wire.objections import objection_to
from mailerq.wire.parameters import envelope_commands
from mailerq.wire.smtp import REPLY_LINE, LocalProtocolError, Reply, long_reply_of, reply_of

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
    "StartTls",
    "Step",
]

MAX_REPLY_LINE: Final = 2048
"""Bytes of a reply line. RFC 5321 allows 512, some servers send long links; more is abuse."""

MAX_REPLY_LINES: Final = 128
"""Lines of one reply. The longest EHLO replies seen have two dozen."""

JOIN_BYTES: Final = 65536
"""Smaller pieces of output are joined into one write; larger ones are not copied."""

MAX_MTA_NAME: Final = 255
"""Characters of a host name; every result keeps it."""

_ABOUT_COMMANDS: Final = range(500, 505)
"""Codes for a command that the peer did not understand or expect; no verdict on a body."""

# Each is read several times a mail; the attribute of an Enum costs ten times as much.
_INTRO, _EHLO, _HELO, _STARTTLS = Step.INTRO, Step.EHLO, Step.HELO, Step.STARTTLS
_RESET, _MAILFROM, _RCPTTO, _DATA = Step.RESET, Step.MAILFROM, Step.RCPTTO, Step.DATA
_MESSAGE, _QUIT, _IDLE = Step.MESSAGE, Step.QUIT, Step.IDLE

_SEND_BODY, _START_TLS = SendBody(), StartTls()


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

    def __init__(
        self,
        hostname: str,
        *,
        careful: bool = False,
        login: Login | None = None,
        lmtp: bool = False,
        tls: bool = False,
        must_tls: bool = False,
    ) -> None:
        self.careful = careful
        """True if the peer was out of step before: QUIT follows the reply to each body."""
        self.mta: str | None = None
        """The name in the peer's banner."""
        self.extensions: dict[str, str] = {}
        """The peer's EHLO offers: upper-case keyword -> its parameters. Shared: do not change."""
        self.secure = False
        """True once the connection uses TLS."""
        self.mechanism: str | None = None
        """The mechanism of AUTH by which the session proves its login, in lower case."""
        self.max_mails = self.max_domains = 0
        """Mails, and domains of their recipients, that a session takes (RFC 9422); 0: unlimited."""
        self.replies = 0
        """Complete replies so far; a deadline per reply restarts when this grows."""
        self.out_of_step = False
        """True if replies may answer something else, or no reply came to a dot with more behind."""
        self.may_go_ahead = False
        """True from `send_body` to `data_to_send` if an envelope may go out behind the body."""
        self._hostname = hostname.encode()
        self._lmtp = lmtp
        self._login = login
        self._tls, self._must_tls = tls or must_tls, must_tls
        self._exchange: Exchange | None = None  # of AUTH; None before and after
        self._due: deque[Step] = deque((_INTRO,))
        self._later: deque[tuple[Step, bytes]] = deque()
        self._output: list[bytes] = []
        self._blocks: Iterator[bytes] = iter(())  # of a large body; its end is in `_output`
        self._input = b""
        self._at = 0
        self._lines: list[str] = []
        self._code = b""
        self._eof = False
        self._last = False  # QUIT proves the reply to the body
        self._ahead = False  # an envelope went out behind the body; no verdict is reported yet
        self._held: Reply | None = None  # the reply to a body, not yet proved
        self._farewell = False  # 421 ended the session
        self._refusal: Refused | None = None
        self._proved = False  # the replies behind the refusal prove it, if none is missing
        self._doubted = False  # if one is missing, they prove nothing
        self._sender: Reply | None = None  # the reply to the last MAIL
        self._known_sender: Reply | None = None  # one to MAIL that was proved
        self._fresh = True  # no body was sent, so no earlier reply to a mail can be left over
        self._transaction_open = False
        self._binary = False  # the mail goes out by BDAT
        self._body_due = False
        self._asked = False  # the peer waits for the body; `SendBody` is to be reported
        self._over: Event | None = None

    @property
    def step(self) -> Step:
        """The step whose reply is due, DATA while the body is due; IDLE if nothing is."""
        if self._due:
            return self._due[0]
        return _DATA if self._body_due else _IDLE

    @property
    def reusable(self) -> bool:
        """True if the session is open and nothing is under way: `mail` may be called."""
        return not (self._due or self._body_due or self._refusal or self._over)

    @property
    def takes_binary(self) -> bool:
        """Whether the peer takes binary mail (RFC 3030)."""
        return "BINARYMIME" in self.extensions and "CHUNKING" in self.extensions

    @property
    def due(self) -> tuple[Step, ...] | None:
        """The steps whose replies are due; None within a reply or a body."""
        within = self._at < len(self._input) or self._lines or self._body_due or self._output
        return None if within or self._over else tuple(self._due)

    @property
    def ended(self) -> bool:
        """True if the session cannot continue."""
        return self._over is not None

    def secured(self) -> None:
        """The TLS handshake that `StartTls` asked for is done: begin anew inside TLS."""
        if self.step is not _STARTTLS or self._output or self._over:
            raise LocalProtocolError("no TLS handshake is due")
        self._due.clear()
        self.secure = True
        self.extensions = {}
        self.max_mails = self.max_domains = 0
        self._say_hello(_EHLO)

    # Output

    def mail(
        self,
        envelope: str,
        recipient: str,
        *,
        size: int | None = None,
        eight_bit: bool = False,
        binary: bool = False,
        utf8: bool = False,
        require_tls: bool = False,
        dsn: Mapping[str, object] | None = None,
    ) -> bool:
        """Begin to send a mail of `size` bytes to one recipient.

        `eight_bit` and `binary` describe the whole mail, `utf8` its header; a binary mail goes out
        byte for byte if the peer `takes_binary`, else as lines. `dsn` is the property of that name;
        peers that support it get it. `require_tls` says REQUIRETLS (RFC 8689). A mail that the peer
        cannot take, or that would not be one command on the wire, ends in `Refused`, unsent. While
        the reply to another mail is due, such a mail is not begun, and the result is False: the
        driver gives the mail again after that reply.
        """
        ahead = self.may_go_ahead
        if not (ahead or self.reusable):
            raise LocalProtocolError("a mail is under way, or the session is not open")
        binary = binary and self.takes_binary
        if binary and ahead:
            return False
        utf8 = utf8 or not (envelope.isascii() and recipient.isascii())
        objection = objection_to(
            envelope, recipient, size, self.extensions, utf8=utf8, require_tls=require_tls
        )
        if objection is not None:
            if not ahead:
                self._refuse(objection, proved=True)
            return not ahead
        mail, rcpt = envelope_commands(
            envelope,
            recipient,
            size if "SIZE" in self.extensions else None,
            "BINARYMIME" if binary else "8BITMIME" if eight_bit else "",
            self.extensions,
            dsn,
            utf8=utf8,
            require_tls=require_tls,
        )
        if self._transaction_open and not ahead:
            self._later.append((_RESET, b"RSET\r\n"))
        self._transaction_open = False
        self._ahead = ahead
        self.may_go_ahead = False
        self._later.append((_MAILFROM, mail))
        self._later.append((_RCPTTO, rcpt))
        self._binary = binary
        if not binary:
            self._later.append((_DATA, b"DATA\r\n"))
        self._send_commands()
        return True

    def send_body(self, body: bytes | InBlocks, *, last: bool = False) -> None:
        """Send the mail itself and its end; answers `SendBody`.

        `last`: the session ends with this mail, and QUIT proves the reply.
        """
        if not self._body_due:
            raise LocalProtocolError("the peer has not asked for a body")
        if len(self._input) > self._at:
            return  # The peer has already replied: `next_event` finds that this is too early.
        self._body_due = self._fresh = False
        blocks, end = encode(body, binary=self._binary)
        if len(body) <= BLOCK_BYTES:
            self._output += blocks
        else:
            self._blocks = blocks
        self._due.append(_MESSAGE)
        self._last = last
        pipelining = "PIPELINING" in self.extensions and not self.careful
        self.may_go_ahead = pipelining and not (last or self._binary)
        if pipelining and last:
            end += b"QUIT\r\n"
            self._due.append(_QUIT)
        self._output.append(end)

    def quit(self) -> None:
        """Say QUIT; the session then ends in `CLOSED`."""
        if self._body_due or self._over or _QUIT in self._due:
            raise LocalProtocolError("QUIT cannot be sent now")
        self._later.clear()
        self._say(_QUIT)

    def data_to_send(self) -> bytes:
        """Take the next piece of output; empty if there is none.

        The end of a body is held back if the peer has already answered.
        """
        output = self._output
        self.may_go_ahead = False
        if not output or (self._at < len(self._input) and self.step is _MESSAGE):
            return b""
        if block := next(self._blocks, b""):
            return block
        size, count = len(output[0]), 1
        while count < len(output) and (size := size + len(output[count])) <= JOIN_BYTES:
            count += 1
        data = output[0] if count == 1 else b"".join(output[:count])
        del output[:count]
        return data

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
        """Feed bytes from the peer; empty when the peer has closed the connection."""
        if not data:
            self._eof = True
        elif self._at == len(self._input):
            self._input = data
            self._at = 0
        else:
            self._input = self._input[self._at :] + data
            self._at = 0

    def next_event(self) -> Event:
        """The next event since the last call."""
        if self._over is not None:
            return self._over
        try:
            if (event := self._report()) is not None:
                return event
            while (reply := self._next_reply()) is not None:
                self.replies += 1
                if (event := self._take(reply)) is not None:
                    return event
        except _Violation as violation:
            self._doubted = True
            description = violation.description
            if self._login is not None:
                description = hidden(description, self._login)
            return self.abort(violation.problem, description)
        if self._eof:
            return self.abort(Problem.LOST, "connection closed by the peer")
        return NEED_DATA

    def abort(self, problem: Problem, description: str) -> Event:
        """End the session, for a reason that the machine or its driver found.

        Returns the event for the mail under way: an earlier refusal is still the peer's answer,
        unless the replies leave in doubt what they answer.
        """
        if self._over is None:
            ending = self._unproved()
            if ending is None:
                # The peer may not support output behind the body.
                behind = self.step is _MESSAGE and len(self._due) > 1
                self.out_of_step = self.out_of_step or (behind and problem is Problem.TIMEOUT)
                closed = self.step is _QUIT
                self._finish(CLOSED if closed else Failed(self.step, problem, description))
            elif self._stands(ending, problem):
                self._finish(ending)
            else:
                self.out_of_step = True
                reply = ending.reply
                step = _MESSAGE if isinstance(ending, Accepted) else ending.step
                text = f"{reply.code} may answer another command: {reply.description}"
                self._finish(Failed(step, problem, f"{description}; {text}"))
        assert self._over is not None
        return self._over

    def _finish(self, event: Event) -> Event:
        self._over = event
        self._output.clear()
        self._blocks = iter(())
        self._later.clear()
        self._due.clear()
        self._body_due = self._asked = self.may_go_ahead = False
        return event

    def _next_reply(self) -> Reply | None:
        """Take a complete reply from the input."""
        data = self._input
        if self._at == 0 and not self._lines and (known := long_reply_of(data)) is not None:
            self._at = known[1]
            return known[0]
        while self._at < len(data):
            end = data.find(b"\n", self._at, self._at + MAX_REPLY_LINE)
            if end < 0:
                if len(data) - self._at >= MAX_REPLY_LINE:
                    raise _Violation(Problem.OVERFLOW, f"reply line above {MAX_REPLY_LINE} bytes")
                return None
            line = data[self._at : end].removesuffix(b"\r")
            self._at = end + 1
            if not self._lines and (reply := reply_of(line)) is not None:
                return reply
            match = REPLY_LINE.fullmatch(line)
            if match is None or (self._lines and match[1] != self._code):
                raise _Violation(Problem.INVALID, f"not a reply: {line[:100]!r}")
            text = (match[3] or b"").decode(errors="replace")
            if match[2] != b"-":
                lines, self._lines = self._lines, []
                return Reply(int(match[1]), "\n".join([*lines, text]))
            self._code = match[1]
            self._lines.append(text)
            if len(self._lines) >= MAX_REPLY_LINES:
                raise _Violation(Problem.OVERFLOW, f"reply of more than {MAX_REPLY_LINES} lines")
        return None

    def _take(self, reply: Reply) -> Event | None:
        """Handle the reply to the first step that is due."""
        if not self._due:
            return self._take_unasked(reply)
        step = self._due.popleft()
        kind = reply.code // 100
        if self.mechanism is not None and self._login is not None:
            if reply.code != 334:
                reply = Reply(reply.code, hidden(reply.text, self._login))
            if self._exchange is not None:
                return self._take_auth(step, reply)
        if step is _QUIT:
            return self._take_goodbye(reply)
        if reply.code == 421:
            return self._take_farewell(step, reply)
        if reply.code == 221 or (kind == 3 and (step is not _DATA or reply.code != 354)):
            raise self._invalid(step, reply)
        if step is _MESSAGE:
            self._transaction_open = False
            if self._output:
                return self._take_early(reply)
            if self._refusal is None:
                return self._take_verdict(reply)
        elif step is _DATA:
            if kind == 2:
                raise self._invalid(step, reply)
            if kind == 3:
                return self._take_go(reply)
        elif step is _MAILFROM:
            self._transaction_open = kind == 2
            self._sender = reply
        elif step is _RCPTTO:
            if kind == 2 and self._refusal is not None:
                raise self._invalid(step, reply)
            if kind == 2 and self._binary:
                self._asked = self._body_due = True
        elif step is _RESET:
            if kind != 2 or (not self._due and self._more_came()):
                raise self._invalid(step, reply)
        else:
            return self._take_hello(step, reply, kind)
        if kind != 2:
            self._take_refusal(step, reply)
        if self._due:
            return None
        if self._refusal is None:
            self._send_commands()
        return self._report()

    def _take_refusal(self, step: Step, reply: Reply) -> None:
        """The peer refused a command or the lone dot."""
        if step is _MESSAGE:
            return
        out_of_sequence = _is_out_of_sequence(reply)
        if self._refusal is None:
            if out_of_sequence:
                raise self._invalid(step, reply)
            self._later.clear()
            self._refuse(Refused(step, reply), proved=False)
            fits = self._held is None or step is not _MAILFROM or self._held.code < 300
        else:
            if reply.code < 500 <= self._refusal.reply.code:
                raise self._invalid(step, reply)
            fits = out_of_sequence
            # Two replies may be to the lines of a body that the peer has read as commands.
            self._proved = not self._binary
            self._doubted = self._doubted or not fits
        if self._held is not None and not fits:
            raise self._invalid(step, reply)

    def _take_verdict(self, reply: Reply) -> Event | None:
        """The peer answered the body."""
        if self._ahead:
            self._held = reply
            if reply.code in _ABOUT_COMMANDS:
                raise self._invalid(_MESSAGE, reply)
            return None
        if self._binary and _is_out_of_sequence(reply):
            raise self._invalid(_MESSAGE, reply)
        if not self._due:
            if reply.code // 100 == 4:
                return _verdict(reply)
            if self._more_came():
                raise self._invalid(_MESSAGE, reply)
            goodbye = self._last or self.careful or reply.code >= 500
            self._say(_QUIT if goodbye else _RESET)
        if reply.code < 300:
            self._held = reply
        else:
            self._refuse(Refused(_MESSAGE, reply), proved=False)
        return None

    def _take_go(self, reply: Reply) -> Event | None:
        """The peer said 354."""
        if self._refusal is None:
            if self._held is None:
                self._known_sender = self._sender
            self._asked = self._body_due = True
            return self._report()
        if self._refusal.step is not _RCPTTO or self._held is not None or self._lmtp:
            raise self._invalid(_DATA, reply)
        self._proved = True
        self._output.append(b".\r\n")
        self._due.append(_MESSAGE)
        return None

    def _take_goodbye(self, reply: Reply) -> Event:
        """The peer answered QUIT, which we also send to prove the reply before."""
        ending = self._unproved()
        if ending is None:
            return self._finish(CLOSED)
        if reply.code == 421 and _ends_body(ending):
            return self._take_farewell(_QUIT, reply)
        if reply.code != 221 or self._more_came():
            raise self._invalid(_QUIT, reply)
        return self._finish(ending)

    def _take_farewell(self, step: Step, reply: Reply) -> Event:
        """421: the peer ends the session, whatever was due."""
        if self._unproved() is None:
            return self._finish(Refused(step, reply))
        self._farewell = True
        self._due.appendleft(step)
        return self.abort(Problem.LOST, f"{reply.code} {reply.description}")

    def _take_hello(self, step: Step, reply: Reply, kind: int) -> Event | None:
        if kind == 2 and step is _INTRO:
            self.mta = next(iter(reply.text[:MAX_MTA_NAME].split()), None)
            self._say_hello(_EHLO)
            return None
        if kind == 5 and step is _EHLO and not self._lmtp:
            self._say_hello(_HELO)
            return None
        if kind != 2:
            return self._finish(Refused(step, reply))
        if step is _STARTTLS:
            if reply.code != 220 or len(self._input) > self._at:
                raise self._invalid(step, reply)
            self._due.append(_STARTTLS)  # the handshake is due
            return _START_TLS
        if step is _EHLO:
            self.extensions = offers(reply.text)
            if "LIMITS" in self.extensions:
                self.max_mails, self.max_domains = session_limits(self.extensions["LIMITS"])
        if self._tls and not self.secure:
            if "STARTTLS" in self.extensions:
                if len(self._input) > self._at:
                    raise self._invalid(_STARTTLS, reply)
                self._put(_STARTTLS, b"STARTTLS")
                return None
            if self._must_tls:
                return self._finish(Refused(_STARTTLS, smtp.NO_STARTTLS, ours=True))
        if self._login is None:
            return Ready(self.mta)
        mechanism = mechanism_of(self.extensions.get("AUTH", ""))
        if mechanism is None:
            return self._finish(Refused(step, smtp.NO_MECHANISM, ours=True))
        self.mechanism = mechanism.lower()
        self._exchange = MECHANISMS[mechanism](self._login)
        self._put(*next(self._exchange))
        return None

    def _say_hello(self, step: Step) -> None:
        verb = b"HELO" if step is _HELO else b"LHLO" if self._lmtp else b"EHLO"
        self._put(step, b"%b %b" % (verb, self._hostname))

    def _put(self, step: Step, line: bytes) -> None:
        self._output.append(line + b"\r\n")
        self._due.append(step)

    def _take_auth(self, step: Step, reply: Reply) -> Event | None:
        """The peer answered a line of AUTH."""
        assert self._exchange is not None, "a login is under way"
        if reply.code >= 400:
            return self._finish(Refused(step, reply))
        try:
            move = next_move(self._exchange, reply)
        except ValueError:
            raise self._invalid(step, reply) from None
        if move is not None:
            self._put(*move)
            return None
        self._exchange = None
        return Ready(self.mta)

    def _take_unasked(self, reply: Reply) -> Event:
        if self._body_due:
            return self._take_early(reply)
        self.out_of_step = reply.code != 421
        problem = Problem.INVALID if self.out_of_step else Problem.LOST
        raise _Violation(problem, f"spoke unasked: {reply.code} {reply.description}")

    def _take_early(self, reply: Reply) -> Event:
        """The peer answered the body before its end was sent."""
        if reply.code >= 400 and self._refusal is None and reply.code not in _ABOUT_COMMANDS:
            return self._finish(Refused(_DATA, reply))
        self._due.appendleft(_DATA)
        raise self._too_early()

    def _refuse(self, refusal: Refused, *, proved: bool) -> None:
        self._refusal = refusal
        self._proved = proved
        self._doubted = False

    def _unproved(self) -> Accepted | Refused | None:
        """The meaning of the reply that waits for proof."""
        return self._refusal if self._held is None else _verdict(self._held)

    def _stands(self, ending: Accepted | Refused, problem: Problem) -> bool:
        """Whether the reply that waits for proof counts if the session ends now."""
        reply = ending.reply
        if self._held is None and reply.code < 500:
            return True
        if problem not in (Problem.LOST, Problem.TIMEOUT):
            return False
        if self.step in (_RESET, _QUIT):
            # The end came in place of the reply to the proof, and `reply` cannot be that reply.
            closed = problem is Problem.LOST and not self._farewell
            if closed or (self.careful and _ends_body(ending)):
                return True
        if self._held is not None:
            return self._ahead and self._is_no_answer_to_mail(reply)
        # A peer that refuses and closes may do so on a new connection: no reply to an earlier mail
        # can be left over there.
        clear = problem is Problem.LOST and self._fresh and reply.code not in _ABOUT_COMMANDS
        shown = self._proved or clear
        return shown and not self._doubted

    def _is_no_answer_to_mail(self, reply: Reply) -> bool:
        """Whether the status of an acceptance differs from that of MAIL in this session."""
        known = self._known_sender.status if self._known_sender is not None else None
        return reply.code < 300 and None not in (known, reply.status) and known != reply.status

    def _report(self) -> Event | None:
        """The events that the replies have decided: for a mail, then for the next one."""
        if self._due:
            return None
        if self._held is not None:
            if self._held.code >= 500 and self._refusal is not None:
                self._say(_QUIT)
                return None
            reply, self._held, self._ahead = self._held, None, False
            return _verdict(reply)
        if self._asked:
            self._asked = False
            if len(self._input) > self._at:
                raise self._too_early()
            return _SEND_BODY
        refusal = self._refusal
        if refusal is None:
            return None
        if refusal.reply.code >= 500 and not self._proved:
            self._say(_QUIT)
            return None
        self._refusal = None
        return refusal

    def _say(self, step: Step) -> None:
        """Send RSET or QUIT; its reply proves the reply before."""
        self._put(step, b"QUIT" if step is _QUIT else b"RSET")

    def _more_came(self) -> bool:
        """Whether the peer sent more than was due, other than 421, which is allowed at any time."""
        return not b"421".startswith(self._input[self._at :][:3])

    def _invalid(self, step: Step, reply: Reply) -> _Violation:
        self._due.appendleft(step)
        self.out_of_step = True
        text = f"{reply.code} cannot answer {step}: {reply.description}"
        return _Violation(Problem.INVALID, text)

    def _too_early(self) -> _Violation:
        self.out_of_step = True
        return _Violation(Problem.INVALID, "answered before the end of the message")


def _verdict(reply: Reply) -> Accepted | Refused:
    return Accepted(reply) if reply.code // 100 == 2 else Refused(_MESSAGE, reply)


def _is_out_of_sequence(reply: Reply) -> bool:
    return reply.code == 503 or reply.status == "5.5.1"


def _ends_body(ending: Accepted | Refused) -> bool:
    return isinstance(ending, Accepted) or ending.step is _MESSAGE
