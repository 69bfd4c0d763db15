"""TLS reports: who wants them, the document of the standard, and the mail as others read it."""

from __future__ import annotations

import gzip
import json
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.mail.tls_report import (
    MAX_DESTINATIONS,
    Day,
    Detail,
    PolicyCount,
    Sender,
    destinations,
    document,
    file_name,
    pack,
    report_mail,
)

SENDER = Sender("Company-X", "sts-reporting@company-x.example", "tlsrpt@company-x.example")
DAY = Day.named("2016-04-01")

EXAMPLE = {
    "organization-name": "Company-X",
    "date-range": {
        "start-datetime": "2016-04-01T00:00:00Z",
        "end-datetime": "2016-04-01T23:59:59Z",
    },
    "contact-info": "sts-reporting@company-x.example",
    "report-id": "5065427c-23d3-47ca-b6e0-946ea0e8c4be",
    "policies": [
        {
            "policy": {
                "policy-type": "sts",
                "policy-string": [
                    "version: STSv1",
                    "mode: testing",
                    "mx: *.mail.company-y.example",
                    "max_age: 86400",
                ],
                "policy-domain": "company-y.example",
                "mx-host": ["*.mail.company-y.example"],
            },
            "summary": {
                "total-successful-session-count": 5326,
                "total-failure-session-count": 303,
            },
            "failure-details": [
                {
                    "result-type": "certificate-expired",
                    "sending-mta-ip": "2001:db8:abcd:0012::1",
                    "receiving-mx-hostname": "mx1.mail.company-y.example",
                    "failed-session-count": 100,
                },
                {
                    "result-type": "starttls-not-supported",
                    "sending-mta-ip": "2001:db8:abcd:0013::1",
                    "receiving-mx-hostname": "mx2.mail.company-y.example",
                    "receiving-ip": "203.0.113.56",
                    "failed-session-count": 200,
                    "additional-information": "https://reports.company-x.example/info",
                },
                {
                    "result-type": "validation-failure",
                    "sending-mta-ip": "198.51.100.62",
                    "receiving-ip": "203.0.113.58",
                    "receiving-mx-hostname": "mx-backup.mail.company-y.example",
                    "failed-session-count": 3,
                    "failure-reason-code": "X509_V_ERR_PROXY_PATH_LENGTH_EXCEEDED",
                },
            ],
        }
    ],
}
"""The example of RFC 8460, appendix B, with the array for mx-host that section 4.4 asks for."""

POLICY = PolicyCount(
    "sts",
    "company-y.example",
    ("version: STSv1", "mode: testing", "mx: *.mail.company-y.example", "max_age: 86400"),
    ("*.mail.company-y.example",),
    5326,
    (
        Detail(
            "certificate-expired",
            100,
            local_ip="2001:db8:abcd:0012::1",
            host="mx1.mail.company-y.example",
        ),
        Detail(
            "starttls-not-supported",
            200,
            local_ip="2001:db8:abcd:0013::1",
            host="mx2.mail.company-y.example",
            remote_ip="203.0.113.56",
            information="https://reports.company-x.example/info",
        ),
        Detail(
            "validation-failure",
            3,
            local_ip="198.51.100.62",
            host="mx-backup.mail.company-y.example",
            remote_ip="203.0.113.58",
            code="X509_V_ERR_PROXY_PATH_LENGTH_EXCEEDED",
        ),
    ),
)


@pytest.mark.parametrize(
    ("record", "places"),
    [
        (b"v=TLSRPTv1;rua=mailto:a@d.example", ["mailto:a@d.example"]),
        (b"v=TLSRPTv1; rua=https://d.example/v1?x=1;", ["https://d.example/v1?x=1"]),
        (
            b"v=TLSRPTv1; rua=mailto:a@d.example , MAILTO:a@D.example,https://d.example/",
            ["mailto:a@d.example", "https://d.example/"],
        ),
        (b"v=TLSRPTv1 ; rua=mailto:a%2Bb@d.example?subject=x", ["mailto:a+b@d.example"]),
        (b"v=TLSRPTv1; more=x; rua=mailto:a@d.example; rua=mailto:b@d.example",
         ["mailto:a@d.example"]),
        (b"v=TLSRPTv1; rua=ftp://d.example/,mailto:a@d.example", ["mailto:a@d.example"]),
        (b"v=TLSRPTv1; rua=mailto:a%0d%0ab@d.example", []),
        (b"v=TLSRPTv1; rua=mailto:a%ff@d.example", []),
        (b"v=TLSRPTv1; rua=mailto:nobody", []),
        (b"v=TLSRPTv1; rua=https:d.example", []),
        (b"v=TLSRPTv1; rua=", []),
        (b"v=TLSRPTv1; nonsense; rua=mailto:a@d.example", []),
        (b"v=TLSRPTv1;; rua=mailto:a@d.example", []),
        (b"v=TLSRPTv1", []),
        (b"v=TLSRPTv2; rua=mailto:a@d.example", []),
        (b"v=TLSRPTv11; rua=mailto:a@d.example", []),
        (b"v=TLSRPTv1; rua=mailto:\xff@d.example", []),
    ],
)  # fmt: skip
def test_where_a_record_wants_reports(record: bytes, places: list[str]) -> None:
    assert destinations([record]) == places
    assert destinations([b"v=spf1 -all", record]) == places


def test_two_records_want_nothing_and_many_places_are_bounded() -> None:
    record = b"v=TLSRPTv1; rua=mailto:a@d.example"
    assert destinations([record, record]) == destinations([]) == []
    many = b",".join(b"mailto:a%d@d.example" % number for number in range(100))
    assert len(destinations([b"v=TLSRPTv1; rua=" + many])) == MAX_DESTINATIONS


@given(st.lists(st.binary(max_size=200) | st.binary(max_size=200).map(b"v=TLSRPTv1; rua=".__add__)))
def test_any_records_want_reports_at_places_or_nowhere(records: list[bytes]) -> None:
    for place in destinations(records):
        assert place.startswith(("mailto:", "https://")) and place.isascii()
        assert "\r" not in place and "\n" not in place


def test_a_report_is_the_example_of_the_standard() -> None:
    made = document(SENDER, DAY, "5065427c-23d3-47ca-b6e0-946ea0e8c4be", [POLICY])
    assert made == EXAMPLE
    assert json.loads(gzip.decompress(pack(made))) == EXAMPLE
    assert pack(made) == pack(made)


def test_a_report_without_a_policy_names_the_domain() -> None:
    made = document(SENDER, DAY, "1", [PolicyCount("no-policy-found", "d.example", successes=7)])
    assert made["policies"] == [
        {
            "policy": {"policy-type": "no-policy-found", "policy-domain": "d.example"},
            "summary": {"total-successful-session-count": 7, "total-failure-session-count": 0},
        }
    ]


def parsed(mail: bytes) -> EmailMessage:
    found: Any = message_from_bytes(mail, policy=policy.default)
    return found  # type: ignore[no-any-return]


def test_a_mail_with_a_report_has_the_form_of_the_standard() -> None:
    packed = pack(EXAMPLE)
    number = "2016-04-01.00ff@company-x.example"
    mail = report_mail(
        SENDER, "company-y.example", "r@company-y.example", DAY, number, packed, now=1459560000.5
    )
    assert all(len(line) < 998 for line in mail.split(b"\r\n")) and b"\n" not in mail.replace(
        b"\r\n", b""
    )
    found = parsed(mail)
    assert not found.defects
    assert found["From"] == "tlsrpt@company-x.example"
    assert found["To"] == "r@company-y.example"
    assert found["Subject"] == (
        f"Report Domain: company-y.example Submitter: company-x.example Report-ID: <{number}>"
    )
    assert found["TLS-Report-Domain"] == "company-y.example"
    assert found["TLS-Report-Submitter"] == "company-x.example"
    assert found["TLS-Required"] == "No"
    assert found["Message-ID"] == f"<{number}>"
    assert found["Date"] == "Sat, 02 Apr 2016 01:20:00 +0000"
    assert found.get_content_type() == "multipart/report"
    assert found.get_param("report-type") == "tlsrpt"
    text, report = found.iter_parts()
    assert not text.defects and not report.defects  # type: ignore[attr-defined]
    assert text.get_content_type() == "text/plain" and "company-y.example" in text.get_content()
    assert report.get_content_type() == "application/tlsrpt+gzip"
    assert report.get_filename() == (
        "company-x.example!company-y.example!1459468800!1459555199!2016-04-01.00ff.json.gz"
    )
    assert json.loads(gzip.decompress(report.get_content())) == EXAMPLE


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    st.binary(max_size=3000),
)
def test_no_name_and_no_report_breaks_the_mail(name: str, code: str, packed: bytes) -> None:
    sender = Sender(name, name, "t@x.example")
    detail = Detail("validation-failure", 1, helo=code, code=code)
    made = document(sender, DAY, "1", [PolicyCount("sts", "d.example", (code,), (), 0, (detail,))])
    assert json.loads(gzip.decompress(pack(made))) == made
    mail = report_mail(sender, "d.example", "r@d.example", DAY, "1@x.example", packed, now=0)
    _, report = parsed(mail).iter_parts()
    assert report.get_content() == packed


def test_the_name_of_a_file_has_no_odd_characters() -> None:
    name = file_name(SENDER, "d.example", DAY, "a/b!c@x.example")
    assert name.count("!") == 4 and "/" not in name


def test_days_are_those_of_utc() -> None:
    assert Day.of(1459468800) == Day.of(1459468800 + 86399.9) == DAY
    assert Day.of(1459468799.9).name == "2016-03-31"
    assert (DAY.end, DAY.name) == (1459555200, "2016-04-01")
    with pytest.raises(ValueError, match="time data"):
        Day.named("2016-13-01")
