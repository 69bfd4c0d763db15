"""Mail that is signed on its way out, as peers get it, before independent verifiers."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.config import Config
from mailerq.live import Live
from mailerq.message import Message, without_password
from mailerq.outbound.signer import Signer
from mailerq.outbound.signing import Signing
from mailerq.rules.documents import problems
from mailerq.wire.framing import in_pairs
from tests.net.dns_server import open_dns_server
from tests.outbound.kit import Bench, StubPlugins, open_bench
from tests.signing_kit import (
    Keys,
    assert_verifies,
    dkimpy_says,
    ed25519_pem,
    rsa_pem,
    signatures,
    tags,
)

HEAD = b"From: Ann <ann@example.com>\r\nTo: b@d.test\r\nSubject: hi\r\n"

MAILS = {
    "plain": HEAD + b"\r\nhello\r\n",
    "folded": b"From: Ann\r\n <ann@example.com>\r\nSubject: a\r\n\tfolded \t  text \r\n b\r\n"
    b"\r\nx\r\n",
    "duplicate From": HEAD + b"From: Eve <eve@evil.test>\r\n\r\nhello\r\n",
    "empty body": HEAD + b"\r\n",
    "no body": HEAD,
    "only CRLFs": HEAD + b"\r\n\r\n\r\n\r\n",
    "trailing blanks": HEAD + b"\r\nhello \t \r\n  \r\nx  y\r\n\r\n\r\n",
    "8-bit": HEAD + "\r\nGr\u00fc\u00dfe\r\n".encode(),
    "latin-1": HEAD + b"\r\nGr\xfc\xdfe\r\n",
    "UTF-8 header": HEAD + "X: \u00e4\r\nReply-To: \u00e4 <a@b.test>\r\n\r\nx\r\n".encode(),
    "no end": HEAD + b"\r\nhello",
    "no end, blanks": HEAD + b"\r\nhello \r\n \t",
    "LF only": HEAD.replace(b"\r\n", b"\n") + b"\nhello\n\nworld\n\n",
    "CR only": HEAD.replace(b"\r\n", b"\r") + b"\rhello\r\rworld\r",
    "mixed ends": HEAD + b"\r\nhello\r\r\nwor\nld\n\rx\r",
    "dots": HEAD + b"\r\n.\r\n..\r\n.x\r\n",
    "a long line": HEAD + b"\r\n" + b"x" * (1 << 20) + b"\r\nend",
    "blanks after the colon": b"From:ann@example.com\r\nSubject:x\r\nTO:\tb@d.test\r\n\r\nx\r\n",
    "an empty field": HEAD + b"Cc:\r\nReply-To: \r\n\r\nx\r\n",
    "lists": HEAD + b"List-Unsubscribe: <https://u.test/>\r\n"
    b"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\nMessage-ID: <1@x>\r\n\r\nx\r\n",
    "many parts": HEAD + b"\r\n" + b"line of text  with blanks \r\n" * 40_000,
}
FORMS = ("relaxed/simple", "relaxed/relaxed", "simple/simple", "simple/relaxed")

ODD = frozenset(("a long line", "no body", "blanks after the colon", "an empty field"))
"""OpenDKIM's test mode parses the mail itself, and loses blanks around colons, and long lines."""


@asynccontextmanager
async def open_signing(
    keys: Keys, *, file: str = "", plugins: StubPlugins | None = None, **settings: Any
) -> AsyncIterator[tuple[Bench, int]]:
    """A delivery with keys in a directory, and the port of a DNS server that has their records."""
    if file:
        path = keys.directory.parent / "dkim.toml"
        path.write_text(file)
        settings["dkim_file"] = str(path)
    settings.setdefault("dkim_directory", str(keys.directory))
    async with (
        open_dns_server(keys.zone) as server,
        open_bench(plugins=plugins, **settings) as bench,
    ):
        bench.peer.extensions = ("PIPELINING", "8BITMIME", "SIZE 10000000")
        yield bench, server.port


def put(bench: Bench, body: bytes | None, recipient: str = "c@d.test", **more: Any) -> None:
    message = Message({"envelope": "a@b.test", "recipient": recipient, **more}, body)
    bench.queues.put(message)
    bench.queues.touch()


async def sent(bench: Bench, count: int = 1) -> list[bytes]:
    await bench.results("success", count)
    return [mail.body for mail in bench.peer.mails]


@pytest.mark.parametrize("name", MAILS)
async def test_all_signatures_of_a_strange_mail_verify(name: str, keys: Keys) -> None:
    lines = []
    for number, form in enumerate(FORMS):
        pem = ed25519_pem() if number % 2 else rsa_pem()
        path = keys.add("keys.test", f"k{number}", pem)
        lines.append(
            f'[[key]]\ndomain = "keys.test"\nselector = "k{number}"\nfrom = "example.com"\n'
            f'file = "{path}"\ncanonicalization = "{form}"\nheaders = ["X-Missing", "Comments"]\n'
        )
    async with open_signing(keys, file="\n".join(lines)) as (bench, port):
        put(bench, MAILS[name])
        (mail,) = await sent(bench)
        selectors = [f"k{number}" for number in range(len(FORMS))]
        await assert_verifies(mail, keys, port, selectors=selectors, strict=name not in ODD)
        on_wire = in_pairs(MAILS[name])
        assert mail.endswith(on_wire if on_wire.endswith(b"\r\n") else on_wire + b"\r\n")


async def test_a_mail_that_is_changed_on_the_way_does_not_verify(keys: Keys) -> None:
    keys.add("example.com", "s1")
    async with open_signing(keys) as (bench, _):
        put(bench, MAILS["lists"])
        (mail,) = await sent(bench)
    assert dkimpy_says(mail, keys.records) == [True]
    for old, new in (
        (b"Subject: hi", b"Subject: ho"),
        (b"\r\n\r\nx", b"\r\n\r\ny"),
        (b"One-Click", b"Two-Click"),
        (b"From: Ann", b"From: evil@evil.test\r\nFrom: Ann"),
        (b"Subject: hi", b"Subject: other\r\nSubject: hi"),
        (b"To: b", b"Cc: x@y.test\r\nTo: b"),
    ):
        assert old in mail
        assert dkimpy_says(mail.replace(old, new), keys.records) == [False], new


async def test_the_key_of_the_from_domain_signs_and_no_other(keys: Keys) -> None:
    for domain in ("example.com", "other.test"):
        keys.add(domain, "s1")
    async with open_signing(keys) as (bench, _):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        (found,) = map(tags, signatures(mail))
        assert (found["d"], found["s"], found["a"]) == ("example.com", "s1", "rsa-sha256")
        assert found["c"] == "relaxed/simple"
        assert "l" not in found and "x" not in found
        for body in (
            b"Subject: x\r\n\r\nno from\r\n",
            b"From: a@nobody.test\r\n\r\nx\r\n",
            b"no header\r\n",
            HEAD + b"X: y\r\n" * 180_000 + b"\r\na header that is too long\r\n",
        ):
            bench.peer.mails.clear()
            bench.queues.queues["success"].clear()
            put(bench, body)
            assert await sent(bench) == [body]


async def test_the_announced_size_is_that_of_the_signed_mail(keys: Keys) -> None:
    keys.add("example.com", "s1")
    keys.add("example.com", "s2", ed25519_pem())
    async with open_signing(keys) as (bench, _):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        assert f"MAIL FROM:<a@b.test> SIZE={len(mail)}" in bench.peer.commands
        assert len(signatures(mail)) == 2


async def test_keys_of_a_message_sign_in_addition_in_the_order_of_their_priority(
    keys: Keys,
) -> None:
    keys.add("example.com", "s1")
    keys.publish("esp.test", "e1", rsa_pem(1))
    keys.publish("esp.test", "e2", ed25519_pem(1))
    wish = [
        {
            "domain": "esp.test", "selector": "e1", "key": rsa_pem(1).decode(), "priority": 5,
            "headers": ["X-Campaign"], "canonicalization": "relaxed/relaxed", "report": True,
            "expire": 300_000_000,
        },
        {"domain": "ESP.test", "selector": "e2", "key": ed25519_pem(1).decode(), "priority": -1},
    ]  # fmt: skip
    body = b"X-Campaign: 7\r\n" + MAILS["trailing blanks"]
    async with open_signing(keys) as (bench, port):
        put(bench, body, dkim=wish)
        (mail,) = await sent(bench)
        await assert_verifies(mail, keys, port, selectors=["e2", "s1", "e1"])
        found = tags(signatures(mail)[2])
        assert found["r"] == "y" and "x-campaign" in found["h"].split(":")
        assert int(found["x"]) == int(found["t"]) + 300_000_000
        assert "r" not in tags(signatures(mail)[1])


async def test_a_key_of_a_message_signs_without_settings(keys: Keys) -> None:
    keys.publish("esp.test", "e1", rsa_pem())
    wish = {"domain": "esp.test", "selector": "e1", "key": rsa_pem().decode()}
    async with open_bench() as bench:
        put(bench, MAILS["plain"], dkim=wish)
        (mail,) = await sent(bench)
    assert dkimpy_says(mail, keys.records) == [True]


async def test_a_mail_that_has_to_be_converted_is_signed_as_the_peer_gets_it(keys: Keys) -> None:
    keys.add("example.com", "s1")
    head = HEAD + b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
    text = "Gr\u00fc\u00dfe\r\n".encode()
    async with open_signing(keys) as (bench, port):
        bench.peer.extensions = ("PIPELINING", "SIZE 10000000")
        for count in (1, 5000):  # in blocks where it is long
            bench.peer.mails.clear()
            bench.queues.queues["success"].clear()
            put(bench, head + text * count)
            (mail,) = await sent(bench)
            assert mail.isascii() and b"Content-Transfer-Encoding" in mail
            await assert_verifies(mail, keys, port, selectors=["s1"])


async def test_a_binary_mail_is_signed_byte_for_byte(keys: Keys) -> None:
    keys.add("example.com", "s1")
    body = HEAD + b"\r\na\nb\rc\0 \r\n\r\n \t\r\n"
    async with open_signing(keys) as (bench, _):
        bench.peer.extensions = ("CHUNKING", "BINARYMIME", "8BITMIME", "SIZE 1000000")
        put(bench, body, binarymime=True)
        (mail,) = await sent(bench)
        assert mail.endswith(body)
        assert f"MAIL FROM:<a@b.test> SIZE={len(mail)} BODY=BINARYMIME" in bench.peer.commands
        # dkimpy would turn the bare LFs into CRLF, so the hash is compared.
        found = tags(signatures(mail)[0])
        canonical = b"a\nb\rc\0 \r\n\r\n \t\r\n"
        assert base64.b64decode(found["bh"]) == hashlib.sha256(canonical).digest()


async def test_what_a_plugin_makes_of_a_mail_is_signed(keys: Keys) -> None:
    keys.add("example.com", "s1")
    keys.add("other.test", "s2")

    def change(message: Message) -> None:
        assert message.body is not None and b"DKIM-Signature" not in message.body
        if b"exchange" in message.body:
            message.body = b"From: x@other.test\r\n\r\nother text\r\n"

    plugins = StubPlugins(out_data=change)
    async with open_signing(keys, plugins=plugins) as (bench, port):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        await assert_verifies(mail, keys, port, selectors=["s1"])
        bench.peer.mails.clear()
        bench.queues.queues["success"].clear()
        put(bench, HEAD + b"\r\nexchange me\r\n")
        (mail,) = await sent(bench)
        assert b"other text" in mail
        await assert_verifies(mail, keys, port, selectors=["s2"])


async def test_a_plugin_that_supplies_the_mail_or_a_key_has_it_signed(keys: Keys) -> None:
    keys.publish("esp.test", "e1", rsa_pem())
    wish = {"domain": "esp.test", "selector": "e1", "key": rsa_pem().decode()}

    class Plugins(StubPlugins):
        async def out_data(self, message: Message, document: Message) -> Any:
            message.body = MAILS["plain"]
            document.properties["dkim"] = wish

    plugins = Plugins(out_data=lambda message: None)
    async with open_bench(plugins=plugins) as bench:
        put(bench, None)
        (mail,) = await sent(bench)
    assert dkimpy_says(mail, keys.records) == [True]


async def test_a_made_mail_is_signed_for_each_recipient(keys: Keys) -> None:
    keys.add("example.com", "s1")
    body = HEAD + b"\r\nHello {$name}\r\n"
    async with open_signing(keys) as (bench, _):
        for name in ("Ann", "Bob"):
            put(bench, body, recipient=f"{name}@d.test", data={"name": name})
        mails = await sent(bench, 2)
    for mail in mails:
        assert dkimpy_says(mail, keys.records) == [True]
    assert {mail.rpartition(b"Hello ")[2] for mail in mails} == {b"Ann\r\n", b"Bob\r\n"}


async def test_a_body_is_hashed_once_for_all_recipients(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mailerq.outbound import signer

    keys.add("example.com", "s1")
    keys.add("example.com", "s2", ed25519_pem())
    hashed = []

    def counted(*arguments: Any, **options: Any) -> bytes:
        hashed.append(1)
        return real(*arguments, **options)

    real = signer.body_hash
    monkeypatch.setattr(signer, "body_hash", counted)
    async with open_signing(keys) as (bench, _):
        for number in range(20):
            put(bench, bytes(bytearray(MAILS["plain"])), recipient=f"{number}@d.test")
        mails = await sent(bench, 20)
    assert len(hashed) == 1
    assert all(dkimpy_says(mail, keys.records) == [True, True] for mail in mails)


# Keys that cannot sign


async def test_mail_waits_while_a_key_cannot_be_read_and_goes_out_signed_after(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(keys.add("example.com", "s1"))
    path.write_text("no key")
    async with open_signing(keys) as (bench, port):
        put(bench, MAILS["plain"])
        result = await bench.retried()
        assert (result["code"], result["status"]) == (451, "4.3.5")
        assert "s1.pem is not a key in PEM" in result["description"]
        assert f"the key {path} is not a key in PEM" in caplog.text
        assert not any(command.startswith("MAIL") for command in bench.peer.commands)
        path.write_bytes(rsa_pem())
        bench.dispatcher.signer._domains.clear()  # as after CHECK_SECONDS
        await bench.pass_time(700)
        (mail,) = await sent(bench)
        await assert_verifies(mail, keys, port, selectors=["s1"])


async def test_mail_goes_without_the_signature_of_a_bad_key_if_the_operator_says_so(
    keys: Keys,
) -> None:
    Path(keys.add("example.com", "s1")).write_text("no key")
    keys.add("example.com", "s2", ed25519_pem())
    async with open_signing(keys, dkim_missing="unsigned") as (bench, port):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        await assert_verifies(mail, keys, port, selectors=["s2"])


def expired(domain: str) -> str:
    return f'[[key]]\ndomain = "{domain}"\nnot-after = 2020-01-01\n'


def to_come(domain: str) -> str:
    return f'[[key]]\ndomain = "{domain}"\nnot-before = 2999-01-01\n'


WITHOUT_A_KEY = {
    "empty": ("", False, "there is no key in {folder}. Make one with 'mailerq dkim new"),
    "expired": (expired("example.com"), True, "no key is in force now: {folder}/s1.pem. Change"),
    "to come": (to_come("example.com"), True, "no key is in force now: {folder}/s1.pem. Change"),
}


@pytest.mark.parametrize("case", WITHOUT_A_KEY)
async def test_mail_waits_while_its_domain_has_a_place_for_keys_and_no_key_in_force(
    case: str, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    file, has_key, text = WITHOUT_A_KEY[case]
    folder = keys.directory / "example.com"
    text = text.format(folder=folder)
    folder.mkdir()
    if has_key:
        keys.add("example.com", "s1")
    async with open_signing(keys, file=file) as (bench, port):
        put(bench, MAILS["plain"])
        result = await bench.retried()
        assert (result["code"], result["status"]) == (451, "4.3.5")
        assert text in result["description"]
        assert f"cannot sign mail from example.com: {text}" in caplog.text
        assert not any(command.startswith("MAIL") for command in bench.peer.commands)
        keys.add("other.test", "s2")
        (keys.directory.parent / "dkim.toml").write_text(
            '[[key]]\ndomain = "other.test"\nselector = "s2"\nfrom = "example.com"\n' + file
        )
        if not file:
            keys.add("example.com", "s2")
        bench.dispatcher.signer._domains.clear()  # as after CHECK_SECONDS
        await bench.pass_time(700)
        (mail,) = await sent(bench)
        await assert_verifies(mail, keys, port, selectors=["s2"])


async def test_mail_of_a_domain_without_a_key_in_force_goes_if_the_operator_says_so(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    (keys.directory / "example.com").mkdir()
    async with open_signing(keys, dkim_missing="unsigned") as (bench, _):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        assert signatures(mail) == []
    said = "from example.com (dkim-missing: unsigned, so the mail goes without): there is no key"
    assert f"cannot sign mail {said} in {keys.directory}/example.com. Make" in caplog.text


async def test_mail_of_a_domain_without_a_place_for_keys_goes_without_a_word(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    keys.add("other.test", "s1")
    async with open_signing(keys, file=expired("other.test")) as (bench, _):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        assert signatures(mail) == []
    assert "cannot sign" not in caplog.text


async def test_a_key_whose_time_ends_between_two_looks_leaves_no_mail_unsigned(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add("example.com", "s1")
    end = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC).timestamp()
    file = '[[key]]\ndomain = "example.com"\nnot-after = 2100-01-01\n'
    async with open_signing(keys, file=file) as (bench, _):
        put(bench, MAILS["plain"])
        (mail,) = await sent(bench)
        assert len(signatures(mail)) == 1
        monkeypatch.setattr(bench.dispatcher.signer, "now", lambda: end)
        monkeypatch.setattr("mailerq.outbound.signer.CHECK_SECONDS", 1e9)  # no look
        put(bench, MAILS["plain"])
        result = await bench.retried()
        assert "no key is in force now" in result["description"]


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        (
            {"domain": "a.test", "selector": "s", "key": "no key"},
            "s._domainkey.a.test is not a key",
        ),
        ({"domain": "a b", "selector": "s", "key": "k"}, "'a b' is not a domain"),
        ({"domain": "a.test", "selector": "s\r\nX: y", "key": "k"}, "is not a selector"),
        ({"domain": "a.test", "selector": "s"}, "property dkim"),
        ("text", "property dkim"),
        ([[]], "property dkim"),
        (
            {
                "domain": "a.test",
                "selector": "s",
                "key": rsa_pem().decode(),
                "headers": ["Received"],
            },
            "Received is never signed",
        ),
        (
            {"domain": "a.test", "selector": "s", "key": rsa_pem().decode(), "headers": ["a\r\nb"]},
            "is not the name of a header field",
        ),
    ],
)
async def test_a_message_whose_own_key_cannot_sign_fails_and_says_why(wish: Any, text: str) -> None:
    async with open_bench() as bench:
        put(bench, MAILS["plain"], dkim=wish)
        (result,) = await bench.results("failure")
        assert text in result["description"]
        assert result["result"] == "invalid"
        assert bench.peer.mails == []


async def test_changed_and_new_keys_sign_without_a_reload(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mailerq.outbound import signer

    monkeypatch.setattr(signer, "CHECK_SECONDS", 0.0)
    keys.add("example.com", "s1")
    async with open_signing(keys) as (bench, _):
        for expected in (["s1"], ["s1", "s2"], ["s2"]):
            if expected == ["s1", "s2"]:
                keys.add("example.com", "s2", rsa_pem(2))
            elif expected == ["s2"]:
                os.remove(keys.directory / "example.com" / "s1.pem")
            bench.peer.mails.clear()
            bench.queues.queues["success"].clear()
            put(bench, MAILS["plain"])
            (mail,) = await sent(bench)
            assert [tags(each)["s"] for each in signatures(mail)] == expected
            assert all(dkimpy_says(mail, keys.records))


async def test_a_changed_file_counts_and_a_broken_one_leaves_the_last_good_one(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mailerq.outbound import signer

    monkeypatch.setattr(signer, "CHECK_SECONDS", 0.0)
    keys.add("example.com", "s1")
    text = '[[key]]\ndomain = "example.com"\nfrom = "*.example.com"\n'
    path = keys.directory.parent / "dkim.toml"
    body = MAILS["plain"].replace(b"@example", b"@news.example")
    async with open_signing(keys, file=text) as (bench, _):
        for content, count in ((text, 1), ("[[key]]\n", 1), (text.replace("*.", "x."), 0)):
            path.write_text(content)
            bench.peer.mails.clear()
            bench.queues.queues["success"].clear()
            put(bench, body)
            (mail,) = await sent(bench)
            assert len(signatures(mail)) == count, content
    assert "dkim-file stays as it was" in caplog.text


async def test_more_signatures_than_the_loop_may_make_go_to_a_thread(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mailerq.outbound import signer

    monkeypatch.setattr(signer, "QUICK_SHARE", 0.0)
    keys.add("example.com", "s1")
    async with open_signing(keys) as (bench, _):
        for number in range(30):
            put(bench, MAILS["plain"], recipient=f"{number}@d.test")
        mails = await sent(bench, 30)
    assert all(dkimpy_says(mail, keys.records) == [True] for mail in mails)


async def test_a_signature_whose_task_is_cancelled_keeps_no_other_waiting() -> None:
    from mailerq.outbound.signer import Signatures
    from mailerq.store.signing_keys import SigningKey

    made, key = Signatures(), SigningKey(rsa_pem())
    made._spent = made._began = float("inf")  # never in the loop
    done: list[bytes] = []

    async def sign(number: int) -> None:
        done.extend(await made.make([(key, b"%d" % number)]))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            nursery.start_soon(sign, 1)
            await made.make([(key, b"cancelled")])
        nursery.start_soon(sign, 2)
    assert set(done) == {key.sign(b"1"), key.sign(b"2")}


async def test_mail_costs_no_signature_while_nothing_is_configured() -> None:
    async with open_bench() as bench:
        put(bench, MAILS["plain"])
        assert await sent(bench) == [MAILS["plain"]]


async def test_a_trace_is_told_the_keys_that_sign(keys: Keys) -> None:
    keys.add("example.com", "s1")
    notes: list[str] = []

    class Tap:
        def note(self, text: str) -> None:
            notes.append(text)

    class Job:
        message = Message({}, MAILS["plain"])
        made = None
        unmade = message.body

    live = Live(Config(dkim_directory=str(keys.directory)))
    signing = Signing(Signer(live))
    job: Any = Job()
    tap: Any = Tap()
    assert await signing.prepare(job, MAILS["plain"]) is None
    await signing.sign(job, MAILS["plain"], MAILS["plain"], False, tap)
    assert notes == ["signed by d=example.com s=s1 a=rsa-sha256"]


def test_documents_for_results_have_no_private_key() -> None:
    key = {"domain": "a.test", "selector": "s", "key": "secret"}
    for wish in (key, [key, key], "secret", ["secret"], None):
        shown = without_password({"recipient": "a@b.test", "dkim": wish})
        assert "secret" not in str(shown)
    assert without_password({"dkim": [key]})["dkim"] == [{"domain": "a.test", "selector": "s"}]
    assert "secret" not in repr(Message({"dkim": [key]}))


def test_a_document_with_a_bad_key_is_refused_at_the_door() -> None:
    message = Message({"recipient": "a@b.test", "dkim": {"domain": "a.test"}}, b"x\r\n")
    (problem,) = problems(message, Config(), now=0.0)
    assert problem.startswith("property dkim: expected an object or an array")
    key = {"domain": "a.test", "selector": "a b", "key": "x"}
    message = Message({"recipient": "a@b.test", "dkim": key}, b"x\r\n")
    (problem,) = problems(message, Config(), now=0.0)
    assert problem == "property dkim: 'a b' is not a selector"
