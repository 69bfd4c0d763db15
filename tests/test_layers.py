"""Imports point down the list of layers; the checker itself sees what it should see."""

from pathlib import Path

import pytest

from tools import check_tree


def test_no_import_breaks_the_layers() -> None:
    assert [*check_tree.broken_layers()] == []


def test_no_file_is_too_long() -> None:
    assert [*check_tree.long_files()] == []


def test_no_group_is_possessive(tmp_path: Path) -> None:
    assert [*check_tree.possessive_groups()] == []
    (tmp_path / "mailerq").mkdir()
    lines = ("[a-z]++(b[c]*)+", "(?:a)*+", "(a){1,2}+", "(a)?+", "f(a) + b")
    (tmp_path / "mailerq" / "a.py").write_text("\n".join(lines))
    found = [problem.split(":")[1] for problem in check_tree.possessive_groups(tmp_path)]
    assert found == ["2", "3", "4"]


def test_no_compiled_module_uses_match(tmp_path: Path) -> None:
    assert [*check_tree.compiled_matches()] == []
    (tmp_path / "mailerq").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "mailerq" / name).write_text("x = 1\nmatch x:\n    case 1:\n        pass\n")
    (tmp_path / "mailerq" / "a.pxd").touch()
    assert [*check_tree.compiled_matches(tmp_path)] == [
        "mailerq/a.py:2: match in a compiled module"
    ]


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("config.py", "from mailerq.message import Message", "config may not import message"),
        ("config.py", "import mailerq.engine", "config may not import engine"),
        ("config.py", "from mailerq import engine", "config may not import engine"),
        ("config.py", "from . import engine", "config may not import engine"),
        ("config.py", "def f():\n    from mailerq import engine", "config may not import engine"),
        ("wire/a.py", "from ..net.b import c", "wire may not import net"),
        ("wire/a.py", "import trio", "wire may not import trio"),
        ("mail/a.py", "import trio.lowlevel", "mail may not import trio"),
        ("message.py", "def f():\n    import trio", "message may not import trio"),
        ("rules/a.py", "import socket", "rules does no I/O"),
        ("rules/a.py", "import time\nnow = time.time()", "now"),
        ("rules/a.py", "from time import monotonic", "now"),
        ("rules/a.py", "from datetime import datetime\ndatetime.now()", "now"),
        (
            "net/a.py",
            "from mailerq._core import Context",
            "imported by plugins, ids, sockets, privileges, faults, inspection only",
        ),
        ("net/a.py", "import ctypes", "C is called in _core only"),
        ("_core.pyx", "from mailerq.plugins import Reject", "_core may not import plugins"),
        ("_core.pyx", "    import trio", "_core may not import trio"),
        ("_core_ids.pxi", "from mailerq import engine", "_core may not import engine"),
        ("__init__.py", "from mailerq import config", "before it is used"),
        ("outbound/a.py", "from mailerq.inbound import b", "outbound may not import inbound"),
        ("inbound/a.py", "from mailerq.outbound import b", "inbound may not import outbound"),
        (
            "queues/embedded/a.py",
            "from mailerq.queues.opening import b",
            "may not import queues.opening",
        ),
        (
            "queues/recovery/a.py",
            "import mailerq.queues.opening",
            "may not import queues.opening",
        ),
        (
            "cli/a.py",
            "def f():\n    from mailerq.queues.rabbitmq.queues import b",
            "queues.rabbitmq.queues.b is a backend",
        ),
        ("engine.py", "from mailerq.queues import embedded", "queues.embedded is a backend"),
        ("inbound/a.pxd", "from mailerq.queues.recovery.b cimport C", "is a backend"),
        ("outbound/a.py", "import mailerq.queues.fallback", "queues.fallback is a backend"),
        ("unheard.py", "", "not in the list of layers"),
    ],
)
def test_an_import_that_breaks_the_layers_is_found(
    tmp_path: Path, name: str, source: str, problem: str
) -> None:
    path = tmp_path / "mailerq" / name
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    (found,) = check_tree.broken_layers(tmp_path)
    assert found.startswith(f"mailerq/{name}:{max(1, len(source.splitlines()))}: ")
    assert problem in found


def test_one_file_may_call_an_optional_library(tmp_path: Path) -> None:
    path = tmp_path / "mailerq" / "net" / "unbound.py"
    path.parent.mkdir(parents=True)
    path.write_text("import ctypes\n")
    assert list(check_tree.broken_layers(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("net/a.py", "import trio\nfrom mailerq.net import b\nfrom mailerq import config, errors"),
        ("wire/a.py", "import time\ntime.gmtime(0)"),
        ("plugins.py", "from mailerq import _core"),
        ("cli/a.py", "from mailerq.queues.opening import open_files"),
        ("queues/a.py", "from mailerq.queues.embedded import b"),
        ("__init__.py", "if TYPE_CHECKING:\n    from mailerq.engine import Engine"),
        ("rules/__pycache__/a.py", "import trio"),
    ],
)
def test_an_import_that_points_down_is_left_alone(tmp_path: Path, name: str, source: str) -> None:
    path = tmp_path / "mailerq" / name
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert [*check_tree.broken_layers(tmp_path)] == []


def test_a_long_file_is_found_unless_it_is_generated(tmp_path: Path) -> None:
    for name in ("a.py", "_core.c", "build/b.py", ".venv/c.py", "short.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n" * (check_tree.LINES_LIMIT + (name != "short.md")))
    assert [*check_tree.long_files(tmp_path)] == ["a.py:801: has 801 lines, 800 is the limit"]
