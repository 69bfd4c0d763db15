"""Remembers what was settled, to recognise messages that a broker delivers again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from itertools import islice
from typing import Final

from mailerq.queues.rabbitmq.coding import is_named
from mailerq.queues.rabbitmq.connection import Channel, Delivery

__all__ = ["Settled"]

MAX_UNHEARD: Final = 500
"""Acknowledgements that a broker may not have read yet: it reads them within milliseconds."""

MAX_SETTLED: Final = 100_000
"""Settled messages to remember that could not be acknowledged."""

MAX_ACKED: Final = 10_000
"""Acknowledged messages to remember: a connection that ends may have lost some acknowledgements."""


class Settled:
    """The identities of messages that this process has settled."""

    def __init__(self) -> None:
        self._settled: OrderedDict[str, None] = OrderedDict()
        self._acked: OrderedDict[str, Channel] = OrderedDict()

    def remember(self, identities: Collection[str]) -> None:
        """These messages could not be acknowledged, and come again."""
        for identity in identities:
            self._settled[identity] = None
            if len(self._settled) > MAX_SETTLED:
                self._settled.popitem(last=False)

    def acked(self, identity: str, channel: Channel) -> None:
        """A message has been acknowledged, and the broker may not have heard it yet."""
        if is_named(identity):  # else others may have the same bytes
            self._acked[identity] = channel
            if len(self._acked) > MAX_ACKED:
                self._acked.popitem(last=False)

    def was_acked(self, identity: str) -> bool:
        return identity in self._acked

    def comes_again(self, identity: str, delivery: Delivery) -> bool:
        """Whether a message is one of those to `remember`; true once for each.

        Messages that nobody gave an id may be equal: one is recognised only if it comes again.
        """
        if identity in self._settled and (delivery.redelivered or is_named(identity)):
            del self._settled[identity]
            return True
        return False

    def lost_ack(self, identity: str, delivery: Delivery) -> bool:
        """Whether a message comes because its acknowledgement was lost; true once for each."""
        before = self._acked.get(identity)
        if before is None or before is delivery.channel or before.is_open:
            return False
        del self._acked[identity]
        return True

    def unheard(self) -> list[str]:
        """A connection has ended: the messages whose acknowledgement may not have been heard."""
        newest = islice(reversed(self._acked.items()), MAX_UNHEARD)
        return [identity for identity, channel in newest if not channel.is_open]
