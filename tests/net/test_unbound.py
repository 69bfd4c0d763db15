"""Answers that libunbound proves, from a zone that the test signs."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trio

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.net import unbound
from mailerq.net.dns_client import MALFORMED, Answer, NoAnswer
from mailerq.net.unbound import Unbound
from mailerq.settings import DnsServer as Address
from tests.net.signed_zone import SignedZone, SigningServer, open_signing_server

try:
    unbound.library()
except OSError as error:
    pytest.skip(f"libunbound8 is not installed: {error}", allow_module_level=True)

D = "signed.example"
ZONE = f"""
@ 300 IN MX 10 mx
mx 300 IN A 192.0.2.1
mx 300 IN AAAA 2001:db8::1
_25._tcp.mx 300 IN TLSA 3 1 1 {"ab" * 32}
alias 300 IN CNAME mx
unsigned 300 IN NS ns.unsigned
ns.unsigned 300 IN A 127.0.0.1
mx.unsigned 300 IN A 192.0.2.2
"""


def settings(tmp_path: Path, zone: SignedZone, server: SigningServer, **more: Any) -> Config:
    anchor = tmp_path / "anchor"
    anchor.write_text(zone.anchor)
    return Config(
        **{
            "hostname": "me.example",
            "dns_servers": (Address(server.host, server.port),),
            "dns_validator": "unbound",
            "dns_trust_anchor": str(anchor),
            "dns_timeout": 5.0,
            "dns_attempts": 2,
            **more,
        }
    )


@asynccontextmanager
async def open_unbound(
    tmp_path: Path, zone: SignedZone | None = None, **more: Any
) -> AsyncIterator[tuple[Unbound, SigningServer]]:
    zone = zone or SignedZone(ZONE)
    async with open_signing_server(zone) as server:
        client = Unbound(settings(tmp_path, zone, server, **more))
        try:
            yield client, server
        finally:
            client.close()


def facts(answer: Answer) -> tuple[int, bool, bool]:
    return len(answer.records), answer.secure, answer.nonexistent


async def test_signed_records_and_denials_are_secure(tmp_path: Path) -> None:
    async with open_unbound(tmp_path) as (client, _):
        assert facts(await client.ask(D, "MX")) == (1, True, False)
        assert facts(await client.ask(f"_25._tcp.mx.{D}", "TLSA")) == (1, True, False)
        assert facts(await client.ask(f"mx.{D}", "TXT")) == (0, True, False)
        assert facts(await client.ask(f"gone.{D}", "A")) == (0, True, True)
        answer = await client.ask(f"alias.{D}", "A")
        assert facts(answer) == (1, True, False)
        assert answer.name == f"mx.{D}"
        assert 0 < answer.ttl <= 300


async def test_malformed_and_huge_sets_of_records(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    many = "\n".join(f"_25._tcp.many 300 IN TLSA 3 1 1 {n:064x}" for n in range(600))
    most = "\n".join(f"_25._tcp.most 300 IN TLSA 3 1 1 {n:064x}" for n in range(1000))
    zone = SignedZone(
        f"{ZONE}\n{many}\n{most}\n", broken={"_25._tcp.broken": bytes.fromhex("030101ab")}
    )
    async with open_unbound(tmp_path, zone) as (client, _):
        answer = await client.ask(f"_25._tcp.broken.{D}", "TLSA")
        assert (answer.records, answer.secure) == ((MALFORMED,), True)
        with pytest.raises(NoAnswer, match="more than 16384 bytes"):
            await client.ask(f"_25._tcp.many.{D}", "TLSA")
        with pytest.raises(NoAnswer, match="DNSSEC proves that the answer is wrong"):
            await client.ask(f"_25._tcp.most.{D}", "TLSA")
    assert capfd.readouterr() == ("", "")  # the library does not write into our log


async def test_a_zone_without_signatures_is_insecure(tmp_path: Path) -> None:
    async with open_unbound(tmp_path) as (client, _):
        assert facts(await client.ask(f"mx.unsigned.{D}", "A")) == (1, False, False)


async def test_removed_signatures_are_no_answer(tmp_path: Path) -> None:
    zone = SignedZone(ZONE)
    zone.stripped.add(f"mx.{D}.")
    async with open_unbound(tmp_path, zone) as (client, _):
        with pytest.raises(NoAnswer, match="DNSSEC proves that the answer is wrong"):
            await client.ask(f"mx.{D}", "A")


async def test_expired_signatures_are_no_answer(tmp_path: Path) -> None:
    async with open_unbound(tmp_path, SignedZone(ZONE, lifetime=-timedelta(days=1))) as (client, _):
        with pytest.raises(NoAnswer, match="expired"):
            await client.ask(D, "MX")


async def test_a_server_that_fails_is_no_answer(tmp_path: Path) -> None:
    zone = SignedZone(ZONE)
    zone.failing.add(f"_25._tcp.mx.{D}.")
    async with open_unbound(tmp_path, zone) as (client, _):
        with pytest.raises(NoAnswer, match="SERVFAIL"):
            await client.ask(f"_25._tcp.mx.{D}", "TLSA")
        assert facts(await client.ask(f"mx.{D}", "A")) == (1, True, False)


async def test_silence_has_an_end(tmp_path: Path) -> None:
    async with open_unbound(tmp_path, dns_timeout=0.1, dns_attempts=2) as (client, server):
        server.may_answer = trio.Event()
        began = monotonic()
        with pytest.raises(NoAnswer, match=r"no answer in 0\.2 s"):
            await client.ask(D, "MX")
        assert monotonic() - began < 5


async def test_many_lookups_at_once_and_cancelled_ones(tmp_path: Path) -> None:
    got: list[Answer] = []
    async with open_unbound(tmp_path) as (client, server):
        server.may_answer = trio.Event()

        async def ask(name: str) -> None:
            got.append(await client.ask(name, "A"))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(ask, f"n{number}.{D}")
            with trio.CancelScope() as scope:
                nursery.start_soon(ask, f"mx.{D}")
                async with trio.open_nursery() as doomed:
                    doomed.start_soon(ask, f"never.{D}")
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            server.may_answer.set()
        assert len(got) == 101
        assert all(answer.secure for answer in got)
        assert not client._lookups


async def test_a_name_with_a_zero_byte_is_not_cut_there(tmp_path: Path) -> None:
    async with open_unbound(tmp_path) as (client, server):
        with pytest.raises(NoAnswer, match="no name"):
            await client.ask(f"mx.{D}\0.evil.example", "A")
        assert not server.questions


async def test_the_context_is_freed_when_no_lookup_needs_it(tmp_path: Path) -> None:
    async with open_unbound(tmp_path) as (client, server):
        await client.ask(D, "MX")
        server.may_answer = trio.Event()
        got: list[Answer] = []

        async def ask() -> None:
            got.append(await client.ask(f"mx.{D}", "A"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            client.close()
            await trio.testing.wait_all_tasks_blocked()
            assert client._context is not None
            server.may_answer.set()
        assert facts(got[0]) == (1, True, False)
        await trio.testing.wait_all_tasks_blocked()
        assert client._context is None
        gc.collect()


def test_a_loop_may_end_with_an_open_client(tmp_path: Path) -> None:
    async def main() -> Unbound:
        zone = SignedZone(ZONE)
        async with open_signing_server(zone) as server:
            client = Unbound(settings(tmp_path, zone, server))
            await client.ask(D, "MX")
            return client

    assert trio.run(main)._context is None


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(dns_validator="unbound", dns_trust_anchor=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"dns-trust-anchor.*none: No such file"):
        unbound.check(config)
    monkeypatch.setattr(unbound, "LIBRARY", "libmissing.so.8")
    unbound.library.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"dns-validator.*libmissing\.so\.8.*libunbound8"):
            unbound.check(config)
    finally:
        unbound.library.cache_clear()
    unbound.check(Config())
