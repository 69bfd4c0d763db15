"""Read the symbols of a shared object from its file, without loading it.

The reader uses what the loader uses: the header, the program headers and the dynamic section.
Section headers serve one purpose, to find symbols that are not exported. The file is not trusted:
every offset is checked, every table has a limit, and nonsense is left out or raises `NotElf`.
(ELF-64, System V ABI.)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["FUNCTION", "SHARED", "Header", "Image", "NotElf", "Symbol", "read", "read_header"]

Source = Callable[[int, int], bytes]
"""Offset and size → bytes of the file; fewer at its end."""

MAX_HEADERS: Final = 4096
MAX_TABLE_BYTES: Final = 16 << 20
MAX_SYMBOLS: Final = 50_000
MAX_NAME_BYTES: Final = 2048
"""Limits far above the output of compilers, and small enough to read at once."""

SHARED: Final = 3
"""`Header.kind` of a shared object."""

FUNCTION: Final = 2
"""`Symbol.kind` of a function."""

_PROGRAM = 2
_LOAD, _DYNAMIC, _INTERPRETER = 1, 2, 3
_NEEDED, _HASH, _STRINGS, _SYMBOLS, _STRINGS_SIZE = 1, 4, 5, 6, 10
_GNU_HASH, _FLAGS_1, _PIE = 0x6FFFFEF5, 0x6FFFFFFB, 0x08000000
_SYMBOL_TABLE = 2
_SYMBOL_BYTES = 24

MACHINES: Final = {
    3: "x86 (32 bits)", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "S/390", 40: "ARM (32 bits)",
    62: "x86-64", 183: "AArch64", 243: "RISC-V", 258: "LoongArch",
}  # fmt: skip

KINDS: Final = {1: "an object file, not linked yet", 2: "a program", 4: "a core dump"}


class NotElf(ValueError):
    """The file is not ELF, or its tables make no sense. The text says what it is instead."""


@dataclass(frozen=True, slots=True)
class Header:
    """The machine that a file is for, and the kind of file."""

    bits: int
    big_endian: bool
    machine: int
    kind: int

    @property
    def target(self) -> tuple[int, bool, int]:
        """Equal for two files that can be loaded into one process."""
        return self.bits, self.big_endian, self.machine

    def __str__(self) -> str:
        name = MACHINES.get(self.machine, f"machine {self.machine}")
        order = "big" if self.big_endian else "little"
        return f"{name}, {self.bits} bits, {order}-endian"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name in a symbol table."""

    name: str
    kind: int
    defined: bool
    weak: bool
    local: bool
    """Not visible outside the file: static or hidden."""


@dataclass(frozen=True, slots=True)
class Image:
    """A shared object: the libraries it needs, and the symbols it defines and imports."""

    header: Header
    program: bool
    """An executable. The header alone cannot tell: a position-independent executable has the kind
    of a shared object."""
    needed: tuple[str, ...]
    symbols: tuple[Symbol, ...]
    """Dynamic symbols: exported ones and imported ones."""
    private: tuple[Symbol, ...]
    """Functions that are defined but not exported; empty if the file was stripped."""


def read_header(source: Source) -> Header:
    """Read the header of a file for any machine. Raises `NotElf`."""
    start = source(0, 20)
    if start[:4] != b"\x7fELF":
        raise NotElf(_describe(start))
    if len(start) < 20 or start[4] not in (1, 2) or start[5] not in (1, 2):
        raise NotElf("the header of this ELF file is damaged or cut off")
    order = "<" if start[5] == 1 else ">"
    kind, machine = struct.unpack(f"{order}HH", start[16:20])
    return Header(32 * start[4], start[5] == 2, machine, kind)


def _describe(start: bytes) -> str:
    for magic, what in (
        (b"", "an empty file"),
        (b"!<arch>", "an archive of object files: link it with cc -shared"),
        (b"#!", "a script"),
        (b"/* GNU ld script", "a linker script"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\xcf\xfa\xed\xfe", "a shared object of macOS"),
        (b"MZ", "a program or library of Windows"),
    ):
        if start == magic or (magic and start.startswith(magic[:20])):
            return f"no shared object but {what}"
    return "no shared object: it does not start as an ELF file does"


def read(source: Source) -> Image:
    """Read a 64-bit file. Raises `NotElf`."""
    header = read_header(source)
    if header.bits != 64:
        raise NotElf(f"it is for {header}")
    return _Reader(source, header).image()


class _Reader:
    def __init__(self, source: Source, header: Header) -> None:
        self._source = source
        self._header = header
        self._order = ">" if header.big_endian else "<"
        self._loads: list[tuple[int, int, int]] = []
        """Address, offset and size of each mapped segment."""

    def image(self) -> Image:
        dynamic: dict[int, int] = {}
        needed: list[int] = []
        interpreted = False
        for kind, offset, address, size in self._program_headers():
            if kind == _LOAD:
                self._loads.append((address, offset, size))
            elif kind == _INTERPRETER:
                interpreted = True
            elif kind == _DYNAMIC:
                for tag, value in self._rows("QQ", offset, min(size, MAX_TABLE_BYTES)):
                    if tag == 0:
                        break
                    if tag == _NEEDED:
                        needed.append(value)
                    dynamic.setdefault(tag, value)
        strings = self._at(dynamic.get(_STRINGS, 0), dynamic.get(_STRINGS_SIZE, 0))
        return Image(
            header=self._header,
            program=self._header.kind == _PROGRAM
            or (interpreted and bool(dynamic.get(_FLAGS_1, 0) & _PIE)),
            needed=tuple(_name(strings, offset) for offset in needed[:MAX_HEADERS]),
            symbols=tuple(self._dynamic_symbols(dynamic, strings)),
            private=tuple(self._private_symbols()),
        )

    def _program_headers(self) -> Iterator[tuple[int, int, int, int]]:
        offset, size, count = self._table(32, 54)
        if size != 56:
            raise NotElf("the program headers of this ELF file are damaged or cut off")
        for kind, _, place, address, _, length, _, _ in self._rows(
            "IIQQQQQQ", offset, size * count
        ):
            yield kind, place, address, length

    def _table(self, offset_at: int, size_at: int) -> tuple[int, int, int]:
        """Return the offset, row size and row count of a table that the file header names."""
        header = self._source(0, 64)
        if len(header) < 64:
            raise NotElf("the header of this ELF file is damaged or cut off")
        (offset,) = struct.unpack_from(f"{self._order}Q", header, offset_at)
        size, count = struct.unpack_from(f"{self._order}HH", header, size_at)
        return offset, size, min(count, MAX_HEADERS)

    def _rows(self, form: str, offset: int, size: int) -> Iterator[tuple[int, ...]]:
        row = struct.Struct(self._order + form)
        data = self._source(offset, min(size, MAX_TABLE_BYTES))
        yield from row.iter_unpack(data[: len(data) // row.size * row.size])

    def _at(self, address: int, size: int) -> bytes:
        """Read the bytes that are mapped at an address; fewer where the file ends."""
        for start, offset, length in self._loads:
            if start <= address < start + length:
                size = min(size, start + length - address, MAX_TABLE_BYTES)
                return self._source(offset + address - start, size)
        return b""

    def _words(self, address: int, count: int) -> tuple[int, ...]:
        data = self._at(address, 4 * count)
        return struct.unpack(f"{self._order}{len(data) // 4}I", data[: len(data) // 4 * 4])

    def _dynamic_symbols(self, dynamic: dict[int, int], strings: bytes) -> Iterator[Symbol]:
        count = min(self._count_symbols(dynamic), MAX_SYMBOLS)
        table = self._at(dynamic.get(_SYMBOLS, 0), count * _SYMBOL_BYTES)
        yield from self._symbols(table, strings)

    def _count_symbols(self, dynamic: dict[int, int]) -> int:
        """Count the dynamic symbols as the loader does: only the hash tables tell."""
        if _HASH in dynamic and len(words := self._words(dynamic[_HASH], 2)) == 2:
            return words[1]
        if _GNU_HASH in dynamic and len(words := self._words(dynamic[_GNU_HASH], 4)) == 4:
            buckets, first, bloom, _ = words
            address = dynamic[_GNU_HASH] + 16 + 8 * bloom
            last = max(self._words(address, min(buckets, MAX_SYMBOLS)), default=0)
            if last < first:
                return first  # none is exported
            address += 4 * (buckets + last - first)
            for word in self._words(address, MAX_SYMBOLS):
                last += 1
                if word & 1:
                    break
            return last
        return max(dynamic.get(_STRINGS, 0) - dynamic.get(_SYMBOLS, 0), 0) // _SYMBOL_BYTES

    def _symbols(self, table: bytes, strings: bytes) -> Iterator[Symbol]:
        row = struct.Struct(f"{self._order}IBBHQQ")
        for name, info, other, section, _, _ in row.iter_unpack(
            table[: len(table) // row.size * row.size]
        ):
            if name:
                local = info >> 4 == 0 or other & 3 in (1, 2)
                yield Symbol(_name(strings, name), info & 15, bool(section), info >> 4 == 2, local)

    def _private_symbols(self) -> Iterator[Symbol]:
        offset, size, count = self._table(40, 58)
        if size != 64:
            return
        sections = list(self._rows("IIQQQQIIQQ", offset, size * count))
        for _, kind, _, _, place, length, link, *_ in sections:
            if kind == _SYMBOL_TABLE and link < len(sections):
                strings = self._source(sections[link][4], min(sections[link][5], MAX_TABLE_BYTES))
                table = self._source(place, min(length, MAX_SYMBOLS * _SYMBOL_BYTES))
                for symbol in self._symbols(table, strings):
                    if symbol.local and symbol.defined and symbol.kind == FUNCTION:
                        yield symbol


def _name(strings: bytes, offset: int) -> str:
    end = strings.find(b"\0", offset, offset + MAX_NAME_BYTES)
    name = strings[offset:end] if end >= 0 else strings[offset : offset + MAX_NAME_BYTES]
    return name.decode("utf-8", "backslashreplace")
