"""Which reports a sender gets: the table of RFC 3461, and what else decides."""

from __future__ import annotations

from typing import Any

import pytest

from mailerq.config import Config
from mailerq.mail import dsn_texts
from mailerq.mail.dsn import NOTHING
from mailerq.message import Result
from mailerq.rules import bounces
from mailerq.rules.bounces import DELAYED, DELIVERED, FAILED, MARK, MAX_TOGETHER, RELAYED, Bounce

NOW = 1_750_000_000.0
CONFIG = Config(hostname="me.test")
MAIL = {
    "envelope": "ann@b.test",
    "recipient": "bob@c.test",
    "message-id": "0a1b",
    "received": "2025-06-15 15:00:00",
}


def result(**more: Any) -> Result:
    fields = {
        "attempt": 1, "type": "error", "state": "rcpt to", "result": "error",
        "time": "2025-06-15 15:06:40", "code": 550, "status": "5.1.1", "description": "no",
        "mta": "mx.c.test", "remote_ip": "192.0.2.1", **more,
    }  # fmt: skip
    return Result(**fields)


def about(
    event: str = FAILED, config: Config = CONFIG, from_peer: bool = True, **more: Any
) -> Bounce | None:
    given = more.pop("result", result())
    until = more.pop("until", None)
    properties = {**MAIL, **more}
    return bounces.about(properties, event, given, config, from_peer=from_peer, until=until)


def bounce(event: str = FAILED, config: Config = CONFIG, **more: Any) -> Bounce:
    found = about(event, config, **more)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("notify", "events"),
    [
        (None, {FAILED}),
        ("NEVER", set()),
        ("FAILURE", {FAILED}),
        ("failure", {FAILED}),
        ("DELAY", {DELAYED}),
        ("SUCCESS", {DELIVERED, RELAYED}),
        ("SUCCESS,DELAY", {DELIVERED, RELAYED, DELAYED}),
        ("SUCCESS, FAILURE, DELAY", {DELIVERED, RELAYED, DELAYED, FAILED}),
        # no valid value: as if there were none
        ("SOMETIMES", {FAILED}),
        ("NEVER,FAILURE", {FAILED}),
        (7, {FAILED}),
    ],
)
def test_notify_decides_about_reports(notify: object, events: set[str]) -> None:
    wishes = {} if notify is None else {"notify": notify}
    every = (FAILED, DELAYED, DELIVERED, RELAYED)
    assert {event for event in every if about(event, dsn=wishes)} == events


def test_the_default_is_another_for_what_applications_publish() -> None:
    published = {name: value for name, value in MAIL.items() if name != "received"}

    def is_wanted(event: str, config: Config = CONFIG, **more: Any) -> bool:
        return bounces.is_wanted({**published, **more}, event, config)

    assert not is_wanted(FAILED)
    assert is_wanted(FAILED, dsn={})
    assert is_wanted(FAILED, dsn={"ret": "FULL"})
    both = CONFIG.replace(dsn_notify=("NEVER",), dsn_notify_json=("SUCCESS", "DELAY"))
    assert is_wanted(DELAYED, both)
    assert not is_wanted(FAILED, both)
    assert about(config=both) is None


@pytest.mark.parametrize("sender", ["", None, "no address", "a b@c.test", 7, [], "ann@b.test\r\nX"])
def test_a_sender_that_is_no_address_gets_no_report(sender: object) -> None:
    for event in (FAILED, DELAYED, DELIVERED, RELAYED):
        assert about(event, envelope=sender, dsn={"notify": "SUCCESS,FAILURE,DELAY"}) is None


@pytest.mark.parametrize(
    ("wishes", "lmtp", "peer_reports", "event"),
    [
        ({"notify": "SUCCESS"}, False, True, ""),
        ({"notify": "SUCCESS"}, False, False, RELAYED),
        ({"notify": "SUCCESS"}, True, False, DELIVERED),
        # The wish is a default of ours, which no peer hears of.
        ({}, False, True, RELAYED),
        ({"notify": "NONSENSE"}, False, True, RELAYED),
    ],
)
def test_a_peer_that_has_the_wish_makes_the_report(
    wishes: dict[str, str], lmtp: bool, peer_reports: bool, event: str
) -> None:
    found = bounces.of_success({"dsn": wishes}, lmtp=lmtp, peer_reports=peer_reports)
    assert found == event


def test_a_report_says_what_is_known() -> None:
    found = bounce(
        dsn={"orcpt": "rfc822;b@c.test", "envid": "e1", "ret": "FULL"},
        connection={"remote-ip": "198.51.100.1"},
        smtputf8=True,
    )
    assert (found.queue, found.to, found.sender, found.mta) == (
        "outbox", "ann@b.test", "MAILER-DAEMON@me.test", "me.test",
    )  # fmt: skip
    assert (found.full, found.utf8, found.envid, found.client) == (
        True, True, "e1", "198.51.100.1",
    )  # fmt: skip
    assert found.arrival == NOW - 400
    recipient = found.recipient
    assert (recipient.address, recipient.original) == ("bob@c.test", "rfc822;b@c.test")
    assert (recipient.status, recipient.diagnostic) == ("5.1.1", "smtp; 550 5.1.1 no")
    assert (recipient.remote_mta, recipient.log_id) == ("dns; mx.c.test", "0a1b")
    assert recipient.last_attempt == NOW


def test_a_reason_of_our_own_names_no_peer() -> None:
    recipient = bounce(from_peer=False).recipient
    assert (recipient.remote_mta, recipient.diagnostic) == ("", "X-mailerq; 550 5.1.1 no")


def test_a_peer_without_a_proper_name_is_known_by_its_address() -> None:
    for name in (None, "(bad) name", "x" * 300, "a\r\nb"):
        assert bounce(result=result(mta=name)).recipient.remote_mta == "dns; [192.0.2.1]"
    assert bounce(result=result(mta=None, remote_ip=None)).recipient.remote_mta == ""


@pytest.mark.parametrize(
    ("event", "more", "status"),
    [
        (FAILED, {"code": 550, "status": "5.7.1"}, "5.7.1"),
        (FAILED, {"code": 550, "status": None}, "5.0.0"),
        # time was up: the cause, as RFC 3463, section 3.5, has it for X.4.7
        (FAILED, {"code": 452, "status": "4.2.2"}, "4.2.2"),
        (FAILED, {"code": 450, "status": None}, "4.0.0"),
        (FAILED, {"code": 550, "status": "2.0.0"}, "5.0.0"),
        (FAILED, {"code": None, "status": None, "type": "expired"}, "4.4.7"),
        (FAILED, {"code": None, "status": None, "type": "nohosts"}, "4.4.4"),
        (FAILED, {"code": None, "status": None, "type": "nodata"}, "5.6.0"),
        (FAILED, {"code": None, "status": None, "type": "error"}, "5.0.0"),
        (DELAYED, {"code": None, "status": None, "type": "connect"}, "4.4.1"),
        (DELAYED, {"code": 550, "status": "5.1.1"}, "4.0.0"),
        (RELAYED, {"code": 250, "status": "2.6.0"}, "2.6.0"),
        (DELIVERED, {"code": 250, "status": None}, "2.0.0"),
        (DELIVERED, {"code": None, "status": None}, "2.0.0"),
    ],
)
def test_each_result_has_a_status(event: str, more: dict[str, Any], status: str) -> None:
    wishes = {"notify": "SUCCESS,FAILURE,DELAY"}
    assert bounce(event, result=result(**more), dsn=wishes).recipient.status == status


def test_a_result_without_words_has_those_of_its_type() -> None:
    given = result(code=None, status=None, description=None, type="lost")
    assert bounce(result=given).recipient.diagnostic == "X-mailerq; lost (rcpt to)"


def test_invalid_wishes_are_left_out() -> None:
    found = bounce(
        dsn={"envid": "x" * 101, "ret": "ALL", "orcpt": "nonsense", "mta": "a b", "envelope": "x"},
        connection={"remote-ip": "nowhere"},
        received="yesterday",
        seen="2025-06-15 15:00:00",
        **{"message-id": 7, "smtputf8": "yes"},
    )
    assert (found.envid, found.full, found.recipient.original) == ("", False, "")
    assert (found.mta, found.sender) == ("me.test", "MAILER-DAEMON@me.test")
    assert (found.client, found.recipient.log_id, found.utf8) == ("", "", False)
    assert found.arrival == NOW - 400
    assert bounce(dsn={"orcpt": "rfc822;" + "x" * 500}).recipient.original == ""
    assert bounce(dsn={"orcpt": "rfc822;a\r\nb"}).recipient.original == ""
    assert bounce(dsn={"orcpt": r"utf-8;\x{D800}@b.test"}).recipient.original == ""
    assert bounce(connection="x", dsn="x").client == ""


def test_the_author_and_the_host_can_be_others() -> None:
    config = CONFIG.replace(dsn_mta="mta.test", dsn_ret="FULL")
    found = bounce(config=config)
    assert (found.mta, found.sender, found.full) == ("mta.test", "MAILER-DAEMON@mta.test", True)
    assert not bounce(config=config, dsn={"ret": "HDRS"}).full
    config = config.replace(dsn_envelope="post@me.test")
    assert bounce(config=config).sender == "post@me.test"
    found = bounce(config=config, dsn={"mta": "other.test", "envelope": "x@other.test"})
    assert (found.mta, found.sender) == ("other.test", "x@other.test")


@pytest.mark.parametrize("event", [FAILED, DELAYED, DELIVERED, RELAYED])
def test_only_a_failure_returns_the_mail(event: str) -> None:
    dsn = {"ret": "FULL", "notify": "FAILURE,DELAY,SUCCESS"}
    assert bounce(event, dsn=dsn).full is (event == FAILED)


def test_mail_that_needs_tls_does_not_go_back_without() -> None:
    found = bounce(requiretls=True, dsn={"ret": "FULL"})
    assert found.requiretls and not found.full
    assert (
        bounces.report([found], NOTHING, dsn_texts.DEFAULT, id="r", now=NOW).properties[
            "requiretls"
        ]
        is True
    )
    assert (
        "requiretls"
        not in bounces.report([bounce()], NOTHING, dsn_texts.DEFAULT, id="r", now=NOW).properties
    )


@pytest.mark.parametrize(
    ("queues", "settings", "queue"),
    [
        (None, {}, "outbox"),
        ({"failure": "f"}, {}, "outbox"),
        ({"dsn": "mine"}, {"rabbitmq_dsn": "reports"}, "mine"),
        ({"dsn": None}, {}, None),
        ({"dsn": ""}, {"rabbitmq_dsn": "reports"}, None),
        ({"dsn": "a\0b"}, {}, "outbox"),
        ({"dsn": 7}, {"rabbitmq_dsn": "reports"}, "reports"),
        ("x", {"rabbitmq_dsn": "reports"}, "reports"),
        ({"dsn": "outbox"}, {"rabbitmq_dsn": "reports"}, "outbox"),
    ],
)
def test_the_message_or_a_setting_names_the_queue(
    queues: object, settings: dict[str, str], queue: str | None
) -> None:
    found = about(config=CONFIG.replace(**settings), queues=queues)
    assert (found and found.queue) == queue


def test_a_report_for_a_local_sender_goes_where_local_mail_goes() -> None:
    config = CONFIG.replace(smtp_local_domains=("b.test",), rabbitmq_local="local")
    assert bounce(config=config).queue == "local"
    assert bounce(config=config, envelope="x@elsewhere.test").queue == "outbox"
    delivered = CONFIG.replace(smtp_local_domains=("b.test",), local_delivery="lmtp://[::1]:24")
    assert bounce(config=delivered).queue == "outbox"


def test_a_report_that_fails_is_dropped_or_goes_to_one_address_once() -> None:
    found = bounce()
    message = bounces.report([found], NOTHING, dsn_texts.DEFAULT, id="r1", now=NOW)
    properties = message.properties
    assert (message.envelope, message.recipient) == ("", "ann@b.test")
    assert properties["dsn"] == {"notify": "NEVER"}
    assert properties[MARK] == {"event": FAILED, "message-id": "0a1b"}
    assert bounces.about(properties, FAILED, result(), CONFIG, from_peer=True) is None
    config = CONFIG.replace(dsn_double_bounce="postmaster@me.test")
    double = bounces.about(properties, FAILED, result(), config, from_peer=True)
    assert double is not None
    assert (double.to, double.double) == ("postmaster@me.test", True)
    for event in (DELAYED, RELAYED, DELIVERED):
        assert bounces.about(properties, event, result(), config, from_peer=True) is None
    again = bounces.report([double], NOTHING, dsn_texts.DEFAULT, id="r2", now=NOW).properties
    assert bounces.about(again, FAILED, result(), config, from_peer=True) is None
    # Not our own report: its maker, and not we, would have to hear of it.
    assert about(envelope="", config=config) is None
    assert about(envelope="", config=config, **{MARK: "x"}) is None


def test_recipients_of_one_mail_are_in_one_report() -> None:
    several = [bounce(recipient=f"c{n}@d.test") for n in range(3)]
    other = bounce(dsn={"envid": "e2"})
    groups = list(bounces.grouped([*several[:2], other, several[2]]))
    assert groups == [several, [other]]
    many = [bounce(recipient=f"c{n}@d.test") for n in range(2 * MAX_TOGETHER + 1)]
    assert [len(group) for group in bounces.grouped(many)] == [MAX_TOGETHER, MAX_TOGETHER, 1]


def test_a_report_to_an_international_sender_needs_smtputf8() -> None:
    found = bounce(envelope="jürgen@b.test", smtputf8=True)
    message = bounces.report([found], NOTHING, dsn_texts.DEFAULT, id="r1", now=NOW)
    assert message.properties["smtputf8"] is True
    plain = bounces.report([bounce()], NOTHING, dsn_texts.DEFAULT, id="r1", now=NOW)
    assert "smtputf8" not in plain.properties
