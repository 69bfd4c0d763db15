"""How queues in a broker are used, as the settings say, and what a broker cannot do of that."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

from mailerq.config import Config
from mailerq.queues.rabbitmq.publisher import PUBLISH_SECONDS, THROTTLE
from mailerq.queues.rabbitmq.takers import FETCH_MESSAGES, HOLD_SECONDS, MIN_MESSAGES
from mailerq.queues.rabbitmq.topology import QueueType, lock_name

__all__ = ["Bound", "Options"]

_RESULTS: Final = ("results", "success", "failure", "retry")
_MAIL: Final = ("outbox", "inbox", "local", "reports", "dsn")

LAZY_UNTIL: Final = (3, 12)
"""Classic queues keep their messages on disk from here on, whatever is declared."""

SETTLE_SECONDS: Final = 8.0
DURABLE_SINCE: Final = (4, 3)
"""Queues that do not survive a restart are refused."""


@dataclass(slots=True, frozen=True)
class Bound:
    """How many messages a queue keeps, and for how many seconds; 0: no limit.

    With `reports_only`, messages with a body are mail and stay.
    """

    queue: str
    messages: int
    seconds: float
    reports_only: bool = False


@dataclass(slots=True, frozen=True)
class Options:
    """How to use a broker.

    With `declare` false, the queues of the settings must be there, with whatever arguments; wait
    and parked queues are declared in any case. `compress` publishes with the content encoding gzip,
    which is understood always. `throttle` is the number of publications on the way at a time.

    `names` are the queues of the settings, `outbox` is the one whose mail waits and is parked.
    The mail of a destination is not parked in its quorum queue for `settle_seconds` after that was
    declared: RabbitMQ 3.10 loses such a queue if killed in the seconds behind.

    Queues whose names begin with `locks` are those of a cluster; no mail goes there.

    `results` are queues that hold no mail that anybody answers for: only these may be not
    `durable`, and what they get not `persistent`.
    """

    queue_type: QueueType = "quorum"
    declare: bool = True
    exchange: str = ""
    max_priority: int = 0
    compress: bool = False
    throttle: int = THROTTLE
    context: ssl.SSLContext | None = None
    publish_seconds: float = PUBLISH_SECONDS
    hold_seconds: float = HOLD_SECONDS
    first_pause_seconds: float = 0.1
    settle_seconds: float = 0.0
    outbox: str = "outbox"
    locks: str = ""
    names: tuple[str, ...] = ()
    results: frozenset[str] = frozenset()
    durable: bool = True
    persistent: bool = True
    lazy: bool = False
    fetch: int = FETCH_MESSAGES
    min_qos: int = MIN_MESSAGES
    consumers: int = 1
    publishers: int = 1
    bounds: tuple[Bound, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Self:
        """The options that the settings ask for."""
        mail = {str(getattr(config, f"rabbitmq_{name}") or "") for name in _MAIL}
        mail.add(config.rabbitmq_outbox)
        results = {config.result_queues[name] for name in _RESULTS} - mail - {""}
        context = None
        if not config.rabbitmq_verify:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        bounds: tuple[Bound, ...] = ()
        if config.failure_queue:
            messages, seconds = config.failure_bounds
            messages *= config.smtp_processes  # the queue is one, for all processes
            only = not config.failure_is_named
            bounds = (Bound(config.failure_queue, messages, seconds, only),)
        return cls(
            queue_type="quorum" if config.rabbitmq_queue_type == "quorum" else "classic",
            declare=config.rabbitmq_declare,
            exchange=config.rabbitmq_exchange,
            max_priority=config.rabbitmq_maxpriority,
            compress=config.rabbitmq_encoding == "gzip",
            throttle=config.rabbitmq_throttle,
            context=context,
            settle_seconds=SETTLE_SECONDS if config.rabbitmq_queue_type == "quorum" else 0.0,
            outbox=config.rabbitmq_outbox,
            locks=lock_name(config.cluster_exchange, "") if config.has_cluster else "",
            names=tuple(sorted((mail | results) - {""})),
            results=frozenset(results),
            durable=config.rabbitmq_durable,
            persistent=config.rabbitmq_persistent,
            lazy=config.rabbitmq_lazy,
            fetch=config.rabbitmq_flush_qos,
            min_qos=config.rabbitmq_minqos,
            consumers=config.rabbitmq_consumers,
            publishers=config.rabbitmq_publishers,
            bounds=bounds,
        )

    def is_transient(self, queue: str, version: tuple[int, ...]) -> bool:
        """Whether a queue of results is declared so that it does not survive a restart."""
        return (
            not self.durable
            and queue in self.results
            and self.queue_type == "classic"
            and version < DURABLE_SINCE
        )

    def is_lazy(self, version: tuple[int, ...]) -> bool:
        """Whether queues are declared as lazy: from 3.12 on that is ignored, then refused."""
        return self.lazy and self.queue_type == "classic" and version < LAZY_UNTIL

    def notes(self, version: tuple[int, ...]) -> Iterator[str]:
        """Yield what a broker of this version cannot do of what the settings say, and why."""
        broker = f"RabbitMQ {'.'.join(map(str, version)) or 'of an unknown version'}"
        quorum = self.queue_type == "quorum"
        if not self.durable:
            if quorum:
                yield (
                    f"rabbitmq-durable: false changes nothing: {broker} has quorum queues only as"
                    " durable ones; rabbitmq-queue-type: classic would have others"
                )
            elif version >= DURABLE_SINCE:
                yield (
                    f"rabbitmq-durable: false changes nothing: {broker} refuses queues that do not"
                    " survive a restart"
                )
        if not self.persistent and quorum:
            yield (
                f"rabbitmq-persistent: false changes nothing: quorum queues of {broker} keep every"
                " message on disk"
            )
        if self.lazy and quorum:
            yield (
                f"rabbitmq-lazy changes nothing: quorum queues of {broker} keep no bodies in memory"
            )
        elif self.lazy and version >= LAZY_UNTIL:
            yield (
                f"rabbitmq-lazy changes nothing: classic queues of {broker} keep messages on disk"
                " without it"
            )
        if self.max_priority and quorum:
            known = "no priorities, 4.0 has two and 4.3 has 32"
            if version >= (4, 3):
                known = "32 priorities"
            elif version >= (4,):
                known = "two priorities, up to 4 and above"
            yield (
                f"rabbitmq-maxpriority changes nothing: quorum queues of {broker} have {known},"
                " without being told"
            )
        for key, count in (("consumers", self.consumers), ("publishers", self.publishers)):
            if count > 1:
                yield (
                    f"rabbitmq-{key}: one connection does the work of {count}; smtp-processes uses"
                    " more cores"
                )
