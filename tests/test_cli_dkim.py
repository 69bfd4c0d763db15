"""``mailerq dkim``, and what ``check-config`` and ``explain`` say about keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.net.dns_server import open_dns_server
from tests.signing_kit import Keys, ed25519_pem, rsa_pem, strings
from tests.support import mailerq
from tests.test_cli_daemon import settings_in


def run(keys: Path, *words: str, status: int = 0) -> str:
    done = mailerq("dkim", *words, f"--dkim-directory={keys}")
    assert done.returncode == status, (done.stdout + done.stderr).decode()
    return (done.stderr if status else done.stdout).decode()


async def run_with_dns(
    zone: Callable[[str, str], Any] | dict[tuple[str, str], Any],
    keys: Path,
    *words: str,
    dns_timeout: float = 30.0,
) -> tuple[int, str]:
    async with open_dns_server(zone) as server:
        options = [f"--dkim-directory={keys}", f"--dns-servers={server.address}"]
        options += [f"--dns-timeout={dns_timeout}", "--dns-attempts=1"]
        done = await trio.to_thread.run_sync(lambda: mailerq("dkim", *words, *options))
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_new_key_is_for_its_owner_alone_and_its_record_is_shown(
    tmp_path: Path, kind: str
) -> None:
    said = run(tmp_path / "keys", "new", "Example.com", "s1", "--type", kind)
    path = tmp_path / "keys" / "example.com" / "s1.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(path) in said and "s1._domainkey.example.com. IN TXT" in said
    facts = json.loads(run(tmp_path / "keys", "show", "--json"))
    assert facts["algorithm"] == f"{kind}-sha256" and facts["problem"] is None
    assert "".join(facts["strings"]) == facts["record"]
    assert all(len(text) <= 255 for text in facts["strings"])
    for text in facts["strings"]:
        assert f'"{text}"' in said
    assert "is there already" in run(
        tmp_path / "keys", "new", "example.com", "s1", status=os.EX_CANTCREAT
    )


def test_a_new_key_goes_to_a_file_where_that_is_asked(tmp_path: Path) -> None:
    done = mailerq("dkim", "new", "a.test", "s", "--json", "--file", tmp_path / "x.pem")
    assert json.loads(done.stdout)["file"] == str(tmp_path / "x.pem")
    assert mailerq("dkim", "new", "a.test", "s").returncode == os.EX_CONFIG
    assert mailerq("dkim", "show").returncode == os.EX_CONFIG


@pytest.mark.parametrize("words", [("../x", "s"), ("a.test", "../s"), ("a.test", "a b")])
def test_names_that_are_none_make_no_file(tmp_path: Path, words: tuple[str, str]) -> None:
    run(tmp_path, "new", *words, status=os.EX_USAGE)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    directory = tmp_path / "dkim"
    directory.mkdir()
    return Keys(directory)


async def test_a_key_with_its_record_in_the_dns_is_good(keys: Keys) -> None:
    keys.add("a.test", "s1")
    keys.add("a.test", "s2", ed25519_pem())
    status, said = await run_with_dns(keys.zone, keys.directory, "check", "--json")
    assert status == 0, said
    assert {json.loads(line)["state"] for line in said.splitlines()} == {"good"}


async def test_check_says_what_is_wrong_and_what_to_do(keys: Keys) -> None:
    for name in ("good", "other", "missing", "revoked", "tlsrpt", "double", "silent"):
        keys.add("a.test", name)
    (keys.directory / "a.test" / "bad.pem").write_text("")
    good = keys.records["good._domainkey.a.test"]
    records = {
        "good": [good + "; t=y"],
        "other": [good.replace(good[30:60], "A" * 30)],
        "revoked": ["v=DKIM1; p="],
        "tlsrpt": [good + "; s=tlsrpt"],
        "double": ["v=spf1 -all", good],
    }
    zone: dict[tuple[str, str], Any] = {
        (f"{name}._domainkey.a.test", "TXT"): [strings(text) for text in texts]
        for name, texts in records.items()
    }
    zone["silent._domainkey.a.test", "TXT"] = None
    check = partial(run_with_dns, zone, keys.directory, "check", dns_timeout=2.0)
    status, said = await check("--json")
    assert status == 1, said
    found = {each["selector"]: each for each in map(json.loads, said.splitlines())}
    expected = {
        "good": ("good", "t=y", "remove t=y"),
        "other": ("differs", "another key", "publish"),
        "missing": ("missing", "no TXT record", "publish"),
        "revoked": ("differs", "revoked", "publish"),
        "tlsrpt": ("differs", "not for mail", "publish"),
        "double": ("good", "2 records", "remove the other"),
        "silent": ("no answer", "", "try again"),
        "bad": ("bad key", "is not a key in PEM", "repair"),
    }
    for selector, (state, reason, todo) in expected.items():
        answer = found[selector]
        assert answer["state"] == state and reason in answer["reason"], answer
        assert todo in answer["to-do"], answer
    status, said = await check("a.test", "silent")
    assert status == os.EX_TEMPFAIL and "silent._domainkey.a.test" in said


def test_check_config_names_keys_that_cannot_sign(tmp_path: Path, keys: Keys) -> None:
    Path(keys.add("a.test", "bad")).write_text("")
    os.chmod(keys.add("a.test", "open", rsa_pem()), 0o644)
    done = mailerq("check-config", *settings_in(tmp_path), f"--dkim-directory={keys.directory}")
    said = done.stdout.decode()
    assert done.returncode == 0, said
    folder = keys.directory / "a.test"
    assert f"note: the key {folder}/bad.pem is not a key in PEM" in said
    assert f"note: the key {folder}/open.pem can be read or written by every account" in said


def test_check_config_names_domains_without_a_key_in_force(tmp_path: Path, keys: Keys) -> None:
    for name in ("empty.test", "No Domain", "gone.test"):
        (keys.directory / name).mkdir()
    keys.add("good.test", "s1")
    keys.add("old.test", "s1")
    os.rename(keys.add("gone.test", "s1"), keys.directory / "gone.test" / "s1.pem.old")
    file = tmp_path / "dkim.toml"
    file.write_text(
        '[[key]]\ndomain = "old.test"\nfrom = "*.old.test"\nnot-after = 2020-01-01\n'
        '[[key]]\ndomain = "old.test"\nnot-after = 2020-01-01\n'
        '[[key]]\ndomain = "none.test"\nsubdomains = true\n'
        '[[key]]\ndomain = "good.test"\nsubdomains = true\n'
        '[[key]]\ndomain = "good.test"\nfrom = "*"\nprotocols = "arc"\n'
    )
    settings = [f"--dkim-directory={keys.directory}", f"--dkim-file={file}"]
    done = mailerq("check-config", *settings_in(tmp_path), *settings)
    said = done.stdout.decode()
    assert done.returncode == 0, said
    found = re.findall(r"note: mail from (\S+) cannot be signed: (.{26})", said)
    missing, old = "there is no key in " + f"{keys.directory}"[:7], "no key is in force now: /"
    expected = {"empty.test": missing, "gone.test": missing, "none.test": missing}
    expected |= {"*.none.test": missing, "old.test": old, "*.old.test": old}
    assert {name: text[:25] for name, text in found} == {
        name: text[:25] for name, text in expected.items()
    }, said


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        (["--tls-report=true", "--tls-report-from=t@X.test"], True),
        (["--tls-report-from=t@x.test"], False),
        (["--tls-report=1", "--tls-report-from=t@X.test", "--dkim-directory={keys}"], True),
        (["--tls-report=1", "--tls-report-from=t@old.test", "--dkim-file={file}"], True),
        (["--tls-report=1", "--tls-report-from=t@A.test", "--dkim-directory={keys}"], False),
        (["--tls-report=1", "--tls-report-from=t@sub.a.test", "--dkim-file={file}"], False),
        (["--tls-report=1", "--tls-report-contact=t@x.test"], False),
    ],
)
def test_check_config_says_if_tls_reports_go_unsigned(
    tmp_path: Path, keys: Keys, settings: list[str], is_said: bool
) -> None:
    path = keys.add("a.test", "s1")
    keys.add("old.test", "s1")
    file = tmp_path / "dkim.toml"
    file.write_text(
        f'[[key]]\ndomain = "a.test"\nselector = "s1"\nfile = "{path}"\nsubdomains = true\n'
        f'[[key]]\ndomain = "old.test"\nselector = "s1"\nfile = "{path}"\nnot-after = 2020-01-01\n'
    )
    more = [text.format(keys=keys.directory, file=file) for text in settings]
    done = mailerq("check-config", *settings_in(tmp_path), *more)
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert ("note: tls-report-from: no key signs mail from " in said) is is_said, said


def test_a_daemon_does_not_start_with_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "dkim.toml"
    path.write_text('[[key]]\ndomain = "a.test"\n')
    for command in ("check-config", "--shutdown-timeout=1"):
        done = mailerq(command, *settings_in(tmp_path), f"--dkim-file={path}")
        assert f"{path}:1: a [[key]] needs a file" in done.stderr.decode()
        assert done.returncode in (1, 2)


def test_explain_says_which_keys_sign(tmp_path: Path, keys: Keys) -> None:
    keys.add("a.test", "s1")
    Path(keys.add("a.test", "bad")).write_text("")
    done = mailerq(
        "explain", "x@b.test", "--from=ann@a.test", "--json", "--smtp-sink-address=192.0.2.1",
        f"--queue-directory={tmp_path}", f"--dkim-directory={keys.directory}",
    )  # fmt: skip
    answer = json.loads(done.stdout)
    (key,) = answer["signing"]["keys"]
    assert (key["domain"], key["selector"], key["algorithm"]) == ("a.test", "s1", "rsa-sha256")
    assert "bad.pem is not a key" in answer["signing"]["problems"][0]
    assert answer["signing"]["from-domain"] == "a.test"
