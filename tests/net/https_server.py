"""An HTTPS server for tests: it sends what a test says, byte for byte, on a port of its own."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h11
import trio
import trustme

Stream = trio.SSLStream[trio.SocketStream]
Script = Callable[[Stream], Awaitable[None]]


@dataclass
class Request:
    """A request as it was received."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    server_name: str = ""


def response(body: bytes, *, status: int = 200, kind: str = "text/plain", more: str = "") -> bytes:
    """A whole response."""
    head = f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
    return head.encode() + b"\r\n" + body


@dataclass
class HttpsServer:
    """Answers each request with `answer`: bytes, or a function that writes to the stream.

    `certificates` has one for each name that a client may ask for, and "" for all others.
    """

    port: int = 0
    answer: bytes | Script = b"HTTP/1.1 200 x\r\nContent-Length: 0\r\n\r\n"
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    names: list[str] = field(default_factory=list)
    certificates: dict[str, ssl.SSLContext] = field(default_factory=dict)
    ca_file: str = ""
    ca: trustme.CA = field(default_factory=trustme.CA)

    def certify(self, name: str, ca: trustme.CA | None = None, **options: object) -> None:
        """Have a certificate for `name` for clients that ask for it, and for all others too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate = (ca or self.ca).issue_cert(name, **options)  # type: ignore[arg-type]
        certificate.configure_cert(context)
        self.certificates[name] = self.certificates[""] = context

    def choose(self, sock: object, name: str | None, context: ssl.SSLContext) -> None:
        self.names.append(name or "")
        chosen = self.certificates.get(name or "", self.certificates[""])
        sock.context = chosen  # type: ignore[attr-defined]

    async def serve(self, raw: trio.SocketStream) -> None:
        self.connections += 1
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = self.choose  # type: ignore[assignment]
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=False)
        try:
            async with stream:
                self.requests.append(await read_request(stream))
                if isinstance(self.answer, bytes):
                    await stream.send_all(self.answer)
                else:
                    await self.answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass  # clients do what they want


async def read_request(stream: trio.abc.Stream) -> Request:
    connection = h11.Connection(h11.SERVER)
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some())
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.ConnectionClosed):
            raise trio.BrokenResourceError
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            return Request(request.method.decode(), request.target.decode(), headers, body)


@asynccontextmanager
async def open_https_server(
    directory: Path, *names: str, host: str = "127.0.0.1"
) -> AsyncIterator[HttpsServer]:
    """A server with certificates for these names, whose authority is in `ca_file`."""
    server = HttpsServer()
    server.ca_file = str(directory / "ca.pem")
    server.ca.cert_pem.write_to_path(server.ca_file)
    for name in names:
        server.certify(name)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, server.serve, 0, host=host)
        listeners = await nursery.start(serve)
        server.port = listeners[0].socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()
