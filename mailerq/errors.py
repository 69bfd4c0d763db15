"""The exceptions of mailerq, on one screen.

Few on purpose: a delivery that failed is a `mailerq.message.Result`, a command that a
client got wrong is a reply. An exception is for what the caller did wrong or what this
host cannot do.
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "ConfigError",
    "MailerqError",
    "MessageError",
    "PluginError",
    "QueueDamaged",
    "QueueError",
    "QueueFull",
]


class MailerqError(Exception):
    """Anything that mailerq raises on purpose. Its text tells a person what to do."""


class ConfigError(MailerqError):
    """The configuration cannot be used; raised before anything is opened.

    `where` is the place that set the value: ``file:line``, ``--option`` or an environment
    variable; it leads the text.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class PluginError(MailerqError):
    """A plugin cannot be used; the text names its file. Raised before a client is served."""


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
