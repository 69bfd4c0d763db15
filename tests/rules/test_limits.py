"""Rates for each client."""

from __future__ import annotations

import ipaddress

from hypothesis import assume, given
from hypothesis import strategies as st

from mailerq.rules.limits import MAX_CLIENTS, ClientLimits, network_of


def test_a_minutes_worth_may_go_at_once_and_then_flows_in() -> None:
    limits = ClientLimits({"connections": 60})
    assert all(limits.take("192.0.2.1", "connections", 0.0) for _ in range(60))
    assert not limits.take("192.0.2.1", "connections", 0.5)
    assert limits.take("192.0.2.1", "connections", 1.6)
    assert not limits.take("192.0.2.1", "connections", 1.7)


def test_clients_and_what_is_counted_do_not_mix() -> None:
    limits = ClientLimits({"a": 1, "b": 1})
    assert limits.take("192.0.2.1", "a", 0.0)
    assert limits.take("192.0.2.1", "b", 0.0)
    assert limits.take("192.0.2.2", "a", 0.0)
    assert not limits.take("192.0.2.1", "a", 0.0)
    assert limits.take("192.0.2.3", "a", 0.0)


def test_no_bound_is_no_bound() -> None:
    limits = ClientLimits({"a": 0})
    assert all(limits.take("192.0.2.1", name, 0.0) for name in ("a", "b") for _ in range(100))


def test_hosts_of_one_ipv6_network_count_as_one() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1")
    assert network_of("2001:db8::1") != network_of("2001:db8:0:1::1")
    assert network_of("2001:db8:0:1::1", prefix6=56) == network_of("2001:db8:0:ff::1", prefix6=56)
    assert network_of("2001:db8:0:1::1", prefix6=56) != network_of("2001:db8:0:100::1", prefix6=56)
    assert network_of("2001:db8:0:1::1", prefix6=48) == network_of("2001:db8:0:ffff::1", prefix6=48)
    assert network_of("192.0.2.1", 24) == network_of("192.0.2.255", 24)


def test_an_ipv4_address_in_ipv6_is_counted_as_what_it_is() -> None:
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1")
    assert network_of("::ffff:192.0.2.1") != network_of("::ffff:192.0.2.2")


def test_memory_is_bounded() -> None:
    limits = ClientLimits({"a": 1})
    for number in range(MAX_CLIENTS + 10):
        limits.take(f"2001:db8:{number >> 16:x}:{number & 65535:x}::1", "a", 0.0)
    assert len(limits._levels) == MAX_CLIENTS


@given(st.ip_addresses(v=6), st.ip_addresses(v=6))
def test_the_network_is_the_slash_64(
    one: ipaddress.IPv6Address, two: ipaddress.IPv6Address
) -> None:
    assume(one.ipv4_mapped is None and two.ipv4_mapped is None)  # those are IPv4 addresses
    same = int(one) >> 64 == int(two) >> 64
    assert (network_of(str(one)) == network_of(str(two))) == same
    assert network_of(one.exploded) == network_of(str(one))


@given(st.lists(st.floats(0, 600), min_size=1, max_size=200))
def test_nobody_gets_more_than_two_minutes_worth_in_a_minute(times: list[float]) -> None:
    limits = ClientLimits({"a": 5})
    taken = [now for now in sorted(times) if limits.take("192.0.2.1", "a", now)]
    for start in taken:
        assert sum(start <= now < start + 60 for now in taken) <= 10
