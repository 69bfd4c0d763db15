"""The command line beside a daemon on a real broker: what a broker can tell, and what not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mailerq import Config, Engine
from mailerq.errors import ConfigError
from mailerq.queues import opening
from mailerq.queues.rabbitmq.addresses import Address
from mailerq.wire import server
from mailerq.wire.smtp import Reply
from tests.queues.rabbitmq.engine_kit import (
    command,
    depth,
    document,
    into,
    on_broker,
    recipients,
    started,
)
from tests.queues.rabbitmq.kit import PASSWORD, channel_to, send
from tests.support import ROOT, in_thread, mailerq, open_sink, until, until_found


def refuse(event: server.Event) -> Reply | None:
    return Reply(451, "4.3.0 later") if isinstance(event, server.Rcpt) else None


async def listed(config: Config) -> dict[str, dict[str, Any]]:
    rows = json.loads(await command(config, "queue", "list", "--json"))
    return {row["queue"]: row for row in rows}


async def test_queues_are_counted_read_flushed_and_purged(tmp_path: Path, vhost: Address) -> None:
    async with open_sink() as sink:
        sink.decide = refuse
        config = on_broker(tmp_path, vhost, **into(sink), retry_interval=(3600,))
        async with Engine(config) as engine, channel_to(vhost) as channel:
            await started(vhost)
            for number in range(3):
                await send(channel, "outbox", document(f"r{number}@d.test"))
            await until(lambda: engine.statistics()["outgoing"]["retried"] == 3)
            await until(lambda: engine.statistics()["outgoing"]["unsettled"] == 0)
            row = (await listed(config))["outbox"]
            assert (row["due"], row["delayed"], row["total"]) == (0, 3, 3)
            assert (await command(config, "queue", "count")).strip() == "3"
            assert "-- 3 Requests" in await command(config, "-bp")
            sink.decide = lambda event: None
            assert "3 messages of outbox" in await command(config, "queue", "flush")
            await sink.wait_for(3)
            assert sorted(recipients(sink)) == [f"r{number}@d.test" for number in range(3)]

            await channel.declare("mine", arguments={"x-queue-type": "quorum"})
            for number in range(4):
                await send(channel, "mine", document(f"r{number}@d.test"))
            lines = (await command(config, "queue", "read", "mine", "--limit=2")).splitlines()
            assert [json.loads(line)["recipient"] for line in lines] == ["r0@d.test", "r1@d.test"]
            await until_found(lambda: depth(vhost, "mine"), lambda found: found == 4)
            await command(config, "queue", "read", "mine", "--limit=1", "--remove")
            await until_found(lambda: depth(vhost, "mine"), lambda found: found == 3)
            assert "3 messages deleted" in await command(config, "queue", "purge", "mine", "--yes")
            assert await depth(vhost, "mine") == 0
            assert "Mail queue is empty" in await command(config, "-bp")


async def test_commands_say_what_a_broker_cannot_do(tmp_path: Path, vhost: Address) -> None:
    config = on_broker(tmp_path, vhost)
    async with Engine(config):
        for words in (
            ["show"], ["hold", "--all"], ["delete", "--domain=d.test"], ["count", "--tag=x"],
            ["compact"],
        ):  # fmt: skip
            said = await command(config, "queue", *words, status=os.EX_UNAVAILABLE)
            assert "RabbitMQ, which cannot find messages" in said
        assert json.loads(await command(config, "top", "--once", "--json"))["waiting"] is None
        answer = json.loads(await command(config, "explain", "c@[127.0.0.1]", "--json", status=1))
        assert answer["destination"]["messages"] is None


async def test_a_mail_on_the_command_line_is_confirmed_by_the_broker(
    tmp_path: Path, vhost: Address
) -> None:
    async with open_sink() as sink:
        config = on_broker(tmp_path, vhost, **into(sink))
        async with Engine(config):
            await started(vhost)
            await command(config, "c@d.test", "-f", "a@b.test", stdin=b"Subject: x\n\nhi\n")
            (mail,) = await sink.wait_for(1)
    assert (mail.sender, mail.recipients) == ("a@b.test", ["c@d.test"])


async def test_no_password_is_shown(
    tmp_path: Path, vhost: Address, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "mailerq")
    config = on_broker(tmp_path, vhost)
    wrong = config.replace(
        rabbitmq_address=config.rabbitmq_address.replace("mailerq:", "mailerq:not-"),
        queue_directory=str(tmp_path / "wrong"),
    )
    async with Engine(config):
        await started(vhost)
        status = await command(config, "status")
        assert "connected to amqp://127.0.0.1" in status and "RabbitMQ" in status
        shown = [status, await command(config, "config"), await command(config, "config", "--json")]
        shown.append(await command(config, "check-config"))
    async with Engine(wrong):
        await until(lambda: "refuses user" in caplog.text)
        shown.append(await command(wrong, "queue", "list", status=os.EX_TEMPFAIL))
    shown += [caplog.text, repr(config)]
    assert "amqp://127.0.0.1" in shown[1]
    assert all(PASSWORD not in text for text in shown), [t for t in shown if PASSWORD in t]


def test_a_missing_pika_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(queue_directory=str(tmp_path), rabbitmq_address="amqp://localhost")
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mailerq\[rabbitmq\]'"):
        opening.open_queues(config)


def test_mistakes_are_all_reported(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        "rabbitmq-address: amqp://u:hush@h/a/b\nrabbitmq-queue-type: mirrored\n"
        "rabbitmq-maxpriority: 300\nrabbitmq-user: u\n"
    )
    done = mailerq("check-config", f"--config-file={tmp_path / 'config'}")
    said = done.stderr.decode()
    assert done.returncode == 1 and "hush" not in said
    for key in ("address", "queue-type", "maxpriority", "user"):
        assert f"rabbitmq-{key}" in said


async def test_the_program_of_the_page_publishes_and_reads(tmp_path: Path, vhost: Address) -> None:
    page = (ROOT / "docs" / "rabbitmq.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    program = program.replace('"mailerq", "sesame"', repr((vhost.user, vhost.password))[1:-1])
    program = program.replace('"localhost"', f'"{vhost.host}", {vhost.port}, "{vhost.vhost}"')
    (tmp_path / "program.py").write_text(program + "    break\n")
    async with open_sink() as sink:
        config = on_broker(tmp_path, vhost, **into(sink), rabbitmq_results="results")
        async with Engine(config) as engine:
            await started(vhost)
            # The queue of results is declared with the first result.
            await engine.publish(document("first@d.test"))
            await until_found(lambda: depth(vhost, "results"), lambda found: found == 1)
            done = await in_thread(
                lambda: subprocess.run(
                    [sys.executable, str(tmp_path / "program.py")],
                    capture_output=True, text=True, timeout=60, check=False,
                )
            )  # fmt: skip
            await sink.wait_for(2)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["accept", "success"]), done
    assert recipients(sink) == ["first@d.test", "ann@example.org"]
