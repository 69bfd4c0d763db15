"""The settings of reports that come in, a part of `mailerq.table.Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import FIELD, FLAG, choice, setting, words
from mailerq.table_reports import ReportTable

__all__ = ["REPORT_TYPES", "IncomingTable"]

REPORT_TYPES: Final = (
    "delivery-status", "bounce", "complaint", "disposition", "auto-reply", "tls", "dmarc", "other",
)  # fmt: skip
"""The types of reports that are recognised; `mailerq.mail.reports` has their meanings."""

INCOMING: Final = "Reports that come in"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class IncomingTable(ReportTable):
    """Which reports are recognised, and what follows from them."""

    report_types: tuple[str, ...] = setting(
        REPORT_TYPES,
        words(*REPORT_TYPES),
        INCOMING,
        "The types of mail that go to rabbitmq-reports.",
        needed=True,
    )
    trace_header: str = setting(
        "",
        FIELD,
        INCOMING,
        "Name of a header field that is added to mail on its way out, such as X-Trace: signed with"
        " verp-key-file, it proves what mail a complaint or a bounce quotes.",
        unset="no such field",
    )
    suppress_complaints: bool = setting(
        False,
        FLAG,
        INCOMING,
        "Suppress recipients that a complaint is proved to come from.",
    )
    suppress_bounces: str = setting(
        "off",
        choice("off", "hard"),
        INCOMING,
        "Suppress recipients that a bounce is proved to be about: never, or if it says that the"
        " address does not exist.",
    )
    suppress_unproved: bool = setting(
        False,
        FLAG,
        INCOMING,
        "Suppress what is not proved too: whoever forges a report then has recipients suppressed.",
    )
