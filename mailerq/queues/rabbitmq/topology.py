"""Which queues a broker has for a queue of ours: their names, arguments, and how long mail waits.

Theory of operation
-------------------
A queue is one durable queue of the broker. A broker delivers in order of arrival and cannot find a
message, so what cannot go now must not stay with a consumer:

- A message for later goes to a *wait queue*, one for each delay of `DELAYS`, whose messages all
  expire after that delay and fall back into their queue. An expiry is noticed at the head of a
  queue only, so each delay has a queue of its own. Other delays wait in steps, see `step_for`.
- A message of a destination that takes nothing now goes to the *parked queue* of that destination.
  Its messages expire into their queue too, after `PARKED_SECONDS`: the mail of a host that never
  comes back is looked at by others. `index` names the queue that lists destinations with parked
  mail, which AMQP cannot list.

All names begin with the name of their queue (`mailerq.address.queue_leads_to`). Wait queues never
expire: their number is fixed, and an expired queue would take its messages along. A parked queue
expires when it is not declared for a day longer than its messages live, so a publisher declares it
anew after `DECLARE_SECONDS`.

Everything here is pure: no I/O, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, Literal

__all__ = [
    "DECLARE_SECONDS",
    "DELAYS",
    "EXPIRES_SECONDS",
    "PARKED_SECONDS",
    "QueueType",
    "Topology",
    "instance_queue",
    "lock_name",
    "name_problem",
    "step_for",
]

QueueType = Literal["quorum", "classic"]

DELAYS: Final = (
    1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400
)  # fmt: skip
"""Seconds of the wait queues: those of the default of ``retry-interval``, and enough others that
few steps make up any delay."""

LATE_SHARE: Final = 0.02
LATE_SECONDS: Final = 0.5
"""A message may be late by this share of its delay and this many seconds, if that saves a step."""

PARKED_SECONDS: Final = 4 * 3600
INDEX_SECONDS: Final = 2 * PARKED_SECONDS
HANDED_SECONDS: Final = 900
"""How long mail waits for the instance that it was handed to; then others look at it again."""

EXPIRES_SECONDS: Final = PARKED_SECONDS + 86400
DECLARE_SECONDS: Final = 1800.0

MAX_NAME: Final = 255
"""Bytes of a name in AMQP 0-9-1."""

QUORUM_SINCE: Final = (3, 10)
"""Quorum queues with an expiry, and with dead lettering that loses nothing."""


def step_for(delay: float) -> int:
    """The next wait of a message that has `delay` seconds to go, of `DELAYS`; 0 for none.

    A message is never early. Waited out in steps, it is late by at most 2 % and half a second, plus
    what the broker needs. Delays of `DELAYS` take one step, the last day of others up to fourteen.

    >>> step_for(900), step_for(899.7), step_for(1000), step_for(5e6), step_for(-1)
    (900, 900, 900, 86400, 0)
    """
    if delay <= 0:
        return 0
    most = delay * (1 + LATE_SHARE) + LATE_SECONDS
    return max((step for step in DELAYS if step <= most), default=DELAYS[0])


def name_problem(name: str) -> str | None:
    """Why a broker cannot have a queue of this name, beyond `mailerq.address.queue_problem`.

    >>> name_problem("amq.gen-x")
    'begins with amq., which RabbitMQ keeps for itself'
    """
    if name.startswith("amq."):
        return "begins with amq., which RabbitMQ keeps for itself"
    if len(name.encode()) > MAX_NAME:
        return f"is longer than {MAX_NAME} bytes"
    return None


def instance_queue(queue: str, instance: str) -> str:
    """The name of the queue with the mail that others hand to an instance of a cluster.

    >>> instance_queue("outbox", "mx1.example.com:25")
    'outbox.at.mx1.example.com:25'
    """
    return Topology()._name(queue, "at", instance)


def lock_name(exchange: str, ip: str) -> str:
    """The name of the queue that is the lock of an address, in the cluster of an exchange.

    >>> lock_name("cluster", "192.0.2.1")
    'cluster.lock.192.0.2.1'
    """
    return f"{exchange}.lock.{ip}"


@dataclass(slots=True, frozen=True)
class Topology:
    """The queues of a configuration on a broker of one version.

    `max_priority`, 0 to 255, and `lazy` are for classic queues only; a quorum queue knows two
    priorities from version 4.0 on, and 32 from 4.3 on, without being told. `exchange` is empty for
    the default exchange, and gets what is published to queues of ours; wait and parked queues are
    reached directly.
    """

    queue_type: QueueType = "quorum"
    version: tuple[int, ...] = ()
    exchange: str = ""
    max_priority: int = 0
    lazy: bool = False

    def problem(self) -> str | None:
        """Why this broker cannot have these queues, or None."""
        if self.queue_type == "quorum" and self.version and self.version < QUORUM_SINCE:
            found = ".".join(map(str, self.version))
            return (
                f"quorum queues with an expiry need RabbitMQ 3.10, and this is {found}; set "
                "rabbitmq-queue-type: classic"
            )
        return None

    def main(self) -> dict[str, Any]:
        """The arguments of a queue of ours."""
        arguments = self._typed()
        if self.queue_type == "classic" and self.max_priority:
            arguments["x-max-priority"] = self.max_priority
        if self.lazy:
            arguments["x-queue-mode"] = "lazy"
        return arguments

    def wait(self, queue: str, seconds: int) -> tuple[str, dict[str, Any]]:
        """The name and the arguments of the wait queue of a delay."""
        return self._name(queue, "wait", str(seconds)), self._falling_back(queue, seconds)

    def waits(self, queue: str) -> list[tuple[str, dict[str, Any]]]:
        """All wait queues of a queue."""
        return [self.wait(queue, seconds) for seconds in DELAYS]

    def handed(self, queue: str) -> dict[str, Any]:
        """The arguments of an `instance_queue` of a queue, which has no expiry itself."""
        arguments = self._falling_back(queue, HANDED_SECONDS)
        if self.queue_type == "classic" and self.max_priority:
            arguments["x-max-priority"] = self.max_priority
        return arguments

    def parked(self, queue: str, destination: str) -> tuple[str, dict[str, Any]]:
        """The name and the arguments of the parked queue of a destination."""
        arguments = self._falling_back(queue, PARKED_SECONDS)
        arguments["x-expires"] = EXPIRES_SECONDS * 1000
        if self.queue_type == "classic" and self.max_priority:
            arguments["x-max-priority"] = self.max_priority
        return self._name(queue, "parked", f"to.{destination}"), arguments

    def index(self, queue: str) -> tuple[str, dict[str, Any]]:
        """The name and the arguments of the list of destinations with parked mail."""
        arguments = self._typed()
        arguments["x-message-ttl"] = INDEX_SECONDS * 1000
        return self._name(queue, "parked", "index"), arguments

    def _typed(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"x-queue-type": self.queue_type}
        if self.queue_type == "quorum" and self.version >= (4,):
            # Since 4.0 a message is dropped that came back 20 times, by crashes, put back, or only
            # looked at. Earlier versions refuse a negative limit, and have none.
            arguments["x-delivery-limit"] = -1
        return arguments

    def _falling_back(self, queue: str, seconds: int) -> dict[str, Any]:
        arguments = self._typed()
        arguments["x-message-ttl"] = seconds * 1000
        arguments["x-dead-letter-exchange"] = ""
        arguments["x-dead-letter-routing-key"] = queue
        if self.lazy:
            arguments["x-queue-mode"] = "lazy"
        if self.queue_type == "quorum":
            # A message leaves only when its queue has confirmed it. This needs `reject-publish`.
            arguments["x-dead-letter-strategy"] = "at-least-once"
            arguments["x-overflow"] = "reject-publish"
        return arguments

    def _name(self, queue: str, kind: str, rest: str) -> str:
        """A name; one that is too long ends in a digest of the whole."""
        name = f"{queue}.{kind}.{rest}"
        encoded = name.encode(errors="surrogatepass")
        if len(encoded) <= MAX_NAME and name.isprintable():
            return name
        digest = blake2b(encoded, digest_size=16).hexdigest()
        start = f"{queue}.{kind}.".encode()
        if len(start) + len(digest) >= MAX_NAME:  # the name of the queue itself is that long
            return f"{kind}.{digest}"
        shown = ascii(rest)[1:-1].encode()[: MAX_NAME - len(start) - len(digest) - 1]
        return f"{start.decode()}{shown.decode()} {digest}"
