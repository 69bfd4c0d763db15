"""Mail leaves from the address that it came in by, where the settings say so."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from mailerq import Engine
from mailerq.rules.row import PAUSE, Row
from mailerq.store.row_file import RowFile
from tests.engine.kit import inbox, serve
from tests.support import configure, open_sink, send, until

MAPPED: dict[str, Any] = {
    "smtp_mappable_ips": (ipaddress.ip_network("127.0.0.0/29"),),
    "smtp_unmappable_ips": (ipaddress.ip_network("127.0.0.1/32"),),
    "smtp_extract": ("all",),
}
MAIL = b"Subject: x\r\n\r\nhi\r\n"


@pytest.mark.parametrize(
    ("address", "fields", "expected"),
    [
        ("127.0.0.2", b"", {"ips": ["127.0.0.2"]}),
        ("127.0.0.1", b"", {}),
        ("127.0.0.9", b"", {}),
        ("127.0.0.2", b"x-mq-ip: 127.0.0.7\r\n", {"ips": ["127.0.0.7"]}),
        ("127.0.0.2", b"x-mq-pool: bulk\r\n", {"pool": "bulk"}),
    ],
)
async def test_a_message_gets_the_address_that_it_came_in_by(
    tmp_path: Path, address: str, fields: bytes, expected: dict[str, Any]
) -> None:
    async with serve(tmp_path, smtp_ip=("0.0.0.0",), **MAPPED) as engine:
        await send((address, engine.addresses[0][1]), fields + MAIL)
        (message,) = await inbox(engine)
        found = {
            key: message.properties[key] for key in ("ips", "pool") if key in message.properties
        }
        assert found == expected


async def test_mail_leaves_from_the_address_that_it_came_in_by(tmp_path: Path) -> None:
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            rabbitmq_success="inbox",
            smtp_ip=("0.0.0.0",),
            **MAPPED,
        )
        async with Engine(config) as engine:
            await send(("127.0.0.3", engine.addresses[0][1]), MAIL)
            (message,) = await inbox(engine)
    assert message.results[-1]["from"] == "127.0.0.3"


async def test_a_pause_of_a_pool_holds_for_its_addresses_and_after_a_reload_for_others(
    tmp_path: Path,
) -> None:
    pools = tmp_path / "addresses.toml"

    def pool(address: str) -> str:
        return f'[[pool]]\nname = "bulk"\naddresses = ["{address}"]\n'

    pools.write_text(pool("127.0.0.2"))
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            rabbitmq_success="inbox",
            smtp_ip=("0.0.0.0",),
            addresses_file=str(pools),
            **MAPPED,
        )
        async with Engine(config) as engine:

            def paused() -> int:
                return int(engine.statistics()["outgoing"]["paused"])

            RowFile(config.queue_directory).add(Row(kind=PAUSE, pool="bulk"), who="ann")
            await until(lambda: engine.statistics()["rows"]["pauses"] == 1)
            await send(("127.0.0.2", engine.addresses[0][1]), MAIL)
            await until(lambda: paused() == 1)
            await send(("127.0.0.3", engine.addresses[0][1]), MAIL)
            (other,) = await inbox(engine)
            assert other.results[-1]["from"] == "127.0.0.3"
            pools.write_text(pool("127.0.0.3"))
            engine.reload(config)
            (freed,) = await inbox(engine)
            assert freed.results[-1]["from"] == "127.0.0.2"
            await send(("127.0.0.3", engine.addresses[0][1]), MAIL)
            await until(lambda: paused() == 1)
            assert len(sink.mails) == 2
