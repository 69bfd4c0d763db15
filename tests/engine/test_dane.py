"""What an engine says about DANE at its start, and what it needs for that."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mailerq import Engine
from mailerq.errors import ConfigError
from mailerq.net import unbound
from mailerq.outbound import flow
from mailerq.settings import DnsServer as Address
from tests.engine.kit import Certificate, inbox, open_dialog, serve
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


@pytest.mark.skipif(not has_library(), reason="libunbound8 is not installed")
@pytest.mark.parametrize("records", ["right", "wrong", "stripped"])
async def test_mail_goes_by_the_records_of_a_signed_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: str
) -> None:
    monkeypatch.setattr(flow, "ASK_SECONDS", 0.1)
    certificate = Certificate.make(tmp_path)
    leaf = x509.load_pem_x509_certificates(Path(certificate.chain).read_bytes())[0]
    key = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(b"another" if records == "wrong" else key).hexdigest()
    async with serve(tmp_path / "peer", **certificate.settings) as peer:
        port = peer.addresses[0][1]
        host = f"_{port}._tcp.mx"
        zone = SignedZone(
            f"@ 300 IN MX 10 mx\nmx 300 IN A 127.0.0.1\n{host} 300 IN TLSA 3 1 1 {digest}\n"
        )
        if records == "stripped":
            zone.stripped.add(f"{host}.signed.example.")
        anchor = tmp_path / "anchor"
        anchor.write_text(zone.anchor)
        async with open_signing_server(zone) as server:
            config = configure(
                tmp_path / "relay",
                dns_validator="unbound",
                dns_trust_anchor=str(anchor),
                dns_servers=(Address(server.host, server.port),),
                smtp_out_port=port,
                smtp_out_forbidden=(),
                rabbitmq_results="results",
                rabbitmq_retry="results",
            )
            async with Engine(config) as engine, open_dialog(engine.addresses[0]) as dialog:
                reply = await dialog.mail("c@signed.example")
                assert reply.startswith("250")
                with trio.fail_after(DEADLINE):
                    async with engine.consume("results") as leases:
                        lease = await leases.receive()
                        await engine.ack(lease)
                result = lease.message.results[-1]
                if records == "right":
                    (message,) = await inbox(peer)
                    assert message.properties["connection"]["secure"] is True
                    assert result["cipher"]["version"] == "TLSv1.3"
                else:
                    assert result["status"] == "4.7.5"
                    assert peer.statistics()["incoming"]["messages"] == 0
