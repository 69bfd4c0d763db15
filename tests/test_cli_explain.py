"""``mailerq explain``: what is decided, which line says so, and what limits mail now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import Daemon, all_arrive, daemon, switches_in
from tests.net.dns_server import DnsServer, open_dns_server
from tests.processes_kit import TWO, connected, marked, put, send_all
from tests.support import DEADLINE, closed_port, in_thread, mailerq, open_sink

ZONE: dict[tuple[str, str], list[str] | int | None] = {
    ("d.test", "MX"): ["20 mx2.d.test.", "10 mx1.d.test."],
    ("mx1.d.test", "A"): ["127.0.0.1"],
    ("mx2.d.test", "A"): ["127.0.0.1"],
    ("null.test", "MX"): ["0 ."],
    ("inside.test", "A"): ["10.1.2.3"],
    ("broken.test", "MX"): None,
    ("", "NS"): ["a.root.test."],
}

LIMITS = """\
[[provider]]
name = "big"
mx = ["d.test"]

[[limit]]
provider = "big"
max-connections = 5

[[limit]]
domain = "d.test"
messages-per-minute = 1
"""


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    with marked(tmp_path) as environment:
        yield environment


def switches(dns: DnsServer, port: int, *more: str) -> list[str]:
    """Settings with which mail goes by MX, to a port of this host."""
    return [
        "--smtp-sink-address=",
        f"--dns-servers={dns.address}",
        f"--smtp-out-port={port}",
        "--smtp-out-forbidden=10.0.0.0/8",
        *more,
    ]


async def explain(*arguments: str, status: int | None = 0) -> dict[str, Any]:
    """The answer; the exit status is `status`, None: any."""
    done = await in_thread(lambda: mailerq("explain", "--json", *arguments))
    assert status in (None, done.returncode), (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def alone(directory: Path, name: str, *more: str, status: int = 0) -> dict[str, Any]:
    """The answer without a daemon."""
    async with open_dns_server(ZONE) as dns:
        settings = switches_in(directory, 25, *switches(dns, 2525, *more))
        return await explain(name, *settings, status=status)


async def ask(running: Daemon, name: str, *more: str, status: int | None = 0) -> dict[str, Any]:
    """The answer of a daemon; the command itself knows no settings."""
    return await explain(name, f"--queue-directory={running.queue}", *more, status=status)


# Without a daemon


async def test_hosts_come_by_preference_and_each_limit_has_the_line_that_sets_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "limits.toml").write_text(LIMITS)
    path = tmp_path / "limits.toml"
    found = await alone(
        tmp_path, "ann@d.test", f"--limits-file={path}", "--ip-maxconnections=4", "--ip=127.0.0.1"
    )
    assert found["decision"] == "send"
    assert found["live"] is False
    assert (found["route"]["host"], found["route"]["port"]) == ("d.test", 2525)
    assert [(host["preference"], host["name"], host["address"]) for host in found["hosts"]] == [
        (10, "mx1.d.test", "127.0.0.1"),
        (20, "mx2.d.test", "127.0.0.1"),
    ]
    assert found["site"] == {"label": "d.test", "apart": "d.test", "where": f"{path}:9"}
    assert found["provider"] == {"name": "big", "where": f"{path}:1"}
    (source,) = found["from"]
    assert source["local-ip"] == "127.0.0.1"
    assert source["ehlo"] == "mx.test"
    assert [
        (limit["limit"], limit["value"], limit["scope"], limit["where"])
        for limit in source["limits"]
    ] == [
        ("messages-per-minute", 1, "d.test from 127.0.0.1", f"{path}:11"),
        ("max-connections", 20, "d.test from 127.0.0.1", "domain-maxconnections"),
        ("max-connections", 5, "provider big from 127.0.0.1", f"{path}:7"),
        (
            "max-connections",
            4,
            "127.0.0.1 from 127.0.0.1",
            "ip-maxconnections (--ip-maxconnections)",
        ),
        ("connection-idle", 5.0, "each connection", "connection-maxidle"),
    ]


@pytest.mark.parametrize(
    ("name", "settings", "decision", "reason", "where"),
    [
        ("no.test", (), "fail", "550 5.1.2 no.test does not exist", ""),
        ("null.test", (), "fail", "556 5.1.10 null.test accepts no mail (null MX)", ""),
        (
            "inside.test",
            (),
            "fail",
            "550 5.7.1 inside.test is at 10.1.2.3, where smtp-out-forbidden lets no mail go",
            "smtp-out-forbidden (--smtp-out-forbidden)",
        ),
        (
            "null.test",
            ("--smtp-relay-domains=null.test",),
            "wait",
            "null.test is in smtp-relay-domains: null.test accepts no mail (null MX)",
            "smtp-relay-domains (--smtp-relay-domains)",
        ),
        (
            "here.test",
            ("--smtp-local-domains=here.test", "--rabbitmq-local=local"),
            "local",
            "goes to the queue local, see rabbitmq-local (--rabbitmq-local)",
            "smtp-local-domains (--smtp-local-domains)",
        ),
        ("a b@d.test", (), "fail", "", ""),
        ("ann@d.test", ("--from=a b@d.test",), "fail", "", ""),
    ],
)
async def test_mail_that_does_not_go_out_is_explained_with_the_setting(
    tmp_path: Path,
    name: str,
    settings: tuple[str, ...],
    decision: str,
    reason: str,
    where: str,
) -> None:
    status = 0 if decision == "local" else 1
    found = await alone(tmp_path, name, *settings, status=status)
    assert found["decision"] == decision
    assert found["reason"] == reason if reason else found["reason"]
    assert found.get("where", "") == where


async def test_a_smarthost_is_named_with_its_setting(tmp_path: Path) -> None:
    found = await alone(tmp_path, "d.test", "--smarthost=127.0.0.9", "--smarthost-port=2525")
    assert found["route"] == {
        "target": "127.0.0.9:2525",
        "host": "127.0.0.9",
        "port": 2525,
        "by": "name",
        "protocol": "SMTP",
        "login": None,
        "where": "smarthost (--smarthost)",
    }


async def test_a_pool_has_a_part_for_each_address_with_its_name_and_weight(
    tmp_path: Path,
) -> None:
    path = tmp_path / "addresses.toml"
    path.write_text("""\
[[pool]]
name = "bulk"
addresses = ["127.0.0.1", "127.0.0.2"]

[[address]]
ip = "127.0.0.2"
ehlo = "two.test"
weight = 3
""")
    found = await alone(tmp_path, "d.test", f"--addresses-file={path}", "--pool=bulk")
    assert [
        (part["local-ip"], part["weight"], part["ehlo"], part["ehlo-where"])
        for part in found["from"]
    ] == [
        ("127.0.0.1", 1, "mx.test", "hostname (--hostname)"),
        ("127.0.0.2", 3, "two.test", "addresses-file (--addresses-file)"),
    ]
    assert found["destination"]["key"] == "d.test from pool bulk"
    wrong = await alone(tmp_path, "d.test", "--pool=none", status=1)
    assert (wrong["decision"], "none" in wrong["reason"]) == ("wait", True)


async def test_people_read_it_too(tmp_path: Path) -> None:
    async with open_dns_server(ZONE) as dns:
        settings = switches_in(tmp_path, 25, *switches(dns, 2525, "--domain-maxmessages=7"))
        done = await in_thread(lambda: mailerq("explain", "d.test", *settings))
    lines = [" ".join(line.split()) for line in done.stdout.decode().splitlines()]
    assert "mail to d.test goes out" in lines
    assert "10 mx1.d.test 127.0.0.1" in lines
    limit = "messages-per-minute 7 d.test domain-maxmessages (--domain-maxmessages)"
    assert limit in lines


def test_a_wrong_address_of_ours_is_a_mistake_in_usage(tmp_path: Path) -> None:
    done = mailerq("explain", "d.test", "--ip=mx.test")
    assert done.returncode == 64
    assert b"--ip: 'mx.test'" in done.stderr


# With a daemon


async def until_answer(
    running: Daemon, name: str, wanted: Any, status: int | None = 0
) -> dict[str, Any]:
    """Ask until the answer is as wanted: a daemon does things in its time."""
    end = trio.current_time() + DEADLINE
    while not wanted(found := await ask(running, name, status=status)):
        assert trio.current_time() < end, found
    return found


async def test_a_daemon_says_which_limit_holds_a_domain_and_until_when(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(LIMITS)
    async with open_sink() as sink, open_dns_server(ZONE) as dns:
        settings = switches(dns, sink.port, f"--limits-file={path}")
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            async with connected(running.port) as stream:
                for number in range(3):
                    assert await put(stream, f"m-{number}") == 250
            await all_arrive(sink, {"m-0"})
            found = await until_answer(
                running,
                "d.test",
                lambda answer: (
                    answer["from"][0]["flows"]
                    and answer["from"][0]["flows"][0]["limited-by"].startswith("messages-per")
                    and answer["destination"]["messages"] == 2
                ),
            )
            assert found["live"] is True
            limits = {limit["limit"]: limit for limit in found["from"][0]["limits"]}
            rate = limits["messages-per-minute"]
            assert rate["allowed"] is False
            assert 0 < rate["seconds"] <= 60
            assert rate["waiting"] == 1
            assert limits["max-connections"]["used"] <= 1
            (flow,) = found["from"][0]["flows"]
            text = f"messages-per-minute = 1 of d.test ({path}:11)"
            assert flow["limited-by"] == text
            assert 0 < flow["seconds"] <= 60
            assert flow["reply"].startswith("127.0.0.1: 250 ")
            # The questions took nothing: the second message still waits for the same moment.
            again = await ask(running, "d.test")
            (later,) = again["from"][0]["flows"]
            assert later["seconds"] < flow["seconds"]


async def test_a_daemon_says_why_a_host_is_not_asked_and_when_it_is(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    with closed_port() as port:
        async with open_dns_server(ZONE) as dns:
            settings = switches(dns, port, "--retry-interval=60")
            async with daemon(tmp_path, port, *settings, env=mark) as running:
                async with connected(running.port) as stream:
                    assert await put(stream, "m") == 250
                found = await until_answer(
                    running,
                    "d.test",
                    lambda answer: (
                        answer["from"][0]["flows"]
                        and "no host let us in" in answer["from"][0]["flows"][0]["limited-by"]
                        and answer["destination"]["next"]  # the result is committed
                    ),
                )
                (flow,) = found["from"][0]["flows"]
                assert flow["reply"].endswith("Connection refused")
                assert 0 < flow["seconds"] <= 30
                assert found["destination"]["messages"] == 1
                doubtful = {host["name"] for host in found["hosts"] if host["state"]}
                assert doubtful == {"mx1.d.test", "mx2.d.test"}


async def test_several_processes_answer_together(tmp_path: Path, mark: dict[str, str]) -> None:
    def later(event: server.Event) -> Reply | None:
        return Reply(451, "4.7.0 slow down") if isinstance(event, server.Mail) else None

    async with open_sink() as sink, open_dns_server(ZONE) as dns:
        sink.decide = later
        settings = switches(dns, sink.port, TWO, "--connection-maxidle=60000")
        settings += ["--retry-interval=600", "--domain-maxconnections=9"]
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            names = await send_all(running.port, "m")
            long = "x" * 60 + "@d.test"

            def all_have_heard(answer: dict[str, Any]) -> bool:
                flows = answer["from"][0]["flows"]
                replies = {flow["reply"] for flow in flows}
                return {flow["process"] for flow in flows} == {0, 1} and "" not in replies

            found = await until_answer(running, long, all_have_heard)
            for flow in found["from"][0]["flows"]:
                assert flow["reply"] == "127.0.0.1: 451 4.7.0 slow down"
            (limit,) = (
                limit for limit in found["from"][0]["limits"] if limit["limit"] == "max-connections"
            )
            open_now = sum(flow["connections"] for flow in found["from"][0]["flows"])
            assert limit["used"] == open_now >= 2
            assert found["destination"]["messages"] == len(names)


async def test_a_name_server_that_answers_late_is_waited_for(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    silences = [None]

    def zone(name: str, kind: str) -> list[str] | int | None:
        if (name, kind) == ("d.test", "MX") and silences:
            return silences.pop()
        return ZONE.get((name, kind), [])

    async with open_sink() as sink, open_dns_server(zone) as dns:
        settings = switches(dns, sink.port, "--dns-timeout=30")
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            found = await ask(running, "d.test")
            assert found["decision"] == "send"
            assert len(found["hosts"]) == 2
            # The quick look-up was given up, and a patient one has asked again.
            assert dns.questions["d.test", "MX"] == 2


async def test_what_a_pattern_has_done_is_explained_with_its_line_and_a_sample(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    path = tmp_path / "responses.toml"
    path.write_text("""\
[[response]]
name = "too-fast"
text = 'slow down'
class = "reputation-temp"
pause = "10m"
samples = ["451 4.7.0 slow down"]
""")

    def later(event: server.Event) -> Reply | None:
        return Reply(451, "4.7.0 slow down") if isinstance(event, server.Mail) else None

    async with open_sink() as sink, open_dns_server(ZONE) as dns:
        sink.decide = later
        settings = switches(dns, sink.port, f"--responses-file={path}")
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            async with connected(running.port) as stream:
                assert await put(stream, "m") == 250
            found = await until_answer(
                running, "d.test", lambda answer: answer["from"][0]["actions"], status=None
            )
            assert found["decision"] == "wait"
            assert found["reason"].startswith("paused until ")
            assert found["where"] == f"too-fast, {path}:1"
            (action,) = found["from"][0]["actions"]
            assert (action["rule"], action["where"]) == ("too-fast", f"{path}:1")
            assert (action["stage"], action["hits"]) == ("paused", 1)
            assert "slow down" in action["sample"]
            limits = {limit["limit"]: limit for limit in found["from"][0]["limits"]}
            assert limits["paused"]["where"] == f"too-fast, {path}:1"
            assert limits["paused"]["allowed"] is False
            assert 500 < limits["paused"]["seconds"] <= 600
            shown = await in_thread(
                lambda: mailerq("explain", "d.test", f"--queue-directory={running.queue}")
            )
            assert b"4.7.0 slow down" in shown.stdout


async def test_a_mailbox_server_takes_the_mail_of_local_domains(tmp_path: Path) -> None:
    settings = ("--smtp-local-domains=here.test", "--local-delivery=lmtp:///run/mail")
    found = await alone(tmp_path, "ann@here.test", *settings)
    assert found["decision"] == "send"
    route = found["route"]
    assert (route["host"], route["protocol"]) == ("/run/mail", "LMTP")
    assert route["where"] == "local-delivery (--local-delivery)"
    assert [host["address"] for host in found["hosts"]] == ["/run/mail"]


async def test_the_rows_of_an_operator_are_explained_with_and_without_a_daemon(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    async def add(*words: str) -> None:
        switch = f"--queue-directory={tmp_path / 'queue'}"
        done = await in_thread(lambda: mailerq(*words, switch, "--reason=asked"))
        assert done.returncode == 0, done.stderr

    async with open_sink() as sink, open_dns_server(ZONE) as dns:
        settings = switches(dns, sink.port)
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            await add("pause", "add", "--domain=d.test", "--for=2h")
            await add("suppress", "add", "eve@d.test")
            async with connected(running.port) as stream:
                assert await put(stream, "m") == 250
            found = await until_answer(
                running, "d.test", lambda answer: answer["from"][0].get("flows"), status=1
            )
            assert found["reason"].startswith("pause 1 of domain d.test until ")
            (flow,) = found["from"][0]["flows"]
            assert flow["limited-by"].endswith(": asked")
            assert 7000 < flow["seconds"] <= 7200
            gone = await ask(running, "eve@d.test", status=1)
            assert gone["decision"] == "fail"
            assert await running.stop() == 0
        both = [f"--queue-directory={tmp_path / 'queue'}", *settings]
        assert (await explain("eve@d.test", *both, status=1))["reason"] == gone["reason"]
        alone = await explain("d.test", *both, status=1)
        assert (alone["decision"], alone["reason"]) == ("wait", found["reason"])
        assert alone["site"]["apart"] == "d.test"


async def test_a_row_of_a_pool_is_explained_without_a_daemon(tmp_path: Path) -> None:
    pools = tmp_path / "addresses.toml"
    pools.write_text('[[pool]]\nname = "bulk"\naddresses = ["192.0.2.1"]\n')
    switches = (f"--addresses-file={pools}", f"--queue-directory={tmp_path}")
    words = ("error", "add", "--pool=bulk", "--code=550", "--description=bulk is closed")
    done = mailerq(*words, *switches)
    assert done.returncode == 0, done.stderr
    found = await explain("d.test", *switches, "--smtp-default-ips=192.0.2.1", status=1)
    assert (found["decision"], found["reason"]) == ("fail", "550 bulk is closed")


async def test_rows_about_hosts_are_explained_without_a_daemon(tmp_path: Path) -> None:
    directory = f"--queue-directory={tmp_path / 'queue'}"
    (tmp_path / "queue").mkdir()
    words = ("error", "add", "--site=*.d.test", "--tag=news", "--code=550", "--description=no")
    done = mailerq(*words, directory)
    assert done.returncode == 0, done.stderr
    assert (await alone(tmp_path, "d.test"))["decision"] == "send"
    found = await alone(tmp_path, "d.test", "--tag=a", "--tag=news", status=1)
    assert (found["decision"], found["reason"]) == ("fail", "550 no")


async def test_it_shows_the_tlsa_records_of_a_domain_and_why_its_mail_waits(
    tmp_path: Path, mark: dict[str, str]
) -> None:
    record = f"3 1 1 {'ab' * 32}"
    async with open_sink() as sink, open_dns_server(dict(ZONE)) as dns:
        dns.zone[f"_{sink.port}._tcp.mx1.d.test", "TLSA"] = [record]
        dns.zone[f"_{sink.port}._tcp.mx2.d.test", "TLSA"] = 2  # SERVFAIL
        dns.secure = lambda name, kind: True
        settings = switches(dns, sink.port, "--retry-interval=60")
        shown = await explain("d.test", *switches_in(tmp_path, 25, *settings))
        first, second = shown["tlsa"]
        assert first == {"host": "mx1.d.test", "base": "mx1.d.test", "records": [record]}
        assert second["host"] == "mx2.d.test" and "the host is not used" in second["problem"]
        assert shown["from"][0]["security"]["dnssec"] is True
        async with daemon(tmp_path, sink.port, *settings, env=mark) as running:
            async with connected(running.port) as stream:
                assert await put(stream, "m") == 250
            found = await until_answer(
                running,
                "d.test",
                lambda answer: bool(
                    answer["from"][0]["flows"] and answer["from"][0]["flows"][0]["reply"]
                ),
            )
            assert found["tlsa"][0] == first
            reply = found["from"][0]["flows"][0]["reply"]
            assert reply.startswith("454 4.7.5 mx2.d.test [127.0.0.1]: its TLSA records cannot be")
            words = await in_thread(
                lambda: mailerq("explain", f"--queue-directory={running.queue}", "d.test")
            )
            assert b"TLSA of mx1.d.test" in words.stdout
            assert b"DNSSEC proves the hosts" in words.stdout
            assert not sink.mails
