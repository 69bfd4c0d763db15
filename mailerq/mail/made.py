"""Make the mail that is sent of a message with ``data``, ``headers`` or an object in ``mime``.

Theory of operation
-------------------
The document in the queue stays as it is, and each attempt makes the mail anew, and makes the same.
The steps have an order:

1. ``normalize``: all line ends become CRLF. The other steps rely on that, so they include it.
2. An object in ``mime`` becomes a mail.
3. ``data``: the templates in Subject, the address fields and the text parts are filled in.
4. ``inlinecss``. It comes after ``data``, because a parser of HTML moves tags of a template that
   stand between the rows of a table.
5. Date and Message-ID are added where they are missing, if the mail was made of parts or templates.
6. ``headers``: the edits come last, so they have the last word.

Conversion for a peer without 8BITMIME, and signing, come after all that.

`make` is pure and may run in any thread. It keeps one copy of the mail beside the stored one.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

from mailerq.errors import MessageError
from mailerq.mail import compose, edits
from mailerq.mail.compose import Changes, Facts
from mailerq.mail.fields import FieldError, clean, in_words, make_field, mark, place_values, shown
from mailerq.mail.headers import HEADER_LIMIT, date_field, message_id_field, unfold
from mailerq.mail.parts import FIELDS, PartError, paired, rewrite
from mailerq.mail.template import Template
from mailerq.mail.values import Budget, BudgetError, TemplateError
from mailerq.message import parse_time
from mailerq.wire._lines import Buffer

__all__ = ["MADE_OF", "Inline", "NotMade", "State", "Unfinished", "is_made", "make", "problems"]

State = Literal["responsive", "personalize"]

MADE_OF: Final = frozenset(("mime", "data", "headers", "inlinecss", "normalize"))
"""The properties that `make` reads; a message without them is sent as stored."""

ADDRESS_FIELDS: Final = frozenset((b"from", b"sender", b"reply-to", b"to", b"cc"))
TEXT_FIELDS: Final = frozenset((b"subject", b"list-unsubscribe"))
"""Header fields that are templates if there is ``data``."""

_EMPTY_LINE: Final = re.compile(
    rb"\A(?:\r\n|\r|\n)|(?:\r\n|\r(?!\n)|\n)(?:\r\n|\r(?!\n)|\n)"
).search

KEPT_CHARS: Final = 1 << 15
KEPT_STEPS: Final = 1000
KEPT_TEMPLATES: Final = 32
"""Compiled templates to keep, their longest text, and the steps that compiling one may take: a
mailing has few templates. A step stands for up to a kilobyte of a compiled template."""


class NotMade(Exception):
    """The mail cannot be made; `state` is the step that failed, in the words of results."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state: State = state
        self.reason = reason


class Unfinished(Exception):
    """The mail takes more work than the budget that was given allows."""


Inline = Callable[[str], str]
"""Moves the style sheets of an HTML text into its elements. Raises `NotMade`."""


def is_made(properties: Mapping[str, Any]) -> bool:
    """Whether the mail of a message is made, not sent as stored."""
    return any(properties.get(name) is not None for name in ("data", "headers")) or any(
        properties.get(name) for name in ("mime", "inlinecss", "normalize")
    )


def problems(properties: Mapping[str, Any]) -> Iterator[str]:
    """Yield mistakes in the form of ``mime`` and ``headers``, whose outer types are right."""
    mime, headers = properties.get("mime"), properties.get("headers")
    if isinstance(mime, dict):
        yield from compose.problems(mime)
    if isinstance(headers, dict):
        yield from edits.problems(headers)


def make(
    properties: Mapping[str, Any],
    body: bytes | None,
    *,
    hostname: str,
    now: float,
    inline: Inline | None = None,
    budget: Budget | None = None,
) -> bytes:
    """Return the mail of a message. If `body` is None, ``mime`` must be an object.

    `now` is the time for Date unless the message says when it came due. `inline` may be None if
    the message does not ask for ``inlinecss``, or if nobody wants to see the result. Raises
    `NotMade`, and `Unfinished` if a `budget` was given and is too small.
    """
    for problem in problems(properties):
        raise NotMade("responsive", problem)
    state: State = "responsive" if properties.get("data") is None else "personalize"
    quick = budget is not None
    try:
        return _Making(properties, hostname, now, inline, budget or Budget()).mail(body)
    except BudgetError as error:
        if quick:
            raise Unfinished from None
        raise NotMade("personalize", str(error)) from None
    except (TemplateError, PartError) as error:
        raise NotMade(state, str(error)) from None
    except FieldError as error:
        raise NotMade("responsive", f"property {error}") from None


class _Making:
    """The work for one mail."""

    def __init__(
        self,
        properties: Mapping[str, Any],
        hostname: str,
        now: float,
        inline: Inline | None,
        budget: Budget,
    ) -> None:
        data = properties.get("data")
        self._properties = properties
        self._hostname = hostname
        self._now = now
        self._inline = inline if properties.get("inlinecss") else None
        self._budget = budget
        self._variables = None if data is None else {
            "envelope": properties.get("envelope") or "",
            "recipient": properties.get("recipient") or "",
            **data,
        }  # fmt: skip
        self._utf8 = properties.get("smtputf8") is True

    def mail(self, body: bytes | None) -> bytes:
        properties = self._properties
        pieces: list[bytes | memoryview]
        if body is None:
            head, made = self._composed()
            pieces = [*made]
        else:
            body = self._in_lines(body)
            if self._variables is None and properties.get("headers") is None and not self._inline:
                return body
            head, pieces = rewrite(body, self._change, *self._kinds())
            if self._variables is not None:
                head = self._fill_header(head)
        if body is None or self._variables is not None:
            head = self._complete(head)
        if (headers := properties.get("headers")) is not None:
            head = edits.apply_edits(head, headers, utf8=self._utf8)
        return _joined(head, pieces)

    def _in_lines(self, body: bytes) -> bytes:
        """Return the mail with CRLF as its line ends; only in the header of a binary mail."""
        if self._properties.get("binarymime") is not True or self._properties.get("normalize"):
            return paired(body)
        empty = _EMPTY_LINE(body, 0, HEADER_LIMIT)
        end = empty.end() if empty is not None else 0
        head = paired(body[:end])
        return body if len(head) == end else head + body[end:]

    def _composed(self) -> tuple[bytes, list[bytes]]:
        properties = self._properties
        facts = Facts(
            properties.get("envelope") or "",
            properties.get("recipient") or "",
            str(properties.get("message-id")),
            self._utf8,
        )
        changes = Changes(
            self._words,
            self._addresses,
            lambda text: self._change("text/plain", text),
            lambda text: self._change("text/html", text),
        )
        return compose.compose(properties["mime"], facts, changes)

    # Texts

    def _kinds(self) -> tuple[str, ...]:
        """The types of the parts that may change."""
        if self._variables is not None:
            return ("text/plain", "text/html")
        return ("text/html",) if self._inline is not None else ()

    def _change(self, kind: str, text: str) -> str:
        """Return the new text of a part; the same object if nothing changes."""
        is_html = kind == "text/html"
        if self._variables is not None and "{" in text:
            try:
                if is_html:
                    text = self._filled(text, escape=html.escape)
                else:
                    text = self._filled(text)
            except TemplateError as error:
                raise _placed(error, f"the {kind} part") from None
        if is_html and self._inline is not None:
            text = self._inline(text)
        return text

    def _filled(self, text: str, **escapes: Callable[[str], str]) -> str:
        """Fill in a template."""
        assert self._variables is not None, "else there are no templates"
        template = _templates.get(text)
        if template is None:
            steps = self._budget.steps
            template = Template(text, self._budget)
            if len(text) <= KEPT_CHARS and steps - self._budget.steps <= KEPT_STEPS:
                if len(_templates) >= KEPT_TEMPLATES:
                    _templates.clear()
                _templates[text] = template
        if template.is_plain:
            return text
        return template.render(self._variables, self._budget, **escapes)

    # Header fields

    def _words(self, text: str) -> str:
        if self._variables is None or "{" not in text:
            return text
        return self._filled(text, escape=shown, escape_raw=shown)

    def _addresses(self, text: str) -> str:
        if self._variables is None or "{" not in text:
            return text
        return place_values(self._filled(clean(text), escape=mark, escape_raw=mark))

    def _fill_header(self, head: bytes) -> bytes:
        """Fill in the templates of a header."""
        if b"{" not in head and b"=?" not in head:
            return head
        fields = FIELDS(head.removesuffix(b"\r\n"))
        return b"".join([self._fill_field(field) for field in fields if field])

    def _fill_field(self, field: bytes) -> bytes:
        name, _, value = field.partition(b":")
        key = name.rstrip(b" \t").lower()
        if key not in ADDRESS_FIELDS and key not in TEXT_FIELDS:
            return field + b"\r\n"
        text = in_words(unfold(value).decode(errors="replace"), lambda words: "{" in words)
        if "{" not in text:
            return field + b"\r\n"
        label = name.rstrip(b" \t").decode(errors="replace")
        try:
            filled = self._addresses(text) if key in ADDRESS_FIELDS else self._words(text)
            if filled is text:
                return field + b"\r\n"
            return make_field(label, filled, utf8=self._utf8)
        except TemplateError as error:
            raise _placed(error, f"the field {label}") from None
        except FieldError as error:
            raise PartError(f"the field {label}: {error}") from None

    def _complete(self, head: bytes) -> bytes:
        """Add Date and Message-ID where they are missing."""
        names = {
            field.partition(b":")[0].rstrip(b" \t").lower()
            for field in FIELDS(head.removesuffix(b"\r\n"))
        }
        if b"date" not in names:
            head += date_field(self._since())
        id = self._properties.get("message-id")
        if b"message-id" not in names and isinstance(id, str) and id:
            head += message_id_field(id, self._hostname)
        return head

    def _since(self) -> float:
        """When the message came due: each attempt has the same Date."""
        try:
            return parse_time(self._properties["seen"])
        except (KeyError, MessageError):
            return self._now


_templates: dict[str, Template] = {}
"""Compiled templates by their text. Threads may lose an entry, nothing else."""


def _placed(error: TemplateError, where: str) -> TemplateError:
    return type(error)(f"{where}: {error}")


def _joined(head: bytes, pieces: list[bytes | memoryview]) -> bytes:
    """Return the whole mail. A thread may join a long one: long pieces release Python's lock."""
    whole = Buffer(len(head) + 2 + sum(map(len, pieces)))
    whole.add(head)
    whole.add(b"\r\n")
    for piece in pieces:
        if piece:
            whole.add(piece)
    return whole.take()
