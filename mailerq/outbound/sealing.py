"""Check the ARC chain of received mail before it goes on, with keys from the DNS.

The result of a mail is kept for a while, because its recipients share the mail. The sets of a
chain, the look-ups, their time and what is kept are bounded. If the name servers do not answer,
the mail is not sealed.
"""

from __future__ import annotations

from time import monotonic
from typing import Final

import msgspec
import trio

from mailerq.mail.arc import MAX_SETS, Chain, Check, Verdict, body_form, checks, read_chain
from mailerq.mail.dkim import HeaderFields, body_hash
from mailerq.mail.dkim_record import RecordProblem, read_record
from mailerq.net.resolver import NoHosts, Resolver
from mailerq.store.signing_keys import verifies

__all__ = ["Chains", "Judged"]

MAX_LOOK_UPS: Final = 8
"""Look-ups at a time, of all mail."""

CHECK_SECONDS: Final = 15.0
"""How long one chain may take to check."""

KEPT_BYTES: Final = 1 << 23
"""Largest mail whose result is kept, as in `mailerq.outbound.signer`."""

KEPT_SECONDS: Final = 300.0
MAX_KEPT: Final = 1000
MAX_KEY_RECORDS: Final = 1000
MAX_TTL: Final = 3600.0


class Judged(msgspec.Struct, frozen=True):
    """A chain as it came in, and whether it holds; no verdict: that could not be found out."""

    chain: Chain
    verdict: Verdict | None

    @property
    def is_open(self) -> bool:
        """Whether one more seal may be added."""
        is_full = len(self.chain.sets) >= MAX_SETS
        return self.verdict is not None and not (self.chain.ended or is_full)


class Chains:
    """Checks the chains of one loop's mail."""

    def __init__(self) -> None:
        self.resolver: Resolver | None = None
        self._kept: dict[tuple[int, int], tuple[float, Judged]] = {}
        self._records: dict[str, tuple[float, tuple[bytes, ...]]] = {}
        self._limiter = trio.CapacityLimiter(MAX_LOOK_UPS)
        self._threads = trio.CapacityLimiter(1)

    async def judge(self, fields: HeaderFields) -> Judged:
        """Check the chain of a mail; `fields.mail` is the whole mail as it came in."""
        mail = fields.mail
        if not any(name.startswith(b"arc-") for name in fields):
            return Judged(Chain(), "none")
        key = (len(mail), hash(mail)) if len(mail) <= KEPT_BYTES else None
        kept = None if key is None else self._kept.get(key)
        if kept is not None and kept[0] > monotonic():
            return kept[1]
        judged = Judged(read_chain(fields), None)
        with trio.move_on_after(CHECK_SECONDS):
            judged = await self._check(fields, judged.chain)
        if judged.verdict is not None and key is not None:
            if len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = monotonic() + KEPT_SECONDS, judged
        return judged

    async def _check(self, fields: HeaderFields, chain: Chain) -> Judged:
        if chain.problem:
            return Judged(chain, "fail")
        if not chain.sets:
            return Judged(chain, "none")
        relaxed = body_form(chain)
        if relaxed is None:
            return Judged(chain, "fail")
        due = await trio.to_thread.run_sync(
            _due, fields, chain, relaxed, abandon_on_cancel=True, limiter=self._threads
        )
        if due is None:
            return Judged(chain, "fail")
        for check in due:
            texts = await self._texts(check.name)
            if texts is None:
                return Judged(chain, None)
            if not any(_holds(check, text) for text in texts):
                return Judged(chain, "fail")
        return Judged(chain, "pass")

    async def _texts(self, name: str) -> tuple[bytes, ...] | None:
        """The records of a key; None if the name servers do not answer."""
        records = self._records
        kept = records.get(name)
        if kept is not None and kept[0] > monotonic():
            return kept[1]
        if self.resolver is None:
            return None
        async with self._limiter:
            found = await self.resolver.texts(name)
        if isinstance(found, NoHosts):
            return None
        records.pop(name, None)
        if len(records) >= MAX_KEY_RECORDS:
            del records[next(iter(records))]
        records[name] = monotonic() + min(found[1], MAX_TTL), found[0]
        return found[0]


def _due(fields: HeaderFields, chain: Chain, relaxed: bool) -> list[Check] | None:
    """The signatures to check; in a thread, because the mail may be long."""
    body = memoryview(fields.mail)[fields.body :]
    return checks(fields, chain, body_hash((body,), relaxed=relaxed))


def _holds(check: Check, text: bytes) -> bool:
    """Whether a signature holds with the key of a record."""
    try:
        record = read_record(text)
    except RecordProblem:
        return False
    if not (record.key and record.allows_sha256 and record.allows_mail):
        return False
    if record.kind != check.algorithm.partition("-")[0]:
        return False
    return verifies(record.kind, record.key, check.signature, check.data)
