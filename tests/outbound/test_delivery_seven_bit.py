"""8-bit mail, to peers with and without 8BITMIME."""

from __future__ import annotations

import email
from typing import Any

import pytest
import trio

from mailerq.message import Message
from tests.outbound.kit import Bench, StubPlugins, open_bench

TEXT = "Gr\u00fc\u00dfe"
MAIL = f"Subject: {TEXT}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n{TEXT}\r\n"
UNCONVERTIBLE = f"To: <{TEXT}@d.test>\r\n\r\n"


def without_8bitmime(bench: Bench) -> None:
    bench.peer.extensions = ("PIPELINING", "SIZE 1000000")


async def test_a_peer_that_takes_8_bits_gets_them() -> None:
    async with open_bench() as bench:
        bench.send(body=MAIL)
        await bench.results("success")
        assert bench.peer.mails[0].body == MAIL.encode()
        assert any(command.endswith("BODY=8BITMIME") for command in bench.peer.commands)


@pytest.mark.parametrize("more", ["", "x" * 70 + "\r\n"])
async def test_a_peer_that_does_not_gets_ascii_of_the_size_that_it_was_told(more: str) -> None:
    body = MAIL + more * 1000  # in a thread where it is long
    async with open_bench() as bench:
        without_8bitmime(bench)
        bench.send(body=body)
        bench.send(body="Subject: plain\r\n\r\nhi\r\n")
        await bench.results("success", count=2)
        (mail,) = [mail.body for mail in bench.peer.mails if b"plain\r\n\r\nhi" not in mail.body]
        assert mail.isascii()
        read = email.message_from_bytes(mail)
        assert read.get_payload(decode=True) == (TEXT + "\r\n" + more * 1000).encode()
        mails = [command for command in bench.peer.commands if command.startswith("MAIL")]
        assert f"MAIL FROM:<a@b.test> SIZE={len(mail)}" in mails
        assert not any("8BITMIME" in command for command in mails)


async def test_what_cannot_be_converted_fails_and_costs_no_connection() -> None:
    async with open_bench(domain_maxconnections=1) as bench:
        without_8bitmime(bench)
        bench.send(body=UNCONVERTIBLE)
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (554, "5.6.3")
        assert "8BITMIME" in result["description"]
        bench.send()
        await bench.results("success")
        assert bench.peer.connections == 1


async def test_mail_with_an_international_header_is_not_changed_but_refused() -> None:
    async with open_bench() as bench:
        without_8bitmime(bench)
        bench.send(body=MAIL, smtputf8=True)
        (result,) = await bench.results("failure")
        assert result["status"] == "5.6.7"


async def test_messages_behind_each_other_are_each_sent_as_they_are() -> None:
    bodies = [MAIL if n % 2 else f"Subject: {n}\r\n\r\nplain\r\n" for n in range(20)]
    async with open_bench(domain_maxconnections=1) as bench:
        without_8bitmime(bench)
        for number, body in enumerate(bodies):
            bench.send(recipient=f"{number}@d.test", body=body)
        await bench.results("success", count=len(bodies))
        for mail in bench.peer.mails:
            body = bodies[int(mail.recipient.partition("@")[0])]
            assert mail.body.isascii()
            if body.isascii():
                assert mail.body == body.encode()
            else:
                assert email.message_from_bytes(mail.body).get_payload(decode=True) == (
                    f"{TEXT}\r\n".encode()
                )


@pytest.mark.parametrize(("body", "sent"), [(MAIL, True), (UNCONVERTIBLE, False)])
async def test_what_a_plugin_supplies_is_converted_as_well(body: str, sent: bool) -> None:
    def supply(message: Message) -> Any:
        message.body = body.encode()

    async with open_bench(plugins=StubPlugins(out_data=supply)) as bench:
        without_8bitmime(bench)
        bench.send()
        if sent:
            await bench.results("success")
            assert bench.peer.mails[0].body.isascii()
        else:
            (result,) = await bench.results("failure")
            assert result["status"] == "5.6.3"
            assert not bench.peer.mails


async def test_a_plugin_sees_what_will_be_sent() -> None:
    seen: list[bytes | None] = []

    def look(message: Message) -> Any:
        seen.append(message.body)

    async with open_bench(plugins=StubPlugins(out_data=look)) as bench:
        without_8bitmime(bench)
        bench.send(body=MAIL)
        await bench.results("success")
        assert seen == [bench.peer.mails[0].body]


async def test_a_stop_does_not_wait_for_a_long_conversion() -> None:
    async with open_bench() as bench:
        without_8bitmime(bench)
        bench.send(body=MAIL + "\u00fc" * 3_000_000)
        await bench.queues.until(lambda queues: "EHLO me.test" in bench.peer.commands)
        with trio.fail_after(60):
            await bench.dispatcher.stop(0)
