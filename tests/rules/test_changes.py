"""What orders of operators make of messages."""

from __future__ import annotations

from typing import Any

import pytest

from mailerq import Config
from mailerq.message import Message, Result
from mailerq.rules.changes import Copy, Decision, Kept, Order

NOW = 1_700_000_000.0


def decide(order: Order, properties: dict[str, Any], **settings: Any) -> Decision | None:
    change = order.change("outbox", Config(hostname="mx.test", **settings), now=NOW)
    assert callable(change)
    before = {**properties}
    decision = change(Message(properties))
    assert properties == before
    return decision


@pytest.mark.parametrize("action", ["hold", "release", "delete"])
def test_what_needs_no_document_is_a_name(action: Any) -> None:
    assert Order(action=action).change("outbox", Config(hostname="mx.test"), now=NOW) == action


def test_a_retry_is_for_what_was_tried() -> None:
    order = Order(action="retry")
    tried = {"results": [{"attempt": 1}], "delayed": "2030-01-01 00:00:00"}
    assert decide(order, {"delayed": "2030-01-01 00:00:00"}) is None
    assert decide(order, tried) == Decision(Kept("outbox", {"results": [{"attempt": 1}]}, NOW))


def test_a_bounce_goes_where_failures_go() -> None:
    order = Order(action="bounce", who="ann", reason="spam")
    settings = {"rabbitmq_failure": "failed", "rabbitmq_results": "all"}
    decision = decide(order, {"keepmime": True, "results": [{}]}, **settings)
    assert decision is not None
    assert decision.kept is None
    assert [(copy.queue, copy.with_body) for copy in decision.copies] == [
        ("all", True),
        ("failed", True),
    ]
    _, result = decision.copies[0].properties["results"]
    assert result["description"] == "bounced by ann: spam"
    assert (result["attempt"], result["type"], result["code"]) == (2, "error", 554)
    decision = decide(order, {"queues": {"failure": None}}, **settings)
    assert decision is not None
    (copy,) = decision.copies
    assert (copy.queue, copy.with_body) == ("all", False)


def test_a_report_in_the_default_queue_has_no_body() -> None:
    decision = decide(Order(action="bounce"), {"keepmime": True})
    assert decision is not None
    assert [(copy.queue, copy.with_body) for copy in decision.copies] == [("failure", False)]


def test_a_bounce_tells_of_what_it_has_finished() -> None:
    finished: list[tuple[Message, Result]] = []
    change = Order(action="bounce").change(
        "outbox",
        Config(hostname="mx.test"),
        now=NOW,
        finished=lambda message, result: finished.append((message, result)),
    )
    message = Message({"recipient": "a@b.test"})
    assert callable(change)
    change(message)
    ((told, result),) = finished
    assert told is message
    assert result.attempt == 1


def test_a_reroute_sets_or_removes_the_smarthost_and_keeps_the_time() -> None:
    before = {"recipient": "a@b.test", "smarthost": {"hostname": "old.test", "username": "x"}}
    via = Order(action="reroute", smarthost="new.test", port=2525)
    assert decide(via, before) == Decision(
        Kept("outbox", {**before, "smarthost": {"hostname": "new.test", "port": 2525}}, None)
    )
    direct = Order(action="reroute", direct=True)
    assert decide(direct, before) == Decision(Kept("outbox", {"recipient": "a@b.test"}, None))


def test_a_reroute_to_another_queue_is_due_there_at_once() -> None:
    order = Order(action="reroute", to_queue="parked")
    assert decide(order, {"x": 1}) == Decision(Kept("parked", {"x": 1}, NOW))
    assert decide(Order(action="reroute", to_queue="outbox"), {}) == Decision(Kept("outbox", {}))


def test_a_report_has_no_password() -> None:
    smarthost = {"hostname": "relay.test", "username": "ann", "password": "hush"}
    for more in ({}, {"keepmime": True}):
        decision = decide(Order(action="bounce"), {"smarthost": smarthost, **more})
        assert decision is not None
        (copy,) = decision.copies
        assert copy.properties["smarthost"] == {"hostname": "relay.test", "username": "ann"}


def test_a_copy_without_a_body_has_no_object_in_its_place() -> None:
    decision = decide(Order(action="bounce"), {"mime": {"subject": "x"}, "my-id": 1})
    assert decision is not None
    (copy,) = decision.copies
    assert isinstance(copy, Copy)
    assert "mime" not in copy.properties
    assert copy.properties["my-id"] == 1
