"""What an engine says about DANE at its start, and what it needs for that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq import Engine
from mailerq.errors import ConfigError
from mailerq.net import unbound
from mailerq.settings import DnsServer as Address
from tests.engine.kit import serve
from tests.net.dns_server import open_dns_server
from tests.net.signed_zone import SignedZone, open_signing_server
from tests.support import DEADLINE, configure


async def test_the_log_says_whether_dane_is_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zone: Any = {("", "NS"): ["a.root-servers.test."]}
    async with open_dns_server(zone) as server:
        server.secure = lambda name, kind: True
        servers = (Address(server.host, server.port),)
        with caplog.at_level(logging.INFO, "mailerq"):
            async with serve(tmp_path, dns_servers=servers):
                with trio.fail_after(DEADLINE):
                    while not any("DANE" in line for line in caplog.messages):
                        await trio.testing.wait_all_tasks_blocked(0.01)
    assert "DANE is in force: the resolver validates" in caplog.messages


async def test_a_start_needs_the_library_and_its_keys(tmp_path: Path) -> None:
    settings = {"dns_validator": "unbound", "dns_trust_anchor": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match="dns-trust-anchor: cannot read"):
        async with Engine(configure(tmp_path, **settings)):
            pytest.fail("it starts")


async def test_a_reload_that_needs_what_is_missing_changes_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        wrong = configure(
            tmp_path, dns_validator="unbound", dns_trust_anchor=str(tmp_path / "none")
        )
        with pytest.raises(ConfigError, match="dns-trust-anchor"):
            engine.reload(wrong)
        assert engine.config.dns_validator == "resolver"


def has_library() -> bool:
    try:
        unbound.library()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_library(), reason="libunbound8 is not installed")
async def test_the_library_is_freed_with_the_engine(tmp_path: Path) -> None:
    """The program around an engine may run on."""
    zone = SignedZone("@ 300 IN MX 10 mx\nmx 300 IN A 192.0.2.1\n")
    anchor = tmp_path / "anchor"
    anchor.write_text(zone.anchor)
    async with open_signing_server(zone) as server:
        settings: dict[str, Any] = {
            "dns_validator": "unbound",
            "dns_trust_anchor": str(anchor),
            "dns_servers": (Address(server.host, server.port),),
        }
        async with serve(tmp_path, **settings) as engine:
            resolver = engine._resolver
            with trio.fail_after(DEADLINE):
                assert await resolver.proved_names("signed.example") == ("signed.example",)
            client = resolver._client
            assert isinstance(client, unbound.Unbound) and client._context is not None
        with trio.fail_after(DEADLINE):
            while client._context is not None:
                await trio.testing.wait_all_tasks_blocked()
