"""An engine with one share of a queue directory, which adopts others for a while."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from mailerq import Engine, Message, QueueError
from mailerq.inbound.listener import bind
from mailerq.net import control
from mailerq.queues import Publication
from mailerq.queues.adoption import LOOKS, RETRY_SECONDS, own
from mailerq.queues.opening import open_exclusive, shares_in
from mailerq.queues.ownership import DirectoryLock
from tests.engine.kit import no_descriptors
from tests.support import configure, open_sink, public_directory, until


def leave_mail(directory: Path, share: int, recipient: str) -> None:
    """Put a mail into a share that nobody has."""
    with open_exclusive(str(directory / "queue" / f"share-{share}")) as store:
        properties = {"envelope": "a@b.test", "recipient": recipient}
        store.publish([Publication("outbox", Message(properties, b"Subject: x\r\n\r\nx\r\n"))])


async def test_a_share_is_delivered_until_its_own_process_wants_it(tmp_path: Path) -> None:
    leave_mail(tmp_path, 1, "one@d.test")
    directory = str(tmp_path / "queue" / "share-1")
    async with open_sink() as sink:
        config = configure(
            tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port, smtp_processes=2
        )
        async with Engine(config, share=0) as engine:
            assert [mail.recipients for mail in await sink.wait_for(1)] == [["one@d.test"]]
            assert engine.statistics()["shares"] == [0, 1]
            with trio.fail_after(60):
                lock = await own(directory)
            assert engine.statistics()["shares"] == [0]
            with open_exclusive(directory, lock=lock) as store:
                assert store.depths() == []


async def test_a_share_from_when_there_were_more_processes_stays_adopted(tmp_path: Path) -> None:
    leave_mail(tmp_path, 2, "one@d.test")
    async with open_sink() as sink:
        config = configure(
            tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port, smtp_processes=2
        )
        async with Engine(config, share=0) as first, Engine(config, share=1) as second:
            await sink.wait_for(1)
            shares = [first.statistics()["shares"], second.statistics()["shares"]]
            assert shares in ([[0, 2], [1]], [[0], [1, 2]])


async def test_a_process_waits_for_its_share_but_not_for_another_daemon(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    directory = tmp_path / "queue"
    directory.mkdir()
    taken = DirectoryLock.take(str(directory))
    with trio.fail_after(60), pytest.raises(QueueError, match="held by another mailerq"):
        await own(str(directory))
    taken.release()
    adopted = DirectoryLock.adopt(str(directory), time.time())
    async with trio.open_nursery() as nursery:

        async def give_back() -> None:
            while not adopted.is_wanted():  # noqa: ASYNC110
                await trio.sleep(0.01)
            await trio.sleep(1.5 * LOOKS * RETRY_SECONDS)
            adopted._write("free")  # as a release does, at a busy moment of this host
            await trio.sleep(0.3 * LOOKS * RETRY_SECONDS)
            adopted.release()

        nursery.start_soon(give_back)
        with trio.fail_after(60):
            (await own(str(directory))).release()


async def test_a_process_that_looks_late_meets_others_for_a_moment(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold the lock to see whether the share is free, and this process has stood still."""
    directory = tmp_path / "queue"
    directory.mkdir()
    take, looks = DirectoryLock.take, 0

    def take_late(path: str) -> DirectoryLock:
        nonlocal looks
        looks += 1
        autojump_clock.jump(3.0)
        if looks == 4:
            return take(path)
        other = DirectoryLock(path)
        try:
            return take(path)
        finally:
            other.release()

    monkeypatch.setattr(DirectoryLock, "take", take_late)
    (await own(str(directory))).release()
    assert looks == 4


async def test_a_share_that_cannot_be_opened_is_said_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_mail(tmp_path, 1, "one@d.test")
    share = tmp_path / "queue" / "share-1"
    share.rename(tmp_path / "aside")
    share.mkdir()
    (share / "queue.lock").mkdir()
    async with open_sink() as sink:
        config = configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port)
        async with Engine(config):
            await until(lambda: "share 1 of the queue is not adopted" in caplog.text)
            (share / "queue.lock").rmdir()
            share.rmdir()
            (tmp_path / "aside").rename(share)
            await sink.wait_for(1)


async def test_an_engine_without_descriptors_looks_for_shares_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_sink() as sink:
        config = configure(tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port)
        async with Engine(config):
            with no_descriptors():
                await until(lambda: "the shares of the queue cannot be listed" in caplog.text)
            leave_mail(tmp_path, 1, "one@d.test")
            await sink.wait_for(1)


async def test_a_share_goes_back_although_there_were_no_descriptors_to_see_that_it_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = str(tmp_path / "queue" / "share-1")
    leave_mail(tmp_path, 1, "one@d.test")
    async with open_sink() as sink:
        config = configure(
            tmp_path, smtp_sink_address="127.0.0.1", smtp_sink_port=sink.port, smtp_processes=2
        )
        async with Engine(config, share=0) as engine:
            await until(lambda: engine.statistics()["shares"] == [0, 1])
            await sink.wait_for(1)  # its connections need descriptors
            known = shares_in(str(tmp_path / "queue"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("mailerq.queues.adoption.shares_in", lambda directory: known)
                with no_descriptors():
                    await until(lambda: "wanted cannot be seen" in caplog.text)
            with trio.fail_after(60):
                (await own(directory)).release()


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
        with trio.fail_after(60):
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
async def test_the_control_socket_belongs_to_who_owns_the_directory() -> None:
    with public_directory() as directory:
        queue = directory / "queue"
        queue.mkdir(0o750)
        os.chown(queue, 65534, 65534)
        precious = directory / "precious"
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
