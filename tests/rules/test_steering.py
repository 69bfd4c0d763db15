"""Whose x-mq-* fields count, and which."""

from __future__ import annotations

import ipaddress

import pytest

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.mail.extract import EVERYTHING
from mailerq.rules.steering import Steering


def test_by_default_nobody_steers_with_everything() -> None:
    steering = Steering.of(Config(max_delivertime=60))
    for client, login in (("127.0.0.1", ""), ("192.0.2.1", "ann")):
        rights = steering.rights(client, login, authenticated=bool(login))
        assert "tag" in rights.fields
        assert "ip" not in rights.fields
        assert rights.longest == 60


def test_clients_of_a_network_steer_with_everything() -> None:
    config = Config(smtp_extract_range=(ipaddress.ip_network("192.0.2.0/24"),))
    steering = Steering.of(config)
    assert steering.rights("192.0.2.7", "", authenticated=False) is EVERYTHING
    assert steering.rights("::ffff:192.0.2.7", "", authenticated=False) is EVERYTHING
    assert steering.rights("192.0.3.7", "ann", authenticated=True) is not EVERYTHING
    assert steering.rights("2001:db8::1", "", authenticated=False) is not EVERYTHING


@pytest.mark.parametrize(
    ("logins", "login", "authenticated", "may"),
    [
        (("robot",), "robot", True, True),
        (("robot",), "robot", False, False),
        (("robot",), "Robot", True, False),
        (("robot",), "", True, False),
        (("*",), "ann", True, True),
        (("*",), "", True, True),
        (("*",), "", False, False),
        ((), "*", True, False),
    ],
)
def test_logins_steer_with_everything(
    logins: tuple[str, ...], login: str, authenticated: bool, may: bool
) -> None:
    steering = Steering.of(Config(smtp_extract_logins=logins))
    rights = steering.rights("127.0.0.1", login, authenticated=authenticated)
    assert (rights is EVERYTHING) == may


def test_a_word_that_is_no_property_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tagz' is none of"):
        Steering.of(Config(smtp_extract=("safe", "tagz")))
