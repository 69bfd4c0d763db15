"""The classes of replies, and what is done about each unless a pattern says otherwise.

A class says what a peer means: this connection, this address of ours, this recipient or this mail.
The reaction of a class is the default of all patterns of that class in `responses-file`. Replies
that no pattern matches have no class and no reaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from mailerq.rules.responses import Fate

__all__ = ["CLASSES", "NO_REACTION", "Reaction"]

MINUTE: Final = 60.0
HOUR: Final = 3600.0


class Reaction(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from a reply; None: nothing is said. Times are in seconds.

    For the message: its `fate`, when it is tried again, whether the attempt is `counted`,
    whether another local address may try at once, and whether its recipient is suppressed if the
    message fails. For the connection: whether it ends. For the host: for how long the others come
    first (`leave_host`), so that the message goes to one of them. For the
    flow: a `pause`, which doubles up to `max_pause`, then a share of the rate (`slow`) or a rate,
    and a number of connections, all of which are taken back step by step after `lasts`.
    """

    fate: Fate | None = None
    retry_after: float | None = None
    counted: bool | None = None
    other_ip: bool | None = None
    suppress: bool | None = None
    alert: bool | None = None
    reconnect: bool | None = None
    leave_host: float | None = None
    pause: float | None = None
    max_pause: float | None = None
    slow: float | None = None
    messages_per_minute: int | None = None
    max_connections: int | None = None
    fewer_connections: int | None = None
    lasts: float | None = None

    def over(self, other: Reaction) -> Reaction:
        """This reaction, with what `other` says where this one says nothing.

        >>> both = Reaction(pause=60).over(Reaction(pause=5, alert=True))
        >>> both.pause, both.alert
        (60, True)
        """
        names = self.__struct_fields__
        said = {name: value for name in names if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(other, **said) if said else other

    @property
    def moves_the_flow(self) -> bool:
        """Whether other mail is affected too."""
        return bool(self.pause or self.lowers)

    @property
    def lowers(self) -> bool:
        """Whether a rate or a number of connections is lowered."""
        return bool(
            self.slow or self.messages_per_minute or self.max_connections or self.fewer_connections
        )


NO_REACTION: Final = Reaction()

CLASSES: Final[Mapping[str, tuple[str, Reaction]]] = {
    "speeding": (
        "mail comes too fast from this address",
        Reaction(fate=Fate.RETRY, slow=0.5, lasts=30 * MINUTE),
    ),
    "toomanyconn": (
        "too many connections from this address",
        Reaction(
            fate=Fate.RETRY, retry_after=MINUTE, counted=False, fewer_connections=1, lasts=HOUR
        ),
    ),
    "session-limit": (
        "this connection has had its number of messages",
        Reaction(fate=Fate.RETRY, retry_after=1.0, counted=False, reconnect=True),
    ),
    "reputation-temp": (
        "deferred for volume, complaints or a low reputation",
        Reaction(pause=10 * MINUTE, max_pause=4 * HOUR),
    ),
    "blocked-ip": (
        "this address is listed or banned",
        Reaction(pause=2 * HOUR, max_pause=24 * HOUR, alert=True),
    ),
    "auth": ("SPF, DKIM, DMARC, PTR, HELO or TLS is missing or wrong", Reaction(alert=True)),
    "content": ("spam, a virus, a URL or an attachment", NO_REACTION),
    "user-unknown": ("there is no such recipient", NO_REACTION),
    "user-disabled": ("the recipient takes no mail any more", NO_REACTION),
    "moved": ("the recipient has another address", NO_REACTION),
    "mailbox-full": ("the mailbox is full", Reaction(retry_after=HOUR)),
    "user-rate": (
        "this recipient gets mail too fast",
        Reaction(fate=Fate.RETRY, retry_after=HOUR),
    ),
    "greylist": (
        "an unknown sender has to come again; the time that the reply states counts, if that is"
        " from a minute to a day",
        Reaction(fate=Fate.RETRY, retry_after=5 * MINUTE),
    ),
    "too-many-rcpts": (
        "too many recipients in one transaction",
        Reaction(fate=Fate.RETRY, retry_after=MINUTE, counted=False),
    ),
    "size": ("the mail is too large", NO_REACTION),
    "protocol": ("the peer does not support what the mail needs", NO_REACTION),
    "syntax": ("a command or an address is malformed to the peer", NO_REACTION),
    "relay-denied": ("the host does not take mail for this domain", NO_REACTION),
    "sender-refused": ("the sender is not wanted", NO_REACTION),
    "loop": ("the mail has passed too many hosts", NO_REACTION),
    "system": ("the host is busy or broken for now", Reaction(leave_host=MINUTE)),
}
"""The meaning of each class, and its reaction."""
