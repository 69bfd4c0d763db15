"""TLS of deliveries: the contexts, the tickets of earlier sessions, and the checks of certificates.

There is a context for handshakes that any certificate may end well, and one for those in which
OpenSSL checks the certificate. The second one reads the authorities when it is first needed, in a
thread, because that takes some 50 ms. `ClientTls` is made anew whenever settings are read again, so
contexts, tickets and files belong together.

A resumed session has no certificate to look at. So a ticket is kept together with what the session
has proved, under the name and port of the host and the demands on its certificate: a ticket of a
session that nobody checked never serves one that has to be checked.
"""

from __future__ import annotations

import os
import ssl
import warnings
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from mailerq.errors import ConfigError, Problem

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.rules.certificates import Facts
    from mailerq.rules.security import Proof

__all__ = ["FILES", "MAX_TICKET_BYTES", "ClientTls", "Ticket", "Tickets"]

FILES: Final = ("connection_ca_file", "connection_certificate", "connection_key")
"""The settings that name files."""

MAX_TICKETS: Final = 1000
MAX_TICKET_BYTES: Final = 1 << 14
"""Limits of tickets: their number, and the bytes of a handshake or of the tickets after it."""

TICKET_SECONDS: Final = 3600.0
"""How long a ticket is used. A certificate that has expired or was revoked meanwhile counts.

The ticket of a resumed session proves no more than the first handshake did, so it is used for the
rest of this time only."""

VERSIONS: Final = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


class Ticket(NamedTuple):
    """What resumes a session, what that session had proved, and its certificate for results."""

    session: ssl.SSLSession
    proof: Proof
    facts: Facts | None
    until: float


class Tickets:
    """The tickets of earlier sessions; each is used once (RFC 8446, appendix C.4)."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[object, Ticket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, key: object) -> Ticket | None:
        """The ticket of a host and its demands, if there is one; it is gone then."""
        ticket = self._kept.pop(key, None)
        return ticket if ticket is not None and self._clock() < ticket.until else None

    def keep(
        self,
        key: object,
        session: ssl.SSLSession,
        proof: Proof,
        facts: Facts | None,
        resumed: Ticket | None = None,
    ) -> None:
        """Keep a ticket in place of an earlier one, and forget the oldest if there are many.

        `resumed` is the ticket that the session of this one began with.
        """
        until = self._clock() + TICKET_SECONDS if resumed is None else resumed.until
        self._kept.pop(key, None)
        self._kept[key] = Ticket(session, proof, facts, until)
        if len(self._kept) > MAX_TICKETS:
            self._kept.popitem(last=False)


class ClientTls:
    """The contexts and tickets of deliveries under one set of settings. One loop uses it."""

    def __init__(self, config: Config) -> None:
        self.tickets = Tickets()
        self._config = config
        self._making = trio.Lock()
        self._verifying: ssl.SSLContext | None = None
        self._roots: Any = None
        self._open = _context(config, verify=False)

    @classmethod
    def of(
        cls, config: Config, before: ClientTls | None = None, notes: list[str] | None = None
    ) -> ClientTls:
        """What the settings ask for. Raises `ConfigError`.

        Files that this account can no longer read are kept as they were `before`, with a line in
        `notes`: root has read them.
        """
        for key in FILES:
            path = getattr(config, key)
            if not path or os.access(path, os.R_OK, effective_ids=True):
                continue
            name = key.replace("_", "-")
            if before is not None and notes is not None and os.path.exists(path):
                if all(getattr(config, each) == getattr(before._config, each) for each in FILES):
                    notes.append(
                        f"{name}: this account may not read {path} again: it stays as it was until"
                        " a restart"
                    )
                    return before
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                text = f"{name}: cannot use {path}: {error.strerror}"
                raise ConfigError.of([Problem(config.origin(name), text, name)]) from None
        made = cls(config)
        if config.connection_ca_file:
            made._verifying = _context(config, verify=True)
        return made

    async def context(self, *, verify: bool) -> ssl.SSLContext:
        """The context for handshakes, with or without a check of the certificate."""
        if not verify:
            return self._open
        async with self._making:
            if self._verifying is None:
                self._verifying = await trio.to_thread.run_sync(_verifying, self._config)
        return self._verifying

    async def authorities(self) -> Any:
        """The certificates of the authorities in DER, for checks after a handshake."""
        context = await self.context(verify=True)
        async with self._making:
            if self._roots is None:
                self._roots = await trio.to_thread.run_sync(context.get_ca_certs, True)
        return self._roots


def _verifying(config: Config) -> ssl.SSLContext:
    return _context(config, verify=True)


def _context(config: Config, *, verify: bool) -> ssl.SSLContext:
    """Make a context. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The names of a host are alternative names (RFC 8461, section 4.2); no constraint of an
    # authority bounds a common name.
    context.hostname_checks_common_name = False
    # A peer could cause one expensive handshake after another.
    context.options |= ssl.OP_NO_RENEGOTIATION
    least = VERSIONS[config.connection_tls_min]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of old versions, which are asked for
        context.minimum_version = max(least, ssl.TLSVersion.TLSv1_2) if verify else least
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if config.connection_ciphers:
        try:
            context.set_ciphers(config.connection_ciphers)
        except ssl.SSLError as error:
            raise _wrong(config, "connection-ciphers", f"{error}") from None
    if config.connection_certificate:
        _load_certificate(context, config)
    if not verify:
        return context
    if not config.connection_ca_file:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(config.connection_ca_file)
    except (OSError, ssl.SSLError) as error:
        text = "it has no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise _wrong(config, "connection-ca-file", text or str(error)) from None
    return context


def _load_certificate(context: ssl.SSLContext, config: Config) -> None:
    def password() -> str:
        raise ValueError("there is no password")

    try:
        context.load_cert_chain(
            config.connection_certificate, config.connection_key or None, password
        )
    except ValueError:
        raise _wrong(config, "connection-certificate", "its key has a password") from None
    except OSError as error:
        reason = getattr(error, "reason", "") or error.strerror or str(error)
        if "MISMATCH" in reason:
            reason = "the key is that of another certificate"
        elif reason == "PEM_LIB" or isinstance(error, ssl.SSLError):
            reason = "it has no certificate with a key in PEM"
        raise _wrong(config, "connection-certificate", reason) from None


def _wrong(config: Config, key: str, text: str) -> ConfigError:
    return ConfigError.of(
        [Problem(config.origin(key), f"{key}: cannot use {config.text(key)}: {text}", key)]
    )
