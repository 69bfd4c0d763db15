"""A message to be sent now, and the report of an attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from mailerq.message import Message
from mailerq.queues import Lease
from mailerq.rules.destinations import priority_of
from mailerq.rules.plan import Send
from mailerq.rules.responses import Outcome

if TYPE_CHECKING:
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.signing import Signing

__all__ = ["Job", "Report", "words_of"]

MAX_WORDS: Final = 200
"""Characters that are kept of what a host said last."""


class Job:
    """A message to be sent now, as `plan` decided.

    `attempt` counts from 1. `flow` is None while the hosts are being looked up; `since` is when the
    flow got the job, on the monotonic clock. `is_ascii` describes the body, None until checked.
    `to_make`: the body is not what is stored, and `made` will have the body when its turn comes.
    `signing` is None if nothing signs the mail. `key` names a body in the storage that is not here
    yet; `stored` is that body, or the JSON object to make a mail of, once it is.
    """

    __slots__ = (
        "attempt", "flow", "is_ascii", "key", "lease", "made", "message", "plan", "priority",
        "signing", "since", "stored", "to_make",
    )  # fmt: skip

    def __init__(
        self,
        lease: Lease,
        message: Message,
        plan: Send,
        attempt: int,
        *,
        to_make: bool = False,
        key: str = "",
    ) -> None:
        self.lease = lease
        self.message = message
        self.plan = plan
        self.attempt = attempt
        self.priority = priority_of(message.properties)
        self.flow: Flow | None = None
        self.since = 0.0
        self.is_ascii: bool | None = None
        self.to_make = to_make
        self.made: bytes | None = None
        self.signing: Signing | None = None
        self.key = key
        self.stored: bytes | dict[str, Any] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the body is in memory as it is, and its keys are known."""
        signing = self.signing
        is_whole = self.is_here and not self.to_make
        return is_whole and (signing is None or signing.is_prepared)

    @property
    def is_here(self) -> bool:
        """Whether the body is in memory, if there is one."""
        return self.lease.loaded and not self.key

    @property
    def unmade(self) -> bytes | None:
        """The body before anything is made of it."""
        stored = self.stored
        if stored is None:
            return self.message.body
        return stored if isinstance(stored, bytes) else None

    @property
    def source(self) -> tuple[dict[str, Any], bytes | None]:
        """The properties and the body to make a mail of."""
        properties = self.message.properties
        if isinstance(self.stored, dict):
            properties = {**properties, "mime": self.stored}
        return properties, self.unmade

    @property
    def added(self) -> int:
        """Bytes that signatures add to the body."""
        return 0 if self.signing is None else self.signing.size

    @property
    def body(self) -> bytes | None:
        """The mail to send."""
        return self.unmade if self.made is None else self.made

    @property
    def envelope(self) -> str:
        return self.plan.envelope

    @property
    def recipient(self) -> str:
        return self.plan.recipient


class Report(msgspec.Struct, frozen=True):
    """The outcome of an attempt, and its connection if there was one.

    `tls` is as in results. `lmtp`: the peer spoke LMTP. `dsn`: it offered DSN (RFC 3461).
    """

    outcome: Outcome
    local_ip: str | None = None
    remote_ip: str | None = None
    mta: str | None = None
    messages: int | None = None
    mechanism: str | None = None
    tls: dict[str, Any] | None = None
    lmtp: bool = False
    dsn: bool = False

    @property
    def words(self) -> str:
        """Who said what, on one line."""
        outcome = self.outcome
        said = (outcome.code, outcome.status, outcome.description)
        words = " ".join(str(part) for part in said if part) or f"{outcome.type} ({outcome.state})"
        return (f"{self.remote_ip}: {words}" if self.remote_ip else words)[:MAX_WORDS]


def words_of(last: Report | str | None) -> str:
    """The words of a report, or what is kept of them."""
    return last if isinstance(last, str) else "" if last is None else last.words
