"""docs/architecture.md names files and functions that exist, and its calls go down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support import ROOT
from tools.check_tree import LAYERS, layer_of

PAGE = (ROOT / "docs" / "architecture.md").read_text()
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./(mailerq/[^)]+)\)")
NAME = re.compile(r"`([A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_][A-Za-z_0-9]*)?)`")


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


def steps() -> list[tuple[int, list[str], str]]:
    """Each item of a list: its depth, the files that it links to, and its text."""
    items: list[tuple[int, list[str], str]] = []
    for item in re.findall(r"^ *- \[.*(?:\n {2,}(?!- ).*)*", PAGE, re.MULTILINE):
        depth = (len(item) - len(item.lstrip())) // 2
        items.append((depth, [path for _, path in LINK.findall(item)], item))
    return items


def test_every_file_that_is_named_exists() -> None:
    links = LINK.findall(PAGE)
    assert len(links) > 30
    for shown, path in links:
        assert path == f"mailerq/{shown}"
        assert (ROOT / path).is_file(), path


def test_every_function_that_is_named_is_in_a_file_of_its_step() -> None:
    everything = {name for path in (ROOT / "mailerq").rglob("*.py") for name in names_in(path)}
    checked = 0
    for _, files, text in steps():
        there = {name for file in files for name in names_in(ROOT / file)}
        for name in NAME.findall(LINK.sub("", text)):
            if name in everything or "." in name:
                checked += 1
                assert name in there or name in {"Flow.next_job", "Flow.settle"}, (name, files)
                assert name in everything, name
    assert checked > 30


def test_calls_go_down() -> None:
    above: list[int] = []
    for depth, files, text in steps():
        layers = [LAYERS.index(layer_of(ROOT / file)) for file in files[:1]]
        del above[depth:]
        if above:
            assert layers[0] <= above[-1], text
        above += layers
