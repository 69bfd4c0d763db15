"""The pages below docs/ say what the program does: their tables are made, their examples work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mailerq.config import SETTINGS, Config
from mailerq.mail.extract import FIELDS
from mailerq.mail.modifiers import ALIASES, MODIFIERS
from mailerq.mail.template import Template
from mailerq.message import Message
from mailerq.properties import PROPERTIES
from mailerq.rules.documents import examine
from tests.support import ROOT
from tools import docs

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_what_the_tables_make_of_it(path: Path) -> None:
    text = path.read_text()
    assert text == docs.filled(text), f"docs/{path.name} is out of date: run 'make docs'"


def test_every_table_stands_in_a_page_once() -> None:
    found = [name for path in PAGES for _, name, _ in docs.MADE.findall(path.read_text())]
    assert sorted(found) == sorted(docs.TABLES)


def test_each_row_of_the_program_has_its_row() -> None:
    messages, settings = (
        (ROOT / f"docs/{name}.md").read_text() for name in ("messages", "settings")
    )
    for known in PROPERTIES:
        assert messages.count(f"\n| `{known.name}` | {known.expected} |") == 1
    for name in FIELDS:
        assert f"\n| `{name if name.startswith('x-') else f'x-mq-{name}'}` |" in messages
    for setting in SETTINGS:
        assert settings.count(f"\n| `{setting.key}` |") == 1


def test_no_cell_ends_its_row() -> None:
    for path in PAGES:
        for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_the_documents_in_the_pages_are_good() -> None:
    blocks = [
        block
        for path in PAGES
        for block in re.findall(r"```json\n(.*?)```", path.read_text(), re.DOTALL)
    ]
    assert len(blocks) == 6
    for block in blocks:
        document = json.loads(block)
        document.setdefault("mime", "")  # reports are without their mail
        found = list(examine(Message.from_dict(document), Config(hostname="x.test"), now=0))
        assert {finding.level for finding in found} <= {"note"}, found


MESSAGES = (ROOT / "docs" / "messages.md").read_text()
TEMPLATES = re.findall(
    r"^\| `((?:[^`|]|\\\|)*)` \| (?:`((?:[^`|]|\\\|)*)` )?\|$",
    MESSAGES.partition("| template | text |\n")[2].partition("\n\n")[0],
    re.MULTILINE,
)


@pytest.mark.parametrize(("template", "text"), TEMPLATES)
def test_a_template_of_the_page_becomes_the_text_beside_it(template: str, text: str) -> None:
    (data,) = re.findall(r"^```text\n(\{.*?)^```", MESSAGES, re.MULTILINE | re.DOTALL)
    compiled = Template(template.replace("\\|", "|"))
    assert compiled.render(json.loads(data)) == text.replace("\\|", "|")


def test_each_row_with_a_template_is_tried() -> None:
    rows = MESSAGES.partition("| template | text |\n")[2].partition("\n\n")[0].splitlines()
    assert len(TEMPLATES) == len(rows) - 1


@pytest.mark.parametrize("name", MODIFIERS)
def test_the_example_of_a_modifier_is_a_template(name: str) -> None:
    example = MODIFIERS[name].example
    assert f"|{ALIASES.get(name, name)}" in example
    assert not Template(example + "{/if}" * example.startswith("{if")).is_plain


def test_the_files_that_the_pages_and_readme_name_are_there() -> None:
    for path in (*PAGES, ROOT / "README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name} names {link}"


def test_the_program_rewrites_what_is_out_of_date(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "mailerq").symlink_to(ROOT / "mailerq")
    (tmp_path / "tools/docs.py").write_bytes((ROOT / "tools/docs.py").read_bytes())
    page.write_text("before\n<!-- made: limits -->\nold\n<!-- /made -->\nafter\n")
    for said in ("docs/page.md is new\n", ""):
        done = subprocess.run(
            [sys.executable, tmp_path / "tools/docs.py"], capture_output=True, text=True, check=True
        )
        assert done.stdout == said
    text = page.read_text()
    assert text.startswith("before\n<!-- made: limits -->\n| what |")
    assert text.endswith("|\n<!-- /made -->\nafter\n")
