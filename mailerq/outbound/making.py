"""Makes the mail of a message whose body is not what is stored, shortly before it is sent.

A short mail is made at once, with a small budget: that takes a millisecond or less. A mail that is
long, or that the budget does not suffice for, is made in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import trio

from mailerq.config import Config
from mailerq.mail.headers import prepend
from mailerq.mail.made import NotMade, is_made, make, problems
from mailerq.mail.values import Budget
from mailerq.outbound.bodies import Bodies
from mailerq.outbound.inliner import Inliner
from mailerq.outbound.jobs import Job
from mailerq.rules import responses
from mailerq.rules.responses import Outcome

__all__ = ["form_problem", "make_body", "make_quickly"]

log = logging.getLogger("mailerq.delivery")

QUICK_BYTES: Final = 1 << 15
"""Bytes of a document that may be made at once."""

JOIN_BYTES: Final = 1 << 17
"""Bytes of a mail that may get a field at once: a tenth of a millisecond."""

QUICK_STEPS: Final = 2000
QUICK_CHARS: Final = 1 << 17
"""The budget of a mail that is made at once: some milliseconds."""

MAKERS: Final = 2
"""Mails made in threads at a time."""


def form_problem(properties: Mapping[str, Any]) -> Outcome | None:
    """Why the mail cannot be made, as far as that is known before its turn."""
    for problem in problems(properties):
        return responses.not_made("responsive", problem)
    return None


def make_quickly(job: Job, config: Config, now: float, field: bytes = b"") -> bool:
    """Make the body of a job, which is loaded; False if that takes long or is impossible.

    `field` is a complete header field to add at the top.
    """
    properties, body = job.source
    if body is not None and not is_made(properties):
        if len(body) > JOIN_BYTES:
            return False
        job.made = prepend(body, field)
        job.to_make = False
        return True
    stored = job.stored
    size = job.lease.size + (len(stored) if isinstance(stored, bytes) else 0)
    if size > QUICK_BYTES or isinstance(stored, dict):
        return False
    if properties.get("inlinecss") or _is_missing(job):
        return False
    budget = Budget(QUICK_STEPS, QUICK_CHARS)
    try:
        made = make(properties, body, hostname=config.hostname, now=now, budget=budget)
        job.made = prepend(made, field) if field else made
    except Exception:  # also a defect: the message may have no session yet, and its turn will say
        return False
    job.to_make = False
    return True


async def make_body(
    job: Job, config: Config, now: float, inliner: Inliner, bodies: Bodies, field: bytes = b""
) -> Outcome | None:
    """Make the body of a job, which is loaded; return the outcome if that fails.

    `field` is a complete header field to add at the top.

    A body that is made in a thread may be large, and counts in `bodies`.
    """
    if make_quickly(job, config, now, field):
        return None
    if _is_missing(job):
        job.to_make = False
        return None
    work = partial(_make, *job.source, config.hostname, now, inliner, field)
    try:
        async with _makers():
            await bodies.room()
            job.made = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
            bodies.made(job.lease, len(job.made))
    except NotMade as error:
        return responses.not_made(error.state, error.reason)
    except OSError as error:
        log.error("cannot make a mail: %s", error)
        return responses.OWN_FAULT
    except Exception:
        # Our own defect costs a message one attempt, and no connection.
        log.exception("message %d cannot be made", job.lease.id)
        return responses.OWN_FAULT
    job.to_make = False
    return None


def _make(
    properties: dict[str, Any],
    body: bytes | None,
    hostname: str,
    now: float,
    inliner: Inliner,
    field: bytes,
) -> bytes:
    """The work of a thread. Raises `NotMade` and `OSError`."""
    if body is None or is_made(properties):
        body = make(properties, body, hostname=hostname, now=now, inline=inliner.inline)
    return prepend(body, field) if field else body


def _is_missing(job: Job) -> bool:
    """Whether there is nothing to make a mail of; a plugin may supply one."""
    properties, body = job.source
    return body is None and not properties.get("mime")


_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("makers")


def _makers() -> trio.CapacityLimiter:
    """The limit on mails that are made in threads of this loop."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(MAKERS)
        _limiter.set(limiter)
        return limiter
