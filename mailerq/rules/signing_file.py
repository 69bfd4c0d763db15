"""Read a `dkim-file`: its keys, and its mistakes with their lines."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping
from typing import Any, Final

from mailerq.address import parse_domain
from mailerq.errors import AddressError
from mailerq.rules.signing import (
    CANONICALIZATIONS,
    FILE_KEY,
    MAX_EXTRA,
    MAX_LIFETIME,
    MAX_PRIORITY,
    PROTOCOLS,
    Line,
    Options,
    Pattern,
    field_problem,
    in_bytes,
    parse_selector,
)
from mailerq.rules.tables import TableReader
from mailerq.spelling import Spelling

__all__ = ["SigningReader"]

KIND: Final = "key"
KEYS: Final = (
    "domain", "selector", "file", "from", "subdomains", "headers", "expire", "not-before",
    "not-after", "canonicalization", "report", "protocols", "priority",
)  # fmt: skip

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION: Final = re.compile(r"(\d{1,9}) ?([a-z]{0,1})", re.ASCII)


class SigningReader(TableReader):
    """Reads the keys of a file."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(data, path, key=FILE_KEY, spellings={KIND: Spelling(KEYS)})

    def read(self, *, has_directory: bool) -> list[Line]:
        """The lines without mistakes; `problems` has the others.

        `has_directory`: a line without a file may mean keys of `dkim-directory`.
        """
        lines = []
        seen: dict[object, str] = {}
        for index, table in self.tables(self.tree(), KIND):
            line = self._line(index, table, has_directory)
            if line is None:
                continue
            identity = (line.domain, line.selector, line.path, line.patterns)
            if identity in seen:
                self._wrong(index, "", f"the same key is there twice, first at {seen[identity]}")
            seen.setdefault(identity, line.where)
            lines.append(line)
        return lines

    def _wrong(self, index: int, key: str, text: str) -> None:
        self.wrong(self.at(KIND, index, key), f"{key}: {text}" if key else text)

    def _line(self, index: int, table: Mapping[str, Any], has_directory: bool) -> Line | None:
        domain = self._domain(index, table)
        selector = self.text(KIND, index, table, "selector")
        try:
            selector = parse_selector(selector) if selector else ""
        except AddressError as error:
            self._wrong(index, "selector", str(error))
        path = self.text(KIND, index, table, "file")
        if path:
            path = os.path.join(os.path.dirname(self.path), path)
            if not selector and "selector" not in table:
                self._wrong(index, "", "a [[key]] with a file needs a selector")
        elif not has_directory and "file" not in table:
            self._wrong(index, "", "a [[key]] needs a file while dkim-directory is not set")
        patterns = self._patterns(index, table, domain)
        options = self._options(index, table)
        if not self.is_good:
            return None
        where = f"{self.path}:{self.at(KIND, index)}"
        return Line(domain, selector, path, patterns, options, where)

    def _domain(self, index: int, table: Mapping[str, Any]) -> str:
        text = self.text(KIND, index, table, "domain")
        if "domain" not in table:
            self._wrong(index, "", "a [[key]] needs a domain")
        try:
            return parse_domain(text) if text else ""
        except AddressError as error:
            self._wrong(index, "domain", str(error))
            return ""

    def _patterns(self, index: int, table: Mapping[str, Any], domain: str) -> tuple[Pattern, ...]:
        """The From domains for which a key signs; by default its own."""
        texts = list(self._texts(index, table, "from"))
        if "from" in table and not texts:
            self._wrong(index, "from", "names no domain, so the key never signs")
        if not texts and domain:
            texts = [domain]
        if self._flag(index, table, "subdomains") and domain:
            texts.append(f"*.{domain}")
        patterns = []
        for text in texts:
            try:
                patterns.append(Pattern.of(text))
            except AddressError as error:
                self._wrong(index, "from", str(error))
        return tuple(dict.fromkeys(patterns))

    def _options(self, index: int, table: Mapping[str, Any]) -> Options:
        form = table.get("canonicalization", "relaxed/simple")
        if not isinstance(form, str) or form.lower() not in CANONICALIZATIONS:
            text = f"{form!r} is not one of {', '.join(CANONICALIZATIONS)}"
            self._wrong(index, "canonicalization", text)
            form = "relaxed/simple"
        relaxed_header, relaxed_body = CANONICALIZATIONS[form.lower()]
        names = self._texts(index, table, "headers")
        if len(names) > MAX_EXTRA:
            self._wrong(index, "headers", f"has more than {MAX_EXTRA} names")
        for name in names:
            if (problem := field_problem(name)) is not None:
                self._wrong(index, "headers", problem)
        protocols = self._texts(index, table, "protocols") or ("dkim",)
        for name in protocols:
            if name not in PROTOCOLS:
                self._wrong(index, "protocols", f"{name!r} is not one of {', '.join(PROTOCOLS)}")
        not_before = self._time(index, table, "not-before")
        not_after = self._time(index, table, "not-after")
        if 0 < not_after <= not_before:
            self._wrong(index, "not-after", "is not later than not-before")
        return Options(
            relaxed_header=relaxed_header,
            relaxed_body=relaxed_body,
            extra=in_bytes(names),
            lifetime=self._seconds(index, table, "expire"),
            not_before=not_before,
            not_after=not_after,
            report=self._flag(index, table, "report"),
            protocols=frozenset(protocols),
            priority=self._number(index, table, "priority"),
        )

    # Kinds of values

    def _texts(self, index: int, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        """A text, or a list of them."""
        value = table.get(key, [])
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(each, str) and each for each in values):
            return tuple(values)
        self._wrong(index, key, f"{value!r} is not a text or a list of texts")
        return ()

    def _flag(self, index: int, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if isinstance(value, bool):
            return value
        self._wrong(index, key, f"{value!r} is not true or false")
        return False

    def _number(self, index: int, table: Mapping[str, Any], key: str) -> int:
        value = table.get(key, 0)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_PRIORITY:
            return value
        self._wrong(index, key, f"{value!r} is not a whole number")
        return 0

    def _seconds(self, index: int, table: Mapping[str, Any], key: str) -> int:
        """A duration such as ``7d``, or a number of seconds."""
        value = table.get(key, 0)
        match = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if match is not None and match[2] in _UNITS:
            value = int(match[1]) * _UNITS[match[2]]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LIFETIME:
            return value
        self._wrong(index, key, f"{value!r} is not a time such as 12h, 7d or 4w")
        return 0

    def _time(self, index: int, table: Mapping[str, Any], key: str) -> float:
        """A date, or a date with a time; without an offset it is in UTC."""
        value = table.get(key)
        if value is None:
            return 0.0
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
        if isinstance(value, datetime.datetime):
            if value.tzinfo is None:
                value = value.replace(tzinfo=datetime.UTC)
            return value.timestamp()
        self._wrong(index, key, f"{value!r} is not a date such as 2027-01-31")
        return 0.0
