"""Certificates and handshakes made to cost much: the loop goes on, and results stay small."""

from __future__ import annotations

import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from mailerq.rules.certificates import MAX_CHARS, MAX_NAMES, facts_of
from tests.engine.lag_kit import Meter, meter, no_turn_above
from tests.outbound.kit import PeerConnection, Script, open_bench
from tests.outbound.tls_kit import NAME, NamedHosts, starttls

LONGEST_TURN = 0.05
"""Seconds of one turn of the loop."""

Key = ec.EllipticCurvePrivateKey


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(
    subject: str,
    key: Key,
    issuer: str,
    signer: Key,
    names: list[str] | None = None,
    comment: bytes = b"",
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
    )
    if names:
        alternative = x509.SubjectAlternativeName([x509.DNSName(each) for each in names])
        builder = builder.add_extension(alternative, critical=False)
    if comment:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), comment)
        builder = builder.add_extension(unknown, critical=False)
    return builder.sign(signer, hashes.SHA256())


def chain(length: int, names: list[str], comment: bytes = b"") -> tuple[list[bytes], bytes, Key]:
    """The PEM of a chain, the peer's own first, the authority, and the peer's key."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(length + 1)]
    made = []
    for depth in range(length):
        is_leaf = depth == 0
        made.append(
            certificate(
                f"level {depth}", keys[depth], f"level {depth + 1}", keys[depth + 1],
                names if is_leaf else None, comment if is_leaf else b"",
            )
        )  # fmt: skip
    root = certificate(f"level {length}", keys[length], f"level {length}", keys[length])
    return (
        [each.public_bytes(Encoding.PEM) for each in made],
        root.public_bytes(Encoding.PEM),
        keys[0],
    )


def context_of(directory: Path, pems: list[bytes], key: Key) -> ssl.SSLContext:
    path = directory / "peer.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + b"".join(pems))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def many(count: int) -> list[str]:
    return [NAME, *(f"host-{number:06}.example.test" for number in range(count))]


@no_turn_above(LONGEST_TURN)
@pytest.mark.parametrize("level", ["opportunistic", "verified"])
@pytest.mark.parametrize(
    ("length", "names", "comment", "taken"),
    [
        (1, many(2000), b"", True),
        (1, [NAME], bytes(80_000), True),
        (40, [NAME], b"", True),
        (1, [NAME], bytes(200_000), False),
    ],
    ids=["many names", "huge", "long chain", "too large"],
)
async def test_a_certificate_that_was_made_to_be_slow_stops_nobody(
    tmp_path: Path, level: str, length: int, names: list[str], comment: bytes, taken: bool
) -> Meter:
    pems, root, key = chain(length, names, comment)
    (tmp_path / "ca.pem").write_bytes(root)
    script = starttls(context_of(tmp_path, pems, key))
    hosts = NamedHosts(d_test=[NAME])
    config: dict[str, Any] = {
        "resolver": hosts,
        "connection_ca_file": str(tmp_path / "ca.pem"),
        "connection_secure": level,
    }
    async with open_bench(script, script, **config) as bench:
        with meter() as turns:
            bench.send()
            if level == "verified" and not taken:
                result = await bench.retried()
                assert result["type"] == "tls"
            else:
                (result,) = await bench.results()
                assert ("cipher" in result) is taken
        assert len(bench.peer.mails) == (0 if result["type"] == "tls" else 1)
        assert len(json.dumps(result)) < 8000
        tickets = bench.dispatcher.tls.tickets
        assert len(tickets) <= 1
        # A chain as large as that would be kept with its ticket.
        assert not tickets or sum(map(len, pems)) < 30_000
    return turns


def test_what_is_kept_of_a_certificate_is_bounded() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names = ["x" * 60 + f".{'y' * 60}.{'z' * 60}.{'w' * 60}.{n}.test" for n in range(100)]
    made = certificate("c" * 64, key, "i" * 64, key, names)
    facts = facts_of(made.public_bytes(Encoding.DER))
    assert facts is not None
    assert len(facts.altnames) == MAX_NAMES
    assert max(map(len, facts.altnames)) <= MAX_CHARS
    assert not facts.self_signed


@pytest.mark.parametrize("der", [b"", b"\x30", b"x" * 1000, b"\x30\x84\xff\xff\xff\xff"])
def test_a_certificate_that_is_none_says_nothing(der: bytes) -> None:
    assert facts_of(der) is None


def drips(piece: bytes) -> Script:
    """A peer that sends a handshake byte by byte, and never ends it."""

    async def script(peer: PeerConnection) -> None:
        await peer.send("220 mx.test ESMTP\r\n")
        await peer.line()
        await peer.send("250-mx.test\r\n250 STARTTLS\r\n")
        await peer.line()
        await peer.send("220 go\r\n")
        await peer.stream.receive_some()
        await peer.send(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
        while True:
            await peer.send(piece)
            await trio.sleep(0.01)

    return script


async def test_a_handshake_has_the_time_of_one_reply() -> None:
    config: dict[str, Any] = {
        "resolver": NamedHosts(d_test=[NAME]),
        "connection_secure": "required",
        "smtp_out_timeout": 0.3,
    }
    async with open_bench(*[drips(b"\0")] * 3, **config) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["state"], result["result"]) == ("tls", "starttls", "timeout")


async def test_a_peer_that_is_silent_in_the_handshake_gets_mail_in_clear_if_it_may() -> None:
    async def silent(peer: PeerConnection) -> None:
        await peer.send("220 mx.test ESMTP\r\n")
        await peer.line()
        await peer.send("250-mx.test\r\n250 STARTTLS\r\n")
        await peer.line()
        await peer.send("220 go\r\n")
        await trio.sleep_forever()

    config: dict[str, Any] = {"resolver": NamedHosts(d_test=[NAME]), "smtp_out_timeout": 0.3}
    async with open_bench(silent, PeerConnection.serve, **config) as bench:
        bench.send()
        await bench.results()
        assert bench.peer.connections == 2
