"""Mail for local domains, to an LMTP server on a TCP port or a Unix socket."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.net import stream
from mailerq.net.stream import Stream
from tests.outbound.kit import Bench, PeerConnection, StubPlugins, StubResolver, open_bench
from tests.support import DEADLINE

LOCAL: dict[str, Any] = {"smtp_local_domains": ("d.test", "e.test")}


def listen(path: Path, backlog: int = 10) -> trio.SocketListener:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(backlog)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


@asynccontextmanager
async def open_mailbox(directory: Path, *scripts: Any, **settings: Any) -> AsyncIterator[Bench]:
    """A bench whose local domains are behind its peer, on a Unix socket."""
    path = directory / "lmtp"
    settings = {**LOCAL, "local_delivery": f"lmtp://{path}", **settings}
    async with (
        open_bench(*scripts, resolver=StubResolver(), **settings) as bench,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(trio.serve_listeners, bench.peer.handle, [listen(path)])
        yield bench
        nursery.cancel_scope.cancel()


async def test_local_domains_are_delivered_over_a_unix_socket(tmp_path: Path) -> None:
    async with open_mailbox(tmp_path, plugins=StubPlugins(out_data=lambda message: None)) as bench:
        bench.send("ann@d.test", body="Subject: x\r\n\r\n.hi\r\n")
        bench.send("bob@E.test", ips=["192.0.2.1"])
        results = await bench.results("success", 2)
        assert {mail.recipient for mail in bench.peer.mails} == {"ann@d.test", "bob@E.test"}
        assert bench.peer.mails[0].body == b"Subject: x\r\n\r\n.hi\r\n"
        assert {command.partition(" ")[0] for command in bench.peer.commands} >= {"LHLO"}
        assert "EHLO" not in {command.partition(" ")[0] for command in bench.peer.commands}
        assert {result["to"] for result in results} == {str(tmp_path / "lmtp")}
        assert not any("from" in result for result in results)


async def test_local_domains_share_connections_and_other_domains_do_not_use_them(
    tmp_path: Path,
) -> None:
    async with open_mailbox(tmp_path, domain_maxconnections=1) as bench:
        for number in range(6):
            bench.send(f"c@{'de'[number % 2]}.test")
        bench.send("c@x.test")
        await bench.results("success", 6)
        assert bench.peer.connections == 1
        assert (await bench.retried())["type"] == "nohosts"


async def test_an_lmtp_server_on_a_port() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    settings = {**LOCAL, "local_delivery": f"lmtp://127.0.0.1:{port}"}
    async with (
        open_bench(resolver=StubResolver(), **settings) as bench,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(trio.serve_listeners, bench.peer.handle, [listener])
        bench.send("ann@d.test")
        (result,) = await bench.results("success")
        assert result["to"] == "127.0.0.1"
        assert bench.peer.commands[0] == "LHLO me.test"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("code", "queue"), [(452, "retry"), (550, "failure")])
@pytest.mark.parametrize("verb", ["RCPT", "."])
async def test_the_reply_for_the_recipient_is_the_result(
    tmp_path: Path, verb: str, code: int, queue: str
) -> None:
    async with open_mailbox(tmp_path) as bench:
        bench.peer.answers[verb, "ann@d.test"] = [f"{code} 5.2.2 <ann@d.test> no"]
        if verb == "RCPT":
            bench.peer.answers["DATA", "ann@d.test"] = ["503 5.5.1 no valid recipients"]
        bench.send("ann@d.test")
        bench.send("bob@d.test")
        (result,) = await bench.results(queue)
        assert result["code"] == code
        await bench.results("success")


async def test_a_server_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    settings = {**LOCAL, "local_delivery": f"lmtp://{tmp_path}/lmtp"}
    async with open_bench(resolver=StubResolver(), **settings) as bench:
        bench.send("ann@d.test")
        result = await bench.retried()
        assert (result["type"], result["state"]) == ("connect", "connect")
        assert result["description"].startswith(f"{tmp_path}/lmtp: ")
        bench.queues["retry"].clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, bench.peer.handle, [listen(tmp_path / "lmtp")])
            await bench.pass_time(700)
            await bench.results("success")
            nursery.cancel_scope.cancel()


async def test_an_smtp_server_is_no_lmtp_server(tmp_path: Path) -> None:
    async def smtp(peer: PeerConnection) -> None:
        await peer.send("220 mx.test\r\n")
        assert await peer.line() == "LHLO me.test"
        await peer.send("500 what?\r\n")
        assert await peer.line() == ""

    async with open_mailbox(tmp_path, smtp) as bench:
        bench.send("ann@d.test")
        result = await bench.retried()
        assert (result["type"], result["state"], result["code"]) == ("noaccess", "ehlo", 500)


async def test_a_limit_for_an_address_does_not_meet_a_socket(tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('[[limit]]\nremote-ip = "127.0.0.1"\nmessages-per-minute = 1\n')
    async with open_mailbox(tmp_path, limits_file=str(limits)) as bench:
        bench.send("ann@d.test")
        await bench.results("success")


async def test_a_connection_waits_for_room_in_the_backlog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BUSY_SECONDS", 0.001)
    path = str(tmp_path / "lmtp")
    connected = list[Stream]()
    with socket.socket(socket.AF_UNIX) as server, trio.fail_after(DEADLINE):
        server.bind(path)
        server.listen(0)
        async with trio.open_nursery() as nursery:

            async def connect() -> None:
                connected.append(await Stream.connect(path, 0))

            for _ in range(3):
                nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked()
            assert len(connected) < 3
            for _ in range(3):
                accepted, _ = await trio.to_thread.run_sync(server.accept)
                accepted.close()
    for each in connected:
        assert (each.local, each.remote) == (("", 0), (path, 0))
        each.close()
    with pytest.raises(FileNotFoundError):
        await Stream.connect(os.path.join(tmp_path, "nothing"), 0)
