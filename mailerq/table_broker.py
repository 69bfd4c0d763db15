"""The settings of RabbitMQ, a part of `mailerq.table.Table`.

The names of the queues are in `mailerq.table`: the embedded queue has them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import BROKERS, FLAG, NUMBER, QUEUE, SIZE, TEXT, choice, fixed, setting
from mailerq.table_incoming import IncomingTable

__all__ = ["BrokerTable"]

BROKER: Final = "RabbitMQ"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class BrokerTable(IncomingTable):
    """Where the brokers are, and how their queues are used."""

    rabbitmq_address: str = fixed(
        "",
        BROKERS,
        BROKER,
        "The brokers that keep the queues: amqp://user:password@host:port/vhost or amqps://…, the"
        " next one if one does not answer, with commas between them; docs/rabbitmq.md explains it.",
        unset="the embedded queue",
        secret=True,
    )
    rabbitmq_host: str = fixed(
        "",
        TEXT,
        BROKER,
        "Older form of rabbitmq-address: the hosts, with or without ports.",
        unset="none",
    )
    rabbitmq_user: str = fixed("", TEXT, BROKER, "The login for rabbitmq-host.", unset="guest")
    rabbitmq_password: str = fixed("", TEXT, BROKER, "Its password.", unset="guest", secret=True)
    rabbitmq_vhost: str = fixed("", TEXT, BROKER, "The vhost of rabbitmq-host.", unset="/")
    rabbitmq_verify: bool = fixed(
        True, FLAG, BROKER, "Refuse a broker (amqps) whose certificate is not valid for its host."
    )
    rabbitmq_queue_type: str = fixed(
        "quorum",
        choice("quorum", "classic"),
        BROKER,
        "The type of the queues that are declared. Quorum queues survive the loss of a broker of a"
        " cluster, and lose no mail that waits; they need RabbitMQ 3.10.",
    )
    rabbitmq_declare: bool = fixed(
        True,
        FLAG,
        BROKER,
        "Declare the queues and the exchange. Without this they must exist, with whatever"
        " arguments; queues for mail that waits are declared in any case.",
    )
    rabbitmq_exchange: str = fixed(
        "",
        QUEUE,
        BROKER,
        "The exchange that everything is published to; queues are bound to it by their names.",
        unset="the default exchange",
    )
    rabbitmq_durable: bool = fixed(
        True,
        FLAG,
        BROKER,
        "Declare the queues of results so that they survive a restart of the broker; queues with"
        " mail survive in any case.",
    )
    rabbitmq_persistent: bool = setting(
        True,
        FLAG,
        BROKER,
        "Have the broker keep results on disk; mail is kept on disk in any case.",
    )
    rabbitmq_lazy: bool = fixed(
        False,
        FLAG,
        BROKER,
        "Declare classic queues as lazy, for RabbitMQ before 3.12; later ones are lazy always.",
    )
    rabbitmq_maxpriority: int = fixed(
        0,
        NUMBER,
        BROKER,
        "The highest priority of classic queues; quorum queues know priorities without this. 0:"
        " none.",
        minimum=0,
        maximum=255,
    )
    rabbitmq_encoding: str = setting(
        "plain",
        choice("plain", "gzip"),
        BROKER,
        "What is published: JSON as it is, or compressed. Both are read always.",
    )
    rabbitmq_throttle: int = setting(
        1000,
        NUMBER,
        BROKER,
        "Messages on their way to the broker that it has not confirmed yet.",
        minimum=1,
    )
    rabbitmq_flush_qos: int = setting(
        1000,
        NUMBER,
        BROKER,
        "Messages fetched at a time from a queue of parked or waiting mail.",
        minimum=1,
        maximum=50_000,
    )
    rabbitmq_minqos: int = setting(
        100,
        NUMBER,
        BROKER,
        "Messages held at a time at least, where large ones lower rabbitmq-qos.",
        minimum=1,
    )
    fallback_maxsize: int = setting(
        1 << 30,
        SIZE,
        BROKER,
        "Mail kept in the folder fallback of queue-directory while no broker takes it, in bytes of"
        " all processes; it is moved over later. 0: such mail is answered with 451.",
        minimum=0,
    )
    rabbitmq_consumers: int = fixed(
        1,
        NUMBER,
        BROKER,
        "Taken for older configurations: one connection consumes, and more cores take"
        " smtp-processes.",
        minimum=1,
    )
    rabbitmq_publishers: int = fixed(
        1,
        NUMBER,
        BROKER,
        "Taken for older configurations: one connection publishes, and more cores take"
        " smtp-processes.",
        minimum=1,
    )
