"""A mail transfer agent: SMTP in, C plugins, JSON messages in a durable queue, SMTP out.

The names below are the public interface. They are imported when they are first used, so
that a program that only reads the configuration, or an injector that runs once for each
mail, does not pay for the event loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mailerq.address import Mailbox as Mailbox
    from mailerq.config import SETTINGS as SETTINGS
    from mailerq.config import Config as Config
    from mailerq.config import Setting as Setting
    from mailerq.engine import Engine as Engine
    from mailerq.errors import AddressError as AddressError
    from mailerq.errors import ConfigError as ConfigError
    from mailerq.errors import EngineError as EngineError
    from mailerq.errors import MailerqError as MailerqError
    from mailerq.errors import MessageError as MessageError
    from mailerq.errors import PluginError as PluginError
    from mailerq.errors import QueueDamaged as QueueDamaged
    from mailerq.errors import QueueError as QueueError
    from mailerq.errors import QueueFull as QueueFull
    from mailerq.errors import QueueHeld as QueueHeld
    from mailerq.message import Message as Message
    from mailerq.message import Result as Result
    from mailerq.plugins import EVENTS as EVENTS
    from mailerq.plugins import Connection as Connection
    from mailerq.plugins import EventName as EventName
    from mailerq.plugins import Reject as Reject
    from mailerq.queues import Consumer as Consumer
    from mailerq.queues import Depth as Depth
    from mailerq.queues import Lease as Lease

__version__ = "0.1.0"

_HOMES = {
    "address": ("Mailbox",),
    "config": ("SETTINGS", "Config", "Setting"),
    "engine": ("Engine",),
    "errors": (
        "AddressError",
        "ConfigError",
        "EngineError",
        "MailerqError",
        "MessageError",
        "PluginError",
        "QueueDamaged",
        "QueueError",
        "QueueFull",
        "QueueHeld",
    ),
    "message": ("Message", "Result"),
    "plugins": ("EVENTS", "Connection", "EventName", "Reject"),
    "queues": ("Consumer", "Depth", "Lease"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
