"""Decides what happens to a message of the outbox now: refuse it, hold it, or send it.

Each attempt makes a new plan from the message and the current settings, so changed settings apply
to waiting mail too. The hosts of the target are looked up elsewhere.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mailerq.address import parse_mailbox
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.mail.headers import HOP_LIMIT, Header
from mailerq.message import Message
from mailerq.rules import responses
from mailerq.rules.local_ips import NO_ADDRESSES, LocalIps, NoPool
from mailerq.rules.logins import demands_of, login_of
from mailerq.rules.responses import Outcome
from mailerq.rules.retry import expires_at, not_before
from mailerq.rules.routes import Route, loop_problem, route_of
from mailerq.rules.row import PAUSE, Row, compared
from mailerq.rules.rows import Rows
from mailerq.rules.security import NOTHING, Demands
from mailerq.wire import smtp
from mailerq.wire._lines import line_ends

__all__ = ["Hold", "Park", "Plan", "Refuse", "Send", "body_problem", "plan", "stopped"]

SHORT_BYTES: Final = 1 << 14
"""Up to this size the lines of a header are counted first."""

HOP_BYTES: Final = 10 * HOP_LIMIT
"""A shorter header has no more than `HOP_LIMIT` Received fields: each has a name, a colon and a
line end."""


class Refuse(msgspec.Struct, frozen=True):
    """The message gets a result without an attempt. `domain` is empty if there is none.

    `row` is the operator's row that wants it so. A message that is deferred, or waits for a fault
    of this host to end, has failed if its next attempt would come after `expires`.
    """

    outcome: Outcome
    domain: str = ""
    expires: float = 0.0
    row: int = 0


class Hold(msgspec.Struct, frozen=True):
    """Do not send the message before `until`, seconds since 1970."""

    until: float


class Park(msgspec.Struct, frozen=True):
    """The message waits until the pause `row` ends."""

    row: int
    domain: str


class Send(msgspec.Struct, frozen=True):
    """Send the message now.

    `local_ips` are the addresses that the message may leave from, empty for any. `demands` is what
    the message itself wants a connection to prove first. `envelope` and `recipient` are in wire
    form. The message must not be sent after `expires`. Of several local addresses `pinned` is the
    one that the last attempt left from, if the message has to come back from there. For those in
    `refused` peers have refused the message: others come first.
    """

    route: Route
    domain: str
    envelope: str
    recipient: str
    expires: float
    local_ips: tuple[str, ...] = ()
    demands: Demands = NOTHING
    pinned: str = ""
    refused: tuple[str, ...] = ()


Plan = Refuse | Hold | Park | Send


def plan(
    message: Message,
    config: Config,
    *,
    now: float,
    seen: float,
    rows: Rows | None = None,
    local: LocalIps = NO_ADDRESSES,
) -> Plan:
    """Decide about a message by its properties; `body_problem` decides about its body.

    `seen` is when the message first became due, unless its properties say when. `rows` are the
    operator's rows, None if there are none.

    >>> message = Message({"envelope": "a@b.test", "recipient": "c@d.test"})
    >>> plan(message, Config(hostname="me.test"), now=0.0, seen=0.0).route.host
    'd.test'
    """
    properties = message.properties
    problem = message.problem() or loop_problem(properties, config.rabbitmq_outbox)
    if problem is not None:
        return Refuse(responses.unsendable(problem))
    due = not_before(properties, now=now)
    if due is not None and now < due:
        return Hold(due)
    envelope, recipient = message.envelope, message.recipient
    try:
        mailbox = parse_mailbox(recipient)
    except AddressError as error:
        problem = f"property recipient: {error}"
        return Refuse(responses.unsendable(problem, smtp.BAD_RECIPIENT))
    try:
        # A domain in A-labels passes through servers without SMTPUTF8.
        if not recipient.isascii():
            recipient = str(mailbox)
        if envelope:
            sender = parse_mailbox(envelope)
            envelope = envelope if envelope.isascii() else str(sender)
    except AddressError as error:
        problem = f"property envelope: {error}"
        return Refuse(responses.unsendable(problem, smtp.BAD_SENDER))
    domain = mailbox.domain
    expires = expires_at(properties, now=seen, max_delivertime=config.max_delivertime)
    if now > expires:
        return Refuse(responses.EXPIRED, domain)
    if rows is not None and (row := rows.suppression(compared(mailbox), domain)) is not None:
        return Refuse(responses.suppressed(row), domain, row=row.id)
    try:
        route = route_of(properties, domain, config)
        login = None if route.mx or route.lmtp else login_of(properties, config)
        demands = demands_of(properties, login)
        local_ips: tuple[str, ...] = ()
        named = local.default or "ips" in properties or "pool" in properties
        if named and not route.lmtp:
            local_ips = local.allowed(properties)
    except AddressError as error:
        return Refuse(responses.unsendable(str(error)), domain)
    except NoPool as error:
        return Refuse(responses.no_pool(str(error)), domain, expires)
    if rows is not None:
        tags = properties.get("tags") or ()
        row, local_ips = rows.early(domain, tags, local_ips, by_domain=route.name == domain)
        if row is not None:
            return stopped(row, domain, expires)
    refused = properties.get("refusedips")
    pinned = properties.get("forcedip") if len(local_ips) > 1 else None
    if pinned not in local_ips:
        pinned = ""
    return Send(
        route, domain, envelope, recipient, expires, local_ips, demands, pinned,
        tuple(map(str, refused)) if refused and isinstance(refused, list) else (),
    )  # fmt: skip


def stopped(row: Row, domain: str, expires: float) -> Refuse | Park:
    """What becomes of a message that a pause or a forced error stops."""
    if row.kind == PAUSE:
        return Park(row.id, domain)
    return Refuse(responses.forced(row), domain, expires, row.id)


def body_problem(message: Message, *, supplied: bool) -> Outcome | None:
    """Why the body of a message cannot be sent, or None.

    `supplied`: a plugin may supply a body where there is none.
    """
    body = message.body
    if body is None:
        # An object in ``mime`` becomes a body later, and that body is judged then.
        return None if supplied or message.properties.get("mime") else responses.NO_DATA
    # Most headers are too short, or have too few lines, which cost less to count than to read.
    end = body.find(b"\r\n\r\n", 0, SHORT_BYTES)
    if end < 0 and len(body) <= SHORT_BYTES:
        end = len(body)
    if 0 <= end < HOP_BYTES or (end >= 0 and line_ends(body, end) < HOP_LIMIT):
        return None
    if Header(body).is_looping():
        return responses.TOO_MANY_HOPS
    return None
