"""Settings that change while the engine runs apply from the next transaction on."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from mailerq import Config, ConfigError, Engine
from mailerq.errors import EngineError
from tests.engine.kit import Certificate, Dialog, inbox, lines_of, open_dialog, serve
from tests.support import configure, until

BEGIN = ("MAIL FROM:<a@b.test>", "RCPT TO:<c@d.test>")
LONG = b"Subject: x\r\n\r\n" + b"x" * 70 + b"\r\n"


def change(engine: Engine, **settings: Any) -> None:
    engine.reload(engine.config.replace(**settings))


async def finish(dialog: Dialog, body: bytes = b"Subject: x\r\n\r\nhi\r\n") -> str:
    """The rest of a transaction that has its recipients."""
    assert (await dialog.say("DATA")).startswith("354")
    await dialog.send(body + b".\r\n")
    return await dialog.reply()


def plain(login: str, password: str) -> str:
    credentials = base64.b64encode(f"\0{login}\0{password}".encode()).decode()
    return f"AUTH PLAIN {credentials}"


# Transactions


async def larger(dialog: Dialog) -> int:
    return int((await finish(dialog, LONG))[:3])


async def another_recipient(dialog: Dialog) -> int:
    (code,) = await dialog.codes("RCPT TO:<e@d.test>")
    await finish(dialog)
    return code


async def bare_newline(dialog: Dialog) -> int:
    return int((await finish(dialog, b"Subject: x\r\n\r\na\nb\r\n"))[:3])


async def whole(dialog: Dialog) -> int:
    return int((await finish(dialog))[:3])


@pytest.mark.parametrize(
    ("settings", "rest", "code"),
    [
        ({"smtp_maxsize": 60}, larger, 552),
        ({"smtp_maxrecipients": 1}, another_recipient, 452),
        ({"smtp_bare_newline": "reject"}, bare_newline, 550),
        ({"smtp_relay_range": ()}, another_recipient, 550),
    ],
)
async def test_a_transaction_ends_by_the_settings_that_it_began_with(
    tmp_path: Path, settings: dict[str, Any], rest: Callable[[Dialog], Awaitable[int]], code: int
) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert await dialog.codes(*BEGIN) == [250, 250]
        change(engine, **settings)
        assert await rest(dialog) == 250
        codes = await dialog.codes(*BEGIN)
        assert code in codes or (codes == [250, 250] and await rest(dialog) == code)


async def test_the_next_mail_on_a_connection_goes_by_other_rules_of_access(tmp_path: Path) -> None:
    addresses = tmp_path / "addresses"
    addresses.write_text("fay@f.test\n")
    async with (
        serve(tmp_path, strangers=True) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert await dialog.codes(*BEGIN) == [250, 250]
        change(
            engine,
            smtp_local_domains=("e.test",),
            smtp_relay_domains=("g.test",),
            smtp_local_addresses=str(addresses),
        )
        assert await dialog.codes("RCPT TO:<c@e.test>", "RCPT TO:<fay@f.test>") == [550, 550]
        assert await whole(dialog) == 250
        codes = await dialog.codes(
            BEGIN[0],
            "RCPT TO:<c@d.test>",
            "RCPT TO:<c@e.test>",
            "RCPT TO:<fay@f.test>",
            "RCPT TO:<c@g.test>",
        )
        assert codes == [250, 550, 250, 250, 250]


async def test_received_mail_goes_to_the_queue_of_its_beginning(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert await dialog.codes(*BEGIN) == [250, 250]
        change(engine, rabbitmq_inbox="other")
        assert await whole(dialog) == 250
        assert len(await inbox(engine)) == 1
        assert (await dialog.mail("c@d.test")).startswith("250")
        assert {depth.queue: depth.total for depth in await engine.queues.depths()} == {"other": 1}


async def test_fields_count_as_the_settings_say_at_the_beginning(tmp_path: Path) -> None:
    body = b"X-MQ-Tag: red\r\nSubject: x\r\n\r\nhi\r\n"
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert await dialog.codes(*BEGIN) == [250, 250]
        change(engine, smtp_extract=("none",))
        assert (await finish(dialog, body)).startswith("250")
        assert (await dialog.mail("c@d.test", body=body)).startswith("250")
        first, second = await inbox(engine, 2)
        assert first.properties["tags"] == ["red"]
        assert "tags" not in second.properties


async def test_a_mail_is_put_into_a_file_from_another_size_on(tmp_path: Path) -> None:
    body = b"Subject: x\r\n\r\n" + (b"x" * 70 + b"\r\n") * 30_000
    async with (
        serve(tmp_path, smtp_spill_size=0) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert (await dialog.mail("c@d.test", body=body)).startswith("250")
        assert await dialog.codes(*BEGIN) == [250, 250]
        change(engine, smtp_spill_size=100_000)
        assert (await finish(dialog, body)).startswith("250")
        assert engine.statistics()["incoming"]["spilled"] == 0
        assert (await dialog.mail("c@d.test", body=body)).startswith("250")
        assert engine.statistics()["incoming"]["spilled"] == 1


@pytest.mark.parametrize("next_commands", ["RSET\r\nMAIL FROM:<a@b.test>\r\n", "RSET\r\n"])
async def test_a_mail_that_is_given_up_is_no_transaction_any_more(
    tmp_path: Path, next_commands: str
) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert await dialog.codes(*BEGIN, "BDAT 6\r\nx: y") == [250, 250, 250]
        change(engine, smtp_maxrecipients=1)
        await dialog.send(next_commands.encode())
        for _ in next_commands.splitlines():
            assert (await dialog.reply()).startswith("250")
        if "MAIL" not in next_commands:
            assert await dialog.codes(BEGIN[0]) == [250]
        assert await dialog.codes(BEGIN[1], "RCPT TO:<e@d.test>") == [250, 452]
        assert await whole(dialog) == 250


async def test_ehlo_shows_what_holds_now(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        change(engine, hostname="new.test", smtp_maxsize=4711, dsn_advertise=True)
        reply = await dialog.say("EHLO c.test")
        assert reply.startswith("250-new.test")
        assert "SIZE 4711" in reply
        assert "DSN" in reply
        async with open_dialog(engine.addresses[0], greeted=False) as other:
            assert (await other.reply()).startswith("220 new.test")


async def test_lmtp_follows_as_smtp_does(tmp_path: Path) -> None:
    async with (
        serve(tmp_path, smtp_port=(), lmtp_port=(0,)) as engine,
        open_dialog(engine.addresses[0], hello="LHLO c.test") as dialog,
    ):
        change(engine, smtp_maxrecipients=1)
        codes = await dialog.codes(*BEGIN, "RCPT TO:<e@d.test>")
        assert codes == [250, 250, 452]


# TLS and logins


async def test_tls_is_offered_once_there_is_a_certificate_and_no_longer_without(
    tmp_path: Path,
) -> None:
    certificate = Certificate.make(tmp_path)
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert "STARTTLS" not in await dialog.say("EHLO c.test")
        change(engine, **certificate.settings)
        assert "STARTTLS" in await dialog.say("EHLO c.test")
        change(engine, smtp_certificate="", smtp_key="")
        assert await dialog.codes("STARTTLS") == [502]
        change(engine, **certificate.settings)
        assert await dialog.codes("STARTTLS") == [220]
        await dialog.start_tls(certificate.trust)
        assert await dialog.codes("EHLO c.test", *BEGIN) == [250, 250, 250]


async def test_other_logins_hold_for_the_next_one(tmp_path: Path) -> None:
    settings = {"smtp_username": "ann", "smtp_password": "one"}
    async with serve(tmp_path, strangers=True, **settings) as engine:
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(plain("ann", "one")) == [235]
            change(engine, smtp_password="two")
            # Who is logged in stays so.
            assert await dialog.codes(BEGIN[0], "RCPT TO:<c@elsewhere.test>") == [250, 250]
        async with open_dialog(engine.addresses[0]) as dialog:
            assert await dialog.codes(plain("ann", "one"), plain("ann", "two")) == [535, 235]
        change(engine, smtp_username="", smtp_password="")
        async with open_dialog(engine.addresses[0]) as dialog:
            assert "AUTH" not in await dialog.say("EHLO c.test")


async def test_back_ends_of_logins_that_are_not_changed_are_kept(tmp_path: Path) -> None:
    """So what an account cannot read again is no error while nobody changes it."""
    logins = tmp_path / "logins"
    logins.write_text("")
    async with serve(tmp_path, smtp_auth=(f"file://{logins}",)) as engine:
        before = engine._server.terms
        logins.unlink()
        change(engine, smtp_maxsize=1000)
        assert engine._server.terms.authenticator is before.authenticator
        assert engine._server.terms.access is before.access


async def test_a_certificate_that_may_not_be_read_again_stays_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = Certificate.make(tmp_path)
    async with serve(tmp_path, **certificate.settings) as engine:
        before = engine._server.terms.tls

        def denied(config: Config) -> None:
            raise ConfigError("program", "smtp-key: Permission denied")

        # As root, who may read all, a test has no other way.
        monkeypatch.setattr("mailerq.inbound.terms.tls_context", denied)
        monkeypatch.setattr(
            "os.access", lambda path, mode, **more: str(path) != str(certificate.key)
        )
        done = engine.reload(engine.config.replace(smtp_maxsize=1000))
        assert engine._server.terms.tls is before
        (note,) = done.notes
        assert note.startswith(f"smtp-key: this account may not read {certificate.key} again")
        with pytest.raises(ConfigError):
            change(engine, smtp_ciphers="HIGH")  # another one must be read


# What counts over many transactions


async def test_limits_on_connections_hold_at_once_and_close_none(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as first, open_dialog(address) as second:
            change(engine, smtp_connections_in=2)
            async with open_dialog(address, greeted=False) as third:
                assert (await third.reply()).startswith("421")
            change(engine, smtp_connections=1, smtp_connections_in=None)
            async with open_dialog(address, greeted=False) as third:
                assert (await third.reply()).startswith("421")
            change(engine, smtp_connections=3)
            async with open_dialog(address) as third:
                for dialog in (first, second, third):
                    assert (await dialog.mail("c@d.test")).startswith("250")


async def test_networks_that_may_not_connect_any_more_are_refused_from_now_on(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        config = Config.load(["--smtp-range=192.0.2.0/24"], {}, ())
        change(engine, smtp_range=config.smtp_range)
        async with open_dialog(engine.addresses[0], greeted=False) as other:
            assert (await other.reply()).startswith("5")
        assert (await dialog.mail("c@d.test")).startswith("250")


@pytest.mark.parametrize("settings", [{"smtp_client_prefix4": 8}, {"smtp_relay_range": None}])
async def test_a_client_that_leaves_is_counted_off_where_it_was_counted(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """By the network of its time: the limits count by another one meanwhile, or not at all."""
    usual = Config().smtp_relay_range
    settings = {name: usual if value is None else value for name, value in settings.items()}
    async with serve(tmp_path, strangers=True) as engine:
        clients = engine._server.clients
        async with open_dialog(engine.addresses[0]):
            change(engine, **settings)
            async with open_dialog(engine.addresses[0]):
                assert clients._open["127.0.0.1/32"] == 1
        await until(lambda: not clients._open)
        assert engine.statistics()["incoming"]["refused_connections"] == 0


async def test_limits_of_a_client_hold_at_once_and_what_it_did_counts(tmp_path: Path) -> None:
    async with (
        serve(tmp_path, strangers=True, smtp_client_messages=10) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        for _ in range(2):
            assert (await dialog.mail("c@d.test")).startswith("250")
        change(engine, smtp_client_messages=2)
        assert await dialog.codes(BEGIN[0]) == [450]
        change(engine, smtp_client_messages=0)
        assert await dialog.codes(BEGIN[0]) == [250]
        change(engine, smtp_client_maxconnections=1)
        async with open_dialog(engine.addresses[0], greeted=False) as other:
            assert (await other.reply()).startswith("421")


async def test_memory_may_be_less_from_now_on(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        assert await dialog.codes(*BEGIN) == [250, 250]
        engine._server.memory.add(1000)
        change(engine, max_memory=1000)
        assert await dialog.codes("DATA") == [452]
        change(engine, max_memory=2000)
        assert (await dialog.mail("c@d.test")).startswith("250")


async def test_handshakes_may_be_fewer_from_now_on(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    async with serve(tmp_path, **certificate.settings) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as one, open_dialog(address) as two:
            assert await one.codes("STARTTLS") == [220]
            change(engine, smtp_handshakes=1)
            assert await two.codes("STARTTLS") == [454]


async def test_a_shorter_timeout_ends_what_is_idle_and_no_mail_under_way(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        address = engine.addresses[0]
        async with open_dialog(address) as idle, open_dialog(address) as busy:
            assert await busy.codes(*BEGIN) == [250, 250]
            change(engine, smtp_timeout=0.05)
            assert (await idle.reply()).startswith("421")
            assert await whole(busy) == 250
            assert (await busy.reply()).startswith("421")


async def test_the_greeting_waits_as_long_as_is_set_now(tmp_path: Path) -> None:
    async with serve(tmp_path, strangers=True) as engine:
        change(engine, smtp_greet_delay=60)
        async with open_dialog(engine.addresses[0], greeted=False) as dialog:
            await dialog.send(b"EHLO c.test\r\n")
            assert (await dialog.reply()).startswith("5")


async def test_plugins_have_another_time_for_what_begins_now(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        entered, go = trio.Event(), trio.Event()

        async def think(*arguments: object) -> None:
            entered.set()
            await go.wait()

        engine.on("rcptto", think)
        async with open_dialog(engine.addresses[0]) as dialog, trio.open_nursery() as nursery:
            assert await dialog.codes(BEGIN[0]) == [250]
            nursery.start_soon(dialog.send, b"RCPT TO:<c@d.test>\r\n")
            await entered.wait()
            change(engine, plugin_timeout=0.05)
            async with open_dialog(engine.addresses[0]) as other:
                assert await other.codes(*BEGIN) == [250, 451]
            go.set()
            assert (await dialog.reply()).startswith("250")


async def test_the_watchdog_looks_as_often_as_is_set_now(tmp_path: Path) -> None:
    async with serve(tmp_path, watchdog_seconds=0) as engine:
        for seconds in (0.2, 0.1, 0.0, 0.1):
            change(engine, watchdog_seconds=seconds)
            assert engine._watchdog._seconds == seconds


# Logs


async def test_logs_move_end_and_begin(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    async with (
        serve(tmp_path, received_log_file=str(one)) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        for settings in (
            {},
            {"received_log_file": str(two)},
            {"received_log_file": ""},
            {"received_log_file": str(one), "refused_log_file": str(two)},
        ):
            change(engine, **settings)
            assert (await dialog.mail("c@d.test")).startswith("250")
        assert await dialog.codes("NONSENSE") == [500]
    assert len(lines_of(one)) == 2
    received, refused = lines_of(two)
    assert "<c@d.test>" in received
    assert refused.startswith("[127.0.0.1] (10 bytes that are no command) -> 500")


async def test_a_log_that_was_moved_is_looked_for_before_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with (
        serve(tmp_path, received_log_file=str(path)) as engine,
        open_dialog(engine.addresses[0]) as dialog,
    ):
        assert (await dialog.mail("c@d.test")).startswith("250")
        path.rename(tmp_path / "log.1")
        engine.reload()
        assert (await dialog.mail("c@d.test")).startswith("250")
    assert len(lines_of(path)) == len(lines_of(tmp_path / "log.1")) == 1


# Errors, and what is fixed


async def test_an_error_leaves_everything_as_it_was_and_all_are_named(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        with pytest.raises(ConfigError) as caught:
            change(
                engine,
                smtp_maxsize=60,
                smtp_certificate=str(tmp_path / "none.pem"),
                smtp_auth=("file:///no/logins",),
                smtp_extract=("nonsense",),
                smtp_local_addresses=str(tmp_path / "none"),
                received_log_file=str(tmp_path / "no" / "log"),
                refused_log_file=str(tmp_path / "log"),
            )
        assert [problem.text.partition(":")[0] for problem in caught.value.problems] == [
            "smtp-certificate",
            "smtp-auth",
            "smtp-local-addresses",
            "smtp-extract",
            "received-log-file",
        ]
        assert engine.statistics()["settings"]["number"] == 1
        assert (await dialog.mail("c@d.test", body=LONG)).startswith("250")
        assert await dialog.codes("NONSENSE") == [500]
        assert not lines_of(tmp_path / "log")


async def test_what_needs_a_restart_is_said_and_stays(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine, open_dialog(engine.addresses[0]) as dialog:
        queue = engine.config.queue_directory
        done = engine.reload(
            engine.config.replace(
                smtp_port=(1,), smtp_threads=2, queue_directory="/elsewhere", max_attempts=3
            )
        )
        assert {change.key: (change.old, change.new) for change in done.pending} == {
            "smtp-port": ("0", "1"),
            "smtp-threads": ("1", "2"),
            "queue-directory": (queue, "/elsewhere"),
        }
        assert [change.key for change in done.changed] == ["max-attempts"]
        assert (engine.config.queue_directory, engine.config.max_attempts) == (queue, 3)
        assert (await dialog.mail("c@d.test")).startswith("250")
        # Not said again: nobody wants it any more.
        assert not engine.reload(engine.config).pending


async def test_statistics_name_the_snapshot(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        first = engine.statistics()["settings"]
        engine.reload()
        second = engine.statistics()["settings"]
        assert (first["number"], second["number"]) == (1, 2)
        assert first["loaded"] <= second["loaded"]


async def test_an_engine_that_stops_takes_no_settings(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:
        engine._stopping = True
        with pytest.raises(EngineError, match="stops"):
            engine.reload()
        engine._stopping = False


STEPS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "smtp_maxsize": st.integers(1000, 9999),
            "smtp_extract": st.sampled_from([("safe",), ("none",), ("nonsense",)]),
            "smtp_certificate": st.sampled_from(["", "/no/file"]),
            "received_log_file": st.sampled_from(["", "/no/log"]),
            "rabbitmq_inbox": st.sampled_from(["inbox", "other"]),
            "smtp_client_messages": st.integers(0, 3),
            "smtp_connections": st.sampled_from([0, 10]),
        },
    ),
    max_size=6,
)


def is_good(values: dict[str, Any]) -> bool:
    bad: Sequence[tuple[str, object]] = (
        ("smtp_extract", ("nonsense",)),
        ("smtp_certificate", "/no/file"),
        ("received_log_file", "/no/log"),
        ("smtp_connections", 0),
    )
    return all(values.get(name) != value for name, value in bad)


async def test_any_sequence_of_settings_leaves_the_last_good_ones(tmp_path: Path) -> None:
    async with serve(tmp_path) as engine:

        @hypothesis(max_examples=30, suppress_health_check=list(HealthCheck), deadline=None)
        @given(STEPS)
        def follow(steps: list[dict[str, Any]]) -> None:
            good = configure(tmp_path, rabbitmq_inbox="inbox")
            engine.reload(good)
            number = engine.statistics()["settings"]["number"]
            for values in steps:
                try:
                    engine.reload(configure(tmp_path, **{"rabbitmq_inbox": "inbox", **values}))
                except ConfigError:
                    assert not is_good(values)
                else:
                    assert is_good(values)
                    good = configure(tmp_path, **{"rabbitmq_inbox": "inbox", **values})
                    number += 1
                assert engine.config == engine._server.terms.config == good
                assert engine._server.terms.settings.max_size == good.smtp_maxsize
                assert engine.statistics()["settings"]["number"] == number

        follow()
