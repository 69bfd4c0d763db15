"""Check rules that no linter knows: the layers of modules, and the length of files.

CONTRIBUTING.md has the rules. ``python tools/check_tree.py`` prints violations, one
``file:line: text`` on each line, and fails if there are any. The test suite runs the same checks.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = "mailerq"

LAYERS: Final = (
    "errors",
    "escaping",
    "address",
    "brokers",
    "settings",
    "sources",
    "consistency",
    "table_server",
    "table",
    "table_reports",
    "table_incoming",
    "table_broker",
    "table_storage",
    "table_cluster",
    "config",
    "live",
    "spelling",
    "properties",
    "message",
    "elf",
    "wire",
    "mail",
    "rules",
    "_core",
    "ids",
    "sockets",
    "privileges",
    "faults",
    "inspection",
    "plugins",
    "turns",
    "locks",
    "store",
    "queues",
    "net",
    "storage",
    "inbound",
    "outbound",
    "clustering",
    "preparing",
    "engine",
    "cli",
    "__main__",
)
"""A module may import from its own layer and from earlier ones."""

STRANGERS: Final = (("outbound", "inbound"),)
"""Pairs of layers that may not import each other, whatever their order."""

ROOMS: Final = {
    "queues": ("interface", "embedded", "recovery", "rabbitmq", "fallback", "opening"),
}
"""Within a layer as well: what stands first knows nothing of what comes after it."""

BACKENDS: Final = ("queues.embedded", "queues.recovery", "queues.rabbitmq", "queues.fallback")
"""What no other layer imports: `queues.opening` opens all of them."""

WITH_TRIO: Final = frozenset(
    "plugins turns queues net storage inbound outbound clustering preparing engine cli".split()
)

PURE: Final = frozenset({"wire", "mail", "rules"})
"""Layers without I/O and clock: facts and the time are arguments."""

IO_MODULES: Final = frozenset(
    "apsw asyncio dns multiprocessing select selectors signal socket ssl subprocess "
    "threading".split()
)
CLOCKS: Final = frozenset(
    "time.time time.time_ns time.monotonic time.monotonic_ns time.perf_counter datetime.now "
    "datetime.utcnow datetime.today date.today".split()
)
DOORS_TO_C: Final = ("plugins", "ids", "sockets", "privileges", "faults", "inspection")
"""The only layers that import `_core`."""
WITH_CTYPES: Final = frozenset({f"{PACKAGE}/net/unbound.py"})
"""Calls an optional library, which the build must not need; nothing else imports ctypes or cffi."""

LINES_LIMIT: Final = 800
CYTHON: Final = (".pyx", ".pxd", ".pxi")
# Stubs are for type checkers only, and import nothing at run time.
MODULES: Final = (".py", *CYTHON)
SOURCES: Final = (*MODULES, ".pyi", ".c", ".cpp", ".h", ".sh", ".toml", ".md")
SKIPPED: Final = frozenset({"__pycache__", "build", "dist", "var"})
GENERATED: Final = re.compile(r"_core\w*\.[ch]")


POSSESSIVE_GROUP: Final = re.compile(r"\)(?:[*+?]|\{[0-9,]+\})\+")


class Import(NamedTuple):
    """One imported module, absolute, and the line on which it is named."""

    module: str
    line: int


def layer_of(path: Path, root: Path = ROOT) -> str:
    """Return the layer of a file: its first name below the package; `_core` for all its parts."""
    name = path.relative_to(root / PACKAGE).parts[0].partition(".")[0]
    return "_core" if name.startswith("_core_") else name


def files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below a folder with these suffixes, except hidden and generated ones."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and name[0] != ".")
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def imports_of(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Yield every import of a file, also within functions, except those for type checkers."""
    text = path.read_text()
    if path.suffix in CYTHON:
        for number, line in enumerate(text.splitlines(), start=1):
            if match := re.match(r"\s*(?:from|c?import)\s+([\w.]+)(?:\s+c?import\s+(\w+))?", line):
                yield Import(".".join(filter(None, match.groups())), number)
        return
    package = ".".join(path.relative_to(root).parts[:-1])
    unchecked: list[ast.AST] = [ast.parse(text, str(path))]
    while unchecked:
        node = unchecked.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                unchecked += node.orelse
            case ast.Import():
                yield from (Import(name.name, node.lineno) for name in node.names)
            case ast.ImportFrom():
                base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
                module = ".".join(filter(None, (base, node.module)))
                yield from (Import(f"{module}.{name.name}", node.lineno) for name in node.names)
            case _:
                unchecked += ast.iter_child_nodes(node)


def broken_layers(root: Path = ROOT) -> Iterator[str]:
    """Yield imports of higher layers, of backends and of `_core`, and misplaced trio and I/O."""
    for path in files(root / PACKAGE, MODULES):
        where = path.relative_to(root)
        layer = layer_of(path, root)
        if layer == "__init__":
            for module, line in imports_of(path, root):
                if module.split(".")[0] in (PACKAGE, "trio"):
                    yield f"{where}:{line}: the package imports {module} before it is used"
            continue
        if layer not in LAYERS:
            yield f"{where}:1: {layer} is not in the list of layers"
            continue
        for module, line in imports_of(path, root):
            top, _, rest = module.partition(".")
            if top == PACKAGE:
                other = rest.split(".")[0]
                if other in LAYERS and LAYERS.index(other) > LAYERS.index(layer):
                    yield f"{where}:{line}: {layer} may not import {other}, which is above it"
                if layer == other and _breaks_rooms(layer, path, rest):
                    yield f"{where}:{line}: may not import {rest}, which is above it"
                if layer != "queues" and rest.startswith(BACKENDS):
                    yield f"{where}:{line}: {rest} is a backend, which queues.opening opens"
                if (layer, other) in STRANGERS:
                    yield f"{where}:{line}: {layer} may not import {other}: neither needs the other"
                if other == "_core" and layer not in (*DOORS_TO_C, "_core"):
                    yield f"{where}:{line}: _core is imported by {', '.join(DOORS_TO_C)} only"
            if top == "trio" and layer not in WITH_TRIO:
                yield f"{where}:{line}: {layer} may not import trio"
            if top in IO_MODULES and layer in PURE:
                yield f"{where}:{line}: {layer} does no I/O and may not import {top}"
            if top in ("ctypes", "cffi") and where.as_posix() not in WITH_CTYPES:
                yield f"{where}:{line}: C is called in _core only"
        if layer in PURE and path.suffix == ".py":
            yield from _clocks(path, where)


def _breaks_rooms(layer: str, path: Path, imported: str) -> bool:
    """Whether a file imports from a room of its own layer that stands above its own."""
    rooms = ROOMS.get(layer, ())
    own = [name for name in rooms if name in (*path.parts, path.stem)]
    other = imported.split(".")[1:2]
    if not own or not other or other[0] not in rooms:
        return False
    return rooms.index(other[0]) > rooms.index(own[-1])


def _clocks(path: Path, where: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                names = [f"{owner}.{name}"]
            case ast.ImportFrom(module="time"):
                names = [f"time.{alias.name}" for alias in node.names]
            case _:
                continue
        for name in CLOCKS.intersection(names):
            yield f"{where}:{node.lineno}: {name}: the time is a parameter called now"


def long_files(root: Path = ROOT) -> Iterator[str]:
    """Yield hand-written files that are longer than `LINES_LIMIT`."""
    for path in files(root, SOURCES):
        if not GENERATED.fullmatch(path.name):
            lines = len(path.read_bytes().splitlines())
            if lines > LINES_LIMIT:
                where = path.relative_to(root)
                yield f"{where}:{lines}: has {lines} lines, {LINES_LIMIT} is the limit"


def possessive_groups(root: Path = ROOT) -> Iterator[str]:
    """Yield possessive groups in regular expressions, which Python before 3.11.5 gets wrong."""
    for path in files(root / PACKAGE, (".py",)):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if POSSESSIVE_GROUP.search(line):
                where = path.relative_to(root)
                yield f"{where}:{number}: a group with a possessive repetition"


def compiled_matches(root: Path = ROOT) -> Iterator[str]:
    """Yield match statements of compiled modules: for some, Cython makes code that crashes."""
    for types in files(root / PACKAGE, (".pxd",)):
        path = types.with_suffix(".py")
        if path.exists():
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.Match):
                    yield f"{path.relative_to(root)}:{node.lineno}: match in a compiled module"


def main() -> int:
    """Run all checks; return the exit status."""
    problems = [*broken_layers(), *long_files(), *possessive_groups(), *compiled_matches()]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
