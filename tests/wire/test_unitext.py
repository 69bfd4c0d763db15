"""International addresses in ORCPT (RFC 6533, section 3): their forms, on the wire and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailerq.wire import unitext
from mailerq.wire.client import ClientProtocol
from mailerq.wire.parameters import (
    ORCPT_LIMIT,
    ParameterError,
    RcptParameters,
    dsn_parameters,
)

PLAIN = st.text(
    st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" +=\\{}xö"),
    min_size=1,
    max_size=40,
).filter(str.isprintable)
"""Any text; addresses are among these."""


def parse(orcpt: str, *, utf8: bool) -> str | None:
    return RcptParameters.parse(f"ORCPT={orcpt}", ("ORCPT",), utf8=utf8).orcpt


def sent(orcpt: str, *, utf8: bool) -> str:
    return dsn_parameters({"orcpt": orcpt}, utf8=utf8)[1].removeprefix(" ORCPT=")


@given(PLAIN)
def test_every_address_comes_back_from_both_encodings(address: str) -> None:
    for ascii in (False, True):
        quoted = unitext.quote(address, ascii=ascii)
        assert unitext.unquote(quoted) == address
        assert quoted.isascii() or not ascii
        assert {" ", "+", "="}.isdisjoint(quoted)


@given(PLAIN, st.booleans(), st.booleans())
def test_what_a_client_gives_goes_on_in_a_form_that_we_would_take(
    address: str, came_in_utf8: bool, goes_in_utf8: bool
) -> None:
    given = f"utf-8;{unitext.quote(address, ascii=not came_in_utf8)}"
    found = parse(given, utf8=came_in_utf8)
    assert found == given
    onward = sent(found, utf8=goes_in_utf8)
    assert parse(onward, utf8=goes_in_utf8) == onward
    assert unitext.unquote(onward.partition(";")[2]) == address
    if goes_in_utf8 or not came_in_utf8:
        assert onward == given


@given(st.text(max_size=30) | st.from_regex(r"(\\x?\{?[0-9A-F]{0,7}\}?|[a+= ö])*", fullmatch=True))
def test_any_property_makes_a_parameter_that_can_be_sent_or_none(address: str) -> None:
    for utf8 in (False, True):
        if onward := sent(f"utf-8;{address}", utf8=utf8):
            assert parse(onward, utf8=utf8) == onward
            assert onward.isascii() or utf8


@pytest.mark.parametrize(
    ("orcpt", "in_ascii", "in_utf8"),
    [
        ("utf-8;jörg@d.test", None, "utf-8;jörg@d.test"),
        (r"utf-8;j\x{F6}rg@d.test", r"utf-8;j\x{F6}rg@d.test", r"utf-8;j\x{F6}rg@d.test"),
        (r"UTF-8;j\x{f6}rg@d.test", r"UTF-8;j\x{f6}rg@d.test", r"UTF-8;j\x{f6}rg@d.test"),
        (r"utf-8;ö\x{2B}\x{1F600}@d.test", None, r"utf-8;ö\x{2B}\x{1F600}@d.test"),
        (r"utf-8;a\x{5C}\x{20}\x{3D}@d.test",) + 2 * (r"utf-8;a\x{5C}\x{20}\x{3D}@d.test",),
        ("utf-8;ann@d.test", "utf-8;ann@d.test", "utf-8;ann@d.test"),
        # xtext around it, as RFC 5337 had it
        ("utf-8;a+5Cx{F6}@d.test", r"utf-8;a\x{F6}@d.test", r"utf-8;a\x{F6}@d.test"),
        ("utf-8;a+2Bb@d.test", "utf-8;a+b@d.test", "utf-8;a+b@d.test"),
        ("utf-8;" + "ö" * 247, None, "utf-8;" + "ö" * 247),
        ("utf-8;" + "ö" * 248, None, None),
        ("utf-8;" + "o" * 494, "utf-8;" + "o" * 494, "utf-8;" + "o" * 494),
        ("utf-8;" + "o" * 495, None, None),
        ("utf-8;", None, None),
        ("rfc822;jörg@d.test", None, None),
        ("utf-8;jö+rg@d.test", None, None),
        ("utf-8;jö=rg@d.test", None, None),
        ("utf-8;j+rg@d.test", None, None),
        (r"utf-8;\x{}@d.test", None, None),
        (r"utf-8;\x{F6@d.test", None, None),
        (r"utf-8;\xF6@d.test", None, None),
        (r"utf-8;\u{F6}@d.test", None, None),
        (r"utf-8;a\b@d.test", None, None),
        ("utf-8;ann@d.test\\", None, None),
        (r"utf-8;\x{0}@d.test", None, None),
        (r"utf-8;\x{00}@d.test", None, None),
        (r"utf-8;\x{0A}@d.test", None, None),
        (r"utf-8;\x{7F}@d.test", None, None),
        (r"utf-8;\x{85}@d.test", None, None),
        (r"utf-8;\x{00F6}@d.test", None, None),
        (r"utf-8;\x{41}@d.test", None, None),
        (r"utf-8;\x{D800}@d.test", None, None),
        (r"utf-8;\x{DFFF}@d.test", None, None),
        (r"utf-8;\x{2028}@d.test", None, None),
        (r"utf-8;\x{110000}@d.test", None, None),
        (r"utf-8;\x{FFFFFFFF}@d.test", None, None),
        ("utf-8;a\x00b@d.test", None, None),
    ],
)
def test_the_forms_of_orcpt(orcpt: str, in_ascii: str | None, in_utf8: str | None) -> None:
    for utf8, expected in ((False, in_ascii), (True, in_utf8)):
        if expected is None:
            with pytest.raises(ParameterError) as caught:
                parse(orcpt, utf8=utf8)
            assert caught.value.reply.code == 501
        else:
            assert parse(orcpt, utf8=utf8) == expected


@pytest.mark.parametrize(
    ("orcpt", "in_ascii", "in_utf8"),
    [
        ("utf-8;jörg@d.test", r"utf-8;j\x{F6}rg@d.test", "utf-8;jörg@d.test"),
        # a document need not know of escapes
        (
            "utf-8;jörg+news@d.test",
            r"utf-8;j\x{F6}rg\x{2B}news@d.test",
            r"utf-8;jörg\x{2B}news@d.test",
        ),
        (r'utf-8;"j \x{F6}"@d.test', r'utf-8;"j\x{20}\x{F6}"@d.test', r'utf-8;"j\x{20}ö"@d.test'),
        (r"utf-8;j\x{D800}rg@d.test", "", ""),
        ("utf-8;j\ud800rg@d.test", "", ""),
        ("utf-8;j\r\nRSET", "", ""),
        ("utf-8;" + "ö" * 82, "utf-8;" + r"\x{F6}" * 82, "utf-8;" + "ö" * 82),
        ("utf-8;" + "ö" * 83, "", "utf-8;" + "ö" * 83),
        ("utf-8;" + "ö" * (ORCPT_LIMIT - 6), "", ""),
    ],
)
def test_a_peer_gets_the_form_that_it_can_take(orcpt: str, in_ascii: str, in_utf8: str) -> None:
    assert sent(orcpt, utf8=False) == in_ascii
    assert sent(orcpt, utf8=True) == in_utf8


def test_an_international_orcpt_goes_as_it_is_with_smtputf8() -> None:
    protocol = ClientProtocol("client.test")
    protocol.receive_data(b"220 hi\r\n")
    protocol.next_event()
    protocol.data_to_send()
    protocol.receive_data(b"250-mx\r\n250-DSN\r\n250-SMTPUTF8\r\n250 PIPELINING\r\n")
    protocol.next_event()
    protocol.mail("a@b.test", "ä@z.test", dsn={"orcpt": r"utf-8;ö\x{2B}x@z.test"})
    assert (
        protocol.data_to_send()
        == (
            "MAIL FROM:<a@b.test> SMTPUTF8\r\n"
            "RCPT TO:<ä@z.test> ORCPT=utf-8;ö\\x{2B}x@z.test\r\nDATA\r\n"
        ).encode()
    )
