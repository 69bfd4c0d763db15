"""Bodies in S3: a server of moto, and one that answers what a test says."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import h11
import pytest
import trio
import trio.lowlevel

from mailerq.errors import BodyMissing, StorageError
from mailerq.storage import s3 as backend
from tests.engine.lag_kit import Meter, meter, no_turn_above
from tests.net.https_server import read_request
from tests.storage.contract import *  # noqa: F403
from tests.storage.contract import NOW
from tests.storage.kit import Clock, opened

ACCESS, SECRET = "AKIAIOSFODNN7EXAMPLE", "se/s+ame"


@pytest.fixture
def bucket(s3: str) -> Iterator[Any]:
    """An empty bucket, seen by the client of AWS."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    resource = boto3.resource(
        "s3", endpoint_url=s3, aws_access_key_id=ACCESS, aws_secret_access_key=SECRET,
        region_name="eu-west-1",
    )  # fmt: skip
    bucket = resource.Bucket(f"b{secrets.token_hex(6)}")
    bucket.create(CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    yield bucket
    bucket.objects.all().delete()
    bucket.delete()


@pytest.fixture(params=["", "/mail/one"])
def address(s3: str, bucket: Any, request: pytest.FixtureRequest) -> str:
    return f"s3://{ACCESS}:se%2Fs%2Bame@eu-west-1/{bucket.name}{request.param}?endpoint={s3}" + (
        "&compression=gzip" if request.param else ""
    )


async def test_an_object_has_the_name_of_its_key(address: str, bucket: Any, clock: Clock) -> None:
    async with opened(address, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
    prefix = "mail/one/" if "mail/one" in address else ""
    assert [each.key for each in bucket.objects.all()] == [prefix + key]


async def test_many_expired_objects_are_removed_in_groups(
    address: str, bucket: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "LIST_KEYS", 3)
    async with opened(address, clock=clock) as storage:
        for number in range(8):
            await storage.put(b"%d" % number, NOW)
        await storage.put(b"later", NOW + 7200)
        bucket.put_object(Key="2-of-an-application", Body=b"x")
        assert await storage._backend.expire(NOW + 3600) == 8
    assert len(list(bucket.objects.all())) == 2


async def test_keys_of_an_application_do_not_hide_what_has_expired(
    address: str, bucket: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "LIST_KEYS", 3)
    monkeypatch.setattr(backend, "MAX_LISTS", 2)
    async with opened(address, clock=clock) as storage:
        prefix = "mail/one/" if "mail/one" in address else ""
        for number in range(20):
            bucket.put_object(Key=f"{prefix}2-{number:03}", Body=b"x")
        await storage.put(b"body", NOW)
        assert sum([await storage._backend.expire(NOW + 3600) for _ in range(4)]) == 1


async def test_a_bucket_that_is_missing_makes_mail_wait(
    address: str, bucket: Any, clock: Clock
) -> None:
    async with opened(address.replace(bucket.name, "another-bucket"), clock=clock) as storage:
        for call in (lambda: storage.put(b"body", NOW), lambda: storage.get("x")):
            with pytest.raises(StorageError, match="NoSuchBucket: create the bucket"):
                await call()


class Server:
    """Answers the requests in turn as a test says; the last answer stays."""

    def __init__(self, port: int, *answers: bytes) -> None:
        self.port = port
        self.answers = list(answers)
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def address(self) -> str:
        return f"s3://{ACCESS}:sesame@r/bucket?endpoint=http://127.0.0.1:{self.port}"

    async def serve(self, stream: trio.SocketStream) -> None:
        # A client may leave before its request is whole, or its answer.
        with suppress(trio.BrokenResourceError, h11.RemoteProtocolError):
            async with stream:
                request = await read_request(stream)  # type: ignore[arg-type]
                self.seen.append((request.method, request.target, request.headers, request.body))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer:
                    await stream.send_all(answer)


def answer(status: int, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def error(status: int, code: str) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>\x1b[2Jno</Message></Error>"
    return answer(status, text.encode())


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(backend, "PAUSE_SECONDS", 0.001)
    async with trio.open_nursery() as nursery:
        found = Server(0, answer(200))
        listeners = await nursery.start(partial(trio.serve_tcp, found.serve, 0, host="127.0.0.1"))
        found.port = listeners[0].socket.getsockname()[1]
        yield found
        nursery.cancel_scope.cancel()


def mail(server: Server) -> list[tuple[str, str, dict[str, str], bytes]]:
    """The requests, without those that look for expired objects."""
    return [each for each in server.seen if "list-type" not in each[1]]


async def test_a_request_is_path_style_and_signed(server: Server, clock: Clock) -> None:
    async with opened(server.address, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
    [(method, target, headers, body)] = mail(server)
    assert (method, target, body) == ("PUT", f"/bucket/{key}", b"body")
    assert headers["authorization"].startswith(
        f"AWS4-HMAC-SHA256 Credential={ACCESS}/20270115/r/s3/aws4_request, SignedHeaders="
        "content-type;host;x-amz-content-sha256;x-amz-date, Signature="
    )
    assert "sesame" not in repr(headers)


@pytest.mark.parametrize(
    "busy", [error(503, "SlowDown"), error(500, "InternalError"), answer(429), b"", b"nonsense\r\n"]
)
async def test_what_is_busy_is_asked_again(server: Server, clock: Clock, busy: bytes) -> None:
    async with opened(server.address, clock=clock) as storage:
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.answers = [busy, busy, answer(200, b"hello")]
        assert await storage.get("mine") == b"hello"
        assert storage.statistics()["failed"] <= 1  # the list of expired objects may fail


async def test_a_server_that_stays_busy_makes_mail_wait(server: Server, clock: Clock) -> None:
    server.answers = [error(503, "SlowDown")]
    async with opened(server.address, clock=clock) as storage:
        with pytest.raises(StorageError, match="answers 503 SlowDown; mail waits for it"):
            await storage.put(b"body", NOW)
        assert len(mail(server)) == backend.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "403 AccessDenied: the key needs s3:GetObject"),
        (403, "SignatureDoesNotMatch", "the secret in storage-address is wrong"),
        (403, "InvalidAccessKeyId", "the access key in storage-address"),
        (403, "RequestTimeTooSkewed", "the clock of this host is wrong"),
        (301, "PermanentRedirect", "in another region"),
        (400, "Strange", "answers 400 Strange; mail waits"),
        (404, "NoSuchBucket", "create the bucket"),
    ],
)
async def test_a_refusal_is_never_about_the_mail(
    server: Server, clock: Clock, status: int, code: str, words: str
) -> None:
    server.answers = [error(status, code)]
    async with opened(server.address, clock=clock) as storage:
        for call in (lambda: storage.put(b"body", NOW), lambda: storage.get("mine")):
            with pytest.raises(StorageError, match=words) as caught:
                await call()
            assert "sesame" not in str(caught.value)
            assert "\x1b" not in str(caught.value)


async def test_an_object_that_is_not_there_is_missing(server: Server, clock: Clock) -> None:
    server.answers = [error(404, "NoSuchKey")]
    async with opened(server.address, clock=clock) as storage:
        with pytest.raises(BodyMissing):
            await storage.get("mine")


async def test_a_server_that_is_away_makes_mail_wait(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "PAUSE_SECONDS", 0.001)
    address = f"s3://{ACCESS}:sesame@r/bucket?endpoint=http://127.0.0.1:1"
    async with opened(address, clock=clock) as storage:
        with pytest.raises(StorageError, match="Connection refused; mail waits"):
            await storage.get("mine")


async def silence(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def test_a_silent_server_makes_mail_wait(clock: Clock) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, silence, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        address = f"s3://{ACCESS}:sesame@r/bucket?endpoint=http://127.0.0.1:{port}"
        async with opened(address, clock=clock, storage_timeout=0.2) as storage:
            for call in (lambda: storage.put(b"body", NOW), lambda: storage.get("mine")):
                with pytest.raises(StorageError, match=r"not answered in 0\.2 s"):
                    await call()
        nursery.cancel_scope.cancel()


async def test_requests_at_a_time_are_limited(server: Server, clock: Clock) -> None:
    under_way = most = 0
    answered = server.serve

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await trio.lowlevel.checkpoint()
        try:
            await answered(stream)
        finally:
            under_way -= 1

    server.serve = serve  # type: ignore[method-assign]
    async with (
        opened(server.address, clock=clock, storage_threads=3) as storage,
        trio.open_nursery() as nursery,
    ):
        for number in range(20):
            nursery.start_soon(storage.put, b"%d" % number, NOW)
    assert len(mail(server)) == 20
    assert most <= 4  # a server may see the end of a connection later


@no_turn_above(0.2)  # the server of the test is on this loop too
async def test_a_large_body_does_not_block_the_loop(server: Server, clock: Clock) -> Meter:
    body = bytes(8_000_000)
    async with opened(server.address, clock=clock) as storage:
        with meter() as turns:
            await storage.put(body, NOW)
    assert len(mail(server)[-1][3]) == len(body)
    return turns


async def test_a_server_that_answers_for_another_makes_mail_wait(
    server: Server, clock: Clock
) -> None:
    async with opened(server.address, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
        storage._cache.clear()
        server.answers = [answer(200, b"<html>log in first</html>")]
        with pytest.raises(StorageError, match=r"damaged.*Mail waits"):
            await storage.get(key)
        server.answers = [answer(200, b"body")]
        assert await storage.get(key) == b"body"


async def test_a_redirect_is_not_followed(server: Server, clock: Clock) -> None:
    away = b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    async with opened(server.address, clock=clock) as storage:
        server.answers = [away]
        for call in (lambda: storage.put(b"body", NOW), lambda: storage.get("x")):
            with pytest.raises(StorageError, match="answers 307"):
                await call()


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 99999999999", b"Transfer-Encoding: chunked", b"X: y", b"Content-Length: -1"],
)
async def test_a_body_without_an_end_is_not_kept(server: Server, clock: Clock, head: bytes) -> None:
    block = b"x" * 100_000
    if head.startswith(b"Transfer"):
        block = b"%x\r\n%b\r\n" % (len(block), block)
    async with opened(server.address, clock=clock) as storage:
        key = await storage.put(b"body", NOW)
        storage._cache.clear()
        server.answers = [b"HTTP/1.1 200 x\r\n" + head + b"\r\n\r\n" + 20 * block]
        with pytest.raises(StorageError, match=r"more than|rotocol|ontent-Length|Expected|bad"):
            await storage.get(key)


async def test_a_list_that_never_ends_takes_little_time(
    server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"20000101/00/{40 * 'a'}-1"
    keys = "".join(f"<Key>{name}</Key>" for _ in range(30_000)).encode()[: backend.LIST_BYTES]
    seen: list[int] = []

    async def delete(names: Sequence[str]) -> None:
        seen.append(len(names))

    async with opened(server.address, clock=clock) as storage:
        monkeypatch.setattr(storage._backend, "_delete", delete)
        server.answers = [answer(200, keys)]
        begun = time.process_time()
        await storage._backend.expire(NOW)
        assert time.process_time() - begun < 2 * backend.MAX_LISTS * 0.05
    assert set(seen) == {1}
    assert len(seen) >= backend.MAX_LISTS
