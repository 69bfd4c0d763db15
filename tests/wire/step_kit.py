"""A peer that is honest about mail and does one thing wrong with its replies, and its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from mailerq.wire.client import (
    NEED_DATA,
    Accepted,
    ClientProtocol,
    Failed,
    Problem,
    Ready,
    Refused,
    SendBody,
)
from mailerq.wire.login import Login

Fate = tuple[str, int]
"""The step at which a mail gets its last reply, and the code of that."""

TAKEN: Fate = ("dot", 250)
FATES: tuple[Fate, ...] = (TAKEN, *product(("mail", "rcpt", "data", "dot"), (451, 550)))

STATUS = {"mail": "2.1.0 ", "rcpt": "2.1.5 ", "dot": "2.0.0 "}

UNASKED = (250, 354, 421, 451, 500, 503, 550)
UNASKED_OF_AUTH = (235, 334)

# What a server says to a command whose predecessor it refused: to RCPT, and to DATA. A text of
# its own proves nothing, and 354 asks for a lone dot (RFC 2920, section 3.1).
MANNERS = {
    "503": ("503 bad sequence", "503 bad sequence"),
    "554 5.5.1": ("503 5.5.1 MAIL first", "554 5.5.1 no valid recipients"),
    "own": ("550 not you", "554 no valid recipients"),
    "354": ("503 bad sequence", "354 go"),
}


@dataclass
class Fault:
    """What the peer does wrong with the reply of a number; 0 is the greeting.

    ``late`` holds the reply back until `value` more have left, ``lates`` does so with the reply to
    each dot, ``twice`` sends the reply twice and ``omit`` never. ``insert`` says `value` before it,
    ``early`` says `value` as soon as the reply before has left, which may be within a body.
    ``mute`` answers no dot. ``cut`` closes the connection instead of replying, and has all dots
    answered late by `value` before.

    What no client can tell is no part of `faults`. ``lie`` says `value`, or nothing where that is
    0, in the place of the reply; ``lie and close`` closes the connection then, ``lie and bye``
    says 421 before, and ``lie and hush`` never says a word again.
    """

    kind: str = "none"
    number: int = -1
    value: int = 0


@dataclass
class Server:
    """Takes or refuses mail ``<n>`` as `fates` say; `truth` has what became of it."""

    fates: Sequence[Fate]
    fault: Fault
    pipelining: bool = True
    chunking: bool = False
    auth: str = ""
    """The mechanism that is offered; mail then needs the login."""
    believes: bool = True
    """The login is right."""
    lmtp: bool = False
    manner: str = "503"
    truth: dict[int, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    closed: bool = False
    hushed: bool = False
    _input: bytes = b""
    _chunk: int = 0
    _prompts: int = 0
    _known: bool = False
    _mail: int = -1
    _state: str = ""
    _late: list[tuple[int, bytes]] = field(default_factory=list)

    def feed(self, data: bytes) -> None:
        self._input += data
        while (at := self._input.find(b"\r\n")) >= 0:
            if self._chunk:
                if len(self._input) < self._chunk:
                    return
                self._input = self._input[self._chunk :]
                self._chunk = 0
                self._end_of_chunk()
                continue
            line, self._input = self._input[:at], self._input[at + 2 :]
            if self._state == "auth":
                self._state = ""
                self._prompt()
            elif self._state in ("body", "lone"):
                if line == b".":
                    self._end_of_data()
            else:
                self._command(line)

    def _end_of_data(self) -> None:
        lone, self._state = self._state == "lone", ""
        if lone:
            self._say("lone", "554 nobody")
        else:
            step, code = self.fates[self._mail]
            code = code if step == "dot" else 250
            self._settle(code)
            self._say("dot", f"{code} {self._status('dot', code)}done")

    def _end_of_chunk(self) -> None:
        taken, self._state = self._state == "RCPT", ""
        if taken:
            code = self._fate_of_body()
            self._settle(code)
            self._say("dot", f"{code} {self._status('dot', code)}done")
        else:
            self._say("dot", MANNERS[self.manner][1] if self.manner != "354" else "503 no mail")

    def _prompt(self) -> None:
        """Ask for the next response of AUTH, or judge the login."""
        if self._prompts:
            self._prompts -= 1
            self._state = "auth"
            self._say("auth", "334 PDFAbXgudGVzdD4=")
        else:
            self._known = self.believes
            self._say("auth", "235 known" if self.believes else "535 unknown")

    def _fate_of_body(self) -> int:
        """The code of the only reply of a mail without DATA."""
        step, code = self.fates[self._mail]
        return code if step in ("dot", "data") else 250

    def _command(self, line: bytes) -> None:
        verb, _, rest = line.partition(b" ")
        fate, code = self.fates[self._mail] if self._mail >= 0 else TAKEN
        rcpt, data = MANNERS[self.manner]
        if self.lmtp and data.startswith("354"):
            data = MANNERS["503"][1]  # LMTP never asks for a mail without a recipient
        if verb == (b"LHLO" if self.lmtp else b"EHLO"):
            offers = ["PIPELINING"] * self.pipelining + ["CHUNKING", "BINARYMIME"] * self.chunking
            offers += [f"AUTH {self.auth}"] if self.auth else []
            lines = ["mx.test", *offers]
            self._say(
                "ehlo", "\r\n".join([f"250-{line}" for line in lines[:-1]] + [f"250 {lines[-1]}"])
            )
        elif verb == b"QUIT":
            self._say("quit", "221 bye")
            self.closed = not self.hushed
        elif verb == b"RSET":
            self._state = ""
            self._say("rset", "250 ok")
        elif verb == b"MAIL":
            self._mail = int(rest.split(b"<")[1].split(b"@")[0])
            self._accept("mail", "MAIL")
        elif verb == b"RCPT":
            if self._state == "MAIL":
                self._accept("rcpt", "RCPT")
            else:
                self._say("rcpt", rcpt)
        elif verb == b"AUTH":
            self._prompts = {"PLAIN": 0, "CRAM-MD5": 1, "LOGIN": 2}[rest.split()[0].decode()]
            self._prompt()
        elif verb == b"BDAT":
            assert rest.endswith(b" LAST")
            self._chunk = int(rest.split()[0])
        elif verb != b"DATA":
            self._say("unknown", "500 what?")
        elif self._state == "RCPT":
            if fate == "data":
                self._settle(code)
                self._say("data", f"{code} no")
            else:
                self._state = "body"
                self._say("data", "354 go")
        elif data.startswith("354") and self._state == "MAIL":
            self._state = "lone"
            self._say("data", data)
        else:
            self._say("data", MANNERS["503"][1] if data.startswith("354") else data)

    def _accept(self, step: str, state: str) -> None:
        fate, code = self.fates[self._mail]
        if self.auth and not self._known:
            fate, code = step, 530
        if fate == step:
            self._settle(code)
            self._say(step, f"{code} no")
        else:
            self._state = state
            self._say(step, f"250 {self._status(step, 250)}ok")

    def _status(self, step: str, code: int) -> str:
        return STATUS[step] if self.manner == "554 5.5.1" and code == 250 else ""

    def _settle(self, code: int) -> None:
        assert self._mail not in self.truth, "one mail was sent twice over one session"
        self.truth[self._mail] = code

    def greet(self) -> None:
        self._say("greeting", "220 mx.test")

    def _say(self, step: str, text: str) -> None:
        """Let a reply leave, as far as the fault has it."""
        fault, number = self.fault, len(self.steps)
        self.steps.append(step)
        reply = f"{text}\r\n".encode()
        unasked = b"%d unasked\r\n" % fault.value
        mine = number == fault.number
        late = fault.kind in ("lates", "cut")
        if mine and fault.kind.startswith("lie"):
            if fault.value:
                self._leave(unasked)
            if fault.kind == "lie and bye":
                self._leave(b"421 bye\r\n")
            self.closed = fault.kind in ("lie and close", "lie and bye")
            self.hushed = fault.kind == "lie and hush"
            return
        if mine and (fault.kind == "insert" or (fault.kind == "early" and number == 0)):
            self._leave(unasked)
        if (step == "dot" and fault.kind == "mute") or (mine and fault.kind == "omit"):
            return
        if mine and fault.kind == "cut":
            self.closed = True
        if (fault.kind == "late" and mine) or (fault.value and late and step == "dot"):
            self._late.append((fault.value, reply))
            return
        self._leave(reply)
        if mine and fault.kind == "twice":
            self._leave(reply)
        if fault.kind == "early" and number == fault.number - 1:
            self._leave(unasked)

    def _leave(self, reply: bytes) -> None:
        if self.closed or self.hushed:
            return
        self.replies.append(reply)
        self._late = [(count - 1, late) for count, late in self._late]
        while self._late and self._late[0][0] <= 0:
            self.replies.append(self._late.pop(0)[1])

    def say_late(self) -> bool:
        """Nothing else moves any more: what was held back leaves."""
        late, self._late = self._late, []
        self.replies += [reply for _, reply in late]
        return bool(late)


def faults(replies: int, unasked: Sequence[int] = UNASKED) -> Iterator[Fault]:
    """Every fault at each of so many replies, and right behind them."""
    yield Fault("mute")
    for number in range(replies + 1):
        yield Fault("twice", number)
        yield Fault("omit", number)
        for value in range(4):
            yield Fault("cut", number, value)
        for value in unasked:
            yield Fault("insert", number, value)
            yield Fault("early", number, value)
    for value in range(1, 6):
        yield Fault("lates", value=value)
        for number in range(replies):
            yield Fault("late", number, value)


Cut = Callable[[list[bytes]], Iterator[bytes]]
"""How the replies of a batch, which leave together, arrive: the client acts on each piece."""


def bytewise(replies: list[bytes]) -> Iterator[bytes]:
    for byte in b"".join(replies):
        yield bytes((byte,))


def behind(mask: int) -> Cut:
    """A cut behind each reply whose bit is set."""

    def cut(replies: list[bytes]) -> Iterator[bytes]:
        piece = b""
        for number, reply in enumerate(replies):
            piece += reply
            if mask >> number & 1:
                yield piece
                piece = b""
        yield piece

    return cut


whole = behind(0)
one_by_one = behind(-1)


@dataclass
class Client:
    """Sends mail 0, 1, 2 … as a connection does, and keeps what became of each."""

    server: Server
    ahead: bool
    last: bool = False
    chunks: Callable[[int], bool] = lambda number: False
    """Which mails go out by BDAT."""
    results: dict[int, object] = field(default_factory=dict)
    heard: bytes = b""
    longest: int = 0
    """Replies of the longest batch that left together."""
    protocol: ClientProtocol = field(default_factory=lambda: ClientProtocol("me.test"))
    _mail: int = -1
    _next: int = 0
    _went_ahead: bool = False

    def run(self, cut: Cut) -> None:
        server = self.server
        server.greet()
        while True:
            replies, server.replies = server.replies, []
            self.longest = max(self.longest, len(replies))
            for piece in filter(None, cut(replies)):
                self.heard += piece
                self.protocol.receive_data(piece)
                self.act()
            if not server.replies and not server.say_late():
                break
        if server.closed:
            self.protocol.receive_data(b"")
        else:
            self.protocol.abort(Problem.TIMEOUT, "no reply in time")
        self.act()
        assert self._mail < 0, "the mail under way is neither reported nor given back"

    def act(self) -> None:
        while (event := self.protocol.next_event()) is not NEED_DATA:
            if isinstance(event, SendBody):
                more = self._next < len(self.server.fates)
                self.protocol.send_body(b"%d\r\n" % self._mail, last=self.last and not more)
                if self.ahead and more and self.protocol.may_go_ahead:
                    self._went_ahead = self._begin(self._next)
            elif isinstance(event, Ready):
                self._take_next()
            elif isinstance(event, Accepted | Refused | Failed):
                if self._mail >= 0:
                    assert self._mail not in self.results
                    self.results[self._mail] = event
                    self._mail = -1
                if self.protocol.ended:
                    return
                self._take_next()
            else:
                return
        self._send()

    def _take_next(self) -> None:
        if self._next < len(self.server.fates):
            self._mail, self._next = self._next, self._next + 1
            # What a driver does: an input that makes no sense ends the session before a mail.
            if not self._went_ahead and self.protocol.reusable:
                self._begin(self._mail)
            self._went_ahead = False

    def _begin(self, number: int) -> bool:
        return self.protocol.mail(f"{number}@a.test", "c@d.test", binary=self.chunks(number))

    def _send(self) -> None:
        while data := self.protocol.data_to_send():
            self.server.feed(data)


LINES = ("lock-step", "lock-step, last", "pipelined", "pipelined, last", "ahead", "ahead, last")
CHUNKS = (
    "slow chunks", "slow chunks, last", "chunks", "chunks, last", "first chunk", "second chunk",
)  # fmt: skip
LOGINS = ("PLAIN", "CRAM-MD5", "LOGIN")
MODES = LINES + CHUNKS + LOGINS + ("lmtp",)
"""How a client sends: with "last" it says with the last mail that the session ends.

With chunks all mail goes out by BDAT, or every other mail, while the others may go ahead. With the
name of a mechanism the client logs in before the first mail; "lmtp" pipelines.
"""

BY_BDAT: dict[str, Callable[[int], bool]] = {
    "slow chunks": lambda number: True,
    "chunks": lambda number: True,
    "first chunk": lambda number: number % 2 == 0,
    "second chunk": lambda number: number % 2 == 1,
}


def play(
    fates: Sequence[Fate],
    fault: Fault,
    mode: str,
    manner: str = "503",
    cut: Cut = whole,
    *,
    careful: bool = False,
    believes: bool = True,
) -> tuple[Client, Server]:
    way, _, last = mode.partition(", ")
    server = Server(
        fates,
        fault,
        pipelining=way not in ("lock-step", "slow chunks"),
        chunking=way in BY_BDAT,
        auth=way if way in LOGINS else "",
        believes=believes,
        lmtp=way == "lmtp",
        manner=manner,
    )
    login = Login("ann", "secret") if way in LOGINS else None
    protocol = ClientProtocol("me.test", careful=careful, login=login, lmtp=way == "lmtp")
    client = Client(
        server,
        way in ("ahead", "first chunk", "second chunk"),
        last == "last",
        BY_BDAT.get(way, lambda number: False),
        protocol=protocol,
    )
    client.run(cut)
    return client, server
