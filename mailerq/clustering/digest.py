"""A digest of the settings that all instances of a cluster should have alike."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from mailerq.config import SETTINGS, Config

__all__ = ["settings_digest"]

ALIKE: Final = (
    "cluster-exchange", "rabbitmq-outbox", "retry-interval", "max-delivertime", "max-attempts",
)  # fmt: skip
ALIKE_PREFIXES: Final = ("domain-max", "ip-max", "connection-max", "smtp-local-", "smtp-relay-")
ALIKE_FILES: Final = ("limits-file", "responses-file")
"""Settings that all instances should have alike: mail takes the same way through each of them, and
a limit is the same at each owner of an address."""


def settings_digest(config: Config) -> str:
    """A digest of the settings that all instances should have alike. Reads their files."""
    digest = blake2b(digest_size=8)
    for each in SETTINGS:
        if each.key in ALIKE or each.key.startswith(ALIKE_PREFIXES):
            digest.update(f"{each.key}: {each.write(getattr(config, each.attribute))}\n".encode())
        elif each.key in ALIKE_FILES and (path := getattr(config, each.attribute)):
            digest.update(f"{each.key}\n".encode())
            try:
                with open(path, "rb") as file:
                    digest.update(file.read())
            except OSError:
                digest.update(b"?")
    return digest.hexdigest()
