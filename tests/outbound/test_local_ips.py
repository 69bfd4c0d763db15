"""Mail leaves from the addresses that it may use, under their names."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trio

from mailerq.sockets import connect
from tests.outbound.kit import Bench, PeerConnection, Script, open_bench
from tests.outbound.test_refusals import pattern, reacting

POOL = """
[[pool]]
name = "bulk"
addresses = ["127.0.0.2", "127.0.0.3"]

[[address]]
ip = "127.0.0.2"
ehlo = "two.me.test"

[[address]]
ip = "0.0.0.0"
ehlo = "any.me.test"
"""


def addresses_file(directory: Path, text: str = POOL) -> str:
    path = directory / "addresses.toml"
    path.write_text(text)
    return str(path)


async def rested(bench: Bench) -> None:
    await bench.queues.until(lambda queues: not queues.leased)


def sources(bench: Bench) -> Counter[str]:
    return Counter(message.results[-1]["from"] for message in bench.queues["success"])


@pytest.mark.parametrize(
    ("properties", "source", "name"),
    [
        ({"ips": ["127.0.0.2"]}, "127.0.0.2", "two.me.test"),
        ({"ips": ["127.0.0.4"], "pool": "bulk"}, "127.0.0.4", "any.me.test"),
        ({}, "127.0.0.9", "any.me.test"),
    ],
)
async def test_each_address_gives_its_own_name(
    tmp_path: Path, properties: dict[str, Any], source: str, name: str
) -> None:
    settings = {"addresses_file": addresses_file(tmp_path), "smtp_default_ips": ("127.0.0.9",)}
    async with open_bench(**settings) as bench:
        bench.send(**properties)
        (result,) = await bench.results("success")
        assert result["from"] == source
        assert bench.peer.commands[0] == f"EHLO {name}"


async def test_an_address_that_the_system_chooses_has_a_name_too(tmp_path: Path) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path)) as bench:
        bench.send()
        (result,) = await bench.results("success")
        assert result["from"] == "127.0.0.1"
        assert bench.peer.commands[0] == "EHLO any.me.test"


async def test_mail_of_a_pool_leaves_from_all_its_addresses(tmp_path: Path) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path)) as bench:
        for _ in range(60):
            bench.send(pool="bulk")
        await bench.results("success", count=60)
        assert set(sources(bench)) == {"127.0.0.2", "127.0.0.3"}


async def test_mail_of_an_unknown_pool_waits_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_bench(addresses_file=addresses_file(tmp_path)) as bench:
        bench.send(pool="bluk", maxattempts=1)
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("bind", "bind")
        assert result["description"] == "property pool: addresses-file has no pool 'bluk'"
    assert "addresses-file has no pool 'bluk'" in caplog.text


# Which of several


BOTH = ["127.0.0.2", "127.0.0.3"]
SLOW = """
[[limit]]
local-ip = "127.0.0.2"
messages-per-minute = {rate}
"""


def limits_file(directory: Path, text: str) -> str:
    path = directory / "limits.toml"
    path.write_text(text)
    return str(path)


async def test_addresses_are_used_by_their_weights(tmp_path: Path) -> None:
    text = '[[address]]\nip = "127.0.0.3"\nweight = 9\n'
    async with open_bench(addresses_file=addresses_file(tmp_path, text)) as bench:
        for _ in range(40):
            for _ in range(5):
                bench.send(ips=BOTH)
            await bench.queues.until(lambda queues: not queues.leased)
        await bench.results("success", count=200)
        assert 100 < sources(bench)["127.0.0.3"] < 200


@pytest.mark.parametrize("rate", [1, 120])
@pytest.mark.parametrize("at_once", [True, False])
async def test_an_address_with_a_limit_holds_up_no_mail_that_another_may_send(
    tmp_path: Path, rate: int, at_once: bool
) -> None:
    limits = limits_file(tmp_path, SLOW.format(rate=rate))
    async with open_bench(limits_file=limits) as bench:
        began = monotonic()
        for number in range(100):
            bench.send(ips=BOTH)
            if not at_once and number % 10 == 0:
                await bench.queues.until(lambda queues: not queues.leased)
        await bench.results("success", count=100)
        seconds = monotonic() - began
        assert seconds < 10
        assert 1 <= sources(bench)["127.0.0.2"] <= 2 + seconds * rate / 60


async def test_mail_that_waits_in_the_queue_is_taken_by_an_address_that_has_sent_nothing_yet(
    tmp_path: Path,
) -> None:
    limits = limits_file(tmp_path, SLOW.format(rate=1))
    async with open_bench(limits_file=limits, rabbitmq_qos=4) as bench:
        bench.send(ips=["127.0.0.2"])  # uses up the minute
        await bench.results("success")
        for domain in ("d.test", "e.test"):
            for _ in range(20):
                bench.send(f"c@{domain}", ips=BOTH)
        await bench.results("success", count=41)
        assert sources(bench)["127.0.0.2"] <= 2, "a message a minute and site"


async def test_mail_that_no_address_may_send_waits_for_the_first_that_may(tmp_path: Path) -> None:
    text = SLOW.format(rate=60) + '[[limit]]\nlocal-ip = "127.0.0.3"\nmessages-per-minute = 1\n'
    async with open_bench(limits_file=limits_file(tmp_path, text)) as bench:
        for _ in range(5):
            bench.send(ips=BOTH)
        await bench.results("success", count=5)
        assert sources(bench) == {"127.0.0.2": 4, "127.0.0.3": 1}
        assert bench.queues["retry"] == []


async def test_mail_leaves_a_host_that_blocks_one_address_by_the_other_in_the_same_turn() -> None:
    async def by_address(peer: PeerConnection) -> None:
        if peer.stream.socket.getpeername()[0] == "127.0.0.2":
            await peer.send("554 5.7.1 your address is blocked\r\n")
        else:
            await peer.serve()

    async with open_bench(*[by_address] * 100) as bench:
        bench.send(ips=["127.0.0.2"])
        await bench.retried()
        for number in range(10):
            bench.send(ips=BOTH)
            await bench.queues.until(lambda q, n=number: len(q["success"]) == n + 1)  # type: ignore[misc]
        assert sources(bench) == {"127.0.0.3": 10}


# Greylisting


async def test_greylisted_mail_comes_back_from_the_same_address() -> None:
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["451 4.7.1 greylisted"] * 20
        for _ in range(20):
            bench.send(ips=["127.0.0.2", "127.0.0.3", "127.0.0.4"])
        first = Counter(result["from"] for result in await bench.results("retry", count=20))
        assert len(first) > 1
        await bench.pass_time(600)
        await bench.results("success", count=20)
        for message in bench.queues["success"]:
            greylisted, taken = message.results
            assert greylisted["from"] == taken["from"]
            assert "forcedip" not in message.properties


async def test_a_peer_that_always_says_later_is_asked_from_another_address_in_the_end() -> None:
    refused = {"from": "127.0.0.2", "code": 451, "type": "error", "state": "rcpt to"}
    async with open_bench() as bench:
        bench.peer.answers["RCPT", ""] = ["451 4.7.1 later"] * 2
        for attempts in (3, 4):
            results = [{**refused, "attempt": number + 1} for number in range(attempts)]
            bench.send(ips=BOTH, results=results, forcedip="127.0.0.2")
            await bench.results("retry", count=attempts - 2)
        pinned, free = bench.queues["retry"]
        assert pinned.results[-1]["from"] == free.results[-1]["from"] == "127.0.0.2"
        assert pinned.properties["forcedip"] == "127.0.0.2"
        assert "forcedip" not in free.properties


# Refused for the address


def refusing(*sources: str, reply: str) -> list[Script]:
    """A peer that takes no sender from these addresses."""

    async def script(peer: PeerConnection) -> None:
        if peer.stream.socket.getpeername()[0] not in sources:
            await peer.serve()
            return
        await peer.hello()
        while line := await peer.line():
            replies = {"MAIL": reply, "RSET": "250 reset", "QUIT": "221 bye"}
            await peer.send(replies.get(line.partition(" ")[0], "503 MAIL first") + "\r\n")

    return [script] * 100


OTHER_IP = pattern("not from", "content", other_ip=True, retry_after="1h")
UNCOUNTED = pattern("not from", "content", other_ip=True, retry_after="1h", count_attempt=False)


@pytest.mark.parametrize("rule", [OTHER_IP, UNCOUNTED])
@pytest.mark.parametrize("code", [451, 550])
async def test_mail_that_is_refused_for_its_address_comes_from_another_one_at_once(
    rule: str, code: int
) -> None:
    peer = refusing("127.0.0.2", reply=f"{code} 4.7.1 not from here")
    async with reacting(rule, scripts=peer) as bench:
        for _ in range(20):
            bench.send(ips=BOTH)
        for _ in range(3):
            await bench.pass_time(2)
        await bench.results("success", count=20)
        assert sources(bench) == {"127.0.0.3": 20}
        attempts = [len(message.results) for message in bench.queues["success"]]
        assert set(attempts) == ({1, 2} if rule is OTHER_IP else {1})
        assert not any("refusedips" in each.properties for each in bench.queues["success"])


async def test_an_address_that_was_pinned_is_left_when_it_is_refused() -> None:
    peer = refusing("127.0.0.2", reply="451 4.7.1 not from here")
    async with reacting(OTHER_IP, scripts=peer) as bench:
        for _ in range(5):
            bench.send(ips=BOTH, forcedip="127.0.0.2")
        await bench.results("retry", count=5)
        await bench.pass_time(2)
        assert await bench.results("success", count=5)
        assert sources(bench) == {"127.0.0.3": 5}


@pytest.mark.parametrize("rule", [OTHER_IP, UNCOUNTED])
async def test_each_address_is_tried_once_before_the_message_waits(rule: str) -> None:
    async with reacting(rule, scripts=refusing(*BOTH, reply="451 4.7.1 not from here")) as bench:
        bench.send(ips=BOTH)

        def connections() -> int:
            return len([line for line in bench.peer.commands if line.startswith("MAIL")])

        for rounds in (1, 2):
            await bench.until(lambda figures, n=rounds: connections() == 2 * n - 1)  # type: ignore[misc]
            await rested(bench)
            await bench.pass_time(2)
            await bench.until(lambda figures, n=rounds: connections() == 2 * n)  # type: ignore[misc]
            await rested(bench)
            await bench.pass_time(1800)
            await rested(bench)
            assert connections() == 2 * rounds
            (message,) = bench.queues["outbox"]
            assert not {"refusedips", "forcedip"} & message.properties.keys()
            await bench.pass_time(1801)


async def test_a_failed_message_is_not_kept_for_the_address_that_is_left() -> None:
    async with reacting(
        OTHER_IP, scripts=refusing(*BOTH, reply="550 5.7.1 not from here")
    ) as bench:
        bench.send(ips=BOTH)
        await bench.results("retry")
        await bench.pass_time(2)
        assert (await bench.results("failure"))[0]["code"] == 550
        (message,) = bench.queues["failure"]
        assert {result["from"] for result in message.results} == set(BOTH)
        assert "refusedips" not in message.properties


async def test_mail_does_not_wait_for_an_address_that_cannot_be_bound_any_more() -> None:
    async with open_bench() as bench:
        bench.send(ips=["192.0.2.1"])
        await bench.retried()
        bench.send(ips=["192.0.2.1", "127.0.0.3"], forcedip="192.0.2.1")
        (result,) = await bench.results("success")
        assert (result["attempt"], result["from"]) == (1, "127.0.0.3")


# Many of everything


async def test_mail_that_waits_for_all_its_addresses_is_not_read_over_and_over(
    tmp_path: Path,
) -> None:
    text = "[[limit]]\ndomain = '*'\nmessages-per-minute = 120\n"
    async with open_bench(limits_file=limits_file(tmp_path, text)) as bench:
        for number in range(60):
            bench.send(f"c{number}@d.test", ips=BOTH)
        await bench.until(lambda figures: figures["delivered"] >= 8)
        takes = bench.queues.subscriptions["outbox"].takes
        assert len(takes) < 60, "two go each half second"


async def test_every_message_leaves_once_whatever_its_addresses_wait_for(tmp_path: Path) -> None:
    ips = [f"127.0.0.{number}" for number in range(2, 8)]
    addresses = f"[[pool]]\nname = 'all'\naddresses = {ips}\n"
    limits = SLOW.format(rate=30) + "[[limit]]\nlocal-ip = '127.0.0.3'\nmessages-per-minute = 600\n"
    limits += "[[limit]]\nlocal-ip = '127.0.0.4'\nmax-connections = 1\nconnection-messages = 2\n"

    async def by_address(peer: PeerConnection) -> None:
        source = peer.stream.socket.getpeername()[0]
        if source == "127.0.0.5":
            await peer.send("421 4.7.0 not you\r\n")
        elif source == "127.0.0.6":
            return
        else:
            await peer.serve()

    settings: dict[str, Any] = {
        "addresses_file": addresses_file(tmp_path, addresses),
        "limits_file": limits_file(tmp_path, limits),
        "rabbitmq_qos": 50,
    }
    async with open_bench(*[by_address] * 10_000, **settings) as bench:
        bench.peer.answers["MAIL", ""] = ["451 4.7.1 greylisted"] * 20
        for number in range(60):
            for domain in range(10):
                more: dict[str, Any] = {"pool": "all"}
                if number % 3 == 0:
                    more = {"ips": [ips[number % 6], ips[(number + domain) % 6], "127.0.0.7"]}
                bench.send(f"c{number}@d{domain}.test", **more)
        bench.send("last@d1.test", pool="all")
        while len(bench.queues["success"]) < 601:
            await bench.queues.until(lambda queues: not queues.leased)
            done = len(bench.queues["success"])
            with trio.move_on_after(1):
                await bench.queues.until(lambda q, done=done: len(q["success"]) > done)  # type: ignore[misc]
            if len(bench.queues["success"]) == done:
                await bench.pass_time(600)
        recipients = Counter(mail.recipient for mail in bench.peer.mails)
        assert len(recipients) == 601
        assert set(recipients.values()) == {1}
        assert not {"127.0.0.5", "127.0.0.6"} & set(sources(bench))


async def test_mail_does_not_wait_behind_a_session_of_an_address_that_the_host_has_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def losing(host: str, port: int, local_ip: str | None = None) -> tuple[int, bool]:
        if local_ip == "127.0.0.3":
            return -errno.EADDRNOTAVAIL, False
        return connect(host, port, local_ip)

    async def falls_silent(peer: PeerConnection) -> None:
        await peer.hello()
        await peer.line()
        await trio.sleep_forever()

    async with open_bench(falls_silent) as bench:
        bench.send(ips=["127.0.0.3"])
        await bench.queues.until(lambda queues: len(bench.peer.commands) >= 2)
        monkeypatch.setattr("mailerq.net.stream.connect", losing)
        for number in range(30):
            bench.send(f"u{number}@d.test", ips=["127.0.0.3", "127.0.0.4"])
        with trio.fail_after(10):
            await bench.results("success", count=30)
        assert set(sources(bench)) == {"127.0.0.4"}
