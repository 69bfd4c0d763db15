"""The header compiles everywhere, and what it promises is what the module exports."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mailerq import _core
from tests.plugins.kit import ROOT, build_text

HEADER = ROOT / "include" / "mailerq.h"

PROTOTYPE = re.compile(r"^MQ_EXPORT [^;]*?\b(\w+)\(", re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("plugin.c", ["-std=c99", "-pedantic"]),
        ("plugin.c", ["-std=c11", "-pedantic", "-Wstrict-prototypes"]),
        ("plugin.cpp", ["-std=c++17", "-pedantic"]),
        ("plugin.cpp", ["-std=c++11", "-pedantic"]),
    ],
)
def test_header_compiles_without_a_warning(name: str, flags: list[str]) -> None:
    build_text("#include <mailerq.h>\n#include <mailerq.h>\n", *flags, name=name)


def test_module_exports_what_the_header_offers_and_nothing_else() -> None:
    offered = {name for name in PROTOTYPE.findall(HEADER.read_text()) if name.startswith("MQ_")}
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in listing.stdout.splitlines()}
    # Sanitizers and the C++ runtime add names of theirs.
    assert {name for name in exported if name.startswith(("MQ_", "mq_"))} == offered
    assert len(offered) == 37


def test_header_declares_every_callback() -> None:
    declared = [name for name in PROTOTYPE.findall(HEADER.read_text()) if name.startswith("mq_")]
    events = [name.removeprefix("mq_").removeprefix("smtp_in_") for name in declared]
    assert [name.removeprefix("smtp_") for name in events] == [
        "version",
        "initialize",
        "cleanup",
        *_core.EVENTS[:12],
        "message_id_size",
        "message_id",
    ]


def test_prose_outweighs_code() -> None:
    lines = [line.strip() for line in HEADER.read_text().splitlines() if line.strip()]
    prose = [line for line in lines if line.startswith(("*", "/*"))]
    assert len(prose) > len(lines) * 0.6
    assert Path(HEADER).read_text().isascii()
