"""The example plugins: each builds as it says, warns of nothing, and does what it promises."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "plugins").glob("*.c"), *(ROOT / "plugins").glob("*.cpp")])
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]

HEADER = (ROOT / "include" / "mailerq.h").read_text()
CALLBACKS = set(re.findall(r"^MQ_EXPORT \w+ (mq_\w+)\(", HEADER, re.MULTILINE))
OFFERED = set(re.findall(r"^MQ_EXPORT [\w ]+[ *](MQ_\w+)\(", HEADER, re.MULTILINE))

examples = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def build_line(source: Path) -> list[str]:
    """The one line in the comment at the top that builds the plugin."""
    (line,) = re.findall(r"^ \*      (c(?:c|\+\+) .*)$", source.read_text(), re.MULTILINE)
    return shlex.split(line)


def build(source: Path, target: Path, *flags: str) -> Path:
    """Build as the plugin's own line says, with the target elsewhere and flags in front."""
    compiler, *arguments = build_line(source)
    assert arguments[arguments.index("-o") + 1] == f"{source.stem}.so"
    arguments[arguments.index("-o") + 1] = str(target)
    subprocess.run([compiler, *flags, *arguments], cwd=source.parent, check=True)
    return target


def symbols(library: Path, *options: str) -> set[str]:
    answer = subprocess.run(
        ["nm", "--dynamic", *options, library], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].partition("@")[0] for line in answer.stdout.splitlines()}


@examples
def test_an_example_builds_with_its_own_line_and_without_a_warning(
    source: Path, tmp_path: Path
) -> None:
    standard = "-std=c99" if source.suffix == ".c" else "-std=c++17"
    library = build(source, tmp_path / "plugin.so", standard, *STRICT)
    exported = {name for name in symbols(library, "--defined-only") if not name.startswith("_")}
    assert "mq_version" in exported
    assert exported <= CALLBACKS
    needed = {name for name in symbols(library, "--undefined-only") if name.startswith("MQ_")}
    assert needed <= OFFERED


@examples
def test_an_example_needs_no_symbol_that_its_line_does_not_link(
    source: Path, tmp_path: Path
) -> None:
    offered = tmp_path / f"offered{source.suffix}"
    linkage = 'extern "C" ' if source.suffix == ".cpp" else ""
    offered.write_text("".join(f"{linkage}void {name}(void) {{}}\n" for name in sorted(OFFERED)))
    library = build(source, tmp_path / "plugin.so", "-Wl,--no-undefined", str(offered))
    assert library.exists()


def test_trace_has_every_callback(tmp_path: Path) -> None:
    source = ROOT / "plugins" / "trace.c"
    library = build(source, tmp_path / "trace.so", "-DTRACE_MESSAGE_ID", *STRICT)
    assert symbols(library, "--defined-only") >= CALLBACKS


def test_trace_leaves_message_ids_alone_unless_told(tmp_path: Path) -> None:
    library = build(ROOT / "plugins" / "trace.c", tmp_path / "trace.so")
    assert CALLBACKS - symbols(library, "--defined-only") == {
        "mq_message_id",
        "mq_message_id_size",
    }


def test_the_readme_lists_every_example() -> None:
    text = (ROOT / "plugins" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\S+)\]\(\1\)", text, re.MULTILINE)
    assert sorted(listed) == [source.name for source in SOURCES]
