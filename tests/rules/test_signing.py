"""Which keys sign: the lines of a `dkim-file`, keys of messages, and From domains."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.errors import AddressError, ConfigError, MessageError
from mailerq.mail.dkim import HeaderFields
from mailerq.rules.signing import (
    MAX_KEYS,
    Pattern,
    SigningFile,
    from_domain,
    keys_of_message,
    no_key_in_force,
    parse_selector,
    sources,
)

PATH = "/etc/dkim.toml"


def parse(text: str, **options: Any) -> SigningFile:
    return SigningFile.parse(text.encode(), PATH, **options)


def mistakes(text: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, **options)
    return [str(problem) for problem in caught.value.problems]


def names(
    text: str, domain: str, directory: dict[str, list[str]] | None = None
) -> list[tuple[str, str, str]]:
    """Domain, selector and file of the keys that sign for a From domain."""
    found = sources(
        parse(text),
        domain,
        "" if directory is None else "/keys",
        lambda name: (directory or {}).get(name, []),
    )
    return [(each.domain, each.selector, each.path) for each in found]


KEY = '[[key]]\ndomain = "Example.com"\nselector = "S1"\nfile = "s1.pem"\n'


def test_a_key_signs_for_its_domain_alone_and_its_file_is_beside_the_list() -> None:
    key = ("example.com", "s1", "/etc/s1.pem")
    assert names(KEY, "example.com") == [key]
    assert names(KEY, "news.example.com") == names(KEY, "xexample.com") == []
    assert names(KEY + "subdomains = true\n", "a.b.example.com") == [key]
    assert names(KEY + "subdomains = true\n", "example.com") == [key]
    assert names(KEY + 'from = "*"\n', "other.test") == [key]
    assert names(KEY + 'from = ["*.test", "a.org"]\n', "x.test") == [key]
    assert names(KEY + 'from = ["*.test", "a.org"]\n', "example.com") == []


def test_keys_of_the_directory_sign_for_their_domain_and_lines_change_that() -> None:
    directory = {"example.com": ["s1", "S2"], "other.test": ["s9"]}
    both = [("example.com", "s1", "/keys/example.com/s1.pem")]
    both.append(("example.com", "s2", "/keys/example.com/S2.pem"))
    assert names("", "example.com", directory) == both
    assert names("", "news.example.com", directory) == []
    line = '[[key]]\ndomain = "example.com"\n'
    assert names(line + "subdomains = true", "news.example.com", directory) == both
    chosen = line + 'selector = "s1"\nfrom = "*"\n'
    assert names(chosen, "other.test", directory) == [
        ("example.com", "s1", "/keys/example.com/s1.pem"),
        ("other.test", "s9", "/keys/other.test/s9.pem"),
    ]


def test_a_key_has_the_options_of_the_first_line_that_names_the_key() -> None:
    text = (
        '[[key]]\ndomain = "a.test"\nselector = "s"\npriority = 1\n'
        '[[key]]\ndomain = "a.test"\nreport = true\n'
    )
    found = sources(parse(text), "a.test", "/keys", lambda name: ["r", "s"])
    options = {each.selector: (each.options.priority, each.options.report) for each in found}
    assert options == {"s": (1, False), "r": (0, True)}


def test_all_options_are_read() -> None:
    text = KEY + (
        'headers = ["X-Own", "x-own"]\nexpire = "7d"\nnot-before = 2026-01-01\n'
        'not-after = 2027-01-01T00:00:00+01:00\ncanonicalization = "Relaxed/Relaxed"\n'
        'report = true\nprotocols = ["dkim", "arc"]\npriority = -3\n'
    )
    (line,) = parse(text).lines
    options = line.options
    assert options.extra == (b"x-own",) and options.lifetime == 7 * 86400
    first = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()
    last = datetime.datetime(2026, 12, 31, 23, tzinfo=datetime.UTC).timestamp()
    assert (options.not_before, options.not_after) == (first, last)
    assert (options.relaxed_header, options.relaxed_body) == (True, True)
    assert options.report and options.priority == -3
    assert options.protocols == {"dkim", "arc"}
    assert line.where == f"{PATH}:1"
    for now, expected in ((first - 1, False), (first, True), (last - 1, True), (last, False)):
        assert options.is_in_force(now) is expected


def without_a_key(text: str, domain: str, directory: dict[str, list[str]]) -> str:
    """What is wrong with a From domain if no key of these is in force."""
    file = parse(text)
    found = sources(file, domain, "/keys", lambda name: directory.get(name, []))
    return no_key_in_force(file, domain, "/keys", found, has_directory=domain in directory)


def test_a_domain_without_a_place_for_keys_may_go_unsigned() -> None:
    arc = '[[key]]\ndomain = "a.test"\nselector = "arc"\nfrom = "*"\nprotocols = "arc"\n'
    assert without_a_key("", "b.test", {"a.test": ["s"]}) == ""
    assert without_a_key(arc, "b.test", {}) == "", "a key for ARC is no key that is missing"
    assert without_a_key(arc, "a.test", {"a.test": ["arc"]}) == ""
    # A key has the options of the first line that names the key.
    again = '[[key]]\ndomain = "a.test"\nselector = "arc"\nfrom = "b.test"\n'
    assert without_a_key(arc + again, "b.test", {}) == ""


def test_a_place_without_a_key_is_named_with_what_to_do() -> None:
    said = without_a_key("", "a.test", {"a.test": []})
    assert "there is no key in /keys/a.test." in said
    assert "'mailerq dkim new a.test SELECTOR', or remove the directory" in said
    line = '[[key]]\ndomain = "a.test"\nsubdomains = true\n'
    said = without_a_key(line, "x.a.test", {})
    assert "there is no key in /keys/a.test." in said
    assert f"'mailerq dkim new a.test SELECTOR', or remove {PATH}:1 if" in said
    assert without_a_key(line, "b.test", {}) == ""


def test_keys_that_are_not_in_force_are_named() -> None:
    line = '[[key]]\ndomain = "a.test"\nnot-after = 2020-01-01\n'
    said = without_a_key(line, "a.test", {"a.test": ["s1", "s2", "s3", "s4", "s5"]})
    paths = ", ".join(f"/keys/a.test/s{number}.pem" for number in (1, 2, 3))
    assert f"no key is in force now: {paths} and 2 more. Change" in said
    assert f"Change not-before or not-after in {PATH}:1, or name a new key there" in said


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("[[key]]\n", "a [[key]] needs a domain"),
        ('[[key]]\ndomain = "a b"\n', ":2: domain: 'a b' is not a domain"),
        ('[[key]]\ndomain = "a.test"\nfile = "x"\n', "needs a selector"),
        (KEY + 'selektor = "x"\n', "did you mean selector?"),
        (KEY.replace("S1", "a..b"), "'a..b' is not a selector"),
        (KEY + 'from = "*.*.test"\n', "is not a domain with one *"),
        (KEY + "from = []\n", "names no domain, so the key never signs"),
        (KEY + 'headers = ["Received"]\n', "Received is never signed"),
        (KEY + 'headers = ["a b"]\n', "'a b' is not the name of a header field"),
        (KEY + 'headers = ["a:"]\n', "is not the name of a header field"),
        (KEY + 'expire = "soon"\n', "'soon' is not a time such as"),
        (KEY + "expire = -1\n", "is not a time such as"),
        (KEY + 'not-before = "x"\n', "is not a date such as"),
        (KEY + "not-before = 2027-01-01\nnot-after = 2026-01-01\n", "is not later than"),
        (KEY + 'canonicalization = "nowsp"\n', "'nowsp' is not one of"),
        (KEY + 'protocols = ["dmarc"]\n', "'dmarc' is not one of dkim, arc"),
        (KEY + 'report = "yes"\n', "is not true or false"),
        (KEY + "priority = 1.5\n", "is not a whole number"),
        (KEY + KEY, "the same key is there twice, first at /etc/dkim.toml:1"),
        ("key = 1\n", "must be written [[key]]"),
        ("[[keys]]\n", "unknown table"),
        ("[[key]\n", ":1: "),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, mistake: str) -> None:
    found = mistakes(text)
    assert any(mistake in problem for problem in found), found
    assert all(problem.startswith(f"{PATH}:") for problem in found)


def test_a_line_without_a_file_needs_a_directory() -> None:
    text = '[[key]]\ndomain = "a.test"\n'
    assert parse(text, has_directory=True).lines
    assert "needs a file while dkim-directory is not set" in mistakes(text, has_directory=False)[0]


@pytest.mark.parametrize("text", ["*.b.test", "a*.test", "mail-*.b.test", "*"])
def test_a_star_stands_for_any_text(text: str) -> None:
    domain = text.replace("*", "x.y")
    assert Pattern.of(text).matches(domain)
    assert not Pattern.of(text).matches(text.replace("*", ""))


@pytest.mark.parametrize("text", ["", "a b", "*.*", "x@y", "[192.0.2.1]", "a/b", ".."])
def test_what_is_no_domain_is_no_pattern(text: str) -> None:
    with pytest.raises(AddressError):
        Pattern.of(text)


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        ("a@Example.COM", "example.com"),
        ("Ann <a@b.test>, x@y.test", "b.test"),
        ('"a@evil.test" <a@b.test>', "b.test"),
        ("(a@evil.test) a@b.test", "b.test"),
        ("Ann\r\n <a@b\r\n .test>", "b.test"),
        ("a@B\u00fccher.example", "xn--bcher-kva.example"),
        ("no address", ""),
        ("a@../../etc", ""),
        ("a@b/c", ""),
        ("a@[192.0.2.1]", ""),
        ("<a@b.test", ""),
        ("", ""),
        ("team: a@b.test;", "b.test"),
    ],
)
def test_the_from_domain(value: str, domain: str) -> None:
    assert from_domain(HeaderFields(f"From: {value}\r\n\r\n".encode())) == domain


def test_the_first_from_counts() -> None:
    mail = b"From: a@one.test\r\nFrom: a@two.test\r\n\r\n"
    assert from_domain(HeaderFields(mail)) == "one.test"
    assert from_domain(HeaderFields(b"To: a@b.test\r\n\r\n")) == ""


@given(st.binary(max_size=300))
def test_any_from_field_has_a_domain_that_is_a_file_name_or_none(value: bytes) -> None:
    domain = from_domain(HeaderFields(b"From: " + value + b"\r\n\r\n"))
    assert "/" not in domain and not domain.startswith(".") and "\0" not in domain


@pytest.mark.parametrize("text", ["s1", "a-b", "a_b", "2026.mail", "S1"])
def test_selectors(text: str) -> None:
    assert parse_selector(text) == text.lower()


@pytest.mark.parametrize("text", ["", ".", "a.", "-a", "a b", "a;b", "a\n", "..", "a/b", "x" * 64])
def test_what_is_no_selector(text: str) -> None:
    with pytest.raises(AddressError):
        parse_selector(text)


OBJECT = {"domain": "a.test", "selector": "s", "key": "pem"}


def test_keys_of_messages() -> None:
    assert keys_of_message(None) == []
    (key,) = keys_of_message({**OBJECT, "expire": "2027-01-01 00:00:00", "protocols": "arc"})
    assert (key.name, key.pem, key.options.until) == ("s._domainkey.a.test", "pem", 1798761600.0)
    assert key.options.protocols == {"arc"}
    assert len(keys_of_message([OBJECT, OBJECT])) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"domain": None}, {"selector": 1}, {"key": ""}, {"key": "x" * 20_000}, {"expire": "soon"},
        {"expire": -1}, {"expire": True}, {"headers": [1]}, {"headers": ["x"] * 101},
        {"report": "yes"}, {"protocols": ["x"]}, {"priority": "1"}, {"canonicalization": "x"},
        {"canonicalization": 1},
    ],
)  # fmt: skip
def test_a_key_of_a_message_with_a_mistake_is_named(more: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match="property dkim: "):
        keys_of_message({**OBJECT, **more})
    with pytest.raises(MessageError, match="property dkim: "):
        keys_of_message([OBJECT] * (MAX_KEYS + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["domain", "selector", "key", "headers", "expire", "protocols"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_property_is_read_or_refused(value: Any) -> None:
    try:
        for key in keys_of_message(value):
            assert key.domain and key.selector and key.pem
    except MessageError:
        pass
