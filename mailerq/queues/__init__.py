"""Queues: one interface, and the backends that implement it."""

from mailerq.queues.interface import (
    Consumer,
    Depth,
    Entry,
    Lease,
    Publication,
    Queues,
    Settlement,
)

__all__ = ["Consumer", "Depth", "Entry", "Lease", "Publication", "Queues", "Settlement"]
