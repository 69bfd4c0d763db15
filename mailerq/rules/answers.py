"""What a reply of a peer means: the patterns of `responses-file`.

Theory of operation
-------------------
A pattern names replies by provider, code, command and text, and puts them into a class
(`mailerq.rules.reactions`). Patterns are asked in the order of their priority, and in the order of
the file where that is equal. The first one that matches decides, unless it is not ``final``: then
later ones may add what it did not say.

All texts are one automaton of RE2, so a reply costs some microseconds, whatever the number of
patterns and however hostile the reply: the time grows with the length, and replies are cut at
`REPLY_LIMIT`.

`mailerq.rules.answers_file` reads the file. docs/answers.md explains the file to operators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import msgspec
import re2

from mailerq.errors import ConfigError, Problem
from mailerq.rules.reactions import NO_REACTION, Reaction
from mailerq.rules.tables import file_bytes

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.rules.responses import Outcome

__all__ = ["COMMANDS", "KEY", "Answers", "Rule", "Trigger", "Verdict", "options", "stated_seconds"]

KEY: Final = "responses-file"

REPLY_LIMIT: Final = 1024
"""Bytes of a reply that patterns see."""

MEMORY: Final = 32 << 20
"""Bytes that the automaton of all texts may take before it begins anew."""

COMMANDS: Final = {
    "init": "banner",
    "ehlo": "ehlo",
    "helo": "ehlo",
    "reset": "reset",
    "mail from": "mail",
    "rcpt to": "rcpt",
    "data": "data",
    "received": "dot",
}
"""The words of the file for the states in which a peer replies."""

MIN_STATED: Final = 60.0
"""Less than this is not kept to, in seconds: a peer that always says so would get each message
again and again, and each message a result a second."""

MAX_STATED: Final = 24 * 3600.0
"""Longer times that replies state are not believed, in seconds."""

_STATED: Final = re.compile(
    r"\b(?:in|after|for|wait|within|least) (?:about |another )?"
    r"(?:(\d{1,2}):(\d\d):(\d\d)|(\d{1,6}) ?(s|m|h)(?:ec|in|our|r|\b))",
    re.IGNORECASE,
)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600}


class Trigger(NamedTuple):
    """So many `replies` within `seconds`; one is at once."""

    replies: int = 1
    seconds: float = 0.0


AT_ONCE: Final = Trigger()


class Rule(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """A ``[[response]]`` of the file. Empty sets match everything."""

    name: str
    where: str
    kind: str
    """The class, empty if another pattern says it."""
    provider: str = ""
    codes: frozenset[str] = frozenset()
    """Codes, or classes of them such as ``4``."""
    commands: frozenset[str] = frozenset()
    texts: tuple[str, ...] = ()
    priority: int = 100
    final: bool = True
    trigger: Trigger = AT_ONCE
    whole_provider: bool = True
    """Mail to all sites of the provider is affected, not only to one site."""
    reaction: Reaction = NO_REACTION
    samples: tuple[str, ...] = ()

    def fits(self, code: int, command: str, provider: str) -> bool:
        """Whether everything but the text matches."""
        digits = str(code)
        return (
            (not self.codes or digits in self.codes or digits[0] in self.codes)
            and (not self.commands or command in self.commands)
            and (not self.provider or self.provider == provider)
        )


class Verdict(NamedTuple):
    """What a reply means: its class, and the rules that say so, the first one first.

    `reaction` is that of the first rule, with what later ones add. What moves a flow is left to
    each rule, because each has a trigger.
    """

    kind: str
    rules: tuple[Rule, ...]
    reaction: Reaction


class Answers:
    """The patterns in force. Immutable; any thread may use it.

    >>> rule = Rule(name="full", where="f:1", kind="mailbox-full", texts=("over quota",))
    >>> Answers([rule]).classify(552, "552 5.2.2 user is Over Quota", "rcpt", "").kind
    'mailbox-full'
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules: Sequence[Rule] = sorted(rules, key=lambda rule: rule.priority)
        self._any_text = [number for number, rule in enumerate(self.rules) if not rule.texts]
        self._owners: list[int] = []
        self._texts: Any = None
        texts = re2.Set.SearchSet(options(MEMORY))
        for number, rule in enumerate(self.rules):
            for text in rule.texts:
                texts.Add(text)
                self._owners.append(number)
        if self._owners:
            texts.Compile()
            self._texts = texts

    @classmethod
    def of(cls, config: Config, providers: Iterable[str]) -> Self | None:
        """The patterns that the settings name; None if there are none.

        `providers` are those of `limits-file`. Raises `ConfigError` with all mistakes.
        """
        path = config.responses_file
        if not path:
            return None
        return cls.parse(file_bytes(path, KEY, config.origin(KEY)), path, providers)

    @classmethod
    def parse(cls, data: bytes, path: str, providers: Iterable[str]) -> Self:
        """Read the text of a `responses-file`. Raises `ConfigError` with all mistakes."""
        from mailerq.rules.answers_file import AnswersReader, sample_problems

        reader = AnswersReader(data, path)
        rules = reader.read(frozenset(providers))
        if reader.problems:
            raise ConfigError.of(reader.problems)
        try:
            answers = cls(rules)
        except re2.error:
            text = "all texts together are too large to be one automaton"
            raise ConfigError.of([Problem(f"{path}:1", text, KEY)]) from None
        if problems := list(sample_problems(answers)):
            raise ConfigError.of(problems)
        return answers

    def classify(self, code: int, text: str, command: str, provider: str) -> Verdict | None:
        """What a reply means; None if no pattern matches.

        `text` is the whole reply on one line, `command` a word of `COMMANDS`, `provider` the one of
        the site or an empty string.
        """
        found = set(self._any_text)
        if self._texts is not None:
            data = text.encode(errors="replace")[:REPLY_LIMIT]
            found.update(self._owners[number] for number in self._texts.Match(data) or ())
        rules: list[Rule] = []
        reaction, kind = NO_REACTION, ""
        for number in sorted(found):
            rule = self.rules[number]
            if rule.fits(code, command, provider):
                rules.append(rule)
                reaction = reaction.over(rule.reaction)
                kind = kind or rule.kind
                if rule.final:
                    break
        return Verdict(kind, tuple(rules), reaction) if rules else None

    def judge(self, outcome: Outcome, provider: str) -> Verdict | None:
        """What the outcome of an attempt means, if a peer's reply ended the attempt."""
        if not outcome.from_peer or outcome.code is None:
            return None
        verdict = self.classify(
            outcome.code, outcome.reply, COMMANDS.get(outcome.state, ""), provider
        )
        if verdict is not None and verdict.kind == "greylist":
            seconds = stated_seconds(outcome.reply)
            if seconds is not None:
                seconds = max(seconds, MIN_STATED)
                reaction = Reaction(retry_after=seconds).over(verdict.reaction)
                verdict = verdict._replace(reaction=reaction)
        return verdict


def options(memory: int = 1 << 20) -> Any:
    """How texts are read: letters match in either case."""
    found = re2.Options()
    found.case_sensitive = False
    found.log_errors = False
    found.never_capture = True
    found.max_mem = memory
    return found


def stated_seconds(text: str) -> float | None:
    """The time that a reply asks for, in seconds; None if it states none.

    >>> stated_seconds("450 4.2.0 Greylisted, try again in 5 minutes")
    300.0
    >>> stated_seconds("451 please wait 00:04:30"), stated_seconds("451 try again later")
    (270.0, None)
    """
    match = _STATED.search(text[:REPLY_LIMIT])
    if match is None:
        return None
    hours, minutes, seconds, count, unit = match.groups()
    if unit is None:
        found = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    else:
        found = int(count) * _UNITS[unit.lower()]
    return float(max(found, 1)) if found <= MAX_STATED else None
