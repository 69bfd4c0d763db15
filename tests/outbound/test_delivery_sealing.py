"""ARC seals of mail that goes on, before dkimpy, and chains that came in."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dkim
import pytest

from mailerq.config import Config
from mailerq.mail.arc import MAX_SETS, read_chain
from mailerq.mail.dkim import HeaderFields
from mailerq.message import Message
from mailerq.net.resolver import Resolver
from tests.net.dns_server import DnsServer, open_dns_server
from tests.outbound.kit import Bench, open_bench
from tests.signing_kit import Keys, dkimpy_says, ed25519_pem, rsa_pem

MAIL = (
    b"Received: from x by y\r\nFrom: Ann <ann@a.test>\r\nTo: list@b.test\r\nSubject: hi\r\n"
    b"Date: Thu, 26 Nov 2026 12:00:00 +0000\r\n\r\nhello  world \r\n\r\n"
)
CAME = {"connection": {"remote-ip": "192.0.2.1"}}


@asynccontextmanager
async def open_sealing(
    keys: Keys, *, more: str = "", dns_timeout: float = 30.0, **settings: Any
) -> AsyncIterator[tuple[Bench, DnsServer]]:
    """A relay with a key for ARC, and a DNS server that the relay asks."""
    path = keys.directory.parent / "dkim.toml"
    path.write_text(
        f'[[key]]\ndomain = "relay.test"\nselector = "arc"\nfile = "{keys.directory}/relay.test/arc'
        f'.pem"\nfrom = "*"\nprotocols = ["arc"]\n{more}'
    )
    settings = {"dkim_file": str(path), "arc_seal": True, **settings}
    async with open_dns_server(keys.zone) as server, open_bench(**settings) as bench:
        config = Config(dns_servers=(server.address,), dns_timeout=dns_timeout, dns_attempts=1)
        bench.dispatcher.signer.chains.resolver = Resolver(config)
        yield bench, server


async def passed_on(bench: Bench, mail: bytes, **more: Any) -> bytes:
    bench.peer.mails.clear()
    bench.queues.queues["success"].clear()
    message = Message({"envelope": "a@a.test", "recipient": "c@d.test", **CAME, **more}, mail)
    bench.queues.put(message)
    bench.queues.touch()
    await bench.results("success")
    (sent,) = bench.peer.mails
    return sent.body


def verdict(mail: bytes, keys: Keys) -> str:
    """What dkimpy says of the chain of a mail."""

    def look_up(name: bytes, timeout: float = 5) -> bytes | None:
        record = keys.records.get(name.decode().rstrip("."))
        return None if record is None else record.encode()

    found, _, reason = dkim.ARC(mail).verify(dnsfunc=look_up)
    return {b"pass": "pass", b"none": "none"}.get(found, f"fail: {reason}")


def sealed_by_dkimpy(
    mail: bytes, keys: Keys, domain: str = "list.test", verdict: bytes = b"none"
) -> bytes:
    keys.publish(domain, "k", rsa_pem(3))
    found = b"Authentication-Results: list.test; arc=" + verdict + b"\r\n" + mail
    signed = [b"from", b"to", b"subject"]
    fields = dkim.arc_sign(
        found, b"k", domain.encode(), rsa_pem(3), b"list.test", include_headers=signed
    )
    assert fields
    return b"".join(fields) + mail


def cv(mail: bytes) -> list[bytes]:
    """The verdicts of the seals, the last one first."""
    return [each.seal_tags["cv"] for each in reversed(read_chain(HeaderFields(mail)).sets)]


async def test_a_mail_that_goes_on_is_sealed_and_dkimpy_takes_the_seal(keys: Keys) -> None:
    keys.add("relay.test", "arc")
    async with open_sealing(keys) as (bench, _):
        sent = await passed_on(bench, MAIL)
    assert sent.endswith(MAIL) and sent.startswith(b"ARC-Seal: i=1;")
    assert b"ARC-Authentication-Results: i=1; me.test;\r\n\tarc=none\r\n" in sent
    assert verdict(sent, keys) == "pass" and cv(sent) == [b"none"]
    assert verdict(sent.replace(b"hello", b"hollo"), keys).startswith("fail")


async def test_seal_follows_seal(keys: Keys) -> None:
    keys.add("relay.test", "arc")
    async with open_sealing(keys) as (bench, server):
        mail = await passed_on(bench, sealed_by_dkimpy(MAIL, keys))
        assert cv(mail) == [b"pass", b"none"] and verdict(mail, keys) == "pass"
        for count in (3, 4):
            mail = await passed_on(bench, mail)
            assert cv(mail) == [b"pass"] * (count - 1) + [b"none"]
            assert verdict(mail, keys) == "pass"
        assert server.questions["k._domainkey.list.test", "TXT"] == 1, "records are kept"
    mail = sealed_by_dkimpy(mail, keys, "other.test", b"pass")
    assert verdict(mail, keys) == "pass"


async def test_a_signature_and_a_seal_stand_together(keys: Keys) -> None:
    keys.add("relay.test", "arc", ed25519_pem())
    path = keys.add("a.test", "s1")
    more = f'[[key]]\ndomain = "a.test"\nselector = "s1"\nfile = "{path}"\n'
    async with open_sealing(keys, more=more) as (bench, _):
        sent = await passed_on(bench, MAIL)
        size = f"SIZE={len(sent)}"
        announced = [line for line in bench.peer.commands if line.startswith("MAIL")][-1]
    assert dkimpy_says(sent, keys.records) == [True]
    (seal,) = read_chain(HeaderFields(sent)).sets
    assert b"dkim-signature" in seal.message_tags["h"]
    told = int(announced.partition("SIZE=")[2].split()[0])
    assert len(sent) <= told < len(sent) + 1000, (size, announced)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"hello", b"hollo"),
        (b"Subject: hi", b"Subject: ho"),
        (b"cv=none", b"cv=pass"),
        (b"cv=none", b"cv=fail"),
        (b"ARC-Seal: i=1", b"ARC-Seal: i=2"),
        (b"ARC-Seal", b"X-Seal"),
        (b"arc=none", b"arc=fail"),
        (b"ARC-Message-Signature: i=1", b"ARC-Message-Signature: i=1; i=2"),
    ],
)
async def test_a_broken_chain_is_sealed_as_broken_and_once(
    old: bytes, new: bytes, keys: Keys
) -> None:
    keys.add("relay.test", "arc")
    mail = sealed_by_dkimpy(MAIL, keys)
    assert old in mail
    broken = mail.replace(old, new, 1)
    async with open_sealing(keys) as (bench, _):
        sent = await passed_on(bench, broken)
        assert verdict(sent, keys).startswith("fail")
        if old == b"cv=none" and new == b"cv=fail":
            assert sent == broken, "a chain that has ended is not sealed"
            return
        assert sent != broken and b"cv=fail" in sent
        chain = read_chain(HeaderFields(sent))
        again = await passed_on(bench, sent)
        assert (again == sent) is chain.ended


async def test_a_chain_is_not_sealed_while_the_name_servers_do_not_answer(keys: Keys) -> None:
    keys.add("relay.test", "arc")
    mail = sealed_by_dkimpy(MAIL, keys)
    async with open_sealing(keys, dns_timeout=2.0) as (bench, server):
        server.zone = lambda name, kind: None
        assert await passed_on(bench, mail) == mail
        server.zone = keys.zone
        assert cv(await passed_on(bench, mail)) == [b"pass", b"none"]


async def test_mail_that_was_not_received_from_others_is_not_sealed(keys: Keys) -> None:
    keys.add("relay.test", "arc")
    async with open_sealing(keys) as (bench, _):
        for connection in (None, {"user": "ann"}):
            assert await passed_on(bench, MAIL, connection=connection) == MAIL
    async with open_sealing(keys, arc_seal=False) as (bench, _):
        assert await passed_on(bench, MAIL) == MAIL


def test_a_chain_has_at_most_fifty_sets() -> None:
    names = (b"ARC-Seal", b"ARC-Message-Signature", b"ARC-Authentication-Results")

    def chain(count: int) -> bytes:
        mail = MAIL
        for number in range(1, count + 1):
            found = b"pass" if number > 1 else b"none"
            mail = b"".join(b"%b: i=%d; cv=%b\r\n" % (n, number, found) for n in names) + mail
        return mail

    assert not read_chain(HeaderFields(chain(MAX_SETS))).problem
    assert "more than 50" in read_chain(HeaderFields(chain(MAX_SETS + 1))).problem
    assert read_chain(HeaderFields(chain(3).replace(b"i=2", b"i=4"))).problem


def test_a_chain_of_strange_length_is_read_in_no_time() -> None:
    many = b"ARC-Seal: i=1; " + b"a;" * 300_000 + b"\r\n"
    mail = many + b"ARC-Seal: i=" + b"9" * 300_000 + b"\r\n" + MAIL
    began = time.process_time()
    assert read_chain(HeaderFields(mail)).problem
    assert time.process_time() - began < 1
