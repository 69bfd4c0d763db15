"""Binary mail, to peers with and without CHUNKING and BINARYMIME."""

from __future__ import annotations

from typing import Any

import pytest

from mailerq.message import Message
from mailerq.outbound import session as outgoing
from tests.outbound.kit import Bench, StubPlugins, open_bench

BINARY = "Subject: x\r\n\r\n\0 bare\nand\rbare\r\n.\r\n\u00fc"
LONG = BINARY + "x" * (outgoing.LOOK_BYTES + 1)


def with_binarymime(bench: Bench) -> None:
    bench.peer.extensions = (*bench.peer.extensions, "CHUNKING", "BINARYMIME")


@pytest.mark.parametrize("body", [BINARY, LONG, ""])
@pytest.mark.parametrize("pipelining", [True, False])
async def test_a_peer_that_takes_binary_mail_gets_it_byte_for_byte(
    body: str, pipelining: bool
) -> None:
    async with open_bench() as bench:
        bench.peer.extensions = ("PIPELINING",) * pipelining + ("SIZE 9000000",)
        with_binarymime(bench)
        bench.send(body=body, binarymime=True)
        await bench.results("success")
        assert bench.peer.mails[0].body == body.encode()
        size = len(body.encode())
        assert f"MAIL FROM:<a@b.test> SIZE={size} BODY=BINARYMIME" in bench.peer.commands
        assert "DATA" not in bench.peer.commands


@pytest.mark.parametrize("body", [BINARY, LONG])
@pytest.mark.parametrize("extensions", [("CHUNKING",), ("BINARYMIME",), ()])
async def test_binary_mail_fails_where_the_peer_does_not_take_it(
    body: str, extensions: tuple[str, ...]
) -> None:
    async with open_bench(domain_maxconnections=1) as bench:
        bench.peer.extensions = ("PIPELINING", "8BITMIME", *extensions)
        bench.send(body=body, binarymime=True)
        (result,) = await bench.results("failure")
        assert (result["code"], result["status"]) == (554, "5.6.3")
        assert "BINARYMIME" in result["description"]
        bench.send()
        await bench.results("success")
        assert bench.peer.connections == 1


async def test_the_sender_of_binary_mail_that_fails_hears_of_it_in_lines() -> None:
    async with open_bench(rabbitmq_dsn="dsn") as bench:
        bench.send(
            body=BINARY, binarymime=True, received="2026-01-01 11:00:00", dsn={"ret": "FULL"}
        )
        await bench.results("failure")
        await bench.queues.until(lambda queues: bool(queues["dsn"]) and not queues.leased)
        (report,) = bench.queues["dsn"]
    body = report.body or b""
    assert b"\r\nStatus: 5.6.3\r\n" in body and b"\r\nSubject: x\r\n" in body
    assert b"\r\nContent-Transfer-Encoding: base64\r\n" in body
    assert body.isascii() and b"\0" not in body and "binarymime" not in report.properties


async def test_mail_that_lines_can_carry_goes_as_lines_where_the_peer_takes_no_other() -> None:
    async with open_bench() as bench:
        bench.send(body="Subject: x\r\n\r\nlines\r\n", binarymime=True)
        await bench.results("success")
        assert "DATA" in bench.peer.commands


@pytest.mark.parametrize("body", ["Subject: x\n\nbare\n", "x" * 2000 + "\r\n", "\0\r\n"])
async def test_mail_that_does_not_say_that_it_is_binary_goes_as_lines(body: str) -> None:
    async with open_bench() as bench:
        with_binarymime(bench)
        bench.send(body=body)
        await bench.results("success")
        expected = body.replace("\r\n", "\n").replace("\n", "\r\n").encode()
        assert bench.peer.mails[0].body == expected
        assert "DATA" in bench.peer.commands


async def test_lines_and_chunks_take_turns_on_one_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing, "PROMPT_SECONDS", 60.0)
    async with open_bench(domain_maxconnections=1) as bench:
        with_binarymime(bench)
        for number in range(12):
            bench.send(body=f"{number}\n", **{"binarymime": True} if number % 3 else {})
        results = await bench.results("success", 12)
        assert {result["attempt"] for result in results} == {1}
        assert {mail.body for mail in bench.peer.mails} == {
            f"{number}\n".encode() if number % 3 else f"{number}\r\n".encode()
            for number in range(12)
        }
        assert bench.peer.connections == 1


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "."])
@pytest.mark.parametrize("code", [451, 550])
async def test_a_refusal_of_binary_mail_is_heard(verb: str, code: int) -> None:
    async with open_bench() as bench:
        with_binarymime(bench)
        bench.peer.answers[verb, ""] = [f"{code} no"]
        bench.send(body=BINARY, binarymime=True)
        (result,) = await bench.results("retry" if code < 500 else "failure")
        assert result["code"] == code


async def test_a_plugin_supplies_binary_mail() -> None:
    def replaces(message: Message) -> Any:
        message.body = b"new\n\0"

    async with open_bench(plugins=StubPlugins(out_data=replaces)) as bench:
        with_binarymime(bench)
        bench.send(body=BINARY, binarymime=True)
        await bench.results("success")
        assert bench.peer.mails[0].body == b"new\n\0"
