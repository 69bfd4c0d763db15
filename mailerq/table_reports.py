"""The settings of reports to senders, a part of `mailerq.table.Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import (
    DOMAINS,
    EVENTS,
    HOSTNAME,
    MAILBOX,
    PATH,
    SECONDS,
    SIZE,
    choice,
    setting,
)
from mailerq.table import Table

__all__ = ["ReportTable"]

REPORTS: Final = "Reports to senders"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class ReportTable(Table):
    """Which reports mailerq makes for senders, and where bounces come back."""

    dsn_notify: tuple[str, ...] = setting(
        ("FAILURE",),
        EVENTS,
        REPORTS,
        "The events of which a sender gets a report without asking: FAILURE, DELAY, SUCCESS, or"
        " NEVER; for mail that came by SMTP or the command line. docs/bounces.md explains it.",
    )
    dsn_notify_json: tuple[str, ...] = setting(
        (),
        EVENTS,
        REPORTS,
        "The same for documents that an application published without the property dsn.",
    )
    dsn_ret: str = setting(
        "HDRS",
        choice("HDRS", "FULL", upper=True),
        REPORTS,
        "What a report returns where the sender does not say: the header of the mail, or all of"
        " the mail.",
    )
    dsn_maxsize: int = setting(
        50_000,
        SIZE,
        REPORTS,
        "A report returns of a larger mail the header only, and of a longer header a part.",
        minimum=1000,
        maximum=10 << 20,
    )
    dsn_delay: float = setting(
        14400.0,
        SECONDS,
        REPORTS,
        "How long mail must have waited before the first attempt after that makes a report of the"
        " delay, for senders that get one.",
        unit="s",
        minimum=1,
    )
    dsn_wait: float = setting(
        2.0,
        SECONDS,
        REPORTS,
        "How long the report of a failure waits for failures of other recipients of the same mail,"
        " so that they share a report; 0 disables.",
        unit="s",
        minimum=0,
        maximum=10,
    )
    dsn_envelope: str = setting(
        "",
        MAILBOX,
        REPORTS,
        "The address in From of reports; their envelope has the null sender.",
        unset="MAILER-DAEMON at dsn-mta",
    )
    dsn_mta: str = setting(
        "", HOSTNAME, REPORTS, "The host that reports name as their maker.", unset="hostname"
    )
    dsn_double_bounce: str = setting(
        "",
        MAILBOX,
        REPORTS,
        "Address that hears of reports that could not be delivered themselves.",
        unset="they are dropped and logged",
    )
    dsn_texts_file: str = setting(
        "",
        PATH,
        REPORTS,
        "TOML file with the texts of reports in several languages, as contrib/bounces.toml.",
        unset="English texts",
    )
    verp_key_file: str = setting(
        "",
        PATH,
        REPORTS,
        "File with the keys of signed return addresses (VERP): lines of an id and a secret, the"
        " newest first.",
        unset="no signed return addresses",
    )
    verp_domains: tuple[str, ...] = setting(
        (),
        DOMAINS,
        REPORTS,
        "Domains whose senders get a signed return address for each recipient; their bounces must"
        " come back to a mailerq with the same keys.",
        unset="only senders of mail with the property verp",
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
