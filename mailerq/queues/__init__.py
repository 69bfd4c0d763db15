"""Queues: one interface, and the backends that implement it."""

from mailerq.queues.interface import (
    DAMAGED_QUEUE,
    BrowsableQueues,
    Changed,
    Consumer,
    Depth,
    DestinationDepth,
    Entry,
    Lease,
    Publication,
    Queues,
    Receiver,
    RemoteQueues,
    Settlement,
    SortedQueues,
    Subscription,
    Taken,
)

__all__ = [
    "DAMAGED_QUEUE",
    "BrowsableQueues",
    "Changed",
    "Consumer",
    "Depth",
    "DestinationDepth",
    "Entry",
    "Lease",
    "Publication",
    "Queues",
    "Receiver",
    "RemoteQueues",
    "Settlement",
    "SortedQueues",
    "Subscription",
    "Taken",
]
