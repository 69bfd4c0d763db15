"""Recognise reports among the mail that comes in, and take them to their queue.

Theory of operation
-------------------
`Desk` serves one mail. Before plugins see a message for a local recipient, `mark` adds the property
``report``, if the mail is a report. After the plugins `queue_of` says whether the message goes to
`rabbitmq-reports`: a plugin that removes the property, or says that the recipient is not local,
sends the message the usual way. So does a mail of which only the null sender says that it is an
automatic reply, unless it came to a signed return address: it has the property, and a bounce that
nobody can read does not vanish from where people look.

A mail is read once, whatever the number of its recipients: at once if its header says that it is
no report, or if it is short, else in a thread. If the reading fails, which would be a defect, the
mail is no report and takes the usual way.

Recipients that the operator wants suppressed (`mailerq.rules.reports`) are suppressed before the
mail is published, so a report that was taken has had its effect. If the rows cannot be written now,
the mail is taken all the same, and the rows are written later.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import trio

from mailerq.escaping import escape, escape_field
from mailerq.mail import verp
from mailerq.mail.reports import LONG_BYTES, Recognised, is_candidate, recognise
from mailerq.message import Message
from mailerq.rules import reports
from mailerq.rules.reports import Keys, Match, Suppressed, Wishes

if TYPE_CHECKING:
    from mailerq.inbound.services import Services
    from mailerq.inbound.terms import Terms

__all__ = ["Desk", "Suppress", "keys_of", "wishes_of"]

log = logging.getLogger("mailerq.server")

Suppress = Callable[[Sequence[Suppressed]], Awaitable[None]]
"""Suppress recipients, durably where that is possible soon. From any worker."""

NAMED_IDS: Final = 60
"""Characters of an id in the log."""


def keys_of(terms: Terms) -> Keys:
    """What signatures on our mail are checked with."""
    config = terms.config
    return Keys(terms.reports.verp_keys, config.verp_maxage, config.trace_header.lower().encode())


def wishes_of(terms: Terms) -> Wishes:
    """What the settings want suppressed."""
    config = terms.config
    hard = config.suppress_bounces == "hard"
    return Wishes(config.suppress_complaints, hard, config.suppress_unproved)


class Desk:
    """Looks at the messages of one mail from `sender`, whose text is `body`."""

    def __init__(self, services: Services, terms: Terms, sender: str, body: bytes) -> None:
        self._services = services
        self._terms = terms
        self._sender = sender
        self._body = body
        self._keys = keys_of(terms)
        self._read = False
        self._found: Recognised | None = None
        self._said: dict[str, Any] | None = None
        self._matches: dict[int, Match] = {}
        """The matches of the messages that are marked, by the identity of the message."""
        self._staying: set[int] = set()
        """Of these, the messages that go the usual way nevertheless."""

    async def mark(self, message: Message, *, again: bool = False) -> None:
        """Add the property ``report`` to a message for a local recipient, if the mail is one.

        The recipient is local too if it is a return address that this server has signed. `again`:
        plugins have seen the message since, and may have said otherwise.
        """
        terms, recipient = self._terms, message.recipient
        if id(message) in self._matches:
            return
        returned = terms.returned(recipient, self._services.clock())
        is_ours = isinstance(returned, verp.Return)
        if is_ours and not again:
            message.local = True
        if not message.local:
            return
        if not is_ours and terms.is_delivered(recipient) and not terms.is_listed(recipient):
            return  # a person reads this mailbox
        found = await self._recognised()
        types = terms.config.report_types
        if is_ours and found is not None and found.is_guess and found.report.type not in types:
            found = None
        kind = "other" if found is None else found.report.type
        if (found is None and not is_ours) or kind not in types:
            return
        match = reports.find_match(
            found,
            recipient,
            self._keys,
            hostname=terms.config.hostname,
            now=self._services.clock(),
        )
        self._matches[id(message)] = match
        if found is not None and found.is_guess and not is_ours:
            self._staying.add(id(message))
        if self._said is None:
            self._said = reports.said(found)
        message.properties["report"] = reports.document(self._said, match)

    def queue_of(self, message: Message) -> str:
        """The queue for reports if a message goes there, else an empty string."""
        if id(message) not in self._matches:
            return ""
        if message.local and isinstance(message.properties.get("report"), dict):
            return "" if id(message) in self._staying else self._terms.config.rabbitmq_reports
        message.properties.pop("report", None)
        return ""

    async def suppress(self, messages: Sequence[Message]) -> None:
        """Suppress the recipients that these reports are a reason for."""
        suppress = self._services.suppress
        wishes = wishes_of(self._terms)
        if suppress is None or self._found is None or not (wishes.complaints or wishes.bounces):
            return
        wanted: dict[str, Suppressed] = {}
        for message in messages:
            match = self._matches[id(message)]
            for each in reports.to_suppress(self._found.report, match, wishes):
                if each.address in wanted:
                    continue
                wanted[each.address] = each
                log.info(
                    "report %s about message %s: <%s> is to be suppressed: %s",
                    escape_field(str(message.properties.get("message-id", "")))[:NAMED_IDS],
                    escape_field(match.message_id[:NAMED_IDS]) or "(unknown)",
                    escape_field(each.address),
                    escape(each.reason),
                )
        if wanted:
            await suppress(list(wanted.values()))

    async def _recognised(self) -> Recognised | None:
        if not self._read:
            self._read = True
            try:
                if is_candidate(self._body, self._sender):
                    if len(self._body) <= LONG_BYTES:
                        self._found = recognise(self._body, self._sender)
                    else:
                        self._found = await trio.to_thread.run_sync(
                            recognise, self._body, self._sender
                        )
            except Exception:
                # A defect of ours must not cost anybody a mail.
                log.exception("a mail cannot be read as a report")
        return self._found
