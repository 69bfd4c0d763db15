"""Contexts and tickets of deliveries."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.net.client_tls import MAX_TICKETS, TICKET_SECONDS, ClientTls, Tickets
from mailerq.rules.security import Proof


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    for name in ("own", "other"):
        issued = authority.issue_cert(f"{name}.test")
        issued.private_key_pem.write_to_path(str(directory / f"{name}.key"))
        issued.private_key_and_cert_chain_pem.write_to_path(str(directory / f"{name}.pem"))
        issued.cert_chain_pems[0].write_to_path(str(directory / f"{name}.crt"))
    (directory / "empty.pem").write_text("nothing\n")
    return directory


async def test_contexts_are_made_once_and_check_only_where_asked(files: Path) -> None:
    tls = ClientTls.of(Config(connection_ca_file=str(files / "ca.pem")))
    plain, strict = await tls.context(verify=False), await tls.context(verify=True)
    assert plain is await tls.context(verify=False)
    assert strict is await tls.context(verify=True)
    assert (plain.verify_mode, plain.check_hostname) == (ssl.CERT_NONE, False)
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert not strict.hostname_checks_common_name
    assert len(await tls.authorities()) == 1
    for context in (plain, strict):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION


async def test_the_authorities_of_the_system_are_read_when_they_are_needed() -> None:
    tls = ClientTls.of(Config())
    assert tls._verifying is None
    strict = await tls.context(verify=True)
    assert strict.verify_mode is ssl.CERT_REQUIRED


async def test_an_old_version_never_proves_anything() -> None:
    tls = ClientTls.of(Config(connection_tls_min="1.0", connection_ciphers="DEFAULT@SECLEVEL=0"))
    assert (await tls.context(verify=False)).minimum_version is ssl.TLSVersion.TLSv1
    assert (await tls.context(verify=True)).minimum_version is ssl.TLSVersion.TLSv1_2
    newest = ClientTls.of(Config(connection_tls_min="1.3"))
    assert (await newest.context(verify=True)).minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"connection_ca_file": "nowhere.pem"}, "connection-ca-file: .*No such file"),
        ({"connection_ca_file": "empty.pem"}, "connection-ca-file: .*no certificate in PEM"),
        ({"connection_certificate": "empty.pem"}, "connection-certificate: .*in PEM"),
        (
            {"connection_certificate": "own.crt", "connection_key": "other.key"},
            "connection-certificate: .*another certificate",
        ),
        ({"connection_ciphers": "NONSENSE"}, "connection-ciphers: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    files: Path, settings: dict[str, str], words: str
) -> None:
    paths = {k: str(files / v) if k != "connection_ciphers" else v for k, v in settings.items()}
    with pytest.raises(ConfigError, match=words):
        ClientTls.of(Config(**paths))


def test_a_certificate_with_a_key_apart_or_in_it_is_good(files: Path) -> None:
    ClientTls.of(Config(connection_certificate=str(files / "own.pem")))
    apart = {
        "connection_certificate": str(files / "own.crt"),
        "connection_key": str(files / "own.key"),
    }
    ClientTls.of(Config(**apart))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
def test_files_that_only_root_could_read_stay_as_they_were(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.pem"
    path.write_bytes((files / "own.pem").read_bytes())
    path.chmod(0o600)
    tmp_path.chmod(0o755)
    config = Config(connection_certificate=str(path))
    before, notes = ClientTls.of(config), list[str]()
    os.seteuid(65534)
    try:
        if os.access(path.parent, os.X_OK, effective_ids=True):
            assert ClientTls.of(config, before, notes) is before
            assert "stays as it was until a restart" in notes[0]
        with pytest.raises(ConfigError):
            ClientTls.of(config)
    finally:
        os.seteuid(0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_ticket_is_used_once_and_for_a_time() -> None:
    clock, session, proof = Clock(), _session(), Proof("mx.test", encrypted=True)
    tickets = Tickets(clock)
    tickets.keep("a", session, proof, None)
    ticket = tickets.take("a")
    assert ticket is not None
    assert (ticket.session, ticket.proof) == (session, proof)
    assert tickets.take("a") is None
    tickets.keep("a", session, proof, None)
    clock.now = TICKET_SECONDS
    assert tickets.take("a") is None


def test_the_oldest_ticket_is_forgotten_first() -> None:
    tickets, proof = Tickets(), Proof("mx.test")
    for number in range(MAX_TICKETS + 1):
        tickets.keep(number, _session(), proof, None)
    assert len(tickets) == MAX_TICKETS
    assert tickets.take(0) is None
    assert tickets.take(1) is not None


def _session() -> Any:
    return object()
