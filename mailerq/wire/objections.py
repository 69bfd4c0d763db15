"""What keeps a mail from being sent to a peer, before anything is on the wire."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from mailerq.wire import smtp
from mailerq.wire.client_events import Refused, Step

__all__ = ["objection_to"]

MAX_ADDRESS: Final = 1024
"""Characters of an address. The standard's limit is 254; the peer may judge that."""

# Characters between the angle brackets that end neither them nor the line: no controls, no space or
# bracket outside a quoted local part. Stricter rules are elsewhere; this one keeps an address from
# becoming a command.
_SAFE_ADDRESS: Final = re.compile(
    r'[^\x00-\x20\x7f-\x9f<>"]*|"(?:[^"\\\x00-\x1f\x7f-\x9f]|\\[^\x00-\x1f\x7f-\x9f])*"@[^\x00-\x20\x7f-\x9f<>"]+'
)


def objection_to(
    envelope: str,
    recipient: str,
    size: int | None,
    extensions: Mapping[str, str],
    *,
    utf8: bool,
    require_tls: bool = False,
) -> Refused | None:
    """The objection to sending this mail, found before anything is on the wire."""
    if not _is_safe(envelope):
        return Refused(Step.MAILFROM, smtp.BAD_SENDER, ours=True)
    if not recipient or not _is_safe(recipient):
        return Refused(Step.RCPTTO, smtp.BAD_RECIPIENT, ours=True)
    if utf8 and "SMTPUTF8" not in extensions:
        if not envelope.isascii():
            return Refused(Step.MAILFROM, smtp.ADDRESS_NOT_ASCII, ours=True)
        if not recipient.isascii():
            return Refused(Step.RCPTTO, smtp.ADDRESS_NOT_ASCII, ours=True)
        return Refused(Step.MAILFROM, smtp.HEADER_NOT_ASCII, ours=True)
    if require_tls and "REQUIRETLS" not in extensions:
        return Refused(Step.MAILFROM, smtp.NO_REQUIRETLS, ours=True)
    limit = extensions.get("SIZE", "")
    if size is not None and limit.isdecimal() and len(limit) <= 20 and 0 < int(limit) < size:
        return Refused(Step.MAILFROM, smtp.too_big_for_peer(size, int(limit)), ours=True)
    return None


def _is_safe(address: str) -> bool:
    return len(address) <= MAX_ADDRESS and _SAFE_ADDRESS.fullmatch(address) is not None
