"""The words of reports to senders, in several languages.

A text has ``${variables}``, which `VARIABLES` lists. Their values come from outside, and stay on
one line each; `Words.of` makes them harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from mailerq.mail.fields import clean

__all__ = [
    "DEFAULT",
    "EVENTS",
    "MAX_TEXT",
    "VARIABLES",
    "Text",
    "Texts",
    "Words",
    "fill",
    "languages_in",
    "unknown_variables",
]

EVENTS: Final = ("failed", "delayed", "delivered", "relayed")
"""What reports are about, in the words of the field Action (RFC 3464, section 2.3.3)."""

VARIABLES: Final = {
    "recipients": "Each recipient, with what happened. In a subject: the first address.",
    "sender": "The address that the report goes to.",
    "subject": "The subject of the mail.",
    "date": "When the mail was received.",
    "message-id": "The Message-ID of the mail.",
    "until": "When this server gives up, in a report of a delay.",
    "hostname": "The name of this server.",
    "id": "The id of the message in the logs of this server.",
}
"""The variables of a text, with their meanings."""

MAX_TEXT: Final = 20_000
"""Characters of a text, before its variables are filled in."""

MAX_VALUE: Final = 1000
"""Characters of a value."""

MAX_RECIPIENTS: Final = 100
"""Recipients that the text lists; the part for programs has all."""

MAX_LANGUAGES: Final = 10
"""Languages of a mail to look at."""

LINE: Final = 76

_VARIABLE: Final = re.compile(r"\$\{([a-z-]{1,40})\}")
_TAG: Final = re.compile(r"[A-Za-z]{1,8}(?:-[A-Za-z0-9]{1,8}){0,4}").fullmatch


class Text(NamedTuple):
    """A report in one language: its subject, its text, and the name of its author."""

    subject: str
    text: str
    name: str


_NAME: Final = "Mail Delivery System"

_ENGLISH: Final = {
    "failed": Text(
        "Undelivered mail: ${subject}",
        """\
This is the mail server ${hostname}.

Your mail could not be delivered to:

${recipients}

The server does not try again. If you send the mail again, check the addresses
first.
""",
        _NAME,
    ),
    "delayed": Text(
        "Delayed mail: ${subject}",
        """\
This is the mail server ${hostname}.

Your mail could not be delivered yet to:

${recipients}

You need not send the mail again. The server goes on trying until
${until}.
""",
        _NAME,
    ),
    "delivered": Text(
        "Delivered: ${subject}",
        """\
This is the mail server ${hostname}.

Your mail has been delivered to:

${recipients}

You get this report because you asked for it.
""",
        _NAME,
    ),
    "relayed": Text(
        "Passed on: ${subject}",
        """\
This is the mail server ${hostname}.

Your mail was passed on to a server that makes no reports. So you will not
hear whether it is delivered to:

${recipients}

You get this report because you asked for it.
""",
        _NAME,
    ),
}


class Texts:
    """The texts by language. Immutable."""

    def __init__(
        self, texts: Mapping[tuple[str, str], Text] | None = None, default: str = "en"
    ) -> None:
        """`texts` has the keys (language, event), with languages in lower case."""
        own = {("en", event): text for event, text in _ENGLISH.items()}
        self._texts = {**own, **(texts or {})}
        self.default = default

    def find(self, event: str, languages: Iterable[str]) -> Text:
        """The text for a reader of these languages, the most wanted first."""
        for language in (*languages, self.default):
            for name in (language, language.partition("-")[0]):
                if (text := self._texts.get((name, event))) is not None:
                    return text
        return _ENGLISH[event]


DEFAULT: Final = Texts()


class Words(NamedTuple):
    """The values of the variables of one report."""

    values: Mapping[str, str]
    recipients: Sequence[tuple[str, str]]
    """Each address, and what happened."""

    @classmethod
    def of(cls, values: Mapping[str, str], recipients: Sequence[tuple[str, str]]) -> Words:
        """Take values from outside."""
        return cls({name: _harmless(value) for name, value in values.items()}, recipients)

    def subject(self, text: Text) -> str:
        """The subject, on one line."""
        first = self.recipients[0][0] if self.recipients else ""
        values = {**self.values, "recipients": _harmless(first)}
        return " ".join(fill(text.subject, values).split()).rstrip(" :-")

    def text(self, text: Text) -> str:
        """The text, with line feeds between its lines."""
        return fill(text.text, {**self.values, "recipients": "\n\n".join(self._listed())})

    def _listed(self) -> Iterator[str]:
        for address, what in self.recipients[:MAX_RECIPIENTS]:
            yield f"<{_harmless(address)}>" + "".join(_lines(_harmless(what)))
        if (more := len(self.recipients) - MAX_RECIPIENTS) > 0:
            yield f"(+ {more})"


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace the variables that have values.

    >>> fill("${a}: ${b}", {"a": "${b}"})
    '${b}: ${b}'
    """
    return _VARIABLE.sub(lambda match: values.get(match[1], match[0]), text)


def unknown_variables(text: str) -> list[str]:
    """The variables of a text that mean nothing."""
    return [name for name in _VARIABLE.findall(text) if name not in VARIABLES]


def languages_in(field: str) -> tuple[str, ...]:
    """The languages in a field Accept-Language or Content-Language (RFC 3282), in their order.

    >>> languages_in("de-AT, en;q=0.5")
    ('de-at', 'en')
    """
    tags = (item.partition(";")[0].strip() for item in field[:MAX_VALUE].split(","))
    return tuple(tag.lower() for tag in tags if _TAG(tag))[:MAX_LANGUAGES]


def _harmless(value: str) -> str:
    return clean(value[:MAX_VALUE]).strip()


def _lines(text: str) -> Iterator[str]:
    """Break a text at blanks into indented lines, each after a line feed."""
    line = "\n   "
    for word in text.split(" "):
        if len(line) + len(word) > LINE and line.strip():
            yield line
            line = "\n   "
        line += f" {word}"
    if line.strip():
        yield line
