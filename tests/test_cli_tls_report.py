"""``mailerq tls-report`` on a queue directory: what is counted, and what would be sent."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mailerq.mail.tls_report import Day
from mailerq.store.tls_counts import Session, TlsCounts
from tests.support import mailerq

GOOD = Session("d.example", "sts", json.dumps([["version: STSv1"], ["mx.d.example"]]))
ON = ("--tls-report=true", "--tls-report-from=t@x.example", "--tls-report-organization=X")


def run(directory: Path, *words: str, status: int = 0) -> tuple[str, str]:
    done = mailerq("tls-report", *words, f"--queue-directory={directory}", *ON)
    assert done.returncode == status, (done.stdout, done.stderr)
    return done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def yesterday() -> Day:
    return Day(Day.of(time.time()).begin - 86400)


@pytest.fixture
def queue(tmp_path: Path, yesterday: Day) -> Path:
    file = TlsCounts(str(tmp_path))
    bad = GOOD._replace(result="certificate-expired", host="mx.d.example")
    none = Session("e.example", "no-policy-found", "")
    file.add({(yesterday.begin, GOOD): 5, (yesterday.begin, bad): 2, (yesterday.begin, none): 1})
    file.close()
    return tmp_path


def test_the_counts_of_a_day_are_shown(queue: Path, yesterday: Day) -> None:
    out, _ = run(queue, "show", f"--day={yesterday.name}")
    assert [line.split() for line in out.splitlines()] == [
        ["DOMAIN", "POLICY", "GOOD", "FAILED"],
        ["d.example", "sts", "5", "2"],
        ["e.example", "no-policy-found", "1", "0"],
    ]
    out, _ = run(queue, "show", f"--day={yesterday.name}", "--json")
    assert json.loads(out.splitlines()[0]) == {
        "domain": "d.example", "policy": "sts", "good": 5, "failed": 2,
    }  # fmt: skip
    assert "nothing is counted" in run(queue, "show", status=1)[1]


def test_the_report_of_a_domain_is_shown_as_it_would_be_sent(queue: Path, yesterday: Day) -> None:
    out, _ = run(queue, "show", "d.example", f"--day={yesterday.name}")
    report = json.loads(out)
    assert report["organization-name"] == "X" and report["contact-info"] == "t@x.example"
    (counted,) = report["policies"]
    assert counted["summary"] == {
        "total-successful-session-count": 5, "total-failure-session-count": 2,
    }  # fmt: skip
    assert counted["failure-details"][0]["receiving-mx-hostname"] == "mx.d.example"
    assert "nothing" in run(queue, "show", "no.example", f"--day={yesterday.name}", status=1)[1]


def test_sending_makes_the_reports_of_a_day_due_and_says_that_no_daemon_answers(
    queue: Path, yesterday: Day
) -> None:
    out, _ = run(queue, "list")
    assert len(out.splitlines()) == 1
    out, _ = run(queue, "send", "d.example", "--json", status=1)
    assert json.loads(out) == {"due": 1, "in_force": False}
    out, _ = run(queue, "send", status=1)
    assert "2 reports are due now (no daemon answers)" in out
    out, _ = run(queue, "list", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["domain"], row["day"], row["state"]) for row in rows] == [
        ("d.example", yesterday.name, "waiting"), ("e.example", yesterday.name, "waiting"),
    ]  # fmt: skip


def test_a_day_that_is_not_over_and_one_that_is_none_are_refused(queue: Path) -> None:
    today = Day.of(time.time()).name
    assert "not over" in run(queue, "send", f"--day={today}", status=os.EX_USAGE)[1]
    run(queue, "send", "--day=2026-02-30", status=os.EX_USAGE)


def test_reports_need_a_sender_or_a_contact(tmp_path: Path) -> None:
    done = mailerq("config", "--tls-report=true", f"--queue-directory={tmp_path}")
    assert done.returncode == 2 and b"tls-report-from" in done.stderr
    done = mailerq("config", "--tls-report-from=nobody", f"--queue-directory={tmp_path}")
    assert done.returncode == 2 and b"tls-report-from" in done.stderr
    done = mailerq("config", "--tls-report=1", "--tls-report-contact=a@b.example")
    assert done.returncode == 0, done.stderr
