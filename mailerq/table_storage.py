"""The settings of the storage for bodies, a part of `mailerq.table.Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import NUMBER, SECONDS, SIZE, TEXT, choice, fixed, setting
from mailerq.table_broker import BrokerTable

__all__ = ["StorageTable"]

STORAGE: Final = "Storage of bodies"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class StorageTable(BrokerTable):
    """Which bodies are kept outside the queue, and where."""

    storage_address: str = fixed(
        "",
        TEXT,
        STORAGE,
        "Where bodies are kept outside the queue: directory:///path, s3://key:secret@region/bucket"
        " or postgresql://user@host/database. docs/storage.md explains it.",
        unset="none: bodies are in the queue",
        secret=True,
        aliases=("storage",),
    )
    storage_policy: str = setting(
        "all",
        choice("all", "out", "in", "none"),
        STORAGE,
        "Which bodies go to the storage when RabbitMQ is the queue: all that are published, those"
        " of mail that is tried again (out), those of mail that comes in (in), or none: then bodies"
        " are only fetched, for messages with a key.",
    )
    storage_threads: int = setting(
        4,
        NUMBER,
        STORAGE,
        "Requests to the storage at a time, each with a thread where the storage needs one.",
        minimum=1,
        maximum=256,
    )
    storage_ttl: float = setting(
        3600.0,
        SECONDS,
        STORAGE,
        "How long a body is kept after its mail has expired, for results and reports.",
        unit="s",
        minimum=0,
    )
    storage_timeout: float = setting(
        20.0,
        SECONDS,
        STORAGE,
        "How long the storage may take for a body.",
        unit="s",
        minimum=0.1,
        maximum=600,
    )
    storage_reschedule: float = setting(
        120.0,
        SECONDS,
        STORAGE,
        "How long a message waits when the storage fails; the attempt does not count.",
        unit="s",
        minimum=1,
    )
    rabbitmq_maxbody: int = setting(
        64 << 10,
        SIZE,
        STORAGE,
        "A larger body goes to the storage, whatever storage-policy says but none. Without a"
        " storage, bodies go to RabbitMQ up to the size that it takes, about 16 MB.",
        minimum=1,
    )
