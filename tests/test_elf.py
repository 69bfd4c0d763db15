"""Reading shared objects: true of real files, and harmless with any other."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq import elf
from tests.plugins.kit import build_text

TEXT = """
int mq_version(void) { return 2; }
int variable = 1;
static int quiet(void) { return variable; }
int (*mq_secret(void))(void);
__attribute__((visibility("hidden"))) int (*mq_secret(void))(void) { return quiet; }
int MQ_Missing(void);
__attribute__((weak)) int perhaps(void);
int calls(void) { return MQ_Missing() + (perhaps ? perhaps() : 0) + mq_secret()(); }
"""


def source_of(data: bytes) -> elf.Source:
    return lambda offset, size: data[offset : offset + size]


@pytest.fixture(scope="module")
def plugin() -> bytes:
    return build_text(TEXT, "-Wno-missing-prototypes").read_bytes()


def test_names_are_those_that_the_linker_wrote(plugin: bytes) -> None:
    image = elf.read(source_of(plugin))
    assert image.header.kind == elf.SHARED
    assert not image.program
    symbols = {symbol.name: symbol for symbol in image.symbols}
    assert symbols["mq_version"] == elf.Symbol("mq_version", elf.FUNCTION, True, False, False)
    assert symbols["variable"].kind != elf.FUNCTION
    assert not symbols["MQ_Missing"].defined
    assert symbols["perhaps"].weak
    assert "mq_secret" not in symbols
    assert {"quiet", "mq_secret"} <= {symbol.name for symbol in image.private}


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_each_kind_of_hash_table_counts_the_symbols(style: str) -> None:
    data = build_text(TEXT, f"-Wl,--hash-style={style}").read_bytes()
    names = {symbol.name for symbol in elf.read(source_of(data)).symbols}
    assert {"mq_version", "calls", "variable", "MQ_Missing", "perhaps"} <= names


def test_a_stripped_file_still_says_what_it_exports() -> None:
    image = elf.read(source_of(build_text(TEXT, "-s").read_bytes()))
    assert "mq_version" in {symbol.name for symbol in image.symbols}
    assert image.private == ()


@pytest.mark.parametrize("option", ["-pie", "-no-pie"])
def test_a_program_is_told_from_a_shared_object(tmp_path: Path, option: str) -> None:
    program = tmp_path / "program"
    code = "int main(void) { return 0; }"
    flag = "-fPIE" if option == "-pie" else "-fno-pie"
    subprocess.run(
        ["cc", flag, option, "-x", "c", "-", "-o", program], input=code, text=True, check=True
    )
    assert elf.read(source_of(program.read_bytes())).program


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "an empty file"),
        (b"#!/bin/sh\n", "a script"),
        (b"!<arch>\nx", "an archive of object files"),
        (b"int main;", "does not start as an ELF file does"),
        (b"\x7fELF\x02", "damaged or cut off"),
        (b"\x7fELF\x02\x01" + bytes(60), "damaged or cut off"),
    ],
)
def test_what_is_none_is_said_in_words(data: bytes, text: str) -> None:
    with pytest.raises(elf.NotElf, match=text):
        elf.read(source_of(data))


def test_a_file_for_another_machine_is_said_in_words(plugin: bytes) -> None:
    other = plugin[:4] + b"\x01" + plugin[5:18] + struct.pack("<H", 40) + plugin[20:]
    assert str(elf.read_header(source_of(other))) == "ARM (32 bits), 32 bits, little-endian"


def read_any(data: bytes) -> None:
    asked = 0

    def source(offset: int, size: int) -> bytes:
        nonlocal asked
        assert offset >= 0
        assert 0 <= size <= elf.MAX_TABLE_BYTES
        asked += 1
        assert asked < 100_000
        return data[offset : offset + size]

    try:
        image = elf.read(source)
    except elf.NotElf:
        return
    assert len(image.symbols) <= elf.MAX_SYMBOLS


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read_any(b"\x7fELF\x02\x01" + data)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8)),
        ),
        max_size=20,
    ),
    st.floats(0, 1),
)
def test_a_damaged_file_is_read_or_refused(
    plugin: bytes, changes: list[tuple[float, bytes]], left: float
) -> None:
    data = bytearray(plugin)
    for place, fresh in changes:
        # Half of the changes are in what the rest depends on.
        start = int(place * 2 * 1024) if place < 0.5 else int(place * len(data))
        data[start : start + len(fresh)] = fresh
    read_any(bytes(data[: int(left * len(data))]))
    read_any(bytes(data))
