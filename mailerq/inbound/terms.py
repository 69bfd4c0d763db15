"""The settings in force, prepared for sessions: one `Terms` for a transaction."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from mailerq.config import Config
from mailerq.errors import ConfigError, Problem
from mailerq.inbound.addresses import LocalAddresses, is_local
from mailerq.inbound.auth import Authenticator
from mailerq.live import alike
from mailerq.mail import verp
from mailerq.net.tls import tls_context
from mailerq.rules.access import Access
from mailerq.rules.reporting import Reports
from mailerq.rules.steering import Steering
from mailerq.wire.server import Settings

__all__ = ["Bounds", "Terms"]

STRAINED_SECONDS: Final = 10.0
"""Timeout of every step while connection slots are short."""

BY_PLUGINS: Final = ("PLAIN", "LOGIN")
"""The login mechanisms where plugins are asked; CRAM-MD5 gives them no password."""

ACCESS: Final = (
    "smtp_range",
    "smtp_relay_range",
    "smtp_local_domains",
    "smtp_relay_domains",
    "smtp_proxy",
    "smtp_xclient_range",
)
STEERING: Final = ("smtp_extract", "smtp_extract_range", "smtp_extract_logins", "max_delivertime")
LOGINS: Final = ("smtp_auth", "smtp_username", "smtp_password")
CERTIFICATE: Final = ("smtp_certificate", "smtp_key", "smtp_ciphers")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a session in seconds; `rate` is bytes/s of a mail, beyond the `idle` time."""

    idle: float
    command: float
    handshake: float
    session: float
    rate: float

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(
            config.smtp_timeout,
            config.smtp_command_timeout,
            config.smtp_handshake_timeout,
            config.smtp_session_timeout or math.inf,
            config.smtp_data_minrate,
        )

    def tightened(self) -> Self:
        return replace(
            self,
            idle=min(self.idle, STRAINED_SECONDS),
            command=min(self.command, STRAINED_SECONDS),
            handshake=min(self.handshake, STRAINED_SECONDS),
        )

    @property
    def shortest(self) -> float:
        return min(self.idle, self.command, self.handshake, self.session)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One snapshot of the settings, and the objects that sessions need. Any thread may use it.

    `settings` are for SMTP, `lmtp` for LMTP. `tight` bounds apply while connection slots are short.
    """

    config: Config
    settings: Settings
    lmtp: Settings
    access: Access
    local_addresses: LocalAddresses
    steering: Steering
    authenticator: Authenticator
    tls: ssl.SSLContext | None
    bounds: Bounds
    tight: Bounds
    reports: Reports

    @classmethod
    def of(cls, config: Config, before: Self | None = None, notes: list[str] | None = None) -> Self:
        """Read what the settings name. Raises `ConfigError` with all mistakes.

        Parts whose settings are as in `before` are kept, except the certificate. A certificate that
        this account can no longer read is kept too, with a line in `notes`: root has read it.
        """
        problems: list[Problem] = []

        def part(name: str, make: Callable[[Config], Any], *names: str) -> Any:
            if before is not None and names and alike(config, before.config, *names):
                return getattr(before, name)
            try:
                return make(config)
            except ConfigError as error:
                note = _hidden_certificate(config, before) if name == "tls" else None
                if note is None or before is None or notes is None:
                    problems.extend(error.problems)
                    return None
                notes.append(note)
                return before.tls

        parts = {
            "tls": part("tls", tls_context),
            "authenticator": part("authenticator", Authenticator.of, *LOGINS),
            "local_addresses": part("local_addresses", LocalAddresses.of, "smtp_local_addresses"),
            "steering": part("steering", Steering.of, *STEERING),
            "access": part("access", Access.of, *ACCESS),
            "reports": part("reports", Reports.of),
        }
        if problems:
            raise ConfigError.of(problems)
        settings = Settings(
            hostname=config.hostname,
            max_size=config.smtp_maxsize,
            max_recipients=config.smtp_maxrecipients,
            starttls=parts["tls"] is not None,
            mechanisms=parts["authenticator"].mechanisms,
            normalize=config.smtp_bare_newline == "normalize",
            dsn=config.dsn_advertise,
        )
        bounds = Bounds.of(config)
        return cls(
            config=config,
            settings=settings,
            lmtp=replace(settings, lmtp=True),
            bounds=bounds,
            tight=bounds.tightened(),
            **parts,
        )

    def asking_plugins(self, asking: bool) -> Self:
        """These terms with the login mechanisms for plugins."""
        if not asking:
            return self
        return replace(
            self,
            settings=replace(self.settings, mechanisms=BY_PLUGINS),
            lmtp=replace(self.lmtp, mechanisms=BY_PLUGINS),
        )

    def is_local(self, recipient: str) -> bool:
        """Whether anybody may send to this recipient, whose mail ends here."""
        return is_local(recipient, self.access, self.local_addresses)

    def is_delivered(self, recipient: str) -> bool:
        """Whether `local-delivery` takes the mail for this recipient."""
        return bool(self.config.local_delivery) and self.access.is_in_local_domain(recipient)

    def is_listed(self, recipient: str) -> bool:
        """Whether `smtp-local-addresses` has a recipient."""
        return bool(self.local_addresses.has(recipient))

    def returned(self, recipient: str, now: float) -> verp.Return | verp.Problem | None:
        """What a signed return address says; None for other recipients, or without keys."""
        keys = self.reports.verp_keys
        if not keys:
            return None
        return verp.verify(recipient, keys, now=now, max_age=self.config.verp_maxage)

    def is_ours(self, recipient: str) -> bool:
        """Whether anybody may send to this recipient."""
        return self.is_local(recipient) or self.access.is_relayed(recipient)


def _hidden_certificate(config: Config, before: Terms | None) -> str | None:
    """The note when the same files exist but this account may not read them."""
    if before is None or not alike(config, before.config, *CERTIFICATE):
        return None
    for key in ("smtp-certificate", "smtp-key"):
        path = config.text(key)
        if path and os.path.exists(path) and not os.access(path, os.R_OK, effective_ids=True):
            return (
                f"{key}: this account may not read {path} again: it stays as it was until a restart"
            )
    return None
