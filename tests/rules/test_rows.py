"""Rows: what they are about, beside a model that reads all of them."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import RowError
from mailerq.rules.row import ERROR, PAUSE, SUPPRESSION, Row, checked, suppressible
from mailerq.rules.rows import NOBODY, Peer, Rows
from tests.support import least_seconds

IPS = ["192.0.2.1", "192.0.2.2", "2001:db8::1"]
POOLS = {"one": ["192.0.2.1"], "both": ["192.0.2.1", "192.0.2.2"]}
DOMAINS = ["b.test", "a.b.test", "c.a.b.test", "d.test"]
NAMES = [*DOMAINS, "*.b.test", "*.a.b.test", "*.test"]
TAGS = ["news", "login"]
REMOTES = ["198.51.100.1", "198.51.100.2", "203.0.113.7"]
NETWORKS = [*REMOTES, "198.51.100.0/24", "0.0.0.0/0", "2001:db8::/32"]


@pytest.mark.parametrize(("text", "same"), [
    ("Ann@B.Test", "ann@b.test"),
    ('"ann"@b.test', "ann@b.test"),
    (r'"\a\n\n"@b.test', "ann@b.test"),
    ('"ann.x"@b.test', "ann.x@b.test"),
    ('"ann x"@b.test', '"ann\\ x"@b.test'),
    ('"a@c.test"@b.test', '"a\\@c.test"@b.test'),
    (r'"\"ann\""@b.test', r'"\"an\n\""@b.test'),
    ("ann@b\u00fccher.test", "ann@XN--BCHER-KVA.test"),
    ("j\u00f6rg@b.test", "jo\u0308rg@B.test"),
    ("ann@[IPv6:2001:DB8:0::1]", "ann@[ipv6:2001:db8::1]"),
    ("*.B\u00fccher.test", "*.xn--bcher-kva.test"),
])  # fmt: skip
def test_one_suppression_is_about_all_ways_to_write_it(text: str, same: str) -> None:
    assert suppressible(text) == suppressible(same)


@pytest.mark.parametrize(("text", "other"), [
    ("ann@b.test", "ann+x@b.test"),
    ("ann@b.test", "a.nn@b.test"),
    ("ann@b.test", "ann@a.b.test"),
    ('"ann "@b.test', "ann@b.test"),
    (r'"\"ann\""@b.test', '"ann"@b.test'),
    ("*.b.test", "b.test"),
])  # fmt: skip
def test_what_is_another_address_is_another_suppression(text: str, other: str) -> None:
    assert suppressible(text) != suppressible(other)


@pytest.mark.parametrize("text", ["ann@b.test.", "b.test.", "*", "*.", "@b.test", "a b@c.test", ""])
def test_what_no_mail_can_have_is_not_suppressed(text: str) -> None:
    with pytest.raises(RowError):
        suppressible(text)


@st.composite
def rows_of(draw: st.DrawFn) -> list[Row]:
    rows = []
    for number in range(1, draw(st.integers(0, 12)) + 1):
        scope: dict[str, str] = {}
        if where := draw(st.sampled_from(["", "local_ip", "pool"])):
            scope[where] = draw(st.sampled_from(IPS if where == "local_ip" else [*POOLS, "none"]))
        kind = draw(st.sampled_from([PAUSE, ERROR]))
        places = ["", "domain", "site", "provider"] + ["remote_ip"] * (kind == PAUSE)
        if place := draw(st.sampled_from(places)):
            names = {"domain": NAMES, "site": NAMES, "provider": ["big"], "remote_ip": NETWORKS}
            scope[place] = draw(st.sampled_from(names[place]))
        if draw(st.booleans()):
            scope["tag"] = draw(st.sampled_from(TAGS))
        rows.append(checked(Row(id=number, kind=kind, code=451 * (kind == ERROR), **scope)))
    return draw(st.permutations(rows))


peers = st.builds(
    Peer,
    st.frozensets(st.sampled_from(DOMAINS), max_size=3),
    st.frozensets(st.sampled_from(REMOTES), max_size=3),
    st.sampled_from(["", "big"]),
)
addresses = st.sampled_from([None, *IPS])
tags = st.lists(st.sampled_from(TAGS), max_size=2)


def names(pattern: str, domain: str) -> bool:
    if pattern.startswith("*."):
        return domain.endswith(pattern[1:])
    return pattern == domain


def fits(row: Row, domain: str, tags: Sequence[str], ip: str | None, peer: Peer = NOBODY) -> bool:
    """Whether a row is about a message from an address, at hosts, read from its fields."""
    return (
        (not row.tag or row.tag in tags)
        and (not row.domain or names(row.domain, domain))
        and (not row.local_ip or row.local_ip == ip)
        and (not row.pool or ip in POOLS.get(row.pool, ()))
        and (not row.site or any(names(row.site, name) for name in peer.names))
        and (not row.provider or row.provider == peer.provider)
        and (not row.remote_ip or any(ip_address(a) in ip_network(row.remote_ip) for a in peer[1]))
    )


def first(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row.id, default=None)


@given(rows_of(), st.sampled_from(DOMAINS), tags, st.lists(st.sampled_from(IPS), unique=True),
       st.booleans())  # fmt: skip
def test_a_message_is_stopped_if_no_address_may_send_it(
    rows: list[Row], domain: str, tags: list[str], ips: list[str], by_domain: bool
) -> None:
    row, left = Rows(rows, pools=POOLS).early(domain, tags, tuple(ips), by_domain=by_domain)
    # Without its hosts, and without the pauses of flows.
    about = [
        each
        for each in rows
        if not (each.site or each.provider or each.remote_ip)
        and (each.kind == ERROR or each.tag or (each.domain and not by_domain))
    ]
    free = {ip: not any(fits(each, domain, tags, ip) for each in about) for ip in ips or [None]}
    if row is None:
        assert all(free[ip] for ip in left or ([] if ips else [None]))
        assert list(left) == [ip for ip in ips if free[ip]]
    else:
        assert not any(free.values()) and not left
        assert row in about and any(fits(row, domain, tags, ip) for ip in free)
        errors = [each for each in about if each.kind == ERROR]
        if all(any(fits(each, domain, tags, ip) for each in errors) for ip in free):
            assert row.kind == ERROR


@given(rows_of(), st.sampled_from(DOMAINS), tags, addresses, peers)
def test_rows_for_hosts_are_about_messages_that_go_there(
    rows: list[Row], domain: str, tags: list[str], ip: str | None, peer: Peer
) -> None:
    late = Rows(rows, pools=POOLS)
    found = [
        row
        for row in rows
        if (row.site or row.provider or row.remote_ip)
        and (row.kind == ERROR or row.tag)
        and fits(row, domain, tags, ip, peer)
    ]
    errors = [row for row in found if row.kind == ERROR]
    assert late.late(domain, tags, ip, peer) == (first(errors) or first(found))
    assert late.has_late or not found


@given(rows_of(), st.sampled_from(DOMAINS), addresses, peers)
def test_a_flow_is_paused_by_what_is_about_all_its_mail(
    rows: list[Row], domain: str, ip: str | None, peer: Peer
) -> None:
    table = Rows(rows, pools=POOLS)
    pauses = [row for row in rows if row.kind == PAUSE and not row.tag]
    found = first([
        row for row in pauses if not row.remote_ip and fits(row, domain, (), ip, peer)
    ])  # fmt: skip
    open_hosts = [
        address
        for address in peer.addresses
        if not any(
            row.remote_ip and fits(row, domain, (), ip, Peer(addresses=frozenset({address})))
            for row in pauses
        )
    ]
    # The domain of a flow is the pattern that its site was set apart for.
    paused = table.flow_pause(table.apart(domain), ip, peer)
    if found is not None:
        assert paused == found
    elif peer.addresses and not open_hosts:
        assert paused is not None and paused.remote_ip
    else:
        assert paused is None


@given(rows_of(), st.sampled_from(DOMAINS), st.sampled_from(DOMAINS))
def test_domains_that_pauses_tell_apart_have_different_sites(
    rows: list[Row], one: str, other: str
) -> None:
    table = Rows(rows)
    if table.apart(one) == table.apart(other):
        for row in rows:
            if row.kind == PAUSE and row.domain and not row.tag:
                assert names(row.domain, one) == names(row.domain, other)


def test_a_suppressed_recipient_is_found_by_its_address_its_domain_or_a_domain_above() -> None:
    one, two, three = (Row(id=n, kind=SUPPRESSION, code=550) for n in (1, 2, 3))
    rows = Rows((), addresses={"ann@b.test": one}, domains={"c.test": two, "*.c.test": three})
    assert rows.suppression("ann@b.test", "b.test") == one
    assert rows.suppression("bob@b.test", "b.test") is None
    assert rows.suppression("ann@c.test", "c.test") == two
    assert rows.suppression("ann@a.c.test", "a.c.test") == three
    assert rows and not Rows(())


@pytest.mark.parametrize(("parts", "problem"), [
    ({"local_ip": "nowhere"}, "local-ip"),
    ({"domain": "not a domain"}, "domain"),
    ({"domain": "*.*.test"}, "domain"),
    ({"remote_ip": "192.0.2.1/24"}, "remote-ip"),
    ({"domain": "b.test", "provider": "big"}, "at most"),
    ({"local_ip": "192.0.2.1", "pool": "one"}, "not both"),
    ({"tag": "a\nb"}, "printed"),
    ({"tag": "x" * 2000}, "too long"),
    ({"kind": ERROR, "code": 600}, "code"),
    ({"kind": ERROR, "code": 550, "status": "4.1.1"}, "contradicts"),
    ({"kind": ERROR, "code": 550, "status": "five"}, "status"),
    ({"kind": ERROR, "code": 550, "remote_ip": "192.0.2.1"}, "remote-ip"),
    ({"kind": SUPPRESSION, "code": 450}, "code"),
])  # fmt: skip
def test_a_row_that_cannot_work_is_refused_with_its_part(
    parts: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RowError, match=problem):
        checked(Row(**{"kind": PAUSE, **parts}))


@pytest.mark.parametrize("text", ["", "@b.test", "a@", "a b@c.test", "*", "b..test"])
def test_only_addresses_and_domains_are_suppressed(text: str) -> None:
    with pytest.raises(RowError):
        suppressible(text)


def test_texts_of_a_row_fit_on_a_line() -> None:
    row = checked(Row(kind=PAUSE, reason="a\r\nb\x1b", sample="x" * 5000))
    assert row.reason == "a??b?" and len(row.sample) == 1000


@pytest.mark.parametrize("scope", ["domain", "site", "remote_ip"])
def test_rows_about_other_mail_cost_a_message_and_a_flow_next_to_nothing(scope: str) -> None:
    names = {
        "domain": lambda number: f"*.d{number}.test",
        "site": lambda number: f"*.d{number}.test",
        "remote_ip": lambda number: f"10.1.{number // 256}.{number % 256}",
    }
    rows = Rows(
        checked(Row(id=2 * number + half, kind=PAUSE, tag=tag, **{scope: names[scope](number)}))
        for number in range(1, 5000)
        for half, tag in enumerate(["", "news"])
    )
    peer = Peer(frozenset(["mx.b.test"]), frozenset(["192.0.2.1"]))

    def ask() -> None:
        for _ in range(200):
            assert rows.flow_pause("b.test", None, peer) is None
            assert rows.late("b.test", ["news"], None, peer) is None
            assert rows.early("b.test", ["news"], ()).row is None

    assert least_seconds(ask) < 0.5  # a look at each row takes seconds
