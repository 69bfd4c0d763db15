"""Variable return addresses: what is written is read, and nothing else is believed."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.address import parse_mailbox
from mailerq.errors import AddressError
from mailerq.mail import verp
from mailerq.mail.verp import Problem, Return

NOW = 1_750_000_000.0
DAY = 86400.0
KEYS = verp.parse_keys("b n0mZVt0L4HcbOCzoUXHOZyTF\na AeJ2xBrJJPd1vlTV7pVf3OlB")
MONTH = 30 * DAY

LOCALS = st.one_of(
    st.from_regex(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]{1,8}(\.[a-z+=]{1,4})?", fullmatch=True),
    st.from_regex(r'"([ !#-\[\]-~]|\\[ -~]){0,6}"', fullmatch=True),
    st.sampled_from(["ünï", "é+é", '".."', '"a@b"', "x+aaaaaaaaaaaaaaaaaaaa-y"]),
)
DOMAINS = st.sampled_from(["example.org", "xn--bcher-kva.example", "[192.0.2.1]", "[IPv6:::1]"])


def returned(address: str, now: float = NOW, max_age: float = MONTH) -> Return:
    found = verp.verify(address, KEYS, now=now, max_age=max_age)
    assert isinstance(found, Return), found
    return found


def test_an_address_names_its_recipient() -> None:
    address = verp.encode("news@list.test", "Ann.Lee+x@Example.org", KEYS, now=NOW)
    assert address is not None
    assert address.startswith("news+b")
    assert address.endswith("-Ann.Lee+2Bx=example.org@list.test")
    parse_mailbox(address)
    found = returned(address)
    assert found == Return("news@list.test", "Ann.Lee+x@example.org", "", "", NOW // DAY * DAY)


def test_a_recipient_that_is_too_long_gives_place_to_the_id_of_the_message() -> None:
    long = "a-rather-long-name-of-a-mailbox@department.company.example"
    identifier = "0" * 32
    address = verp.encode("bounce@list.test", long, KEYS, now=NOW, message_id=identifier)
    assert address is not None
    assert address.endswith(f"={identifier}@list.test")
    assert returned(address)[1:4] == ("", identifier, "")


@pytest.mark.parametrize("identifier", ["0" * 60, "With-Capitals", "a b", "é", "a..b", ".a"])
def test_an_id_that_does_not_fit_becomes_a_digest(identifier: str) -> None:
    long = "a-rather-long-name-of-a-mailbox@department.company.example"
    address = verp.encode("bounce@list.test", long, KEYS, now=NOW, message_id=identifier)
    assert address is not None
    parse_mailbox(address)
    assert returned(address)[1:4] == ("", "", verp.digest(identifier))
    assert verp.digest(identifier) != verp.digest(identifier + "x")


def test_an_address_without_room_gets_no_token() -> None:
    assert verp.encode("a" * 60 + "@b.test", "c@d.test", KEYS, now=NOW, message_id="1") is None
    assert verp.encode("a@b.test", "c" * 50 + "@d.test", KEYS, now=NOW) is None
    wide = "b." * 115 + "test"
    assert verp.encode(f"a@{wide}", "c@d.test", KEYS, now=NOW) is None


@pytest.mark.parametrize("base", ["", "postmaster", '"a b"@c.test', "@c.test"])
def test_only_plain_addresses_get_a_token(base: str) -> None:
    assert verp.encode(base, "ann@d.test", KEYS, now=NOW) is None


def test_an_address_with_a_token_gets_no_second_one() -> None:
    once = verp.encode("n@l.test", "a@b.test", KEYS, now=NOW)
    assert once is not None
    assert verp.encode(once, "a@b.test", KEYS, now=NOW) is None


@given(LOCALS, DOMAINS, st.sampled_from(["n", "news", "a+b", "é", "x.y"]))
@example("+", "example.org", "n")
@example('"', "example.org", "n")
def test_what_is_written_is_read_in_any_case(local: str, domain: str, base: str) -> None:
    recipient = f"{local}@{domain}"
    try:
        mailbox = parse_mailbox(recipient)
    except AddressError:
        return
    address = verp.encode(f"{base}@l.test", recipient, KEYS, now=NOW, message_id="M1")
    assert address is not None
    parse_mailbox(address)
    assert len(address.split("@")[0].encode()) <= 64
    found = returned(address)
    assert found.base == f"{base}@l.test"
    assert found.recipient == str(mailbox) or found.digest == verp.digest("M1")
    lower = returned(address.lower())
    assert lower.recipient.lower() == found.recipient.lower()
    assert returned(address.upper()).issued == found.issued


def test_any_change_is_a_forgery() -> None:
    address = verp.encode("news@list.test", "ann@example.org", KEYS, now=NOW)
    assert address is not None
    for place, old in enumerate(address):
        for new in "bcd2.":
            if new == old.lower():
                continue
            changed = address[:place] + new + address[place + 1 :]
            found = verp.verify(changed, KEYS, now=NOW, max_age=MONTH)
            assert found is None or found is Problem.FORGED, changed


@given(st.text(max_size=80))
@example("n+" + "a" * 20 + "-@x")
@example("n+" + "a" * 20 + "-" + "+zz=" * 9 + "@x")
@example("n+A" + "7" * 19 + "=é@x")
def test_any_text_is_answered(text: str) -> None:
    for address in (text, f"{text}@x.test", f"n+b{'a' * 19}-{text}@x.test"):
        assert not isinstance(verp.verify(address, KEYS, now=NOW, max_age=MONTH), Return)


def test_a_token_expires() -> None:
    address = verp.encode("news@list.test", "ann@example.org", KEYS, now=NOW)
    assert address is not None
    returned(address, NOW + 30 * DAY)
    assert verp.verify(address, KEYS, now=NOW + 31 * DAY, max_age=MONTH) is Problem.EXPIRED
    returned(address, NOW + DAY, max_age=0)
    assert verp.verify(address, KEYS, now=NOW + 2 * DAY, max_age=0) is Problem.EXPIRED


def test_a_server_whose_clock_is_ahead_is_believed() -> None:
    address = verp.encode("news@list.test", "ann@example.org", KEYS, now=NOW + 2 * DAY)
    assert address is not None
    assert returned(address).issued == NOW // DAY * DAY + 2 * DAY
    assert verp.verify(address, KEYS, now=NOW - DAY, max_age=MONTH) is Problem.EXPIRED


def test_the_days_may_start_again() -> None:
    then = 32767 * DAY + 5
    address = verp.encode("news@list.test", "ann@example.org", KEYS, now=then)
    assert address is not None
    assert returned(address, then + 3 * DAY).issued == 32767 * DAY


def test_keys_rotate() -> None:
    new, old = KEYS
    address = verp.encode("news@list.test", "ann@example.org", [old], now=NOW)
    assert address is not None
    assert returned(address).recipient == "ann@example.org"
    assert verp.verify(address, [new], now=NOW, max_age=MONTH) is Problem.FORGED
    impostor = verp.Key(old.id, b"another secret of some length")
    assert verp.verify(address, [impostor], now=NOW, max_age=MONTH) is Problem.FORGED


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        ("a\n", "line 1: expected an id and a secret"),
        ("a b c\n", "line 1: expected an id and a secret"),
        ("A " + "x" * 30, "line 1: an id is one of a to z and 2 to 7"),
        ("1 " + "x" * 30, "line 1: an id is one of a to z and 2 to 7"),
        ("\na short", "line 2: the secret has fewer than 20 characters"),
        ("a " + "x" * 30 + "\na " + "y" * 30, "line 2: the id a stands there twice"),
    ],
)
def test_a_mistake_in_a_key_file_is_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        verp.parse_keys(text)


def test_a_key_does_not_show_its_secret() -> None:
    assert "n0mZ" not in repr(KEYS)
