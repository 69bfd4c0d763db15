"""What the bytes of a body need on their way: is it ASCII, is it binary, conversion and signature.

Long bodies are looked at in a thread, so that the loop goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from mailerq.mail.headers import has_ascii_header
from mailerq.mail.seven_bit import Converted, convert, to_seven_bit
from mailerq.rules import responses
from mailerq.rules.responses import Outcome
from mailerq.wire._lines import is_ascii
from mailerq.wire.framing import InBlocks, is_binary

if TYPE_CHECKING:
    from mailerq.message import Message
    from mailerq.net.tracing import Tap
    from mailerq.outbound.jobs import Job
    from mailerq.wire.client import ClientProtocol

__all__ = [
    "LOOK_BYTES",
    "finished_body",
    "is_ascii_body",
    "is_binary_body",
    "must_convert",
    "to_ascii",
]

LOOK_BYTES: Final = 1 << 20
"""Above this size a thread checks whether a body is ASCII."""

CONVERT_BYTES: Final = 1 << 14
"""Bytes of a body converted at once; a thread converts longer bodies."""

CONVERTERS: Final = 2
"""Long bodies converted at a time."""


async def is_ascii_body(body: bytes) -> bool:
    """Whether a body is ASCII."""
    if len(body) <= LOOK_BYTES:
        return body.isascii()
    return await trio.to_thread.run_sync(is_ascii, body)


async def is_binary_body(body: bytes) -> bool:
    """Whether a body cannot go as lines."""
    if len(body) <= LOOK_BYTES:
        return is_binary(body)
    return await trio.to_thread.run_sync(is_binary, body)


def must_convert(job: Job, body: bytes, ascii: bool, protocol: ClientProtocol) -> bool:
    """Whether the peer cannot take a body as it is, but could take it in ASCII.

    We must not change the header of mail that asks for SMTPUTF8 (RFC 6531, section 3.4).
    """
    if "8BITMIME" in protocol.extensions or ascii:
        return False
    properties = job.message.properties
    if properties.get("binarymime") is True and protocol.takes_binary:
        return False
    return not (properties.get("smtputf8") is True and not has_ascii_header(body))


async def to_ascii(body: bytes, *, whole: bool) -> bytes | Converted | None:
    """Convert a body to ASCII; None if impossible.

    A long body is encoded block by block while it is sent, unless the `whole` is wanted, which is
    in memory beside the stored one then.
    """
    if len(body) <= CONVERT_BYTES:
        return to_seven_bit(body)
    return await trio.to_thread.run_sync(
        to_seven_bit if whole else convert, body, limiter=_converters(), abandon_on_cancel=True
    )


async def finished_body(
    job: Job,
    message: Message,
    converted: bytes | Converted | None,
    protocol: ClientProtocol,
    whole: bool,
    tap: Tap | None,
) -> bytes | InBlocks | Outcome:
    """Return the body of a job as the peer gets it, or why there is none.

    `message` has the body after plugins, `converted` the conversion of the body before them.
    `whole` and `tap` are those of `to_ascii` and of `Signing.sign`.
    """
    body = message.body
    if body is None:
        return responses.NO_DATA
    sent: bytes | InBlocks = body
    if body is (converted if isinstance(converted, bytes) else job.body):
        sent = converted or body
    elif must_convert(job, body, await is_ascii_body(body), protocol):
        changed = await to_ascii(body, whole=whole)
        if changed is None:
            return responses.NOT_CONVERTIBLE
        sent = changed
        if isinstance(changed, bytes):
            message.body = body = changed
    if job.signing is None:
        return sent
    return await job.signing.sign(job, body, sent, protocol.takes_binary, tap)


_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("converters")


def _converters() -> trio.CapacityLimiter:
    """The limit on conversions in this loop."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(CONVERTERS)
        _limiter.set(limiter)
        return limiter
