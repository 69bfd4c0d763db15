"""Mailboxes, paths, domains and literals: what passes, in which form, and what never does."""

import ipaddress
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.address import (
    Mailbox,
    host_port,
    parse_domain,
    parse_host,
    parse_literal,
    parse_lmtp,
    parse_mailbox,
    parse_path,
    split_host_port,
)
from mailerq.errors import AddressError

ATEXT = string.ascii_letters + string.digits + "!#$%&'*+/=?^_`{|}~-"
LETTERS_AND_DIGITS = string.ascii_letters + string.digits

atoms = st.lists(st.text(ATEXT, min_size=1, max_size=12), min_size=1, max_size=4).map(".".join)
quoted = st.lists(
    st.sampled_from([*map(chr, range(32, 127))]).map(lambda c: "\\" + c if c in '"\\' else c),
    max_size=15,
).map(lambda chars: f'"{"".join(chars)}"')
labels = st.builds(
    lambda first, middle, last: first + middle + last,
    st.sampled_from(LETTERS_AND_DIGITS),
    st.text(LETTERS_AND_DIGITS + "-", max_size=20),
    st.sampled_from(LETTERS_AND_DIGITS),
)
names = st.builds(
    lambda front, last: ".".join([*front, last]),
    st.lists(labels, max_size=4),
    labels.filter(lambda label: not label.isdigit()),
)
literals = st.ip_addresses().map(lambda ip: f"[{'IPv6:' if ip.version == 6 else ''}{ip}]")

LONGEST_NAME = ".".join(["d" * 63] * 3 + ["e" * 61])

# -- mailboxes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "ann@example.test",
        "a@b",
        "first.last+tag@sub.example.test",
        "!#$%&'*+/=?^_`{|}~-@example.test",
        "0@0.test",
        "ann@xn--bcher-kva.example",
        '""@example.test',
        '"ann smith"@example.test',
        r'"a\"b\\c"@example.test',
        '"a@b"@example.test',
        '"<>:;,()[]"@example.test',
        "ann@[192.0.2.1]",
        "ann@[IPv6:2001:db8::1]",
        "l" * 64 + "@example.test",
        "a@" + "d" * 63 + ".test",
        "a@" + LONGEST_NAME[-252:].lstrip("."),
    ],
)
def test_a_mailbox_of_rfc_5321_passes_as_it_is(text: str) -> None:
    assert str(parse_mailbox(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "ann",
        "ann@",
        "@example.test",
        "ann@@example.test",
        "a@b@example.test",
        ".ann@example.test",
        "ann.@example.test",
        "a..b@example.test",
        "ann smith@example.test",
        "ann@exa mple.test",
        "ann@example.test.",
        "ann@.example.test",
        "ann@example..test",
        "ann@-example.test",
        "ann@example-.test",
        "ann@example-",
        "ann@exa_mple.test",
        "ann@192.0.2.1",
        "ann@example.1",
        "<ann@example.test>",
        "Ann <ann@example.test>",
        "ann@example.test>",
        "a,b@example.test",
        "a:b@example.test",
        "(c)ann@example.test",
        '"ann@example.test',
        'ann"@example.test',
        '"a"b@example.test',
        '"a"b"@example.test',
        '"a\\"@example.test',
        'a"b"@example.test',
        "ann@[192.0.2.256]",
        "ann@[192.0.2]",
        "ann@[192.0.2.1",
        "ann@192.0.2.1]",
        "ann@[::1]",
        "ann@[IPv6:::1%eth0]",
        "ann@[IPv6:192.0.2.1]",
        "ann@[x400:c=nl]",
        "ann@[]",
        "l" * 65 + "@example.test",
        '"' + "l" * 63 + '"@example.test',
        "ü" * 33 + "@example.test",
        "a@" + "d" * 64 + ".test",
        "a@" + LONGEST_NAME,
        "a@" + "d." * 1_000_000,
        "@relay.test:ann@example.test",
    ],
)
def test_what_breaks_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_mailbox(text)


@pytest.mark.parametrize("place", ["{}ann@b.test", "a{}n@b.test", "ann{}@b.test", "ann@b.{}test"])
@pytest.mark.parametrize("form", ["{}", '"{}"@b.test', '"\\{}"@b.test', "ann@b.test{}"])
@pytest.mark.parametrize(
    "char", ["\r", "\n", "\r\n", "\0", "\x1b", "\t", "\x7f", "\x85", "\x9b", "\u2028", "\udcff"]
)
def test_control_characters_are_refused_wherever_they_stand(
    place: str, form: str, char: str
) -> None:
    text = form.format(place.format(char))
    with pytest.raises(AddressError) as caught:
        parse_mailbox(text)
    assert str(caught.value).isprintable()
    with pytest.raises(AddressError):
        parse_path(f"<{text}>", postmaster=True, null=True)
    with pytest.raises(AddressError):
        parse_domain(place.format(char).rpartition("@")[2] + char)


def test_the_case_of_a_domain_means_nothing_and_that_of_a_local_part_is_kept() -> None:
    assert parse_mailbox("Ann@Example.TEST") == Mailbox("Ann", "example.test")


def test_a_mailbox_with_other_characters_passes_unless_ascii_is_asked_for() -> None:
    mailbox = parse_mailbox("jürgen@bücher.example")
    assert mailbox == Mailbox("jürgen", "xn--bcher-kva.example")
    assert parse_mailbox('"jürgen k"@example.test').local == '"jürgen k"'
    for text in ("jürgen@example.test", "ann@bücher.example", '"jürgen"@example.test'):
        with pytest.raises(AddressError, match="not ASCII"):
            parse_mailbox(text, utf8=False)


def test_literals_come_back_in_one_form() -> None:
    mailbox = parse_mailbox("ann@[ipv6:2001:DB8:0::1]")
    assert mailbox.domain == "[IPv6:2001:db8::1]"


@pytest.mark.parametrize(
    ("text", "routed"),
    [
        ("ann@example.test", False),
        ('"ann smith"@example.test', False),
        ("ann%other.test@example.test", True),
        ("other.test!ann@example.test", True),
        ('"ann@other.test"@example.test', True),
    ],
)
def test_a_local_part_that_may_hold_a_second_address_says_so(text: str, routed: bool) -> None:
    assert parse_mailbox(text).routed is routed


@given(st.one_of(atoms, quoted).filter(lambda local: len(local) <= 64), names | literals)
def test_every_mailbox_of_the_grammar_passes(local: str, domain: str) -> None:
    mailbox = parse_mailbox(f"{local}@{domain}")
    assert mailbox.local == local
    assert mailbox.domain.lower() == domain.lower()


@given(st.text() | st.text('@."\\[]:%a1-\u3002\uff0eüß').map(lambda text: "a@" + text))
@example("a@ß.test")
@example("a@\u200d")
@example("a@１.２.３.４")
@example("a@xn--a.ü")
def test_any_text_is_refused_or_comes_back_the_same_after_a_second_reading(text: str) -> None:
    try:
        mailbox = parse_mailbox(text)
    except AddressError:
        return
    assert parse_mailbox(str(mailbox)) == mailbox
    assert mailbox.domain.isascii()
    assert mailbox.domain == mailbox.domain.lower() or mailbox.domain.startswith("[")
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in str(mailbox))


# -- paths --------------------------------------------------------------------------------


def test_a_path_comes_back_as_it_is_written_without_its_brackets() -> None:
    assert parse_path("<Ann@Example.Test>") == "Ann@Example.Test"


@pytest.mark.parametrize("text", ["", "<", ">", "ann@example.test", "<ann@example.test", "<a>b>"])
def test_a_path_without_both_brackets_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_path(text)


def test_the_null_path_passes_only_where_a_sender_stands() -> None:
    assert parse_path("<>", null=True) == ""
    with pytest.raises(AddressError):
        parse_path("<>", postmaster=True)


def test_postmaster_needs_no_domain_where_a_recipient_stands() -> None:
    assert parse_path("<PostMaster>", postmaster=True) == "PostMaster"
    for text in ("<postmaster>", "<ann>"):
        with pytest.raises(AddressError):
            parse_path(text, null=True)


def test_a_source_route_is_dropped_or_refused() -> None:
    assert parse_path("<@a.test:ann@example.test>") == "ann@example.test"
    assert parse_path("<@a.test,@b.test:ann@example.test>") == "ann@example.test"
    with pytest.raises(AddressError):
        parse_path("<@a.test:ann@example.test>", routes=False)


@pytest.mark.parametrize(
    "route",
    [
        "@a.test ann@example.test",
        "@:ann@example.test",
        "@a.test,:ann@example.test",
        "@a.test,b.test:ann@example.test",
        "@a_b:ann@example.test",
        "@a.test:@b.test:ann@example.test",
        "@a.test:",
        "@a.test:postmaster",
        "@a.test,@" * 200 + "b.test:ann@example.test",
    ],
)
def test_a_broken_source_route_is_refused(route: str) -> None:
    with pytest.raises(AddressError):
        parse_path(f"<{route}>", null=True, postmaster=True)


# -- domains, literals, hosts -------------------------------------------------------------


def test_a_domain_comes_back_in_lower_case_and_a_labels() -> None:
    assert parse_domain("Example.TEST") == "example.test"
    assert parse_domain("BÜCHER.Example") == "xn--bcher-kva.example"
    assert parse_domain("faß.example") == "xn--fa-hia.example"
    assert parse_domain(LONGEST_NAME) == LONGEST_NAME


@pytest.mark.parametrize(
    "text",
    [
        *["", ".", "a.", ".a", "a..b", "-a", "a-", "a_b", "a b", "a@b", "[192.0.2.1]", "192.0.2.1"],
        *["127.0.0.１", "ａ＠ｂ.test", "a．．b", "ü" * 300, "ü" * 60 + ".test", LONGEST_NAME + "e"],
        *["\u2488.test", "a\u3002"],
    ],
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_domain(text)


@given(names)
def test_every_name_of_letters_digits_and_hyphens_passes(name: str) -> None:
    assert parse_domain(name) == name.lower()


@given(st.ip_addresses())
def test_every_address_passes_as_a_literal_and_as_a_host(ip: ipaddress.IPv4Address) -> None:
    tag = "IPv6:" if ip.version == 6 else ""
    assert parse_literal(f"[{tag}{ip}]") == ip
    for host in (str(ip), f"[{ip}]", f"[{tag}{ip}]"):
        assert parse_host(host) == ip


def test_a_host_may_be_a_domain() -> None:
    assert parse_host("Mail.Example.test") == "mail.example.test"


@pytest.mark.parametrize("text", ["", "[]", "[mail.test]", "fe80::1%eth0", "a b", "192.0.2.256"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_host(text)


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(0, 65535))
def test_an_address_with_its_port_can_be_split_again(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    text = host_port(str(address), port)
    assert split_host_port(text) == (str(address), port)
    assert text.startswith("[") == (address.version == 6)


@pytest.mark.parametrize("text", ["", "mx.test", "mx.test:", "[::1]:x", "1:65536", "1:-1"])
def test_text_without_a_port_is_not_split(text: str) -> None:
    with pytest.raises(AddressError, match="not of the form HOST:PORT"):
        split_host_port(text)


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("lmtp://mailbox.test", ("mailbox.test", 24)),
        ("LMTP://Mailbox.Test:2424", ("mailbox.test", 2424)),
        ("lmtp://127.0.0.1:24", ("127.0.0.1", 24)),
        ("lmtp://[2001:db8::1]:2424", ("2001:db8::1", 2424)),
        ("lmtp:///run/dovecot/lmtp", ("/run/dovecot/lmtp", 0)),
    ],
)
def test_an_lmtp_server_has_a_uri(uri: str, found: tuple[str, int]) -> None:
    assert parse_lmtp(uri) == found


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "mailbox.test",
        "smtp://mailbox.test",
        "lmtp:mailbox.test",
        "lmtp:/run/lmtp",
        "lmtp://",
        "lmtp://mailbox.test:",
        "lmtp://mailbox.test:0",
        "lmtp://mailbox.test:65536",
        "lmtp://mailbox.test:9999999999",
        "lmtp://mailbox.test:\u0662",
        "lmtp://user@mailbox.test",
        "lmtp://mailbox.test/path",
        "lmtp://[::1",
        "lmtp:///" + "x" * 200,
    ],
)
def test_what_is_no_uri_of_an_lmtp_server_is_refused(uri: str) -> None:
    with pytest.raises(AddressError):
        parse_lmtp(uri)


@given(st.text(max_size=40))
def test_any_text_is_a_uri_of_an_lmtp_server_or_refused(text: str) -> None:
    for uri in (text, f"lmtp://{text}"):
        try:
            host, port = parse_lmtp(uri)
        except AddressError:
            continue
        assert host.startswith("/") is (port == 0)
