"""Ask one thing of a web server by HTTPS, with a bound on everything.

HTTP in clear is for servers on this host only.

Each request has a connection of its own. Nothing is followed, kept or decoded: a redirect is
a response like any other, and there is no cache, no proxy, no cookie and no compression. The caller
looks the host up, so all rules about addresses are those of the resolver.

A server may be hostile: the time from the first byte to the last is bounded as a whole, so dripping
gains nothing, and so are the head, the body and the bytes around them. A body without a length must
end with the end of TLS, so nobody on the way can cut it short.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

import h11
import trio

from mailerq.address import host_port, is_loopback
from mailerq.net.resolver import Host, NoHosts

__all__ = ["Bounds", "Failure", "Https", "NoResponse", "Response", "Url"]

HTTPS_PORT: Final = 443
HTTP_PORT: Final = 80

READ_BYTES: Final = 4096
"""Bytes read at a time: h11 needs some milliseconds for them if the body has chunks of a byte."""

BODY_BYTES: Final = 1 << 16
"""Bytes of a body of a known length that are read or written in one turn of the loop."""

OVERHEAD: Final = 8
"""Bytes received for each byte of a body, at most: small chunks have a head each."""

MAX_ADDRESSES: Final = 4
"""Addresses of a server that are tried."""

MAX_URL: Final = 2000
"""Characters of a URL."""

AGENT: Final = "mailerq"


class Failure(StrEnum):
    """Why there is no response."""

    URL = "url"
    """The text is not a URL that this client can use."""
    DNS = "dns"
    """The host cannot be found; `NoResponse.lasting` says whether the name servers deny it."""
    FORBIDDEN = "forbidden"
    """All addresses are in networks that nothing may be sent to."""
    CONNECT = "connect"
    """No address accepts a connection."""
    CERTIFICATE = "certificate"
    """The certificate is not valid for the host."""
    TLS = "tls"
    """The handshake failed for another reason, or the connection broke in it."""
    TIMEOUT = "timeout"
    """A bound of time has passed."""
    SIZE = "size"
    """The response is larger than its bounds."""
    PROTOCOL = "protocol"
    """The response is not HTTP/1.1, or ended early."""
    LOCAL = "local"
    """This host cannot ask now: it lacks descriptors, or the CA file cannot be read."""


class NoResponse(NamedTuple):
    """A request that got no response. `text` is for people, and may hold text of the server."""

    failure: Failure
    text: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response of any status. Names of headers are in lower case; repeated ones are joined."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def media_type(self) -> str:
        """The media type in lower case, without parameters; empty if there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of one request: seconds and bytes."""

    connect_seconds: float = 10.0
    """For one address, with the TLS handshake."""
    total_seconds: float = 60.0
    """From the lookup to the last byte."""
    head_bytes: int = 16 << 10
    """For the status line and all headers, trailers too."""
    body_bytes: int = 64 << 10


class Url(NamedTuple):
    """A URL in parts."""

    host: str
    port: int
    target: str
    """The path and the query, as the request names them."""
    secure: bool = True
    """Whether TLS protects the connection."""

    @classmethod
    def parse(cls, text: str, *, local: bool = False) -> Self:
        """Parse an https URL. Raises `ValueError` for another scheme, a login, or odd characters.

        With `local`, an http URL is allowed if it names this host.

        >>> Url.parse("https://Example.com/a?b#c")
        Url(host='example.com', port=443, target='/a?b', secure=True)
        """
        if len(text) > MAX_URL or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("a URL has up to 2000 ASCII characters, and no blank")
        parts = urlsplit(text)
        secure = parts.scheme.lower() == "https"
        if not secure and not (local and parts.scheme.lower() == "http"):
            raise ValueError("the scheme is not https")
        if "@" in parts.netloc or not parts.hostname:
            raise ValueError("the URL names no host, or a login")
        if parts.port == 0:
            raise ValueError("0 is not a port of a server")
        if not secure and not is_this_host(parts.hostname):
            raise ValueError("http without TLS is for servers on this host, such as 127.0.0.1")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        port = parts.port or (HTTPS_PORT if secure else HTTP_PORT)
        return cls(parts.hostname, port, target, secure)

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        if self.port != (HTTPS_PORT if self.secure else HTTP_PORT):
            return host_port(self.host, self.port)
        return f"[{self.host}]" if ":" in self.host else self.host


def is_this_host(host: str) -> bool:
    """Whether a name or an address means this host (RFC 6761, section 6.3)."""
    return host == "localhost" or is_loopback(host)


Connected = trio.SSLStream[trio.SocketStream] | trio.SocketStream
LookUp = Callable[[str], Awaitable[Sequence[Host] | NoHosts]]


class Https:
    """A client. `look_up` finds the addresses of a host, and leaves out the forbidden ones."""

    def __init__(self, look_up: LookUp) -> None:
        self._look_up = look_up
        self._contexts: dict[tuple[str, bool], ssl.SSLContext] = {}

    def forget_authorities(self) -> None:
        """Read the certificates of authorities again."""
        self._contexts.clear()

    async def request(
        self,
        url: Url,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        bounds: Bounds | None = None,
        ca_file: str = "",
        verify: bool = True,
    ) -> Response | NoResponse:
        """Ask once.

        The certificate must be valid for the host (RFC 6125: a name in it, not the common name)
        by the system's authorities, or those in `ca_file`; not without `verify`. Each of the first
        addresses is tried until one accepts a connection. Never raises but for cancellation.
        """
        bounds = bounds or Bounds()
        try:
            with trio.fail_after(bounds.total_seconds):
                context = None
                try:
                    if url.secure:
                        context = await self._context(ca_file, verify)
                except (OSError, ssl.SSLError) as error:
                    return NoResponse(Failure.LOCAL, f"{ca_file or 'the system'}: {error}")
                stream = await self._connect(url, context, bounds)
                if isinstance(stream, NoResponse):
                    return stream
                try:
                    return await _exchange(stream, url, method, headers or {}, body, bounds)
                finally:
                    await trio.aclose_forcefully(stream)
        except trio.TooSlowError:
            return NoResponse(Failure.TIMEOUT, f"no response in {bounds.total_seconds:g} s")

    async def _context(self, ca_file: str, verify: bool) -> ssl.SSLContext:
        """A context for TLS 1.2 and up. Reading the authorities takes long: a thread does it."""
        key = ca_file, verify
        context = self._contexts.get(key)
        if context is None:
            context = await trio.to_thread.run_sync(_make_context, ca_file, verify)
            self._contexts[key] = context
        return context

    async def _connect(
        self, url: Url, context: ssl.SSLContext | None, bounds: Bounds
    ) -> Connected | NoResponse:
        found = await self._look_up(url.host)
        if isinstance(found, NoHosts):
            failure = Failure.FORBIDDEN if found.setting else Failure.DNS
            text = found.description
            if found.reply is not None:
                text = found.reply.description
            return NoResponse(failure, text)
        problem = NoResponse(Failure.DNS, f"{url.host} has no address")
        for host in found[:MAX_ADDRESSES]:
            with trio.move_on_after(bounds.connect_seconds):
                opened = await _open(host.address, url, context)
                if not isinstance(opened, NoResponse):
                    return opened
                problem = opened
                continue
            problem = NoResponse(Failure.TIMEOUT, f"{host.address} does not answer")
        return problem


def _make_context(ca_file: str, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    # Python sets this for OpenSSL 3: the end of a connection would pass for the end of TLS.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _open(address: str, url: Url, context: ssl.SSLContext | None) -> Connected | NoResponse:
    """Connect to one address and shake hands, if the URL wants TLS."""
    family = trio.socket.AF_INET6 if ":" in address else trio.socket.AF_INET
    try:
        sock = trio.socket.socket(family)
    except OSError as error:
        return NoResponse(Failure.LOCAL, f"no socket: {error.strerror or error}")
    done = False
    try:
        try:
            await sock.connect((address, url.port))
        except OSError as error:
            where = host_port(address, url.port)
            return NoResponse(Failure.CONNECT, f"{where}: {error.strerror or error}")
        if context is None:
            done = True
            return trio.SocketStream(sock)
        stream = trio.SSLStream(
            trio.SocketStream(sock), context, server_hostname=url.host, https_compatible=False
        )
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            return _of_handshake(error.__cause__, address)
        done = True
        return stream
    finally:
        if not done:
            sock.close()


def _of_handshake(cause: BaseException | None, address: str) -> NoResponse:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return NoResponse(Failure.CERTIFICATE, f"{address}: {cause.verify_message}")
    if isinstance(cause, ssl.CertificateError):
        return NoResponse(Failure.CERTIFICATE, f"{address}: {cause}")
    reason = getattr(cause, "reason", None) or cause or "the connection broke"
    return NoResponse(Failure.TLS, f"{address}: {reason}")


async def _exchange(
    stream: trio.abc.Stream,
    url: Url,
    method: str,
    headers: Mapping[str, str],
    body: bytes | None,
    bounds: Bounds,
) -> Response | NoResponse:
    """Send a request and read its response."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=bounds.head_bytes)
    fields = {
        "Host": url.authority,
        "User-Agent": AGENT,
        "Accept-Encoding": "identity",
        "Connection": "close",
        **headers,
    }
    if body is not None:
        fields["Content-Length"] = str(len(body))
    try:
        request = h11.Request(method=method, target=url.target, headers=list(fields.items()))
        await stream.send_all(_said(connection, request))
        for start in range(0, len(body or b""), BODY_BYTES):
            part = memoryview(body or b"")[start : start + BODY_BYTES]
            await stream.send_all(_said(connection, h11.Data(data=bytes(part))))
        rest = connection.send(h11.EndOfMessage())
        if rest:
            await stream.send_all(rest)
    except trio.BrokenResourceError:
        pass  # a server may refuse a body before it has all, and says why
    try:
        return await _read(stream, connection, bounds)
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        return NoResponse(Failure.PROTOCOL, f"the connection broke: {cause or error}")
    except h11.RemoteProtocolError as error:
        too_large = error.error_status_hint == 431
        return NoResponse(Failure.SIZE if too_large else Failure.PROTOCOL, str(error))


def _said(connection: h11.Connection, event: h11.Event) -> bytes:
    data = connection.send(event)
    assert data is not None, "only the end of a connection has no bytes"
    return data


async def _read(
    stream: trio.abc.Stream, connection: h11.Connection, bounds: Bounds
) -> Response | NoResponse:
    """Read a response. Raises as h11 and trio do."""
    most = 2 * bounds.head_bytes + OVERHEAD * bounds.body_bytes
    received, body, step = 0, bytearray(), READ_BYTES
    response: h11.Response | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(step)
            received += len(data)
            if received > most:
                return NoResponse(Failure.SIZE, f"more than {most} bytes around the body")
            connection.receive_data(bytes(data))
        elif isinstance(event, h11.Response):
            response = event
            headers = dict(event.headers)
            if b"content-length" in headers and b"transfer-encoding" not in headers:
                step = BODY_BYTES
            encoding = headers.get(b"content-encoding", b"identity").strip().lower()
            if encoding not in (b"", b"identity"):
                return NoResponse(Failure.PROTOCOL, f"the body is encoded: {encoding!r}")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > bounds.body_bytes:
                return NoResponse(Failure.SIZE, f"more than {bounds.body_bytes} bytes")
        elif isinstance(event, h11.EndOfMessage):
            assert response is not None, "a response has a beginning"
            return Response(response.status_code, _fields(response), bytes(body))
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return NoResponse(Failure.PROTOCOL, "the connection ended without a response")


def _fields(response: h11.Response) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in response.headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found
