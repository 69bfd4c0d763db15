"""docs/architecture.md and CONTRIBUTING.md name what exists, and the calls on the page go down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from mailerq.cli import _COMMANDS
from mailerq.config import SETTINGS
from tests.support import ROOT
from tools.check_tree import LAYERS, layer_of

PAGE = (ROOT / "docs" / "architecture.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./(mailerq/[^)]+)\)")
MARK = re.compile(r"`([^`]+)`")
NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_][A-Za-z_0-9]*)?")
ITEM = re.compile(r"( *)- ")

QUEUE_FILES = {"limits.cells", "rows", "rows.audit", "sts-policies", "tls-counts"}
"""Files of a queue directory that the page names."""

OTHER_WORDS = {"kill -9"}

ELSEWHERE = {"Flow.next_job", "Flow.settle"}
"""Names of the caller in a step of what calls back."""


class Step(NamedTuple):
    """An item of a list, with its depth, or a paragraph, with depth -1."""

    depth: int
    text: str

    @property
    def files(self) -> list[str]:
        return [path for _, path in LINK.findall(self.text)]

    @property
    def marks(self) -> list[str]:
        """The words in code marks, without the files of links."""
        return MARK.findall(LINK.sub("", self.text))


def steps(page: str) -> Iterator[Step]:
    """Yield the items of lists and the paragraphs of a page, in order."""
    depth, lines = -1, list[str]()
    for line in [*page.splitlines(), ""]:
        item = ITEM.match(line)
        if lines and (item or not line.strip()):
            yield Step(depth, "\n".join(lines))
            depth, lines = -1, []
        if item:
            depth = len(item[1]) // 2
        if line.strip():
            lines.append(line)


@cache
def names_in(path: Path) -> set[str]:
    """The functions and classes of a module, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{each.name}" for each in node.body
                      if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}  # fmt: skip
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return found


def other_words() -> set[str]:
    """What stands in code marks and is no function: settings, commands, files."""
    settings = {each.key for each in SETTINGS}
    commands = {f"mailerq {name}" for name in _COMMANDS}
    return settings | commands | QUEUE_FILES | OTHER_WORDS


def unknown_names(page: str) -> Iterator[str]:
    """Yield the words in code marks that name nothing, or nothing in a file of their step."""
    others = other_words()
    names = {path: names_in(path) for path in (ROOT / "mailerq").rglob("*.py")}
    everywhere = set[str]().union(*names.values())
    for step in steps(page):
        there = set[str]().union(*(names.get(ROOT / file, ()) for file in step.files))
        for mark in step.marks:
            if mark in others or " ".join(mark.split()[:2]) in others:
                continue
            if NAME.fullmatch(mark) and not mark.endswith(".md"):
                if mark not in (everywhere if mark in ELSEWHERE or step.depth < 0 else there):
                    yield f"{mark}: {step.files}"
            elif not any((place / mark).exists() for place in (ROOT, ROOT / "mailerq")):
                yield mark


def upward_calls(page: str) -> Iterator[str]:
    """Yield the files that lie above the file that calls them.

    A step is called by the step that it is indented under. The first file of a step does what the
    step says, and calls its other files.
    """
    callers: list[str] = []
    for step in steps(page):
        del callers[max(step.depth, 0) :]
        if step.depth < 0 or not step.files:
            continue
        assert len(callers) == step.depth, f"indented without a step above: {step.text}"
        first, *rest = step.files
        ways = [(caller, first) for caller in callers[-1:]] + [(first, each) for each in rest]
        callers.append(first)
        for caller, called in ways:
            if LAYERS.index(layer_of(ROOT / called)) > LAYERS.index(layer_of(ROOT / caller)):
                yield f"{caller} -> {called}"


def test_every_file_that_is_linked_exists() -> None:
    links = LINK.findall(PAGE)
    assert len(links) > 30
    for shown, path in links:
        assert path == f"mailerq/{shown}"
        assert (ROOT / path).is_file(), path


def test_every_name_in_code_marks_exists_in_a_file_of_its_step() -> None:
    assert sum(len(step.marks) for step in steps(PAGE)) > 100
    assert [*unknown_names(PAGE)] == []


@pytest.mark.parametrize(
    "text",
    [
        "- [`turns.py`](../mailerq/turns.py): `EndOfTurn.gone` runs",
        "- [`turns.py`](../mailerq/turns.py): `gone` runs",
        "- [`turns.py`](../mailerq/turns.py): `make_body` runs",
        "- [`turns.py`](../mailerq/turns.py)\n    - the same, `gone`",
        "a paragraph about `gone`",
        "a paragraph about `net/gone.py`",
        "a paragraph about `gone/`",
        "a paragraph about `gone.md`",
        "a paragraph about `mailerq gone`",
    ],
)
def test_a_name_that_does_not_exist_is_found(text: str) -> None:
    assert len([*unknown_names(text)]) == 1


def test_calls_go_down() -> None:
    assert sum(step.depth > 1 for step in steps(PAGE)) > 30
    assert [*upward_calls(PAGE)] == []


def test_a_call_that_goes_up_is_found() -> None:
    def item(depth: int, *files: str) -> str:
        return "  " * depth + "- " + ", ".join(f"[`{f}`](../mailerq/{f})" for f in files) + "\n"

    dispatcher, client, stream = "outbound/dispatcher.py", "wire/client.py", "net/stream.py"
    assert [*upward_calls(item(0, dispatcher) + item(1, stream) + item(2, client))] == []
    assert [*upward_calls(item(0, dispatcher) + item(1, client) + item(2, stream))]
    assert [*upward_calls(item(0, stream) + item(1, client, dispatcher))]
    assert [*upward_calls(item(0, client, stream))]


def test_the_files_of_the_queue_directory_are_in_the_source() -> None:
    source = "".join(path.read_text() for path in (ROOT / "mailerq").rglob("*.py"))
    for name in QUEUE_FILES:
        assert f'"{name}"' in source, name


def test_every_file_that_contributing_names_exists() -> None:
    marks = {mark for mark in MARK.findall(CONTRIBUTING) if not re.search(r"[\s*]", mark)}
    files = {mark for mark in marks if "/" in mark or mark.endswith((".py", ".md"))}
    files |= set(re.findall(r"\]\(([^):]+)\)", CONTRIBUTING))
    assert len(files) > 30
    places = (ROOT, ROOT / "mailerq", ROOT / "mailerq" / "queues")
    assert [file for file in files if not any((place / file).exists() for place in places)] == []


def test_every_module_in_the_table_of_contributing_exists() -> None:
    table = re.findall(r"^\| (`.*?) \|", CONTRIBUTING, re.MULTILINE)
    modules = [name.strip("/") for row in table for name in MARK.findall(row)]
    modules = modules[: modules.index("cli") + 1]
    assert {*LAYERS} - {*modules} <= {"__main__"}
    assert {*modules} <= {*LAYERS}
