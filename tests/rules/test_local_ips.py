"""The file of local addresses: pools, names and weights, and which addresses a message may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.message import Message
from mailerq.rules.local_ips import PINNED_ATTEMPTS, LocalIps, NoPool, is_mapped, pin
from mailerq.rules.plan import Refuse, Send, plan
from mailerq.rules.responses import Fate
from mailerq.rules.shaping import Shaping
from mailerq.settings import Network, table
from mailerq.table import Table

CONFIG = Config(smtp_default_ips=("192.0.2.9",))

FILE = """
[[pool]]
name = "bulk"
addresses = ["192.0.2.1", "2001:DB8::1"]

[[address]]
ip = "192.0.2.1"
ehlo = "One.Example.com"
weight = 3

[[address]]
ip = "::"
ehlo = "six.example.com"
"""


def read(text: str = FILE, config: Config = CONFIG) -> LocalIps:
    return LocalIps.parse(text.encode(), "addresses.toml", config)


def mistakes(text: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return [(problem.where, problem.text) for problem in caught.value.problems]


def networks(text: str) -> tuple[Network, ...]:
    (kind,) = {row.kind for row in table(Table) if row.key == "smtp-mappable-ips"}
    found: tuple[Network, ...] = kind.check(tuple(kind.read(text)))
    return found


@pytest.mark.parametrize(
    ("properties", "allowed"),
    [
        ({}, ("192.0.2.9",)),
        ({"pool": ""}, ("192.0.2.9",)),
        ({"ips": []}, ("192.0.2.9",)),
        ({"pool": "bulk"}, ("192.0.2.1", "2001:db8::1")),
        ({"pool": "bulk", "ips": ["192.0.2.7"]}, ("192.0.2.7",)),
        ({"pool": "unknown", "ips": ["192.0.2.7"]}, ("192.0.2.7",)),
    ],
)
def test_ips_come_before_the_pool_and_the_pool_before_the_default(
    properties: dict[str, Any], allowed: tuple[str, ...]
) -> None:
    assert read().allowed(properties) == allowed


def test_without_a_file_the_system_chooses() -> None:
    assert LocalIps.of(Config()).allowed({}) == ()


def test_an_address_has_the_name_of_its_line_or_of_its_family() -> None:
    local = read()
    assert local.name_of("192.0.2.1") == "one.example.com"
    assert local.name_of("192.0.2.2") is None
    assert local.name_of("2001:db8::7") == "six.example.com"
    assert (local.weight_of("192.0.2.1"), local.weight_of("192.0.2.2")) == (3, 1)


def test_the_older_file_gives_names_and_the_newer_one_comes_first(tmp_path: Path) -> None:
    older, newer = tmp_path / "helo", tmp_path / "addresses.toml"
    older.write_text("# our addresses\n\n192.0.2.1 old.example.com\n0.0.0.0 four.example.com\n")
    newer.write_text(FILE)
    config = CONFIG.replace(dns_helofile=str(older))
    assert LocalIps.of(config).name_of("192.0.2.1") == "old.example.com"
    local = LocalIps.of(config.replace(addresses_file=str(newer)))
    assert local.name_of("192.0.2.1") == "one.example.com"
    assert local.name_of("192.0.2.2") == "four.example.com"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[[pool]]\nname = 'a'\n", 1, "needs addresses"),
        ("[[pool]]\naddresses = ['192.0.2.1']\n", 1, "needs a name"),
        ("[[pool]]\nname = 'a'\naddresses = ['x']\n", 3, "'x' is not an IP address"),
        ("[[pool]]\nname = 'a'\naddresses = ['::1', '0:0::1']\n", 3, "::1 is there twice"),
        ("[[pool]]\nname = 'a'\naddresses = ['::']\n", 3, ":: is no address"),
        ("[[pool]]\nname = 'a'\nadresses = ['::1']\n", 3, "did you mean addresses?"),
        ("[[address]]\nweight = 2\n", 1, "needs an ip"),
        ("[[address]]\nip = '::1'\nweight = 0\n", 3, "weight: 0 is not a whole number"),
        ("[[address]]\nip = '::1'\nweight = true\n", 3, "weight: True is not a whole number"),
        ("pool = 3\n", 1, "must be written [[pool]]"),
        ("[[address]]\nip = '::'\nweight = 2\n", 3, "stands for all other addresses"),
        ("[[address]]\nip = '::1'\nehlo = 'a b'\n", 3, "ehlo: "),
        ("[[address]]\nip = '::1'\n[[address]]\nip = '::1'\n", 4, "is there twice"),
        ("[[pools]]\n", 1, "the file has [[address]] and [[pool]]"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_with_its_line(text: str, line: int, words: str) -> None:
    found = mistakes(text)
    assert found == [(f"addresses.toml:{line}", found[0][1])]
    assert words in found[0][1]


def test_a_pool_that_is_there_twice_is_a_mistake() -> None:
    pool = "[[pool]]\nname = 'a'\naddresses = ['192.0.2.1']\n"
    assert mistakes(pool + pool) == [("addresses.toml:5", "pool 'a' is there twice")]


def test_mistakes_of_all_files_are_said_together(tmp_path: Path) -> None:
    helo, addresses, limits = (tmp_path / name for name in ("helo", "addresses", "limits"))
    helo.write_text("192.0.2.1 a.example.com\n192.0.2.1\n")
    addresses.write_text("[[pool]]\n")
    limits.write_text("[[limit]]\npool = 'bulk'\nmax-idle = -3\n")
    config = Config(dns_helofile=str(helo), addresses_file=str(addresses), limits_file=str(limits))
    with pytest.raises(ConfigError) as caught:
        Shaping.of(config)
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == [f"{helo}:2", f"{addresses}:1", f"{limits}:3"]


@given(st.binary(max_size=200) | st.text("[]\"'=pool addresses\n.:0", max_size=80).map(str.encode))
def test_any_text_is_read_or_refused(data: bytes) -> None:
    try:
        LocalIps.parse(data, "addresses.toml", CONFIG)
    except ConfigError as error:
        places = [problem.where for problem in error.problems]
    else:
        places = []
    assert all(place.startswith("addresses.toml:") for place in places)


# Mail that comes in by an address


def test_mail_leaves_from_the_address_it_came_in_by_where_the_settings_say_so() -> None:
    config = Config(
        smtp_mappable_ips=networks("192.0.2.0/24; 2001:db8::/32"),
        smtp_unmappable_ips=networks("192.0.2.5"),
    )
    found = [is_mapped(config, ip) for ip in ("192.0.2.4", "192.0.2.5", "2001:db8::1", "::1")]
    assert found == [True, False, True, False]
    assert not is_mapped(Config(), "192.0.2.4")


# The plan


def planned(local: LocalIps, **properties: Any) -> Any:
    message = Message({"envelope": "a@b.test", "recipient": "c@d.test", **properties})
    return plan(message, Config(hostname="me.test"), now=0.0, seen=0.0, local=local)


def test_a_message_of_a_pool_leaves_from_its_addresses() -> None:
    decision = planned(read(), pool="bulk")
    assert isinstance(decision, Send)
    assert decision.local_ips == ("192.0.2.1", "2001:db8::1")


def test_a_message_of_an_unknown_pool_waits_for_the_operator() -> None:
    decision = planned(read(), pool="bluk")
    assert isinstance(decision, Refuse)
    assert decision.outcome.fate is Fate.RETRY
    assert decision.outcome.own_fault
    assert decision.expires == 86400
    assert "no pool 'bluk'" in (decision.outcome.description or "")


def test_an_unknown_pool_is_no_address() -> None:
    with pytest.raises(NoPool, match="bluk"):
        read().allowed({"pool": "bluk"})


# Limits of a pool


def test_each_address_of_a_pool_has_the_limits_of_the_pool() -> None:
    text = """
    [[limit]]
    pool = "bulk"
    messages-per-minute = 60
    max-connections = 2
    [[limit]]
    local-ip = "192.0.2.1"
    messages-per-minute = 30
    [[limit]]
    domain = "d.test"
    pool = "bulk"
    messages-per-minute = 6
    """
    shaping = Shaping.parse(text.encode(), "limits.toml", Config(), read())

    def rate(group: str, ip: str) -> float | None:
        bound = shaping.of_site(group, ip).get("messages-per-minute")
        return bound.value if bound else None

    assert rate("", "2001:db8::1") == 60
    assert rate("", "192.0.2.1") == 30, "an address is more exact than its pool"
    assert rate("", "192.0.2.9") is None
    assert rate("", "") is None
    assert rate("d.test", "192.0.2.1") == 6
    assert shaping.of_site("", "192.0.2.1")["max-connections"].value == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("pool = 'none'", "addresses-file has no pool 'none'"),
        ("pool = 'bulk'\nlocal-ip = '192.0.2.1'", "this one has both"),
    ],
)
def test_a_line_for_a_pool_that_is_not_there_is_a_mistake(more: str, words: str) -> None:
    text = f"[[limit]]\n{more}\nmax-idle = 1\n"
    with pytest.raises(ConfigError) as caught:
        Shaping.parse(text.encode(), "limits.toml", Config(), read())
    (problem,) = caught.value.problems
    assert problem.where == "limits.toml:2"
    assert words in problem.text


# Greylisting


RESULTS = st.lists(
    st.fixed_dictionaries(
        {
            "from": st.sampled_from(["192.0.2.1", "192.0.2.2", None]),
            "code": st.sampled_from([250, 421, 451, 550, None]),
            "type": st.sampled_from(["error", "noaccess", "success", "lost"]),
        }
    ),
    min_size=1,
    max_size=8,
)


@given(RESULTS, st.booleans())
def test_only_an_address_that_was_told_to_come_later_is_pinned_and_not_for_ever(
    results: list[dict[str, Any]], pinned: bool
) -> None:
    properties: dict[str, Any] = {"results": results, **({"forcedip": "::1"} if pinned else {})}
    pin(properties)
    last = results[-1]
    later = last["type"] == "error" and last["code"] in (421, 451) and last["from"] is not None
    often = len(results) >= PINNED_ATTEMPTS and all(
        result == {**result, "type": "error", "from": last["from"]} and result["code"] in (421, 451)
        for result in results[-PINNED_ATTEMPTS:]
    )
    assert properties.get("forcedip") == (last["from"] if later and not often else None)


@pytest.mark.parametrize(
    ("properties", "pinned"),
    [
        ({"pool": "bulk", "forcedip": "192.0.2.1"}, "192.0.2.1"),
        ({"pool": "bulk", "forcedip": "192.0.2.7"}, ""),
        ({"pool": "bulk", "forcedip": 7}, ""),
        ({"ips": ["192.0.2.1"], "forcedip": "192.0.2.1"}, ""),
        ({"forcedip": "192.0.2.1"}, ""),
    ],
)
def test_a_message_comes_back_from_an_address_that_it_may_still_use(
    properties: dict[str, Any], pinned: str
) -> None:
    assert planned(read(), **properties).pinned == pinned


def test_addresses_of_a_message_are_those_of_the_files_however_they_are_written() -> None:
    ips = ["[192.0.2.1]", "::ffff:192.0.2.1", "2001:DB8:0::1", "nonsense"]
    assert LocalIps().allowed({"ips": ips}) == ("192.0.2.1", "2001:db8::1")
