"""Non-blocking calls on descriptors: `_core_sockets.pxi` and `_core_mapping.pxi` for Python."""

from __future__ import annotations

from mailerq._core import (
    RECEIVE_BYTES,
    Mapping,
    accept,
    happenings,
    has_input,
    receive,
    send,
    socket_name,
    watch,
)

__all__ = [
    "RECEIVE_BYTES",
    "Mapping",
    "accept",
    "happenings",
    "has_input",
    "receive",
    "send",
    "socket_name",
    "watch",
]
