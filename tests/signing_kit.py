"""Keys that sign, and independent programs that verify: dkimpy, OpenDKIM and Mail::DKIM."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import dkim
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from mailerq.store.signing_keys import SigningKey

RSA_BITS = 2048


@lru_cache
def rsa_pem(number: int = 0, bits: int = RSA_BITS) -> bytes:
    """An RSA key; each number has its own, which stays the same within a run."""
    return in_pem(rsa.generate_private_key(65537, bits))


@lru_cache
def ed25519_pem(number: int = 0) -> bytes:
    return in_pem(ed25519.Ed25519PrivateKey.generate())


def in_pem(key: Any) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


def strings(record: str) -> str:
    """A DNS record in strings of 255, as a zone file has it."""
    return " ".join(f'"{record[at : at + 255]}"' for at in range(0, len(record), 255))


class Keys:
    """Keys in a directory, as `dkim-directory` has them, and the DNS records of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: dict[str, str] = {}

    def add(self, domain: str, selector: str, pem: bytes | None = None) -> str:
        """Write a key, and return the name of its file."""
        path = self.directory / domain / f"{selector}.pem"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rsa_pem() if pem is None else pem)
        path.chmod(0o600)
        self.publish(domain, selector, path.read_bytes())
        return str(path)

    def publish(self, domain: str, selector: str, pem: bytes) -> None:
        self.records[f"{selector}._domainkey.{domain}"] = SigningKey(pem).record

    def zone(self, name: str, kind: str) -> Any:
        """What a `DnsServer` answers."""
        record = self.records.get(name)
        if record is None:
            return 3
        return [strings(record)] if kind == "TXT" else []


def signatures(mail: bytes) -> list[bytes]:
    """The DKIM-Signature fields above a mail, unfolded."""
    header = mail.partition(b"\r\n\r\n")[0].replace(b"\r\n\t", b" ").replace(b"\r\n ", b" ")
    return [line for line in header.split(b"\r\n") if line.startswith(b"DKIM-Signature:")]


def tags(signature: bytes) -> dict[str, str]:
    """The tags of a signature, without blanks."""
    text = signature.decode().partition(":")[2]
    pairs = (tag.partition("=") for tag in text.split(";"))
    return {name.strip(): re.sub(r"\s", "", value) for name, _, value in pairs}


def dkimpy_says(mail: bytes, records: dict[str, str]) -> list[bool]:
    """Whether dkimpy takes each signature, from the top."""

    def look_up(name: bytes, timeout: float = 5) -> bytes | None:
        record = records.get(name.decode().rstrip("."))
        return None if record is None else record.encode()

    count = len(signatures(mail))

    def verify(index: int) -> bool:
        try:
            return bool(dkim.DKIM(mail).verify(index, dnsfunc=look_up))
        except dkim.ValidationError:
            return False

    return [verify(index) for index in range(count)]


def opendkim_says(mail: bytes, records: dict[str, str]) -> dict[str, str]:
    """The result of OpenDKIM for each selector; empty if it is not installed."""
    program = shutil.which("opendkim", path="/usr/sbin:/usr/bin")
    if program is None:
        return {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        folder.chmod(0o755)
        lines = [f"{name} {record}\n" for name, record in records.items()]
        (folder / "keys").write_text("".join(lines))
        (folder / "mail").write_bytes(mail)
        (folder / "conf").write_text(
            f"Mode v\nTestPublicKeys {folder}/keys\nSyslog no\nAuthservID test\n"
            "MaximumSignaturesToVerify 9\n"
        )
        command = [program, "-x", folder / "conf", "-t", folder / "mail", "-vvv"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    found = re.findall(r"dkim=(\w+)[^;]*?header\.s=([\w.-]+)", said)
    assert found, said
    return {selector: result for result, selector in found}


PERL = r"""
use strict; use Mail::DKIM::Verifier; use Mail::DKIM::DNS; use Net::DNS::Resolver;
my ($port, $file) = @ARGV;
Mail::DKIM::DNS::resolver(Net::DNS::Resolver->new(nameservers => ["127.0.0.1"], port => $port));
my $verifier = Mail::DKIM::Verifier->new;
open my $in, "<", $file or die; binmode $in; local $/; $verifier->PRINT(<$in>); $verifier->CLOSE;
print $_->selector, " ", $_->result, "\n" for $verifier->signatures;
"""


@lru_cache
def has_perl() -> bool:
    command = ["perl", "-MMail::DKIM", "-MNet::DNS", "-e", "1"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


async def perl_says(mail: bytes, port: int) -> dict[str, str]:
    """The result of Mail::DKIM for each selector, with keys from the DNS server at a port."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(mail)
        file.flush()
        done = await trio.run_process(
            ["perl", "-e", PERL, str(port), file.name], capture_stdout=True
        )
    pairs = (line.split(" ", 1) for line in done.stdout.decode().splitlines())
    return dict(pairs)


async def assert_verifies(
    mail: bytes, keys: Keys, port: int, *, selectors: Iterable[str], strict: bool = True
) -> None:
    """All programs that are here take the signatures of these selectors.

    Mail::DKIM of Debian 12 knows no Ed25519, and says so. `strict`: OpenDKIM's test mode reads the
    mail as it is.
    """
    wanted = list(selectors)
    assert [tags(signature)["s"] for signature in signatures(mail)] == wanted
    assert dkimpy_says(mail, keys.records) == [True] * len(wanted)
    if strict and (found := await trio.to_thread.run_sync(opendkim_says, mail, keys.records)):
        assert found == dict.fromkeys(wanted, "pass"), found
    if has_perl():
        kinds = {tags(signature)["s"]: tags(signature)["a"] for signature in signatures(mail)}
        for selector, result in (await perl_says(mail, port)).items():
            is_old = kinds[selector].startswith("ed25519") and result == "invalid"
            assert is_old or result == "pass", (selector, result)
