"""``mailerq check``: report mistakes in documents and mails, and parts that are ignored."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from mailerq.cli.common import command_parser, print_json
from mailerq.config import Config
from mailerq.errors import MessageError
from mailerq.escaping import escape
from mailerq.mail.extract import EVERYTHING, FIELDS_LIMIT, Rights, doubts, extract
from mailerq.mail.headers import Header
from mailerq.mail.incoming import OWN_HOPS, Problem
from mailerq.message import Message
from mailerq.rules.documents import Finding, examine
from mailerq.rules.local_ips import LocalIps
from mailerq.rules.steering import Steering

__all__ = ["main"]

DESCRIPTION: Final = """\
Report mistakes in JSON documents for the outbox or in the x-mq-* fields of mail, and
properties and fields that are ignored. Input that starts with { is one document, or one on
each line; other input is a mail. Nothing is queued. docs/messages.md explains all properties
and fields.

exit status:
  0  no mistakes (notes are information only)
  1  something is ignored or has no effect
  2  the message would be refused or fail, or a file cannot be read
"""

STATUS: Final = {"note": 0, "warning": 1, "error": 2}
VERDICTS: Final = ("good", "can be sent, but", "cannot be sent")

BEFORE_JSON: Final = b"\xef\xbb\xbf \t\r\n"
"""Bytes before a document. A byte order mark is a mistake, but does not make the input a mail."""


class Report(NamedTuple):
    """The findings about one document or mail."""

    where: str
    findings: list[Finding]

    @property
    def status(self) -> int:
        """The exit status for this document or mail."""
        return max((STATUS[finding.level] for finding in self.findings), default=0)


class Check(NamedTuple):
    """What input is checked against."""

    config: Config
    rights: Rights
    local: LocalIps

    def file(self, name: str) -> Iterator[Report]:
        """Check each document of a file, or its one mail."""
        try:
            if name == "-":
                data = sys.stdin.buffer.read()
            else:
                with open(name, "rb") as file:
                    data = file.read()
        except OSError as error:
            yield Report(name, [Finding("error", error.strerror or str(error))])
            return
        where = "stdin" if name == "-" else name
        now = time.time()
        if not data.lstrip(BEFORE_JSON).startswith((b"{", b"[")):
            yield Report(where, list(self._mail(data, now)))
            return
        lines = data.split(b"\n")
        several = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if len(several) == 1 or not all(
            line.strip().startswith(b"{") and line.strip().endswith(b"}") for _, line in several
        ):
            yield Report(where, list(self._document(data, now)))
            return
        for number, line in several:
            yield Report(f"{where}:{number}", list(self._document(line, now)))

    def _document(self, data: bytes, now: float) -> Iterator[Finding]:
        try:
            message = Message.from_json(data)
        except MessageError as error:
            yield Finding("error", str(error))
            return
        yield from examine(message, self.config, now=now, local=self.local)

    def _mail(self, data: bytes, now: float) -> Iterator[Finding]:
        """Yield the findings about a mail, for any recipient."""
        if len(data) > self.config.smtp_maxsize:
            text = f"the mail is larger than smtp-maxsize ({self.config.smtp_maxsize} bytes)"
            yield Finding("error", text)
            return
        mime = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        header = Header(mime)
        if not header.is_whole:
            yield Finding("error", f"the mail {Problem.HEADER}")
            return
        if header.is_looping(added=OWN_HOPS):
            yield Finding("error", f"the mail {Problem.LOOP}")
        extraction = extract(
            mime, trusted=True, rights=self.rights, now=now,
            outbox=self.config.rabbitmq_outbox, limit=FIELDS_LIMIT,
        )  # fmt: skip
        if extraction is None:
            yield Finding("error", f"the mail {Problem.FIELDS}")
            return
        for reason in extraction.ignored:
            yield Finding("warning", f"ignored {reason}")
        properties = dict(extraction.properties)
        for field, meant in doubts(extraction.properties):
            del properties[field.removeprefix("x-mq-")]
            text = f"{field}: is not known and changes nothing; is {meant} meant?"
            yield Finding("warning", text)
        # The recipient comes from the envelope, not from a field.
        properties["recipient"] = f"recipient@{self.config.hostname}"
        message = Message(properties, extraction.mime)
        yield from examine(message, self.config, now=now, local=self.local)
        if extraction.mime is mime:
            yield Finding("note", "the mail has no x-mq-* fields")


def main(settings: list[str], rest: list[str]) -> int:
    """Check the given files, or stdin; see DESCRIPTION."""
    parser = command_parser("check", DESCRIPTION)
    parser.add_argument("files", metavar="FILE", nargs="*", help="default, and -: stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON array, for programs")
    parser.add_argument(
        "--client", action="store_true",
        help="check mail as from a client that may relay, whose fields smtp-extract limits; by"
        " default as from the command line, where all fields have an effect",
    )  # fmt: skip
    options = parser.parse_args(rest)
    config = Config.load(settings)
    rights = Steering.of(config).others if options.client else EVERYTHING
    check = Check(config, rights, LocalIps.of(config))
    reports = [report for name in options.files or ["-"] for report in check.file(name)]
    if options.json:
        print_json([
            {
                "file": report.where,
                "status": report.status,
                "findings": [finding._asdict() for finding in report.findings],
            }
            for report in reports
        ])  # fmt: skip
    else:
        for report in reports:
            _print(report)
    return max((report.status for report in reports), default=0)


def _print(report: Report) -> None:
    lines = [f"{report.where}: {VERDICTS[report.status]}"]
    lines += [f"  {finding.level}: {finding.text}" for finding in report.findings]
    sys.stdout.write("".join(f"{escape(line)}\n" for line in lines))
