"""Where messages and their results go."""

from typing import Any

import pytest

from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.rules.access import is_within
from mailerq.rules.routes import Route, loop_problem, result_queues, route_of

LOCAL = {"smtp_local_domains": ("d.test",)}
SMARTHOST = {"hostname": "Smart.Test", "port": "2525"}


@pytest.mark.parametrize(
    ("properties", "settings", "expected"),
    [
        ({}, {}, Route("d.test", "d.test", 25, True)),
        ({}, {"smtp_out_port": 99}, Route("d.test", "d.test", 99, True)),
        (
            {"smarthost": {"name": "s.test"}},
            {"smtp_out_port": 99},
            Route("s.test:25", "s.test", 25, False),
        ),
        ({"smarthost": SMARTHOST}, {}, Route("smart.test:2525", "smart.test", 2525, False)),
        ({"smarthost": {"name": "s.test"}}, {}, Route("s.test:25", "s.test", 25, False)),
        ({"smarthost": {}}, {}, Route("d.test", "d.test", 25, True)),
        ({"smarthost": None}, {}, Route("d.test", "d.test", 25, True)),
        (
            {},
            {**LOCAL, "local_delivery": "lmtp://mailbox.test"},
            Route("lmtp://mailbox.test", "mailbox.test", 24, False, True, True, "local-delivery"),
        ),
        (
            {},
            {**LOCAL, "local_delivery": "lmtp:///run/lmtp", "smarthost": "all.test"},
            Route("lmtp:///run/lmtp", "/run/lmtp", 0, False, True, True, "local-delivery"),
        ),
        (
            {"smarthost": SMARTHOST},
            {**LOCAL, "local_delivery": "lmtp:///run/lmtp"},
            Route("smart.test:2525", "smart.test", 2525, False),
        ),
        (
            {},
            {**LOCAL, "local_delivery": "lmtp:///run/lmtp", "smtp_sink_address": "127.0.0.1"},
            Route("lmtp:///run/lmtp", "127.0.0.1", 25, False, True, False, "smtp-sink-address"),
        ),
        (
            {},
            {"smtp_local_domains": ("x.test",), "local_delivery": "lmtp:///run/lmtp"},
            Route("d.test", "d.test", 25, True),
        ),
        (
            {},
            {"smarthost": "all.test"},
            Route("all.test:25", "all.test", 25, False, True, False, "smarthost"),
        ),
        (
            {"smarthost": SMARTHOST},
            {"smarthost": "all.test"},
            Route("smart.test:2525", "smart.test", 2525, False),
        ),
        ({"smarthost": {"name": "::1"}}, {}, Route("[::1]:25", "::1", 25, False)),
        (
            {},
            {"smarthost": "::1"},
            Route("[::1]:25", "::1", 25, False, True, False, "smarthost"),
        ),
        (
            {},
            {"smtp_sink_address": "127.0.0.1", "smtp_sink_port": 99},
            Route("d.test", "127.0.0.1", 99, False, True, False, "smtp-sink-address"),
        ),
        (
            {"smarthost": SMARTHOST},
            {"smtp_sink_address": "127.0.0.1"},
            Route("smart.test:2525", "127.0.0.1", 25, False, True, False, "smtp-sink-address"),
        ),
        (
            {},
            {"smarthost": "all.test", "smtp_sink_address": "127.0.0.1"},
            Route("all.test:25", "127.0.0.1", 25, False, True, False, "smtp-sink-address"),
        ),
    ],
)
def test_the_way_of_a_message(
    properties: dict[str, Any], settings: dict[str, Any], expected: Route
) -> None:
    assert route_of(properties, "d.test", Config(**settings)) == expected


@pytest.mark.parametrize(
    "smarthost",
    [
        {"port": 25},
        {"hostname": 7},
        {"hostname": "a b"},
        {"hostname": "x.test\r\n"},
        {"hostname": "x.test", "port": 0},
        {"hostname": "x.test", "port": 65536},
        {"hostname": "x.test", "port": "smtp"},
        {"hostname": "x.test", "port": []},
        {"hostname": "x.test", "port": float("inf")},
    ],
)
def test_a_smarthost_that_cannot_be(smarthost: dict[str, Any]) -> None:
    with pytest.raises(AddressError):
        route_of({"smarthost": smarthost}, "d.test", Config())


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.0.1", "0.0.0.0", "0.1.2.3", "169.254.169.254"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "::ffff:127.0.0.1", "::ffff:a9fe:1"),
    ],
)
def test_this_host_and_its_links_are_forbidden_by_default(address: str) -> None:
    assert is_within(address, Config().smtp_out_forbidden)
    assert not is_within(address, ())


@pytest.mark.parametrize("address", ["192.0.2.1", "10.0.0.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_other_addresses_are_not_forbidden(address: str) -> None:
    assert not is_within(address, Config().smtp_out_forbidden)


CONFIGURED = {"results": "r", "success": "s", "failure": "", "retry": "t"}


@pytest.mark.parametrize(
    ("queues", "expected"),
    [
        (None, ["r", "s", "t"]),
        ({}, ["r", "s", "t"]),
        ({"success": "mine"}, ["r", "mine", "t"]),
        ({"success": None, "results": ""}, ["t"]),
        ({"failure": "f"}, ["r", "s", "f", "t"]),
        ({"success": 5}, ["r", "s", "t"]),
        ({"success": "outbox", "retry": "a" * 256}, ["r", "s", "t"]),
        ({"success": "a\0b", "results": "outbox\n"}, ["r", "s", "t"]),
        ({"success": "outbox.wait.1", "results": "outbox.at.mx1"}, ["r", "s", "t"]),
        ("nonsense", ["r", "s", "t"]),
    ],
)
def test_queues_for_results(queues: Any, expected: list[str]) -> None:
    kinds = ("results", "success", "failure", "retry")
    assert result_queues({"queues": queues}, CONFIGURED, *kinds, outbox="outbox") == expected


def test_a_result_queue_is_not_the_outbox() -> None:
    assert loop_problem({"queues": {"success": "out", "retry": None}}, "outbox") is None
    assert loop_problem({"queues": ["outbox"]}, "outbox") is None
    problem = loop_problem({"queues": {"success": "s", "any": "outbox"}}, "outbox")
    assert problem is not None
    assert "outbox is the outbox" in problem


@pytest.mark.parametrize("name", ["outbox.wait.1", "outbox.parked.index", "outbox.at.mx1:25"])
@pytest.mark.parametrize("kind", ["results", "success", "failure", "retry", "dsn"])
def test_a_result_queue_does_not_lead_back_to_the_outbox(name: str, kind: str) -> None:
    assert loop_problem({"queues": {kind: name}}, "out") is None
    problem = loop_problem({"queues": {kind: name}}, "outbox")
    assert problem is not None
    assert f"{name!a} is a part of the outbox" in problem
    configured = {kind: name}
    assert result_queues({}, configured, kind, outbox="outbox") == []
