"""The exceptions of mailerq, on one screen.

Few on purpose: a delivery that failed is a `mailerq.message.Result`, a command that a
client got wrong is a reply. An exception is for what the caller did wrong or what this
host cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

__all__ = [
    "AddressError",
    "ConfigError",
    "EngineError",
    "MailerqError",
    "MessageDamaged",
    "MessageError",
    "PluginError",
    "Problem",
    "QueueDamaged",
    "QueueError",
    "QueueFull",
]


class MailerqError(Exception):
    """Anything that mailerq raises on purpose. Its text tells a person what to do."""


class Problem(NamedTuple):
    """One thing that is wrong with a configuration.

    `where` is the place that set the value: ``file:line``, ``--option`` or an environment
    variable. `key` is the setting that cannot be used, empty where none is known.
    """

    where: str
    text: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class ConfigError(MailerqError):
    """The configuration cannot be used; raised before anything is opened.

    `problems` is all that is known to be wrong, `where` and `problem` are the first of them.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.problems: Sequence[Problem] = (Problem(where, problem),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """One error for one problem or more."""
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
    """A plugin cannot be used; the text names its file. Raised before a client is served."""


class EngineError(MailerqError):
    """By a defect of ours the engine had to end, or could not start; `__cause__` has what it was.

    What was accepted is on disk. The queue's own errors come as `QueueError`, not as this.
    """


class AddressError(MailerqError, ValueError):
    """A mailbox, domain or address literal breaks its grammar (RFC 5321, section 4.1.2)."""


class MessageError(MailerqError, ValueError):
    """A JSON message cannot be used: the text names the property and what is wrong with it."""


class QueueError(MailerqError):
    """The queue could not do it now: a full disk, an I/O error, a broker that is away.

    Nothing was published. What was waiting stays where it is; the caller answers 4xx or
    tries again.
    """


class QueueFull(QueueError):
    """The disk has no room for new mail, until mail has left or somebody makes some."""


class QueueDamaged(QueueError):
    """The queue file is damaged; a restart sets it aside and salvages what is readable."""


class MessageDamaged(QueueError):
    """A message in the queue cannot be used any more; it was set aside, and its lease is over."""
