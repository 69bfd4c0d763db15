"""Rows of the operator in deliveries: what stops, what it costs to wait, and how mail goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.net.resolver import Host
from mailerq.outbound.stops import RELEASED
from mailerq.rules.row import ERROR, PAUSE, SUPPRESSION, Row
from mailerq.rules.rows import Rows
from tests.outbound.kit import Bench, PeerConnection, StubResolver, open_bench


def pause(number: int = 1, **scope: Any) -> Row:
    return Row(id=number, kind=PAUSE, **scope)


def error(number: int = 1, code: int = 550, **parts: Any) -> Row:
    return Row(id=number, kind=ERROR, code=code, **parts)


def suppress(*values: str) -> Rows:
    row = Row(id=9, kind=SUPPRESSION, code=550, status="5.7.1", description="complained")
    addresses = {value: row for value in values if "@" in value}
    return Rows(
        (), addresses=addresses, domains={value: row for value in values if "@" not in value}
    )


def obey(bench: Bench, *rows: Row, **pools: tuple[str, ...]) -> None:
    bench.dispatcher.stops.change(Rows(rows, pools=pools) if rows else None)


def recipients(bench: Bench) -> list[str]:
    return [mail.recipient for mail in bench.peer.mails]


def takes_of(bench: Bench) -> int:
    (subscription,) = bench.queues.subscriptions.values()
    return len(subscription.takes)


async def taken(bench: Bench, count: int) -> None:
    await bench.queues.until(lambda queues: len(bench.peer.mails) >= count)


async def rest(bench: Bench) -> None:
    """Wait until nothing goes on any more."""
    await bench.queues.until(lambda queues: not queues.leased)
    await trio.testing.wait_all_tasks_blocked(0.01)


# Suppressions


async def test_mail_to_a_suppressed_address_fails_at_once_with_the_codes_of_the_row() -> None:
    async with open_bench() as bench:
        bench.dispatcher.stops.change(suppress("ann@d.test", "*.gone.test"))
        bench.send("Ann@D.test")
        bench.send("bob@d.test")
        bench.send("ann@a.gone.test")
        await taken(bench, 1)
        failures = await bench.results("failure", 2)
        assert recipients(bench) == ["bob@d.test"]
        for result in failures:
            assert result["type"] == "error"
            assert (result["state"], result["result"]) == ("suppression", "error")
            assert (result["code"], result["status"]) == (550, "5.7.1")
            assert result["description"] == "complained"
        assert bench.dispatcher.stops.hits == {9: 2}


# Forced errors


@pytest.mark.parametrize(
    ("code", "queue", "kind"),
    [(550, "failure", "error"), (451, "retry", "error"), (250, "success", "success")],
)
async def test_a_forced_error_takes_the_place_of_an_attempt(
    code: int, queue: str, kind: str
) -> None:
    async with open_bench() as bench:
        obey(bench, error(code=code, tag="news", description="not today"))
        bench.send(tags=["other", "news"])
        (result,) = await bench.results(queue)
        assert (result["type"], result["state"], result["code"]) == (kind, "process", code)
        assert result["description"] == "not today"
        assert not bench.peer.connections
        bench.send(tags=["other"])
        await taken(bench, 1)


async def test_mail_that_a_forced_error_deferred_goes_when_its_time_has_come() -> None:
    async with open_bench() as bench:
        obey(bench, error(code=451, domain="d.test"))
        bench.send()
        await bench.results("retry")
        obey(bench)
        await bench.pass_time(700)
        await taken(bench, 1)
        (result,) = bench.queues["success"][0].results[-1:]
        assert result["attempt"] == 2


async def test_a_forced_error_for_hosts_meets_only_mail_that_goes_there() -> None:
    resolver = StubResolver(d_test=["127.0.0.1"], e_test=["127.0.0.1"])
    async with open_bench(resolver=resolver) as bench:
        obey(bench, error(site="*.d.test"))
        bench.send("a@d.test")
        bench.send("a@e.test")
        await bench.results("failure")
        await taken(bench, 1)
        assert recipients(bench) == ["a@e.test"]


async def test_an_error_for_one_address_of_ours_leaves_the_others_to_the_mail() -> None:
    async with open_bench() as bench:
        obey(bench, error(local_ip="127.0.0.2"))
        for _ in range(5):
            bench.send(ips=["127.0.0.2", "127.0.0.3"])
        bench.send(ips=["127.0.0.2"])
        await taken(bench, 5)
        await bench.results("failure")
        assert {result["from"] for result in await bench.results("success", 5)} == {"127.0.0.3"}


# Pauses of flows


async def test_paused_mail_is_neither_read_nor_tried_until_the_pause_ends() -> None:
    async with open_bench() as bench:
        obey(bench, pause(domain="d.test"))
        bench.send()
        bench.send("a@e.test")
        await taken(bench, 1)
        await rest(bench)
        takes = takes_of(bench)
        for number in range(50):
            bench.send(f"user{number}@d.test")
        await bench.pass_time(100_000)
        await rest(bench)
        assert takes_of(bench) == takes
        assert recipients(bench) == ["a@e.test"]
        assert bench.dispatcher.statistics()["paused"] == 1
        assert not bench.queues["retry"]
        obey(bench)
        # Their time has passed meanwhile.
        await bench.results("failure", 51)
        assert bench.dispatcher.statistics()["paused"] == 0


async def test_released_mail_begins_with_one_connection() -> None:
    calm = trio.Event()

    async def waits(peer: PeerConnection) -> None:
        await calm.wait()
        await peer.serve()

    async with open_bench(waits, waits, waits) as bench:
        obey(bench, pause())
        for number in range(100):
            bench.send(f"user{number}@d.test")
        await rest(bench)
        assert not bench.peer.connections
        obey(bench)
        await bench.until(lambda figures: bench.peer.connections == 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert bench.peer.connections == 1
        calm.set()
        await taken(bench, 100)


async def test_a_new_pause_finishes_mail_under_way_and_puts_back_the_rest() -> None:
    begun, go = trio.Event(), trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await peer.hello()
        for reply in ("250 ok", "250 ok", "354 go"):
            await peer.line()
            await peer.send(f"{reply}\r\n")
        begun.set()
        await go.wait()
        await peer.take()

    async with open_bench(slow) as bench:
        for number in range(3):
            bench.send(f"user{number}@d.test")
        await begun.wait()
        obey(bench, pause())
        go.set()
        await bench.results("success")
        await bench.until(lambda figures: figures["paused"] == 1 and not figures["connections"])
        await rest(bench)
        assert len(bench.queues["success"]) == 1
        assert not bench.queues["retry"]
        obey(bench)
        await taken(bench, 2)


async def test_a_pause_that_ends_before_the_last_session_is_over_changes_nothing() -> None:
    begun, go = trio.Event(), trio.Event()

    async def slow(peer: PeerConnection) -> None:
        await peer.hello()
        for reply in ("250 ok", "250 ok", "354 go"):
            await peer.line()
            await peer.send(f"{reply}\r\n")
        begun.set()
        await go.wait()
        await peer.take()

    async with open_bench(slow) as bench:
        for number in range(3):
            bench.send(f"user{number}@d.test")
        await begun.wait()
        obey(bench, pause())
        obey(bench)
        await taken(bench, 2)
        go.set()
        await bench.results("success", 3)


async def test_a_connection_that_is_being_opened_is_given_up_for_a_pause() -> None:
    async def silent(peer: PeerConnection) -> None:
        await trio.sleep_forever()

    async with open_bench(silent) as bench:
        bench.send()
        await bench.until(lambda figures: bench.peer.connections == 1)
        obey(bench, pause())
        await bench.until(lambda figures: figures["paused"] == 1 and not figures["connections"])
        await rest(bench)
        assert not bench.queues["retry"]
        obey(bench)
        await taken(bench, 1)
        (result,) = await bench.results("success")
        assert result["attempt"] == 1


async def test_a_pause_of_a_domain_leaves_alone_the_domains_that_share_its_hosts() -> None:
    class Shared(StubResolver):
        async def mail_hosts(self, domain: str) -> tuple[Host, ...]:
            await trio.lowlevel.checkpoint()
            return (Host("mx.test", "127.0.0.1"),)

    async with open_bench(resolver=Shared()) as bench:
        bench.send("a@d.test")
        bench.send("a@e.test")
        await taken(bench, 2)
        obey(bench, pause(domain="d.test"))
        bench.send("b@d.test")
        bench.send("b@e.test")
        await taken(bench, 3)
        await rest(bench)
        assert recipients(bench)[2:] == ["b@e.test"]
        obey(bench)
        await taken(bench, 4)
        assert recipients(bench)[3:] == ["b@d.test"]


async def test_a_pause_of_a_provider_holds_for_all_its_sites(tmp_path: Any) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('[[provider]]\nname = "big"\nmx = ["d.test", "e.test"]\n')
    resolver = StubResolver(d_test=["127.0.0.1"], e_test=["127.0.0.1"], f_test=["127.0.0.1"])
    async with open_bench(resolver=resolver, limits_file=str(limits)) as bench:
        obey(bench, pause(provider="big"))
        for domain in "def":
            bench.send(f"a@{domain}.test")
        await taken(bench, 1)
        await rest(bench)
        assert recipients(bench) == ["a@f.test"]
        assert bench.dispatcher.statistics()["paused"] == 2
        obey(bench)
        await taken(bench, 3)


async def test_mail_with_another_address_leaves_from_there_while_one_is_paused() -> None:
    async with open_bench() as bench:
        for _ in range(6):
            bench.send(ips=["127.0.0.2", "127.0.0.3"])
        await taken(bench, 6)
        obey(bench, pause(local_ip="127.0.0.2"))
        for _ in range(6):
            bench.send(ips=["127.0.0.2", "127.0.0.3"])
        bench.send(ips=["127.0.0.2"])
        await taken(bench, 12)
        await rest(bench)
        results = await bench.results("success", 12)
        assert {result["from"] for result in results[6:]} == {"127.0.0.3"}
        obey(bench)
        await taken(bench, 13)


@pytest.mark.parametrize("scope", [{}, {"tag": "news"}, {"tag": "news", "site": "*.d.test"}])
async def test_a_pause_of_a_pool_follows_its_addresses(scope: dict[str, str]) -> None:
    resolver = StubResolver(d_test=["127.0.0.1"])
    async with open_bench(resolver=resolver) as bench:
        row = pause(pool="bulk", **scope)

        def send() -> None:
            for ip in ("127.0.0.2", "127.0.0.3"):
                bench.send("a@d.test", ips=[ip], tags=["news"])

        def sources() -> list[str]:
            return [each.results[-1]["from"] for each in bench.queues["success"]]

        send()
        await taken(bench, 2)
        obey(bench, row, bulk=("127.0.0.2",))
        send()
        await taken(bench, 3)
        await rest(bench)
        assert sources()[2:] == ["127.0.0.3"]
        obey(bench, row, bulk=("127.0.0.3", "127.0.0.4"))
        await taken(bench, 4)
        await rest(bench)
        assert sources()[3:] == ["127.0.0.2"]
        send()
        await taken(bench, 5)
        await rest(bench)
        assert sources()[4:] == ["127.0.0.2"]
        # What goes on waiting is not read again.
        obey(bench, row, bulk=("127.0.0.3",))
        await rest(bench)
        takes = takes_of(bench)
        bench.queues.pass_time(100)
        bench.dispatcher.flush()
        await rest(bench)
        assert (len(bench.peer.mails), takes_of(bench)) == (5, takes)
        obey(bench)
        await taken(bench, 6)


async def test_two_pauses_of_one_flow_both_have_to_end() -> None:
    async with open_bench() as bench:
        obey(bench, pause(1, domain="d.test"), pause(2))
        bench.send()
        await rest(bench)
        obey(bench, pause(2))
        await rest(bench)
        assert not bench.peer.connections
        obey(bench)
        await taken(bench, 1)


async def test_a_site_that_was_down_is_not_asked_while_it_is_paused() -> None:
    async with open_bench(answers_421) as bench:
        bench.send()
        bench.send()
        await bench.results("retry")
        await rest(bench)
        connections = bench.peer.connections
        obey(bench, pause())
        await bench.pass_time(5000)
        await rest(bench)
        assert bench.peer.connections == connections
        assert bench.dispatcher.statistics()["paused"] == 1
        obey(bench)
        await taken(bench, 2)


async def answers_421(peer: PeerConnection) -> None:
    await peer.send("421 4.3.2 not now\r\n")


# Remote addresses


@pytest.mark.parametrize("paused", [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.0/31"]])
async def test_other_hosts_take_the_mail_while_one_is_paused(paused: Sequence[str]) -> None:
    resolver = StubResolver(d_test=["127.0.0.1", "127.0.0.2"])
    async with open_bench(resolver=resolver, address="0.0.0.0") as bench:
        obey(bench, *(pause(n, remote_ip=ip) for n, ip in enumerate(paused, 1)))
        for _ in range(4):
            bench.send()
        await taken(bench, 4)
        other = "127.0.0.1" if paused == ["127.0.0.2"] else "127.0.0.2"
        assert {result["to"] for result in await bench.results("success", 4)} == {other}


async def test_mail_waits_when_all_hosts_are_paused_and_goes_when_one_is_free() -> None:
    resolver = StubResolver(d_test=["127.0.0.1", "127.0.0.2"])
    async with open_bench(resolver=resolver, address="0.0.0.0") as bench:
        one, other = pause(1, remote_ip="127.0.0.1"), pause(2, remote_ip="127.0.0.2")
        bench.send()
        await taken(bench, 1)
        obey(bench, one, other)
        bench.send()
        await bench.until(lambda figures: figures["paused"] == 1)
        await rest(bench)
        assert len(bench.peer.mails) == 1
        obey(bench, other)
        await taken(bench, 2)
        assert bench.queues["success"][-1].results[-1]["to"] == "127.0.0.1"


async def test_a_connection_to_a_host_that_is_paused_ends_and_another_host_is_used() -> None:
    resolver = StubResolver(d_test=["127.0.0.1", "127.0.0.2"])
    async with open_bench(resolver=resolver, address="0.0.0.0") as bench:
        bench.send()
        await taken(bench, 1)
        obey(bench, pause(remote_ip="127.0.0.1"))
        await bench.until(lambda figures: not bench.peer.open)
        bench.send()
        await taken(bench, 2)
        results = await bench.results("success", 2)
        assert [result["to"] for result in results] == ["127.0.0.1", "127.0.0.2"]


# Pauses of messages


async def test_mail_with_a_paused_tag_waits_and_other_mail_to_the_destination_passes() -> None:
    async with open_bench() as bench:
        obey(bench, pause(7, tag="news"))
        for number in range(20):
            bench.send(f"n{number}@d.test", tags=["news"])
            bench.send(f"o{number}@d.test")
        await taken(bench, 20)
        await rest(bench)
        assert all(recipient.startswith("o") for recipient in recipients(bench))
        takes = takes_of(bench)
        bench.queues.pass_time(100)
        bench.dispatcher.flush()
        await rest(bench)
        assert takes_of(bench) == takes
        assert bench.dispatcher.statistics()["parked"] == 1
        obey(bench)
        await taken(bench, 40)
        await rest(bench)
        assert not any("paused" in each.properties for each in bench.queues["success"])
        assert len({mail.recipient for mail in bench.peer.mails}) == 40


async def test_mail_of_an_ended_pause_that_another_one_concerns_waits_for_that() -> None:
    async with open_bench() as bench:
        obey(bench, pause(7, tag="news"), pause(8, tag="letters"))
        bench.send(tags=["news", "letters"])
        await rest(bench)
        obey(bench, pause(8, tag="letters"))
        await rest(bench)
        assert not bench.peer.connections
        obey(bench)
        await taken(bench, 1)


async def test_a_domain_behind_a_smarthost_is_paused_by_message() -> None:
    async with open_bench(resolver=StubResolver(), smtp_out_port=1) as bench:
        smarthost = {"hostname": "127.0.0.1", "port": bench.port}
        obey(bench, pause(domain="d.test"))
        bench.send("a@d.test", smarthost=smarthost)
        bench.send("a@e.test", smarthost=smarthost)
        await taken(bench, 1)
        await rest(bench)
        assert recipients(bench) == ["a@e.test"]
        obey(bench)
        await taken(bench, 2)


@pytest.mark.parametrize("name", ["lmtp://mail.d.test", "relay.d.test:25"])
async def test_a_server_for_other_domains_is_not_set_apart_by_a_pause_of_its_own(name: str) -> None:
    async with open_bench() as bench:
        obey(bench, pause(domain="*.d.test"))
        assert bench.dispatcher.stops.apart_of("mail.d.test") == "*.d.test"
        assert not bench.dispatcher.stops.apart_of(name)


async def test_a_tag_at_hosts_is_paused_for_mail_that_goes_there() -> None:
    resolver = StubResolver(d_test=["127.0.0.1"], e_test=["127.0.0.1"])
    async with open_bench(resolver=resolver) as bench:
        obey(bench, pause(site="mx0.d.test", tag="news"))
        bench.send("a@d.test", tags=["news"])
        bench.send("b@d.test")
        bench.send("a@e.test", tags=["news"])
        await taken(bench, 2)
        await rest(bench)
        assert sorted(recipients(bench)) == ["a@e.test", "b@d.test"]
        obey(bench)
        await taken(bench, 3)


async def test_parked_mail_waits_after_a_restart_too_and_goes_if_its_pause_is_gone() -> None:
    async with open_bench() as bench:
        obey(bench, pause(7, tag="news"))
        bench.send(tags=["news"], paused=7)
        bench.send(tags=["news"], paused=6)
        await rest(bench)
        assert not bench.peer.connections
        obey(bench)
        await taken(bench, 2)


@pytest.mark.parametrize("down", [True, False])
async def test_mail_that_only_an_address_that_waits_may_send_is_not_read_again_and_again(
    down: bool,
) -> None:
    """Other flows of its destination could take the mail, and must not send it."""
    async with open_bench() as bench:
        both = ["127.0.0.3", "127.0.0.4"]
        rows = [pause(1, local_ip="127.0.0.3", tag="news"), pause(2, local_ip="127.0.0.4")]
        obey(bench, rows[0], *rows[1:] if not down else [])
        if down:
            bench.peer.scripts.append(answers_421)
            bench.send(ips=["127.0.0.4"])
            await bench.results("retry")
        bench.send(ips=both)
        bench.send(ips=both, tags=["news"])
        await taken(bench, 1)
        await rest(bench)
        takes = takes_of(bench)
        bench.send("b@d.test", ips=both)
        await taken(bench, 2)
        await rest(bench)
        assert takes_of(bench) < takes + 5
        obey(bench)
        await bench.pass_time(700)
        await taken(bench, 4 if down else 3)


# Mail in memory


async def test_a_new_row_is_about_mail_in_memory_too() -> None:
    go = trio.Event()

    async def stalls(peer: PeerConnection) -> None:
        await go.wait()
        await peer.serve()

    async with open_bench(*[stalls] * 10) as bench:
        bench.send("ann@d.test")
        bench.send("bob@d.test")
        bench.send("eve@d.test", tags=["news"])
        bench.send("kim@d.test", tags=["old"])
        await bench.until(lambda figures: bench.peer.connections == 1)
        await bench.until(lambda figures: figures["waiting"] == 4)
        row = Row(id=9, kind=SUPPRESSION, code=550)
        bench.dispatcher.stops.change(
            Rows([pause(1, tag="news"), error(2, tag="old")], addresses={"bob@d.test": row})
        )
        go.set()
        await taken(bench, 1)
        await bench.results("failure", 2)
        await rest(bench)
        assert recipients(bench) == ["ann@d.test"]


# Many


class Turns(trio.abc.Instrument):
    """How much a figure falls in one turn of the loop at most."""

    def __init__(self, figure: Callable[[], int]) -> None:
        self.most = 0
        self._figure = figure
        self._last = figure()

    def before_io_wait(self, timeout: float) -> None:
        last, self._last = self._last, self._figure()
        self.most = max(self.most, last - self._last)


@pytest.mark.parametrize("scope", [{}, {"tag": "news"}])
async def test_the_end_of_a_pause_of_many_sites_takes_many_turns(scope: dict[str, str]) -> None:
    class Apart(StubResolver):
        async def mail_hosts(self, domain: str) -> tuple[Host, ...]:
            await trio.lowlevel.checkpoint()
            return (Host(f"mx.{domain}", "127.0.0.1"),)

    sites = 5 * RELEASED
    async with open_bench(resolver=Apart()) as bench:
        obey(bench, pause(**scope))
        for number in range(sites):
            bench.send(f"a@d{number}.test", tags=["news"])
        state = "parked" if scope else "paused"
        await bench.until(lambda figures: figures[state] == sites)
        await rest(bench)
        turns = Turns(lambda: bench.dispatcher.stops.statistics()[state])
        trio.lowlevel.add_instrument(turns)
        obey(bench)
        await bench.until(lambda figures: not figures[state])
        trio.lowlevel.remove_instrument(turns)
        assert 0 < turns.most <= RELEASED
        await taken(bench, 20)


async def test_a_pause_that_begins_while_another_one_ends_keeps_the_mail() -> None:
    sites = 3 * RELEASED
    domains = {f"d{number}_test": ["127.0.0.1"] for number in range(sites)}
    async with open_bench(resolver=StubResolver(**domains)) as bench:
        for row in (pause(1), pause(2, tag="news")):
            obey(bench, row)
            for number in range(sites):
                bench.send(f"a@d{number}.test", tags=["news"])
            await rest(bench)
            obey(bench)
            await trio.lowlevel.checkpoint()
            obey(bench, pause(3))
            await rest(bench)
            assert len(bench.peer.mails) < sites * row.id
            obey(bench)
            bench.dispatcher.flush()
            await bench.results("success", sites * row.id)


async def test_rows_that_change_while_deliveries_stop_do_no_harm() -> None:
    async with open_bench() as bench:
        obey(bench, pause(), pause(2, tag="news"))
        bench.send("a@d.test")
        bench.send("a@e.test", tags=["news"])
        await rest(bench)
        await bench.dispatcher.stop(0)
        obey(bench)
        await trio.testing.wait_all_tasks_blocked()
        assert not bench.peer.connections


# All together


@pytest.mark.parametrize("seed", range(4))
async def test_no_mail_is_lost_or_sent_twice_whatever_pauses_come_and_go(seed: int) -> None:
    lot = random.Random(seed)

    class Shared(StubResolver):
        async def mail_hosts(self, domain: str) -> tuple[Host, ...]:
            await trio.lowlevel.checkpoint()
            first = Host(f"mx.{domain[0]}.test", "127.0.0.1")
            return (first, Host("mx.other.test", "127.0.0.2", 1))

    def draw(number: int) -> Row:
        scope: dict[str, str] = {}
        if lot.random() < 0.3:
            scope["local_ip"] = lot.choice(["127.0.0.3", "127.0.0.4"])
        if lot.random() < 0.3:
            scope["tag"] = "news"
        place = lot.choice(["", "domain", "domain", "site", "remote_ip"])
        values = {
            "domain": ["d.test", "*.test", "x.d.test"],
            "site": ["mx.d.test", "*.other.test"],
            "remote_ip": ["127.0.0.1", "127.0.0.2"],
        }
        if place:
            scope[place] = lot.choice(values[place])
        return pause(number, **scope)

    async with open_bench(resolver=Shared(), address="0.0.0.0") as bench:
        rows: dict[int, Row] = {}
        for number in range(1, 201):
            more: dict[str, Any] = {}
            if lot.random() < 0.4:
                more["tags"] = ["news"]
            if lot.random() < 0.5:
                more["ips"] = lot.choice([["127.0.0.3"], ["127.0.0.3", "127.0.0.4"]])
            bench.send(f"u{number}@{lot.choice(['d', 'e', 'x.d', 'dd'])}.test", **more)
            if lot.random() < 0.3:
                if rows and lot.random() < 0.5:
                    del rows[lot.choice(list(rows))]
                else:
                    rows[number] = draw(number)
                obey(bench, *rows.values())
            if lot.random() < 0.2:
                await trio.testing.wait_all_tasks_blocked(0.001)
        for number in list(rows):
            del rows[number]
            obey(bench, *rows.values())
            await trio.testing.wait_all_tasks_blocked(0.001)
        await rest(bench)
        bench.queues.pass_time(100)  # for mail that waited for one of several addresses
        bench.dispatcher.flush()
        await taken(bench, 200)
        await rest(bench)
        assert len(set(recipients(bench))) == len(bench.peer.mails) == 200
        assert len(bench.queues["success"]) == 200
        assert not (bench.queues["failure"] or bench.queues["retry"] or bench.queues["outbox"])
        assert bench.dispatcher.statistics()["parked"] == 0
