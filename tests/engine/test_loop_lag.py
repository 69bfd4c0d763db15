"""Under any input no turn of the loop takes long, and no mail takes more memory than its size.

Clients and peers are threads with sockets of their own. The loop is measured in processor time of
its thread, so that other work of the machine does not count.
"""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep, thread_time
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.errors import MessageError
from mailerq.message import Message
from mailerq.queues import Publication
from tests.engine import lag_kit as kit
from tests.engine.lag_kit import Meter, no_turn_above
from tests.support import configure, until

LONGEST_TURN = 0.1
"""Seconds. What is promised is half of it: two threads that share a core take twice as long."""

MB = 1 << 20
HEADER = b"Subject: x\r\n"
RELAYED = {"smarthost": "127.0.0.1"}


def repeated(unit: bytes, size: int, before: bytes = HEADER + b"\r\n", after: bytes = b"") -> Any:
    """A mail of about `size` bytes, without holding it."""

    def pieces() -> Iterator[bytes]:
        yield before
        count = size // len(unit)
        most = max(1, (1 << 16) // len(unit))
        block = most * unit
        for _ in range(count // most):
            yield block
        yield count % most * unit + after

    return pieces


END = b"\r\n\r\nhi\r\n"
PART = b"--b\r\nContent-Type: text/plain\r\n\r\n\r\n"

MAILS: dict[str, tuple[Any, bytes]] = {
    "blanks in a folded field": (repeated(b" ", 100_000, b"Subject: x\r\n y", b"z" + END), b"250"),
    "blanks in an x-mq field": (
        repeated(b" ", 40_000, b"x-mq-tag: x", b"\r\n y" + END),
        b"552 5.3.4",
    ),
    "blanks in a short x-mq field": (
        repeated(b" ", 8000, b"x-mq-tag: x", b"\r\n y" + END),
        b"250",
    ),
    "blanks before a colon": (repeated(b" ", 900_000, b"To: a\r\nReceived", b": x" + END), b"250"),
    "folds": (repeated(b"\r\n ", 900_000, b"Subject: x", b"y" + END), b"250"),
    "folds in an x-mq field": (repeated(b"\n ", 5000, b"x-mq-tag:", b"y" + END), b"250"),
    "a line without a colon": (repeated(b"x", 80 * MB, b""), b"250"),
    "a field without an end": (repeated(b"x", 20 * MB, b"x:"), b"552 5.3.4"),
    "a million fields": (repeated(b"a: b\r\n", 6 * MB, b"", b"\r\nhi"), b"552 5.3.4"),
    "the most fields": (repeated(b"a:\r\n", MB - 99, b"x-mq-tag: a\r\n", b"\r\nhi"), b"250"),
    "fields that end with LF": (repeated(b"a:\n", 700_000, b"x-mq-tag: a\n", b"\nhi"), b"250"),
    "fields that end with CR": (repeated(b"a:\r", 700_000, b"x-mq-tag: a\r", b"\rhi"), b"250"),
    "bad x-mq fields": (repeated(b"x-mq-: a\r\n", MB - 99, b"", b"\r\nhi"), b"552 5.3.4"),
    "x-mq lines that are no fields": (repeated(b"x-mq-\r\n", MB - 99, HEADER, b"\r\nhi"), b"250"),
    "Received lines": (repeated(b"Received:\r\n", MB - 99, b"", b"\r\nhi"), b"554 5.4.6"),
    "Received lines that are no fields": (
        repeated(b"Received\r\n", MB - 99, HEADER, b"\r\nhi"),
        b"250",
    ),
    "10,000 MIME parts": (
        repeated(PART, 10_000 * len(PART), b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"),
        b"250",
    ),
    "only LF": (repeated(b"\n", 20 * MB), b"250"),
    "only CR": (repeated(b"\r", 20 * MB), b"250"),
    "only dots": (repeated(b"..\r\n", 20 * MB), b"250"),
    "dots behind LF": (repeated(b"\n.", 20 * MB), b"250"),
    "8-bit text": (repeated(76 * b"\xe9" + b"\r\n", 80 * MB), b"250"),
    "text": (repeated(76 * b"x" + b"\r\n", 95 * MB), b"250"),
}
"""What is sent, and how the reply begins."""


async def pass_through(
    tmp_path: Path,
    pieces: Any,
    expected: bytes,
    *,
    recipients: int = 1,
    eight_bit: bool = True,
    keep: bool = False,
    **settings: Any,
) -> Meter:
    """Send a mail in and, where it is taken, out again, and measure the loop meanwhile.

    `keep` holds the body until the end, so that no turn gives its memory back.
    """
    kept: list[Any] = []
    with kit.Peer(eight_bit=eight_bit) as peer:
        config = configure(tmp_path, **RELAYED, smarthost_port=peer.port, **settings)
        engine = Engine(config)
        if keep:
            engine.on("message", lambda _, message: kept.append(message.body))
            # What is sent has been read from the queue, which keeps no body of this size.
            engine.on("out_data", lambda _, sent, stored: kept.extend((sent.body, stored.body)))
        async with engine:
            with kit.meter() as meter:
                reply = await trio.to_thread.run_sync(
                    lambda: kit.mail(engine.addresses[0], pieces(), recipients=recipients)
                )
                assert reply.startswith(expected)
                if expected.startswith(b"250"):
                    await until(lambda: peer.taken == recipients)
    return meter


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", MAILS)
async def test_a_mail_that_was_made_to_be_slow_stops_nobody(tmp_path: Path, name: str) -> Meter:
    return await pass_through(tmp_path, *MAILS[name])


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", ["a line without a colon", "only LF", "8-bit text", "text"])
async def test_a_large_mail_in_memory_stops_nobody(tmp_path: Path, name: str) -> Meter:
    return await pass_through(tmp_path, *MAILS[name], smtp_spill_size=0)


@no_turn_above(LONGEST_TURN / 2)
@pytest.mark.parametrize("name", ["8-bit text", "text"])
async def test_a_mail_of_half_a_gigabyte_stops_nobody(tmp_path: Path, name: str) -> Meter:
    """Whatever looks at all of it in one turn takes longer than that.

    Freeing the body is left out: one turn, in which the kernel needs 30 to 110 ms for the pages.
    """
    unit = {"8-bit text": 76 * b"\xe9" + b"\r\n", "text": 76 * b"x" + b"\r\n"}[name]
    settings = {"smtp_spill_size": 0, "smtp_maxsize": 1 << 30}
    return await pass_through(tmp_path, repeated(unit, 512 * MB), b"250", keep=True, **settings)


REPORT = b"Content-Type: multipart/report; boundary=b\r\n"
STATUS = b"Content-Type: message/delivery-status\r\n"
TLS_REPORT = b"Content-Type: application/tlsrpt+"

REPORTS: dict[str, Any] = {
    "10,000 parts": repeated(PART, 10_000 * len(PART), REPORT + b"\r\n"),
    "depth 1,000": lambda: [
        b"Content-Type: multipart/report; boundary=b%d\r\n\r\n--b%d\r\n" % (depth, depth)
        for depth in range(1000)
    ],
    "fields": repeated(b"a:\r\n", MB - 200, REPORT, b"\r\nhi"),
    "a folded field": repeated(b"\r\n x", MB - 200, b"Subject: x\r\n" + REPORT[:-2], END),
    "recipients": repeated(b"Action: failed\r\n\r\n", 20 * MB, STATUS + b"\r\n"),
    "a diagnostic": repeated(b"x@", 20 * MB, STATUS + b"\r\nAction: failed\r\nDiagnostic-Code: "),
    "base64": repeated(b"=A\xff", 20 * MB, STATUS + b"Content-Transfer-Encoding: base64\r\n\r\n"),
    "a bomb": lambda: [TLS_REPORT + b"gzip\r\n\r\n", gzip.compress(bytes(200 * MB))],
    "policies": repeated(b"{},", MB // 3, TLS_REPORT + b'json\r\n\r\n{"policies":[', b"{}]}"),
    "a text of addresses": repeated(
        b"<a@b.test>:\r\n", 20 * MB, b"Subject: failure notice\r\n\r\nunable to deliver\r\n"
    ),
    "text": repeated(76 * b"x" + b"\r\n", 95 * MB, REPORT + b"\r\n"),
}
"""Mails that may be reports."""


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", REPORTS)
async def test_a_report_that_was_made_to_be_slow_stops_nobody(tmp_path: Path, name: str) -> Meter:
    config = configure(
        tmp_path,
        rabbitmq_reports="reports",
        rabbitmq_local="local",
        smtp_local_domains=("d.test",),
    )
    async with Engine(config) as engine:
        with kit.meter() as meter:
            reply = await trio.to_thread.run_sync(
                lambda: kit.mail(engine.addresses[0], REPORTS[name](), sender=b"")
            )
            assert reply.startswith(b"250")
    return meter


@no_turn_above(LONGEST_TURN)
async def test_a_report_to_many_recipients_stops_nobody(tmp_path: Path) -> Meter:
    config = configure(
        tmp_path,
        rabbitmq_reports="reports",
        rabbitmq_local="local",
        smtp_local_domains=("d.test",),
    )
    group = b"Action: failed\r\nFinal-Recipient: rfc822; %d@b.test\r\nStatus: 5.1.1\r\n\r\n"
    mime = STATUS + b"\r\n" + b"".join(group % number for number in range(100))
    async with Engine(config) as engine:
        with kit.meter() as meter:
            reply = await trio.to_thread.run_sync(
                lambda: kit.mail(engine.addresses[0], [mime], sender=b"", recipients=1000)
            )
        assert reply.startswith(b"250")
        assert engine.statistics()["incoming"]["reports"] == 1000
    return meter


@no_turn_above(LONGEST_TURN)
async def test_many_short_reports_stop_nobody(tmp_path: Path) -> Meter:
    """They are read at once, in the turn in which they come."""
    config = configure(
        tmp_path,
        rabbitmq_reports="reports",
        rabbitmq_local="local",
        smtp_local_domains=("d.test",),
    )
    group = b"Action: failed\r\nFinal-Recipient: rfc822; a@b.test\r\nStatus: 5.1.1\r\n\r\n"
    mime = STATUS + b"\r\nReporting-MTA: dns; mx.test\r\n\r\n" + 80 * group
    async with Engine(config) as engine:
        with kit.meter() as meter:
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(
                        trio.to_thread.run_sync,
                        lambda: kit.mail(engine.addresses[0], [mime], sender=b""),
                    )
        assert engine.statistics()["incoming"]["reports"] == 20
    return meter


CONVERTED: dict[str, Any] = {
    "text": MAILS["8-bit text"][0],
    "many parts": repeated(
        PART + b"\xe9\r\n",
        9_000 * (len(PART) + 3),
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n",
    ),
    "quoted-printable with 8-bit bytes": repeated(
        76 * b"\xe9" + b"\r\n",
        40 * MB,
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n",
    ),
    "words": repeated(b"\xe9 x ", 100_000, b"Subject: ", b"\r\n\r\nhi"),
}
"""Mails with 8-bit bytes, for a peer that cannot take them."""


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", CONVERTED)
async def test_a_mail_that_is_converted_stops_nobody(tmp_path: Path, name: str) -> Meter:
    return await pass_through(tmp_path, CONVERTED[name], b"250", eight_bit=False)


@no_turn_above(LONGEST_TURN)
async def test_many_recipients_of_much_stop_nobody(tmp_path: Path) -> Meter:
    fields = 600 * b"x-mq-tag: a\r\n"
    return await pass_through(
        tmp_path, lambda: [fields, HEADER, b"\r\nhi"], b"250", recipients=1000
    )


MAIL = b"EHLO c.test\r\nMAIL FROM:<a@b.test>\r\n"
RCPT = MAIL + b"RCPT TO:<c@d.test>\r\n"

COMMANDS = {
    "RCPT": MAIL + 20_000 * b"RCPT TO:<c@d.test>\r\n",
    "quoted local parts": MAIL + 20_000 * b'RCPT TO:<"\\\\a b\\""@d.test>\r\n',
    "xtext": MAIL + 3000 * (b"RCPT TO:<c@d.test> ORCPT=rfc822;" + 160 * b"+41" + b"\r\n"),
    "a source route": b"EHLO c.test\r\nMAIL FROM:<" + 900 * b"@a," + b"@a:a@b.test>\r\n",
    "a domain of combining characters": MAIL + b"RCPT TO:<c@" + 100 * b"\xcc\x81" + b".test>\r\n",
    "parameters": b"EHLO c.test\r\nMAIL FROM:<a@b.test>" + 1000 * b" A=b" + b"\r\n",
    "chunks of one byte": RCPT + 40_000 * b"BDAT 1\r\nx",
    "chunks without a byte": RCPT + 40_000 * b"BDAT 0\r\n",
    "empty lines": 100_000 * b"\n",
    "a line without an end": 2 * MB * b"x",
    "base64 of AUTH": b"EHLO c.test\r\nAUTH PLAIN\r\n" + 12_000 * b"A" + b"\r\n",
    "base64 without an end": b"EHLO c.test\r\nAUTH PLAIN\r\n" + 2 * MB * b"A",
}


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", COMMANDS)
async def test_commands_that_were_made_to_be_slow_stop_nobody(tmp_path: Path, name: str) -> Meter:
    config = configure(
        tmp_path, rabbitmq_inbox="inbox", smtp_username="ann", smtp_password="secret"
    )
    async with Engine(config) as engine:
        with kit.meter() as meter:
            said = await trio.to_thread.run_sync(
                lambda: kit.say(engine.addresses[0], [COMMANDS[name]])
            )
        assert said.startswith(b"220")
        assert engine.statistics()["incoming"]["open"] == 0
    return meter


LONG = b"".join(b"250-K%d %s\r\n" % (number, 2000 * b"x") for number in range(120)) + b"250 ok\r\n"
CONTROLS = 126 * (b"550-" + 1000 * b"\x1b\xff" + b"\r\n") + b"550 no\r\n"
STATUSES = 126 * (b"550-5.1.1 " + 300 * b"5.1.1 " + b"\r\n") + b"550 no\r\n"

REPLIES: dict[str, tuple[bytes, ...]] = {
    "a banner without an end": (3 * MB * b"2",),
    "a banner of blanks": (b"220 " + 2000 * b" " + b"\r\n", b"550 no\r\n", b"550 no\r\n"),
    "a million lines": (b"220 mx\r\n", 1_000_000 * b"250-A\r\n"),
    "a million replies": (b"220 mx\r\n", 1_000_000 * b"250 A\r\n"),
    "long replies": (b"220 mx\r\n", LONG, LONG, LONG.replace(b"250", b"550")),
    "control characters": (b"220 mx\r\n", b"250 mx\r\n", CONTROLS),
    "status codes": (b"220 mx\r\n", b"250 mx\r\n", STATUSES),
    "bytes one by one": (b"220 mx\r\n", *(b"%c" % byte for byte in LONG[:20_000])),
}
"""What a peer says: the first before the first command, each of the others after some input."""


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", REPLIES)
async def test_replies_that_were_made_to_be_slow_stop_nobody(tmp_path: Path, name: str) -> Meter:
    first, *others = REPLIES[name]
    with kit.Peer(lambda connection: kit.reply_with(connection, first, others)) as peer:
        settings = {**RELAYED, "smarthost_port": peer.port, "rabbitmq_results": "results"}
        async with Engine(configure(tmp_path, **settings)) as engine:
            with kit.meter() as meter:
                await engine.publish(
                    {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "hi", "retries": [9]}
                )
                await until(lambda: bool(engine.statistics()["outgoing"]["attempts"]))
    return meter


BASE: dict[str, Any] = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "Subject: x"}

DOCUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "tags": ({"tags": 200_000 * ["a"]}, "sent"),
    "retries": ({"retries": 300_000 * [1]}, "sent"),
    "objects": ({"data": {"a": 200_000 * [{}]}}, "sent"),
    "names": ({f"k{number}": 0 for number in range(80_000)}, "sent"),
    "queues": ({"queues": {f"q{number}": None for number in range(60_000)}}, "sent"),
    "results": ({"results": 80_000 * [{"a": 1}]}, "sent"),
    "a template": (
        {"data": {"l": 5000 * [1]}, "mime": "\r\n{foreach $x in $l}{foreach $y in $l}{$x|upper}"},
        "sent",
    ),
    "loops": (
        {
            "data": {"l": 900 * [1]},
            "mime": "\r\n" + 9 * "{foreach $l as $x}" + "{$x|upper}" + 9 * "{/foreach}",
        },
        "sent",
    ),
    "tags of templates": ({"data": {}, "mime": "\r\n" + 300_000 * "{$x}"}, "sent"),
    "a short text of tags": ({"data": {}, "mime": "\r\n" + 7000 * "{$x}"}, "sent"),
    "an attachment": (
        {"mime": {"text": 200_000 * "\n", "attachments": [{"data": 100_000 * "AAAA"}]}},
        "sent",
    ),
    "edits of the header": (
        {
            "headers": {"replace": {f"a{number}": 500 * "é" for number in range(250)}},
            "mime": 200_000 * "a: b\r\n" + "\r\nhi",
        },
        "sent",
    ),
    "a recipient": ({"recipient": 900_000 * "@"}, "refused"),
    "a quoted envelope": ({"envelope": '"' + 300_000 * "\\a" + '"@d.test'}, "refused"),
    "a time": ({"delayed": 900_000 * "1"}, "refused"),
    "a smarthost": ({"smarthost": {"hostname": 400_000 * "x.", "port": 200_000 * "9"}}, "refused"),
    "too many tags": ({"tags": 2_000_000 * ["a"]}, "too big"),
    "too many names": ({f"k{number}": 0 for number in range(200_000)}, "too big"),
}
"""What a document has more than others, and what becomes of it when it is published."""


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", DOCUMENTS)
async def test_documents_that_were_made_to_be_slow_stop_nobody(tmp_path: Path, name: str) -> Meter:
    more, fate = DOCUMENTS[name]
    data = kit.document({**BASE, **more})
    with kit.Peer() as peer:
        config = configure(tmp_path, **RELAYED, smarthost_port=peer.port)
        async with Engine(config) as engine:
            with kit.meter() as meter:
                if fate == "sent":
                    await engine.publish(data)
                else:
                    words = "property" if fate == "refused" else "beside its body"
                    with pytest.raises(MessageError, match=words):
                        await engine.publish(data)
                    await trio.lowlevel.checkpoint()
                if fate == "refused":  # and so it is when another program has left it in the queue
                    message = Message.from_json(data)
                    await engine.queues.publish([Publication("outbox", message)])
                if fate != "too big":
                    await until(lambda: bool(engine.statistics()["outgoing"]["attempts"]))
    return meter


RETURNED: dict[str, tuple[bytes, int]] = {
    "long headers": (9_000 * b"subject: x\r\n" + 900_000 * b"x" + b"\r\n\r\n", 60),
    "words": (b"Subject: " + 100_000 * b"=?utf-8?q?a?= " + b"\r\n\r\n", 60),
    "languages": (b"Accept-Language: " + 300_000 * b"a-b," + b"\r\n\r\n", 60),
    "8-bit text": (b"Subject: x\r\n\r\n" + 600 * (76 * b"\xe9" + b"\r\n"), 300),
    "parts": (
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + 900 * (PART + b"\xe9\r\n"), 60,
    ),
    "short mail": (b"Subject: x\r\n\r\nhi", 3000),
}  # fmt: skip
"""A mail that comes back to its sender, and how often."""


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("name", RETURNED)
async def test_mails_that_come_back_stop_nobody(tmp_path: Path, name: str) -> Meter:
    body, count = RETURNED[name]
    more = {"dsn": {"ret": "FULL"}, "maxdelivertime": "2020-01-01 00:00:00"}
    mails = [
        Publication(
            "outbox", Message({**BASE, "envelope": f"a{n}@b.test", **more}, body + b"%d" % n)
        )
        for n in range(count)
    ]
    for mail in mails:
        del mail.message.properties["mime"]
    async with Engine(configure(tmp_path, rabbitmq_dsn="dsn")) as engine:
        with kit.meter() as meter:
            await engine.queues.publish(mails)
            await until(lambda: engine.statistics()["outgoing"]["reports"] == count)
    return meter


@no_turn_above(LONGEST_TURN)
async def test_a_large_body_that_a_program_publishes_stops_nobody(tmp_path: Path) -> Meter:
    """In a dict, where it need not be decoded."""
    body = HEADER + b"\r\n" + 95 * MB // 78 * (76 * b"x" + b"\r\n")
    with kit.Peer() as peer:
        config = configure(tmp_path, **RELAYED, smarthost_port=peer.port)
        async with Engine(config) as engine:
            with kit.meter() as meter:
                await engine.publish({**BASE, "mime": body})
                await until(lambda: peer.taken == 1)
    return meter


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("data", [100_000 * "[", "{" + 100_000 * '"a":{', 10 * MB * " "])
async def test_a_document_that_is_none_stops_nobody(tmp_path: Path, data: str) -> Meter:
    async with Engine(configure(tmp_path)) as engine:
        with kit.meter() as meter:
            with pytest.raises(MessageError):
                await engine.publish(data)
            await trio.lowlevel.checkpoint()
    return meter


# Memory.


def anonymous() -> int:
    """Bytes of this process that no file could give back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    pytest.skip("this kernel does not say what memory is anonymous")


@contextmanager
def peak() -> Iterator[list[int]]:
    """How much more there was at a time than before, in the first element."""
    before, most, over = anonymous(), [0], threading.Event()

    def look() -> None:
        while not over.is_set():
            most[0] = max(most[0], anonymous() - before)
            sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize(
    ("unit", "kept"),
    [(76 * b"x" + b"\r\n", 1.0), (b"\n", 2.0), (b"..x\r\n", 0.8)],
    ids=["text", "LF", "dots"],
)
async def test_a_large_mail_is_in_memory_once(tmp_path: Path, unit: bytes, kept: float) -> None:
    """What is kept of it has other line ends and dots than what came."""
    size = 40 * MB
    small = repeated(b"x\r\n", 2 * MB)
    with kit.Peer() as peer:
        config = configure(tmp_path, **RELAYED, smarthost_port=peer.port)
        async with Engine(config) as engine:

            async def deliver(pieces: Any) -> None:
                taken = peer.taken
                reply = await trio.to_thread.run_sync(
                    lambda: kit.mail(engine.addresses[0], pieces())
                )
                assert reply.startswith(b"250")
                await until(lambda: peer.taken > taken)

            await deliver(small)  # buffers and caches that stay
            with peak() as most:
                await deliver(repeated(unit, size))
    assert most[0] < kept * size + 12 * MB


def test_the_meter_sees_a_turn_that_takes_long() -> None:
    async def main() -> float:
        with kit.meter() as meter:
            await trio.lowlevel.checkpoint()
            end = thread_time() + 2 * LONGEST_TURN
            while thread_time() < end:
                os.getpid()
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        return meter.longest

    assert trio.run(main) > LONGEST_TURN


@pytest.mark.parametrize(
    ("turns", "runs"),
    [([0.04], 1), ([0.06, 0.04], 2), ([0.06, 0.07, 0.04], 3), ([0.06, 0.07, 0.05], None)],
)
async def test_a_turn_is_too_long_if_it_is_so_in_each_run(
    tmp_path: Path, turns: list[float], runs: int | None
) -> None:
    directories: list[Path] = []

    @no_turn_above(0.05)
    async def run(tmp_path: Path) -> Meter:
        assert not list(tmp_path.iterdir())
        meter = Meter()
        meter.longest = turns[len(directories)]
        directories.append(tmp_path)
        return meter

    if runs is None:
        with pytest.raises(AssertionError, match=r"0\.06, 0\.07, 0\.05\] s, allowed are 0\.05 s"):
            await run(tmp_path=tmp_path)
    else:
        await run(tmp_path=tmp_path)
    assert len(set(directories)) == len(turns)
