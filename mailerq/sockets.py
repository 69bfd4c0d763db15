"""Python's door to the calls on sockets that never block, see `_core_sockets.pxi`."""

from __future__ import annotations

from mailerq._core import (
    RECEIVE_BYTES,
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
    "accept",
    "happenings",
    "has_input",
    "receive",
    "send",
    "socket_name",
    "watch",
]
