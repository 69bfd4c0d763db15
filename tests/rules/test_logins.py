"""Which login a message needs, and where it may go in clear."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.message import Message
from mailerq.rules.destinations import place_of
from mailerq.rules.logins import demands_of, login_of, may_go_in_clear
from mailerq.rules.plan import Send, plan
from mailerq.rules.security import NOTHING, Demands, Level
from mailerq.wire.login import Login

OWN = {"hostname": "relay.test", "username": "ann", "password": "1"}
SETTINGS: dict[str, Any] = {
    "smarthost": "127.0.0.1",
    "smarthost_username": "bob",
    "smarthost_password": "2",
}
SINK: dict[str, Any] = {"smtp_sink_address": "127.0.0.1"}
SINK_LOGIN: dict[str, Any] = {"smtp_sink_username": "sue", "smtp_sink_password": "3"}


@pytest.mark.parametrize(
    ("smarthost", "settings", "login"),
    [
        (None, {}, None),
        (None, SETTINGS, Login("bob", "2")),
        (OWN, {}, Login("ann", "1")),
        (OWN, SETTINGS, Login("ann", "1")),
        ({"hostname": "relay.test"}, SETTINGS, None),
        ({"hostname": "relay.test", "username": "", "password": None}, SETTINGS, None),
        (OWN, SINK, None),
        (None, {**SETTINGS, **SINK}, None),
        (OWN, {**SETTINGS, **SINK, **SINK_LOGIN}, Login("sue", "3")),
    ],
)
def test_a_login_belongs_to_the_host_that_the_mail_goes_to(
    smarthost: dict[str, Any] | None, settings: dict[str, Any], login: Login | None
) -> None:
    message = Message({"recipient": "c@d.test", "smarthost": smarthost})
    decision = plan(message, Config(hostname="me.test", **settings), now=0.0, seen=0.0)
    assert isinstance(decision, Send)
    assert decision.demands.logins == (frozenset() if login is None else {login})
    assert "1" not in repr(decision.demands)


@pytest.mark.parametrize(
    ("smarthost", "words"),
    [
        ({"username": "ann"}, "has a login without password"),
        ({"password": "1"}, "has a login without username"),
        ({"username": 1, "password": "1"}, "username is no string"),
        ({"username": "ann", "password": ["1"]}, "password is no string"),
        ({"username": "a\0b", "password": "1"}, "username cannot be sent"),
        ({"username": "ann", "password": "\ud800"}, "password cannot be sent"),
        ({"username": "ann", "password": "x" * 5000}, "password cannot be sent"),
    ],
)
def test_a_login_that_cannot_be_used_is_a_mistake(smarthost: dict[str, Any], words: str) -> None:
    with pytest.raises(AddressError, match=words):
        login_of({"smarthost": {"hostname": "relay.test", **smarthost}}, Config())


@given(st.dictionaries(st.sampled_from(["username", "password"]), st.one_of(st.text(), st.none(),
    st.integers(), st.lists(st.text()))))  # fmt: skip
def test_any_value_is_a_login_or_a_mistake(smarthost: dict[str, Any]) -> None:
    try:
        login = login_of({"smarthost": {"hostname": "relay.test", **smarthost}}, Config())
    except AddressError:
        return
    assert login is None or (login.username.encode() and login.password.encode())


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, NOTHING),
        ({"security": "optional"}, Demands(plain=True)),
        ({"security": "opportunistic"}, Demands(Level.OPPORTUNISTIC)),
        ({"security": "required"}, Demands(Level.REQUIRED)),
        ({"security": "verified"}, Demands(Level.VERIFIED)),
        ({"requiretls": True}, Demands(requiretls=True)),
        ({"requiretls": True, "envelope": "a@b.test"}, Demands(requiretls=True)),
        ({"requiretls": True, "envelope": ""}, NOTHING),
        ({"requiretls": False, "tlsrequired": False}, NOTHING),
        ({"smarthost": {"hostname": "h.test", "secure": "verified"}}, Demands(Level.VERIFIED)),
        ({"smarthost": {"hostname": "h.test", "secure": 1}}, Demands(Level.OPPORTUNISTIC)),
        ({"smarthost": {"hostname": "h.test", "secure": False}}, Demands(plain=True)),
        (
            {"security": "required", "smarthost": {"hostname": "h.test", "secure": "none"}},
            Demands(Level.REQUIRED, plain=True),
        ),
    ],
)
def test_a_message_demands_what_its_properties_say(
    properties: dict[str, Any], expected: Demands
) -> None:
    assert demands_of(properties, None) == expected
    decision = plan(
        Message({"recipient": "c@d.test", **properties}), Config(hostname="me.test"),
        now=0.0, seen=0.0,
    )  # fmt: skip
    assert isinstance(decision, Send)
    assert decision.demands == expected


def test_a_word_that_is_no_level_is_a_mistake() -> None:
    for word in ("strong", 7, ["verified"], {}):
        with pytest.raises(AddressError, match="secure"):
            demands_of({"smarthost": {"hostname": "h.test", "secure": word}}, None)


def test_mail_of_different_users_waits_apart() -> None:
    places = {
        place_of({"recipient": "c@d.test", "smarthost": {**OWN, **more}}).destination
        for more in ({}, {"password": "2"}, {"username": "bob"}, {"username": None})
    }
    assert places == {
        "via relay.test:25",
        "via relay.test:25 as ann",
        "via relay.test:25 as bob",
    }


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("10.1.2.3", True),
        ("192.168.0.1", True),
        ("fd00::1", True),
        ("172.32.0.1", False),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
    ],
)
def test_a_login_goes_in_clear_to_private_addresses_only(address: str, may: bool) -> None:
    assert may_go_in_clear(address, Config()) is may
