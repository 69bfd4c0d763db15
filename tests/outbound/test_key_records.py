"""Keys are compared with their DNS records in the background, and the log warns once."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.rcode
import pytest
import trio

from mailerq import Engine
from mailerq.config import Config
from mailerq.live import Live
from mailerq.net.resolver import Resolver
from mailerq.outbound import key_records
from mailerq.outbound.key_records import MAX_LOOK_UPS, KeyRecords
from mailerq.settings import DnsServer as Address
from tests.net.dns_server import DnsServer, open_dns_server
from tests.signing_kit import Keys, ed25519_pem, rsa_pem, strings
from tests.support import configure, until

SERVFAIL = int(dns.rcode.SERVFAIL)
NOW = 1.8e9


@asynccontextmanager
async def comparing(
    keys: Keys, zone: Any = None, file: str = "", *, dns_timeout: float = 30.0
) -> AsyncIterator[tuple[KeyRecords, DnsServer]]:
    """A comparison with the records of a DNS server, by default those of the keys."""
    path = keys.directory.parent / "dkim.toml"
    path.write_text(file)
    async with open_dns_server(keys.zone if zone is None else zone) as server:
        config = Config(
            hostname="me.example",
            dkim_directory=str(keys.directory),
            dkim_file=str(path),
            dns_servers=(Address(server.host, server.port),),
            dns_timeout=dns_timeout,
            dns_attempts=1,
        )
        live = Live(config)
        yield KeyRecords(live, Resolver(config), clock=lambda: NOW), server


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


async def test_a_key_whose_record_does_not_fit_is_warned_of_once(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {name: keys.add("a.test", name) for name in ("good", "missing", "revoked", "other")}
    record = keys.records["good._domainkey.a.test"]
    # Verifiers may take any of several records.
    texts = {
        "good": ["v=spf1 -all", record],
        "revoked": ["v=DKIM1; p="],
        "other": [record.replace(record[40:60], "A" * 20)],
    }
    zone: Any = {
        (f"{name}._domainkey.a.test", "TXT"): [strings(text) for text in each]
        for name, each in texts.items()
    }
    async with comparing(keys, zone) as (records, server):
        await records.compare()
        said = warnings(caplog)
        assert len(said) == 3
        reasons = {"missing": "no TXT record", "revoked": "p= is empty", "other": "another key"}
        for name, reason in reasons.items():
            (line,) = [line for line in said if paths[name] in line]
            assert f"{name}._domainkey.a.test" in line and reason in line
            assert f"'mailerq dkim show a.test {name}'" in line
        await records.compare()
        assert warnings(caplog) == said
        assert set(server.questions.values()) == {1}
        # A file that changes is another key.
        Path(paths["good"]).write_bytes(ed25519_pem())
        await records.compare()
        assert len(warnings(caplog)) == 4
        assert paths["good"] in warnings(caplog)[-1]
        assert server.questions["good._domainkey.a.test", "TXT"] == 2


@pytest.mark.parametrize("failure", [SERVFAIL, None], ids=["SERVFAIL", "silence"])
async def test_name_servers_that_fail_make_no_warning_and_are_asked_again(
    keys: Keys, caplog: pytest.LogCaptureFixture, failure: int | None
) -> None:
    path = keys.add("a.test", "s1")
    failing = comparing(keys, lambda name, kind: failure, dns_timeout=0.2)
    async with failing as (records, server):
        with caplog.at_level(logging.INFO):
            await records.compare()
        assert warnings(caplog) == []
        assert f"{path} is not compared with its DNS record" in caplog.text
        server.zone = {("b.test", "TXT"): []}
        while not warnings(caplog):  # a busy machine may be slower than the short timeout
            await records.compare()
        (line,) = warnings(caplog)
        assert path in line


async def test_keys_that_are_not_in_force_need_no_record(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    for selector in ("old", "later", "now", "arc"):
        keys.add("a.test", selector)
    (keys.directory / "a.test" / "bad.pem").write_text("no key")
    (keys.directory / "beside.pem").write_bytes(rsa_pem())
    line = '[[key]]\ndomain = "a.test"\nselector = '
    file = (
        f'{line}"old"\nnot-after = 2020-01-01\n{line}"later"\nnot-before = 2999-01-01\n'
        f'{line}"arc"\nprotocols = "arc"\n'
        f'{line}"x"\nfile = "dkim/beside.pem"\n'
        f'{line}"y"\nfile = "dkim/beside.pem"\nnot-after = 2020-01-01\n'
    )
    async with comparing(keys, {}, file) as (records, server):
        await records.compare()
    asked = {name.partition(".")[0] for name, _ in server.questions}
    assert asked == {"now", "arc", "x"}
    assert len(warnings(caplog)) == 3


async def test_many_keys_are_compared_a_few_at_a_time_and_a_bounded_number_in_one_look(
    keys: Keys, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_records, "MAX_KEYS", 30)
    for number in range(40):
        keys.add("a.test", f"s{number}", ed25519_pem())
    monkeypatch.setattr(key_records, "MAX_COMPARED", 35)
    most = running = 0

    class Counting:
        async def texts(self, name: str) -> Any:
            nonlocal most, running
            running += 1
            most = max(most, running)
            await trio.lowlevel.checkpoint()
            running -= 1
            return (), 1.0

    async with comparing(keys) as (records, _):
        records._resolver = Counting()  # type: ignore[assignment]
        for expected in (30, 35, 35):
            await records.compare()
            assert len(records._compared) == expected
    assert 1 < most <= MAX_LOOK_UPS
    said = warnings(caplog)
    assert len(said) < 30 and "more keys do not fit" in said[-1]


# In a daemon


async def test_a_daemon_compares_after_the_start_and_after_a_reload(
    tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    path = keys.add("a.test", "s1")
    async with open_dns_server({}) as server:
        config = configure(
            tmp_path,
            dkim_directory=str(keys.directory),
            dns_servers=(Address(server.host, server.port),),
        )
        async with Engine(config) as engine:
            await until(lambda: warnings(caplog))
            new = keys.add("b.test", "s2")
            engine.reload()
            await until(lambda: len(warnings(caplog)) == 2)
    assert path in warnings(caplog)[0] and new in warnings(caplog)[1]
    for name in keys.records:
        assert server.questions[name, "TXT"] == 1


async def test_one_process_of_several_compares(
    tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    keys.add("a.test", "s1")
    async with open_dns_server({}) as server:
        config = configure(
            tmp_path,
            smtp_processes=2,
            dkim_directory=str(keys.directory),
            dns_servers=(Address(server.host, server.port),),
        )
        async with Engine(config, share=1) as second:
            second.reload()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not any("a.test" in name for name, _ in server.questions)
            async with Engine(config, share=0):
                await until(lambda: warnings(caplog))
    assert server.questions["s1._domainkey.a.test", "TXT"] == 1


async def test_silent_name_servers_keep_up_neither_the_start_nor_the_end(
    tmp_path: Path, keys: Keys
) -> None:
    for number in range(20):
        keys.add("a.test", f"s{number}", ed25519_pem())
    os.mkfifo(keys.directory / "a.test" / "pipe.pem")
    async with open_dns_server(lambda name, kind: None) as server:
        config = configure(
            tmp_path,
            dkim_directory=str(keys.directory),
            dns_servers=(Address(server.host, server.port),),
            dns_timeout=60.0,
            shutdown_timeout=60.0,
        )
        began = trio.current_time()
        async with Engine(config):
            await until(lambda: any("a.test" in name for name, _ in server.questions))
        assert trio.current_time() - began < 30
