"""The brokers that the settings name."""

from __future__ import annotations

from mailerq.brokers import Address, addresses_of_hosts, parse_addresses
from mailerq.config import Config

__all__ = ["Address", "addresses_of", "cluster_addresses_of", "parse_addresses"]


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


def cluster_addresses_of(config: Config) -> list[Address]:
    """The brokers of the exchange of a cluster, in the order to try them.

    >>> cluster_addresses_of(Config(cluster_host="a.test", rabbitmq_address="amqp://b.test"))
    [<amqp://a.test:5672 as guest, vhost />]
    """
    if config.cluster_address:
        return parse_addresses(config.cluster_address)
    if config.cluster_host:
        return addresses_of_hosts(
            config.cluster_host,
            config.cluster_user,
            config.cluster_password,
            config.cluster_vhost,
        )
    return addresses_of(config)
