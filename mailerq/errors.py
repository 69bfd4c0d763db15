"""The exceptions of mailerq.

There are few on purpose. A failed delivery is a `mailerq.message.Result`, and a wrong command of
a client is a reply. Exceptions are for mistakes of the caller and for failures of this host.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

__all__ = [
    "NO_SPACE",
    "AddressError",
    "BodyMissing",
    "ConfigError",
    "EngineError",
    "MailerqError",
    "MessageDamaged",
    "MessageError",
    "MessageTooLarge",
    "PluginError",
    "Problem",
    "QueueDamaged",
    "QueueError",
    "QueueFull",
    "QueueHeld",
    "RowError",
    "StorageError",
    "StoreError",
]

NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
"""The errors of the system for a full disk, as numbers in `OSError.errno`."""


class MailerqError(Exception):
    """The base of all errors that mailerq raises on purpose. The text tells a person what to do."""


class Problem(NamedTuple):
    """One mistake in a configuration.

    `where` is the place that set the value: ``file:line``, ``--option`` or an environment
    variable. `key` is the setting that cannot be used, or empty.
    """

    where: str
    text: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class ConfigError(MailerqError):
    """The configuration cannot be used; raised before anything is opened.

    `problems` has every known mistake; `where` and `problem` are the first one's.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.problems: Sequence[Problem] = (Problem(where, problem),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """Make one error of one or more problems."""
        error = cls(problems[0].where, problems[0].text)
        error.problems = tuple(problems)
        error.args = ("; ".join(map(str, problems)),)
        return error

    @property
    def where(self) -> str:
        return self.problems[0].where

    @property
    def problem(self) -> str:
        return self.problems[0].text


class PluginError(MailerqError):
    """A plugin cannot be used; the text names the file. Raised before any client is served."""


class EngineError(MailerqError):
    """A defect in mailerq ended the engine, or kept it from starting; see `__cause__`.

    Accepted mail is on disk. Errors of the queue are `QueueError`.
    """


class AddressError(MailerqError, ValueError):
    """A mailbox, domain or address literal breaks its grammar (RFC 5321, section 4.1.2)."""


class MessageError(MailerqError, ValueError):
    """A JSON message cannot be used; the text names the property and the mistake."""


class MessageTooLarge(MessageError):
    """A message is larger than the queue can ever take."""


class QueueError(MailerqError):
    """The queue failed for now: a full disk, an I/O error, an unreachable broker.

    Nothing was published, and waiting messages keep their place. The caller answers 4xx or tries
    again.
    """


class QueueHeld(QueueError):
    """Another process has the queue directory open for deliveries.

    `adopted` is true when the directory belongs to a process that was not there.
    """

    def __init__(self, text: str, *, adopted: bool) -> None:
        super().__init__(text)
        self.adopted = adopted


class QueueFull(QueueError):
    """The disk has no room for new mail until mail leaves or somebody frees space."""


class QueueDamaged(QueueError):
    """The queue file is damaged. A restart sets the file aside and salvages the readable part."""


class MessageDamaged(QueueError):
    """A message in the queue cannot be used any more; it was set aside, and its lease is over."""


class StorageError(QueueError):
    """The storage for bodies failed for now: away, slow, full, or not what it was.

    The text names the storage and says what to do. Mail waits for it.
    """


class BodyMissing(MailerqError):
    """The storage has no usable body under a key, and never will; the text says why."""


class RowError(MailerqError):
    """A pause, forced error or suppression cannot be kept; the text names the part or the file."""


class StoreError(MailerqError):
    """A small file of the queue directory cannot be used now, such as that of MTA-STS policies."""
