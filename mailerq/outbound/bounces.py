"""Reports to senders, made for a batch of settlements just before the batch is committed.

A report is published in the commit that settles the message it is about, so it exists if and only
if that message is settled, also after a crash. Recipients of one mail whose messages are in the
same batch share a report: their messages say the same about the mail, and quote the same of it.
`mailerq.outbound.together` brings them into one batch.

Everything here runs on the home worker. Making a report takes about a tenth of a millisecond, so a
batch yields to other tasks now and then; a long mail is read in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

import trio
from trio import to_thread

from mailerq.config import Config
from mailerq.mail.dsn import Excerpt, excerpt, is_quick
from mailerq.mail.headers import HEADER_LIMIT
from mailerq.queues import Publication, Settlement
from mailerq.rules import bounces
from mailerq.rules.bounces import Bounce
from mailerq.rules.reporting import Reports

__all__ = ["Reported", "add_reports"]

TURN_REPORTS: Final = 50
"""Reports or recipients handled before the loop serves others."""

TURN_BYTES: Final = 4 << 20
"""Bytes of mail read before the loop serves others."""


class Reported(Protocol):
    """A settlement under way, and the report that it needs."""

    settlement: Settlement
    bounce: Bounce | None
    made: bytes | None
    """The mail that was sent, if that is not what is stored."""


async def add_reports(
    batch: Sequence[Reported],
    reports: Reports,
    config: Config,
    *,
    next_id: Callable[[], str],
    now: float,
) -> int:
    """Add the reports to the settlements of a batch; return their number.

    Bodies that could be fetched are loaded. A report of several recipients goes with the first.
    """
    mails: dict[Excerpt, dict[Bounce, Reported]] = {}
    steps = read = 0
    for each in batch:
        bounce = each.bounce
        if bounce is None:
            continue
        quoted = await _quoted(each, bounce, config)
        mails.setdefault(quoted, {})[bounce] = each
        steps += 1
        read += min(each.settlement.lease.size, HEADER_LIMIT)
        if steps % TURN_REPORTS == 0 or read > TURN_BYTES:
            read = 0
            await trio.lowlevel.checkpoint()
    count = 0
    for quoted, owners in mails.items():
        for group in bounces.grouped(owners):
            message = bounces.report(group, quoted, reports.texts, id=next_id(), now=now)
            first = owners[group[0]]
            first.settlement = Settlement(
                first.settlement.lease,
                first.settlement.publications,
                (*first.settlement.others, Publication(group[0].queue, message)),
            )
            count += 1
            if count % TURN_REPORTS == 0:
                await trio.lowlevel.checkpoint()
    return count


async def _quoted(each: Reported, bounce: Bounce, config: Config) -> Excerpt:
    """What the report quotes of the mail."""
    body = each.settlement.lease.message.body if each.made is None else each.made
    full, limit = bounce.full, config.dsn_maxsize
    take = partial(excerpt, body, full=full, limit=limit)
    return take() if is_quick(body, full=full, limit=limit) else await to_thread.run_sync(take)
