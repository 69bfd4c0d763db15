"""Read a `responses-file`: its patterns, their mistakes, and whether their samples match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import re2

from mailerq.errors import Problem
from mailerq.rules.answers import AT_ONCE, COMMANDS, KEY, Answers, Rule, Trigger, options
from mailerq.rules.reactions import CLASSES, NO_REACTION, Reaction
from mailerq.rules.responses import Fate
from mailerq.rules.tables import TableReader
from mailerq.spelling import Spelling
from mailerq.wire.smtp import Reply

__all__ = ["AnswersReader", "sample_problems"]

FLOW_KEYS: Final = (
    "pause", "max-pause", "slow", "messages-per-minute", "max-connections", "fewer-connections",
    "for",
)  # fmt: skip
MESSAGE_KEYS: Final = ("message", "retry-after", "count-attempt", "other-ip")
ACTION_KEYS: Final = (*MESSAGE_KEYS, *FLOW_KEYS, "leave-host", "reconnect", "suppress", "alert")
KEYS: Final = (
    "name", "class", "provider", "code", "command", "text", "priority", "final", "trigger", "scope",
    "samples", *ACTION_KEYS,
)  # fmt: skip

FATES: Final = {"retry": Fate.RETRY, "fail": Fate.FAILED}
SCOPES: Final = ("provider", "site")
WORDS: Final = tuple(dict.fromkeys(COMMANDS.values()))
GREETING: Final = frozenset({"banner", "ehlo"})
"""The commands before a host has let us in."""

MAX_SECONDS: Final = 30 * 86400.0
USUAL_SECONDS: Final = 1800.0
"""How long less mail goes if neither the pattern nor its class says so."""
MAX_COUNT: Final = 100
"""Replies that a trigger may count; it remembers when each came."""
MAX_NUMBER: Final = 10**9
MAX_PATTERN: Final = 1000
"""Characters of one regular expression."""

_UNITS: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "hr": 3600, "d": 86400, "day": 86400}
_DURATION: Final = re.compile(r"(\d{1,9}) ?([a-z]{0,3})")
_TRIGGER: Final = re.compile(r"(\d{1,6}) ?/ ?(\d{0,9}) ?([a-z]{1,3})")
_CODE: Final = re.compile(r"[45](?:\d\d|xx)")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SAMPLE: Final = re.compile(r"([245]\d\d)(?:[ -](.*))?")


class AnswersReader(TableReader):
    """Reads the patterns of a file."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(data, path, key=KEY, spellings={"response": Spelling(KEYS)})

    def read(self, providers: frozenset[str]) -> list[Rule]:
        """The patterns without mistakes; `problems` has the others."""
        rules = [
            rule
            for index, table in self.tables(self.tree(), "response")
            if (rule := self._rule(index, table, providers)) is not None
        ]
        self._check_twice(rules)
        return rules

    def _check_twice(self, rules: list[Rule]) -> None:
        names: dict[str, Rule] = {}
        patterns: dict[tuple[object, ...], Rule] = {}
        for rule in rules:
            line = int(rule.where.rpartition(":")[2])
            other = names.setdefault(rule.name, rule)
            if other is not rule:
                self.wrong(line, f"name: {rule.name!r} is there twice, first at {other.where}")
            pattern = (
                rule.provider, rule.codes, rule.commands, frozenset(rule.texts), rule.final
            )  # fmt: skip
            other = patterns.setdefault(pattern, rule)
            if other is not rule:
                self.wrong(line, f"{rule.name!r} matches the same replies as {other.name!r}")

    def _rule(self, index: int, table: Mapping[str, Any], providers: frozenset[str]) -> Rule | None:
        item = _Table(self, index, table)
        name = item.text("name")
        if "name" not in table:
            item.wrong("", "a [[response]] needs a name")
        elif name and not _NAME.fullmatch(name):
            item.wrong("name", f"{name!r} is not a name of small letters, digits and hyphens")
        provider = item.text("provider")
        if provider and provider not in providers:
            text = f"no [[provider]] in limits-file is named {provider!r}, so this never matches"
            item.wrong("provider", text)
        final = item.flag("final")
        final = True if final is None else final
        kind = item.word("class", CLASSES)
        if not kind and final and "class" not in table:
            item.wrong("", f"{name!r} needs a class, such as {next(iter(CLASSES))}")
        texts = tuple(item.pattern(each) for each in item.texts("text"))
        samples = item.texts("samples")
        if texts and not samples:
            item.wrong("", f"{name!r} needs samples: replies that it is meant to match")
        if not (texts or "code" in table or "command" in table):
            item.wrong("", f"{name!r} matches every reply; give it a text, a code or a command")
        said = item.reaction()
        default = CLASSES[kind][1] if kind else NO_REACTION
        rule = Rule(
            name=name,
            where=f"{self.path}:{self.at('response', index)}",
            kind=kind or "",
            provider=provider,
            codes=item.codes(),
            commands=frozenset(
                filter(None, (item.word("command", WORDS, each) for each in item.texts("command")))
            ),
            texts=texts,
            priority=item.number("priority", 0, MAX_NUMBER, 100),
            final=final,
            trigger=item.trigger(),
            whole_provider=item.word("scope", SCOPES) != "site",
            reaction=_whole(said, default),
            samples=samples,
        )
        item.check(rule)
        return rule if self.is_good else None


def _whole(said: Reaction, default: Reaction) -> Reaction:
    """The reaction of a pattern: what it says, over that of its class."""
    reaction = said.over(default)
    if said.max_pause is None and (said.pause or 0) > (reaction.max_pause or 0):
        reaction = msgspec.structs.replace(reaction, max_pause=said.pause)
    if reaction.lowers and reaction.lasts is None:
        reaction = msgspec.structs.replace(reaction, lasts=USUAL_SECONDS)
    return reaction


class _Table:
    """One ``[[response]]``, and the kinds of its values."""

    def __init__(self, reader: AnswersReader, index: int, table: Mapping[str, Any]) -> None:
        self._reader = reader
        self._index = index
        self._table = table

    def wrong(self, key: str, text: str) -> None:
        """Report a mistake in a key, or in the whole table."""
        line = self._reader.at("response", self._index, key)
        self._reader.wrong(line, f"{key}: {text}" if key else text)

    def text(self, key: str) -> str:
        return self._reader.text("response", self._index, self._table, key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A text, or a list of them."""
        value = self._table.get(key, [])
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(each, str) and each for each in values):
            return tuple(values)
        self.wrong(key, f"{value!r} is not a text or a list of texts")
        return ()

    def word(self, key: str, words: Any, value: object = None) -> str:
        """One of some words, or an empty string."""
        value = self._table.get(key) if value is None else value
        if value is None:
            return ""
        if not isinstance(value, str) or value not in words:
            self.wrong(key, f"{value!r} is not one of {', '.join(words)}")
            return ""
        return value

    def flag(self, key: str) -> bool | None:
        value = self._table.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.wrong(key, f"{value!r} is not true or false")
        return None

    def number(self, key: str, least: int, most: int, default: int) -> int:
        value = self._table.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.wrong(key, f"{value!r} is not a whole number from {least} to {most}")
        return default

    def count(self, key: str) -> int | None:
        return self.number(key, 0, MAX_NUMBER, 0) if key in self._table else None

    def seconds(self, key: str) -> float | None:
        """A duration such as ``10m``, or a number of seconds."""
        value = self._table.get(key)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            found = float(value)
        else:
            match = _DURATION.fullmatch(value) if isinstance(value, str) else None
            if match is None or match[2] not in _UNITS:
                self.wrong(key, f"{value!r} is not a time such as 90s, 10m, 4h or 1d")
                return None
            found = float(int(match[1]) * _UNITS[match[2]])
        if not 0 <= found <= MAX_SECONDS:
            self.wrong(key, f"{value!r} is not between 0 and 30d")
            return None
        return found

    def trigger(self) -> Trigger:
        """``3/h``: three replies within an hour."""
        value = self._table.get("trigger")
        if value is None:
            return AT_ONCE
        match = _TRIGGER.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[3] not in _UNITS:
            self.wrong("trigger", f"{value!r} is not a number in a time such as 3/h or 10/5m")
            return AT_ONCE
        count, seconds = int(match[1]), float(int(match[2] or 1) * _UNITS[match[3]])
        if not (1 <= count <= MAX_COUNT and 0 < seconds <= MAX_SECONDS):
            self.wrong("trigger", f"{value!r}: from 1 to {MAX_COUNT} replies within at most 30d")
            return AT_ONCE
        return Trigger(count, seconds)

    def codes(self) -> frozenset[str]:
        """Codes, and classes of them such as ``4xx``."""
        value = self._table.get("code", [])
        found = set()
        for each in value if isinstance(value, list) else [value]:
            text = str(each)
            if isinstance(each, bool) or not _CODE.fullmatch(text):
                self.wrong("code", f"{each!r} is not a code such as 421, or 4xx or 5xx")
            else:
                found.add(text.removesuffix("xx"))
        return frozenset(found)

    def pattern(self, text: str) -> str:
        if len(text) > MAX_PATTERN:
            self.wrong("text", f"more than {MAX_PATTERN} characters")
            return ""
        try:
            compiled = re2.compile(text, options())
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            self.wrong("text", f"not a regular expression of RE2: {reason}")
            return ""
        if compiled.search("") is not None:
            self.wrong("text", f"{text!r} matches every reply")
        return text

    def reaction(self) -> Reaction:
        """What the table says about a reaction."""
        slow = self._table.get("slow")
        number = isinstance(slow, int | float) and not isinstance(slow, bool)
        if slow is not None and not (number and 0 <= slow < 1):
            self.wrong("slow", f"{slow!r} is not a share of the rate such as 0.5")
            slow = None
        fate = self.word("message", FATES)
        return Reaction(
            fate=FATES[fate] if fate else None,
            retry_after=self.seconds("retry-after"),
            counted=self.flag("count-attempt"),
            other_ip=self.flag("other-ip"),
            suppress=self.flag("suppress"),
            alert=self.flag("alert"),
            reconnect=self.flag("reconnect"),
            leave_host=self.seconds("leave-host"),
            pause=self.seconds("pause"),
            max_pause=self.seconds("max-pause"),
            slow=slow,
            messages_per_minute=self.count("messages-per-minute"),
            max_connections=self.count("max-connections"),
            fewer_connections=self.count("fewer-connections"),
            lasts=self.seconds("for"),
        )

    def check(self, rule: Rule) -> None:
        """Report keys of a rule that contradict each other, or have no effect."""
        table, reaction = self._table, rule.reaction
        if reaction.fate is Fate.FAILED:
            for key in ("retry-after", "count-attempt", "other-ip"):
                if key in table:
                    self.wrong(key, "has no effect: the message fails")
        self._check_fate(rule)
        if "max-pause" in table and not reaction.pause:
            self.wrong("max-pause", "has no effect without pause")
        if (reaction.max_pause or MAX_SECONDS) < (reaction.pause or 0) and "max-pause" in table:
            self.wrong("max-pause", "is shorter than pause")
        if "for" in table and not reaction.lowers:
            self.wrong(
                "for",
                "has no effect without slow, messages-per-minute, max-connections or"
                " fewer-connections",
            )
        if "leave-host" in table and rule.commands and rule.commands <= GREETING:
            self.wrong(
                "leave-host",
                "has no effect: a host that does not let us in is tried last anyway, for 5 minutes",
            )
        acts = reaction.moves_the_flow or reaction.alert or reaction.suppress
        for key in ("trigger", "scope"):
            if key in table and not acts:
                self.wrong(key, "has no effect: nothing is done but to the message")

    def _check_fate(self, rule: Rule) -> None:
        """Report keys without an effect because the message fails, or because it does not."""
        table, reaction = self._table, rule.reaction
        if not rule.final or reaction.other_ip or not rule.codes:
            return
        first = {code[0] for code in rule.codes}
        if reaction.fate is None and first == {"5"}:
            for key in ("retry-after", "count-attempt"):
                if key in table:
                    self.wrong(key, 'has no effect without message = "retry": 5xx fails')
        fails = reaction.fate is Fate.FAILED or (reaction.fate is None and first != {"4"})
        if "suppress" in table and reaction.suppress and not fails:
            self.wrong("suppress", "has no effect: the message does not fail")


def sample_problems(answers: Answers) -> Iterator[Problem]:
    """The samples that do not reach their rule, with the reason."""
    for rule in answers.rules:
        for sample in rule.samples:
            if (text := _sample_problem(answers, rule, sample)) is not None:
                yield Problem(rule.where, text, KEY)


def _sample_problem(answers: Answers, rule: Rule, sample: str) -> str | None:
    shown = sample if len(sample) <= 80 else f"{sample[:79]}…"
    reply = _reply(sample)
    if reply is None:
        return f"samples: {shown!r} is not a reply such as '421 4.7.0 try again later'"
    line = " ".join(filter(None, (str(reply.code), reply.status, reply.description)))
    takers: dict[str, str] = {}
    for command in rule.commands or WORDS:
        verdict = answers.classify(reply.code, line, command, rule.provider)
        if verdict is not None and rule in verdict.rules:
            return None
        if verdict is not None:
            takers[verdict.rules[-1].name] = verdict.rules[-1].where
    alone = Answers([rule])
    commands = rule.commands or WORDS
    if not any(alone.classify(reply.code, line, each, rule.provider) for each in commands):
        return f"samples: {rule.name!r} does not match {shown!r}"
    name, where = next(iter(takers.items()))
    return f"samples: {name!r} ({where}) takes {shown!r} before {rule.name!r}"


def _reply(sample: str) -> Reply | None:
    """A reply as it stands in a log, or as the peer sends it, in one or more lines."""
    code, lines = "", []
    for line in sample.strip().splitlines():
        match = _SAMPLE.fullmatch(line.strip())
        if match is None or (code and match[1] != code):
            return None
        code = match[1]
        lines.append(match[2] or "")
    return Reply(int(code), "\n".join(lines)) if code else None
