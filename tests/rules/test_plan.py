"""What is decided about a message before it is tried."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.mail.headers import Header
from mailerq.message import Message, format_time
from mailerq.rules.plan import SHORT_BYTES, Hold, Refuse, Send, body_problem, plan
from mailerq.rules.security import NOTHING

NOW = 1_767_268_800.0
CONFIG = Config(hostname="me.test")


def planned(config: Config = CONFIG, seen: float = NOW, **properties: Any) -> Any:
    message = Message({"envelope": "a@b.test", "recipient": "c@d.test", **properties})
    before = dict(message.properties)
    decision = plan(message, config, now=NOW, seen=seen)
    assert message.properties == before
    return decision


def test_a_message_goes_to_the_domain_of_its_recipient_from_any_address() -> None:
    decision = planned()
    assert isinstance(decision, Send)
    assert (decision.route.host, decision.route.mx) == ("d.test", True)
    assert (decision.envelope, decision.recipient) == ("a@b.test", "c@d.test")
    assert (decision.local_ips, decision.demands) == ((), NOTHING)
    assert decision.expires == NOW + CONFIG.max_delivertime


def test_the_settings_of_the_day_decide() -> None:
    assert planned(CONFIG.replace(smarthost="relay.test")).route.host == "relay.test"
    assert planned(CONFIG.replace(max_delivertime=60.0)).expires == NOW + 60


def test_addresses_are_as_the_wire_needs_them() -> None:
    decision = planned(envelope="a@bücher.test", recipient="c@bücher.test")
    assert decision.envelope == "a@xn--bcher-kva.test"
    assert decision.recipient == "c@xn--bcher-kva.test"
    assert decision.domain == "xn--bcher-kva.test"


def test_the_local_addresses_are_those_of_ips_that_are_some() -> None:
    assert planned(ips=["192.0.2.1", "x", "2001:db8::1"]).local_ips == ("192.0.2.1", "2001:db8::1")
    decision = planned(ips=["localhost"])
    assert isinstance(decision, Refuse)
    assert "property ips" in (decision.outcome.description or "")


def test_what_is_early_is_held() -> None:
    assert planned(delayed=format_time(NOW + 60)) == Hold(NOW + 60)
    assert isinstance(planned(delayed=format_time(NOW)), Send)


def test_mail_that_was_never_tried_expires_after_it_became_due() -> None:
    assert isinstance(planned(seen=NOW - CONFIG.max_delivertime), Send)
    decision = planned(seen=NOW - CONFIG.max_delivertime - 1)
    assert decision.outcome.type == "expired"
    assert decision.domain == "d.test"


@pytest.mark.parametrize(
    ("properties", "status"),
    [
        ({"recipient": "nobody"}, "5.1.3"),
        ({"envelope": "a@b c"}, "5.1.7"),
        ({"smarthost": {"port": 1}}, None),
        ({"queues": {"success": "outbox"}}, None),
        ({"retries": "5"}, None),
    ],
)
def test_what_cannot_be_sent_is_refused(properties: dict[str, Any], status: str | None) -> None:
    decision = planned(**properties)
    assert isinstance(decision, Refuse)
    assert decision.outcome.status == status


@pytest.mark.parametrize(
    ("body", "properties", "type_", "status"),
    [
        (None, {}, "nodata", None),
        (b"Received: x\r\n" * 101 + b"\r\n", {}, "error", "5.4.6"),
    ],
)
def test_a_body_can_rule_a_message_out(
    body: bytes | None, properties: dict[str, Any], type_: str, status: str | None
) -> None:
    message = Message({"recipient": "c@d.test", **properties}, body)
    outcome = body_problem(message, supplied=False)
    assert outcome is not None
    assert (outcome.type, outcome.status) == (type_, status)
    if body is None:
        assert body_problem(message, supplied=True) is None


@pytest.mark.parametrize("body", [b"hi\r\n", 100 * b"Received: x\r\n" + b"\r\n"])
def test_a_plain_body_rules_nothing_out(body: bytes) -> None:
    assert body_problem(Message({"recipient": "c@d.test"}, body), supplied=False) is None


PARTS = st.sampled_from([
    *(count * (b"Received:" + end) for count in (1, 50, 101) for end in (b"\r\n", b"\n", b"\r")),
    b"\r\n", b"\n", b"\r", b"To: a@b.test\r\n", b"no field", SHORT_BYTES * b"x",
])  # fmt: skip


@given(st.lists(PARTS, max_size=6).map(b"".join))
@example(51 * b"Received:\n" + 51 * b"Received:\r")
def test_a_body_loops_if_its_header_does(body: bytes) -> None:
    problem = body_problem(Message({"recipient": "c@d.test"}, body), supplied=False)
    assert (problem is not None) == Header(body).is_looping()


def test_a_mail_without_an_empty_line_is_judged_like_any_other() -> None:
    for count, loops in ((100, False), (101, True)):
        body = count * b"Received:\n"
        problem = body_problem(Message({"recipient": "c@d.test"}, body), supplied=False)
        assert (problem is not None) == loops
