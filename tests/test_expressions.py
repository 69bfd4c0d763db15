"""Every regular expression of the package reads hostile text in time that grows with its length.

The expressions are found in the source, so a new one is tested from its first day.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from time import thread_time
from typing import Any, NamedTuple

import pytest

import mailerq

PACKAGE = Path(mailerq.__file__).parent

METHODS = {"match", "fullmatch", "search", "sub", "split", "findall", "finditer"}

OPERATORS_OWN = {"rules/addresses.py"}
"""Compile what an operator wrote; the addresses that they are tried on have 254 bytes."""

LOCALS: dict[str, dict[str, Any]] = {"mail/headers.py": {"name": b"received"}}
"""What stands in an expression that a function makes."""

UNITS = (
    " ", "\t", "\r", "\n", "\r\n", "\r\n ", " \r\n", "a", "0", ".", "a.", "-", "a-", "\\", '\\"',
    '"', '""', "(", "()", "<", ">", "[", "@", ",@a", ":", ",", ";", "+", "+41", "=", "é", "\0",
)  # fmt: skip
PREFIXES = ("", "a", 'a@"', '"', "<", '<"', "@", "[", "2.1.", "250-")
SUFFIXES = ("", "!", "\0", "\r\n")
SIZES = (12, 16, 20, 24, 28, 64, 512, 4096)

SECONDS_PER_CHARACTER = 2e-6
"""Ten times what a slow machine needs; a square of 4096 needs 10 ms at least."""

SECONDS = 1e-3


class Expression(NamedTuple):
    """A pattern and how it is used; `where` is its place."""

    where: str
    pattern: re.Pattern[Any]
    methods: frozenset[str]


def expressions() -> Iterator[Expression]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in OPERATORS_OWN:
            continue
        source = path.read_text()
        if "import re\n" not in source:
            continue
        tree = ast.parse(source)
        methods = {
            node.value: node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        of_name: dict[str, set[str]] = {}
        for value, method in methods.items():
            if isinstance(value, ast.Name) and method in METHODS:
                of_name.setdefault(value.id, set()).add(method)
        names = {
            node.value: target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(target := assigned(node), ast.Name)
        }
        module = None
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and is_of_re(node.func)):
                continue
            assert isinstance(node.func, ast.Attribute)
            module = module or importlib.import_module(module_name(name))
            # Of a function's own names only `LOCALS` knows: else this fails, and says where.
            scope = {"re": re, **LOCALS.get(name, {})}
            code = ast.Expression(ast.Call(reference("compile"), *arguments(node)))
            ast.fix_missing_locations(code)
            pattern = eval(compile(code, str(path), "eval"), scope | vars(module))
            if node.func.attr != "compile":
                used = {node.func.attr}
            elif node in methods:
                used = {methods[node]}
            else:
                used = of_name.get(names.get(node, ""), set())
            yield Expression(f"{name}:{node.lineno}", pattern, frozenset(used or METHODS))


def assigned(node: ast.Assign | ast.AnnAssign) -> ast.expr:
    return node.target if isinstance(node, ast.AnnAssign) else node.targets[0]


def is_of_re(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "re"
        and function.attr in METHODS | {"compile"}
    )


def reference(method: str) -> ast.expr:
    return ast.Attribute(ast.Name("re", ast.Load()), method, ast.Load())


def arguments(call: ast.Call) -> tuple[list[ast.expr], list[ast.keyword]]:
    """Pattern and flags of a call of any function of re."""
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr == "compile":
        return call.args, call.keywords
    flags = call.args[2:3] if call.func.attr in METHODS - {"sub", "split"} else []
    return [call.args[0], *flags], [word for word in call.keywords if word.arg == "flags"]


def module_name(path: str) -> str:
    return ".".join(("mailerq", *path.removesuffix(".py").removesuffix("__init__").split("/")))


def texts(pattern: re.Pattern[Any], size: int) -> Iterator[str]:
    source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode()
    for unit in set(source):
        yield size * unit + "!"
    for unit, prefix, suffix in product(UNITS, PREFIXES, SUFFIXES):
        yield prefix + (size // len(unit)) * unit + suffix


def apply(pattern: re.Pattern[Any], method: str, text: Any) -> None:
    if method == "sub":
        pattern.sub(text[:0], text)
    elif method == "finditer":
        for _ in pattern.finditer(text):
            pass
    else:
        getattr(pattern, method)(text)


def slow_text(expression: Expression) -> str | None:
    """A text that takes too long, or None."""
    for size in SIZES:
        limit = SECONDS + SECONDS_PER_CHARACTER * size
        for text in texts(expression.pattern, size):
            given = text if isinstance(expression.pattern.pattern, str) else text.encode()
            for method in expression.methods:
                for _ in range(3):  # a machine that was busy once is not busy three times
                    start = thread_time()
                    apply(expression.pattern, method, given)
                    if thread_time() - start < limit:
                        break
                else:
                    return f"{method} on {size} characters like {text[:20]!r}…{text[-5:]!r}"
    return None


FOUND = list(expressions())


@pytest.mark.parametrize("expression", FOUND, ids=[found.where for found in FOUND])
def test_an_expression_takes_time_in_proportion_to_its_text(expression: Expression) -> None:
    slow = slow_text(expression)
    assert slow is None, f"{expression.pattern.pattern!r} is slow: {slow}"


@pytest.mark.parametrize(
    ("pattern", "method"),
    [
        (rb"[ \t]*(?:\r\n|\n|\r)[ \t]*", "sub"),
        (rb"(?:a+)+!", "match"),
        (r'"(?:[^"]|\\.)*"', "search"),
        (r"\s+$", "search"),
    ],
)
def test_an_expression_that_is_slow_is_found_out(pattern: Any, method: str) -> None:
    assert slow_text(Expression("here", re.compile(pattern), frozenset((method,))))


def test_the_expressions_are_found() -> None:
    places = {found.where.partition(":")[0] for found in FOUND}
    assert {"mail/headers.py", "mail/recipients.py", "address.py", "wire/smtp.py"} <= places
    assert all(found.methods < METHODS for found in FOUND), "one is used in no way that is seen"
