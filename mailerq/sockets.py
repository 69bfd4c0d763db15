"""Non-blocking calls on descriptors, and memory: two parts of the core for Python.

See `_core_sockets.pxi` and `_core_mapping.pxi`.
"""

from __future__ import annotations

from mailerq._core import (
    RECEIVE_BYTES,
    Mapping,
    accept,
    connect,
    happenings,
    has_input,
    keep_little,
    receive,
    round_trip,
    send,
    socket_error,
    socket_name,
    watch,
)

__all__ = [
    "RECEIVE_BYTES",
    "Mapping",
    "accept",
    "connect",
    "happenings",
    "has_input",
    "keep_little",
    "receive",
    "round_trip",
    "send",
    "socket_error",
    "socket_name",
    "watch",
]
