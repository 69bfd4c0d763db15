"""What ``make run``, ``build`` and ``debug`` would compile, by what is there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

EXTENSIONS = "MQ_UNCOMPILED=1 .venv/bin/python setup.py"
MODULES = "Compiling the modules that every message goes through"

# What a ``make`` that runs these tests hands down to every other ``make``.
INHERITED = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "VENV")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with two modules that can be compiled, where all is set up and nothing is built."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        *("setup.py", "pyproject.toml", "include/mailerq.h", "tools/install", "tools/packages"),
        *("tools/requirements.py", "mailerq/_core.pyx", "mailerq/_core.pxd"),
        *("mailerq/wire/_lines.pyx", "mailerq/wire/a.py", "mailerq/wire/a.pxd"),
        "mailerq/mail/_canonical.pyx",
        *("mailerq/b.py", "mailerq/b.pxd", "mailerq/plain.py", ".venv/bin/python"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv/.base").touch()
    return tmp_path


def built(tree: Path, *names: str) -> None:
    for name in names:
        (tree / f"mailerq/{name}.cpython-311.so").touch()


def would(tree: Path, target: str) -> str:
    own = {name: value for name, value in os.environ.items() if name not in INHERITED}
    done = subprocess.run(
        ["make", "-n", target], cwd=tree, env=own, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_fresh_tree_is_made_ready_by_the_extensions_alone(tree: Path) -> None:
    said = would(tree, "ready")
    assert EXTENSIONS in said
    assert MODULES not in said
    built(tree, "_core", "wire/_lines", "mail/_canonical")
    (tree / ".venv/.core").touch()
    assert EXTENSIONS not in would(tree, "ready")


def test_where_modules_were_compiled_none_stays_stale_or_missing(tree: Path) -> None:
    built(tree, "_core", "wire/_lines", "mail/_canonical", "wire/a", "b")
    for stamp in (".core", ".hot", ".installed"):
        (tree / ".venv" / stamp).touch()
    assert MODULES not in would(tree, "ready")
    (tree / "mailerq/b.py").write_text("changed")
    assert MODULES in would(tree, "ready")
    (tree / ".venv/.hot").touch()
    (tree / "mailerq/b.cpython-311.so").unlink()
    assert MODULES in would(tree, "ready")
    (tree / "mailerq/wire/a.cpython-311.so").unlink()
    assert MODULES not in would(tree, "ready")
    assert MODULES in would(tree, "build")


def test_what_was_compiled_from_a_module_that_is_gone_is_removed(tree: Path) -> None:
    built(tree, "_core", "wire/_lines", "mail/_canonical", "wire/a", "b", "gone")
    for stamp in (".core", ".hot", ".installed"):
        (tree / ".venv" / stamp).touch()
    assert "rm -f mailerq/gone.cpython-311.so" in " ".join(would(tree, "build").split())


def test_nothing_is_compiled_a_second_time_to_install_it(tree: Path) -> None:
    said = would(tree, "build")
    assert said.count("setup.py") == 2
    assert ".venv/bin/python tools/install" in said
    assert "--editable" not in said


def test_assertions_are_compiled_in_a_copy(tree: Path) -> None:
    built(tree, "_core", "wire/_lines", "mail/_canonical")
    (tree / ".venv/.test").touch()
    lines = would(tree, "assertions").splitlines()
    compiling = [line for line in lines if "build_ext" in line]
    assert [line.partition(" && ")[0] for line in compiling] == ["cd build/copy"]
    assert "MQ_DEBUG=1" in compiling[0]
    assert [line for line in lines if "rm " in line] == ["rm -rf build/copy && mkdir -p build/copy"]
