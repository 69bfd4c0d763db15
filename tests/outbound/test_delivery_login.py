"""Smarthosts and sinks that want a login."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

import pytest

from mailerq.net.resolver import Host
from mailerq.outbound.sites import HostHistory
from mailerq.rules import responses
from mailerq.wire.login import Login
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench

ANN = {"smtp_sink_username": "ann", "smtp_sink_password": "pass-phrase"}


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def wants(*logins: str, reply: str = "535 5.7.8 unknown") -> Any:
    """A peer that takes mail behind AUTH PLAIN of these logins only, and notes who sends."""

    async def script(peer: PeerConnection) -> None:
        await peer.send("220 mx.test\r\n")
        await peer.line()
        await peer.send("250-mx.test\r\n250-PIPELINING\r\n250 AUTH PLAIN\r\n")
        command = await peer.line()
        response = base64.b64decode(command.removeprefix("AUTH PLAIN ")).decode()
        _, username, password = response.split("\0")
        if f"{username}:{password}" not in logins:
            await peer.send(f"{reply} ({password}, {command})\r\n")
            return
        await peer.send("235 2.7.0 hello\r\n")
        while line := await peer.line():
            verb = line.partition(" ")[0]
            await peer.send("354 go\r\n" if verb == "DATA" else "250 ok\r\n")
            if verb == "MAIL":
                peer.peer.commands.append(f"{username} sends {line}")
            if verb == "DATA":
                await peer.body()
                await peer.send("250 taken\r\n")

    return script


def senders(bench: Bench) -> set[str]:
    return {command for command in bench.peer.commands if " sends " in command}


async def test_the_login_of_the_settings_comes_before_mail() -> None:
    async with open_bench(*[wants("ann:pass-phrase")] * 5, **ANN) as bench:
        bench.send()
        (result,) = await bench.results("success")
        assert result["authentication"] == "plain"
        assert bench.peer.commands[1] == "AUTH PLAIN " + coded("\0ann\0pass-phrase")


async def test_a_refused_login_is_said_once_and_costs_no_mail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuses = [wants("ann:other")] * 3
    accepts = [wants("ann:pass-phrase")] * 20
    async with open_bench(*refuses, *accepts, **ANN) as bench:
        for _ in range(5):
            bench.send(maxattempts=100)
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("noaccess", "authplain")
        assert (result["code"], result["status"]) == (535, "5.7.8")
        for _ in range(3):
            await bench.pass_time(700)
        await bench.results("success", 5)
        assert bench.queues["failure"] == []
    lines = [line for line in caplog.messages if "log in" in line]
    assert len(lines) == 1
    assert "ann" in lines[0]
    assert "535 5.7.8 unknown" in lines[0]


async def test_nothing_that_is_written_has_the_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    own = {"hostname": "127.0.0.1", "username": "ann", "password": "pass-phrase"}
    async with open_bench(wants(), wants(reply="421 bye"), **ANN) as bench:
        bench.send(smarthost=own, keepmime=True)
        await bench.retried()
        (kept,) = bench.queues["retry"]
        assert kept.properties["smarthost"] == {"hostname": "127.0.0.1", "username": "ann"}
        (waiting,) = bench.queues["outbox"]
        assert waiting.properties["smarthost"] == own
        shown = json.dumps(kept.to_dict()) + repr(waiting) + "".join(caplog.messages)
        shown += repr(bench.dispatcher.config) + json.dumps(bench.dispatcher.statistics())
        shown += "".join(map(repr, bench.dispatcher.flows.pauses))
        assert "pass-phrase" not in shown
        assert coded("\0ann\0pass-phrase") not in shown


async def test_a_message_has_a_login_of_its_own_and_never_uses_the_connection_of_another() -> None:
    resolver = StubResolver()
    accepts = [wants("ann:1", "bob:2", "ann:3")] * 20
    async with open_bench(*accepts, resolver=resolver, smarthost="192.0.2.1") as bench:
        for number in range(12):
            username, password = (("ann", "1"), ("bob", "2"), ("ann", "3"))[number % 3]
            host = {"hostname": "127.0.0.1", "port": bench.port}
            bench.send(
                envelope=f"{username}{password}@a.test",
                smarthost={**host, "username": username, "password": password},
            )
        await bench.results("success", 12)
        # An envelope ahead may be sent again elsewhere.
        assert senders(bench) == {
            f"{sender} sends MAIL FROM:<{sender}{password}@a.test>"
            for sender, password in (("ann", "1"), ("bob", "2"), ("ann", "3"))
        }
        passwords = {c for c in bench.peer.commands if c.startswith("AUTH")}
        assert len(passwords) == 3


async def test_the_login_of_the_settings_never_goes_to_the_smarthost_of_a_message() -> None:
    settings = {"smarthost": "192.0.2.1", "smarthost_username": "ann", "smarthost_password": "x"}
    settings |= {"smtp_out_clear_range": ("0.0.0.0/0",)}
    async with open_bench(resolver=StubResolver(), **settings) as bench:
        bench.peer.extensions = ("AUTH PLAIN",)
        bench.send(smarthost={"hostname": "127.0.0.1", "port": bench.port})
        await bench.results("success")
        assert not any(command.startswith("AUTH") for command in bench.peer.commands)


async def test_a_peer_that_offers_no_login_gets_no_mail() -> None:
    async with open_bench(**ANN) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"], result["code"]) == ("noaccess", "ehlo", 454)
        assert bench.peer.commands == ["EHLO me.test"]


async def test_a_host_that_wants_no_connection_says_nothing_about_the_login(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def busy(peer: PeerConnection) -> None:
        await peer.send("554 go away\r\n")

    async with open_bench(busy, **ANN) as bench:
        bench.send()
        assert (await bench.retried())["state"] == "init"
    assert not any("log in" in line for line in caplog.messages)


async def test_no_login_goes_over_a_connection_without_tls_to_a_public_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Public(StubResolver):
        async def host(self, name: str, *, trusted: bool) -> tuple[Host, ...]:
            return (Host("relay.test", "127.0.0.1"),)

    settings: dict[str, Any] = {"smarthost": "relay.test", "smarthost_password": "pass-phrase"}
    settings |= {"smarthost_username": "ann", "smtp_out_clear_range": ("192.0.2.0/24",)}
    for secure, connections in (("none", 0), ("opportunistic", 1)):
        caplog.clear()
        async with open_bench(resolver=Public(), connection_secure=secure, **settings) as bench:
            bench.send()
            result = await bench.retried()
            assert result["type"] == "noaccess"
            assert "smtp-out-clear-range" in result["description"]
            assert bench.peer.connections == connections
            assert bench.peer.commands in ([], ["EHLO me.test"])
        assert any("smtp-out-clear-range" in line for line in caplog.messages)


def test_a_login_that_is_taken_again_may_be_said_again(caplog: pytest.LogCaptureFixture) -> None:
    history, login = HostHistory(), Login("ann\x1b", "pass-phrase")
    for _ in range(2):
        history.login_refused("relay.test", "127.0.0.1", login, responses.OWN_FAULT)
    history.login_refused("relay.test", "127.0.0.1", Login("bob", "x"), responses.OWN_FAULT)
    assert len(caplog.messages) == 2
    history.logged_in("127.0.0.1", login)
    history.login_refused("relay.test", "127.0.0.1", login, responses.OWN_FAULT)
    assert len(caplog.messages) == 3
    assert "\x1b" not in "".join(caplog.messages)
