"""The addresses of brokers are read as the URI specification of RabbitMQ says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import AddressError
from mailerq.queues.rabbitmq.addresses import Address, parse_addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("amqp://host", Address("host", 5672)),
        ("amqp://host/", Address("host", 5672)),
        ("AMQPS://host", Address("host", 5671, tls=True)),
        ("amqp://u:p@host:10000/v", Address("host", 10000, "u", "p", "v")),
        ("amqp://user%61:%61pass@host:1/v%2fhost", Address("host", 1, "usera", "apass", "v/host")),
        ("amqp://u:p%40@[::1]:5/%2f", Address("::1", 5, "u", "p@", "/")),
        ("amqp://u@host", Address("host", 5672, "u", "")),
        ("amqp://u:a:b@c@host", Address("host", 5672, "u", "a:b@c")),
    ],
)  # fmt: skip
def test_an_address_is_read(text: str, expected: Address) -> None:
    assert parse_addresses(text) == [expected]


@pytest.mark.parametrize(
    "text",
    ["", " , ", "host", "http://host", "amqp://", "amqp://:p@host", "amqp://host:0",
     "amqp://host:70000", "amqp://a;;b", "amqp://host/a/b", "amqp://host/v?heartbeat=1"],
)  # fmt: skip
def test_a_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_addresses(text)


def test_several_brokers_share_a_login_or_not() -> None:
    found = parse_addresses("amqp://u:p@a;b:5/v,amqps://c")
    assert found == [
        Address("a", 5672, "u", "p", "v"),
        Address("b", 5, "u", "p", "v"),
        Address("c", 5671, tls=True),
    ]


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for prefix in ("", "amqp://", "amqps://user:sesame@"):
        try:
            addresses = parse_addresses(prefix + text)
        except AddressError:
            continue
        assert all(address.host and 0 < address.port < 65536 for address in addresses)


def test_no_text_shows_a_password() -> None:
    (address,) = parse_addresses("amqp://u:sesame@host")
    assert "sesame" not in f"{address} {address!r}"
    for wrong in ("amqp://u:sesame@host/a/b", "amqp://u:sesame@:0", "xmpp://u:sesame@host"):
        with pytest.raises(AddressError) as caught:
            parse_addresses(wrong)
        assert "sesame" not in str(caught.value)
