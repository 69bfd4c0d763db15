"""Private keys and their files."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from mailerq.mail.dkim_record import RecordProblem, read_record
from mailerq.rules.signing import SigningFile
from mailerq.store import signing_keys
from mailerq.store.signing_keys import KeyFiles, KeyProblem, SigningKey, selectors_in, survey
from tests.signing_kit import ed25519_pem, in_pem, rsa_pem


def test_keys_of_both_kinds() -> None:
    key = SigningKey(rsa_pem())
    assert (key.algorithm, key.bits, key.size) == ("rsa-sha256", 2048, 256)
    assert key.record.startswith("v=DKIM1; k=rsa; p=MII") and len(key.sign(b"x")) == 256
    other = SigningKey(ed25519_pem())
    assert (other.algorithm, other.bits, other.size) == ("ed25519-sha256", 256, 64)
    assert len(base64.b64decode(other.public)) == 32


def test_a_key_of_1024_bits_and_one_of_openssl_are_good() -> None:
    assert SigningKey(rsa_pem(0, 1024)).bits == 1024
    key = rsa.generate_private_key(65537, 2048)
    old = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    assert b"BEGIN RSA PRIVATE KEY" in old
    assert SigningKey(b"some text before\n" + old).public == SigningKey(in_pem(key)).public


def encrypted() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    secret = BestAvailableEncryption(b"secret")
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret)


def public() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def damaged() -> bytes:
    """A key whose parts belong to two keys."""
    one, two = (rsa.generate_private_key(65537, 2048).private_numbers() for _ in range(2))
    numbers = rsa.RSAPrivateNumbers(
        one.p, one.q, two.d, two.dmp1, two.dmq1, one.iqmp, one.public_numbers
    )
    return in_pem(numbers.private_key(unsafe_skip_rsa_key_validation=True))


@pytest.mark.parametrize(
    ("pem", "text"),
    [
        (b"", "is not a key in PEM"),
        (b"\x00\x01", "is not a key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "cannot be read"),
        (public(), "is a public key"),
        (encrypted(), "is encrypted"),
        (in_pem(ec.generate_private_key(ec.SECP256R1())), "not of RSA or Ed25519"),
        (in_pem(dsa.generate_private_key(1024)), "not of RSA or Ed25519"),
        (damaged(), "is damaged"),
    ],
)
def test_a_key_that_cannot_sign_says_why(pem: bytes, text: str) -> None:
    with pytest.raises(KeyProblem, match=text):
        SigningKey(pem)


def test_a_key_of_a_strange_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["openssl", "genrsa", "768"]
    pem = subprocess.run(command, capture_output=True, check=True).stdout
    with pytest.raises(KeyProblem, match=r"768 bits|cannot be read"):
        SigningKey(pem)
    monkeypatch.setattr(signing_keys, "MAX_BITS", 2047)  # a key of 8192 bits takes a minute
    with pytest.raises(KeyProblem, match="has 2048 bits"):
        SigningKey(rsa_pem())


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "s.pem"
    files = KeyFiles()
    with pytest.raises(KeyProblem, match="No such file"):
        files.get(str(path))
    path.write_bytes(rsa_pem())
    path.chmod(0o600)
    first = files.get(str(path))
    assert files.get(str(path)) is first
    path.write_bytes(ed25519_pem())
    assert files.get(str(path)).algorithm == "ed25519-sha256"
    path.write_text("no key")
    for _ in range(2):
        with pytest.raises(KeyProblem, match="is not a key"):
            files.get(str(path))


def test_what_is_no_file_of_a_key_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(100_000))
    for name, text in (("pipe", "is no file"), ("large", "is larger"), ("", "is no file")):
        with pytest.raises(KeyProblem, match=text):
            KeyFiles().get(str(tmp_path / name))


def test_a_key_that_everybody_may_read_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.pem"
    path.write_bytes(rsa_pem())
    path.chmod(0o640)
    KeyFiles().get(str(path))
    assert caplog.text == ""
    path.chmod(0o644)
    KeyFiles().get(str(path))
    assert f"{path} can be read or written by every account" in caplog.text


def test_selectors_are_the_names_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "a.test"
    assert list(selectors_in(str(tmp_path), "a.test")) == []
    folder.mkdir()
    for name in ("s2.pem", "S1.pem", "notes.txt", ".hidden.pem", "a b.pem", "x;y.pem"):
        (folder / name).touch()
    assert list(selectors_in(str(tmp_path), "a.test")) == ["S1", "s2"]
    with pytest.raises(FileNotFoundError):
        selectors_in(str(tmp_path / "missing"), "a.test")


def test_a_survey_names_all_keys_and_their_mistakes(tmp_path: Path) -> None:
    folder = tmp_path / "a.test"
    folder.mkdir()
    for name, content, mode in (
        ("good", rsa_pem(), 0o600), ("open", rsa_pem(), 0o644), ("bad", b"", 0o600),
        ("weak", rsa_pem(0, 1024), 0o600), ("a b", rsa_pem(), 0o600),
    ):  # fmt: skip
        (folder / f"{name}.pem").write_bytes(content)
        (folder / f"{name}.pem").chmod(mode)
    text = (
        '[[key]]\ndomain = "b.test"\nselector = "s"\nfile = "/missing.pem"\n'
        '[[key]]\ndomain = "a.test"\nselector = "gone"\n'
        '[[key]]\ndomain = "a.test"\nselector = "good"\n'
    )
    file = SigningFile.parse(text.encode(), "x.toml")
    found = {each.selector: each.problem or each.note for each in survey(str(tmp_path), file)}
    assert found == {
        "s": "cannot be read: No such file or directory",
        "gone": "cannot be read: No such file or directory",
        "good": "",
        "a b": "is not named for a selector: SELECTOR.pem",
        "bad": "is not a key in PEM",
        "open": "can be read or written by every account of this host",
        "weak": "has 1024 bits; 2048 are advised",
    }


def test_the_record_of_a_key_has_the_key() -> None:
    for pem in (rsa_pem(), ed25519_pem()):
        key = SigningKey(pem)
        record = read_record(key.record.encode())
        assert (record.kind, record.key) == (key.algorithm.partition("-")[0], key.public)
        assert record.allows_sha256 and record.allows_mail and not record.is_test


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (b"", "has no key"), (b"v=spf1 -all", "is not a record|is not a list"), (b"p", "no|list"),
        (b"p=a; p=b", "twice"), (b"v=DKIM2; p=", "is not a record"), (b"p=; v=DKIM1", "record"),
        (b"p=???", "base64"), (b"p=" + b"A" * 9000, "bytes"),
    ],
)  # fmt: skip
def test_what_is_no_record_says_why(text: bytes, mistake: str) -> None:
    with pytest.raises(RecordProblem, match=mistake):
        read_record(text)


def test_the_tags_of_a_record() -> None:
    record = read_record(b"v=DKIM1; h=sha1 : SHA256; s=email; t=y:s; p= AA\t AA ;")
    assert record.key == "AAAA" and record.allows_sha256 and record.allows_mail and record.is_test
    assert not read_record(b"h=sha1; p=").allows_sha256
    assert not read_record(b"s=tlsrpt; p=").allows_mail
    assert read_record(b"p=").key == ""
