"""Sessions of the whole engine: TLS, logins, shutdown, several workers."""

from __future__ import annotations

import smtplib
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from mailerq import Engine
from mailerq.errors import ConfigError
from mailerq.inbound.listener import Listener
from mailerq.net import control
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.wire import smtp
from tests.support import configure, in_thread, send


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(tmp_path: Path, authority: trustme.CA) -> dict[str, str]:
    issued = authority.issue_cert("mx.test", "127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(str(key))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(chain), append=True)
    return {"smtp_certificate": str(chain), "smtp_key": str(key)}


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_the_status_has_ipv6_addresses_in_brackets(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path, smtp_ip=("::1",))) as engine:
        (_, port), *_ = engine.addresses
        assert f"[::1]:{port}" in engine.statistics()["listening"]


async def test_starttls_secures_the_session(
    tmp_path: Path, certificate: dict[str, str], trust: ssl.SSLContext
) -> None:
    config = configure(tmp_path, rabbitmq_inbox="inbox", **certificate)
    async with Engine(config) as engine:

        def work() -> None:
            with smtplib.SMTP(*engine.addresses[0]) as client:
                client.starttls(context=trust)
                client.sendmail("a@b.test", "c@d.test", "Subject: x\r\n\r\nhi\r\n")

        await in_thread(work)
        async with engine.consume("inbox") as leases:
            message = (await leases.receive()).message
    assert message.properties["connection"]["secure"] is True
    assert message.body is not None
    assert b"with ESMTPS id" in message.body


async def test_a_secure_port_speaks_tls_from_the_first_byte(
    tmp_path: Path, certificate: dict[str, str], trust: ssl.SSLContext
) -> None:
    config = configure(tmp_path, smtp_secure_port=(0,), rabbitmq_inbox="inbox", **certificate)
    async with Engine(config) as engine:

        def work() -> None:
            with smtplib.SMTP_SSL(*engine.addresses[1], context=trust) as client:
                client.ehlo()
                assert not client.has_extn("starttls")
                client.sendmail("a@b.test", "c@d.test", "Subject: x\r\n\r\nhi\r\n")

        await in_thread(work)
        async with engine.consume("inbox") as leases:
            assert (await leases.receive()).message.properties["connection"]["secure"] is True


async def test_garbage_on_a_secure_port_harms_nobody(
    tmp_path: Path, certificate: dict[str, str]
) -> None:
    config = configure(tmp_path, smtp_secure_port=(0,), rabbitmq_inbox="inbox", **certificate)
    async with Engine(config) as engine:
        async with await trio.open_tcp_stream(*engine.addresses[1]) as client:
            await client.send_all(b"EHLO in.clear\r\n")
            with trio.fail_after(60):
                while await client.receive_some():
                    pass
        code, _ = await send(engine.addresses[0])
        assert code == 250


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=r"smtp-certificate: cannot use .*missing\.pem"):
            async with Engine(configure(tmp_path, smtp_certificate=str(tmp_path / "missing.pem"))):
                pass

    trio.run(main)


async def test_a_login_opens_the_relay(tmp_path: Path) -> None:
    config = configure(
        tmp_path,
        smtp_relay_range=(),
        smtp_username="ann",
        smtp_password="s3cret",
        rabbitmq_inbox="inbox",
    )
    async with Engine(config) as engine:

        def work(password: str, mechanism: str) -> None:
            with smtplib.SMTP(*engine.addresses[0]) as client:
                client.ehlo()
                client.user, client.password = "ann", password
                method = getattr(client, "auth_" + mechanism.lower().replace("-", "_"))
                client.auth(mechanism, method)
                client.sendmail("a@b.test", "c@d.test", "Subject: x\r\n\r\nhi\r\n")

        for mechanism in ("PLAIN", "LOGIN", "CRAM-MD5"):
            with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
                await in_thread(work, "wrong", mechanism)
            assert caught.value.smtp_code == 535
            await in_thread(work, "s3cret", mechanism)
        async with engine.consume("inbox") as leases:
            message = (await leases.receive()).message
    assert message.properties["connection"]["user"] == "ann"
    assert message.body is not None
    assert b"with ESMTPA id" in message.body


async def test_shutting_down_ends_idle_sessions_and_lets_a_mail_finish(tmp_path: Path) -> None:
    config = configure(tmp_path, rabbitmq_inbox="inbox")
    stop = trio.Event()

    async def run(*, task_status: trio.TaskStatus[Engine]) -> None:
        async with Engine(config) as engine:
            task_status.started(engine)
            await stop.wait()

    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        engine = await nursery.start(run)
        idle, busy = [
            await stack.enter_async_context(await trio.open_tcp_stream(*engine.addresses[0]))
            for _ in range(2)
        ]
        await idle.receive_some()
        await busy.receive_some()
        await busy.send_all(
            b"EHLO c.test\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"
        )
        while b"354 " not in await busy.receive_some():
            pass
        stop.set()
        assert await idle.receive_some() == smtp.CLOSING.wire
        assert await idle.receive_some() == b""
        with pytest.raises(OSError):
            await trio.open_tcp_stream(*engine.addresses[0])
        await busy.send_all(b"hi\r\n.\r\n")
        received = b"".join([chunk async for chunk in busy])
        assert received.startswith(b"250-2.0.0 Message accepted\r\n")
        assert received.endswith(smtp.CLOSING.wire)
    async with Engine(config) as engine, engine.consume("inbox") as leases:
        assert (await leases.receive()).message.recipient == "c@d.test"


async def test_shutting_down_waits_no_longer_than_its_timeout(tmp_path: Path) -> None:
    async with Engine(configure(tmp_path, shutdown_timeout=0.1)) as engine:
        client = await trio.open_tcp_stream(*engine.addresses[0])
        await client.receive_some()
        await client.send_all(b"EHLO c.test\r\nMAIL FROM:<a@b.test>\r\n")
        while b"2.1.0" not in await client.receive_some():
            pass
    async with client:
        with trio.fail_after(60):
            received = b"".join([chunk async for chunk in client])
    assert received.startswith(b"421 4.3.2")


async def test_connections_are_spread_over_the_workers(tmp_path: Path) -> None:
    config = configure(tmp_path, smtp_threads=3, rabbitmq_inbox="inbox")
    async with Engine(config) as engine:
        clients = [await in_thread(smtplib.SMTP, *engine.addresses[0]) for _ in range(6)]
        assert [worker.load for worker in engine._workers] == [2, 2, 2]
        for client in clients:
            await in_thread(client.sendmail, "a@b.test", "c@d.test", "Subject: x\r\n\r\nhi\r\n")
            await in_thread(client.quit)
        (depth,) = await engine.queues.depths()
        assert depth.due == 6
        statistics = engine.statistics()
    assert statistics["workers"] == 3
    assert statistics["incoming"]["messages"] == 6


async def test_leaving_by_an_error_leaves_nothing_running(tmp_path: Path) -> None:
    async def fail(threads: int) -> None:
        async with (
            Engine(configure(tmp_path, smtp_threads=threads)) as engine,
            await trio.open_tcp_stream(*engine.addresses[0]) as client,
        ):
            await client.receive_some()
            raise ZeroDivisionError

    for threads in (1, 2):
        with pytest.raises(ZeroDivisionError):
            await fail(threads)
    async with Engine(configure(tmp_path)) as engine:
        code, _ = await send(engine.addresses[0])
        assert code == 250


@pytest.mark.parametrize("part", [control, Dispatcher, Listener])
async def test_a_start_may_be_cancelled_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Any
) -> None:
    async def serve(*args: Any, **options: Any) -> None:
        scope.cancel()
        await start(*args, **options)

    class Late:
        """The part, whose `run` is cancelled as it begins."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._part = part(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._part, name)

        async def run(self, **options: Any) -> None:
            scope.cancel()
            await self._part.run(**options)

    if part is control:
        start = control.serve
        monkeypatch.setattr(control, "serve", serve)
    else:
        monkeypatch.setattr(f"mailerq.engine.{part.__name__}", Late)
    with trio.CancelScope() as scope:
        async with Engine(configure(tmp_path, smtp_threads=2)):
            pytest.fail("it has started")
    assert scope.cancelled_caught
