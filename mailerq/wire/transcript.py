"""An SMTP dialogue as lines for people, without secrets: bytes in, lines out.

Theory of operation
-------------------
`Transcript` reads both directions of a session in the order in which they pass. It has a queue of
the commands whose replies are due. A command that decides how to read the next bytes of the client
(AUTH, DATA) stops the reading until its reply is there, so pipelined input is read correctly
whatever the reply is. 354 begins a body, 334 makes the next line of the client a secret.

Nothing depends on the queue being right: a plugin or a peer may send replies that nobody asked for.
334 and 354 count at any time, and a line of the client is shown only if its first word is a command
of SMTP. All else could be a secret or a part of a body, and only its length is shown.

A peer may repeat a secret in a reply. So what may be a secret is kept, and replaced in replies.

The constants below bound everything that a peer can make grow.
"""

from __future__ import annotations

import binascii
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from mailerq.escaping import escape
from mailerq.wire import sasl
from mailerq.wire.refusals import shown_command

__all__ = ["Pending", "Line", "Transcript"]

SHOWN_BYTES: Final = 1000
"""Bytes of a line to show; RFC 5321 allows 512 for a command, 1000 for a line of a mail."""

HELD_BYTES: Final = 1 << 16
"""Bytes without a line end, or sent before the reply that says what they are."""

BODY_BYTES: Final = 1 << 14
"""Bytes of a body to show."""

MAX_DUE: Final = 1000
"""Commands without a reply."""

MAX_SECRETS: Final = 16
"""Secrets of a session to look for in replies."""

MIN_SECRET: Final = 4
"""Bytes of a secret to look for: a shorter one is in every other line."""

MASK: Final = "***"

END: Final = b"\r\n.\r\n"

VERBS: Final = frozenset({
    b"BDAT", b"DATA", b"EHLO", b"ETRN", b"EXPN", b"HELO", b"HELP", b"LHLO", b"MAIL", b"NOOP",
    b"QUIT", b"RCPT", b"RSET", b"STARTTLS", b"TURN", b"VRFY", b"XCLIENT", b"XFORWARD",
})  # fmt: skip

_PATH: Final = re.compile(rb"(?:FROM|TO): ?<([^>]*+)>", re.IGNORECASE)
_LOGIN: Final = re.compile(rb"(\bLOGIN=)[^ ]*+", re.IGNORECASE)
_CHUNK: Final = re.compile(rb"BDAT +([0-9]{1,20})(?: +(LAST))?[ \t]*+", re.IGNORECASE)
"""As `mailerq.wire.server` reads it: the bytes of a chunk are no commands."""


class Pending(Enum):
    """What a reply that is due answers."""

    COMMAND = auto()
    AUTH = auto()
    RCPT = auto()
    DATA = auto()

    @classmethod
    def of(cls, step: str) -> Pending:
        """What the reply to a step of `mailerq.wire.client` answers."""
        if step.startswith("auth"):
            return cls.AUTH
        return {"rcptto": cls.RCPT, "data": cls.DATA}.get(step, cls.COMMAND)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a session, escaped.

    `mail` numbers the mails of the session; lines before the first have 0, and the reply to a
    command has the number of the command. `is_body`: a line of the body of a mail.
    """

    from_client: bool
    text: str
    mail: int
    is_body: bool = False
    sender: str | None = None
    """The address of a MAIL command."""
    recipient: str | None = None
    """The address of a RCPT command."""


class Transcript:
    r"""The lines of one session.

    `due` are the replies that are due already, at first the greeting. `bodies` may be set at any
    time: bodies are shown, up to `BODY_BYTES` of each.

    >>> transcript = Transcript()
    >>> server, client = transcript.from_server, transcript.from_client
    >>> lines = [*server(b"220 mx.test\r\n"), *client(b"AUTH PLAIN AGEAc2VjcmV0\r\n")]
    >>> [line.text for line in lines]
    ['220 mx.test', 'AUTH PLAIN ***']
    """

    def __init__(
        self, due: Iterable[Pending] = (Pending.COMMAND,), *, bodies: bool = False
    ) -> None:
        self.bodies = bodies
        self._mail = 0
        self._due: deque[tuple[Pending, int]] = deque((each, 0) for each in due)
        self._client = b""
        self._server = b""
        self._secret = False  # the next line of the client answers 334
        self._responses = 0  # of the current AUTH
        self._names_first = False  # the first response of the current AUTH is a name
        self._secrets: deque[bytes] = deque(maxlen=MAX_SECRETS)
        self._lmtp = False
        self._recipients = 0  # accepted ones of the current mail
        self._in_body = False
        self._tail = b""  # the last bytes of the body, which may begin its end
        self._chunk = 0  # bytes of the current chunk that are missing
        self._size = 0  # of the body or chunk
        self._text = b""  # of the body: the begin of a line
        self._room = 0  # bytes of the body that may be shown

    def secured(self) -> None:
        """TLS has started; what came before in clear is void (RFC 3207, section 4.2)."""
        self._client = self._server = b""
        self._due.clear()
        self._secret = self._in_body = False
        self._chunk = 0

    # The client

    def from_client(self, data: bytes) -> list[Line]:
        """The lines that are complete with these bytes."""
        self._client += data
        return list(self._read_client())

    def _read_client(self) -> Iterator[Line]:
        while self._client:
            if self._chunk or self._in_body:
                yield from self._take_chunk() if self._chunk else self._take_body()
                continue
            end = self._client.find(b"\n") + 1
            if self._must_wait or not end:
                if len(self._client) > HELD_BYTES:
                    yield self._line(f"({len(self._client)} bytes)")
                    self._client = b""
                return
            line, self._client = self._client[:end], self._client[end:]
            yield self._take_response(line) if self._secret else self._take_command(line)

    @property
    def _must_wait(self) -> bool:
        """Whether a reply decides what the client's next bytes are."""
        return bool(self._due) and self._due[-1][0] in (Pending.AUTH, Pending.DATA)

    def _line(self, text: str, *, is_body: bool = False) -> Line:
        return Line(True, text, self._mail, is_body)

    def _expect(self, due: Pending, count: int = 1) -> None:
        for _ in range(min(count, MAX_DUE - len(self._due))):
            self._due.append((due, self._mail))

    def _take_command(self, line: bytes) -> Line:
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        verb = text.partition(b" ")[0].upper()
        if verb == b"AUTH":
            name = (text.split()[1:2] or [b""])[0].decode(errors="replace").upper()
            self._responses = 0
            self._names_first = name == "LOGIN"
            more = text.split()[-1].decode(errors="replace").upper() not in ("AUTH", name)
            if more or (name and name not in sasl.MECHANISMS):
                self._keep_secret(text)
            self._expect(Pending.AUTH)
            return self._line(shown_command(line, ()) + (f" {MASK}" if more else ""))
        if verb not in VERBS or b"\r" in text:
            self._keep_secret(text)
            self._expect(Pending.COMMAND)
            return self._line(shown_command(line, ()))
        if verb == b"XCLIENT":
            text = _LOGIN.sub(rb"\1" + MASK.encode(), text)
        sender = recipient = None
        if verb == b"MAIL":
            self._mail += 1
            self._recipients = 0
            sender = _path(text)
        elif verb == b"RCPT":
            recipient = _path(text)
        elif verb == b"LHLO":
            self._lmtp = True
        count = 1
        if match := _CHUNK.fullmatch(text):
            self._chunk, self._size = int(match[1]), 0
            self._begin_text()
            count = self._recipients if self._lmtp and match[2] else 1
        self._expect(_PENDING.get(verb, Pending.COMMAND), count)
        return Line(True, _shown(text), self._mail, False, sender, recipient)

    def _take_response(self, line: bytes) -> Line:
        """A line that answers 334."""
        self._secret = False
        self._expect(Pending.AUTH)
        if line.strip() == b"*":
            return self._line("*")
        self._keep_secret(line)
        return self._line(MASK)

    def _keep_secret(self, line: bytes) -> None:
        """Look in replies for the last word, as it was sent and decoded; a name is no secret."""
        token = (line.split() or [b""])[-1]
        self._responses += 1
        secrets = [token]
        if not (self._names_first and self._responses == 1):
            try:
                secrets.append(binascii.a2b_base64(token).rpartition(b"\0")[2])
            except ValueError:
                pass
        self._secrets += [secret for secret in secrets if len(secret) >= MIN_SECRET]

    # Bodies

    def _begin_text(self) -> None:
        self._text = b""
        self._room = BODY_BYTES

    def _take_body(self) -> Iterator[Line]:
        """Read up to CR LF "." CR LF."""
        new, window = self._client, self._tail + self._client
        end = window.find(END)
        if end < 0:
            self._client, self._tail = b"", window[-len(END) + 1 :]
            self._size += len(new)
            yield from self._show(new)
            return
        used = end + len(END) - len(self._tail)
        self._client = new[used:]
        self._in_body = False
        self._size += used - 3
        # The last line is the dot, of which a part may be in `_text`.
        yield from self._show(new[:used], ended=True)
        yield self._line(f"({self._size} bytes)")
        yield self._line(".")
        self._expect(Pending.COMMAND, self._recipients if self._lmtp else 1)

    def _take_chunk(self) -> Iterator[Line]:
        new, self._client = self._client[: self._chunk], self._client[self._chunk :]
        self._chunk -= len(new)
        self._size += len(new)
        yield from self._show(new)
        if not self._chunk:
            if self._text:
                yield self._line(_shown(self._text), is_body=True)
            yield self._line(f"({self._size} bytes)")

    def _show(self, data: bytes, *, ended: bool = False) -> Iterator[Line]:
        """The complete lines of a body that are shown."""
        if not self.bodies or not self._room:
            return
        taken = data[: self._room]
        self._room -= len(taken)
        *lines, self._text = (self._text + taken).split(b"\n")
        if ended and self._room:
            del lines[-1:]  # the dot
        for line in lines:
            yield self._line(_shown(line), is_body=True)
        if not self._room:
            self._text = b""
            yield self._line("(no more of the body is shown)", is_body=True)

    # The server

    def from_server(self, data: bytes) -> list[Line]:
        """The lines that are complete with these bytes, also of the client's input that waited."""
        return list(self._read_server(data))

    def _read_server(self, data: bytes) -> Iterator[Line]:
        *lines, self._server = (self._server + data).split(b"\n")
        if len(self._server) > HELD_BYTES:
            lines.append(self._server)
            self._server = b""
        for line in lines:
            yield self._take_reply(line.removesuffix(b"\r"))
            yield from self._read_client()

    def _take_reply(self, line: bytes) -> Line:
        code = line[:3]
        mail = self._due[0][1] if self._due else self._mail
        if code.isdigit() and line[3:4] != b"-":
            mail = self._take_code(code, mail)
        if code == b"334":
            return Line(False, f"334 {MASK}", mail)
        for secret in self._secrets:
            line = line.replace(secret, MASK.encode())
        return Line(False, _shown(line), mail)

    def _take_code(self, code: bytes, mail: int) -> int:
        """Take the last line of a reply; returns the mail that the reply is about."""
        if code in (b"334", b"354"):
            # They answer AUTH and DATA, behind which nothing is due.
            if self._due:
                mail = self._due[-1][1]
            self._due.clear()
            self._secret = code == b"334"
            if code == b"354":
                self._in_body = True
                self._tail, self._size = END[:2], 0
                self._begin_text()
        elif self._due:
            if self._due[0][0] is Pending.AUTH and code[:1] not in b"45" and code != b"235":
                return mail  # not asked for: the exchange goes on
            due, mail = self._due.popleft()
            if due is Pending.RCPT and code[:1] == b"2":
                self._recipients += 1
        else:
            self._secret = False
            if self._in_body:  # the server ends the mail, or the session
                self._in_body = False
                self._client = b""
        return mail


_PENDING: Final = {b"DATA": Pending.DATA, b"RCPT": Pending.RCPT}


def _path(command: bytes) -> str | None:
    """The address of MAIL or RCPT."""
    match = _PATH.search(command, 4, SHOWN_BYTES)
    return match[1].decode(errors="replace") if match else None


def _shown(line: bytes) -> str:
    r"""A line for people, escaped; bytes that are no UTF-8 become ``\xff``."""
    more = len(line) - SHOWN_BYTES
    line = line[:SHOWN_BYTES].removesuffix(b"\r")
    try:
        text = escape(line.decode())
    except UnicodeDecodeError:
        text = escape(line.decode("latin-1")).encode("ascii", "backslashreplace").decode()
    return f"{text} ({more} more bytes)" if more > 0 else text
