"""The modifiers of templates: functions behind a bar, as in ``{$name|upper}``.

Each is a function of a value and arguments, and checks the size of its result before making it.
`MODIFIERS` lists them with their meanings; the table in ``docs/messages.md`` is made of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
import re
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

import msgspec

from mailerq.errors import MessageError
from mailerq.mail.headers import DAY_NAMES, MONTH_NAMES
from mailerq.mail.values import Budget, Raw, TemplateError, as_number, as_text, is_true
from mailerq.message import parse_time

__all__ = ["MODIFIERS", "Modifier"]

LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999."""

_TAGS: Final = re.compile(r"<[^<>]*+>").sub
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII).fullmatch
_DATE_CODE: Final = re.compile(r"%(.)").sub


class Modifier(NamedTuple):
    """A modifier: its function, how many arguments it takes, an example and its meaning."""

    function: Callable[..., Any]
    least: int
    most: int
    example: str
    meaning: str

    @property
    def arity(self) -> str:
        """The number of arguments in words."""
        if self.least == self.most:
            return f"{self.least} argument{'s' * (self.least != 1)}"
        return f"{self.least} to {self.most} arguments"

    def apply(self, budget: Budget, value: Any, *arguments: Any) -> Any:
        """Return the modified value. Raises `TemplateError`."""
        return self.function(budget, value, *arguments)


def _whole(value: object) -> int:
    number = as_number(value)
    if isinstance(number, float) and not abs(number) < 1e15:
        raise TemplateError("a number is too large")
    return int(number)


def _of_text(change: Callable[[str], str]) -> Callable[..., str]:
    """A modifier whose result is about as long as its text."""
    return lambda budget, value: change(as_text(value))


def _raw(budget: Budget, value: Any) -> Raw:
    return Raw(as_text(value))


def _escape(budget: Budget, value: Any, kind: Any = "html") -> Any:
    text, kind = as_text(value), as_text(kind)
    budget.fits(6 * len(text))
    if kind == "html":
        return Raw(html.escape(text))
    if kind == "url":
        return _urlencode(budget, text)
    raise TemplateError("escape knows html and url")


def _default(budget: Budget, value: Any, other: Any) -> Any:
    return other if value is None or value == "" else value


def _cat(budget: Budget, value: Any, *more: Any) -> str:
    texts = [as_text(each) for each in (value, *more)]
    budget.fits(sum(map(len, texts)))
    return "".join(texts)


def _replace(budget: Budget, value: Any, old: Any, new: Any) -> str:
    text, old, new = as_text(value), as_text(old), as_text(new)
    if not old:
        return text
    budget.fits(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _truncate(budget: Budget, value: Any, length: Any = 80, end: Any = "...") -> str:
    text, size, end = as_text(value), max(_whole(length), 0), as_text(end)
    return text if len(text) <= size else text[: max(size - len(end), 0)] + end[:size]


def _substr(budget: Budget, value: Any, start: Any, length: Any = None) -> str:
    text, first = as_text(value), _whole(start)
    first = max(len(text) + first, 0) if first < 0 else first
    return text[first:] if length is None else text[first : first + max(_whole(length), 0)]


def _indent(budget: Budget, value: Any, count: Any = 4) -> str:
    text, size = as_text(value), max(_whole(count), 0)
    budget.fits(len(text) + (text.count("\n") + 1) * size)
    blanks = " " * size
    return blanks + text.replace("\n", "\n" + blanks)


def _nl2br(budget: Budget, value: Any) -> Raw:
    text = value if type(value) is Raw else html.escape(as_text(value))
    budget.fits(len(text) + 8 * text.count("\n"))
    return Raw(text.replace("\r\n", "\n").replace("\n", "<br>\n"))


def _urlencode(budget: Budget, value: Any) -> str:
    text = as_text(value)
    budget.fits(12 * len(text))
    return quote(text, safe="", errors="replace")


def _urldecode(budget: Budget, value: Any) -> str:
    text = as_text(value)
    budget.fits(len(text))
    return unquote(text, errors="replace")


def _number_format(
    budget: Budget, value: Any, places: Any = 0, point: Any = ".", thousands: Any = ","
) -> str:
    number, digits = as_number(value), min(max(_whole(places), 0), 15)
    whole, _, rest = f"{number:,.{digits}f}".partition(".")
    return whole.replace(",", as_text(thousands)[:8]) + (as_text(point)[:8] + rest if rest else "")


def _round(budget: Budget, value: Any, places: Any = 0) -> Any:
    number, digits = as_number(value), min(max(_whole(places), 0), 15)
    return round(number, digits) if digits else _whole(round(_finite(number)))


def _finite(number: float) -> float:
    if not abs(number) < 1e15:
        raise TemplateError("a number is too large")
    return number


def _date_format(budget: Budget, value: Any, form: Any = "%Y-%m-%d") -> str:
    form = as_text(form)
    budget.fits(9 * len(form))
    budget.spend(form.count("%"))
    moment = time.gmtime(_seconds(value))
    parts = _date_parts(moment)
    return _DATE_CODE(lambda match: parts.get(match[1], match[0]), form)


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        text = value.replace("T", " ").removesuffix("Z")
        try:
            return parse_time(f"{text} 00:00:00" if _DATE(text) else text)
        except MessageError:
            if not text.isascii() or not text.isdigit():
                raise TemplateError(f"expected a time, found {value[:40]!a}") from None
    seconds = as_number(value)
    if not 0 <= seconds <= LAST_SECOND:
        raise TemplateError("a time is out of range")
    return seconds


def _date_parts(moment: time.struct_time) -> dict[str, str]:
    # strftime would use names of the locale.
    hour = moment.tm_hour % 12 or 12
    return {
        "Y": f"{moment.tm_year:04}", "y": f"{moment.tm_year % 100:02}", "m": f"{moment.tm_mon:02}",
        "d": f"{moment.tm_mday:02}", "e": str(moment.tm_mday), "j": f"{moment.tm_yday:03}",
        "H": f"{moment.tm_hour:02}", "I": f"{hour:02}", "M": f"{moment.tm_min:02}",
        "S": f"{moment.tm_sec:02}", "p": "AM" if moment.tm_hour < 12 else "PM",
        "A": DAY_NAMES[moment.tm_wday], "a": DAY_NAMES[moment.tm_wday][:3],
        "B": MONTH_NAMES[moment.tm_mon - 1], "b": MONTH_NAMES[moment.tm_mon - 1][:3], "%": "%",
    }  # fmt: skip


def _count(budget: Budget, value: Any) -> int:
    if isinstance(value, list | tuple | dict):
        return len(value)
    return 0 if value is None else 1


def _join(budget: Budget, value: Any, between: Any = ", ") -> str:
    if not isinstance(value, list | tuple):
        return as_text(value)
    texts, glue = [as_text(each) for each in value], as_text(between)
    budget.fits(sum(map(len, texts)) + len(texts) * len(glue))
    return glue.join(texts)


def _at(index: int) -> Callable[..., Any]:
    def item(budget: Budget, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            return value[index] if value else None
        return None

    return item


def _json(budget: Budget, value: Any) -> str:
    budget.spend(_weight(budget, value))
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TemplateError(f"cannot be written as JSON: {error}") from None


def _weight(budget: Budget, value: object) -> int:
    """Steps for all of a value, which may share parts many times."""
    total, level = 1, [value]
    while level:
        budget.spend(len(level))
        inner: list[object] = []
        for each in level:
            if isinstance(each, str):
                total += len(each) // 64
            elif isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list | tuple):
                inner += each
        level = inner
    return total


def _digest(name: str) -> Callable[..., str]:
    return lambda budget, value: hashlib.new(
        name, as_text(value).encode(errors="replace"), usedforsecurity=False
    ).hexdigest()


def _encode64(budget: Budget, value: Any) -> str:
    data = as_text(value).encode(errors="replace")
    budget.fits(len(data) * 4 // 3)
    return base64.b64encode(data).decode()


def _decode64(budget: Budget, value: Any) -> str:
    try:
        return base64.b64decode(as_text(value)).decode(errors="replace")
    except (ValueError, binascii.Error):
        raise TemplateError("is not base64") from None


MODIFIERS: Final[dict[str, Modifier]] = {
    "raw": Modifier(_raw, 0, 0, "{$x|raw}", "The text without escaping. Stands last."),
    "escape": Modifier(
        _escape, 0, 1, '{$x|escape:"url"}',
        "Escaped for `html` or `url`, once. HTML parts escape without being asked.",
    ),
    "default": Modifier(
        _default, 1, 1, '{$x|default:"friend"}', "The argument, if the value is missing or empty."
    ),
    "upper": Modifier(_of_text(str.upper), 0, 0, "{$x|upper}", "In upper case. Also `toupper`."),
    "lower": Modifier(_of_text(str.lower), 0, 0, "{$x|lower}", "In lower case. Also `tolower`."),
    "capitalize": Modifier(
        _of_text(str.title), 0, 0, "{$x|capitalize}", "Each word with a capital."
    ),
    "ucfirst": Modifier(
        _of_text(lambda text: text[:1].upper() + text[1:]), 0, 0, "{$x|ucfirst}",
        "The first letter as a capital.",
    ),
    "trim": Modifier(_of_text(str.strip), 0, 0, "{$x|trim}", "Without outer blanks."),
    "strip": Modifier(
        _of_text(lambda text: " ".join(text.split())), 0, 0, "{$x|strip}",
        "Each run of blanks and line ends as one blank.",
    ),
    "striptags": Modifier(
        _of_text(lambda text: _TAGS("", text)), 0, 0, "{$x|striptags}", "Without HTML tags."
    ),
    "truncate": Modifier(
        _truncate, 0, 2, '{$x|truncate:20:"..."}',
        "Cut to the given characters (80); a text that was cut ends in the last argument.",
    ),
    "substr": Modifier(
        _substr, 1, 2, "{$x|substr:0:3}",
        "From an offset, negative from the end: the given number of characters, or all.",
    ),
    "replace": Modifier(
        _replace, 2, 2, '{$x|replace:"a":"b"}', "With the second text in place of the first."
    ),
    "cat": Modifier(_cat, 1, 9, '{$x|cat:"!"}', "Followed by the arguments."),
    "indent": Modifier(_indent, 0, 1, "{$x|indent:4}", "Each line after the given blanks (4)."),
    "nl2br": Modifier(
        _nl2br, 0, 0, "{$x|nl2br}",
        "Escaped for HTML, with a `br` element before each line end.",
    ),
    "urlencode": Modifier(_urlencode, 0, 0, "{$x|urlencode}", "For a part of a URL."),
    "urldecode": Modifier(_urldecode, 0, 0, "{$x|urldecode}", "The reverse of `urlencode`."),
    "number_format": Modifier(
        _number_format, 0, 3, '{$x|number_format:2:".":","}',
        "With the given decimals (0), decimal point and separator of thousands.",
    ),
    "round": Modifier(_round, 0, 1, "{$x|round:2}", "Rounded to the given decimals (0)."),
    "date_format": Modifier(
        _date_format, 0, 1, '{$x|date_format:"%d %B %Y"}',
        "A time of the form `2026-01-31 12:00:00`, a date, or seconds since 1970, in UTC. Codes:"
        " `%Y %y %m %d %e %j %H %I %M %S %p %A %a %B %b %%`.",
    ),
    "count": Modifier(_count, 0, 0, "{$x|count}", "The number of elements."),
    "strlen": Modifier(
        lambda budget, value: len(as_text(value)), 0, 0, "{$x|strlen}",
        "The number of characters. Also `count_characters`.",
    ),
    "count_words": Modifier(
        lambda budget, value: len(as_text(value).split()), 0, 0, "{$x|count_words}",
        "The number of words.",
    ),
    "empty": Modifier(
        lambda budget, value: not is_true(value), 0, 0, "{if $x|empty}",
        "Whether the value is missing, false, 0 or empty.",
    ),
    "join": Modifier(_join, 0, 1, '{$x|join:", "}', "The elements of an array as one text."),
    "first": Modifier(_at(0), 0, 0, "{$x|first}", "The first element or character."),
    "last": Modifier(_at(-1), 0, 0, "{$x|last}", "The last element or character."),
    "jsonencode": Modifier(_json, 0, 0, "{$x|jsonencode}", "The value as JSON."),
    "base64encode": Modifier(_encode64, 0, 0, "{$x|base64encode}", "In base64."),
    "base64decode": Modifier(_decode64, 0, 0, "{$x|base64decode}", "The reverse, as UTF-8."),
    "md5": Modifier(_digest("md5"), 0, 0, "{$x|md5}", "The digest in hexadecimal."),
    "sha1": Modifier(_digest("sha1"), 0, 0, "{$x|sha1}", "The digest in hexadecimal."),
    "sha256": Modifier(_digest("sha256"), 0, 0, "{$x|sha256}", "The digest in hexadecimal."),
}  # fmt: skip
"""The modifiers by name, as templates write them."""

ALIASES: Final = {"toupper": "upper", "tolower": "lower", "count_characters": "strlen"}
MODIFIERS.update({name: MODIFIERS[meant] for name, meant in ALIASES.items()})
