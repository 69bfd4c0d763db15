"""kill -9 while mail fails: each failure has one report, and each report one failure."""

from __future__ import annotations

import email
import random
from collections import Counter
from pathlib import Path
from typing import Any

import trio

from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.embedded.queue_file import QueueFile
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.crash.kit import daemon
from tests.support import open_sink

MAILS = 2000
KILLS = 3
MOST_KILLS = 60


def refuse(event: object) -> Reply | None:
    return Reply(550, "5.1.1 no") if isinstance(event, server.Rcpt) else None


def recipients_in(store: QueueFile, queue: str) -> list[str]:
    """Whom the documents of a queue are about."""
    found = []
    for entry in store.browse(queue, limit=10 * MAILS):
        body = entry.message.body
        if body is None:
            found.append(entry.message.recipient)
            continue
        parts: Any = email.message_from_bytes(body).get_payload()
        blocks = parts[1].get_payload()[1:]
        found += [block["Final-Recipient"].partition("; ")[2] for block in blocks]
    return found


async def test_a_failure_and_its_report_are_there_together(tmp_path: Path) -> None:
    body = b"Message-ID: <m1@b.test>\r\nSubject: Hi\r\n\r\n" + b"hello\r\n" * 200
    names = [f"c{number}@d.test" for number in range(MAILS)]
    with QueueFile.open(str(tmp_path / "queue")) as store:
        store.publish([
            Publication(
                "outbox",
                Message({"envelope": "a@b.test", "recipient": name, "dsn": {}}, body),
            )
            for name in names
        ])  # fmt: skip
    dice = random.Random(1)
    switches = ("--rabbitmq-dsn=dsn", "--rabbitmq-failure=failure", "--domain-maxconnections=2")
    killed_between = 0
    async with open_sink() as sink:
        sink.decide = refuse
        for number in range(MOST_KILLS):
            async with daemon(tmp_path, sink.port, *switches) as running:
                # Later and later, until mail has begun to fail.
                await trio.sleep(dice.uniform(0.02, 0.25) * (1 + number / 4))
                running.kill()
                await running.process.wait()
            with QueueFile.open(str(tmp_path / "queue")) as store:
                failed = recipients_in(store, "failure")
                assert Counter(recipients_in(store, "dsn")) == Counter(failed)
                killed_between += 0 < len(failed) < MAILS
            if killed_between == KILLS or len(failed) == MAILS:
                break
        async with daemon(tmp_path, sink.port, *switches) as running:
            await running.until_empty()
            assert await running.stop() == 0
    assert killed_between, "no kill came while mail was failing"
    with QueueFile.open(str(tmp_path / "queue")) as store:
        assert Counter(recipients_in(store, "failure")) == Counter(names)
        assert Counter(recipients_in(store, "dsn")) == Counter(names)
        assert sum(each.total for each in store.depths() if each.queue == "dsn") < MAILS
