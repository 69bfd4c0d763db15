"""From the content of one mail to messages in a queue, and the reply.

Theory of operation
-------------------
Plugins see the mail once, and then one message for each recipient. They may refuse each of these,
or fail, which counts as a 451. LMTP has a reply for each recipient. SMTP has one for all:

- No message was taken: the reply is a 4xx if there was any, else the first 5xx. Nothing is written.
- Some were taken: the reply is 250. Each refused message becomes a *failure*: a document with its
  result, in the failure queues, in the same commit. After a 4xx the failure keeps the body, since
  nobody else has a copy. The sender gets a report as for any failure (`mailerq.rules.bounces`).
- Some were taken, another got a 4xx, and no queue takes its failure: the reply is that 4xx, and
  nothing is written. The client tries all of them again.

So after a 250 each recipient's message is in some queue, or was refused for good with no queue for
failures; the application log names the recipient in either case, and the sender gets a report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from mailerq.errors import MessageError, MessageTooLarge, QueueError, QueueFull
from mailerq.escaping import escape_field
from mailerq.inbound.reports import Desk
from mailerq.inbound.spool import Claim, load
from mailerq.mail import headers, incoming
from mailerq.mail.dsn import excerpt, is_quick
from mailerq.message import Message, Result, format_time, without_password
from mailerq.plugins import Connection, Reject
from mailerq.queues import Publication
from mailerq.rules import bounces, responses
from mailerq.rules.bounces import Bounce
from mailerq.rules.local_ips import is_mapped
from mailerq.rules.routes import loop_problem, reception_queue, result_queues
from mailerq.wire import smtp
from mailerq.wire.parameters import MailParameters, RcptParameters
from mailerq.wire.server import ServerProtocol
from mailerq.wire.smtp import Reply

if TYPE_CHECKING:
    from mailerq.config import Config
    from mailerq.inbound.services import Services
    from mailerq.inbound.terms import Terms

__all__ = ["Client", "refusal_reply", "take"]

log = logging.getLogger("mailerq.server")

TURN_RECIPIENTS: Final = 100
"""Messages of a mail handled before the loop serves others."""

THREAD_BYTES: Final = 1 << 20
"""The bodies of larger mails are made in a thread: copying the bytes takes a millisecond."""

LOGGED_FAILURES: Final = 10
"""Failed recipients of one mail that the log names."""

UNKNOWN: Final = "0.0.0.0"
"""Stands for a client that its proxy cannot name; no network contains this address."""

_REFUSALS: Final = {
    incoming.Problem.HEADER: smtp.HEADER_TOO_BIG,
    incoming.Problem.FIELDS: smtp.TOO_MANY_FIELDS,
    incoming.Problem.LOOP: smtp.TOO_MANY_HOPS,
}


@dataclass(slots=True)
class Client:
    """The client of a session: the peer, or the client that a proxy names.

    A proxy that names no client is not `named`: the connection may be a health check, or the proxy
    cannot describe its client. Such a client is admitted and greeted by the proxy's address, and
    gets no other right from that.
    """

    remote: tuple[str, int]
    local: tuple[str, int]
    user: str = ""
    named: bool = True

    @property
    def standing(self) -> str:
        """The address that decides rights and limits."""
        return self.remote[0] if self.named else UNKNOWN


async def take(
    services: Services,
    terms: Terms,
    client: Client,
    plugin: Connection,
    machine: ServerProtocol,
    body: bytes | memoryview,
    claim: Claim,
) -> list[Reply]:
    """Show a mail to the plugins, publish it, and return the reply; LMTP has one per recipient.

    After a good reply the mail is safe. `plugin-timeout` covers all events of the mail together.
    """
    plugin.deadline = services.plugins.deadline()
    try:
        refusal = await plugin.data(body)
        if refusal is not None:
            return _all(refusal_reply(refusal), machine)
        if not await claim.load():
            return _all(smtp.NO_MEMORY, machine)
        return await _publish(services, terms, client, plugin, machine, body, claim)
    finally:
        plugin.deadline = math.inf


async def _publish(
    services: Services,
    terms: Terms,
    client: Client,
    plugin: Connection,
    machine: ServerProtocol,
    body: bytes | memoryview,
    claim: Claim,
) -> list[Reply]:
    envelope = _envelope(terms, client, plugin, machine)
    head = headers.head_of(body)
    reception = incoming.messages(
        head,
        envelope,
        hostname=machine.settings.hostname,
        now=services.clock(),
        next_id=services.plugins.message_id,
        outbox=terms.config.rabbitmq_outbox,
    )
    if isinstance(reception, incoming.Problem):
        return _all(_REFUSALS[reception], machine)
    for reason in reception.ignored:
        services.say_ignored("mail from %s: ignored %s", client.remote[0], reason)
    services.say_ignored.flush_late()
    if reception.doubtful:
        services.misspelt.names(reception.messages[0].properties, reception.doubtful, "field")
    if isinstance(body, memoryview):
        first = reception.messages[0].body or b""
        if len(body) < THREAD_BYTES:
            whole = load(body, len(head), first)
        else:
            whole = await trio.to_thread.run_sync(load, body, len(head), first)
        for message in reception.messages:
            message.body = whole
    messages = reception.messages
    outcomes: list[Reply | str] = []  # a refusal, or the reply for the recipient
    taken: list[Publication] = []
    desk: Desk | None = None
    reports: list[Message] = []
    if terms.config.rabbitmq_reports:
        desk = Desk(services, terms, envelope.sender, messages[0].body or b"")
    for number, message in enumerate(messages, 1):
        if number % TURN_RECIPIENTS == 0:
            await trio.lowlevel.checkpoint()
        sender, recipient = message.envelope, message.recipient
        message.local = terms.is_local(recipient)
        if desk is not None:
            await desk.mark(message)
        refusal = await claim.ask(plugin.message(message))
        queue = ""
        if desk is not None and refusal is None:
            await desk.mark(message, again=True)
            queue = desk.queue_of(message)
        reply = (
            refusal_reply(refusal)
            if refusal is not None
            else _fault(services, terms, message, is_report=bool(queue))
        )
        if reply is not None:
            outcomes.append(reply)
            # The sender knows the message by these, even if plugins changed them.
            message.properties.update(envelope=sender, recipient=recipient)
            continue
        outcomes.append(f"2.0.0 {message.properties.get('message-id', '')} for {recipient}")
        if queue:
            reports.append(message)
        else:
            queue = reception_queue(terms.config, local=message.local)
        if queue:
            if "@" not in recipient and queue == terms.config.rabbitmq_outbox:
                _qualify(message, recipient, machine.settings.hostname)
            taken.append(Publication(queue, message))
    refused = [
        (message, outcome)
        for message, outcome in zip(messages, outcomes, strict=True)
        if isinstance(outcome, Reply)
    ]
    failures: list[Publication] = []
    now = services.clock()
    told = [
        (each.message, bounces.DELIVERED, _kept(now))
        for each in taken
        if each.message.local
        and each.queue != terms.config.rabbitmq_outbox
        and ("dsn" in each.message.properties or terms.config.tells_success)
    ]
    if not machine.settings.lmtp and len(refused) < len(messages):
        for message, reply in refused:
            failure = _failures(terms.config, message, _result(reply, now), reply)
            if not failure and reply.code < 500:
                return [reply]
            failures += failure
        told += [(message, bounces.FAILED, _result(reply, now)) for message, reply in refused]
    if told:
        failures += await _reports(services, terms, told, now)
    if desk is not None and reports:
        await desk.suppress(reports)
    try:
        if taken or failures:
            await services.queues.publish(taken + failures)
    except (MessageError, QueueError) as error:
        services.counters.queue_errors += 1
        services.say_untaken("a mail from %s was not taken: %s", client.remote[0], error)
        if isinstance(error, QueueFull):
            reply = smtp.NO_MEMORY
        elif isinstance(error, MessageTooLarge):
            reply = smtp.TOO_BIG
        else:
            reply = smtp.QUEUE_UNAVAILABLE
        outcomes = [reply if isinstance(one, str) else one for one in outcomes]
        taken.clear()
    else:
        services.counters.reports += len(reports)
        services.say_untaken.flush_late()
    services.counters.messages += sum(isinstance(outcome, str) for outcome in outcomes)
    if services.received_log is not None:
        for publication in taken:
            services.received_log.write_soon(_received_line(publication.message))
    if machine.settings.lmtp:
        return [Reply(250, one) if isinstance(one, str) else one for one in outcomes]
    reply = _sum_up(messages, outcomes)
    if reply.code < 400 and refused:
        services.counters.failed_recipients += len(refused)
        _log_failures(client, refused, len(messages))
    return [reply]


def _fault(services: Services, terms: Terms, message: Message, *, is_report: bool) -> Reply | None:
    """Refuse a message that a plugin has sent to a wrong place."""
    if message.local and not terms.config.keeps_local_mail and not is_report:
        if not terms.is_delivered(message.recipient):
            return services.no_way(message.recipient)
    if problem := loop_problem(message.properties, terms.config.rabbitmq_outbox):
        services.say_untaken("a plugin made a message that cannot be taken: %s", problem)
        return smtp.NO_WAY
    return None


def _result(reply: Reply, now: float) -> Result:
    """The result of a refused message, when others were taken."""
    outcome = responses.refused_on_arrival(reply)
    return Result(
        attempt=1,
        type=outcome.type,
        state=outcome.state,
        result=outcome.result,
        time=format_time(now),
        code=outcome.code,
        status=outcome.status,
        description=outcome.description,
    )


def _kept(now: float) -> Result:
    """The result of a message that has reached the mailbox of its recipient: a queue."""
    return Result(
        attempt=1,
        type="success",
        state="accept",
        result="accepted",
        time=format_time(now),
        status="2.0.0",
        description="delivered to a queue of this host",
    )


def _failures(config: Config, message: Message, result: Result, reply: Reply) -> list[Publication]:
    """The documents for the result queues about a refused message."""
    properties = {**without_password(message.properties), "results": [result.to_dict()]}
    body = message.body if reply.code < 500 or properties.get("keepmime") else None
    queues = result_queues(
        properties, config.result_queues, "results", "failure", outbox=config.rabbitmq_outbox
    )
    return [Publication(queue, Message(dict(properties), body)) for queue in queues]


async def _reports(
    services: Services, terms: Terms, told: Sequence[tuple[Message, str, Result]], now: float
) -> list[Publication]:
    """The reports to the sender of a mail about events of its messages."""
    found: list[Bounce] = []
    for number, (message, event, result) in enumerate(told, 1):
        if number % TURN_RECIPIENTS == 0:
            await trio.lowlevel.checkpoint()
        bounce = bounces.about(message.properties, event, result, terms.config, from_peer=False)
        if bounce is not None:
            found.append(bounce)
    publications = []
    body = told[0][0].body
    for group in bounces.grouped(found):
        full, limit = group[0].full, terms.config.dsn_maxsize
        take = partial(excerpt, body, full=full, limit=limit)
        if is_quick(body, full=full, limit=limit):
            quoted = take()
        else:
            quoted = await trio.to_thread.run_sync(take)
        message = bounces.report(
            group, quoted, terms.reports.texts, id=services.plugins.message_id(), now=now
        )
        publications.append(Publication(group[0].queue, message))
    return publications


def _log_failures(client: Client, refused: Sequence[tuple[Message, Reply]], count: int) -> None:
    named = []
    for message, reply in refused[:LOGGED_FAILURES]:
        identifier, text = message.properties.get("message-id", ""), reply.text.replace("\n", " ")
        named.append(f"{identifier} <{escape_field(message.recipient)}> {reply.code} {text}")
    if len(refused) > LOGGED_FAILURES:
        named.append(f"and {len(refused) - LOGGED_FAILURES} more")
    log.warning(
        "mail from %s: plugins failed it for %d of %d recipients after others were taken: %s",
        client.remote[0],
        len(refused),
        count,
        "; ".join(named),
    )


def _qualify(message: Message, recipient: str, hostname: str) -> None:
    """Give the bare postmaster a domain, unless a plugin has: other servers need one."""
    if message.recipient == recipient:
        message.properties["recipient"] = f"{recipient}@{hostname}"


def _sum_up(messages: Sequence[Message], outcomes: Sequence[Reply | str]) -> Reply:
    """One reply for all recipients: good if the mail was taken for one of them.

    If it was taken for none, a temporary refusal comes before a permanent one.
    """
    lines = ["2.0.0 Message accepted"]
    refused: list[Reply] = []
    for message, outcome in zip(messages, outcomes, strict=True):
        if isinstance(outcome, str):
            lines.append(outcome)
        else:
            refused.append(outcome)
            lines.append(f"{outcome.code} {message.recipient}: {outcome.text}")
    if len(refused) == len(outcomes):
        return next((reply for reply in refused if reply.code < 500), refused[0])
    if refused:
        lines[0] += " for some recipients"
    return Reply(250, "\n".join(lines))


def refusal_reply(refusal: Reject) -> Reply:
    """A plugin's refusal as a reply."""
    return Reply(refusal.code, refusal.text)


def _all(reply: Reply, machine: ServerProtocol) -> list[Reply]:
    return [reply] * (len(machine.rcpts) if machine.settings.lmtp else 1)


def _envelope(
    terms: Terms, client: Client, plugin: Connection, machine: ServerProtocol
) -> incoming.Envelope:
    hello, mail = machine.hello, machine.mail
    assert hello is not None, "the machine asks for EHLO"
    assert mail is not None, "the machine asks for MAIL"
    connection: dict[str, object] = {
        "local-ip": client.local[0],
        "local-port": client.local[1],
        "remote-ip": client.remote[0],
        "remote-port": client.remote[1],
        "secure": machine.secure,
    }
    if client.user:
        connection["user"] = client.user
    properties: dict[str, object] = {"connection": connection}
    parameters = mail.parameters
    if parameters.utf8:
        properties["smtputf8"] = True
    if parameters.require_tls:
        properties["requiretls"] = True
    if parameters.body == "BINARYMIME":
        properties["binarymime"] = True
    protocol = headers.protocol_name(
        extended=hello.extended, secure=machine.secure, authenticated=plugin.authenticated
    )
    mapped = terms.config.smtp_mappable_ips and is_mapped(terms.config, client.local[0])
    trusted = plugin.authenticated or terms.access.may_relay(client.standing)
    return incoming.Envelope(
        mail.sender,
        machine.recipients,
        properties,
        [_dsn(parameters, rcpt.parameters) for rcpt in machine.rcpts],
        # RFC 3848 has the same names with an L for LMTP.
        protocol=protocol.replace("ESMTP", "LMTP") if machine.settings.lmtp else protocol,
        helo=hello.name,
        client_ip=client.remote[0],
        trusted=trusted,
        rights=terms.steering.rights(
            client.standing, client.user, authenticated=plugin.authenticated
        ),
        local_ip=client.local[0] if mapped else "",
    )


def _dsn(mail: MailParameters, rcpt: RcptParameters) -> dict[str, object]:
    """The property ``dsn`` from the parameters of RFC 3461, if there are any."""
    dsn: dict[str, object] = {}
    if mail.ret:
        dsn["ret"] = mail.ret
    if mail.envid:
        dsn["envid"] = mail.envid
    if rcpt.notify:
        dsn["notify"] = ",".join(rcpt.notify)
    if rcpt.orcpt:
        dsn["orcpt"] = rcpt.orcpt
    return {"dsn": dsn} if dsn else {}


def _received_line(message: Message) -> str:
    connection = message.properties.get("connection")
    if not isinstance(connection, dict):  # A plugin may have replaced the object.
        connection = {}
    return (
        f"{escape_field(str(message.properties.get('message-id', '')))}"
        f" <{escape_field(message.envelope)}> <{escape_field(message.recipient)}>"
        f" [{escape_field(str(connection.get('remote-ip', '')))}]"
        f" [{escape_field(str(connection.get('local-ip', '')))}]"
    )
