"""Mail leaves from the addresses that it may use, under their names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.outbound.kit import Bench, open_bench

POOL = """
[[pool]]
name = "bulk"
addresses = ["127.0.0.2", "127.0.0.3"]

[[address]]
ip = "127.0.0.2"
ehlo = "two.me.test"

[[address]]
ip = "0.0.0.0"
ehlo = "any.me.test"
"""


def addresses_file(directory: Path, text: str = POOL) -> str:
    path = directory / "addresses.toml"
    path.write_text(text)
    return str(path)


def sources(bench: Bench) -> Counter[str]:
    return Counter(message.results[-1]["from"] for message in bench.queues["success"])


@pytest.mark.parametrize(
    ("properties", "source", "name"),
    [
        ({"ips": ["127.0.0.2"]}, "127.0.0.2", "two.me.test"),
        ({"ips": ["127.0.0.4"], "pool": "bulk"}, "127.0.0.4", "any.me.test"),
        ({}, "127.0.0.9", "any.me.test"),
    ],
)
async def test_each_address_gives_its_own_name(
    tmp_path: Path, properties: dict[str, Any], source: str, name: str
) -> None:
    settings = {"addresses_file": addresses_file(tmp_path), "smtp_default_ips": ("127.0.0.9",)}
    async with open_bench(**settings) as bench:
        bench.send(**properties)
        (result,) = await bench.results("success")
        assert result["from"] == source
        assert bench.peer.commands[0] == f"EHLO {name}"


async def test_an_address_that_the_system_chooses_has_a_name_too(tmp_path: Path) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path)) as bench:
        bench.send()
        (result,) = await bench.results("success")
        assert result["from"] == "127.0.0.1"
        assert bench.peer.commands[0] == "EHLO any.me.test"


async def test_mail_of_a_pool_leaves_from_all_its_addresses(tmp_path: Path) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path)) as bench:
        for _ in range(60):
            bench.send(pool="bulk")
        await bench.results("success", count=60)
        assert set(sources(bench)) == {"127.0.0.2", "127.0.0.3"}


async def test_mail_of_an_unknown_pool_waits_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path)) as bench:
        bench.send(pool="bluk", maxattempts=1)
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("bind", "bind")
        assert result["description"] == "property pool: addresses-file has no pool 'bluk'"
    assert "addresses-file has no pool 'bluk'" in caplog.text
