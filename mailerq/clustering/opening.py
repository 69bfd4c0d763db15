"""Opens the exchange of a cluster, as the settings say."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from mailerq.config import SETTINGS, Config
from mailerq.queues.opening import broker_problem

if TYPE_CHECKING:
    from mailerq.queues.rabbitmq.exchange import Exchange

__all__ = ["open_exchange", "settings_digest"]

ALIKE: Final = (
    "cluster-exchange", "rabbitmq-outbox", "retry-interval", "max-delivertime", "max-attempts",
)  # fmt: skip
ALIKE_PREFIXES: Final = ("domain-max", "ip-max", "connection-max", "smtp-local-", "smtp-relay-")
ALIKE_FILES: Final = ("limits-file", "responses-file")
"""Settings that all instances should have alike: mail takes the same way through each of them, and
a limit is the same at each owner of an address."""


def open_exchange(config: Config, clock: Callable[[], int] = time.monotonic_ns) -> Exchange:
    """A link to the exchange of `cluster-exchange`, not connected yet. Raises `ConfigError`."""
    if (problem := broker_problem(config)) is not None:
        raise problem
    # Others do not need pika.
    from mailerq.queues.rabbitmq.addresses import cluster_addresses_of
    from mailerq.queues.rabbitmq.exchange import Exchange

    own = config.cluster_address or config.cluster_host
    context = None
    if not config.cluster_verify or not (own or config.rabbitmq_verify):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Exchange(
        cluster_addresses_of(config),
        config.cluster_exchange,
        clock=clock,
        name=config.instance,
        context=context,
    )


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
