"""The limits file: which values hold where, and mistakes with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.rules.security import Level
from mailerq.rules.shaping import Bounds, Shaping

CONFIG = Config(domain_maxmessages=100, domain_maxconnections=5, ip_maxconnections=3)


def read(text: str, config: Config = CONFIG) -> Shaping:
    return Shaping.parse(text.encode(), "limits.toml", config)


def values(bounds: Bounds) -> dict[str, float]:
    return {name: bound.value for name, bound in bounds.items()}


def mistakes(text: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert {problem.key for problem in caught.value.problems} == {"limits-file"}
    return [(problem.where, problem.text) for problem in caught.value.problems]


# What holds where.


def test_settings_are_the_limits_without_a_file() -> None:
    shaping = Shaping.of(CONFIG)
    assert values(shaping.of_site("", "")) == {"messages-per-minute": 100, "max-connections": 5}
    assert values(shaping.of_remote("192.0.2.1", "")) == {"max-connections": 3}
    assert values(shaping.of_connection("", "", "")) == {
        "connection-idle": 5, "secure": Level.OPPORTUNISTIC,
    }  # fmt: skip
    assert shaping.of_site("", "")["messages-per-minute"].where == "domain-maxmessages"


def test_a_line_without_a_selector_overrides_the_settings() -> None:
    shaping = read("[[limit]]\nmessages-per-minute = 60\nbytes-per-minute = '10MB'\n")
    assert values(shaping.of_site("", "")) == {
        "messages-per-minute": 60, "bytes-per-minute": 10 << 20, "max-connections": 5,
    }  # fmt: skip
    assert shaping.of_site("", "")["messages-per-minute"].where == "limits.toml:2"


DOMAINS = """
[[limit]]
domain = "shop.example.com"
messages-per-minute = 10
[[limit]]
domain = "*.example.com"
messages-per-minute = 20
max-connections = 2
[[limit]]
domain = "*.com"
messages-per-minute = 30
max-starting = 1
"""


@pytest.mark.parametrize(
    ("domain", "group", "expected"),
    [
        ("shop.example.com", "shop.example.com", (10, 2, 1)),
        ("a.example.com", "*.example.com", (20, 2, 1)),
        ("a.b.example.com", "*.example.com", (20, 2, 1)),
        ("example.com", "*.com", (30, 5, 1)),
        ("example.org", "", (100, 5, None)),
        ("com", "", (100, 5, None)),
        ("below.shop.example.com", "*.example.com", (20, 2, 1)),
    ],
)
def test_more_exact_domains_override_less_exact_ones_value_by_value(
    domain: str, group: str, expected: tuple[int, int, int | None]
) -> None:
    shaping = read(DOMAINS)
    assert shaping.group_of(domain) == group
    found = values(shaping.of_site(group, ""))
    names = ("messages-per-minute", "max-connections", "max-starting")
    assert tuple(found.get(name) for name in names) == expected


def test_later_lines_override_earlier_ones_and_minus_one_takes_a_value_back() -> None:
    shaping = read(
        "[[limit]]\ndomain = 'a.test'\nmessages-per-minute = 1\nmax-connections = 1\n"
        "[[limit]]\ndomain = 'A.test'\nmessages-per-minute = 2\nmax-connections = -1\n"
    )
    found = values(shaping.of_site("a.test", ""))
    assert found == {"messages-per-minute": 2, "max-connections": 5}


def test_zero_is_no_limit() -> None:
    shaping = read("[[limit]]\ndomain = 'a.test'\nmessages-per-minute = 0\nconnection-idle = 0\n")
    assert values(shaping.of_site("a.test", "")) == {"max-connections": 5}
    assert values(shaping.of_connection("a.test", "", ""))["connection-idle"] == 0


def test_small_values_keep_their_meaning() -> None:
    shaping = read("[[limit]]\nmax-connections = 1\nmessages-per-minute = 1\n")
    assert values(shaping.of_site("", "")) == {"messages-per-minute": 1, "max-connections": 1}


def test_a_local_address_makes_a_line_more_exact_than_its_equals_only() -> None:
    shaping = read(
        "[[limit]]\nlocal-ip = '192.0.2.1'\nmessages-per-minute = 7\n"
        "[[limit]]\nmessages-per-minute = 8\n"
        "[[limit]]\ndomain = 'a.test'\nmessages-per-minute = 9\n"
    )
    assert values(shaping.of_site("", "192.0.2.1"))["messages-per-minute"] == 7
    assert values(shaping.of_site("", "192.0.2.2"))["messages-per-minute"] == 8
    assert values(shaping.of_site("a.test", "192.0.2.1"))["messages-per-minute"] == 9


PROVIDERS = """
[[provider]]
name = "big"
mx = ["*.Big.example.", "mx.big-too.example"]
[[provider]]
name = "other"
mx = ["other.example", "192.0.2.1"]
[[limit]]
provider = "big"
messages-per-minute = 6
connection-messages = 20
[[limit]]
domain = "vanity.test"
connection-messages = 5
"""


@pytest.mark.parametrize(
    ("hosts", "provider"),
    [
        (["a.big.example"], "big"),
        (["A.BIG.EXAMPLE.", "mx.big-too.example"], "big"),
        (["big.example"], "big"),
        (["notbig.example"], ""),
        (["a.big.example", "elsewhere.test"], ""),
        (["mail.other.example"], "other"),
        ([], ""),
        (["192.0.2.1"], "other"),
    ],
)
def test_a_provider_has_sites_all_of_whose_hosts_it_has(hosts: list[str], provider: str) -> None:
    assert read(PROVIDERS).provider_of(hosts) == provider


def test_limits_of_a_provider_hold_beside_those_of_the_site() -> None:
    shaping = read(PROVIDERS)
    assert values(shaping.of_provider("big", "")) == {"messages-per-minute": 6}
    assert values(shaping.of_provider("other", "")) == values(shaping.of_provider("", "")) == {}
    assert values(shaping.of_site("", ""))["messages-per-minute"] == 100


def test_limits_of_a_connection_come_from_the_settings_the_provider_and_the_domain() -> None:
    shaping = read(PROVIDERS)
    found = [
        shaping.of_connection(group, provider, "").get("connection-messages")
        for group, provider in (("", ""), ("", "big"), ("vanity.test", "big"))
    ]
    assert [bound and bound.value for bound in found] == [None, 20, 5]


def test_remote_addresses_have_limits_by_the_most_exact_network() -> None:
    shaping = read(
        "[[limit]]\nremote-ip = '192.0.2.0/24'\nmax-connections = 2\n"
        "[[limit]]\nremote-ip = '192.0.2.9'\nmax-connections = 1\n"
        "[[limit]]\nremote-ip = '*'\nmax-connections = 4\nmessages-per-minute = 50\n"
    )
    for address, most in (("192.0.2.9", 1), ("192.0.2.1", 2), ("198.51.100.1", 4), ("::1", 4)):
        assert values(shaping.of_remote(address, "")) == {
            "max-connections": most, "messages-per-minute": 50,
        }  # fmt: skip


# Mistakes.


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[[limit]]\nmessages-per-minute = = 1\n", 2, "Invalid value"),
        ("[[limits]]\nmax-connections = 1\n", 1, "'limits'"),
        ("max-connections = 1\n", 1, "'max-connections'"),
        ("[limit]\nmax-connections = 1\n", 1, "[[limit]]"),
        ("[[limit]]\nmax-conections = 1\n", 2, "did you mean max-connections?"),
        ("[[limit]]\nmax-connections = '3'\n", 2, "not a whole number"),
        ("[[limit]]\nmax-connections = true\n", 2, "not a whole number"),
        ("[[limit]]\nmax-connections = 1.5\n", 2, "not a whole number"),
        ("[[limit]]\nmax-connections = -2\n", 2, "out of bounds"),
        ("[[limit]]\n\nbytes-per-minute = '3 pounds'\n", 3, "not a size"),
        ("[[limit]]\nconnection-idle = inf\n", 2, "out of bounds"),
        ("[[limit]]\nconnection-idle = nan\n", 2, "out of bounds"),
        ("[[limit]]\ndomain = 'a.test'\n", 1, "sets nothing"),
        ("[[limit]]\ndomain = 'a b'\nmax-idle = 1\n", 2, "is not a domain"),
        ("[[limit]]\ndomain = ''\nmax-idle = 1\n", 2, "not a text"),
        ("[[limit]]\ndomain = 'a.*.test'\nmax-idle = 1\n", 2, "*.example.com"),
        ("[[limit]]\nprovider = 'nobody'\nmax-idle = 1\n", 2, "'nobody'"),
        ("[[limit]]\nremote-ip = 'mx.test'\nmax-connections = 1\n", 2, "not an address"),
        ("[[limit]]\nremote-ip = '*'\nmax-idle = 1\n", 3, "max-idle"),
        ("[[limit]]\nlocal-ip = 'eth0'\nmax-idle = 1\n", 2, "not an IP address"),
        ("[[limit]]\npool = 'a'\nmax-idle = 1\n", 2, "no pool 'a'"),
        ("[[limit]]\nsecure = 'strong'\n", 2, "none of none, opportunistic"),
        ("[[limit]]\nsecure = 2\n", 2, "none of none, opportunistic"),
        ("[[limit]]\nremote-ip = '*'\nsecure = true\n", 3, "cannot be set for a remote-ip"),
        ("[[limit]]\nignore-policies = 1\n", 2, "neither true nor false"),
        (
            "[[limit]]\nlocal-ip = '192.0.2.1'\nignore-policies = true\n", 3,
            "cannot be set for a local-ip, only for domains",
        ),
        (
            "[[limit]]\ndomain = 'a.test'\nremote-ip = '*'\nmax-connections = 1\n", 3,
            "domain and remote-ip",
        ),
        ("[[provider]]\nmx = ['a.test']\n", 1, "needs a name"),
        ("[[provider]]\nname = 'a'\n", 1, "needs mx"),
        ("[[provider]]\nname = 'a'\nmx = []\n", 3, "needs mx"),
        ("[[provider]]\nname = 'a'\nmx = ['x y']\n", 3, "'x y'"),
        ("[[provider]]\nname = 'a'\nmx = [3]\n", 3, "3 is not"),
        (
            "[[provider]]\nname = 'a'\nmx = ['m.test']\n"
            "[[provider]]\nname = 'a'\nmx = ['n.test']\n",
            5, "is there twice",
        ),
        (
            "[[provider]]\nname = 'a'\nmx = ['m.test']\n"
            "[[provider]]\nname = 'b'\nmx = ['M.test.']\n",
            6, "belongs to provider 'a'",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_with_its_line(text: str, line: int, words: str) -> None:
    ((where, said),) = mistakes(text)
    assert where == f"limits.toml:{line}"
    assert words in said


def test_all_mistakes_are_said() -> None:
    text = "[[limit]]\nmax-idle = -5\nfoo = 1\n[[limit]]\nlocal-ip = 'x'\nmax-idle = 'y'\n"
    assert sorted(where for where, _ in mistakes(text)) == [
        f"limits.toml:{line}" for line in (2, 3, 5, 6)
    ]


def test_a_file_that_is_not_text_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"limits.toml:2: is not UTF-8"):
        Shaping.parse(b"[[limit]]\nmax-idle = \xff\n", "limits.toml", CONFIG)


def test_a_file_that_cannot_be_read_is_named_with_its_setting(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=f"limits-file: cannot read {missing}: No such file"):
        Shaping.of(Config(limits_file=str(missing)))


def test_a_file_of_more_than_a_megabyte_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        Shaping.of(Config(limits_file=str(path)))


# Hours.


def hours_of(bounds: Bounds) -> str:
    hours = bounds["hours"].hours if "hours" in bounds else None
    return "" if hours is None else f"{hours.text} {hours.zone}"


def test_hours_override_each_other_like_limits() -> None:
    shaping = read(
        "[[provider]]\nname = 'p'\nmx = ['p.test']\n"
        "[[limit]]\nhours = '08:00-20:00'\n"
        "[[limit]]\ndomain = '*.test'\nhours = '09:00-20:00'\ntimezone = 'Europe/Amsterdam'\n"
        "[[limit]]\ndomain = 'any.test'\nhours = 0\n"
        "[[limit]]\ndomain = 'back.test'\nhours = '10:00-20:00'\n"
        "[[limit]]\ndomain = 'back.test'\nhours = -1\n"
        "[[limit]]\nprovider = 'p'\nlocal-ip = '192.0.2.1'\nhours = 'mon 11:00-20:00'\n"
    )
    assert hours_of(shaping.of_site("", "")) == "08:00-20:00 UTC"
    assert hours_of(shaping.of_site("a.test", "")) == "09:00-20:00 Europe/Amsterdam"
    assert hours_of(shaping.of_site("any.test", "")) == ""
    assert hours_of(shaping.of_site("back.test", "")) == "09:00-20:00 Europe/Amsterdam"
    assert hours_of(shaping.of_provider("p", "")) == ""
    assert hours_of(shaping.of_provider("p", "192.0.2.1")) == "mon 11:00-20:00 UTC"
    assert len(shaping.hours) == 4


@pytest.mark.parametrize(
    ("line", "where", "said"),
    [
        ("hours = 'mon-fry 08:00-20:00'", 2, "hours: 'fry' is not a day; they are mon, tue"),
        ("hours = 8", 2, "hours: 8 is not written as mon-fri 08:00-20:00"),
        ("hours = true", 2, "hours: True is not written as mon-fri 08:00-20:00"),
        ("hours = false", 2, "hours: False is not written as mon-fri 08:00-20:00"),
        ("hours = ['08:00-20:00']", 2, "is not written as mon-fri 08:00-20:00"),
        (
            "hours = '08:00-20:00'\ntimezone = 'Europe/Nowhere'", 3,
            "timezone: 'Europe/Nowhere' is no time zone of this host",
        ),
        ("hours = '08:00-20:00'\ntimezone = 1", 3, "timezone: 1 is not a text"),
        ("max-idle = 1\ntimezone = 'UTC'", 3, "timezone: this [[limit]] has no hours"),
        ("remote-ip = '*'\nhours = '08:00-20:00'", 3, "hours cannot be set for a remote-ip"),
    ],
)  # fmt: skip
def test_mistakes_in_hours_have_their_line(line: str, where: int, said: str) -> None:
    ((place, text),) = mistakes(f"[[limit]]\n{line}\n")
    assert place == f"limits.toml:{where}"
    assert said in text


SECURITY = """
[[provider]]
name = "big"
mx = "big.test"
[[limit]]
secure = "required"
[[limit]]
provider = "big"
secure = "verified"
[[limit]]
domain = "*.old.test"
secure = false
[[limit]]
domain = "a.old.test"
secure = -1
ignore-policies = true
"""


@pytest.mark.parametrize(
    ("group", "provider", "level", "line"),
    [
        ("", "", Level.REQUIRED, 6),
        ("", "big", Level.VERIFIED, 9),
        ("*.old.test", "big", Level.NONE, 12),
        ("a.old.test", "", Level.NONE, 12),
    ],
)
def test_the_most_exact_line_says_how_secure_connections_are(
    group: str, provider: str, level: Level, line: int
) -> None:
    shaping = read(SECURITY)
    assert shaping.secure(group, provider, "")[:2] == (level, f"limits.toml:{line}")
    assert shaping.ignores_policies(group) is (group == "a.old.test")


def test_the_setting_says_how_secure_connections_are_without_a_line() -> None:
    shaping = Shaping.of(CONFIG.replace(connection_secure="verified"))
    assert shaping.secure("", "", "")[:2] == (Level.VERIFIED, "connection-secure")
    assert Shaping.of(CONFIG.replace(connection_secure="none")).secure("", "", "").value == 0
