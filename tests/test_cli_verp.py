"""``mailerq verp``: what a return address says, and keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mailerq.cli import main
from mailerq.mail import verp


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(["verp", *words]) == status
    return capsys.readouterr().out


@pytest.fixture
def keys(tmp_path: Path) -> str:
    (tmp_path / "keys").write_text("a AeJ2xBrJJPd1vlTV7pVf3OlB\n")
    return f"--verp-key-file={tmp_path / 'keys'}"


def test_an_address_is_made_and_read(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = run(capsys, keys, "encode", "news@list.test", "ann@d.test").strip()
    said = run(capsys, keys, "decode", address)
    assert said.startswith("genuine: mail of news@list.test to ann@d.test, sent on 20")
    found = json.loads(run(capsys, keys, "decode", "--json", address))
    assert (found["verdict"], found["recipient"], found["message-id"]) == (
        "genuine", "ann@d.test", None,
    )  # fmt: skip


def test_a_long_recipient_takes_an_id(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a" * 50 + "@d.test"
    assert run(capsys, keys, "encode", "news@list.test", long, status=1) == ""
    address = run(capsys, keys, "encode", "news@list.test", long, "--id=0a1b").strip()
    assert "with the message id 0a1b," in run(capsys, keys, "decode", address)
    address = run(capsys, keys, "encode", "news@list.test", long, "--id=A B").strip()
    assert f"has the digest {verp.digest('A B')}," in run(capsys, keys, "decode", address)


def test_what_is_not_genuine_is_said(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = run(capsys, keys, "encode", "news@list.test", "ann@d.test").strip()
    assert run(capsys, keys, "decode", address.replace("ann", "bob"), status=1) == "forged\n"
    assert run(capsys, keys, "decode", "news@list.test", status=1) == "no token\n"
    found = json.loads(run(capsys, keys, "decode", "--json", "news@list.test", status=1))
    assert found == {"verdict": "no token", "sender": None}


def test_a_new_key_has_an_id_that_no_other_has(
    keys: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = verp.parse_keys(run(capsys, "key"))
    assert key.id == "a"
    (key,) = verp.parse_keys(run(capsys, keys, "key"))
    assert key.id == "b"
    lines = "".join(f"{digit} {'x' * 20}\n" for digit in "abcdefghijklmnopqrstuvwxyz")
    (tmp_path / "keys").write_text(lines)
    assert run(capsys, keys, "key", status=1) == ""


def test_mistakes_are_errors(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "decode", "a@b.test", status=64)
    run(capsys, "encode", "a@b.test", "c@d.test", status=64)
    run(capsys, keys, "encode", "a@b.test", "nobody", status=64)
    run(capsys, "--verp-key-file=/nonexistent", "decode", "a@b.test", status=2)
