"""Read a TOML file of tables, and report each mistake with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mailerq.errors import ConfigError, Problem
from mailerq.spelling import Spelling

__all__ = ["FILE_BYTES", "TableReader", "file_bytes"]

FILE_BYTES: Final = 1 << 20


def file_bytes(path: str, key: str, where: str) -> bytes:
    """Read the file of the setting `key`, which is set at `where`. Raises `ConfigError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        text = f"{key}: cannot read {path}: {error.strerror or error}"
        raise ConfigError.of([Problem(where, text, key)]) from None
    if len(data) > FILE_BYTES:
        text = f"{key}: {path} is larger than {FILE_BYTES} bytes"
        raise ConfigError.of([Problem(where, text, key)])
    return data


class TableReader:
    """Reads a file whose top level has arrays of tables only: ``[[kind]]``.

    `spellings` has the keys of each kind. All mistakes are collected in `problems`.
    """

    def __init__(
        self, data: bytes, path: str, *, key: str, spellings: Mapping[str, Spelling]
    ) -> None:
        self.problems: list[Problem] = []
        self.path = path
        self._key = key
        self._before = 0
        self._data = data
        self._spellings = spellings
        self._places: dict[tuple[str, int, str], int] = {}

    def tree(self) -> dict[str, Any]:
        """The tables of the file; empty if it is no TOML."""
        try:
            tree = tomllib.loads(self._data.decode())
        except UnicodeDecodeError as error:
            line = self._data.count(b"\n", 0, error.start) + 1
            self.wrong(line, "is not UTF-8")
            return {}
        except tomllib.TOMLDecodeError as error:
            self.wrong(*_line_of(str(error)))
            return {}
        self._places = _places(self._data.decode())
        for name in tree:
            if name not in self._spellings:
                known = " and ".join(f"[[{kind}]]" for kind in self._spellings)
                self.wrong(
                    self._places.get(("", 0, name), 1),
                    f"unknown table or key {name!r}; the file has {known}",
                )
        return tree

    def wrong(self, line: int, text: str) -> None:
        """Note a mistake."""
        self.problems.append(Problem(f"{self.path}:{line}", text, self._key))

    def at(self, kind: str, index: int, key: str = "") -> int:
        """The line of a key, or of the table that has or lacks the key."""
        return self._places.get((kind, index, key)) or self._places.get((kind, index, ""), 1)

    def tables(self, tree: Mapping[str, Any], kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The tables of a kind, each with its number. Their unknown keys are mistakes."""
        tables = tree.get(kind, [])
        if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
            self.wrong(self.at(kind, 0), f"{kind!r} must be written [[{kind}]]")
            return
        for index, table in enumerate(tables):
            self._before = len(self.problems)
            for key in table:
                if not self._spellings[kind].knows(key):
                    self.wrong(self.at(kind, index, key), self.unknown(kind, key))
            yield index, table

    @property
    def is_good(self) -> bool:
        """Whether the table that `tables` has yielded last has no mistake so far."""
        return len(self.problems) == self._before

    def unknown(self, kind: str, key: str) -> str:
        """What to say about a key that means nothing."""
        meant = self._spellings[kind].meant(key)
        hint = f"; did you mean {meant}?" if meant else ""
        return f"unknown key {key!r} in [[{kind}]]{hint}"

    def text(self, kind: str, index: int, table: Mapping[str, Any], key: str) -> str:
        """A text of a table; an empty string if there is none, or a mistake."""
        value = table.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or not value.strip():
            self.wrong(self.at(kind, index, key), f"{key}: {value!r} is not a text")
            return ""
        return value.strip()


def _line_of(text: str) -> tuple[int, str]:
    """The line in an error text of tomllib, and the rest of the text."""
    match = re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", text, re.DOTALL)
    if match is None:
        return 1, text
    return int(match[2]), f"{match[1]} (column {match[3]})"


_HEADER: Final = re.compile(r"\s*\[\[?\s*([\w-]+)\s*\]\]?")
_KEY: Final = re.compile(r"""\s*["']?([\w-]+)["']?\s*=""")


def _places(text: str) -> dict[tuple[str, int, str], int]:
    """The lines of tables, ``(kind, index, "")``, and of their keys.

    tomllib does not tell them. Text of several lines that looks like a key may mislead this
    function about the line, and about nothing else.
    """
    places: dict[tuple[str, int, str], int] = {}
    kind, counts, index = "", {"": 1}, 0
    for number, line in enumerate(text.split("\n"), start=1):
        if (match := _HEADER.match(line)) is not None:
            kind = match[1]
            index = counts.get(kind, 0)
            counts[kind] = index + 1
            places.setdefault((kind, index, ""), number)
            places.setdefault(("", 0, kind), number)
        elif (match := _KEY.match(line)) is not None:
            places.setdefault((kind, index, match[1]), number)
    return places
