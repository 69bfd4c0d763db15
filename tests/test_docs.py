"""The pages below docs/: the code in them runs, and says what the page says that it does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in order: the language and the text."""
    return [(match[1], match[2]) for match in FENCE.finditer((ROOT / "docs" / page).read_text())]


EMBEDDING = blocks("embedding.md")
PROGRAMS = [number for number, (language, _) in enumerate(EMBEDDING) if language == "python"]


def test_each_program_of_the_page_says_what_it_prints() -> None:
    assert PROGRAMS
    assert [EMBEDDING[number + 1][0] for number in PROGRAMS] == ["text"] * len(PROGRAMS)
    assert {language for language, _ in EMBEDDING} == {"python", "text"}


@pytest.mark.parametrize("number", PROGRAMS)
def test_a_program_of_the_page_does_what_the_page_says(tmp_path: Path, number: int) -> None:
    (tmp_path / "program.py").write_text(EMBEDDING[number][1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, EMBEDDING[number + 1][1]), done.stderr
    assert "Traceback" not in done.stderr


def test_the_programs_of_the_page_pass_a_strict_type_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="`make lint` installs mypy")
    for number in PROGRAMS:
        (tmp_path / f"program{number}.py").write_text(EMBEDDING[number][1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *sorted(tmp_path.iterdir())],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
