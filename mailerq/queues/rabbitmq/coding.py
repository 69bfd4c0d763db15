"""Messages as a broker carries them: the JSON document, and what is said beside it.

The body of an AMQP message is the document of `Message.to_json`, plain or with the content encoding
``gzip``, as applications publish it. Beside it stand a `message_id` for each copy, the priority,
``x-mailerq-due``, the due time of a message that waits in steps, in milliseconds since 1970, and
``x-mailerq-again`` if the copy was written before, so that its queue may have it twice.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from typing import Any, Final, TypeVar

import trio
from pika import spec

from mailerq.errors import MessageError, MessageTooLarge
from mailerq.message import Message, check_nesting

__all__ = [
    "DIGEST",
    "REASON",
    "decode",
    "decode_soon",
    "due_of",
    "beside",
    "encode",
    "encoding_of",
    "header",
    "identity_of",
    "in_thread",
    "is_again",
    "is_named",
    "mark_again",
    "was_refused",
]

T = TypeVar("T")

DUE: Final = "x-mailerq-due"
AGAIN: Final = "x-mailerq-again"
REASON: Final = "x-mailerq-reason"
"""Why a message was set aside."""

ID: Final = "x-mailerq-message-id"
"""The id that the sender of a message gave, where the message was set aside."""

MAX_HEADER: Final = 1 << 16
"""Bytes of all that stands beside a document. It must fit into one frame, of 128 KiB."""

_MORE_QUEUES: Final = ("CC", "BCC")
"""Headers with which a publication asks for more queues."""

_is_of_broker: Final = re.compile(
    r"x-(?:death|(?:first|last)-death-.*|delivery-count|acquired-count|opt-.*|delay)", re.DOTALL
).fullmatch
"""Whether a header is one that a broker adds to what it dead-letters or delivers again."""

DIGEST: Final = "="
"""Stands before the digest of a message, with which the identity begins if there is no id."""

_is_ours: Final = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{1,16}", re.ASCII).fullmatch
"""Whether an id is of `Publisher.identity`, or of `mailerq.queues.interface.new_identity`."""

MAX_BYTES: Final = 16 << 20
"""RabbitMQ 4 refuses a larger message, and closes the channel."""

MAX_DOCUMENT: Final = 64 << 20
"""Bytes of a document when it is unpacked."""

SMALL_BYTES: Final = 1 << 18
"""More takes a thread, so that the loop is not blocked for milliseconds."""

TURN_BYTES: Final = 1 << 14
"""A hundred documents of this size are read in a turn of the loop."""

GZIP: Final = 16 + zlib.MAX_WBITS
GZIP_LEVEL: Final = 1
BEST_LEVEL: Final = 9
MAGIC: Final = b"\x1f\x8b"

MAX_RATIO: Final = 250
"""How much larger a document may be than its gzip, which can be 1032. Mail reaches some 50."""

RATIO_BYTES: Final = 4 << 20
"""A smaller document may have any ratio."""

LAST_DUE: Final = 1 << 62


async def in_thread(size: int, work: Callable[[], T]) -> T:
    """Do work on `size` bytes, here if they are few. Cannot be cancelled."""
    if size <= SMALL_BYTES:
        return work()
    return await trio.to_thread.run_sync(work)


def encode(
    message: Message, *, compress: bool = False, most: int = MAX_BYTES, squeeze: bool = False
) -> bytes:
    """The document of a message, of up to `most` bytes. Raises `MessageError` if there is none.

    A larger one is compressed if the caller can `squeeze` it: a document that came compressed must
    not be too large on its way back. `encoding_of` tells the two forms apart.
    """
    try:
        data = message.to_json()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"a message cannot be written as JSON: {error}") from None
    check_nesting(message.properties, data)
    plain = data
    if compress:
        data = _pack(plain, GZIP_LEVEL)
    if len(data) > most and squeeze:
        data = _pack(plain, GZIP_LEVEL)
        if len(data) > most:
            data = _pack(plain, BEST_LEVEL)
    if len(data) > most:
        raise MessageTooLarge(
            f"a message of {len(data)} bytes is more than RabbitMQ takes; with a storage-address,"
            " the bodies of such messages are kept outside"
        )
    return data


def _pack(data: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, GZIP)
    return packer.compress(data) + packer.flush()


def encoding_of(data: bytes) -> str | None:
    """The content encoding of what `encode` has made: no JSON begins as gzip does."""
    return "gzip" if data.startswith(MAGIC) else None


def decode(body: bytes, encoding: str | None) -> Message:
    """Read a document. Raises `MessageError` for one that cannot be used."""
    match (encoding or "").lower():
        case "gzip":
            body = _unpack(body)
        case "" | "identity" | "utf-8" | "utf8":  # some clients put the character set here
            if len(body) > MAX_DOCUMENT:
                raise MessageError(f"a message of {len(body)} bytes is too large")
        case other:
            raise MessageError(f"the content encoding {other[:40]!a} is not known")
    return Message.from_json(body)


async def decode_soon(body: bytes, encoding: str | None) -> Message:
    """Read a document as `decode` does, in a thread if it is large, or may be when unpacked.

    Others have a turn after one that takes a good part of a millisecond. Cannot be cancelled.
    """
    size = len(body)
    if (encoding or "").lower() == "gzip" and size <= SMALL_BYTES:
        with suppress(zlib.error):
            unpacker = zlib.decompressobj(GZIP)
            size = len(unpacker.decompress(body, SMALL_BYTES))
            size += not unpacker.eof
    message = await in_thread(size, partial(decode, body, encoding))
    if size > TURN_BYTES:
        await trio.lowlevel.cancel_shielded_checkpoint()
    return message


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(GZIP)
    try:
        unpacked = unpacker.decompress(data, MAX_DOCUMENT)
    except zlib.error as error:
        raise MessageError(f"not gzip: {error}") from None
    if not unpacker.eof:
        problem = "is too large" if unpacker.unconsumed_tail else "ends early"
        raise MessageError(f"the gzip of the message {problem}")
    if len(unpacked) > max(MAX_RATIO * len(data), RATIO_BYTES):
        raise MessageError(f"the gzip of the message is more than {MAX_RATIO} times as large")
    return unpacked


def header(
    identity: str, *, priority: int = 0, due: float | None = None, encoding: str | None = None,
    reason: str | None = None, now: float = 0.0, persistent: bool = True,
) -> spec.BasicProperties:  # fmt: skip
    """What stands beside a document."""
    headers: dict[str, Any] = {}
    if due is not None:
        headers[DUE] = int(due * 1000)
    if reason is not None:
        headers[REASON] = reason[:1000]
    return spec.BasicProperties(
        content_type="application/json",
        content_encoding=encoding,
        delivery_mode=2 if persistent else 1,
        message_id=identity,
        priority=priority or None,
        headers=headers or None,
        timestamp=int(now) or None,
    )


def beside(
    origin: spec.BasicProperties, identity: str, reason: str | None = None
) -> spec.BasicProperties:
    """What stands beside a message of an application that moves as it is, for a `reason` or none.

    The copy has the properties and the headers that the application gave. It has an id of its own,
    and the one before is in a header. What concerned the delivery is left out: the expiry, the
    account that published, other queues to copy to, and what brokers add to messages that were
    dead-lettered, which would grow each time. Headers that do not fit into a frame, or cannot be
    written again, are left out too.
    """
    headers: dict[Any, Any] = {}
    for key, value in (origin.headers or {}).items():
        name = key.decode(errors="replace") if isinstance(key, bytes) else key
        if name not in (*_MORE_QUEUES, DUE, AGAIN, REASON) and not _is_of_broker(name):
            headers[key] = value
    given = str(origin.message_id or "")
    if given and not _is_ours(given):
        headers.setdefault(ID, given)
    reply_to = origin.reply_to
    if reply_to and str(reply_to).startswith("amq."):
        reply_to = None  # the broker would refuse what names it, and end the channel
    moved = spec.BasicProperties(
        content_type=origin.content_type,
        content_encoding=origin.content_encoding,
        headers=headers or None,
        delivery_mode=2,
        priority=origin.priority,
        correlation_id=origin.correlation_id,
        reply_to=reply_to,
        message_id=identity,
        timestamp=origin.timestamp,
        type=origin.type,
        app_id=origin.app_id,
    )
    lost = _problem_of(moved)
    if lost is not None:
        moved.headers = {ID: headers[ID]} if ID in headers else None
    if reason is not None:
        reason = f"{reason}; its headers are lost: {lost}" if lost else reason
        moved.headers = {**(moved.headers or {}), REASON: reason[:1000]}
    return moved


def _problem_of(properties: spec.BasicProperties) -> str | None:
    """Why what stands beside a document cannot be written again, or None."""
    try:
        size = sum(map(len, properties.encode()))
    except Exception as error:  # pika has no common base for what it cannot write
        return type(error).__name__
    return f"they have {size} bytes" if size > MAX_HEADER else None


def due_of(properties: spec.BasicProperties) -> float | None:
    """When a message that came from a wait queue is due, seconds since 1970."""
    due = (properties.headers or {}).get(DUE)
    if not isinstance(due, int) or isinstance(due, bool) or not 0 <= due < LAST_DUE:
        return None  # none of ours
    return due / 1000


def mark_again(properties: spec.BasicProperties) -> None:
    """Say beside a document that this copy was written before."""
    properties.headers = {**(properties.headers or {}), AGAIN: True}


def was_refused(properties: spec.BasicProperties) -> bool:
    """Whether a message was to be set aside before, and waits for the queue to take it."""
    return REASON in (properties.headers or {})


def is_again(properties: spec.BasicProperties) -> bool:
    """Whether a copy was written before, and has an id of ours."""
    return bool(properties.message_id) and (properties.headers or {}).get(AGAIN) is True


def identity_of(properties: spec.BasicProperties, body: bytes) -> str:
    """What a message has in common with its redelivery.

    Ids of mailerq are unique. An application may give several messages one id, so their bytes count
    as well; without an id, only the bytes count.
    """
    identity = str(properties.message_id or "")
    if _is_ours(identity):
        return identity
    return identity + DIGEST + blake2b(body, digest_size=16).hexdigest()


def is_named(identity: str) -> bool:
    """Whether an identity is an id that the sender of the message gave."""
    return not identity.startswith(DIGEST)
