"""The server side of TLS: its context, and a limit on handshakes."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem

__all__ = ["Handshake", "Handshakes", "tls_context", "try_handshake"]

GRACE_SECONDS: Final = 2.0
"""Time that a handshake always has, even if others wait. A normal handshake takes far less."""


def tls_context(config: Config) -> ssl.SSLContext | None:
    """Make the TLS context of the server (1.2 and up), or return None without a certificate.

    Raises `ConfigError`.
    """
    if not config.smtp_certificate:
        return None
    if problems := list(_unreadable(config)):
        raise ConfigError.of(problems)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Renegotiation would let a peer cause one expensive handshake after another.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Clients keep one ticket of a host, and each costs a tenth of a handshake.
    context.num_tickets = 1
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
"""Texts for reasons of OpenSSL. KEY stands for the file of the key."""


def _load(context: ssl.SSLContext, config: Config) -> str | None:
    """Load certificate and key; return what is wrong with them, or None."""
    key = config.smtp_key or config.smtp_certificate
    try:
        context.load_cert_chain(config.smtp_certificate, config.smtp_key or None, _password)
    except OSError as error:
        # The PEM library gives no reason for a file that is not PEM.
        reason = getattr(error, "reason", "") or "PEM_LIB"
        return _REASONS.get(reason, str(error)).replace("KEY", key)
    except ValueError:
        return f"the key in {key} has a password; write it without one"
    return None


def _password() -> str:
    """Called for an encrypted key. Without this, OpenSSL would ask on the terminal."""
    raise ValueError("there is no password")


def _unreadable(config: Config) -> Iterator[Problem]:
    """Yield the files that cannot be read, because OpenSSL does not name the file."""
    for key in ("smtp-certificate", "smtp-key"):
        if path := config.text(key):
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                problem = f"{key}: cannot use {path}: {error.strerror}"
                yield Problem(config.origin(key), problem, key)


def try_handshake(context: ssl.SSLContext, certificate: str) -> str | None:
    """Do a handshake with a client that trusts the certificate; return its complaint, or None.

    The client checks the dates of the certificate, and neither host name nor issuer.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # do not check the issuer
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


class Handshake(Protocol):
    """A session in a handshake, which any thread can tell to hurry."""

    def hurry(self) -> None: ...


class Handshakes:
    """A limit on concurrent handshakes; 0 means no limit. Any thread.

    At the limit, the oldest handshake is ended to make room, unless it is younger than
    `GRACE_SECONDS`. So slow handshakes keep nobody out.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._began: dict[Handshake, float] = {}

    def begin(self, handshake: Handshake) -> bool:
        """Take a place, to be returned with `end`. Return False if there is none."""
        with self._lock:
            now = self._clock()
            oldest = None
            if len(self._began) >= self.limit > 0:
                oldest = next(iter(self._began))
                if now - self._began[oldest] < GRACE_SECONDS:
                    return False
                del self._began[oldest]
            self._began[handshake] = now
        if oldest is not None:
            oldest.hurry()
        return True

    def end(self, handshake: Handshake) -> None:
        with self._lock:
            self._began.pop(handshake, None)
