"""The values of a template, what operators do with them, and the budget of a rendering."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Self

__all__ = [
    "OUTPUT_LIMIT",
    "STEPS_LIMIT",
    "TEXT_LIMIT",
    "Budget",
    "BudgetError",
    "Raw",
    "TemplateError",
    "add",
    "as_number",
    "as_text",
    "compare",
    "divide",
    "is_true",
    "item_of",
    "multiply",
    "remainder",
    "subtract",
]

STEPS_LIMIT: Final = 100_000
"""Steps of a mail. Each takes about a microsecond; a long newsletter takes some thousand."""

OUTPUT_LIMIT: Final = 16 << 20
"""Characters that all templates of a mail may write."""

TEXT_LIMIT: Final = 1 << 20
"""Characters of a value that a modifier makes."""

STEP_CHARS: Final = 256
"""Characters that take one more step: modifiers read them in C."""

NUMBER_LIMIT: Final = 1 << 63
"""Whole numbers from here on are calculated as floating point numbers."""

_NUMBER: Final = re.compile(r"[-+]?\d{1,30}(?:\.\d{1,30})?", re.ASCII).fullmatch


class TemplateError(Exception):
    """A template has a mistake, a value does not fit, or the budget is used up.

    `line` is the line of the template, 0 if unknown.
    """

    def __init__(self, text: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {text}" if line else text)
        self.text = text
        self.line = line

    def at(self, line: int) -> TemplateError:
        """Return this error with its line."""
        return self if self.line else type(self)(self.text, line)


class BudgetError(TemplateError):
    """The budget is used up."""


class Budget:
    """The steps and the output that remain. Not for several threads."""

    __slots__ = ("chars", "steps")

    def __init__(self, steps: int = STEPS_LIMIT, chars: int = OUTPUT_LIMIT) -> None:
        self.steps = steps
        self.chars = chars

    def spend(self, steps: int) -> None:
        """Take steps. Raises `BudgetError` if too few are left."""
        self.steps -= steps
        if self.steps < 0:
            raise BudgetError("takes too many steps")

    def spend_on(self, *values: object) -> None:
        """Take a step, and more for long texts, arrays and objects."""
        steps = 1
        for value in values:
            if isinstance(value, str):
                steps += len(value) // STEP_CHARS
            elif isinstance(value, list | tuple | dict):
                steps += len(value)
        self.spend(steps)

    def write(self, chars: int) -> None:
        """Take room in the output. Raises `BudgetError` if too little is left."""
        self.chars -= chars
        if self.chars < 0:
            raise BudgetError("writes too much")

    def fits(self, chars: int) -> None:
        """Check the length of a text before it is made. Raises `TemplateError`."""
        if chars > TEXT_LIMIT:
            raise TemplateError(f"makes a text of more than {TEXT_LIMIT} characters")
        self.spend(1 + chars // STEP_CHARS)


class Raw(str):
    """Text that needs no escaping. Every operation on the text returns a plain str."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        return super().__new__(cls, text)


def as_text(value: object) -> str:
    """Return the text of a value. Raises `TemplateError` for arrays and objects.

    >>> as_text(None), as_text(True), as_text(2.0), as_text(2.5)
    ('', 'true', '2', '2.5')
    """
    if isinstance(value, str):
        return value if type(value) is str else str(value)
    if value is None:
        return ""
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, int):
        if -NUMBER_LIMIT < value < NUMBER_LIMIT:
            return str(value)
        raise TemplateError("a number is too large")
    if isinstance(value, float):
        return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(value)
    raise TemplateError(f"expected a text, found {_kind(value)}")


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return "an array" if isinstance(value, list | tuple) else type(value).__name__


def as_number(value: object) -> int | float:
    """Return the number of a value; nothing counts as 0. Raises `TemplateError`."""
    if value is None:
        return 0
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return _bounded(value)
    if isinstance(value, float):
        return value
    if isinstance(value, str):
        number = _number_in(value)
        if number is not None:
            return number
        raise TemplateError(f"expected a number, found {value[:40]!a}")
    raise TemplateError(f"expected a number, found {_kind(value)}")


def _number_in(text: str) -> int | float | None:
    text = text[:80].strip()
    if not _NUMBER(text):
        return None
    return float(text) if "." in text else _bounded(int(text))


def _bounded(number: int) -> int | float:
    if -NUMBER_LIMIT < number < NUMBER_LIMIT:
        return number
    try:
        return float(number)
    except OverflowError:
        raise TemplateError("a number is too large") from None


def is_true(value: object) -> bool:
    """Whether a condition holds: not for nothing, false, 0, and what is empty."""
    return bool(value)


def item_of(value: object, key: object) -> Any:
    """Return an element of an object or an array; None if there is none."""
    if isinstance(value, Mapping):
        return value.get(key if isinstance(key, str) else as_text(key))
    if isinstance(value, list | tuple):
        number = _number_in(key) if isinstance(key, str) else key
        if isinstance(number, int) and 0 <= number < len(value):
            return value[number]
    return None


def compare(operator: str, left: Any, right: Any) -> bool:
    """Compare as numbers if one is a number, else as texts. Raises `TemplateError`.

    Nothing is equal to nothing, 0, false and the empty text.
    """
    left, right = _comparable(left, right)
    match operator:
        case "==":
            return bool(left == right)
        case "!=":
            return bool(left != right)
        case "<":
            return bool(left < right)
        case ">":
            return bool(left > right)
        case "<=":
            return bool(left <= right)
    return bool(left >= right)


def _comparable(left: Any, right: Any) -> tuple[Any, Any]:
    for value in (left, right):
        if not (value is None or isinstance(value, str | int | float)):
            raise TemplateError(f"cannot compare {_kind(value)}")
    if isinstance(left, bool) or isinstance(right, bool):
        return bool(left), bool(right)
    for number, other in ((left, right), (right, left)):
        if isinstance(number, int | float) and (
            not isinstance(other, str) or _number_in(other) is not None
        ):
            return as_number(left), as_number(right)
    return as_text(left), as_text(right)


def add(left: object, right: object) -> int | float:
    """Add numbers."""
    return as_number(as_number(left) + as_number(right))


def subtract(left: object, right: object) -> int | float:
    """Subtract numbers."""
    return as_number(as_number(left) - as_number(right))


def multiply(left: object, right: object) -> int | float:
    """Multiply numbers."""
    return as_number(as_number(left) * as_number(right))


def divide(left: object, right: object) -> int | float:
    """Divide numbers; the result is whole if possible."""
    one, other = as_number(left), as_number(right)
    if other == 0:
        raise TemplateError("divides by zero")
    if isinstance(one, int) and isinstance(other, int) and one % other == 0:
        return one // other
    return one / other


def remainder(left: object, right: object) -> int | float:
    """Return the remainder of a division."""
    one, other = as_number(left), as_number(right)
    if other == 0:
        raise TemplateError("divides by zero")
    return one % other
