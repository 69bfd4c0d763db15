"""Places of mail: one key for one set of ways to go, and a lane that orders what waits there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.rules.destinations import (
    MAX_KEY,
    RETRY_LANE,
    domain_of,
    level_of,
    place_of,
    priority_of,
)


def mail(**more: Any) -> dict[str, Any]:
    return {"recipient": "ann@example.test", "envelope": "news@shop.test", **more}


def test_mail_with_the_same_ways_to_go_has_one_key() -> None:
    key = place_of(mail()).destination
    assert key == place_of(mail(recipient="bob@EXAMPLE.test", envelope="x@y.test")).destination
    assert key != place_of(mail(recipient="ann@other.test")).destination
    assert key != place_of(mail(ips=["192.0.2.1"])).destination
    assert key != place_of(mail(smarthost={"hostname": "relay.test"})).destination


def test_the_order_of_local_addresses_does_not_matter() -> None:
    first = place_of(mail(ips=["192.0.2.1", "192.0.2.2"])).destination
    assert first == place_of(mail(ips=["192.0.2.2", "192.0.2.1"])).destination


def test_domains_share_the_key_of_their_smarthost() -> None:
    relay = {"hostname": "Relay.test", "port": 587}
    one, two = (place_of(mail(recipient=r, smarthost=relay)) for r in ("a@b.test", "c@d.test"))
    assert one.destination == two.destination


def test_higher_priority_comes_first_whatever_else_is_said() -> None:
    urgent = place_of(mail(priority=9, results=[{}])).lane
    assert level_of(urgent) < level_of(place_of(mail()).lane)
    assert urgent < place_of(mail()).lane
    assert level_of(place_of(mail(priority=10**9)).lane) == 0


@pytest.mark.parametrize(
    ("properties", "destination"),
    [
        ({"security": "required"}, "d.test by required TLS"),
        ({"security": "verified", "requiretls": True}, "d.test by verified TLS by REQUIRETLS"),
        ({"requiretls": True}, "d.test by REQUIRETLS"),
        ({"requiretls": True, "tlsrequired": False}, "d.test by REQUIRETLS"),
        ({"requiretls": True, "envelope": ""}, "d.test"),
        ({"tlsrequired": False}, "d.test without policies"),
        ({"security": "opportunistic"}, "d.test"),
        ({"security": "x paused 7"}, "d.test"),
        ({"security": ["verified"], "requiretls": 1, "tlsrequired": 0}, "d.test"),
        (
            {"smarthost": {"hostname": "r.test", "secure": "verified"}},
            "via r.test:25 by verified TLS",
        ),
        ({"requiretls": True, "paused": 7}, "d.test by REQUIRETLS paused 7"),
    ],
)
def test_mail_that_demands_more_or_less_of_tls_waits_for_itself(
    properties: dict[str, Any], destination: str
) -> None:
    assert place_of({**mail(recipient="c@d.test"), **properties}).destination == destination
    assert domain_of(destination) == ("" if destination.startswith("via") else "d.test")


def test_retries_have_lanes_of_their_own() -> None:
    new, again = place_of(mail()).lane, place_of(mail(results=[{}])).lane
    assert again == new + RETRY_LANE
    assert level_of(again) == level_of(new)


def test_a_tag_tells_mail_of_one_sender_apart() -> None:
    assert place_of(mail(tags=["password"])).lane != place_of(mail(tags=["news"])).lane


def test_verp_does_not_make_a_sender_many() -> None:
    lanes = {place_of(mail(envelope=f"bounce+{n}=x@shop.test")).lane for n in range(100)}
    assert len(lanes) == 1


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "recipient",
                "envelope",
                "smarthost",
                "ips",
                "tags",
                "priority",
                "results",
                "security",
                "requiretls",
                "tlsrequired",
            ]
        ),
        ANYTHING,
    )
)
def test_whatever_a_message_says_it_has_a_place(properties: dict[str, Any]) -> None:
    place = place_of(properties)
    assert len(place.destination) <= MAX_KEY
    assert place.destination.isprintable()
    assert place.lane >= 0
    assert place == place_of(properties)


@pytest.mark.parametrize(
    ("priority", "expected"), [(3, 3), (-5, 0), (999, 255), ("x", 0), (None, 0), (1.5, 0)]
)
def test_a_priority_has_bounds(priority: object, expected: int) -> None:
    assert priority_of({"priority": priority}) == expected
