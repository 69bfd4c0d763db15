"""The brokers that the settings name."""

from __future__ import annotations

from mailerq.brokers import Address, addresses_of_hosts, parse_addresses
from mailerq.config import Config

__all__ = ["Address", "addresses_of", "parse_addresses"]


def addresses_of(config: Config) -> list[Address]:
    """The brokers of ``rabbitmq-address`` or ``rabbitmq-host``, in the order to try them.

    >>> addresses_of(Config(rabbitmq_host="a.test", rabbitmq_user="u", rabbitmq_password="p"))
    [<amqp://a.test:5672 as u, vhost />]
    """
    if config.rabbitmq_address:
        return parse_addresses(config.rabbitmq_address)
    return addresses_of_hosts(
        config.rabbitmq_host,
        config.rabbitmq_user,
        config.rabbitmq_password,
        config.rabbitmq_vhost,
    )
