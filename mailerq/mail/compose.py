"""Make a mail of the object in ``mime``: header fields, a text, an HTML text, attachments."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, encodebytes
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError
from mailerq.mail.edits import value_problem
from mailerq.mail.fields import FieldError, address_field, clean, is_field_name, make_field
from mailerq.mail.parts import encode_text

__all__ = ["Changes", "compose", "problems"]

_TYPE: Final = re.compile(
    r"[\w!#$&^.+-]{1,80}/[\w!#$&^.+-]{1,80}(?:; ?[\w-]{1,40}=[\w!#$&^.+-]{1,80}){0,5}", re.ASCII
).fullmatch
_OURS: Final = frozenset(("mime-version", "content-type", "content-transfer-encoding"))
"""Fields that say how the mail is made."""

TEXTS: Final = ("subject", "text", "textVersion", "content")
ADDRESSES: Final = ("from", "to", "cc")


class Changes(NamedTuple):
    """What is done with each piece of a mail: of a header field, of an address field, of a text."""

    words: Callable[[str], str]
    addresses: Callable[[str], str]
    text: Callable[[str], str]
    html: Callable[[str], str]


class Facts(NamedTuple):
    """What the message says about a mail: its addresses, and a name that no other mail has."""

    envelope: str
    recipient: str
    id: str
    utf8: bool = False


def problems(mime: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the property ``mime``, each with its place."""
    for key in TEXTS:
        value = mime.get(key)
        if key == "content" and isinstance(value, dict):
            yield (
                "property mime.content: is an object, and making HTML of blocks is not supported;"
                " put a string of HTML there"
            )
        elif value is not None and not isinstance(value, str):
            yield f"property mime.{key}: expected a string"
    for key in ADDRESSES:
        value = mime.get(key)
        for each in value if isinstance(value, list) and key != "from" else [value]:
            if (problem := _address_problem(each)) is not None:
                yield f"property mime.{key}: {problem}"
                break
    yield from _header_problems(mime.get("headers"), mime)
    attachments = mime.get("attachments")
    if attachments is not None and not isinstance(attachments, list):
        yield "property mime.attachments: expected an array"
        return
    for index, each in enumerate(attachments or ()):
        if (problem := _attachment_problem(each)) is not None:
            yield f"property mime.attachments.{index}: {problem}"
            return


def _address_problem(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict):
        name, address = value.get("name"), _address_of(value)
        if not isinstance(address, str) or not (name is None or isinstance(name, str)):
            return "expected a string for address, and for name"
        value = address
    elif not isinstance(value, str):
        return "expected a string or an object with name and address"
    return value_problem(value)


def _header_problems(headers: object, mime: Mapping[str, Any]) -> Iterator[str]:
    if headers is None:
        return
    if not isinstance(headers, dict):
        yield "property mime.headers: expected an object"
        return
    for name, value in headers.items():
        problem = value_problem(value)
        if not is_field_name(name):
            problem = "is no name of a header field"
        elif name.lower() in _OURS:
            problem = "is a field that the server makes"
        elif mime.get(name.lower()) is not None and name.lower() in (*ADDRESSES, "subject"):
            problem = f"stands in mime.{name.lower()} as well"
        if problem is not None:
            yield f"property mime.headers.{ascii(name)[1:80]}: {problem}".replace("':", ":")
            return


def _attachment_problem(value: object) -> str | None:
    if not isinstance(value, dict):
        return "expected an object"
    data, content = value.get("data"), value.get("content")
    if data is None and content is None:
        if value.get("url") is not None:
            return (
                "has a url, and downloading is not supported; put the content into data, in base64"
            )
        return "has neither data nor content"
    if data is not None and content is not None:
        return "has data and content"
    for key in ("data", "content", "name", "type"):
        if value.get(key) is not None and not isinstance(value[key], str):
            return f"expected a string for {key}"
    if (problem := value_problem(value.get("name") or "")) is not None:
        return f"its name {problem}"
    if value.get("type") is not None and not _TYPE(value["type"]):
        return f"{value['type'][:80]!a} is no media type"
    if data is not None:
        try:
            b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            return f"data: {error}"
    return None


def _address_of(value: Mapping[str, Any]) -> Any:
    address = value.get("address")
    return value.get("email") if address is None else address


def compose(mime: Mapping[str, Any], facts: Facts, changes: Changes) -> tuple[bytes, list[bytes]]:
    """Return the header of the mail and the rest in pieces. Raises `FieldError`.

    `mime` has no `problems`. Date and Message-ID are left to the caller.
    """
    root = _content(mime, facts, changes)
    head = list(_fields(mime, facts, changes))
    head.append(b"MIME-Version: 1.0\r\n")
    return b"".join(head) + root.head, root.pieces


def _fields(mime: Mapping[str, Any], facts: Facts, changes: Changes) -> Iterator[bytes]:
    headers = mime.get("headers") or {}
    given = {name.lower() for name in headers}
    defaults = {"from": facts.envelope, "to": facts.recipient}
    for key in ADDRESSES:
        value = mime.get(key)
        if value is not None:
            each = value if isinstance(value, list) else [value]
            text = ", ".join([_mailbox(one, key, facts, changes) for one in each])
            yield _made(key.capitalize(), text, f"mime.{key}", facts)
        elif key in given:
            continue
        elif address := defaults.get(key):  # no template, whatever characters it has
            yield _made(key.capitalize(), _address(address, key, facts), f"mime.{key}", facts)
        elif key == "from":
            raise FieldError("mime.from: is missing, and there is no envelope to take its place")
    if mime.get("subject") is not None:
        yield _made("Subject", changes.words(mime["subject"]), "mime.subject", facts)
    for name, value in headers.items():
        for one in value if isinstance(value, list) else [value]:
            yield _made(name, changes.words(one), f"mime.headers.{name}", facts)


def _mailbox(value: Any, key: str, facts: Facts, changes: Changes) -> str:
    if isinstance(value, str):
        return changes.addresses(value)
    address = _address(changes.words(_address_of(value)).strip(), key, facts)
    return address_field(changes.words(value.get("name") or ""), address)


def _address(text: str, key: str, facts: Facts) -> str:
    """An address for a field, with its domain in ASCII unless the mail may have UTF-8."""
    try:
        mailbox = parse_mailbox(text)
    except AddressError as error:
        raise FieldError(f"mime.{key}: {error}") from None
    return text if facts.utf8 else str(mailbox)


def _made(name: str, value: str, where: str, facts: Facts) -> bytes:
    try:
        return make_field(name, value, utf8=facts.utf8)
    except FieldError as error:
        raise FieldError(f"{where}: {error}") from None


class _Entity(NamedTuple):
    """The fields of a part, and its content in pieces."""

    head: bytes
    pieces: list[bytes]


def _content(mime: Mapping[str, Any], facts: Facts, changes: Changes) -> _Entity:
    """The texts as alternatives, and the attachments behind them."""
    plain = mime.get("text")
    plain = mime.get("textVersion") if plain is None else plain
    html, attachments = mime.get("content"), mime.get("attachments") or ()
    texts: list[_Entity] = []
    if plain is not None or (html is None and not attachments):
        texts.append(_text(b"text/plain", changes.text(plain or "")))
    if html is not None:
        texts.append(_text(b"text/html", changes.html(html)))
    entities = [_together(b"alternative", texts, facts)] if len(texts) > 1 else texts
    if attachments:
        entities += [_attachment(value, number) for number, value in enumerate(attachments)]
        return _together(b"mixed", entities, facts)
    return entities[0]


def _text(kind: bytes, text: str) -> _Entity:
    encoding, content = encode_text(text)
    head = b"Content-Type: %b; charset=utf-8\r\nContent-Transfer-Encoding: %b\r\n"
    return _Entity(head % (kind, encoding), [content])


def _attachment(value: Mapping[str, Any], number: int) -> _Entity:
    kind, name = value.get("type"), clean(value.get("name") or "")
    if value.get("content") is not None:
        data, kind = value["content"].encode(errors="replace"), kind or "text/plain; charset=utf-8"
    else:
        data, kind = b64decode(value["data"]), kind or "application/octet-stream"
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    file = f'; filename="{escaped}"' if name else ""
    try:
        disposition = make_field("Content-Disposition", f"attachment{file}")
    except FieldError as error:
        raise FieldError(f"mime.attachments.{number}: its name {error}") from None
    head = b"Content-Type: %b\r\n%bContent-Transfer-Encoding: base64\r\n"
    head %= kind.encode(), disposition
    return _Entity(head, [encodebytes(data).replace(b"\n", b"\r\n")])


def _together(kind: bytes, entities: list[_Entity], facts: Facts) -> _Entity:
    """Make a multipart. Its boundary depends on the message only: each attempt makes the same."""
    number = 0
    while True:
        seed = f"{facts.id} {facts.recipient} {number}".encode(errors="replace")
        boundary = b"=_" + kind[:3] + sha256(seed).hexdigest()[:32].encode()
        if not any(boundary in piece for entity in entities for piece in entity.pieces):
            break
        number += 1
    pieces: list[bytes] = []
    for head, content in entities:
        pieces += (b"--", boundary, b"\r\n", head, b"\r\n", *content, b"\r\n")
    pieces += (b"--", boundary, b"--\r\n")
    head = b'Content-Type: multipart/%b;\r\n boundary="%b"\r\n' % (kind, boundary)
    return _Entity(head, pieces)
