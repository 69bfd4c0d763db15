"""What an operator does to messages that wait: hold, release, retry, delete, bounce, reroute.

A queue applies a `Change` to a message that nobody has leased. Three changes need no look at the
document, and are names; the others are functions of the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal

import msgspec

from mailerq.config import Config
from mailerq.mail.dsn import excerpt
from mailerq.message import Message, Result, format_time, without_password
from mailerq.rules import bounces, responses
from mailerq.rules.bounces import Bounce
from mailerq.rules.reporting import NO_REPORTS, Reports
from mailerq.rules.routes import result_queues

__all__ = ["Change", "Copy", "Decide", "Decision", "Finished", "Kept", "Made", "Order"]

MAX_WORDS: Final = 500
"""Characters of a name or a reason that an order keeps."""


class Kept(msgspec.Struct, frozen=True):
    """The message stays, with its body and its number, and with these properties.

    `due` is seconds since 1970; None: the due time stays, and a held message stays held. A message
    of this queue that is held is not made due: the change does not apply.
    """

    queue: str
    properties: dict[str, Any]
    due: float | None = None


class Copy(msgspec.Struct, frozen=True):
    """A document for another queue, in the same step; with the body of the message, or without."""

    queue: str
    properties: dict[str, Any]
    with_body: bool


class Made(msgspec.Struct, frozen=True):
    """Another message for a queue, in the same step; `make` gets the body of this one."""

    queue: str
    make: Callable[[bytes | None], Message]


class Decision(msgspec.Struct, frozen=True):
    """What becomes of a message, which is removed unless `kept`."""

    kept: Kept | None
    copies: Sequence[Copy] = ()
    made: Sequence[Made] = ()


Decide = Callable[[Message], Decision | None]
"""Decides by the properties, without the body; None: the change does not apply."""

Change = Literal["hold", "release", "delete"] | Decide

Finished = Callable[[Message, Result], object]
"""Gets each message that was failed, and its result."""


class Order(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An order of an operator. `who` and `reason` are for the log and for results.

    For ``reroute``: `smarthost` and `port` are the new host of the messages, `direct` sends them to
    the hosts of their domains, and `to_queue` moves them to another queue.
    """

    action: Literal["hold", "release", "retry", "delete", "bounce", "reroute"]
    who: str = "an operator"
    reason: str = ""
    smarthost: str = ""
    port: int = 25
    direct: bool = False
    to_queue: str = ""

    def change(
        self,
        queue: str,
        config: Config,
        *,
        now: float,
        finished: Finished | None = None,
        reports: Reports = NO_REPORTS,
        next_id: Callable[[], str] | None = None,
    ) -> Change:
        """The change of messages of a queue. `now` is seconds since 1970.

        Senders of bounced messages get reports with the texts of `reports`, if there are ids for
        these (`next_id`). The change may run in another thread.
        """
        match self.action:
            case "hold" | "release" | "delete":
                return self.action
            case "retry":
                return lambda message: _retry(message, queue, now)
            case "bounce":
                return lambda message: self._bounce(
                    message, config, now, finished, reports, next_id
                )
            case "reroute":
                return lambda message: self._reroute(message, queue, now)

    def _bounce(
        self,
        message: Message,
        config: Config,
        now: float,
        finished: Finished | None,
        reports: Reports,
        next_id: Callable[[], str] | None,
    ) -> Decision:
        """The message has failed; its sender and its queues hear of it as of any failure."""
        results = message.properties.get("results")
        results = results if isinstance(results, list) else []
        text = f"bounced by {self.who[:MAX_WORDS]}"
        if self.reason:
            text += f": {self.reason[:MAX_WORDS]}"
        outcome = responses.bounced(text)
        result = Result(
            attempt=len(results) + 1,
            type=outcome.type,
            state=outcome.state,
            result=outcome.result,
            time=format_time(now),
            code=outcome.code,
            status=outcome.status,
            description=outcome.description,
        )
        properties = {**message.properties, "results": [*results, result.to_dict()]}
        queues = result_queues(
            properties, config.result_queues, "results", "failure", outbox=config.rabbitmq_outbox
        )
        if finished is not None:
            finished(message, result)
        made = []
        bounce = bounces.about(properties, bounces.FAILED, result, config, from_peer=False)
        if bounce is not None and next_id is not None:
            make = partial(_report, bounce, reports, next_id, now, config.dsn_maxsize)
            made.append(Made(bounce.queue, make))
        copies = [_copy(properties, queue, config.report_queue) for queue in queues]
        return Decision(None, copies, made)

    def _reroute(self, message: Message, queue: str, now: float) -> Decision:
        properties = dict(message.properties)
        if self.direct:
            properties.pop("smarthost", None)
        elif self.smarthost:
            properties["smarthost"] = {"hostname": self.smarthost, "port": self.port}
        if self.to_queue and self.to_queue != queue:
            return Decision(Kept(self.to_queue, properties, now))
        return Decision(Kept(queue, properties))


def _report(
    bounce: Bounce,
    reports: Reports,
    next_id: Callable[[], str],
    now: float,
    limit: int,
    body: bytes | None,
) -> Message:
    quoted = excerpt(body, full=bounce.full, limit=limit)
    return bounces.report([bounce], quoted, reports.texts, id=next_id(), now=now)


def _retry(message: Message, queue: str, now: float) -> Decision | None:
    """Due now. What was never tried keeps the time that its sender asked for."""
    if not message.properties.get("results"):
        return None
    properties = dict(message.properties)
    properties.pop("delayed", None)
    return Decision(Kept(queue, properties, now))


def _copy(properties: dict[str, Any], queue: str, report_queue: str | None) -> Copy:
    """A copy for a result queue, as `mailerq.outbound.settlement` makes them."""
    properties = without_password(properties)
    if properties.get("keepmime"):
        return Copy(queue, properties, with_body=queue != report_queue)
    without = {name: value for name, value in properties.items() if name != "mime"}
    return Copy(queue, without, with_body=False)
