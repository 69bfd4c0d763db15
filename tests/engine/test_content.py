"""The content of mail in the whole engine: where it ends, where it waits, and who sees it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import plugins as plugins_module
from mailerq.inbound import spool as memory
from mailerq.inbound.services import LOADERS
from mailerq.mail.headers import HOP_LIMIT
from mailerq.plugins import Reject
from mailerq.queues import Publication
from tests.engine.kit import Dialog, converse, inbox, open_dialog, serve
from tests.support import compile_plugin, memory_of, until, without_received

LINE = 76 * b"x" + b"\r\n"
HEADER = b"Subject: large\r\nMessage-ID: <1@b.test>\r\n\r\n"

# Framing.


@pytest.mark.parametrize(
    "end",
    [
        b"\n.\n",
        b"\n.\r\n",
        b"\r\n.\n",
        b"\r.\r",
        b"\r.\r\n",
        b"\r\n.\r",
        b"\r\r\n.\r\r\n",
        b"\n.\r",
    ],
)
@pytest.mark.parametrize("policy", ["reject", "normalize"])
async def test_what_looks_like_an_end_smuggles_nothing(
    tmp_path: Path, end: bytes, policy: str
) -> None:
    """CVE-2023-51764, -51765, -51766, at every split around what looks like an end."""
    evil = b"MAIL FROM:<evil@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\nsecond\r\n.\r\n"
    sent = b"first" + end + evil
    taken = 0
    async with serve(tmp_path, smtp_bare_newline=policy) as engine:
        for cut in range(sent.index(end), sent.index(evil) + 6):
            async with open_dialog(engine.addresses[0]) as dialog:
                assert await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA") == [
                    250,
                    250,
                    354,
                ]
                await dialog.send(sent[:cut])
                await trio.lowlevel.checkpoint()
                await dialog.send(sent[cut:] + b"QUIT\r\n")
                codes = []
                while reply := await dialog.reply():
                    codes.append(reply[:3])
                assert codes == (["550", "221"] if policy == "reject" else ["250", "221"])
                taken += policy != "reject"
        messages = await inbox(engine, taken)
        assert [depth.total for depth in await engine.queues.depths()] in ([], [0])
    for message in messages:
        assert message.envelope == "a@b.test"
        assert message.body is not None
        assert message.body.count(b"\n") == message.body.count(b"\r\n")
        assert message.body.count(b"\r") == message.body.count(b"\r\n")
        assert b"MAIL FROM:<evil@b.test>" in message.body


async def test_bare_newlines_are_refused_or_made_pairs(tmp_path: Path) -> None:
    bare = b"Subject: x\r\n\r\none\ntwo\rthree\r\n"
    async with converse(tmp_path, smtp_bare_newline="reject") as dialog:
        assert (await dialog.mail("c@d.test", body=bare)).startswith("550 5.6.0")
    async with serve(tmp_path) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("c@d.test", body=bare)).startswith("250")
        (message,) = await inbox(engine)
    assert message.body is not None
    assert message.body.endswith(b"\r\n\r\none\r\ntwo\r\nthree\r\n")


@pytest.mark.parametrize("body", [b"", b"..x\r\n", b".\r\n", b"\r\n"])
async def test_dots_and_empty_bodies_arrive_exactly(tmp_path: Path, body: bytes) -> None:
    stuffed = b"".join(
        b"." + line if line.startswith(b".") else line for line in body.splitlines(keepends=True)
    )
    async with serve(tmp_path) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.mail("c@d.test", body=stuffed)).startswith("250")
            await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
            await dialog.send(b"BDAT %d LAST\r\n" % len(body) + body)
            assert (await dialog.reply()).startswith("250")
        first, second = await inbox(engine, 2)
    for message in (first, second):
        assert message.body is not None
        assert message.body.endswith(b"\r\n" + body)
        assert message.body.count(b".x") == body.count(b".x")


# Bounds.


async def test_a_line_without_end_is_not_kept(tmp_path: Path) -> None:
    async def flood(dialog: Dialog) -> None:
        for _ in range(1024):  # a gigabyte, if it were let in
            await dialog.send((1 << 20) * b"x")

    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        before = memory_of("self", "VmRSS")
        with pytest.raises(trio.BrokenResourceError):
            await flood(dialog)
        assert memory_of("self", "VmRSS") - before < 20 << 20
        async with open_dialog(engine.addresses[0]) as other:
            assert (await other.mail("c@d.test")).startswith("250")


async def test_a_mail_that_is_longer_than_it_said_or_may_be(tmp_path: Path) -> None:
    async with converse(tmp_path, smtp_maxsize=1000) as dialog:
        assert await dialog.codes("MAIL FROM:<a@b.test> SIZE=1001") == [552]
        await dialog.say("MAIL FROM:<a@b.test> SIZE=5", "RCPT TO:<c@d.test>", "DATA")
        await dialog.send(20 * LINE + b".\r\n")
        assert (await dialog.reply()).startswith("552 5.3.4")
        assert (await dialog.mail("c@d.test")).startswith("250")


async def test_a_mail_that_loops_is_refused(tmp_path: Path) -> None:
    async with converse(tmp_path) as dialog:
        for count, code in ((HOP_LIMIT - 1, "250"), (HOP_LIMIT, "554 5.4.6")):
            body = count * b"Received: by x.test; now\r\n" + b"\r\nhi\r\n"
            assert (await dialog.mail("c@d.test", body=body)).startswith(code)


async def test_a_header_without_end_is_refused_and_its_limit_is_for_headers_only(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            for count, code in ((170_000, "250"), (1_000_000, "552 5.3.4")):
                reply = await dialog.mail("c@d.test", body=count * b"A: b\r\n" + b"\r\nhi\r\n")
                assert reply.startswith(code)
            text = 3_000_000 * b"x" + b"\r\n"
            assert (await dialog.mail("c@d.test", body=text)).startswith("250")
        long, plain = await inbox(engine, 2)
    assert long.body is not None
    assert without_received(long.body).count(b"A: b\r\n") == 170_000
    assert plain.body is not None
    assert plain.body.endswith(b"\r\n\r\n" + text)


@pytest.mark.parametrize("large", [False, True])
async def test_what_is_refused_at_the_end_of_data_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, large: bool
) -> None:
    filler = 30_000 * LINE if large else b""
    settings = {"smtp_maxsize": 3_000_000, "smtp_bare_newline": "reject", "lmtp_port": (0,)}
    cases = {
        b"one\ntwo\r\n": "550 5.6.0 Message holds a bare CR or LF, lines end in CR LF",
        4_000_000 * b"x" + b"\r\n": "552 5.3.4 Message too big",
        HOP_LIMIT * b"Received: by x.test; now\r\n" + b"\r\nhi\r\n": "554 5.4.6 Too many Received",
        b"a: b\r\n" + 200_000 * b"a: b\r\n": "552 5.3.4 Header too big",
        b"Subject: spam\r\n\r\n": "550 5.7.1 no spam",
    }
    async with serve(tmp_path, **settings) as engine:
        engine.on("data", lambda connection, mime: no_spam(bytes(mime)))
        for address in engine.addresses:
            hello = "LHLO c.test" if address == engine.addresses[-1] else "EHLO c.test"
            async with open_dialog(address, hello=hello) as dialog:
                for body, reply in cases.items():
                    caplog.clear()
                    body += filler if body.startswith(b"Sub") else b""
                    assert (await dialog.mail("c@d.test", body=body)).startswith(reply)
                    await dialog.say("NOOP")
                    lines = [record.getMessage() for record in caplog.records]
                    (line,) = [line for line in lines if "refused" in line]
                    shown = "[127.0.0.1] (mail) from <a@b.test> to <c@d.test>"
                    assert line.startswith(f"refused: {shown} -> {reply}")
                caplog.clear()
                assert (await dialog.mail("c@d.test")).startswith("250")
                assert not [record for record in caplog.records if "refused" in record.getMessage()]
                assert (await dialog.mail("c@d.test", body=b"Close: me\r\n")).startswith("421")
                assert hello.startswith("LHLO") or await dialog.closed()
                assert f"refused: {shown} -> 421 4.7.0 go away" in caplog.messages


def no_spam(mime: bytes) -> Reject | None:
    if mime.startswith(b"Close:"):
        return Reject(421, "4.7.0 go away")
    return Reject(550, "5.7.1 no spam") if mime.startswith(b"Subject: spam") else None


async def test_recipients_without_end_get_452(tmp_path: Path) -> None:
    async with serve(tmp_path, smtp_maxrecipients=10) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.say("MAIL FROM:<a@b.test>")
            for _ in range(100):  # 100,000 in segments of a thousand
                await dialog.send(1000 * b"RCPT TO:<c@d.test>\r\n")
                codes = [(await dialog.reply())[:3] for _ in range(1000)]
                assert set(codes) <= {"250", "452"}
            assert (await dialog.say("DATA")).startswith("354")
            await dialog.send(b"hi\r\n.\r\n")
            assert (await dialog.reply()).startswith("250")
        assert len(await inbox(engine, 10)) == 10


# Large mail.


async def send_large(dialog: Dialog, lines: int) -> bytes:
    """A mail of so many lines, up to the reply to it."""
    assert await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA") == [
        250,
        250,
        354,
    ]
    await dialog.send(HEADER)
    for _ in range(lines // 1000):
        await dialog.send(1000 * LINE)
    await dialog.send(b"..dot\r\n.\r\n")
    assert (await dialog.reply()).startswith("250"), dialog.received
    return HEADER + lines // 1000 * 1000 * LINE + b".dot\r\n"


async def test_a_large_mail_waits_in_a_file_and_arrives_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    async with serve(tmp_path, smtp_spill_size=300_000) as engine:
        engine.on("data", lambda connection, mime: seen.append(type(mime)))
        async with open_dialog(engine.addresses[0]) as dialog:
            content = await send_large(dialog, 50_000)
            small = await dialog.mail("c@d.test")
            assert small.startswith("250")
        first, _ = await inbox(engine, 2)
        incoming = engine.statistics()["incoming"]
    assert first.body is not None
    assert without_received(first.body) == content
    assert seen == [memoryview, bytes]
    assert (incoming["spilled"], incoming["memory"]) == (1, 0)
    assert sorted(name for name in os.listdir(tmp_path / "queue") if "tmp" in name) == []


DIGEST = r"""
#include <mailerq.h>
#include <stdio.h>

MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size)
{
    (void)context;
    unsigned long sum = 0;
    for (size_t i = 0; i < size; ++i) sum = (sum * 31 + (unsigned char)mime[i]) % 1000000007UL;
    char text[80];
    snprintf(text, sizeof text, "%zu %lu %d", size, sum, mime[size]);
    MQ_Reject(connection, 550, text);
    return false;
}
"""


async def test_a_plugin_sees_a_large_mail_like_any_other(tmp_path: Path) -> None:
    compile_plugin(tmp_path / "plugins", "digest.c", DIGEST)
    content = HEADER + 6000 * LINE + b".dot\r\n"
    total = 0
    for byte in content:
        total = (total * 31 + byte) % 1_000_000_007
    expected = f"550 5.7.1 {len(content)} {total} 0"
    replies = []
    for spill in (0, 1000):
        settings = {"smtp_spill_size": spill, "plugin_directory": str(tmp_path / "plugins")}
        async with converse(tmp_path, **settings) as dialog:
            await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
            await dialog.send(HEADER + 6000 * LINE + b"..dot\r\n.\r\n")
            replies.append(await dialog.reply())
    assert replies == [expected, expected]


HOLDER = r"""
#include <mailerq.h>
#include <string.h>

static MQ_Context *kept[100];
static int count;

MQ_EXPORT int mq_version(void) { return MQ_API_VERSION; }

MQ_EXPORT bool mq_smtp_in_data(MQ_Context *context, MQ_SmtpConnection *connection,
                               const char *mime, size_t size)
{
    (void)connection; (void)size;
    if (!strstr(mime, "hold-data")) return false;
    kept[count++] = context;
    return true;
}

MQ_EXPORT bool mq_smtp_in_message(MQ_Context *context, MQ_SmtpConnection *connection,
                                  MQ_Message *message)
{
    (void)connection;
    if (strncmp(MQ_Recipient(message), "hold", 4)) return false;
    kept[count++] = context;
    return true;
}

MQ_EXPORT int kept_count(void) { return count; }
MQ_EXPORT void release(void) { while (count) MQ_Continue(kept[--count]); }
"""


@pytest.mark.parametrize("event", ["data", "message"])
async def test_large_mails_that_a_plugin_holds_do_not_hold_up_others(
    tmp_path: Path, event: str
) -> None:
    library = compile_plugin(tmp_path / "plugins", "holder.c", HOLDER)
    settings = {"smtp_spill_size": 1000, "plugin_directory": str(tmp_path / "plugins")}
    count = 3 * LOADERS
    text, recipient = b"hold-data\r\n", "c@d.test"
    if event == "message":
        text, recipient = b"x\r\n", "hold@d.test"

    async def hold(address: tuple[str, int]) -> None:
        async with open_dialog(address) as dialog:
            reply = await dialog.mail(recipient, body=HEADER + 5_000 * LINE + text)
            assert reply.startswith("250")

    async with serve(tmp_path, **settings) as engine:
        plugin = ctypes.CDLL(str(library))
        address = engine.addresses[0]
        async with open_dialog(address) as dialog, trio.open_nursery() as nursery:
            before = nameless_files(tmp_path / "queue")
            for _ in range(count):
                nursery.start_soon(hold, address)
            await until(lambda: plugin.kept_count() == count)
            # What is held takes no descriptors, and in the first event no memory.
            assert nameless_files(tmp_path / "queue") == before
            incoming = engine.statistics()["incoming"]
            assert (incoming["memory"] == 0) == (event == "data")
            assert incoming["held"] == incoming["memory"]
            reply = await dialog.mail("c@d.test", body=HEADER + 5_000 * LINE)
            assert reply.startswith("250")
            plugin.release()
        incoming = engine.statistics()["incoming"]
        assert incoming["memory"] == incoming["held"] == 0


async def test_all_recipients_of_a_mail_have_one_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins_module, "EACH_SECONDS", 0.01)
    monkeypatch.setattr(plugins_module, "MORE_SECONDS", 0.02)
    compile_plugin(tmp_path / "plugins", "holder.c", HOLDER)
    settings = {"plugin_directory": str(tmp_path / "plugins"), "plugin_timeout": 0.5}
    async with converse(tmp_path, **settings) as dialog:
        for _ in range(2):  # and the next mail has one of its own
            start = trio.current_time()
            recipients = [f"hold{number}@d.test" for number in range(10)]
            assert (await dialog.mail(*recipients)).startswith("451 4.3.0")
            assert 0.5 <= trio.current_time() - start < 4  # of its own for each would be 5


def nameless_files(directory: Path) -> int:
    """How many files of this process are in that directory and have no name there."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            name = os.readlink(descriptor)
            count += name.startswith(str(directory)) and name.endswith(" (deleted)")
    return count


async def test_a_large_mail_that_is_refused_or_broken_off_leaves_nothing(tmp_path: Path) -> None:
    settings = {
        "smtp_spill_size": 1000,
        "smtp_maxsize": 2_000_000,
        "smtp_bare_newline": "reject",
    }
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as dialog:
            for end in (b"\n\r\n.\r\n", 2_000_000 * b"x" + b"\r\n.\r\n"):  # bare, and too big
                await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
                await dialog.send(20_000 * LINE + end)
                assert (await dialog.reply())[:3] in ("550", "552")
                await dialog.say("NOOP")
                assert engine.statistics()["incoming"]["memory"] == 0
            await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
            await dialog.send(b"BDAT 1000000\r\n" + 1_000_000 * b"x")
            assert (await dialog.reply()).startswith("250")
            assert await dialog.codes("RSET") == [250]
            await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
            await dialog.send(20_000 * LINE)
            await until(lambda: nameless_files(tmp_path) == 1)
        await until(lambda: not engine.statistics()["incoming"]["open"])
        assert engine.statistics()["incoming"]["memory"] == 0
        assert nameless_files(tmp_path) == 0


async def test_a_full_disk_is_452_and_the_next_mail_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> object:
        file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
        return file

    async with converse(tmp_path, smtp_spill_size=1000) as dialog:
        with monkeypatch.context() as patch:
            patch.setattr(memory.tempfile, "TemporaryFile", fail)
            await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
            await dialog.send(10_000 * LINE + b".\r\n")
            assert (await dialog.reply()).startswith("452 4.3.1")
        await send_large(dialog, 10_000)


async def test_above_max_memory_new_mail_waits(tmp_path: Path) -> None:
    settings = {"max_memory": 100_000, "smtp_spill_size": 0}
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as first, open_dialog(address) as second:
            await first.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
            await first.send(HEADER + 1500 * LINE)
            await until(lambda: engine.statistics()["incoming"]["memory"] >= 100_000)
            await second.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
            assert (await second.say("DATA")).startswith("452 4.3.1")
            await second.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
            await second.send(b"BDAT 4 LAST\r\nhi\r\n")
            assert (await second.reply()).startswith("452 4.3.1")
            await first.send(b".\r\n")
            assert (await first.reply()).startswith("250")
            assert engine.statistics()["incoming"]["memory"] == 0
            assert (await second.mail("c@d.test")).startswith("250")


@pytest.mark.parametrize(("spill", "bound"), [(0, 1.5), (300_000, 0.7)])
async def test_resident_memory_stays_near_what_has_come(
    tmp_path: Path, spill: int, bound: float
) -> None:
    """Here 40 connections with 2 MB each, half of them in small segments."""
    block = 2000 * LINE
    async with serve(tmp_path, smtp_spill_size=spill) as engine:
        clients = []
        for _ in range(40):
            client = socket.create_connection(engine.addresses[0])
            client.setblocking(False)
            clients.append(Dialog(trio.SocketStream(trio.socket.from_stdlib_socket(client))))
        for dialog in clients:
            await dialog.reply()
            await dialog.say("EHLO c.test", "MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
        gc.collect()
        before = memory_of("self", "VmRSS")

        async def send(number: int, dialog: Dialog) -> None:
            for _ in range(13):
                size = len(block) if number % 2 else 700
                for start in range(0, len(block), size):
                    await dialog.send(block[start : start + size])

        async with trio.open_nursery() as nursery:
            for number, dialog in enumerate(clients):
                nursery.start_soon(send, number, dialog)
        received = 40 * 13 * len(block)
        if not spill:
            whole = received - 40 * 4  # what may begin an end does not count yet
            await until(lambda: engine.statistics()["incoming"]["memory"] >= whole)
        assert memory_of("self", "VmRSS") - before < bound * received
        for dialog in clients:
            await trio.aclose_forcefully(dialog.stream)


@pytest.mark.soak
async def test_a_thousand_connections_with_ten_megabytes_each(tmp_path: Path) -> None:
    """Resident memory stays below 1.5 times what has come."""
    block = 1300 * LINE
    async with serve(tmp_path, smtp_connections=3000) as engine:  # no strain: ours are slow
        clients = [await Dialog.open(engine.addresses[0]) for _ in range(1000)]
        for dialog in clients:
            await dialog.reply()
            await dialog.say("EHLO c.test", "MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>", "DATA")
        before = memory_of("self", "VmRSS")

        async def send(dialog: Dialog) -> None:
            for _ in range(100):
                await dialog.send(block)

        async with trio.open_nursery() as nursery:
            for dialog in clients:
                nursery.start_soon(send, dialog)
        used, received = memory_of("self", "VmRSS") - before, 1000 * 100 * len(block)
        print(f"{received >> 20} MB received, {used >> 20} MB resident")
        assert used < 1.5 * received
        for dialog in clients:
            await dialog.send(b".\r\n")
        for dialog in clients:
            assert (await dialog.reply()).startswith("250")
            await trio.aclose_forcefully(dialog.stream)


# LMTP.


async def test_lmtp_answers_for_each_recipient(tmp_path: Path) -> None:
    settings = {"smtp_port": (), "lmtp_port": (0,)}
    async with serve(tmp_path, **settings) as engine:

        def judge(connection: object, message: Any) -> Reject | None:
            return Reject(450, "4.2.2 full") if message.recipient == "full@d.test" else None

        engine.on("message", judge)
        async with open_dialog(engine.addresses[0], greeted=False) as dialog:
            assert (await dialog.reply()).startswith("220 mx.test LMTP")
            assert await dialog.codes("EHLO c.test", "HELO c.test", "LHLO c.test") == [
                500,
                500,
                250,
            ]
            first = await dialog.mail("c@d.test", "full@d.test", "e@d.test")
            replies = [first, await dialog.reply(), await dialog.reply()]
            assert [reply[:9] for reply in replies] == ["250 2.0.0", "450 4.2.2", "250 2.0.0"]
            assert replies[0].endswith(" for c@d.test")
            assert await dialog.codes("NOOP") == [250]
        messages = await inbox(engine, 2)
    assert [message.recipient for message in messages] == ["c@d.test", "e@d.test"]
    assert messages[0].body is not None
    assert b" with LMTP id " in messages[0].body


async def test_lmtp_says_for_each_recipient_that_the_queue_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mailerq.errors import QueueError

    async def fail(publications: list[Publication]) -> None:
        raise QueueError("no")

    settings = {"smtp_port": (), "lmtp_port": (0,)}
    async with serve(tmp_path, **settings) as engine:
        monkeypatch.setattr(engine.queues, "publish", fail)
        async with open_dialog(engine.addresses[0], hello="LHLO c.test") as dialog:
            first = await dialog.mail("c@d.test", "e@d.test")
            assert [first[:3], (await dialog.reply())[:3]] == ["451", "451"]


# Parameters.


async def test_what_was_asked_for_in_parameters_stands_in_the_message(tmp_path: Path) -> None:
    async with serve(tmp_path, dsn_advertise=True) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(
                "MAIL FROM:<ä@b.test> SMTPUTF8 BODY=BINARYMIME RET=HDRS ENVID=a+2Bb",
                "RCPT TO:<ö@d.test> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;x@y.test",
                "RCPT TO:<c@d.test> ORCPT=utf-8;ö\\x{2B}x@d.test",
            ) == [250, 250, 250]
            await dialog.send(b"BDAT 4\r\n\0\n\r\xff")
            assert (await dialog.reply()).startswith("250")
            await dialog.send(b"BDAT 0 LAST\r\n")
            assert (await dialog.reply()).startswith("250")
        first, second = await inbox(engine, 2)
    assert first.properties["dsn"] == {
        "ret": "HDRS",
        "envid": "a+b",
        "notify": "SUCCESS,DELAY",
        "orcpt": "rfc822;x@y.test",
    }
    assert second.properties["dsn"] == {
        "ret": "HDRS",
        "envid": "a+b",
        "orcpt": r"utf-8;ö\x{2B}x@d.test",
    }
    for message in (first, second):
        assert (message.properties["smtputf8"], message.properties["binarymime"]) == (True, True)
        assert message.body is not None
        assert message.body.endswith(b"\0\n\r\xff")
    assert first.recipient == "ö@d.test"
    assert hashlib.md5(first.body or b"").digest() == hashlib.md5(second.body or b"").digest()


async def test_reports_are_promised_unless_a_setting_forbids_that(tmp_path: Path) -> None:
    silent = serve(tmp_path, dsn_advertise=False)
    async with silent as engine, open_dialog(engine.addresses[0]) as dialog:
        assert "DSN" not in await dialog.say("EHLO c.test")
        assert await dialog.codes(
            "MAIL FROM:<a@b.test> RET=HDRS",
            "MAIL FROM:<a@b.test> ENVID=x",
            "MAIL FROM:<a@b.test>",
            "RCPT TO:<c@d.test> NOTIFY=FAILURE",
            "RCPT TO:<c@d.test> ORCPT=rfc822;x@y.test",
            "RCPT TO:<c@d.test>",
        ) == [555, 555, 250, 555, 555, 250]
    async with serve(tmp_path / "two") as engine, open_dialog(engine.addresses[0]) as dialog:
        assert "\n250-DSN\n" in await dialog.say("EHLO c.test")
