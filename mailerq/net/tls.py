"""The server's side of TLS: its context, and bounds on handshakes."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem

__all__ = ["Handshakes", "Hasty", "tls_context", "try_handshake"]

GRACE_SECONDS: Final = 2.0
"""How long a handshake may take when others wait for their turn; an honest one takes far less."""


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The server's side of TLS (1.2 and up), or None where no certificate is configured.

    Raises `ConfigError`.
    """
    if not config.smtp_certificate:
        return None
    if problems := list(_unreadable(config)):
        raise ConfigError.of(problems)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A peer that may ask for one handshake after another on one connection has work done for it.
    context.options |= ssl.OP_NO_RENEGOTIATION
    if problem := _load(context, config):
        raise ConfigError(
            config.origin("smtp-certificate"),
            f"smtp-certificate: cannot use {config.smtp_certificate}: {problem}",
        )
    if config.smtp_ciphers:
        try:
            context.set_ciphers(config.smtp_ciphers)
        except ssl.SSLError as error:
            raise ConfigError(
                config.origin("smtp-ciphers"), f"smtp-ciphers: {config.smtp_ciphers}: {error}"
            ) from None
    return context


_REASONS: Final = {
    "KEY_VALUES_MISMATCH": "the key in KEY is that of another certificate",
    "KEY_TYPE_MISMATCH": "the key in KEY is that of another certificate",
    "PEM_LIB": "it has no certificate in PEM, or KEY has no key in PEM",
}
"""What OpenSSL calls by these names; KEY stands for the file of the key."""


def _load(context: ssl.SSLContext, config: Config) -> str | None:
    """Load certificate and key; what is wrong with them, or None."""
    key = config.smtp_key or config.smtp_certificate
    try:
        context.load_cert_chain(config.smtp_certificate, config.smtp_key or None, _password)
    except OSError as error:
        # The PEM library has no words of its own for what is not in its form.
        reason = getattr(error, "reason", "") or "PEM_LIB"
        return _REASONS.get(reason, str(error)).replace("KEY", key)
    except ValueError:
        return f"the key in {key} has a password; write it without one"
    return None


def _password() -> str:
    """What OpenSSL calls for an encrypted key; it would ask at the terminal otherwise."""
    raise ValueError("there is no password")


def _unreadable(config: Config) -> Iterator[Problem]:
    """OpenSSL does not say which of two files it is."""
    for key in ("smtp-certificate", "smtp-key"):
        if path := config.text(key):
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                problem = f"{key}: cannot use {path}: {error.strerror}"
                yield Problem(config.origin(key), problem, key)


def try_handshake(context: ssl.SSLContext, certificate: str) -> str | None:
    """What a client that trusts this certificate, but looks at its dates, has against it."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # who signed it is not asked
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client.load_verify_locations(certificate)
        sides = [
            client.wrap_bio(to_client, to_server),
            context.wrap_bio(to_server, to_client, server_side=True),
        ]
        while sides:
            for side in tuple(sides):
                try:
                    side.do_handshake()
                    sides.remove(side)
                except ssl.SSLWantReadError:
                    pass
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        return f"no client can use it: {error}"
    return None


class Hasty(Protocol):
    """Who shakes hands, and can be told that its time is up. From any thread."""

    def hurry(self) -> None: ...


class Handshakes:
    """At most `limit` handshakes at a time; 0 is no limit. Any thread may use it.

    When there are as many, the one that began first gives way, unless it began just now: slow
    ones keep nobody out.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._began: dict[Hasty, float] = {}

    def begin(self, who: Hasty) -> bool:
        """Take a place; `end` gives it back. False when there is none."""
        with self._lock:
            now = self._clock()
            oldest = None
            if len(self._began) >= self.limit > 0:
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
