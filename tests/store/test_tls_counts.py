"""Counts of TLS sessions: what several processes add up, and the reports that come of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailerq.store import tls_counts
from mailerq.store.tls_counts import DAY_SECONDS, MAX_REST_SECONDS, Due, Session, TlsCounts

DAY = 20_000 * DAY_SECONDS
GOOD = Session("d.example", "sts", "policy")
BAD = GOOD._replace(result="certificate-expired", host="mx.d.example")


@pytest.fixture
def file(tmp_path: Path) -> TlsCounts:
    return TlsCounts(str(tmp_path), clock=lambda: DAY + 5.0)


def test_processes_add_up(file: TlsCounts, tmp_path: Path) -> None:
    file.add({(DAY, GOOD): 2, (DAY, BAD): 1})
    TlsCounts(str(tmp_path)).add({(DAY, GOOD): 3, (DAY + DAY_SECONDS, GOOD): 1})
    assert dict(file.sessions(DAY, "d.example")) == {GOOD: 5, BAD: 1}
    assert file.days() == [DAY, DAY + DAY_SECONDS]


def test_too_many_kinds_of_failure_are_one_kind_of_each_reason(
    file: TlsCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_counts, "MAX_ROWS", 3)
    for number in range(10):
        assert not file.add({(DAY, BAD._replace(code=str(number))): 1})
    found = dict(file.sessions(DAY, "d.example"))
    assert sum(found.values()) == 10 and len(found) == 4
    assert found[BAD.bare] == 7
    assert not file.add({(DAY, BAD._replace(code="0")): 1})
    assert dict(file.sessions(DAY, "d.example"))[BAD._replace(code="0")] == 2
    for number in range(10):
        file.add({(DAY, GOOD._replace(policy=str(number))): 1})
    assert len(file.sessions(DAY, "d.example")) <= 7


def test_too_many_domains_are_not_counted(file: TlsCounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_counts, "MAX_DOMAINS", 2)
    counts = {(DAY, Session(f"d{number}.example", "sts", "")): 1 for number in range(5)}
    assert file.add(counts) == 3
    assert file.add(counts) == 3
    assert len(file.domains(DAY)) == 2


def test_the_domains_of_a_day_are_asked_once_when_the_day_is_over(file: TlsCounts) -> None:
    file.add({(DAY, GOOD): 1, (DAY, Session("e.example", "sts", "")): 1})
    assert file.plan(DAY, 600, 1000) == 0
    assert file.plan(DAY + DAY_SECONDS, 600, 1000) == 2
    assert file.plan(DAY + DAY_SECONDS, 600, 1000) == 0
    end = DAY + DAY_SECONDS
    assert not file.due(end + 599, 10)
    assert [(due.day, due.place) for due in file.due(end + 1600, 10)] == [(DAY, ""), (DAY, "")]


def test_each_place_has_a_report_of_its_own(file: TlsCounts) -> None:
    file.add({(DAY, GOOD): 1})
    file.plan(DAY + DAY_SECONDS, 0, 1)
    (ask,) = file.due(DAY * 2, 10)
    file.wanted(ask, {"mailto:a@d.example": "7", "https://d.example/": "7"}, DAY * 2.0)
    due = {each.place: each for each in file.due(DAY * 2, 10)}
    assert due["mailto:a@d.example"] == Due(DAY, "d.example", "mailto:a@d.example", "7", 0)
    file.done(due["mailto:a@d.example"], "sent")
    file.again(due["https://d.example/"], DAY * 2 + 60.0, "refused")
    assert not file.due(DAY * 2, 10)
    (again,) = file.due(DAY * 2 + 60, 10)
    assert again.tries == 1
    states = {each.place: (each.state, each.problem) for each in file.reports(10)}
    assert states == {
        "mailto:a@d.example": ("sent", ""),
        "https://d.example/": ("waiting", "refused"),
    }
    assert file.hurry(1.0, DAY, "d.example") == 1 and file.due(1.0, 10)
    assert file.hurry(1.0, DAY, "e.example") == 0


def test_a_domain_that_wants_no_report_is_not_asked_again(file: TlsCounts) -> None:
    file.add({(DAY, GOOD): 1})
    file.plan(DAY + DAY_SECONDS, 0, 1)
    (ask,) = file.due(DAY * 2, 10)
    file.wanted(ask, {}, DAY * 2.0)
    assert not file.due(DAY * 3, 10) and not file.reports(10)
    assert file.plan(DAY + DAY_SECONDS, 0, 1) == 0


def test_old_days_are_dropped(file: TlsCounts) -> None:
    file.add({(DAY, GOOD): 1, (DAY + DAY_SECONDS, GOOD): 1})
    file.plan(DAY + 5 * DAY_SECONDS, 0, 1)
    file.forget(DAY + DAY_SECONDS + 1)
    assert file.days() == [DAY + DAY_SECONDS]
    assert {each.day for each in file.reports(10)} == {DAY + DAY_SECONDS}


PLACE = "mailto:a@d.example"


def test_a_place_that_took_no_report_rests_longer_each_time_up_to_a_bound(file: TlsCounts) -> None:
    assert file.resting(PLACE, 0.0) is None
    now, rests = float(DAY), []
    for _ in range(6):
        file.ended({PLACE: "550 no"}, now)
        found = file.resting(PLACE, now)
        assert found is not None and found[1] == "550 no"
        rests.append((found[0] - now) / DAY_SECONDS)
        now = found[0]
        assert file.resting(PLACE, now) is None
    assert rests == [3, 6, 12, 24, 28, 28]
    file.ended({PLACE: ""}, now)
    file.ended({PLACE: "550 no"}, now)
    assert file.resting(PLACE, now + 3 * DAY_SECONDS) is None


def test_failures_together_are_one_failure_and_a_rest_is_forgotten_long_after(
    file: TlsCounts,
) -> None:
    for _ in range(5):
        file.ended({PLACE: "550 no", "https://d.example/": "503"}, float(DAY))
    later = DAY + 3.0 * DAY_SECONDS
    assert file.resting(PLACE, later) is None
    file.forget(later + MAX_REST_SECONDS + 1)
    file.ended({PLACE: "550 no"}, later)
    assert file.resting(PLACE, later + 3.0 * DAY_SECONDS) is None, "a first failure"


def test_places_that_rest_are_bounded(file: TlsCounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_counts, "MAX_RESTING", 3)
    for number in range(6):
        file.ended({f"mailto:{number}@d.example": "550 no"}, DAY + float(number))
    found = [file.resting(f"mailto:{number}@d.example", float(DAY)) for number in range(6)]
    assert [each is not None for each in found] == [False] * 3 + [True] * 3


def test_a_file_is_not_made_for_a_place_that_takes_reports(file: TlsCounts, tmp_path: Path) -> None:
    file.ended({PLACE: ""}, float(DAY))
    assert not list(tmp_path.iterdir())


def test_reports_of_a_named_domain_are_sent_in_spite_of_a_rest(file: TlsCounts) -> None:
    file.add({(DAY, GOOD): 1})
    file.plan(DAY + DAY_SECONDS, 0, 1)
    (ask,) = file.due(DAY * 2, 10)
    file.wanted(ask, {PLACE: "7"}, DAY * 2.0)
    (due,) = file.due(DAY * 2, 10)
    file.ended({PLACE: "550 no"}, DAY * 2.0)
    file.done(due, "unsent", "it rests")
    assert file.hurry(1.0, DAY) == 0 and file.resting(PLACE, DAY * 2.0)
    assert file.hurry(1.0, DAY, "d.example") == 1
    assert file.due(1.0, 10) and file.resting(PLACE, DAY * 2.0) is None
