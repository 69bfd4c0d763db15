"""Verdicts on certificate chains are those of OpenSSL, which has DANE of its own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from mailerq.rules.dane import tlsa_set, verify
from mailerq.rules.security import Reason, Tlsa
from tests.interop.kit import program
from tests.rules.test_dane import (
    EXPIRED_ROOT,
    HOST,
    LEAF,
    MIDDLE,
    NOW,
    OTHER,
    ROOT,
    Cert,
)

PEM = serialization.Encoding.PEM
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH


@contextmanager
def open_peer(directory: Path, chain: Sequence[Cert]) -> Iterator[int]:
    """A TLS server with this chain; its port."""
    path = directory / "chain.pem"
    key = chain[0].key.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(key + b"".join(map(pem, chain)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with (
                contextlib.suppress(OSError),  # the client may refuse the chain
                client,
                context.wrap_socket(client, server_side=True) as stream,
            ):
                stream.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def pem(cert: Cert) -> bytes:
    return ssl.DER_cert_to_PEM_cert(cert.der).encode()


def judged_by_openssl(directory: Path, records: Sequence[Tlsa], chain: Sequence[Cert]) -> str:
    """Why OpenSSL refuses the chain; empty if it does not."""
    options = []
    for r in records:
        data = f"{r.usage} {r.selector} {r.matching} {r.data.hex()}"
        options += ["-dane_tlsa_rrdata", data]
    with open_peer(directory, chain) as port:
        done = subprocess.run(
            [
                *(program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}"),
                *("-dane_tlsa_domain", HOST, "-dane_ee_no_namechecks", "-verify_return_error"),
                *("-attime", str(int(NOW)), *options),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stdout + done.stderr
    if done.returncode == 0:
        assert "Verification: OK" in said, said
        return ""
    return said


def issued(**more: Any) -> tuple[Cert, ...]:
    """A chain whose intermediate authority is as given."""
    middle = Cert("middle", ROOT, **{"ca": True, **more})
    return Cert("leaf", middle, names=[HOST]), middle, ROOT


def leaf(*names: str, **more: Any) -> tuple[Cert, ...]:
    return Cert("leaf", MIDDLE, names=names, **more), MIDDLE, ROOT


CHAIN = (LEAF, MIDDLE, ROOT)
TOP = [ROOT.tlsa(2, 1, 1)]
PKIX = Tlsa(1, 1, 1, bytes(32))

CASES: dict[str, tuple[Sequence[Tlsa], Sequence[Cert]]] = {
    "ee key": ([LEAF.tlsa(3, 1, 1)], CHAIN),
    "ee certificate sha512": ([LEAF.tlsa(3, 0, 2)], CHAIN),
    "ee whole": ([LEAF.tlsa(3, 0, 0)], CHAIN),
    "ee other": ([OTHER.tlsa(3, 1, 1)], CHAIN),
    "ee expired and misnamed": ([OTHER.tlsa(3, 1, 1)], (OTHER,)),
    "ee of an issuer": ([MIDDLE.tlsa(3, 1, 1)], CHAIN),
    "strong digest wrong": ([LEAF.tlsa(3, 1, 1), OTHER.tlsa(3, 1, 2)], CHAIN),
    "strong digest right": ([OTHER.tlsa(3, 1, 1), LEAF.tlsa(3, 1, 2)], CHAIN),
    "one of two": ([OTHER.tlsa(3, 1, 1), LEAF.tlsa(3, 0, 1)], CHAIN),
    "pkix beside": ([PKIX, LEAF.tlsa(3, 1, 1)], CHAIN),
    "root": (TOP, CHAIN),
    "root certificate": ([ROOT.tlsa(2, 0, 2)], CHAIN),
    "root whole, absent": ([ROOT.tlsa(2, 0, 0)], CHAIN[:2]),
    "root key, absent": ([ROOT.tlsa(2, 1, 0)], CHAIN[:2]),
    "root digest, absent": ([ROOT.tlsa(2, 0, 1)], CHAIN[:2]),
    "intermediate": ([MIDDLE.tlsa(2, 1, 1)], CHAIN[:2]),
    "intermediate whole": ([MIDDLE.tlsa(2, 0, 0)], CHAIN[:1]),
    "intermediate key": ([MIDDLE.tlsa(2, 1, 0)], CHAIN[:1]),
    "another key": ([OTHER.tlsa(2, 1, 0)], CHAIN),
    "another authority": ([OTHER.tlsa(2, 0, 1)], CHAIN),
    "expired root": (TOP, (LEAF, MIDDLE, EXPIRED_ROOT)),
    "expired leaf": (TOP, leaf(HOST, days=(-9, -1))),
    "expired intermediate": (TOP, issued(days=(-9, -1))),
    "leaf of tomorrow": (TOP, leaf(HOST, days=(1, 9))),
    "wrong name": (TOP, leaf("elsewhere.test")),
    "star": (TOP, leaf("*.d.test")),
    "star of a top-level domain": (TOP, leaf("*.test")),
    "common name beside others": (TOP, (Cert(HOST, MIDDLE, names=["e.test"]), MIDDLE, ROOT)),
    "for clients": (TOP, leaf(HOST, usages=[CLIENT])),
    "no authority": (TOP, issued(ca=False)),
    "no constraints": (TOP, issued(ca=None)),
    "may not sign": (TOP, issued(cert_sign=False)),
    "may sign": (TOP, issued(cert_sign=True)),
    "permitted": (TOP, issued(permitted=["d.test"])),
    "not permitted": (TOP, issued(permitted=["e.test"])),
    "excluded": (TOP, issued(excluded=["d.test"])),
    "unknown critical": (TOP, issued(critical="1.2.3.4")),
    "path length": ([Tlsa(2, 1, 1, ROOT.tlsa(2, 1, 1).data)], issued(path_length=0)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_verdict_is_that_of_openssl(tmp_path: Path, case: str) -> None:
    records, chain = CASES[case]
    found = tlsa_set(HOST, records)
    assert found is not None
    ours = verify(found, [cert.der for cert in chain], NOW)
    theirs = judged_by_openssl(tmp_path, records, chain)
    assert (ours is None) == (not theirs), (ours, theirs)


def test_a_common_name_alone_is_none_for_us(tmp_path: Path) -> None:
    chain = (Cert(HOST, MIDDLE), MIDDLE, ROOT)
    found = tlsa_set(HOST, TOP)
    assert found is not None
    failure = verify(found, [cert.der for cert in chain], NOW)
    assert failure is not None
    assert failure.reason is Reason.HOST_MISMATCH
    assert not judged_by_openssl(tmp_path, TOP, chain)  # it is the only fault
