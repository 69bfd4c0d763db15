r"""Fill in variables, conditions and loops in a text, for the property ``data``.

Theory of operation
-------------------
A template is compiled once into nested functions, and rendered with a dict of variables. The
language has values of JSON only: no attribute, no call and no import can be expressed, so a
template reaches nothing but the variables and the functions of `mailerq.mail.modifiers`.

A `Budget` bounds the work. Each tag, token, loop and operation takes a step, a long text takes
more, and the output has a limit. So neither a hostile template nor hostile data can take long or
grow. One budget serves all parts of a mail.

A brace that starts no tag is text, as in a style sheet: a tag starts with ``{$`` or with a word of
the language.

>>> Template("{if $n > 1}{$n} x {/if}{$name|upper}").render({"n": 2, "name": "<ann>"})
'2 x <ANN>'
>>> Template("Hi {$name}!").render({"name": "<ann>"}, escape=html.escape)
'Hi &lt;ann&gt;!'
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from mailerq.mail.modifiers import MODIFIERS, Modifier
from mailerq.mail.values import (
    Budget,
    Raw,
    TemplateError,
    add,
    as_text,
    compare,
    divide,
    is_true,
    item_of,
    multiply,
    remainder,
    subtract,
)

__all__ = ["Budget", "Template", "TemplateError", "html"]

NESTING_LIMIT: Final = 30
"""Depth of blocks, and of brackets in an expression."""

_TAG: Final = re.compile(
    r"\{(?:\*|(?=\$)|(?P<open>if|elseif|foreach|assign)(?=[\s(!\"'$-])"
    r"|(?P<word>else|foreachelse|literal|ldelim|rdelim|/if|/foreach)\s*\})"
).search
_END_OF_LITERAL: Final = re.compile(r"\{/literal\s*\}").search
_BLANK: Final = re.compile(r"\s*").match
_VARIABLE: Final = re.compile(r"\$([A-Za-z_]\w*)((?:\.\w+)*)", re.ASCII).match
_KEYS: Final = re.compile(r"(?:\.\w+)+", re.ASCII).match
_NUMBER: Final = re.compile(r"\d{1,15}(?:\.\d{1,15})?(?![\w.])", re.ASCII).match
_TEXT: Final = re.compile(
    r'"([^"\\]*+(?:\\.[^"\\]*+)*)"'
    r"|'([^'\\]*+(?:\\.[^'\\]*+)*)'",
    re.DOTALL,
).match
_WORD: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII).match
_OPERATOR: Final = re.compile(r"=>|==|!=|<=|>=|&&|\|\||[-+*/%<>!|:()\[\]}=]").match
_ESCAPES: Final = re.compile(r"\\(.)", re.DOTALL).sub

_WORDS: Final = {"and": "&&", "or": "||", "not": "!", "eq": "==", "ne": "!=", "neq": "!=",
                 "lt": "<", "gt": ">", "le": "<=", "lte": "<=", "ge": ">=", "gte": ">=",
                 "mod": "%"}  # fmt: skip
_CONSTANTS: Final = {"true": True, "false": False, "null": None}
_COMPARISONS: Final = frozenset(("==", "!=", "<", ">", "<=", ">="))
_SUMS: Final = {"+": add, "-": subtract}
_PRODUCTS: Final = {"*": multiply, "/": divide, "%": remainder}

Value = Callable[["_Run"], Any]
Node = Callable[["_Run"], None]
Escape = Callable[[str], str]
Operation = Callable[[Any, Any], Any]


def _as_it_is(text: str) -> str:
    return text


class _Run:
    """One rendering: the variables, the output, and the line that is at work."""

    __slots__ = ("budget", "escape", "escape_raw", "line", "out", "variables")

    def __init__(
        self, variables: Mapping[str, Any], budget: Budget, escape: Escape, escape_raw: Escape
    ) -> None:
        self.variables = dict(variables)
        self.budget = budget
        self.escape = escape
        self.escape_raw = escape_raw
        self.out: list[str] = []
        self.line = 1

    def write(self, text: str) -> None:
        self.budget.write(len(text))
        self.out.append(text)


class Template:
    """A compiled template. Raises `TemplateError` for a mistake in the text.

    `budget` pays for compiling.
    """

    __slots__ = ("_nodes", "is_plain")

    is_plain: bool
    """The text has no tags, and renders as it is."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        parser = _Parser(text, budget or Budget())
        try:
            self._nodes = parser.template()
        except TemplateError as error:
            raise error.at(parser.line) from None
        self.is_plain = not parser.tags

    def render(
        self,
        variables: Mapping[str, Any],
        budget: Budget | None = None,
        *,
        escape: Escape = _as_it_is,
        escape_raw: Escape = _as_it_is,
    ) -> str:
        """Return the text with `variables` filled in.

        Each value goes through `escape`, or through `escape_raw` if it is `raw`. Raises
        `TemplateError` for a value that cannot be used, and beyond the budget.
        """
        run = _Run(variables, budget or Budget(), escape, escape_raw)
        try:
            for node in self._nodes:
                node(run)
        except TemplateError as error:
            raise error.at(run.line) from None
        return "".join(run.out)


class _Parser:
    """A parser by recursive descent, whose recursion has a limit."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.tags = 0
        self._text = text
        self._at = 0
        self._budget = budget
        self._depth = 0
        self._counted = 0  # `_lines` line ends are before this offset
        self._lines = 0
        self._start = 0

    @property
    def line(self) -> int:
        """The line of the current tag, from 1."""
        self._lines += self._text.count("\n", self._counted, self._start)
        self._counted = self._start
        return self._lines + 1

    # Blocks

    def template(self) -> list[Node]:
        """Compile the whole text."""
        nodes, end = self._block()
        if end:
            raise TemplateError(f"{{{end}}} closes nothing")
        return nodes

    def _block(self) -> tuple[list[Node], str]:
        """Compile up to a tag that ends the block, and return the word of that tag."""
        nodes: list[Node] = []
        while match := _TAG(self._text, self._at):
            self._add_text(nodes, self._at, match.start())
            self._at, self._start = match.end(), match.start()
            self.tags += 1
            self._budget.spend(1)
            word = match["word"] or match["open"]
            if match["word"] in ("ldelim", "rdelim", "literal"):
                self._add_literal(nodes, match["word"])
            elif match["word"] or word == "elseif":
                return nodes, word
            elif word == "if":
                nodes.append(self._nested(self._if))
            elif word == "foreach":
                nodes.append(self._nested(self._foreach))
            elif word == "assign":
                nodes.append(self._assign())
            elif self._text.startswith("*", self._at - 1):
                self._skip_comment()
            else:
                nodes.append(self._output())
        self._add_text(nodes, self._at, len(self._text))
        self._at = len(self._text)
        return nodes, ""

    def _nested(self, block: Callable[[int], Node]) -> Node:
        self._deeper()
        node = block(self.line)
        self._depth -= 1
        return node

    def _add_text(self, nodes: list[Node], start: int, end: int) -> None:
        if start < end:
            text = self._text[start:end]
            nodes.append(lambda run: run.write(text))

    def _add_literal(self, nodes: list[Node], word: str) -> None:
        if word != "literal":
            brace = "{" if word == "ldelim" else "}"
            nodes.append(lambda run: run.write(brace))
            return
        end = _END_OF_LITERAL(self._text, self._at)
        if end is None:
            raise TemplateError("{literal} is not closed")
        self._add_text(nodes, self._at, end.start())
        self._at = end.end()

    def _skip_comment(self) -> None:
        end = self._text.find("*}", self._at)
        if end < 0:
            raise TemplateError("the comment is not closed")
        self._at = end + 2

    def _if(self, line: int) -> Node:
        branches: list[tuple[int, Value, list[Node]]] = []
        otherwise: list[Node] = []
        condition = self._condition()
        while True:
            nodes, end = self._block()
            branches.append((line, condition, nodes))
            if end != "elseif":
                break
            line = self.line
            condition = self._condition()
        if end == "else":
            otherwise, end = self._block()
        if end != "/if":
            self._unclosed("if", end)

        def choose(run: _Run) -> None:
            chosen = otherwise
            for at, holds, nodes in branches:
                run.line = at
                run.budget.spend(1)
                if is_true(holds(run)):
                    chosen = nodes
                    break
            for node in chosen:
                node(run)

        return choose

    def _condition(self) -> Value:
        value = self._expression()
        self._expect("}")
        return value

    def _foreach(self, line: int) -> Node:
        first = self._loop_variable()
        key, name, source = "", "", None
        if first and self._take_word("in"):
            name, source = first, self._expression()
        elif first and self._accept("=>"):
            key, name = first, self._name()
            if not self._take_word("in"):
                self._fail("expected 'in'")
            source = self._expression()
        else:
            source = self._expression()
            if not self._take_word("as"):
                self._fail("expected 'in' or 'as'")
            name = self._name()
            if self._accept("=>"):
                key, name = name, self._name()
        self._expect("}")
        nodes, end = self._block()
        otherwise: list[Node] = []
        if end in ("else", "foreachelse"):
            otherwise, end = self._block()
        if end != "/foreach":
            self._unclosed("foreach", end)

        def loop(run: _Run) -> None:
            run.line = line
            pairs = _pairs(source(run))
            variables = run.variables
            if not pairs:
                for node in otherwise:
                    node(run)
                return
            kept = {each: variables[each] for each in (key, name) if each in variables}
            for at, value in pairs:
                run.budget.spend(1)
                if key:
                    variables[key] = at
                variables[name] = value
                for node in nodes:
                    node(run)
            for each in (key, name):
                variables.pop(each, None)
            variables.update(kept)

        return loop

    def _loop_variable(self) -> str:
        """Take a plain variable that 'in' or '=>' follows, or nothing."""
        start = self._at
        match = _VARIABLE(self._text, self._blank())
        if match is not None and not match[2]:
            self._at = match.end()
            behind = self._blank()
            if self._text.startswith("=>", behind) or _is_word(self._text, behind, "in"):
                return match[1]
        self._at = start
        return ""

    def _assign(self) -> Node:
        line = self.line
        value = self._expression()
        if not self._take_word("to"):
            self._fail("expected 'to'")
        name = self._name()
        self._expect("}")

        def store(run: _Run) -> None:
            run.line = line
            run.budget.spend(1)
            run.variables[name] = value(run)

        return store

    def _output(self) -> Node:
        line = self.line
        value = self._expression()
        self._expect("}")

        def write(run: _Run) -> None:
            run.line = line
            shown = value(run)
            text = as_text(shown)
            run.budget.spend_on(text)
            run.write(run.escape_raw(text) if type(shown) is Raw else run.escape(text))

        return write

    # Expressions, from the loosest operator to the tightest

    def _expression(self) -> Value:
        self._deeper()
        value = self._any_of()
        self._depth -= 1
        return value

    def _any_of(self) -> Value:
        values = [self._all_of()]
        while self._accept("||"):
            values.append(self._all_of())
        return _one_or(values, lambda run: any(is_true(value(run)) for value in values))

    def _all_of(self) -> Value:
        values = [self._comparison()]
        while self._accept("&&"):
            values.append(self._comparison())
        return _one_or(values, lambda run: all(is_true(value(run)) for value in values))

    def _comparison(self) -> Value:
        negations = 0
        while self._accept("!"):
            negations += 1
        value = self._sum()
        operator = self._peek()
        if operator in _COMPARISONS:
            self._accept(operator)
            value = _compared(operator, value, self._sum())
        if not negations:
            return value
        expected = negations % 2 == 0
        return lambda run: is_true(value(run)) is expected

    def _sum(self) -> Value:
        return self._chain(_SUMS, self._product)

    def _product(self) -> Value:
        return self._chain(_PRODUCTS, self._unary)

    def _chain(self, operations: Mapping[str, Operation], operand: Callable[[], Value]) -> Value:
        first = operand()
        rest: list[tuple[Operation, Value]] = []
        while (operator := self._peek()) in operations:
            self._accept(operator)
            rest.append((operations[operator], operand()))
        if not rest:
            return first

        def calculate(run: _Run) -> Any:
            result = first(run)
            for operation, value in rest:
                run.budget.spend(1)
                result = operation(result, value(run))
            return result

        return calculate

    def _unary(self) -> Value:
        negative = False
        while self._accept("-"):
            negative = not negative
        value = self._modified()
        return _negated(value) if negative else value

    def _modified(self) -> Value:
        value = self._primary()
        chain: list[tuple[Modifier, list[Value]]] = []
        while self._accept("|"):
            chain.append(self._modifier())
        if not chain:
            return value

        def modify(run: _Run) -> Any:
            result = value(run)
            for modifier, arguments in chain:
                given = [argument(run) for argument in arguments]
                run.budget.spend_on(result, *given)
                result = modifier.apply(run.budget, result, *given)
                run.budget.spend_on(result)
            return result

        return modify

    def _modifier(self) -> tuple[Modifier, list[Value]]:
        match = _WORD(self._text, self._blank())
        modifier = MODIFIERS.get(match[0]) if match else None
        if match is None or modifier is None:
            self._fail("expected a modifier")
        self._at = match.end()
        arguments: list[Value] = []
        while self._accept(":"):
            negative = self._accept("-")
            value = self._primary()
            arguments.append(_negated(value) if negative else value)
        if not modifier.least <= len(arguments) <= modifier.most:
            raise TemplateError(
                f"the modifier {match[0]} takes {modifier.arity}, found {len(arguments)}"
            )
        return modifier, arguments

    def _primary(self) -> Value:
        self._budget.spend(1)
        text, start = self._text, self._blank()
        if match := _VARIABLE(text, start):
            self._at = match.end()
            return self._variable(match[1], match[2])
        if match := _NUMBER(text, start):
            self._at = match.end()
            return _constant(float(match[0]) if "." in match[0] else int(match[0]))
        if match := _TEXT(text, start):
            self._at = match.end()
            found = _ESCAPES(_unescape, match[1] if match[1] is not None else match[2])
            self._budget.spend(len(found) >> 6)
            return _constant(found)
        if self._accept("("):
            value = self._expression()
            self._expect(")")
            return value
        if (match := _WORD(text, start)) and match[0].lower() in _CONSTANTS:
            self._at = match.end()
            return _constant(_CONSTANTS[match[0].lower()])
        self._fail("expected a value")

    def _variable(self, name: str, keys: str) -> Value:
        path: list[str | Value] = [*keys.split(".")[1:]]
        while True:
            if self._text.startswith("[", self._at):
                self._at += 1
                path.append(self._expression())
                self._expect("]")
            elif match := _KEYS(self._text, self._at):
                self._at = match.end()
                path += match[0].split(".")[1:]
            else:
                break
        if not path:

            def plain(run: _Run) -> Any:
                run.budget.spend(1)
                return run.variables.get(name)

            return plain

        def value(run: _Run) -> Any:
            found = run.variables.get(name)
            run.budget.spend(len(path))
            for key in path:
                found = item_of(found, key if isinstance(key, str) else key(run))
            return found

        return value

    # Tokens

    def _blank(self) -> int:
        """Skip blanks."""
        match = _BLANK(self._text, self._at)
        assert match is not None, "it may be empty"
        self._at = match.end()
        return self._at

    def _peek(self) -> str:
        """Return the next operator, or an empty string."""
        at = self._blank()
        if match := _OPERATOR(self._text, at):
            return match[0]
        if match := _WORD(self._text, at):
            return _WORDS.get(match[0].lower(), "")
        return ""

    def _accept(self, operator: str) -> bool:
        """Take the operator if it is next."""
        if self._peek() != operator:
            return False
        self._budget.spend(1)
        match = _OPERATOR(self._text, self._at) or _WORD(self._text, self._at)
        assert match is not None, "it was seen"
        self._at = match.end()
        return True

    def _expect(self, operator: str) -> None:
        if not self._accept(operator):
            self._fail(f"expected '{operator}'")

    def _take_word(self, word: str) -> bool:
        if not _is_word(self._text, self._blank(), word):
            return False
        self._at += len(word)
        return True

    def _name(self) -> str:
        match = _VARIABLE(self._text, self._blank())
        if match is None or match[2]:
            self._fail("expected a variable such as $x")
        self._at = match.end()
        return match[1]

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > NESTING_LIMIT:
            raise TemplateError(f"is nested more than {NESTING_LIMIT} deep")

    def _fail(self, text: str) -> NoReturn:
        found = self._text[self._at : self._at + 20].partition("\n")[0]
        raise TemplateError(f"{text}, found {ascii(found) if found else 'the end'}")

    def _unclosed(self, word: str, end: str) -> NoReturn:
        raise TemplateError(
            f"{{{word}}} is not closed" if not end else f"{{{end}}} stands within {{{word}}}"
        )


def _is_word(text: str, at: int, word: str) -> bool:
    match = _WORD(text, at)
    return match is not None and match[0].lower() == word


def _unescape(match: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(match[1], match[1])


def _constant(value: Any) -> Value:
    return lambda run: value


def _compared(operator: str, left: Value, right: Value) -> Value:
    def value(run: _Run) -> bool:
        first, second = left(run), right(run)
        run.budget.spend_on(first, second)
        return compare(operator, first, second)

    return value


def _negated(value: Value) -> Value:
    return lambda run: subtract(0, value(run))


def _one_or(values: Sequence[Value], all_of_them: Value) -> Value:
    return values[0] if len(values) == 1 else all_of_them


def _pairs(source: object) -> list[tuple[Any, Any]]:
    """The keys and values to loop over."""
    if source is None:
        return []
    if isinstance(source, Mapping):
        return list(source.items())
    if isinstance(source, list | tuple):
        return list(enumerate(source))
    raise TemplateError("foreach needs an array or an object")
