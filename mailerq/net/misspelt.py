"""Log properties and x-mq-* fields of messages that may be misspelt."""

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
"""Each name is logged once in this time, because all messages of a sender have the same mistake."""

NAMES_PER_MINUTE: Final = 10

NAMES_LIMIT: Final = 1000
"""Names that are remembered. With more, only `NAMES_PER_MINUTE` limits the log."""

MAX_ADDRESS: Final = 300
"""Characters of an address in a line, because the address has not been checked."""


class Misspelt:
    """Logs unknown names that are close to a known name, and so have no effect.

    Each name is logged once in `AGAIN_SECONDS`, whatever the source of its messages. Any thread.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, float] = {}
        self._say = Ration(
            log.warning, NAMES_PER_MINUTE, "and %d more names may be misspelt", clock=clock
        )

    def properties(self, properties: Mapping[str, Any]) -> None:
        """Log the misspelt properties of a message."""
        self.names(properties, misspellings(properties), "property")

    def names(
        self, properties: Mapping[str, Any], found: Iterable[tuple[str, str]], kind: str
    ) -> None:
        """Log names that were found in a message, each with the name that was meant."""
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
        """Log the number of suppressed names, if any."""
        self._say.flush()
