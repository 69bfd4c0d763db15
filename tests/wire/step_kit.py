"""A peer that is honest about mail and does one thing wrong with its replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

Fate = tuple[str, int]
"""The step at which a mail gets its last reply, and the code of that."""

TAKEN: Fate = ("dot", 250)
FATES: tuple[Fate, ...] = (TAKEN, *product(("mail", "rcpt", "data", "dot"), (451, 550)))

STATUS = {"mail": "2.1.0 ", "rcpt": "2.1.5 ", "dot": "2.0.0 "}

UNASKED = (250, 354, 421, 451, 500, 503, 550)

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
    """

    kind: str = "none"
    number: int = -1
    value: int = 0

    def lies(self, steps: Sequence[str], code: int) -> bool:
        """Whether `code` is said in the place of the reply to a dot: nobody can tell."""
        place = steps[self.number : self.number + 1]
        return self.kind in ("insert", "early") and self.value == code and place == ["dot"]


@dataclass
class Server:
    """Takes or refuses mail ``<n>`` as `fates` say; `truth` has what became of it."""

    fates: Sequence[Fate]
    fault: Fault
    pipelining: bool = True
    manner: str = "503"
    truth: dict[int, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    closed: bool = False
    _input: bytes = b""
    _mail: int = -1
    _state: str = ""
    _late: list[tuple[int, bytes]] = field(default_factory=list)

    def feed(self, data: bytes) -> None:
        self._input += data
        while (at := self._input.find(b"\r\n")) >= 0:
            line, self._input = self._input[:at], self._input[at + 2 :]
            if self._state in ("body", "lone"):
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

    def _command(self, line: bytes) -> None:
        verb, _, rest = line.partition(b" ")
        fate, code = self.fates[self._mail] if self._mail >= 0 else TAKEN
        rcpt, data = MANNERS[self.manner]
        if verb == b"EHLO":
            self._say("ehlo", "250-mx.test\r\n250 PIPELINING" if self.pipelining else "250 mx.test")
        elif verb == b"QUIT":
            self._say("quit", "221 bye")
            self.closed = True
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
        if self.closed:
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


def faults(replies: int) -> Iterator[Fault]:
    """Every fault at each of so many replies, and right behind them."""
    yield Fault("mute")
    for number in range(replies + 1):
        yield Fault("twice", number)
        yield Fault("omit", number)
        for value in range(4):
            yield Fault("cut", number, value)
        for value in UNASKED:
            yield Fault("insert", number, value)
            yield Fault("early", number, value)
    for value in range(1, 6):
        yield Fault("lates", value=value)
        for number in range(replies):
            yield Fault("late", number, value)
