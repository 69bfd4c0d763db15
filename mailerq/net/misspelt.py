"""Tell the log which properties and x-mq-* fields of messages may be misspelt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from mailerq.net.logs import Ration
from mailerq.properties import misspellings

__all__ = ["Misspelt"]

log = logging.getLogger("mailerq")

AGAIN_SECONDS: Final = 3600.0
"""A name is told once in this time: who misspells it does so in each message."""

NAMES_PER_MINUTE: Final = 10

NAMES_LIMIT: Final = 1000
"""Names that are remembered. Where there are more the ration alone bounds the log."""

MAX_ADDRESS: Final = 300
"""Characters of an address in a line; it has not been checked yet."""


class Misspelt:
    """Names that are not known but close to one that is: what a sender meant has no effect.

    Each name is told once in `AGAIN_SECONDS`, whichever way its messages come. Any thread.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, float] = {}
        self._say = Ration(
            log.warning, NAMES_PER_MINUTE, "and %d more names may be misspelt", clock=clock
        )

    def properties(self, properties: Mapping[str, Any]) -> None:
        """Look at the properties of a message."""
        self.names(properties, misspellings(properties), "property")

    def names(
        self, properties: Mapping[str, Any], found: Iterable[tuple[str, str]], kind: str
    ) -> None:
        """Tell the names that were found in a message, each with the one that is meant."""
        envelope = properties.get("envelope")
        sender = envelope[:MAX_ADDRESS] if isinstance(envelope, str) else ""
        for name, meant in found:
            now = self._clock()
            if now - self._told.get(name, -AGAIN_SECONDS) < AGAIN_SECONDS:
                continue
            if len(self._told) >= NAMES_LIMIT:
                self._told.clear()
            self._told[name] = now
            self._say(
                "%s %s of a message from <%s> is not known and changes nothing; is %s meant?",
                kind,
                name,
                sender,
                meant,
            )

    def flush(self) -> None:
        """Say how many names were left out, if any were."""
        self._say.flush()
