"""The server's side of TLS: its context, and bounds on handshakes."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from mailerq.config import Config
from mailerq.errors import ConfigError

__all__ = ["Handshakes", "Hasty", "tls_context"]

GRACE_SECONDS: Final = 2.0
"""How long a handshake may take when others wait for their turn; an honest one takes far less."""


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The server's side of TLS (1.2 and up), or None where no certificate is configured.

    Raises `ConfigError`.
    """
    if not config.smtp_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A peer that may ask for one handshake after another on one connection has work done for it.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(config.smtp_certificate, config.smtp_key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            config.origin("smtp-certificate"),
            f"smtp-certificate: cannot use {config.smtp_certificate}: {error}",
        ) from None
    if config.smtp_ciphers:
        try:
            context.set_ciphers(config.smtp_ciphers)
        except ssl.SSLError as error:
            raise ConfigError(
                config.origin("smtp-ciphers"), f"smtp-ciphers: {config.smtp_ciphers}: {error}"
            ) from None
    return context


class Hasty(Protocol):
    """Who shakes hands, and can be told that its time is up. From any thread."""

    def hurry(self) -> None: ...


class Handshakes:
    """At most `limit` handshakes at a time; 0 is no limit. Any thread may use it.

    When there are as many, the one that began first gives way, unless it began just now: slow
    ones keep nobody out.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._began: dict[Hasty, float] = {}

    def begin(self, who: Hasty) -> bool:
        """Take a place; `end` gives it back. False when there is none."""
        with self._lock:
            now = self._clock()
            oldest = None
            if len(self._began) >= self._limit > 0:
                oldest = next(iter(self._began))
                if now - self._began[oldest] < GRACE_SECONDS:
                    return False
                del self._began[oldest]
            self._began[who] = now
        if oldest is not None:
            oldest.hurry()
        return True

    def end(self, who: Hasty) -> None:
        with self._lock:
            self._began.pop(who, None)
