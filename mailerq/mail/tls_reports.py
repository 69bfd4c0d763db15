"""Read a TLS report (RFC 8460): JSON that others send about connections to our hosts.

Anybody may send such a report, and gzip can make a gigabyte of a megabyte. A report of more than
`JSON_BYTES` is not read, and what comes out is cut. JSON of three bytes for each policy becomes
many objects, so policies and failures are decoded one by one, and only as many as come out.
"""

from __future__ import annotations

import zlib
from typing import Final

import msgspec

from mailerq.mail.report_fields import one_line, time_of
from mailerq.mail.report_parts import Entity

__all__ = ["TlsFailure", "TlsPolicy", "TlsReport", "read_tls_report"]

GZIP_BYTES: Final = 1 << 18
"""Bytes of a compressed report. Reports of large providers have some kB."""

JSON_BYTES: Final = 1 << 19
"""Bytes of a report."""

MAX_RATIO: Final = 200
"""JSON that repeats itself is compressed to a fiftieth; a bomb to a thousandth."""

SMALL_BYTES: Final = 1 << 16
"""The ratio does not matter for less."""

MAX_POLICIES: Final = 50
MAX_FAILURES: Final = 50
"""Policies, and failures of each, that come out."""

MAX_COUNTED: Final = 1000
"""Policies whose sessions are counted. Real reports have one policy for each domain."""

MAX_NAME: Final = 253
MAX_COUNT: Final = 1 << 53
"""The largest number that every reader of JSON understands."""


class _Out(msgspec.Struct, frozen=True, omit_defaults=True, rename="kebab"):
    """A part of the JSON object that comes out; what is empty is left out."""


class TlsFailure(_Out, frozen=True):
    """Sessions that failed for one reason."""

    result_type: str
    sessions: int
    sending_ip: str = ""
    receiving_host: str = ""
    receiving_ip: str = ""
    reason: str = ""


class TlsPolicy(_Out, frozen=True):
    """Sessions under one policy."""

    type: str
    domain: str
    successful: int
    failed: int
    failures: list[TlsFailure] = []


class TlsReport(_Out, frozen=True):
    """A report; times are timestamps in UTC. `successful` and `failed` are sums of sessions."""

    organization: str
    report_id: str
    contact: str = ""
    begin: str = ""
    end: str = ""
    successful: int = 0
    failed: int = 0
    policies: list[TlsPolicy] = []
    policy_count: int = 0
    """How many policies there are, if that is more than `policies` has."""


class _In(msgspec.Struct, rename="kebab"):
    """A part of the JSON that comes in; other members are skipped."""


class _Range(_In):
    start_datetime: str = ""
    end_datetime: str = ""


class _Policy(_In):
    policy_type: str = ""
    policy_domain: str = ""


class _Summary(_In):
    total_successful_session_count: int = 0
    total_failure_session_count: int = 0


class _Detail(_In):
    result_type: str = ""
    sending_mta_ip: str | None = ""
    receiving_mx_hostname: str | None = ""
    receiving_ip: str | None = ""
    failed_session_count: int = 0
    failure_reason_code: str | None = ""


class _One(_In):
    policy: _Policy = msgspec.field(default_factory=_Policy)
    summary: _Summary = msgspec.field(default_factory=_Summary)
    failure_details: list[msgspec.Raw] | None = None


class _Document(_In):
    organization_name: str = ""
    report_id: str = ""
    contact_info: str | None = ""
    date_range: _Range = msgspec.field(default_factory=_Range)
    policies: list[msgspec.Raw] = []


_decode: Final = msgspec.json.Decoder(_Document).decode
_decode_one: Final = msgspec.json.Decoder(_One).decode
_decode_detail: Final = msgspec.json.Decoder(_Detail).decode


def read_tls_report(entity: Entity) -> TlsReport | str:
    """Read the part of a mail with the report, or say why the report cannot be read."""
    if entity.kind.endswith(b"gzip"):
        content = entity.content(GZIP_BYTES + 1)
        if len(content) > GZIP_BYTES:
            return f"the report has more than {GZIP_BYTES} bytes"
        data = _decompressed(content)
        if isinstance(data, str):
            return data
    else:
        data = entity.content(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        return f"the report has more than {JSON_BYTES} bytes"
    try:
        return _report(_decode(data))
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        return f"the report is not what RFC 8460 says: {one_line(str(error))[:200]}"


def _decompressed(content: bytes) -> bytes | str:
    most = min(JSON_BYTES, max(MAX_RATIO * len(content), SMALL_BYTES))
    reader = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        data = reader.decompress(content, most + 1)
    except zlib.error as error:
        return f"the report cannot be decompressed: {error}"
    if len(data) > most:
        return f"{len(content)} bytes become more than {most} bytes"
    return data if reader.eof else "the report is cut off"


def _report(document: _Document) -> TlsReport:
    """The report that comes out. Raises as `_decode` does."""
    every = [_decode_one(raw) for raw in document.policies[:MAX_COUNTED]]
    policies = [_policy(one) for one in every[:MAX_POLICIES]]
    summaries = [one.summary for one in every]
    count = len(document.policies)
    return TlsReport(
        organization=one_line(document.organization_name),
        report_id=one_line(document.report_id),
        contact=one_line(document.contact_info or "")[:MAX_NAME],
        begin=time_of(document.date_range.start_datetime),
        end=time_of(document.date_range.end_datetime),
        successful=_count(sum(one.total_successful_session_count for one in summaries)),
        failed=_count(sum(one.total_failure_session_count for one in summaries)),
        policies=policies,
        policy_count=count if count > len(policies) else 0,
    )


def _policy(one: _One) -> TlsPolicy:
    return TlsPolicy(
        type=one_line(one.policy.policy_type)[:40],
        domain=one_line(one.policy.policy_domain)[:MAX_NAME],
        successful=_count(one.summary.total_successful_session_count),
        failed=_count(one.summary.total_failure_session_count),
        failures=[
            TlsFailure(
                result_type=one_line(each.result_type)[:80],
                sessions=_count(each.failed_session_count),
                sending_ip=one_line(each.sending_mta_ip or "")[:45],
                receiving_host=one_line(each.receiving_mx_hostname or "")[:MAX_NAME],
                receiving_ip=one_line(each.receiving_ip or "")[:45],
                reason=one_line(each.failure_reason_code or ""),
            )
            for each in map(_decode_detail, (one.failure_details or [])[:MAX_FAILURES])
        ],
    )


def _count(number: int) -> int:
    return min(max(number, 0), MAX_COUNT)
