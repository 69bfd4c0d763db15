"""Who may connect, and who may send to whom."""

from __future__ import annotations

import ipaddress

import pytest

from mailerq.rules.access import Access, domain_of

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


def test_an_empty_range_of_clients_admits_everybody() -> None:
    assert Access((), LOOPBACK, ()).may_connect("198.51.100.7")


def test_only_clients_in_range_may_connect() -> None:
    access = Access((ipaddress.ip_network("192.0.2.0/24"),), (), ())
    assert access.may_connect("192.0.2.200")
    assert not access.may_connect("192.0.3.1")
    assert not access.may_connect("2001:db8::1")


def test_only_clients_in_the_relay_range_may_relay() -> None:
    access = Access((), LOOPBACK, ())
    assert access.may_relay("127.0.0.53")
    assert access.may_relay("::1")
    assert not access.may_relay("fe80::1%eth0")
    assert not access.may_relay("198.51.100.7")
    assert not Access((), (), ()).may_relay("127.0.0.1")


def test_an_ipv4_client_of_an_ipv6_socket_has_the_rights_of_its_address() -> None:
    access = Access((ipaddress.ip_network("192.0.2.0/24"),), LOOPBACK, ())
    assert access.may_relay("::ffff:127.0.0.1")
    assert access.may_connect("::ffff:192.0.2.1")
    everybody = Access((), (ipaddress.ip_network("::/0"),), ())
    assert not everybody.may_relay("::ffff:192.0.2.1")


@pytest.mark.parametrize(
    "recipient",
    ["a@here.test", "a@HERE.Test", '"a b"@here.test', "postmaster", "a@b\u00fccher.test"],
)
def test_recipients_of_local_domains_are_local(recipient: str) -> None:
    assert Access((), (), ["Here.test", "xn--bcher-kva.test"]).is_in_local_domain(recipient)


@pytest.mark.parametrize(
    "recipient",
    [
        "a@elsewhere.test",
        "a@sub.here.test",
        "a@xhere.test",
        '"a@here.test"@elsewhere.test',
        "a@[127.0.0.1]",
        "here.test!a@elsewhere.test",
        "x%y.test@here.test",
        "y.test!x@here.test",
        '"x@y.test"@here.test',
    ],
)
def test_nothing_else_is_local(recipient: str) -> None:
    assert not Access((), (), ["here.test"]).is_in_local_domain(recipient)


def test_recipients_of_relay_domains_are_passed_on_and_not_local() -> None:
    access = Access((), (), ["here.test"], relay_domains=["There.test"])
    assert access.is_relayed("a@THERE.test") and not access.is_in_local_domain("a@there.test")
    for recipient in ("a@here.test", "postmaster", "x%y.test@there.test", "a@sub.there.test"):
        assert not access.is_relayed(recipient)


def test_the_domain_stands_behind_the_last_at() -> None:
    assert domain_of('"a@b"@C.test.') == "c.test"
