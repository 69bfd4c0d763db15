"""``mailerq sts`` on a queue directory: what is known, fetched now, and forgotten."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.store.sts_file import Entry, StsFile
from tests.crash.kit import daemon
from tests.net.dns_server import open_dns_server
from tests.net.https_server import open_https_server, response
from tests.outbound.kit import Peer
from tests.outbound.memory_queues import MemoryQueues
from tests.outbound.sts_kit import DOMAIN, StsBench, open_sts_bench, policy_text
from tests.outbound.tls_kit import Certificates, starttls
from tests.processes_kit import TWO, all_run, send_all, until_rows
from tests.support import in_thread, mailerq, until

POLICY = b"version: STSv1\nmode: enforce\nmx: mx.d.example\nmx: *.d.example\nmax_age: 86400\n"


def run(directory: Path, *words: str, status: int = 0) -> str:
    """Run a command on a queue directory; its output, or its complaints if it fails."""
    done = mailerq("sts", *words, f"--queue-directory={directory}")
    assert done.returncode == status, (done.stdout, done.stderr)
    return (done.stderr if status else done.stdout).decode()


def documents(directory: Path, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(directory, *words, "--json").splitlines()]


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    file = StsFile(str(tmp_path), clock=lambda: 1_800_000_000.0)
    for domain, number in (("a.example", "1"), ("d.example", "2"), ("over.example", "3")):
        expires = 1_700_000_000.0 if domain.startswith("over") else 4_000_000_000.0
        file.keep(
            Entry(
                domain=domain, id=number, text=POLICY, fetched=1_699_000_000.0, expires=expires,
                used=1_799_999_999.0, next=1_800_086_400.0,
            )
        )  # fmt: skip
    file.failed("d.example", "9", "sts-policy-fetch-error: 404", 1_800_003_600.0)
    file.close()
    return tmp_path


def test_policies_are_shown_as_a_table_and_one_by_one(queue: Path) -> None:
    lines = run(queue, "show").splitlines()
    assert [line.split()[0] for line in lines] == [
        "DOMAIN", "a.example", "d.example", "over.example",
    ]  # fmt: skip
    assert "404" in lines[2] and "expired" in lines[3]
    said = run(queue, "show", "D.example.")
    for word in ("enforce", "mx.d.example", "*.d.example", "86400", "2027-01-15", "404", "id 9"):
        assert word in said


def test_policies_are_shown_for_programs(queue: Path) -> None:
    (found,) = documents(queue, "show", "d.example")
    problem = found.pop("problem")
    assert problem == {
        "id": "9", "time": "2027-01-15 08:00:00", "text": "sts-policy-fetch-error: 404",
    }  # fmt: skip
    assert found == {
        "domain": "d.example",
        "id": "2",
        "mode": "enforce",
        "mx": ["mx.d.example", "*.d.example"],
        "max-age": 86400,
        "fetched": "2023-11-03 08:26:40",
        "expires": "2096-10-02 07:06:40",
        "in-force": True,
        "refresh": "2027-01-15 09:00:00",
        "used": "2027-01-15 07:59:59",
    }
    assert [each["domain"] for each in documents(queue, "show")] == [
        "a.example", "d.example", "over.example",
    ]  # fmt: skip


def test_one_policy_or_all_are_purged(queue: Path) -> None:
    assert "1 removed (no daemon answers)" in run(queue, "purge", "d.example")
    assert "nothing is known" in run(queue, "show", "d.example", status=1)
    assert "nothing is known" in run(queue, "purge", "d.example", status=1)
    (done,) = documents(queue, "purge", "--all")
    assert done == {"removed": 2, "in_force": False}
    assert documents(queue, "show") == []
    run(queue, "purge", status=os.EX_USAGE)
    run(queue, "purge", "a.example", "--all", status=os.EX_USAGE)
    run(queue, "show", "a@b", status=os.EX_USAGE)


def test_an_empty_queue_directory_stays_empty(tmp_path: Path) -> None:
    assert documents(tmp_path, "show") == []
    run(tmp_path, "show", "d.example", status=1)
    run(tmp_path, "purge", "--all")
    assert os.listdir(tmp_path) == []


def test_without_a_queue_directory_nothing_is_made(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert "there is no queue" in run(missing, "show", status=os.EX_UNAVAILABLE)
    assert not missing.exists()


def switches(bench: StsBench) -> list[str]:
    return [
        f"--queue-directory={bench.config.queue_directory}",
        f"--dns-servers={bench.dns.address}",
        "--smtp-out-forbidden=",
        f"--mta-sts-port={bench.web.port}",
        f"--connection-ca-file={bench.web.ca_file}",
    ]


async def test_a_policy_is_fetched_now(tmp_path: Path) -> None:
    async with open_sts_bench(tmp_path) as bench:
        command = partial(mailerq, "sts", "refresh", DOMAIN, *switches(bench))
        done = await in_thread(command)
        assert done.returncode == 0, done.stderr
        assert b"enforce" in done.stdout and b"no daemon answers" in done.stderr
        bench.publish("2", policy_text("testing"))
        done = await in_thread(partial(command, "--json"))
        assert json.loads(done.stdout)["mode"] == "testing"
        bench.web.answer = response(policy_text("none"), status=404)
        done = await in_thread(partial(command, "--json"))
        assert done.returncode == 1
        document = json.loads(done.stdout)
        assert document["mode"] == "testing" and "404" in document["problem"]["text"]
        assert b"404" in done.stderr


async def test_explain_without_a_daemon_looks_at_the_policy_and_keeps_nothing(
    tmp_path: Path,
) -> None:
    async with open_sts_bench(tmp_path) as bench:
        bench.dns.zone["d.example", "MX"] = ["10 mx.d.example.", "20 other.example."]
        bench.dns.zone["mx.d.example", "A"] = ["192.0.2.1"]
        bench.dns.zone["other.example", "A"] = ["192.0.2.2"]
        command = partial(mailerq, "explain", "--json", DOMAIN, *switches(bench))
        answer = json.loads((await in_thread(command)).stdout)
        assert [host["name"] for host in answer["hosts"]] == ["mx.d.example"]
        assert "mta-sts" not in answer and os.listdir(bench.config.queue_directory) == []
        await bench.policies.find(DOMAIN)
        answer = json.loads((await in_thread(command)).stdout)
        assert (answer["mta-sts"]["id"], answer["mta-sts"]["in-force"]) == ("1", True)
        done = await in_thread(partial(mailerq, "explain", DOMAIN, *switches(bench)))
        (line,) = [line for line in done.stdout.decode().splitlines() if line.startswith("MTA-STS")]
        assert "id 1" in line and "mx.d.example" in line and "expires" in line


# With a daemon of two processes


async def test_a_purged_policy_is_gone_in_all_processes_when_the_command_ends(
    tmp_path: Path,
) -> None:
    certificates = Certificates(tmp_path)
    peer = Peer(MemoryQueues())
    peer.scripts[:] = [starttls(certificates.server("other.example"))] * 1000
    zone: dict[tuple[str, str], Any] = {
        ("d.test", "MX"): ["10 mx.d.test."],
        ("mx.d.test", "A"): ["127.0.0.1"],
        ("mta-sts.d.test", "A"): ["127.0.0.1"],
        ("_mta-sts.d.test", "TXT"): ['"v=STSv1; id=1"'],
    }
    async with (
        open_dns_server(zone) as dns,
        open_https_server(tmp_path, "mta-sts.d.test") as web,
        trio.open_nursery() as nursery,
    ):
        web.answer = response(policy_text("enforce", "mx.d.test"))
        listeners = await nursery.start(partial(trio.serve_tcp, peer.handle, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        options = (
            f"--dns-servers={dns.address}",
            "--smtp-sink-address=",
            f"--smtp-out-port={port}",
            "--smtp-out-forbidden=",
            f"--mta-sts-port={web.port}",
            f"--connection-ca-file={web.ca_file}",
        )
        async with daemon(tmp_path, port, TWO, *options) as running:
            await until_rows(running, all_run)
            names = await send_all(running.port, "a")

            def all_wait(found: dict[str, Any]) -> bool:
                return bool(found["outgoing"]["retried"] >= len(names))

            await running.until_statistics(all_wait)
            assert not peer.mails
            zone["_mta-sts.d.test", "TXT"] = []
            command = partial(run, running.queue, "purge", "d.test")
            assert await in_thread(command) == "1 removed\n"
            await until(lambda: len(peer.mails) == len(names))
            assert documents(running.queue, "show") == []
            assert await running.stop() == 0
        # Each process may have fetched it; then none has asked again.
        assert 1 <= len(web.requests) <= 2
        nursery.cancel_scope.cancel()
