"""IPv4 and IPv6: the second family has its turn soon, and costs nothing where it leads nowhere."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trio

from mailerq.net.resolver import Host, NoHosts
from mailerq.outbound import race
from tests.outbound.kit import Bench, Peer, PeerConnection, StubResolver, open_bench
from tests.outbound.memory_queues import MemoryQueues
from tests.support import DEADLINE

SILENT = "127.0.0.7"
REFUSING = "127.0.0.8"

OtherHost = Callable[[int], AbstractContextManager[None]]


class OneHost(StubResolver):
    """All addresses belong to one host, of one preference."""

    async def mail_hosts(self, domain: str) -> tuple[Host, ...] | NoHosts:
        found = await super().mail_hosts(domain)
        if isinstance(found, NoHosts):
            return found
        return tuple(Host(f"mx.{domain}", host.address, 10) for host in found)


@contextmanager
def silent_host(port: int) -> Iterator[None]:
    """A host that takes no more connections, and does not say so."""
    with socket.socket() as listening:
        listening.bind((SILENT, port))
        listening.listen(0)
        clients = [socket.socket() for _ in range(4)]
        try:
            for client in clients:
                client.setblocking(False)
                client.connect_ex((SILENT, port))
            yield
        finally:
            for client in clients:
                client.close()


@contextmanager
def refusing_host(port: int) -> Iterator[None]:
    """A host that lets nobody connect."""
    with socket.socket() as reserved:
        reserved.bind((REFUSING, port))
        yield


@asynccontextmanager
async def open_beside(host: OtherHost = silent_host, **settings: Any) -> AsyncIterator[Bench]:
    """A bench on IPv6 with another host at the same port."""
    while True:
        async with open_bench(address="::1", **settings) as bench:
            with ExitStack() as stack:
                try:
                    stack.enter_context(host(bench.port))
                except OSError:
                    continue  # another program has this port of IPv4
                yield bench
                return


async def listeners_at_one_port() -> list[trio.SocketListener]:
    """A listener of each family."""
    while True:
        (six,) = await trio.open_tcp_listeners(0, host="::1")
        port = six.socket.getsockname()[1]
        try:
            return [six, *await trio.open_tcp_listeners(port, host="127.0.0.1")]
        except OSError:  # another program has this port of IPv4
            await six.aclose()


@pytest.fixture(autouse=True)
def _ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("this host has no IPv6")


async def test_a_silent_family_costs_a_quarter_of_a_second() -> None:
    resolver = OneHost(d_test=[SILENT, "::1"])
    async with open_beside(resolver=resolver) as bench:
        began = monotonic()
        bench.send()
        (result,) = await bench.results("success")
        assert (result["to"], result["attempt"]) == ("::1", 1)
        assert race.HEAD_START_SECONDS <= monotonic() - began < 5
    assert bench.dispatcher.history.is_doubtful(SILENT)


async def test_the_first_family_is_used_where_it_answers_in_time() -> None:
    resolver = OneHost(d_test=["::1", SILENT])
    async with open_beside(resolver=resolver) as bench:
        bench.send()
        (result,) = await bench.results("success")
        assert result["to"] == "::1"
        assert not bench.dispatcher.history.is_doubtful(SILENT)


# A link-local address without its link is one that nothing can be sent to.
@pytest.mark.parametrize("without_route", ["fe80::1", REFUSING])
async def test_a_family_that_leads_nowhere_costs_nothing(
    without_route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "HEAD_START_SECONDS", DEADLINE)
    other = "::1" if without_route == REFUSING else "127.0.0.1"
    resolver = OneHost(d_test=[without_route, other])
    opened = (
        open_beside(refusing_host, resolver=resolver)
        if without_route == REFUSING
        else open_bench(resolver=resolver)
    )
    async with opened as bench:
        bench.send()
        (result,) = await bench.results("success")
        assert (result["to"], result["attempt"]) == (other, 1)


async def test_the_answer_of_a_host_is_reported_where_the_other_family_has_no_route() -> None:
    async with open_bench(resolver=OneHost(d_test=["fe80::1", REFUSING])) as bench:
        bench.send()
        result = await bench.retried()
        assert result["type"] == "refused"
        assert REFUSING in result["description"]


async def test_the_other_family_is_tried_where_the_first_lets_nobody_in() -> None:
    async def refuses_the_first(peer: PeerConnection) -> None:
        await peer.send("421 4.3.2 come later\r\n")

    resolver = OneHost(d_test=["fe80::1", "127.0.0.1", REFUSING])
    async with open_bench(refuses_the_first, resolver=resolver) as bench:
        bench.send()
        result = await bench.retried()
        assert (result["type"], result["to"]) == ("noaccess", "127.0.0.1")


async def test_a_race_leaves_no_limit_taken(tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text("[[limit]]\nremote-ip = '*'\nmax-connections = 1\nmax-starting = 1\n")
    settings: dict[str, Any] = {"limits_file": str(limits), "connection_maxidle": 0}
    resolver = OneHost(d_test=[SILENT, "::1"])
    async with open_beside(resolver=resolver, **settings) as bench:
        for count in range(3):
            bench.send()
            await bench.results("success", count=count + 1)
            bench.dispatcher.history.let_in(SILENT, None)
        await bench.until(lambda figures: not figures["connections"])
        assert held(bench) == {}


def held(bench: Bench) -> dict[str, int]:
    """What is held of limits."""
    cells: Any = bench.dispatcher.limits._cells
    return {key: count for key, count in cells._counts.items() if count}


async def test_both_may_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "HEAD_START_SECONDS", 0.0)
    listeners = await listeners_at_one_port()
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, Peer(MemoryQueues()).handle, listeners)
        hosts = Host("mx", "127.0.0.1"), Host("mx", "::1")
        for _ in range(10):
            raced = await race.race(*hosts, port, lambda: True)
            assert raced.stream is not None
            assert raced.host in hosts
            raced.stream.close()
        nursery.cancel_scope.cancel()
