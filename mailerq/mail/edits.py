"""Edit the header of a mail, for the property ``headers``.

The edits are made in this order: ``remove``, ``replace``, ``update``, ``prepend``, ``append``. So a
field that is removed can be added anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from mailerq.mail.fields import FieldError, is_field_name, make_field
from mailerq.mail.parts import FIELDS

__all__ = ["EDITS_LIMIT", "apply_edits", "problems"]

EDITS_LIMIT: Final = 1000
"""Fields that the edits of a message name."""

MAPS: Final = ("prepend", "append", "add", "replace", "update")


def problems(edits: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the property ``headers``, each with its place."""
    count = 0
    for key, value in edits.items():
        if key not in (*MAPS, "remove") or value is None:
            continue
        values: dict[str, Any]
        if key == "remove":
            names = [value] if isinstance(value, str) else value
            if not _are_texts(names):
                yield "property headers.remove: expected a string or an array of strings"
                continue
            values = dict.fromkeys(names, "")
        elif isinstance(value, dict):
            values = value
        else:
            yield f"property headers.{key}: expected an object"
            continue
        for name, texts in values.items():
            count += 1
            if not is_field_name(name):
                yield f"property headers.{key}: {ascii(name)[:80]} is no name of a header field"
            problem = value_problem(texts)
            if problem is not None:
                yield f"property headers.{key}.{name[:80]}: {problem}"
            count += len(texts) if isinstance(texts, list) else 0
    if count > EDITS_LIMIT:
        yield f"property headers: names more than {EDITS_LIMIT} fields"


def value_problem(value: Any) -> str | None:
    """Return what is wrong with a value, or values, for a header field; None if nothing is."""
    texts = value if isinstance(value, list) else [value]
    if not _are_texts(texts):
        return "expected a string or an array of strings"
    if any("\n" in text or "\r" in text or "\0" in text for text in texts):
        return "holds a line end or a NUL"
    return None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def apply_edits(head: bytes, edits: Mapping[str, Any], *, utf8: bool = False) -> bytes:
    r"""Return a header, each field with its CRLF, after the edits. Raises `FieldError`.

    `edits` has no `problems`.

    >>> apply_edits(b"A: 1\r\nB: 2\r\n", {"remove": "a", "replace": {"b": "3"}, "add": {"C": "4"}})
    b'b: 3\r\nC: 4\r\n'
    """
    fields = [
        (_name(field), field + b"\r\n") for field in FIELDS(head.removesuffix(b"\r\n")) if field
    ]
    remove = edits.get("remove")
    gone = {
        name.lower().encode() for name in ([remove] if isinstance(remove, str) else remove or ())
    }
    fields = [field for field in fields if field[0] not in gone]
    fields = _replaced(fields, dict(_made(edits, "replace", utf8)), adds=True)
    fields = _replaced(fields, dict(_made(edits, "update", utf8)), adds=False)
    fields[:0] = _made(edits, "prepend", utf8)
    for key in ("append", "add"):
        fields += _made(edits, key, utf8)
    return b"".join(field for _, field in fields)


def _name(field: bytes) -> bytes:
    name, colon, _ = field.partition(b":")
    return name.rstrip(b" \t").lower() if colon else b""


def _made(edits: Mapping[str, Any], key: str, utf8: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yield each name of an edit in lower case, with its fields."""
    for name, value in (edits.get(key) or {}).items():
        texts = value if isinstance(value, list) else [value]
        try:
            made = b"".join([make_field(name, text, utf8=utf8) for text in texts])
        except FieldError as error:
            raise FieldError(f"headers.{key}.{name}: {error}") from None
        yield name.lower().encode(), made


def _replaced(
    fields: list[tuple[bytes, bytes]], made: dict[bytes, bytes], *, adds: bool
) -> list[tuple[bytes, bytes]]:
    """Put each of `made` in the place of the first field with its name, and drop the others."""
    out: list[tuple[bytes, bytes]] = []
    found: set[bytes] = set()
    for field in fields:
        name = field[0]
        if name not in made:
            out.append(field)
        elif name not in found:
            found.add(name)
            out.append((name, made[name]))
    if adds:
        out += [each for each in made.items() if each[0] not in found]
    return out
