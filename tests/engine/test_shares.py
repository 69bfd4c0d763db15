"""An engine that has one share of a queue directory, and takes others over for a while."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from mailerq import Engine, Message, QueueError
from mailerq.inbound.listener import bind
from mailerq.net import control
from mailerq.queues import Publication
from mailerq.queues.opening import open_embedded, open_exclusive
from tests.support import configure, in_thread, open_sink


def leave_mail(directory: Path, share: int, recipient: str) -> None:
    """Put a mail into a share that nobody has."""
    with open_exclusive(str(directory / "queue" / f"share-{share}")) as store:
        properties = {"envelope": "a@b.test", "recipient": recipient}
        store.publish([Publication("outbox", Message(properties, b"Subject: x\r\n\r\nx\r\n"))])


async def test_a_share_is_delivered_until_it_is_given_back(tmp_path: Path) -> None:
    leave_mail(tmp_path, 1, "one@d.test")
    async with open_sink() as sink:
        config = configure(
            tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port, smtp_processes=2
        )
        async with Engine(config, share=0) as engine:
            await engine.take_over(1)
            assert [mail.recipients for mail in await sink.wait_for(1)] == [["one@d.test"]]
            with pytest.raises(QueueError, match="held by another mailerq"):
                await in_thread(leave_mail, tmp_path, 1, "two@d.test")
            await engine.give_back(1)
            await in_thread(leave_mail, tmp_path, 1, "two@d.test")
            await engine.take_over(1)
            await sink.wait_for(2)
            assert engine.statistics()["outgoing"]["delivered"] <= 2


async def test_a_share_that_is_taken_over_twice_at_a_time_is_given_back_once(
    tmp_path: Path,
) -> None:
    leave_mail(tmp_path, 1, "one@d.test")
    async with Engine(configure(tmp_path, smtp_processes=2), share=0) as engine:
        refused = 0

        async def take_over() -> None:
            nonlocal refused
            try:
                await engine.take_over(1)
            except QueueError:
                refused += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_over)
            nursery.start_soon(take_over)
        await engine.give_back(1)
        async with open_embedded(str(tmp_path / "queue" / "share-1")):
            pass  # else its lock is still held
        assert refused <= 1


async def test_an_engine_that_stops_takes_nothing_over(tmp_path: Path) -> None:
    leave_mail(tmp_path, 1, "one@d.test")
    config = configure(tmp_path, smtp_processes=2, shutdown_timeout=1.0)
    engine = Engine(config, share=0)
    answers: list[object] = []

    async def late() -> None:
        while not engine._stopping:  # noqa: ASYNC110
            await trio.sleep(0.01)
        try:
            await engine.take_over(1)
        except QueueError as error:
            answers.append(str(error))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, engine:
            client = await trio.open_tcp_stream(*engine.addresses[0])
            for command in (b"", b"EHLO c.test\r\n", b"MAIL FROM:<a@b.test>\r\n"):
                await client.send_all(command)
                await client.receive_some()
            nursery.start_soon(late)
            # A transaction is under way, so the engine does not end at once.
    await client.aclose()
    assert answers == ["the engine stops"]


async def test_an_engine_that_is_cancelled_ends_in_spite_of_a_peer_that_does_not_answer(
    tmp_path: Path,
) -> None:
    async with open_sink() as sink:
        config = configure(
            tmp_path,
            smtp_sink_address="127.0.0.1",
            smtp_sink_port=sink.port,
            domain_maxconnections=1,
            shutdown_timeout=1.0,
        )
        seen = trio.Event()
        sink.decide = lambda event: seen.set()
        with trio.fail_after(20):
            with trio.CancelScope() as scope:
                async with Engine(config) as engine:
                    for number in range(20):
                        await engine.publish(
                            {"envelope": "a@b.test", "recipient": f"{number}@d.test", "mime": "x"}
                        )
                    await seen.wait()
                    scope.cancel()
                    await trio.sleep_forever()
            assert scope.cancelled_caught


def test_ports_that_are_shared_do_not_listen_before_the_engine_serves(tmp_path: Path) -> None:
    (port,) = bind(configure(tmp_path), shared=True)
    with port.sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(port.address)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
async def test_the_control_socket_belongs_to_who_owns_the_directory(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    queue = tmp_path / "queue"
    queue.mkdir(0o750)
    os.chown(queue, 65534, 65534)
    precious = tmp_path / "precious"
    precious.write_text("data")
    precious.chmod(0o600)
    (queue / "control").symlink_to(precious)
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, str(queue), {})
        found = (queue / "control").lstat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65534, 0o660)
        assert (os.geteuid(), os.getegid()) == (0, 0)
        nursery.cancel_scope.cancel()
    assert (precious.stat().st_uid, precious.stat().st_mode & 0o777) == (0, 0o600)
    assert not (queue / "control").exists()
