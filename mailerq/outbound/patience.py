"""How long a session waits for its peer.

The deadline is a plain number, moved forward for each complete reply and each piece of a body:
a peer that drips bytes gains no time. The dispatcher checks the deadline periodically (`check`),
because trio's own deadlines are too expensive here. Time in which this process stands still does
not count: otherwise mail that the peer has taken would go out twice.

A reply has `smtp-out-timeout`, and so has a TLS handshake. Some steps take peers longer: for them a
session waits as long as RFC 5321, section 4.5.3.2, asks, while no other flow wants the connection.
The reply to the final dot always has the whole time. The greeting and EHLO have no more than the
setting: behind a host that is silent there may be another one that answers.
"""

from __future__ import annotations

from typing import Final

from mailerq.wire.client import Step

__all__ = [
    "BLOCK_MINUTES",
    "FINAL_MINUTES",
    "QUIT_SECONDS",
    "REPLY_MINUTES",
    "WITHDRAW_SECONDS",
    "TooLate",
    "patience",
]

FINAL_MINUTES: Final = 10
"""Time for the reply to the final dot: the peer processes the mail then, and giving up too early
delivers a mail twice (RFC 5321, section 4.5.3.2.6)."""

BLOCK_MINUTES: Final = 3
"""Time for the peer to take a block of a body (section 4.5.3.2.5)."""

REPLY_MINUTES: Final = {Step.MAILFROM: 5, Step.RCPTTO: 5, Step.DATA: 2}
"""Time for the replies to an envelope (sections 4.5.3.2.2 to 4.5.3.2.4)."""

WITHDRAW_SECONDS: Final = 1.0
"""After this wait a message sent ahead goes back to the flow; the session ends with the reply."""

QUIT_SECONDS: Final = 2.0
"""Timeout for the reply to QUIT, which decides nothing."""


class TooLate(Exception):
    """The deadline of a wait for the peer has passed."""


def patience(timeout: float, minutes: int) -> float:
    """Seconds to wait for something that may take a peer `minutes`.

    `timeout` is `smtp-out-timeout`; another value than a minute scales the time down, never up.

    >>> [patience(timeout, 10) for timeout in (60.0, 30.0, 300.0, 900.0)]
    [600.0, 300.0, 600.0, 900.0]
    """
    return max(timeout, min(minutes * timeout, minutes * 60.0))
