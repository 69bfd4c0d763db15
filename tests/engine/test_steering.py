"""Delivery instructions of clients, and limits on where messages may send the engine."""

from __future__ import annotations

import ipaddress
import smtplib
import socket
from pathlib import Path
from typing import Any

import pytest

from mailerq import Engine
from mailerq.errors import ConfigError
from tests.engine.kit import inbox, serve
from tests.support import configure, in_thread, open_sink, send

STEERING = (
    b"x-mq-tag: spring\r\nx-mq-smarthost-hostname: 127.0.0.1\r\nx-mq-smarthost-port: 22\r\n"
    b"x-mq-ip: 192.0.2.1\r\nx-mq-results-queue: mine\r\nx-mq-my-id: 7\r\nSubject: x\r\n\r\nhi\r\n"
)
STEERED = {
    "smarthost": {"hostname": "127.0.0.1", "port": 22},
    "ips": ["192.0.2.1"],
    "queues": {"results": "mine"},
}
LOGIN: dict[str, Any] = {"smtp_username": "robot", "smtp_password": "secret"}


def steered(properties: dict[str, Any]) -> dict[str, Any]:
    assert (properties["tags"], properties["my-id"]) == (["spring"], "7")
    return {name: properties[name] for name in STEERED if name in properties}


async def test_a_client_that_may_relay_does_not_steer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path) as engine:
        await send(engine.addresses[0], STEERING)
        (message,) = await inbox(engine)
        assert steered(message.properties) == {}
        assert message.body is not None
        assert b"x-mq-" not in message.body
    lines = [record.getMessage() for record in caplog.records]
    assert any("ignored x-mq-ip: may not be set by this client; add ips" in line for line in lines)


async def test_fields_that_are_ignored_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path) as engine:
        for _ in range(30):
            await send(engine.addresses[0], STEERING)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("ignored x-mq-" in line for line in lines) == 60


@pytest.mark.parametrize(
    ("settings", "login", "may"),
    [
        ({"smtp_extract_range": (ipaddress.ip_network("127.0.0.0/8"),)}, False, True),
        ({"smtp_extract_logins": ("robot",)}, True, True),
        ({"smtp_extract_logins": ("robot",)}, False, False),
        ({"smtp_extract_logins": ("other",)}, True, False),
        ({"smtp_extract": ("all",)}, False, True),
    ],
)
async def test_a_client_that_the_operator_names_steers(
    tmp_path: Path, settings: dict[str, Any], login: bool, may: bool
) -> None:
    def work(address: tuple[str, int]) -> None:
        with smtplib.SMTP(*address, timeout=60) as client:
            if login:
                client.login("robot", "secret")
            client.sendmail("a@b.test", ["c@d.test"], STEERING)

    async with serve(tmp_path, **LOGIN, **settings) as engine:
        await in_thread(work, engine.addresses[0])
        (message,) = await inbox(engine)
        assert steered(message.properties) == (STEERED if may else {})


async def test_a_word_that_is_no_property_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smtp-extract: 'tagz' is none of"):
        async with Engine(configure(tmp_path, smtp_extract=("tagz",))):
            raise AssertionError


async def test_a_message_does_not_connect_to_what_listens_on_this_host(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        smarthost = {"hostname": "localhost", "port": listening.getsockname()[1]}
        async with Engine(configure(tmp_path, rabbitmq_failure="failure")) as engine:
            document = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "hi\r\n"}
            await engine.publish({**document, "smarthost": smarthost})
            async with engine.consume("failure") as leases:
                (result,) = (await leases.receive()).message.results
        assert (result["code"], result["status"]) == (550, "5.7.1")
        assert "smtp-out-forbidden" in result["description"]
        with pytest.raises(BlockingIOError):
            listening.accept()


async def test_an_operator_may_allow_it(tmp_path: Path) -> None:
    async with (
        open_sink() as sink,
        Engine(configure(tmp_path, smtp_out_forbidden=())) as engine,
    ):
        smarthost = {"hostname": "127.0.0.1", "port": sink.port}
        document = {"envelope": "a@b.test", "recipient": "c@d.test", "mime": "hi\r\n"}
        await engine.publish({**document, "smarthost": smarthost})
        await sink.wait_for(1)
