"""Requests to a real HTTPS server: what is checked, and that everything has a bound."""

from __future__ import annotations

import datetime
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from mailerq.net.https import Bounds, Failure, Https, NoResponse, Response, Url
from mailerq.net.resolver import Host, NoHosts
from tests.engine.lag_kit import Meter, meter, no_turn_above
from tests.net.certificate_kit import common_name_context
from tests.net.https_server import HttpsServer, Stream, open_https_server, response
from tests.support import closed_port

NAME = "www.a.example"


async def here(name: str) -> Sequence[Host] | NoHosts:
    return (Host(name, "127.0.0.1"),)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HttpsServer]:
    async with open_https_server(tmp_path, NAME) as opened:
        yield opened


async def ask(server: HttpsServer, path: str = "/", **more: Any) -> Response | NoResponse:
    client = Https(more.pop("look_up", here))
    url = Url(more.pop("name", NAME), server.port, path)
    return await client.request(url, ca_file=more.pop("ca_file", server.ca_file), **more)


async def failure(server: HttpsServer, **more: Any) -> NoResponse:
    found = await ask(server, **more)
    assert isinstance(found, NoResponse), found
    return found


async def test_a_request_asks_by_the_name_and_gets_the_body(server: HttpsServer) -> None:
    server.answer = response(
        b"hello\n", kind="Text/Plain; charset=utf-8", more="X-A: 1\r\nx-a: 2\r\n"
    )
    found = await ask(server, "/a?b")
    assert isinstance(found, Response)
    assert (found.status, found.body, found.media_type) == (200, b"hello\n", "text/plain")
    assert found.headers["x-a"] == "1, 2"
    (request,) = server.requests
    assert (request.method, request.target) == ("GET", "/a?b")
    assert request.headers["host"] == f"{NAME}:{server.port}"
    assert server.names == [NAME]


async def test_a_body_is_posted_whole(server: HttpsServer) -> None:
    body = bytes(range(256)) * 1000
    found = await ask(server, method="POST", body=body, headers={"Content-Type": "a/b"})
    assert isinstance(found, Response)
    (request,) = server.requests
    assert (request.method, request.body) == ("POST", body)
    assert request.headers["content-type"] == "a/b"


async def test_a_redirect_is_a_response_and_not_followed(server: HttpsServer) -> None:
    server.answer = response(b"", status=302, more=f"Location: https://{NAME}/b\r\n")
    found = await ask(server)
    assert isinstance(found, Response) and found.status == 302
    assert server.connections == 1


@pytest.mark.parametrize("wrong", ["name", "authority", "dates", "common name"])
async def test_a_certificate_that_does_not_fit_is_refused(
    server: HttpsServer, tmp_path: Path, wrong: str
) -> None:
    if wrong == "name":
        server.certify("other.a.example")
        server.certificates.pop(NAME)
    elif wrong == "authority":
        server.certify(NAME, trustme.CA())
    elif wrong == "dates":
        server.certify(
            NAME,
            not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
            not_before=datetime.datetime(2019, 1, 1, tzinfo=datetime.UTC),
        )
    else:
        server.certificates[NAME] = common_name_context(server.ca, NAME)
    found = await failure(server)
    assert found.failure is Failure.CERTIFICATE
    assert not server.requests
    assert isinstance(await ask(server, verify=False), Response)


async def test_the_authorities_of_the_system_do_not_know_a_private_one(
    server: HttpsServer,
) -> None:
    assert (await failure(server, ca_file="")).failure is Failure.CERTIFICATE


async def test_a_missing_file_of_authorities_is_a_fault_of_this_host(server: HttpsServer) -> None:
    found = await failure(server, ca_file="/nonexistent/ca.pem")
    assert found.failure is Failure.LOCAL and "/nonexistent/ca.pem" in found.text


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"220 mail.test ESMTP\r\n\r\n", Failure.PROTOCOL),
        (b"", Failure.PROTOCOL),
        (b"HTTP/1.1 200 x\r\nContent-Length: 10\r\n\r\nshort", Failure.PROTOCOL),
        (response(b"x", more="Content-Encoding: gzip\r\n"), Failure.PROTOCOL),
        (response(b"", more="".join(f"A{n}: {n}\r\n" for n in range(3000))), Failure.SIZE),
        (response(b"x" * 70_000), Failure.SIZE),
        (
            b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 70_000,
            Failure.SIZE,
        ),
        (
            b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"1;" + b"y" * 1000 + b"\r\nx\r\n") * 2000,
            Failure.SIZE,
        ),
        (b"HTTP/1.1 100 x\r\n\r\n" * 100_000, Failure.SIZE),
    ],
)
async def test_a_broken_or_endless_response_ends(
    server: HttpsServer, answer: bytes, kind: Failure
) -> None:
    server.answer = answer
    assert (await failure(server)).failure is kind


@no_turn_above(0.05)
async def test_no_turn_of_the_loop_is_long_whatever_comes(server: HttpsServer) -> Meter:
    body = b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 60_000
    server.answer = body + b"0\r\n\r\n"
    with meter() as turns:
        found = await ask(server)
    assert isinstance(found, Response) and len(found.body) == 60_000
    return turns


async def test_a_body_that_drips_ends_with_the_time(server: HttpsServer) -> None:
    dripped = 0

    async def drip(stream: Stream) -> None:
        nonlocal dripped
        await stream.send_all(b"HTTP/1.1 200 x\r\nContent-Length: 60000\r\n\r\n")
        while True:
            await stream.send_all(b"x")
            dripped += 1
            await trio.sleep(0.02)

    server.answer = drip
    found = await failure(server, bounds=Bounds(total_seconds=2.0))
    assert found == NoResponse(Failure.TIMEOUT, "no response in 2 s")
    assert dripped > 1


async def test_a_server_that_says_nothing_ends_with_the_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = Url(NAME, silent.getsockname()[1], "/")
        found = await Https(here).request(url, bounds=Bounds(connect_seconds=0.2))
    assert isinstance(found, NoResponse) and found.failure is Failure.TIMEOUT


async def test_a_cut_body_without_a_length_is_no_response(server: HttpsServer) -> None:
    async def cut(stream: Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 x\r\n\r\nmax_age: 6")
        await trio.aclose_forcefully(stream)

    server.answer = cut
    assert (await failure(server)).failure is Failure.PROTOCOL

    async def whole(stream: Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 x\r\n\r\nmax_age: 604800")
        await stream.aclose()

    server.answer = whole
    found = await ask(server)
    assert isinstance(found, Response) and found.body == b"max_age: 604800"


async def test_the_next_address_is_tried(server: HttpsServer) -> None:
    async def two(name: str) -> Sequence[Host]:
        return Host(name, "127.0.0.9"), Host(name, "127.0.0.1")

    assert isinstance(await ask(server, look_up=two), Response)


async def test_no_address_is_asked_that_is_not_found_or_forbidden(server: HttpsServer) -> None:
    async def nowhere(name: str) -> NoHosts:
        return NoHosts("no answer")

    async def forbidden(name: str) -> NoHosts:
        return NoHosts("127.0.0.1 is forbidden", setting="smtp-out-forbidden")

    assert (await failure(server, look_up=nowhere)).failure is Failure.DNS
    assert (await failure(server, look_up=forbidden)).failure is Failure.FORBIDDEN
    assert server.connections == 0


async def test_a_closed_port_and_a_server_without_tls_are_told_apart() -> None:
    with closed_port() as port:
        found = await Https(here).request(Url(NAME, port, "/"))
    assert isinstance(found, NoResponse) and found.failure is Failure.CONNECT

    async def clear(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.1 400 x\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, clear, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        found = await Https(here).request(Url(NAME, port, "/"))
        nursery.cancel_scope.cancel()
    assert isinstance(found, NoResponse) and found.failure is Failure.TLS


async def test_all_sockets_are_closed_when_the_asker_gives_up(server: HttpsServer) -> None:
    stuck, ended = trio.Event(), trio.Event()

    async def silent(stream: Stream) -> None:
        stuck.set()
        try:
            await stream.receive_some()
        finally:
            ended.set()

    server.answer = silent
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, server)
        await stuck.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(10):
        await ended.wait()


@pytest.mark.parametrize(
    "text",
    [
        "http://a.example/",
        "https:///x",
        "https://user:word@a.example/",
        "https://a.example:0/",
        "https://a.example:99999/",
        "https://a.example/ b",
        "https://a.example/\r\nHost: b",
        "https://ä.example/",
        "https://[::1",
        "https://a.example/" + "x" * 2000,
        "mailto:a@b.example",
        "",
    ],
)
def test_a_url_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"URL|scheme|[Pp]ort|IPv6"):
        Url.parse(text)


def test_the_parts_of_a_url() -> None:
    assert Url.parse("HTTPS://A.example") == Url("a.example", 443, "/")
    assert Url.parse("https://a.example:8443/r?x=1").authority == "a.example:8443"
    assert Url.parse("https://[2001:db8::1]/").authority == "[2001:db8::1]"


def test_bounds_have_the_values_of_the_standard() -> None:
    assert (Bounds().total_seconds, Bounds().body_bytes) == (60.0, 65536)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"])
def test_http_in_clear_is_for_this_host_and_those_that_ask_for_it(host: str) -> None:
    found = Url.parse(f"http://{host}:9000/x", local=True)
    assert (found.port, found.secure) == (9000, False)
    assert Url.parse(f"http://{host}/", local=True).authority == host
    with pytest.raises(ValueError, match="scheme"):
        Url.parse(f"http://{host}/")


@pytest.mark.parametrize(
    "host",
    ["a.example", "192.0.2.1", "10.0.0.1", "[2001:db8::1]", "127.0.0.1.a.example", "0.0.0.0"],
)
def test_http_in_clear_goes_to_no_other_host(host: str) -> None:
    with pytest.raises(ValueError, match="on this host"):
        Url.parse(f"http://{host}/", local=True)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_a_large_body_goes_out_in_blocks(server: HttpsServer, method: str) -> None:
    body = bytes(range(256)) * 10_000
    found = await ask(server, method=method, body=body)
    assert isinstance(found, Response)
    (request,) = server.requests
    assert (request.method, request.body == body) == (method, True)
    assert request.headers["content-length"] == str(len(body))


async def test_a_large_body_of_a_known_length_comes_in(server: HttpsServer) -> None:
    body = bytes(range(256)) * 10_000
    server.answer = response(body)
    found = await ask(server, bounds=Bounds(body_bytes=len(body)))
    assert isinstance(found, Response)
    assert found.body == body
    assert (await failure(server, bounds=Bounds(body_bytes=len(body) - 1))).failure == "size"
