"""8-bit mail for peers without 8BITMIME: the email package reads the same from what is sent."""

from __future__ import annotations

import email
import email.policy
from email.header import decode_header, make_header
from email.message import Message
from itertools import count

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.mail.seven_bit import to_seven_bit
from tests.support import least_seconds

# Lines that are near to what steers a parser, and all that may stand in them.
LINES = st.one_of(
    st.sampled_from([b"", b".", b"--", b"--x", b"-- ", b"From a", b"a: b", b"=", b"=FF", b" \t"]),
    st.binary(max_size=120).map(lambda raw: raw.translate(None, b"\r\n")),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60).map(
        lambda text: text.replace("\u2028", "").encode()
    ),
)
TEXTS = st.lists(LINES, max_size=8).map(b"\r\n".join)


def leaf(text: bytes, kind: str, encoding: str) -> bytes:
    head = f"Content-Type: {kind}\r\n" if kind else ""
    head += f"Content-Transfer-Encoding: {encoding}\r\n" if encoding else ""
    return head.encode() + b"\r\n" + text


LEAVES = st.builds(
    leaf,
    TEXTS,
    st.sampled_from(
        ["", "text/plain; charset=utf-8", 'TEXT/HTML; charset="iso-8859-1"', "image/png", "x/y"]
    ),
    st.sampled_from(["", "7bit", "8bit", "8Bit", "binary"]),
)


def multipart(parts: list[bytes], preamble: bytes, kind: str, encoding: str) -> bytes:
    # A boundary that is in no part; of one nested in another it is the beginning.
    whole = b"".join(parts) + preamble
    boundary = next(f"b{n}" for n in count() if f"b{n}".encode() not in whole).encode()
    head = b'Content-Type: %b;\r\n boundary="%b"\r\n' % (kind.encode(), boundary)
    head += f"Content-Transfer-Encoding: {encoding}\r\n".encode() if encoding else b""
    body = b"".join(b"\r\n--%b\r\n%b" % (boundary, part) for part in parts)
    return head + b"\r\n" + preamble + body + b"\r\n--%b--\r\n" % boundary


ENTITIES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            multipart,
            st.lists(inner, min_size=1, max_size=3),
            st.sampled_from([b"", b"preamble", b"--"]),
            st.sampled_from(["multipart/mixed", "multipart/alternative", "Multipart/Related"]),
            st.sampled_from(["", "8bit", "7bit", "binary"]),
        ),
        inner.map(
            lambda part: (
                b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
                b"MIME-Version: 1.0\r\n" + part
            )
        ),
    ),
    max_leaves=6,
)


def leaves(message: Message) -> list[tuple[str, object]]:
    return [
        (part.get_content_type(), part.get_payload(decode=True))
        for part in message.walk()
        if not part.is_multipart()
    ]


def shape(message: Message) -> list[tuple[str, str | None]]:
    return [(part.get_content_type(), part.get_boundary()) for part in message.walk()]


@given(ENTITIES)
@example(multipart([leaf("\u00fc".encode(), "", "8bit")], b"", "multipart/mixed", "8bit"))
@example(leaf(b"\xff" * 200, "text/plain", "8bit"))
@example(leaf(b"\xff\r\n" + b"x" * 200 + b" ", "text/plain", "8bit"))
def test_what_is_read_from_it_is_the_same(entity: bytes) -> None:
    mime = b"MIME-Version: 1.0\r\nSubject: x\r\n" + entity
    converted = to_seven_bit(mime)
    assert converted is not None
    assert converted.isascii()
    assert all(len(line) < 998 for line in converted.split(b"\r\n")) or mime.isascii()
    before, after = email.message_from_bytes(mime), email.message_from_bytes(converted)
    assert shape(after) == shape(before)
    assert leaves(after) == leaves(before)
    for part in after.walk():
        encoding = part.get("content-transfer-encoding", "7bit").lower()
        if not part.is_multipart():
            encoded = part.get_payload(decode=False)
            assert isinstance(encoded, str)
            assert encoding in ("quoted-printable", "base64") or encoded.isascii()
        else:
            assert encoding == "7bit" or mime.isascii()


@given(st.binary(max_size=400))
@example(b"\xff")
@example(b"\xff: \xff\r\n\xff")
@example(b"Content-Type: multipart/x; boundary=b\r\n\r\n--b\r\n--b\r\n\xff\r\n--b--\xff")
@example(b"Content-Type: multipart/x; boundary=b\r\n\r\n--b\r\nA: \xff\r\n--b--\r\n\xff\r\n--b")
@example(b"Content-Type: multipart/x; boundary=b\r\n\r\n--b" + b" " * 300 + b"\xff\r\n--b\r\n")
@example(b"Content-Type: multipart/x; boundary=b\r\n\r\n--b" + b" " * 300)
@example(b'Content-Type: x/y; a="\\\xff')
@example(b'To: "\\\xff')
def test_whatever_comes_is_ascii_or_none(mime: bytes) -> None:
    converted = to_seven_bit(mime)
    if converted is not None:
        assert converted.isascii()
        assert to_seven_bit(converted) is converted


def test_ascii_comes_back_itself() -> None:
    mime = b"Content-Transfer-Encoding: 8bit\n\nhi\r"
    assert to_seven_bit(mime) is mime


WORDS = st.text(
    st.one_of(
        st.characters(categories=["Lu", "Ll", "Lo", "Nd"]), st.sampled_from(" .-_?=\u00fc\u20ac")
    ),
    max_size=200,
).filter(lambda text: "=?" not in text and "?=" not in text)


def read(value: object) -> list[str]:
    """The words that a reader sees."""
    return str(make_header(decode_header(str(value)))).split()


@given(WORDS)
def test_text_in_a_field_is_read_as_it_was(text: str) -> None:
    converted = to_seven_bit(f"Subject: {text}\r\n\r\n\u00fc".encode())
    assert converted is not None
    assert read(email.message_from_bytes(converted)["subject"]) == text.split()
    if not text.isascii():
        encoded = [line for line in converted.split(b"\r\n") if b"=?" in line]
        assert encoded


@given(st.lists(WORDS.filter(lambda text: bool(text.strip())), min_size=1, max_size=3))
def test_names_in_address_lists_are_read_as_they_were(names: list[str]) -> None:
    names = [" ".join(name.replace("=", "").replace("?", "").split()) or "x" for name in names]
    boxes = [f'"{name}" <a{number}@b.test>' for number, name in enumerate(names)]
    converted = to_seven_bit(f"To: {', '.join(boxes)}\r\n\r\n\u00fc".encode())
    assert converted is not None
    message = email.message_from_bytes(converted, policy=email.policy.default)
    addresses = message["to"].addresses
    # The standard library sees blanks between encoded words of a name that are none.
    shown = ["".join(address.display_name.split()) for address in addresses]
    assert shown == ["".join(name.split()) for name in names]
    assert [address.addr_spec for address in addresses] == [
        f"a{number}@b.test" for number in range(len(names))
    ]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("To: J\u00f6rg M\u00fcller <j@d.test>", [("J\u00f6rg M\u00fcller", "j@d.test")]),
        ("From: a@b.test (J\u00f6rg)", [("", "a@b.test")]),
        (
            "Cc: \u00c9a <e@d.test>,\r\n Bob <b@d.test>",
            [("\u00c9a", "e@d.test"), ("Bob", "b@d.test")],
        ),
    ],
)
def test_names_without_quotes(field: str, expected: list[tuple[str, str]]) -> None:
    converted = to_seven_bit(f"{field}\r\n\r\n".encode())
    assert converted is not None
    message = email.message_from_bytes(converted, policy=email.policy.default)
    (value,) = message.values()
    assert [(a.display_name, a.addr_spec) for a in value.addresses] == expected


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=90))
@example('a"b\\c\u00fc.pdf')
def test_names_of_files_are_read_as_they_were(name: str) -> None:
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    mime = f'Content-Disposition: attachment; size=1; filename="{quoted}"\r\n\r\n\u00fc'
    converted = to_seven_bit(mime.encode())
    assert converted is not None
    message = email.message_from_bytes(converted)
    if not name.isascii():
        value = message.get_param("filename", header="content-disposition")
        assert email.utils.collapse_rfc2231_value(value).strip() == name.strip()
    assert message.get_param("size", header="content-disposition") == "1"


def test_bytes_of_an_unknown_charset_are_called_so() -> None:
    converted = to_seven_bit(
        b"Subject: caf\xe9\r\n\r\ncaf\xe9 in a text that says nothing of itself"
    )
    assert converted is not None
    assert b"Subject: =?unknown-8bit?q?caf=E9?=\r\n" in converted
    assert b"Content-Type: text/plain; charset=unknown-8bit\r\n" in converted
    assert b"\r\n\r\ncaf=E9 in a text" in converted


@pytest.mark.parametrize(
    "mime",
    [
        "To: <\u00fc@d.test>\r\n\r\n",
        "To: \u00fc@d.test\r\n\r\n",
        "To: a@\u00fc.test\r\n\r\n",
        'To: "\u00fc"@d.test\r\n\r\n',
        "Content-Transfer-Encoding: x-uue\r\n\r\n\u00fc",
        "Content-Type: multipart/mixed\r\n\r\n\u00fc",
        "Content-Type: multipart/mixed; boundary=b\r\n\r\n\u00fc",
        "".join(
            f"Content-Type: multipart/mixed; boundary=b{n}\r\n\r\n--b{n}\r\n" for n in range(60)
        )
        + "\r\n\u00fc",
    ],
)
def test_what_cannot_be_said_in_ascii_cannot_be_converted(mime: str) -> None:
    assert to_seven_bit(mime.encode()) is None


@pytest.mark.parametrize(
    ("repeated", "fits", "too_many"),
    [
        (b"--b\r\n\r\n\xff\r\n", 5_000, 12_000),
        (b"--b\r\nSubject: " + b"\xff " * 500 + b"\r\n\r\nx\r\n", 900, 1_200),
        (b"--b\r\n" + b"A: b\r\n" * 1_000 + b"\r\n\xff\r\n", 150, 200),
    ],
    ids=["parts", "fields to convert", "fields"],
)
def test_parts_and_their_headers_are_bounded(repeated: bytes, fits: int, too_many: int) -> None:
    head = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
    assert to_seven_bit(head + fits * repeated + b"--b--\r\n") is not None
    assert to_seven_bit(head + too_many * repeated + b"--b--\r\n") is None


def test_a_field_to_convert_is_bounded() -> None:
    assert to_seven_bit(b"Subject: " + b"\xff " * 60_000 + b"\r\n\r\n") is not None
    assert to_seven_bit(b"Subject: " + b"\xff " * 70_000 + b"\r\n\r\n") is None
    assert to_seven_bit(b"Subject: " + b"x " * 70_000 + b"\r\n\r\n\xff") is not None


def test_parts_that_are_encoded_already_stay_so() -> None:
    for encoding, text, left in (
        ("quoted-printable", b"a=FF\xfe=\r\nb", b"a=FF=FE=\r\nb"),
        ("base64", b"aGk\xff=", b"aGk="),
    ):
        mime = f"Content-Transfer-Encoding: {encoding}\r\n\r\n".encode()
        assert to_seven_bit(mime + text) == mime + left


PART = b"--b\r\nA: b\r\n\r\n"


@pytest.mark.parametrize(
    "pattern",
    [
        (b"", b"\xff"),
        (b"", b"\xff x\r\n"),
        (b"", b"--\r\n\xff"),
        (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", PART + b"\xff\r\n"),
        (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", b"--b\r\nA: \xff\r\n"),
        (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", b"--b\r\n"),
        (b"", b"Content-Type: message/rfc822\r\n\r\n"),
        (b"To: ", b"\xff \xff, "),
        (b'To: "', b'\\"\xff'),
        (b"To: ", b"<\xc3"),
        (b"Subject: ", b"\xff  "),
        (b"Subject: ", b"\xff\r\n "),
        (b"Content-Type: ", b'x/y; a="\xff'),
        (b"Content-Type: x/y", b";\xff=\xff"),
    ],
)
def test_no_mail_makes_it_slower_than_linear(pattern: tuple[bytes, bytes]) -> None:
    head, repeated = pattern

    def seconds(size: int) -> float:
        mime = head + repeated * (size // len(repeated)) + b"\xff"
        return least_seconds(lambda: to_seven_bit(mime))

    # Eight times as much would take 64 times as long; eight times is expected.
    assert seconds(120_000) < 24 * seconds(15_000) + 0.05
