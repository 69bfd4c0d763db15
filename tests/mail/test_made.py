"""The mail that is made of a message: parts, templates, header, and what is refused."""

from __future__ import annotations

import base64
import codecs
import email
import email.policy
import tracemalloc
from email.message import EmailMessage
from time import thread_time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mailerq.mail.made import NotMade, Unfinished, is_made, make
from mailerq.mail.parts import paired
from mailerq.mail.template import Template
from mailerq.mail.values import Budget

BASE: dict[str, Any] = {
    "envelope": "news@b.test",
    "recipient": "ann@d.test",
    "message-id": "m1",
    "seen": "2026-01-01 00:00:00",
}


def made(body: bytes | str | None, **properties: Any) -> bytes:
    stored = body.encode() if isinstance(body, str) else body
    return make({**BASE, **properties}, stored, hostname="mx.test", now=0.0)


def read(mail: bytes) -> EmailMessage:
    parsed = email.message_from_bytes(mail, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    assert not parsed.defects
    return parsed


def text_of(mail: EmailMessage, kind: str) -> str:
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content()).replace("\r\n", "\n")


TWO = (
    "From: {$from|default:'News'} <news@b.test>\r\n"
    'To: "{$name}" <{$recipient}>\r\n'
    "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe_an_=7B=24name?= =?utf-8?q?=7D?=\r\n"
    "X-Kept: {$name}\r\nMIME-Version: 1.0\r\n"
    'Content-Type: multipart/mixed; boundary="b"\r\n\r\nbefore {$name}\r\n'
    "--b\r\nContent-Type: multipart/alternative; boundary=c\r\n\r\n"
    "--c\r\nContent-Type: text/plain; format=flowed\r\n\r\nDear {$name}\r\n"
    "--c\r\nContent-Type: text/html; charset=iso-8859-1\r\n"
    "Content-Transfer-Encoding: quoted-printable\r\n\r\n<p class=3D\"x\">{$na=\r\nme} =A3</p>\r\n"
    "--c--\r\n"
    "--b\r\nContent-Type: text/plain\r\nContent-Disposition: attachment\r\n\r\n{$name}\r\n"
    "--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: {$name}\r\n\r\n{$name}\r\n"
    "--b--\r\nafter {$name}\r\n"
)  # fmt: skip


def test_the_texts_and_the_fields_for_readers_are_filled_in_and_nothing_else() -> None:
    mail = made(TWO, data={"name": "A & B"})
    parsed = read(mail)
    assert parsed["subject"] == "Grüße an A & B"
    assert parsed["to"] == "A & B <ann@d.test>"
    assert parsed["from"] == "News <news@b.test>"
    assert text_of(parsed, "plain") == "Dear A & B"
    assert text_of(parsed, "html") == '<p class="x">A &amp; B £</p>'
    assert mail.count(b"{$name}") == 6  # X-Kept, before, after, the attachment, the other mail
    assert parsed["date"].datetime.timestamp() == 1767225600
    assert parsed["message-id"] == "<m1@mx.test>"


@pytest.mark.parametrize(
    ("head", "content", "value"),
    [
        ("Content-Type: text/plain; charset=us-ascii\r\n", b"Hi {$x}", "Grüße"),
        ("", b"Hi {$x}", "Grüße"),
        ("Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n",
         b"H\xed {$x}", "Gr\xfc\xdfe"),
        ("Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n",
         b"H\xed {$x}", "\u4e16"),
        ("Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: base64\r\n",
         b"SGkgeyR4fQ==\r\n", "\u4e16"),
        ("Content-Type: text/plain; charset=shift_jis\r\nContent-Transfer-Encoding: base64\r\n",
         b"SGkgeyR4fQ==\r\n", "\u4e16"),
        ("Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n",
         b"Hi {$x}", "\u4e16"),
        ("Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 7bit\r\n",
         b"Hi {$x}", 3000 * "x"),
    ],
)  # fmt: skip
def test_a_part_keeps_its_encoding_where_the_text_allows(
    head: str, content: bytes, value: str
) -> None:
    mail = made(head.encode() + b"MIME-Version: 1.0\r\n\r\n" + content, data={"x": value})
    assert text_of(read(mail), "plain").rstrip("\n").endswith(value)
    assert max(map(len, mail.split(b"\r\n"))) <= 998
    for line in head.split("\r\n"):
        name, _, encoding = line.partition(": ")
        if name == "Content-Transfer-Encoding" and encoding != "7bit":
            assert line.encode() in mail or (encoding == "8bit" and value == "\u4e16")


def test_a_mail_whose_text_gets_an_encoding_says_that_it_is_mime() -> None:
    plain = b"Subject: x\r\n\r\nDear {$x}"
    assert read(made(plain, data={"x": "Jürgen"}))["mime-version"] == "1.0"
    assert read(made(plain, data={"x": "Ann"}))["mime-version"] is None
    typed = b"Content-Type: text/html\r\nMIME-Version: 1.0\r\n\r\n{$x}"
    assert read(made(typed, data={"x": "ü"})).get_all("mime-version") == ["1.0"]


@pytest.mark.parametrize("charset", ["utf-16", "utf-16-be", "utf-32", "cp037"])
@pytest.mark.parametrize("encoding", ["quoted-printable", "base64"])
def test_a_text_keeps_its_lines_in_any_charset(charset: str, encoding: str) -> None:
    content = "Hi {$x}\r\nthere".encode(charset)
    if encoding == "base64":
        content = base64.encodebytes(content).replace(b"\n", b"\r\n")
    else:
        content = b"".join(b"=%02X" % byte for byte in content)
    head = f"MIME-Version: 1.0\r\nContent-Type: text/plain; charset={charset}\r\n"
    head += f"Content-Transfer-Encoding: {encoding}\r\n\r\n"
    mail = made(head.encode() + content, data={"x": "Ann"})
    assert text_of(read(paired(mail)), "plain") == "Hi Ann\nthere"  # as the wire makes it


def test_bytes_that_are_no_utf8_pass_through() -> None:
    body = b"Subject: x\r\n\r\n\xff {$x}\xfe"
    assert made(body, data={"x": 1}).split(b"\r\n\r\n")[1] == b"=FF 1=FE"


def test_a_mail_without_a_template_is_the_same_but_for_date_and_message_id() -> None:
    body = b"Date: now\r\nMessage-ID: <x>\r\nSubject: \xff{}\r\n\r\n--\r\n{ \xff }\r\n"
    assert made(body, data={"x": 1}) == body
    assert made(b"Subject: x\r\n\r\n{}", data={}).endswith(
        b"Date: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <m1@mx.test>\r\n\r\n{}"
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"\r\n", b"hi", b"\r\nhi", b"Subject: x", b"Subject: x\r\n", b"Subject: x\r\n\r\nhi"],
)
def test_date_and_message_id_stand_in_the_header_whatever_that_is(body: bytes) -> None:
    for properties in ({"data": {}}, {"data": {}, "headers": {"add": {"X-A": "1"}}}):
        parsed = read(made(body, **properties))
        assert parsed["date"] and parsed["message-id"] == "<m1@mx.test>"
        assert parsed["subject"] == ("x" if b"Subject" in body else None)
        assert parsed.get_content().strip() == ("hi" if b"hi" in body else "")


def test_line_ends_are_made_pairs() -> None:
    assert made(b"A: b\nC: d\r\re\n", normalize=True) == b"A: b\r\nC: d\r\n\r\ne\r\n"
    same = b"A: b\r\n\r\nx"
    assert make({"normalize": 1}, same, hostname="x", now=0) is same
    assert made(b"A: b\n\n{$x}", data={"x": "1\n2"}).endswith(b"\r\n\r\n1\r\n2")


@pytest.mark.parametrize("head", [b"Subject: x\r\n\r\n", b"Subject: x\n\n", b"\r\n"])
def test_a_binary_mail_keeps_its_bytes_behind_the_header(head: bytes) -> None:
    content = b"\n\r\0\r\n\xff\n"
    mail = made(head + content, headers={"add": {"X-A": "1"}}, binarymime=True)
    assert mail.endswith(b"X-A: 1\r\n\r\n" + content)
    assert made(head + content, normalize=True, binarymime=True).endswith(b"\r\n\r\n\0\r\n\xff\r\n")


def test_the_edits_of_the_header_have_the_last_word() -> None:
    mail = made(
        b"Subject: {$x}\r\nX-A: 1\r\n\r\nhi",
        data={"x": "y"},
        headers={"remove": ["date"], "replace": {"Subject": "z {$x}"}, "add": {"X-B": ["ü", "2"]}},
    )
    assert read(mail)["subject"] == "z {$x}"
    assert read(mail)["date"] is None
    assert read(mail).get_all("x-b") == ["ü", "2"]
    assert made(b"no header", headers={"add": {"A": "b"}}) == b"A: b\r\n\r\nno header"


@pytest.mark.parametrize("value", ["x\r\nBcc: e@f.test", "x\nBcc: y", "\rBcc: y", "\u2028\x0b\0x"])
@pytest.mark.parametrize("raw", ["", "|raw"])
def test_no_value_ends_a_header_field(value: str, raw: str) -> None:
    head = f"From: {{$x{raw}}} <a@b.test>\r\nSubject: {{$x{raw}}}\r\nList-Unsubscribe: {{$x{raw}}}"
    parsed = read(made(head + "\r\n\r\nhi", data={"x": value}))
    assert sorted(parsed.keys()) == ["Date", "From", "List-Unsubscribe", "Message-ID", "Subject"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("{$x} <a@b.test>", 'Smith, "Ann" <e@f>', [('Smith, "Ann" <e@f>', "a@b.test")]),
        ('"{$x}" <a@b.test>', 'a" <e@f>, "', [('a" <e@f>, "', "a@b.test")]),
        ("{$x} {$x} <a@b.test>", "Ann", [("Ann Ann", "a@b.test")]),
        ("{$x} <a@b.test>", "Ünn Ä.", [("Ünn Ä.", "a@b.test")]),
        ("{$x}", "c@d.test", [("", "c@d.test")]),
        ("{$x}, q <{$x}>", "c@d.test", [("", "c@d.test"), ("q", "c@d.test")]),
        ("(a {$x}) <a@b.test>", ") <e@f>, (", [(None, "a@b.test")]),
        ("=?utf-8?q?Smith=2C_Ann?= <{$x}>", "c@d.test", [("Smith, Ann", "c@d.test")]),
    ],
)
def test_a_value_in_an_address_field_stays_what_it_is(
    field: str, value: str, expected: list[tuple[str | None, str]]
) -> None:
    parsed = read(made(f"To: {field}\r\n\r\nhi", data={"x": value}))
    addresses = parsed["to"].addresses
    assert [each.addr_spec for each in addresses] == [address for _, address in expected]
    for each, (name, _) in zip(addresses, expected, strict=True):
        assert name is None or each.display_name == name


@pytest.mark.parametrize("value", ["a@b.test, c@d.test", "a@b.test> <e@f", "a b", '"', "a;"])
@pytest.mark.parametrize("field", ["{$x}", "x <{$x}>"])
def test_a_value_in_an_address_cannot_become_two(value: str, field: str) -> None:
    with pytest.raises(NotMade, match="cannot stand in an address") as caught:
        made(f"To: {field}\r\n\r\nhi", data={"x": value})
    assert caught.value.state == "personalize"


# An object in `mime`

OBJECT: dict[str, Any] = {
    "from": {"name": "News, daily", "address": "news@b.test"},
    "to": ["{$recipient}", {"name": "Ünn {$name}", "email": "x@y.test"}],
    "cc": "Bob <bob@d.test>",
    "subject": "Grüße {$name}",
    "text": "Dear {$name}\n",
    "content": "<p>{$name}</p>",
    "headers": {"X-A": ["1", "2"], "Reply-To": "r@b.test"},
    "attachments": [
        {"name": "ü.bin", "data": "AAEC", "type": "image/png"},
        {"name": 'a"b.txt', "content": "tëxt"},
    ],
}


def test_a_mail_is_made_of_an_object() -> None:
    mail = made(None, mime=OBJECT, data={"name": "<Ann>"})
    parsed = read(mail)
    assert mail.isascii()
    assert parsed["from"] == '"News, daily" <news@b.test>'
    assert [each.display_name for each in parsed["to"].addresses] == ["", "Ünn <Ann>"]
    assert [each.addr_spec for each in parsed["to"].addresses] == ["ann@d.test", "x@y.test"]
    assert parsed["subject"] == "Grüße <Ann>"
    assert parsed.get_all("x-a") == ["1", "2"]
    assert parsed["date"] and parsed["message-id"] == "<m1@mx.test>"
    assert text_of(parsed, "plain") == "Dear <Ann>\n"
    assert text_of(parsed, "html") == "<p>&lt;Ann&gt;</p>"
    files = [(each.get_filename(), each.get_content_type(), each.get_content())
             for each in parsed.iter_attachments()]  # fmt: skip
    assert files == [("ü.bin", "image/png", b"\0\1\2"), ('a"b.txt', "text/plain", "tëxt")]
    assert made(None, mime=OBJECT, data={"name": "<Ann>"}) == mail  # each attempt makes the same


def test_what_an_object_leaves_out_is_taken_from_the_message() -> None:
    parsed = read(made(None, mime={"textVersion": "hi"}))
    assert (parsed["from"], parsed["to"], parsed["subject"]) == ("news@b.test", "ann@d.test", None)
    assert parsed.get_content_type() == "text/plain"
    assert read(made(None, mime={"content": "<p>"})).get_content_type() == "text/html"
    assert (
        read(made(None, mime={"headers": {"From": "x@y.test"}, "text": "x"}))["from"] == "x@y.test"
    )
    with pytest.raises(NotMade, match=r"mime\.from: is missing"):
        made(None, mime={"text": "hi"}, envelope="")


def test_addresses_of_the_message_are_no_templates_and_have_ascii_domains() -> None:
    addresses = {"envelope": "{$x}@b.test", "recipient": "ann@bücher.test"}
    parsed = read(made(None, mime={"text": "hi"}, data={"x": "y"}, **addresses))
    assert (parsed["from"], parsed["to"]) == ("{$x}@b.test", "ann@xn--bcher-kva.test")
    mail = made(None, mime={"text": "hi"}, smtputf8=True, **addresses)
    assert "To: ann@bücher.test\r\n".encode() in mail


@pytest.mark.parametrize(
    ("mime", "reason"),
    [
        ({"content": {"blocks": []}}, "property mime.content: is an object, and making HTML"),
        ({"attachments": [{"url": "http://x", "name": "y"}]},
         "property mime.attachments.0: has a url, and downloading is not supported"),
        ({"attachments": [{"name": "y"}]}, "property mime.attachments.0: has neither data nor"),
        ({"attachments": [{"data": "", "content": ""}]}, "property mime.attachments.0: has data"),
        ({"attachments": [{"data": "?"}]}, "property mime.attachments.0: data: "),
        ({"attachments": [{"data": "", "type": "a/b\r\nX: y"}]},
         "property mime.attachments.0: 'a/b\\r\\nX: y' is no media type"),
        ({"attachments": [{"data": "", "name": "a\nb"}]}, "property mime.attachments.0: its name"),
        ({"attachments": [{"data": "", "name": 1100 * "x"}]},
         "property mime.attachments.0: its name has a word of more than 990 bytes"),
        ({"attachments": {}}, "property mime.attachments: expected an array"),
        ({"subject": 1}, "property mime.subject: expected a string"),
        ({"from": ["a@b.test"]}, "property mime.from: expected a string or an object"),
        ({"to": {"address": 1}}, "property mime.to: expected a string for address"),
        ({"to": {"address": "no address"}}, "property mime.to: "),
        ({"to": {"address": "ü@d.test"}, "text": ""}, "property mime.to: "),
        ({"cc": "a@b.test\r\nX: y"}, "property mime.cc: holds a line end or a NUL"),
        ({"headers": {"Content-Type": "x"}}, "property mime.headers.Content-Type: is a field that"),
        ({"headers": {"Subject": "x"}, "subject": "y"}, "property mime.headers.Subject: stands in"),
        ({"headers": {"X": "a\nb"}}, "property mime.headers.X: holds a line end or a NUL"),
        ({"headers": {"X Y": "a"}}, "property mime.headers.X Y: is no name of a header field"),
        ({"headers": []}, "property mime.headers: expected an object"),
    ],
)  # fmt: skip
def test_an_object_that_cannot_become_a_mail_is_refused(mime: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotMade) as caught:
        made(None, mime=mime)
    assert caught.value.state == "responsive"
    assert caught.value.reason.startswith(reason)


def test_a_mistake_in_a_template_says_in_which_part() -> None:
    for body, reason in (
        (b"A: b\r\n\r\n\r\n{$x", "the text/plain part: line 2: expected '}', found the end"),
        (b"Subject: {if 1}\r\n\r\n", "the field Subject: line 1: {if} is not closed"),
        (b"Content-Type: text/html; charset=x-y\r\n\r\n{$x}", "the text/html part has the unknown"),
    ):
        with pytest.raises(NotMade) as caught:
            made(body, data={})
        assert caught.value.state == "personalize"
        assert caught.value.reason.startswith(reason)


def test_long_templates_are_not_kept_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, each of 32 kB takes about five megabytes."""
    compiled: list[str] = []

    class Watched(Template):
        def __init__(self, text: str, budget: Budget) -> None:
            compiled.append(text)
            super().__init__(text, budget)

    monkeypatch.setattr("mailerq.mail.made.Template", Watched)
    for tags, times in ((100, 1), (8000, 2)):
        compiled.clear()
        for _ in range(2):
            made(b"\r\nnot in the cache before " + tags * b"{$a}", data={"a": 1})
        assert len(compiled) == times


def test_a_small_budget_leaves_the_work_unfinished() -> None:
    properties = {**BASE, "data": {"l": list(range(100))}}
    body = b"A: b\r\n\r\n{foreach $x in $l}{$x}{/foreach}"
    with pytest.raises(Unfinished):
        make(properties, body, hostname="x", now=0, budget=Budget(50))
    assert make(properties, body, hostname="x", now=0).endswith(b"9899")


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, False),
        ({"data": None, "headers": None, "inlinecss": False, "normalize": 0, "mime": None}, False),
        ({"data": {}}, True),
        ({"headers": {}}, True),
        ({"inlinecss": 1}, True),
        ({"normalize": True}, True),
        ({"mime": {"text": "x"}}, True),
    ],
)
def test_only_what_asks_for_it_is_made(properties: dict[str, Any], expected: bool) -> None:
    assert is_made(properties) is expected


LINES = st.sampled_from([
    b"\r\n", b"--b", b"--b--", b"--c", b"--", b"Content-Type: multipart/mixed; boundary=b",
    b"\r\n\r\n",
    b"Content-Type: multipart/alternative;\r\n boundary=\"c\"", b"Content-Type: text/html", b"{$x}",
    b"Content-Type: text/plain; charset=utf-16", b"Content-Transfer-Encoding: base64", b"e30=",
    b"Content-Transfer-Encoding: quoted-printable", b"=7B$x}", b"Subject: {$x}", b"To: {$x} <{$y}>",
    b"From: =?utf-8?b?eyR4fQ==?=", b"Content-Type: message/rfc822", b"Content-Type: text/plain",
    b"Content-Type: multipart/signed; boundary=b", b"{if $x}", b"{/if}", b"\xff",
    b"=?x?q?{?=", b"\n",
])  # fmt: skip
MAILS = st.lists(LINES | st.binary(max_size=8), max_size=14).map(b"\r\n".join)
VALUES = st.one_of(st.text(max_size=12), st.integers(), st.sampled_from(["\r\nX: y", "a@b.test"]))
EDITS = st.sampled_from(
    [None, {"remove": "subject"}, {"add": {"X": "y"}}, {"replace": {"To": "é"}}]
)


@settings(max_examples=600, deadline=None)
@given(MAILS, st.one_of(st.none(), st.fixed_dictionaries({"x": VALUES, "y": VALUES})), EDITS)
@example(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + 11_000 * b"--b\r\n\r\n", {}, None)
@example(b"A: " + (1 << 20) * b"x", {}, None)
def test_any_mail_is_made_or_refused_with_a_reason(
    body: bytes, data: dict[str, Any] | None, headers: dict[str, Any] | None
) -> None:
    properties = {**BASE, "data": data, "headers": headers, "normalize": True}
    try:
        mail = make(properties, body, hostname="mx.test", now=0)
    except NotMade:
        return
    assert b"\n" not in mail.replace(b"\r\n", b"")
    head = mail.partition(b"\r\n\r\n")[0]
    if b"\r\nX: y" not in body and headers != {"add": {"X": "y"}}:
        assert b"\r\nX: y" not in head


def test_a_long_mail_is_copied_once() -> None:
    size = 40 << 20
    body = TWO.encode().replace(b"after", size * b"x")
    tracemalloc.start()
    try:
        start = thread_time()
        mail = made(body, data={"name": "x"}, headers={"add": {"A": "b"}})
        seconds = thread_time() - start
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(mail) > size
    assert most < size + (4 << 20)
    assert seconds < 2


def test_python_is_not_asked_for_charsets_that_nobody_knows() -> None:
    """It would keep each name for ever, and look for a module of that name."""
    asked: list[str] = []
    codecs.register(asked.append)
    try:
        for number in range(20):
            with pytest.raises(NotMade, match="unknown charset"):
                made(f"Content-Type: text/plain; charset=x-{number}\r\n\r\nx", data={})
            made(f"Subject: =?y-{number}?q?{{?=\r\n\r\n", data={})
    finally:
        codecs.unregister(asked.append)
    assert asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + 9000 * b"--b\r\n\r\n{$x}\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + 9000 * b"--b\r\nA: b\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + 300_000 * b"--c\r\n",
        b"To: " + 9000 * b"{$x}" + b"\r\n\r\n",
        b"Subject: " + 5000 * b"=?utf-8?q?{?= x " + b"\r\n\r\n",
        b"Subject: " + b" x ".join(b"=?y%d?q?{?=" % n for n in range(50_000)) + b"\r\n\r\n",
        b"To: " + 90_000 * b'"{$x|cat:"' + b"\r\n\r\n",
        b"".join(b"X-%d: y\r\n" % number for number in range(90_000)) + b"\r\n{$x}",
    ],
)
def test_a_mail_that_is_made_to_be_slow_ends_soon(body: bytes) -> None:
    start = thread_time()
    edits = {"replace": {f"X-{number}": "z" for number in range(900)}}
    try:
        made(body, data={"x": "a"}, headers=edits)
    except NotMade:
        pass
    assert thread_time() - start < 3
