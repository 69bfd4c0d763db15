"""The JSON document of a message, and the results that delivery appends.

A message is one JSON object per recipient. The body, the whole MIME text, is kept apart as bytes:
most code never looks into the body, and a JSON string cannot hold every byte of a mail.
`Message.from_json` and `Message.to_json` convert the document of applications, where the body is
the property ``mime``, or ``mime-base64`` if it is not valid UTF-8.

`mailerq.properties` lists the known properties; all others travel untouched.
"""

from __future__ import annotations

import base64
import binascii
import calendar
import time
from collections.abc import Iterator
from typing import Any, Final, Self

import msgspec

from mailerq.address import queue_problem
from mailerq.errors import MessageError
from mailerq.properties import CHECK_OF, CHECKS, misspellings

__all__ = [
    "PROPERTIES_LIMIT",
    "Message",
    "Result",
    "check_nesting",
    "decode_properties",
    "encode_properties",
    "format_time",
    "parse_time",
    "without_password",
]

PROPERTIES_LIMIT: Final = 1 << 20
"""Bytes of a document beside its body. Each attempt reads all of them again."""

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"

LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999 in seconds since 1970: `TIME_FORMAT` has no later time."""

NESTING_LIMIT: Final = 200
"""Depth of nested objects and arrays. Plugins have this limit, and a document must be readable at
any stack depth."""

encode_properties: Final = msgspec.json.Encoder().encode
"""Encode a dict of properties as UTF-8 JSON; the inverse of `decode_properties`."""

_decode: Final = msgspec.json.Decoder().decode

MAX_SECONDS: Final = 256
"""Texts of times that are kept: those of the messages of one queue are near each other."""

_seconds: Final[dict[int, str]] = {}


def format_time(now: float) -> str:
    """Format seconds since 1970 as ``YYYY-MM-DD HH:MM:SS`` in UTC, like every timestamp."""
    second = min(int(now), LAST_SECOND)
    text = _seconds.get(second)
    if text is None:
        text = time.strftime(TIME_FORMAT, time.gmtime(second))
        if len(_seconds) >= MAX_SECONDS:
            _seconds.clear()
        _seconds[second] = text
    return text


def parse_time(text: str) -> float:
    """Parse a timestamp of `format_time`; return seconds since 1970. Raises `MessageError`."""
    try:
        if len(text) != 19:
            raise ValueError
        return float(calendar.timegm(time.strptime(text, TIME_FORMAT)))
    except (ValueError, TypeError):
        shown = repr(str(text)[:80])
        raise MessageError(f"{shown} is not a time of the form YYYY-MM-DD HH:MM:SS") from None


def decode_properties(data: bytes | str) -> dict[str, Any]:
    """Decode a JSON object. Raises `MessageError` for broken JSON and for other values."""
    try:
        value = _decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise MessageError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MessageError(f"a message is a JSON object, not {type(value).__name__}")
    check_nesting(value, data)
    return value


def check_nesting(value: object, encoded: bytes | str) -> None:
    """Raise `MessageError` if `value`, decoded from `encoded`, is nested too deeply."""
    if isinstance(encoded, bytes):
        opened = encoded.count(b"{") + encoded.count(b"[")
    else:
        opened = encoded.count("{") + encoded.count("[")
    if opened <= NESTING_LIMIT:
        return
    level: list[Any] = [value]
    for _ in range(NESTING_LIMIT + 1):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list | tuple)
        ]
        if not level:
            return
    raise MessageError(f"objects and arrays are nested more than {NESTING_LIMIT} deep")


def without_password(properties: dict[str, Any]) -> dict[str, Any]:
    """Return properties without the password of ``smarthost`` and the private keys of ``dkim``.

    This is the same dict if there is none.
    """
    smarthost = properties.get("smarthost")
    if isinstance(smarthost, dict) and "password" in smarthost:
        rest = {name: value for name, value in smarthost.items() if name != "password"}
        properties = {**properties, "smarthost": rest}
    dkim = properties.get("dkim")
    if dkim is None:
        return properties
    if isinstance(dkim, list):
        return {**properties, "dkim": [_without_key(each) for each in dkim]}
    return {**properties, "dkim": _without_key(dkim)}


def _without_key(value: Any) -> Any:
    """A key of ``dkim`` without the private key itself; a text may be a private key."""
    if isinstance(value, dict):
        return {name: each for name, each in value.items() if name != "key"}
    return None if isinstance(value, str) else value


class _Bodies(msgspec.Struct):
    """The raw values of a document that may be its body; other values are skipped."""

    mime: msgspec.Raw = msgspec.Raw()
    base64: msgspec.Raw = msgspec.field(name="mime-base64", default=msgspec.Raw())


_decode_bodies: Final = msgspec.json.Decoder(_Bodies).decode


def _check_size(data: bytes) -> None:
    """Raise `MessageError`, before the document is decoded, if its properties are too large."""
    try:
        bodies = _decode_bodies(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise MessageError(f"not JSON: {error}") from None
    values = bytes(memoryview(bodies.mime)), bytes(memoryview(bodies.base64))
    size = len(data) - sum(len(value) for value in values if value.startswith(b'"'))
    if size > PROPERTIES_LIMIT:
        raise MessageError(f"has more than {PROPERTIES_LIMIT} bytes of properties beside its body")


_TIMES: Final = ("delayed", "maxdelivertime")
_MORE_CHECKED: Final = frozenset((*_TIMES, "queues"))


class Message(msgspec.Struct, eq=False):
    """One mail to one recipient.

    `properties` is the JSON object without the body. `body` is the MIME text as sent (CRLF lines,
    no dot-stuffing). If `body` is None, ``key`` or an object in ``mime`` stands for it, or a plugin
    supplies it.

    >>> message = Message.from_json('{"envelope":"a@b.test","recipient":"c@d.test","mime":"x"}')
    >>> message.recipient, message.body
    ('c@d.test', b'x')
    """

    properties: dict[str, Any] = {}
    body: bytes | None = None
    local: bool = False
    """Publish to the local queue (`MQ_SetLocal`). Used during reception; not part of the JSON."""

    def __repr__(self) -> str:
        properties = without_password(self.properties)
        return f"Message(properties={properties!r}, body={self.body!r}, local={self.local!r})"

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Decode the document of an application. Raises `MessageError`.

        This takes 2 ms per MB of body and blocks the loop. Making a `Message` of properties and a
        bytes body avoids that.
        """
        if len(data) > PROPERTIES_LIMIT:
            _check_size(data if isinstance(data, bytes) else data.encode(errors="replace"))
        return cls.from_dict(decode_properties(data))

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """Make a message of a dict, in which ``mime`` may be bytes. The dict is not changed.

        Raises `MessageError` if the body cannot be read. `problem` finds properties of a wrong
        type.
        """
        properties = dict(document)
        body: bytes | None = None
        mime = properties.get("mime")
        if isinstance(mime, bytes):
            body = properties.pop("mime")
        elif isinstance(mime, str):
            del properties["mime"]
            try:
                body = mime.encode()
            except UnicodeEncodeError:
                raise MessageError("property mime: holds half a surrogate pair") from None
        elif "mime-base64" in properties and mime is None:
            text = properties.pop("mime-base64")
            try:
                body = base64.b64decode(text, validate=True)
            except (TypeError, ValueError, binascii.Error) as error:
                raise MessageError(f"property mime-base64: {error}") from None
        return cls(properties, body)

    def to_dict(self) -> dict[str, Any]:
        """Return the document for applications, as a new dict."""
        document = dict(self.properties)
        if self.body is not None:
            try:
                document["mime"] = self.body.decode()
            except UnicodeDecodeError:
                document["mime-base64"] = base64.b64encode(self.body).decode()
        return document

    def to_json(self) -> bytes:
        """Return the document for applications, as UTF-8 JSON on one line."""
        return encode_properties(self.to_dict())

    @property
    def envelope(self) -> str:
        """The address for MAIL FROM without angle brackets; empty for the null sender."""
        return self.properties.get("envelope") or ""

    @property
    def recipient(self) -> str:
        """The address for RCPT TO without angle brackets."""
        return self.properties.get("recipient") or ""

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results of the attempts so far, oldest first (a new list if there are none)."""
        return self.properties.get("results") or []

    def problem(self) -> str | None:
        """Return what is wrong with the type or form of a known property, or None.

        Such a message cannot be sent. It goes to the failure queue with this text.
        """
        # A message has few of the properties that `problems` looks for.
        properties = self.properties
        if properties.get("recipient") and _MORE_CHECKED.isdisjoint(properties):
            for name, value in properties.items():
                if value is not None and (check := CHECK_OF.get(name)) and not check(value):
                    break
            else:
                return None
        return next(self.problems(), None)

    def problems(self) -> Iterator[str]:
        """Yield one text for each property that `problem` would report."""
        properties = self.properties
        wrong = set()
        for name, check, expected in CHECKS:
            value = properties.get(name)
            if value is not None and not check(value):
                wrong.add(name)
                yield f"property {name}: expected {expected}, found {_kind(value)}"
        if not properties.get("recipient") and "recipient" not in wrong:
            names = [name for name, meant in misspellings(properties) if meant == "recipient"]
            hint = f"; is {names[0]!a} a misspelling of it?" if names else ""
            yield f"property recipient: is missing{hint}"
        for name in _TIMES:
            if (value := properties.get(name)) is not None and name not in wrong:
                try:
                    parse_time(value)
                except MessageError as error:
                    yield f"property {name}: {error}"
        if "queues" not in wrong:
            for kind, queue in (properties.get("queues") or {}).items():
                if queue and (problem := queue_problem(queue)) is not None:
                    yield f"property queues: the name for {ascii(kind)[:80]} {problem}"


def _kind(value: object) -> str:
    names = {
        bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object",
        list: "an array",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one delivery attempt: an element of the property ``results``.

    `type` and `state` use the words of version 2.1 (``success``, ``error``, ``lost`` … and
    ``mail from``, ``rcpt to``, ``data`` …). `result` uses the newer words (``accepted``,
    ``error``, ``lost``, ``timeout``, ``invalid``). `code`, `status` and `description` are the reply
    of the peer, `kind` and `rule` what a pattern says about the reply. The fields of a TCP
    connection are None if there was none, those of TLS (`cipher`, `certificate`) without TLS.
    """

    attempt: int
    type: str
    state: str
    result: str
    time: str
    local_ip: str | None = None
    remote_ip: str | None = None
    mta: str | None = None
    code: int | None = None
    status: str | None = None
    description: str | None = None
    messages: int | None = None
    kind: str | None = None
    rule: str | None = None
    authentication: str | None = None
    cipher: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the element for the JSON, without unknown fields."""
        fields = {
            "attempt": self.attempt,
            "type": self.type,
            "state": self.state,
            "result": self.result,
            "time": self.time,
            "mta": self.mta,
            "from": self.local_ip,
            "to": self.remote_ip,
            "authentication": self.authentication,
            "cipher": self.cipher,
            "certificate": self.certificate,
            "messages": self.messages,
            "code": self.code,
            "status": self.status,
            "description": self.description,
            "class": self.kind,
            "rule": self.rule,
        }
        return {name: value for name, value in fields.items() if value is not None}
