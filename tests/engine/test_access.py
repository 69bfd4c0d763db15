"""Access: admitted clients, permitted recipients, and proxies that name their clients."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from mailerq.errors import ConfigError
from tests.engine.kit import Certificate, Dialog, converse, inbox, lines_of, open_dialog, serve
from tests.support import until

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)

MAPPED = (ipaddress.ip_network("::ffff:192.0.2.0/120"),)
"""192.0.2.0/24 as an IPv6 socket has it."""

# Relaying.


@pytest.mark.parametrize(
    "recipient",
    [
        "c@elsewhere.test",
        "@d.test:c@elsewhere.test",
        "@d.test,@e.test:c@elsewhere.test",
        "c%elsewhere.test@d.test",
        "elsewhere.test!c@d.test",
        '"c@elsewhere.test"@d.test',
        "c@elsewhere.test@d.test",
        "c@[127.0.0.1]",
        "c@[192.0.2.1]",
        "c@[IPv6:::1]",
        "c@D.TEST.elsewhere.test",
        "c@xd.test",
        "C@ELSEWHERE.test",
    ],
)
async def test_nobody_relays_who_may_not(tmp_path: Path, recipient: str) -> None:
    async with converse(tmp_path, strangers=True) as dialog:
        for sender in ("a@b.test", "", "c@d.test"):
            await dialog.say(f"MAIL FROM:<{sender}>")
            assert await dialog.codes(f"RCPT TO:<{recipient}>", "RSET") in (
                [550, 250],
                [553, 250],
            )
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        code = 553 if recipient.count("@d.test") and recipient.count("@") == 2 else 250
        if recipient.startswith(('"', "@")):
            code = 250
        assert await dialog.codes("MAIL FROM:<>", f"RCPT TO:<{recipient}>") == [250, code]


@pytest.mark.parametrize(
    "recipient",
    ["c@d.test", "C@D.Test", "postmaster", "PostMaster", "@r.test:c@d.test", '"c d"@d.test'],
)
async def test_anybody_may_send_to_local_domains(tmp_path: Path, recipient: str) -> None:
    async with (
        serve(tmp_path, strangers=True) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert (await dialog.mail(recipient)).startswith("250")


async def test_a_file_of_local_addresses_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "addresses"
    file.write_text("# ours\nAnn@Local.test\nsales-*@local.test\n/(x|y)\\d+@local\\.test/\n")
    async with (
        serve(tmp_path, strangers=True, smtp_local_addresses=str(file)) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):

        async def codes(*names: str) -> list[int]:
            return await dialog.codes(*(f"RCPT TO:<{name}>" for name in names))

        await dialog.say("MAIL FROM:<a@b.test>")
        good = ("ann@LOCAL.test", "sales-a.b@local.test", "X12@local.test", "c@d.test")
        assert await codes(*good) == [250] * 4
        bad = ("ann@local.test.evil.test", "bob@local.test", "x12@local.test.evil", "z1@local.test")
        assert await codes(*bad) == [550] * 4
        file.write_text("bob@local.test\n")
        assert await codes("ann@local.test", "bob@local.test") == [550, 250]
        file.write_text("/(/\n")
        assert await codes("ann@local.test", "bob@local.test") == [550, 250]
        os.unlink(file)
        assert await codes("bob@local.test") == [250]
    assert caplog.text.count("still holds") == 1


async def test_a_file_of_local_addresses_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "addresses"
    file.write_text("a@b.test\nnobody\n")
    for path in (file, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"smtp-local-addresses: cannot use {path}"):
            async with serve(tmp_path, smtp_local_addresses=str(path)):
                pass


async def test_mail_for_local_addresses_goes_to_the_local_queue(tmp_path: Path) -> None:
    file = tmp_path / "addresses"
    file.write_text("ann@local.test\n")
    settings = {"smtp_local_addresses": str(file), "rabbitmq_local": "local"}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.mail("ann@local.test", "bob@local.test")
        assert [(depth.queue, depth.due) for depth in await engine.queues.depths()] == [
            ("inbox", 1),
            ("local", 1),
        ]


# Connecting.


async def test_who_is_not_in_range_is_told_so(tmp_path: Path) -> None:
    elsewhere = (ipaddress.ip_network("192.0.2.0/24"),)
    async with (
        serve(tmp_path, smtp_range=elsewhere) as engine,
        open_dialog(engine.addresses[0], greeted=False) as dialog,
    ):
        assert (await dialog.reply()).startswith("554 5.7.1")
        assert await dialog.closed()


async def test_an_early_talker_is_sent_away(tmp_path: Path) -> None:
    settings = {"strangers": True, "smtp_greet_delay": 60.0}
    async with converse(tmp_path, **settings, greeted=False) as dialog:
        await dialog.send(b"EHLO c.test\r\n")
        assert (await dialog.reply()).startswith("554 5.5.0")
        assert await dialog.closed()
    async with converse(tmp_path, strangers=True, smtp_greet_delay=0.02) as dialog:
        assert (await dialog.mail("c@d.test")).startswith("250")
    async with converse(tmp_path, smtp_greet_delay=60.0) as dialog:  # may relay: does not wait
        assert (await dialog.mail("c@d.test")).startswith("250")


async def test_a_client_that_hangs_up_before_the_banner_is_forgotten(tmp_path: Path) -> None:
    async with serve(tmp_path, strangers=True, smtp_greet_delay=60.0) as engine:
        client = await Dialog.open(engine.addresses[0])
        await client.stream.aclose()
        await until(lambda: not engine.statistics()["incoming"]["open"])


# Limits of one client.


async def test_a_client_may_hold_so_many_connections(tmp_path: Path) -> None:
    async with serve(tmp_path, strangers=True, smtp_client_maxconnections=2) as engine:
        address = engine.addresses[0]
        async with open_dialog(address), open_dialog(address) as second:
            async with open_dialog(address, greeted=False) as third:
                assert (await third.reply()).startswith("421 4.7.0 Too many connections from your")
                assert await third.closed()
            await second.say("QUIT")
            assert await second.closed()
            await until(lambda: engine.statistics()["incoming"]["open"] == 1)
            async with open_dialog(address) as fourth:
                assert await fourth.codes("NOOP") == [250]


async def test_who_may_relay_by_address_has_no_such_limits(tmp_path: Path) -> None:
    limits = dict.fromkeys(
        (f"smtp_client_{name}" for name in "maxconnections connects messages recipients".split()), 1
    )
    async with serve(tmp_path, **limits) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as first, open_dialog(address):
            for _ in range(3):
                assert (await first.mail("c@d.test", "e@d.test")).startswith("250")


async def test_a_client_may_connect_so_often_in_a_minute(tmp_path: Path) -> None:
    async with serve(tmp_path, strangers=True, smtp_client_connects=2) as engine:
        for expected in ("220", "220", "421 4.7.0 Too many connections"):
            async with open_dialog(engine.addresses[0], greeted=False) as dialog:
                assert (await dialog.reply()).startswith(expected)


async def test_a_client_may_send_so_many_messages_and_recipients(tmp_path: Path) -> None:
    async with converse(tmp_path, strangers=True, smtp_client_messages=2) as dialog:
        for expected in ("250", "250", "450 4.7.1 Too many messages"):
            assert (await dialog.mail("c@d.test")).startswith(expected)
    async with converse(tmp_path, strangers=True, smtp_client_recipients=2) as dialog:
        await dialog.say("MAIL FROM:<a@b.test>")
        assert await dialog.codes(*3 * ["RCPT TO:<c@d.test>"]) == [250, 250, 450]


async def test_a_client_may_make_so_many_errors_in_a_minute(tmp_path: Path) -> None:
    async with serve(tmp_path, strangers=True, smtp_client_errors=3) as engine:
        for errors in (2, 1):
            async with open_dialog(engine.addresses[0]) as dialog:
                assert await dialog.codes(*errors * ["WHAT"]) == errors * [500]
        async with open_dialog(engine.addresses[0]) as dialog:
            assert (await dialog.say("WHAT")).startswith("500")
            assert (await dialog.reply()).startswith("421 4.7.0 Too many errors from your address")
            assert await dialog.closed()


# PROXY.

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def version_2(source: str, destination: str, *, command: int = 1) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    body = addresses + struct.pack("!HH", 40000, 25)
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, 0x11, len(body)) + body


V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 25\r\n"
V2 = version_2("192.0.2.7", "198.51.100.1")


@pytest.mark.parametrize("header", [V1, V2])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_proxy_speaks_for_its_client(tmp_path: Path, header: bytes, at_once: bool) -> None:
    settings = {"smtp_proxy": LOOPBACK, "smtp_local_domains": ("d.test",)}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0], greeted=False) as dialog:
            if at_once:
                await dialog.send(header)
            else:
                for byte in header:
                    await dialog.send(bytes([byte]))
            assert (await dialog.reply()).startswith("220")
            await dialog.say("EHLO c.test")
            # What the proxy itself may do, its client may not.
            assert await dialog.codes("MAIL FROM:<a@b.test>", "RCPT TO:<c@elsewhere.test>") == [
                250,
                550,
            ]
            await dialog.say("RSET")
            assert (await dialog.mail("c@d.test")).startswith("250")
        (message,) = await inbox(engine)
    assert message.properties["connection"] | {"secure": False} == {
        "local-ip": "198.51.100.1",
        "local-port": 25,
        "remote-ip": "192.0.2.7",
        "remote-port": 40000,
        "secure": False,
    }
    assert message.body is not None
    assert b"([192.0.2.7])" in message.body


@pytest.mark.parametrize(
    "sent",
    [
        b"EHLO c.test\r\n",
        b"\r\nEHLO c.test\r\n",
        b"PROXY TCP4 192.0.2.7\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 99999\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.1 40000 25\r\n",
        b"PROXY " + 200 * b"x",
        SIGNATURE + b"\x31\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x04" + bytes(4),
        SIGNATURE + b"\x21\x11\xff\xff",
    ],
)
async def test_a_proxy_without_a_header_that_can_be_read_is_closed(
    tmp_path: Path, sent: bytes
) -> None:
    async with (
        serve(tmp_path, smtp_proxy=LOOPBACK) as engine,
        open_dialog(engine.addresses[0], greeted=False) as dialog,
    ):
        await dialog.send(sent)
        assert await dialog.closed()
        assert engine.statistics()["incoming"]["refused_connections"] == 1


@pytest.mark.parametrize("header", [V1, V2])
async def test_a_header_that_is_cut_off_ends_the_connection(tmp_path: Path, header: bytes) -> None:
    async with serve(tmp_path, smtp_proxy=LOOPBACK) as engine:
        for cut in range(len(header)):
            async with open_dialog(engine.addresses[0], greeted=False) as dialog:
                if cut:
                    await dialog.send(header[:cut])
                assert isinstance(dialog.stream, trio.SocketStream)
                await dialog.stream.send_eof()
                assert await dialog.closed()


async def test_a_header_is_not_waited_for_without_end(tmp_path: Path) -> None:
    settings = {"smtp_proxy": LOOPBACK, "smtp_handshake_timeout": 0.05}
    async with (
        serve(tmp_path, **settings) as engine,
        open_dialog(engine.addresses[0], greeted=False) as dialog,
    ):
        await dialog.send(V1[:10])
        assert await dialog.closed()


async def test_a_header_from_somebody_else_is_no_header(tmp_path: Path) -> None:
    async with serve(tmp_path, smtp_local_domains=("d.test",)) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(V1.decode().strip()) == [500]
            await dialog.mail("c@d.test")
        (message,) = await inbox(engine)
    assert message.properties["connection"]["remote-ip"] == "127.0.0.1"


async def test_the_client_behind_a_proxy_is_the_one_that_is_admitted(tmp_path: Path) -> None:
    range_ = (ipaddress.ip_network("198.51.100.0/24"),)
    settings = {"smtp_proxy": LOOPBACK, "smtp_range": range_, "smtp_client_maxconnections": 1}
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address, greeted=False) as dialog:
            await dialog.send(V2)
            assert (await dialog.reply()).startswith("554 5.7.1")
        good = version_2("198.51.100.9", "198.51.100.1")
        async with open_dialog(address, greeted=False) as dialog:
            await dialog.send(good)
            assert (await dialog.reply()).startswith("220")
            async with open_dialog(address, greeted=False) as second:
                await second.send(good)
                assert (await second.reply()).startswith("421 4.7.0 Too many connections")
            async with open_dialog(address, greeted=False) as other:
                await other.send(version_2("198.51.100.10", "198.51.100.1"))
                assert (await other.reply()).startswith("220")


@pytest.mark.parametrize(
    "header", [b"PROXY UNKNOWN\r\n", version_2("0.0.0.0", "0.0.0.0", command=0)]
)
async def test_a_proxy_that_names_no_client_is_greeted_and_has_no_right(
    tmp_path: Path, header: bytes
) -> None:
    settings = {
        "smtp_proxy": LOOPBACK,
        "smtp_range": LOOPBACK,
        "smtp_xclient_range": LOOPBACK,
        "smtp_local_domains": ("d.test",),
        "smtp_greet_delay": 60.0,
        "smtp_client_messages": 1,
        "smtp_username": "ann",
        "smtp_password": "s3cret",
    }
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0], greeted=False) as dialog:
            await dialog.send(header)
            assert (await dialog.reply()).startswith("220")
            assert not {"AUTH", "XCLIENT"} & set((await dialog.say("EHLO c.test")).split())
            assert await dialog.codes("AUTH PLAIN", "XCLIENT ADDR=127.0.0.1") == [538, 502]
            assert await dialog.codes(
                "MAIL FROM:<a@b.test>", "RCPT TO:<c@elsewhere.test>", "RSET", "MAIL FROM:<a@b.test>"
            ) == [250, 550, 250, 450]
            assert await dialog.codes("QUIT") == [221]
        async with open_dialog(engine.addresses[0], greeted=False) as dialog:
            await dialog.send(version_2("127.0.0.1", "127.0.0.1"))
            assert (await dialog.reply()).startswith("220")
            await dialog.say("EHLO c.test", "MAIL FROM:<a@b.test>")
            assert await dialog.codes("RCPT TO:<c@elsewhere.test>") == [250]


async def test_tls_begins_behind_the_header_of_a_proxy(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    settings = {"smtp_proxy": LOOPBACK, "smtp_secure_port": (0,), **certificate.settings}
    async with (
        serve(tmp_path, **settings) as engine,
        open_dialog(engine.addresses[1], greeted=False) as dialog,
    ):
        await dialog.send(V2)
        await dialog.start_tls(certificate.trust)
        assert (await dialog.reply()).startswith("220")
        assert "AUTH" not in await dialog.say("EHLO c.test")


# XCLIENT.


async def test_xclient_says_who_the_client_is(tmp_path: Path) -> None:
    settings = {"smtp_xclient_range": LOOPBACK, "smtp_local_domains": ("d.test",)}
    async with serve(tmp_path, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert "XCLIENT NAME ADDR" in await dialog.say("EHLO c.test")
            words = "ADDR=IPV6:2001:db8::7 PORT=40000 DESTADDR=198.51.100.1 DESTPORT=25"
            assert (await dialog.say(f"XCLIENT {words} NAME=[UNAVAILABLE]")).startswith("220")
            assert await dialog.codes("MAIL FROM:<a@b.test>") == [503]
            await dialog.say("EHLO other.test")
            await dialog.say("MAIL FROM:<a@b.test>")
            assert await dialog.codes("RCPT TO:<c@elsewhere.test>", "RSET") == [550, 250]
            assert (await dialog.mail("c@d.test")).startswith("250")
            # Whoever the proxy passes on may not say it again.
            assert await dialog.codes("XCLIENT ADDR=127.0.0.1", "XCLIENT LOGIN=ann") == [502, 502]
            assert "XCLIENT" not in await dialog.say("EHLO other.test")
            await dialog.say("MAIL FROM:<a@b.test>")
            assert await dialog.codes("RCPT TO:<c@elsewhere.test>") == [550]
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.say("XCLIENT ADDR=192.0.2.1 LOGIN=ann", "EHLO other.test")
            assert (await dialog.mail("c@elsewhere.test")).startswith("250")
        first, second = await inbox(engine, 2)
    assert first.properties["connection"]["remote-ip"] == "2001:db8::7"
    assert first.properties["connection"]["local-ip"] == "198.51.100.1"
    assert "user" not in first.properties["connection"]
    assert second.properties["connection"]["user"] == "ann"


async def test_xclient_is_for_those_in_its_range_only(tmp_path: Path) -> None:
    elsewhere = (ipaddress.ip_network("192.0.2.0/24"),)
    async with (
        serve(tmp_path, smtp_xclient_range=elsewhere) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert "XCLIENT" not in await dialog.say("EHLO c.test")
        assert await dialog.codes("XCLIENT ADDR=192.0.2.1") == [502]


@pytest.mark.parametrize("words", ["ADDR=x", "ADDR=192.0.2.1 PORT=x", "PORT=99999", "DESTADDR=1"])
async def test_a_broken_xclient_changes_nothing(tmp_path: Path, words: str) -> None:
    async with converse(tmp_path, smtp_xclient_range=LOOPBACK) as dialog:
        assert await dialog.codes(f"XCLIENT {words}") == [501]
        assert (await dialog.mail("c@elsewhere.test")).startswith("250")


async def test_an_unknown_client_of_a_proxy_may_not_do_what_the_proxy_may(tmp_path: Path) -> None:
    async with (
        serve(tmp_path, smtp_xclient_range=LOOPBACK) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        await dialog.say("XCLIENT ADDR=[UNAVAILABLE]", "EHLO c.test", "MAIL FROM:<a@b.test>")
        assert await dialog.codes("RCPT TO:<c@elsewhere.test>") == [550]


async def test_the_client_of_xclient_is_admitted_and_counted(tmp_path: Path) -> None:
    settings = {
        "smtp_xclient_range": LOOPBACK,
        "smtp_range": (ipaddress.ip_network("192.0.2.0/24"), *LOOPBACK),
        "smtp_client_maxconnections": 1,
    }
    async with serve(tmp_path, **settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as first, open_dialog(address) as second:
            assert await first.codes("XCLIENT ADDR=192.0.2.1") == [220]
            assert (await second.say("XCLIENT ADDR=192.0.2.1")).startswith("421 4.7.0")
            assert await second.closed()
        async with open_dialog(address) as third:
            assert await third.codes("XCLIENT ADDR=198.51.100.1") == [554]


async def test_a_client_of_xclient_in_ipv6_clothes_has_the_rights_of_its_ipv4_address(
    tmp_path: Path,
) -> None:
    settings = {"smtp_xclient_range": LOOPBACK, "smtp_relay_range": MAPPED}
    async with serve(tmp_path, **settings) as engine:
        for address, code in (
            ("192.0.2.7", 250),
            ("IPV6:::ffff:192.0.2.7", 250),
            ("::ffff:198.51.100.7", 550),
        ):
            async with open_dialog(engine.addresses[0]) as dialog:
                await dialog.say(f"XCLIENT ADDR={address}", "EHLO c.test", "MAIL FROM:<a@b.test>")
                assert await dialog.codes("RCPT TO:<c@elsewhere.test>") == [code]


async def test_hosts_of_one_network_share_the_limits_of_a_client(tmp_path: Path) -> None:
    settings = {
        "smtp_xclient_range": LOOPBACK,
        "smtp_client_prefix6": 48,
        "smtp_client_prefix4": 24,
        "smtp_client_messages": 1,
    }
    addresses = ("2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:1::1", "192.0.2.1", "192.0.2.2")
    async with serve(tmp_path, **settings) as engine:
        codes = []
        for address in addresses:
            async with open_dialog(engine.addresses[0]) as dialog:
                await dialog.say(f"XCLIENT ADDR={address}", "EHLO c.test")
                codes += await dialog.codes("MAIL FROM:<a@b.test>")
        assert codes == [250, 450, 250, 250, 450]


# Logs.


async def test_refused_commands_stand_in_their_log_one_on_a_line(tmp_path: Path) -> None:
    log = tmp_path / "refused.log"
    settings = {"refused_log_file": str(log), "smtp_username": "ann", "smtp_password": "hunter2"}
    async with serve(tmp_path, strangers=True, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.send(b"EHLO \x1b[31m\r\n")
            await dialog.say("MAIL FROM:<a@b.test>", "RCPT TO:<c@elsewhere.test>", "RSET")
            await dialog.say("AUTH PLAIN AGh1bnRlcjI=aGVsbG8=", "AUTH aHVudGVyMg==")
            await dialog.say("AUTH LOGIN", "aHVudGVyMg==", "aHVudGVyMg==")
            await dialog.say("aHVudGVyMg==", "VRFY", "RCPT TO:<x -> 250 2.0.0 Ok\u202e")
        await trio.lowlevel.checkpoint()
    lines = lines_of(log)
    assert lines[:2] == [
        "[127.0.0.1] EHLO \\x1b[31m -> 501 5.5.4 Syntax: EHLO hostname",
        "[127.0.0.1] RCPT TO:<c@elsewhere.test> -> 550 5.7.1 Relaying denied",
    ]
    assert [line.partition(" -> ")[0] for line in lines[2:]] == [
        "[127.0.0.1] AUTH PLAIN",
        "[127.0.0.1] AUTH",
        "[127.0.0.1] AUTH",
        "[127.0.0.1] (14 bytes that are no command)",
        "[127.0.0.1] VRFY",
        r"[127.0.0.1] RCPT TO:<x\x20->\x20250 2.0.0 Ok\u202e",
    ]
    assert "aHVudGVyMg" not in log.read_text()
    assert "hunter2" not in log.read_text()


async def test_a_received_mail_is_one_line_for_each_recipient(tmp_path: Path) -> None:
    log = tmp_path / "received.log"
    async with converse(tmp_path, received_log_file=str(log)) as dialog:
        reply = await dialog.mail("c@d.test", '"x> <y@z.test>\\ "@d.test')
    ids = re.findall(r"2\.0\.0 (\w+) for ", reply)
    assert lines_of(log) == [
        f"{ids[0]} <a@b.test> <c@d.test> [127.0.0.1] [127.0.0.1]",
        f'{ids[1]} <a@b.test> <"x\\x3e\\x20\\x3cy@z.test\\x3e\\\\\\x20"@d.test>'
        " [127.0.0.1] [127.0.0.1]",
    ]
