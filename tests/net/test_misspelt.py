"""A misspelt property or field is told in the log, and the log stays small whatever is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailerq import Engine
from mailerq.errors import MessageError
from mailerq.message import Message
from mailerq.net.misspelt import AGAIN_SECONDS, NAMES_LIMIT, NAMES_PER_MINUTE, Misspelt
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import Store
from tests.engine.kit import inbox, serve
from tests.support import configure, send


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_name_is_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    misspelt = Misspelt(clock=clock)
    for _ in range(3):
        misspelt.properties({"envelope": "a@b.test", "maxattempt": 5, "my-id": 7})
    assert [record.getMessage() for record in caplog.records] == [
        "property maxattempt of a message from <a@b.test> is not known and changes nothing;"
        " is maxattempts meant?"
    ]
    clock.now = AGAIN_SECONDS
    misspelt.properties({"maxattempt": 5})
    assert len(caplog.records) == 2


def test_names_without_end_are_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    misspelt = Misspelt(clock=Clock())
    letters = list(map(chr, range(0x4E00, 0x4E00 + 2 * NAMES_LIMIT)))
    for letter in letters:
        misspelt.properties({f"tags{letter}": 1})
    misspelt.flush()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == NAMES_PER_MINUTE + 1
    assert lines[-1] == f"and {len(letters) - NAMES_PER_MINUTE} more names may be misspelt"
    assert len(misspelt._told) <= NAMES_LIMIT


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = (record.getMessage() for record in caplog.records)
    return [line.partition(" of a message")[0] for line in lines if "is not known" in line]


async def test_publishing_and_delivering_tell_a_name_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = {"recipient": "c@d.test", "mime": "", "delayed": "2999-01-01 00:00:00"}
    async with Engine(configure(tmp_path)) as engine:
        await engine.publish({**document, "queues": {"sucess": "q"}, "max-attempts": 1})
        with pytest.raises(MessageError, match="is 'recipent' a misspelling of it"):
            await engine.publish({"recipent": "c@d.test", "mime": ""})
        await engine.publish({"recipient": "c@d.test", "tag": []}, queue="mine")
    assert told(caplog) == [
        "property max-attempts", "property queues.sucess", "property recipent"
    ]  # fmt: skip


async def test_documents_that_other_programs_left_in_the_outbox_are_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path, rabbitmq_results="results")
    with Store.open(config.queue_directory) as store:
        store.publish([Publication(config.rabbitmq_outbox, Message({"recipeint": "c@d.test"}))])
    async with Engine(config) as engine, engine.consume("results") as leases:
        await leases.receive()
    assert told(caplog) == ["property recipeint"]


async def test_fields_of_clients_are_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path) as engine:
        for _ in range(2):
            await send(engine.addresses[0], b"x-mq-dsn-notfy: NEVER\r\nx-mq-tags: a\r\n\r\nhi\r\n")
        assert len(await inbox(engine, 2)) == 2
    assert told(caplog) == ["field x-mq-dsn-notfy"]
    ignored = "ignored x-mq-tags: is no name for a property; is x-mq-tag meant?"
    assert any(ignored in record.getMessage() for record in caplog.records)
