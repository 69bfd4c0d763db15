"""One process of a daemon does what is to be done once: at a time, and until it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailerq.config import Config
from mailerq.errors import MailerqError
from mailerq.live import Live
from mailerq.message import Message
from mailerq.net.resolver import Resolver
from mailerq.outbound.published import LOCK_NAME, Published


async def publish(message: Message) -> None:
    raise AssertionError("nothing is to be published")


def opened(directory: Path) -> Published:
    config = Config(hostname="me.example", queue_directory=str(directory))
    return Published(Live(config), Resolver(config), publish)


def holders(*each: Published) -> Iterator[bool]:
    for one in each:
        yield one._is_mine()


async def test_one_process_holds_the_lock_and_another_one_takes_over(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    for _ in range(2):
        assert [*holders(one, two)] == [True, False]
    await one.close()
    assert [*holders(two)] == [True]
    await two.close()


async def test_a_lock_whose_file_a_plugin_has_closed_is_taken_again(
    tmp_path: Path,
) -> None:
    one = opened(tmp_path)
    assert one._is_mine() and one._lead._lock is not None
    os.close(one._lead._lock.fd)
    assert one._is_mine()
    assert [*holders(opened(tmp_path))] == [False]
    await one.close()


async def test_a_directory_that_cannot_be_used_is_said_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = opened(tmp_path / "missing")
    assert not one._is_mine()
    assert LOCK_NAME in caplog.text
    await one.close()


async def test_a_request_with_odd_parts_is_refused(tmp_path: Path) -> None:
    one = opened(tmp_path)
    with pytest.raises(MailerqError, match="forget"):
        await one.command({"forget": 5})
    await one.command({"forget": "d.example", "flush": True, "send": True})
    await one.close()
