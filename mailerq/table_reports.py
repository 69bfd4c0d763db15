"""The settings of reports to senders, a part of `mailerq.table.Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import PATH, SECONDS, setting
from mailerq.table import Table

__all__ = ["ReportTable"]

REPORTS: Final = "Reports to senders"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable(Table):
    """Which reports mailerq makes for senders, and where bounces come back."""

    verp_key_file: str = setting(
        "",
        PATH,
        REPORTS,
        "File with the keys of signed return addresses (VERP): lines of an id and a secret, the"
        " newest first.",
        unset="no signed return addresses",
    )
    verp_maxage: float = setting(
        30 * 86400.0,
        SECONDS,
        REPORTS,
        "How long a signed return address is good.",
        unit="s",
        minimum=86400,
        maximum=10_000 * 86400,
    )
