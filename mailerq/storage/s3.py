"""Bodies as objects of S3, or of a server that speaks its protocol.

The name of an object is its key, below the prefix of the address. Requests are path style and
signed by `mailerq.storage.sigv4`. A rule of the bucket may remove old objects; without one, expired
objects are found by their names, which begin with the hour, and removed in groups.
"""

from __future__ import annotations

import base64
import hashlib
import random
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final

import trio

from mailerq.config import Config
from mailerq.errors import StorageError
from mailerq.escaping import escape
from mailerq.net.https import Bounds, Failure, Https, NoResponse, Response, Url
from mailerq.net.resolver import Host, NoHosts
from mailerq.storage.addresses import S3
from mailerq.storage.interface import SMALL_BYTES, Backend, Body
from mailerq.storage.keys import ends_of, size_of
from mailerq.storage.packing import MAX_BODY
from mailerq.storage.sigv4 import EMPTY_DIGEST, canonical_query, digest, encode_path, sign

__all__ = ["S3Backend"]

ATTEMPTS: Final = 4
"""Requests for one thing; what is busy or breaks off is asked again."""

PAUSE_SECONDS: Final = 0.2
"""The longest first pause between two attempts; it doubles each time."""

LOOK_UP_SECONDS: Final = 30.0
"""How long the addresses of the server are kept."""

SAID_BYTES: Final = 64 << 10
"""Bytes of a response that is not a body."""

LIST_BYTES: Final = 2 << 20
LIST_KEYS: Final = 1000
MAX_LISTS: Final = 20
"""Lists of expired objects to work off at a time."""

_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LASTING: Final = frozenset({Failure.CERTIFICATE, Failure.FORBIDDEN, Failure.SIZE, Failure.URL})

_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>", re.ASCII)
_KEY: Final = re.compile(r"<Key>([A-Za-z0-9._=+@/-]{1,1024})</Key>", re.ASCII)

_ADVICE: Final = {
    "AccessDenied": "the key needs s3:GetObject, s3:PutObject, s3:DeleteObject and, to tell a"
    " missing object from a forbidden one, s3:ListBucket",
    "InvalidAccessKeyId": "the access key in storage-address is not known there",
    "SignatureDoesNotMatch": "the secret in storage-address is wrong; a / or + in it is written"
    " as %2F or %2B",
    "RequestTimeTooSkewed": "the clock of this host is wrong",
    "NoSuchBucket": "create the bucket, or name another one in storage-address",
    "PermanentRedirect": "the bucket is in another region than storage-address says",
    "AuthorizationHeaderMalformed": "the bucket is in another region than storage-address says",
}


class S3Backend(Backend):
    """A bucket. Up to ``storage-threads`` requests are under way at a time."""

    batch_bodies = 1  # nothing is shared between objects

    def __init__(
        self, location: S3, threads: int, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.name = str(location)
        self.compress = location.compress
        self._location = location
        self._clock = clock
        endpoint = location.endpoint or f"https://s3.{location.region}.amazonaws.com"
        self._server = Url.parse(endpoint, local=True)
        self._base = self._server.target.rstrip("/") + f"/{location.bucket}"
        self._prefix = location.prefix.rstrip("/") + "/" if location.prefix else ""
        self._https = Https(self._look_up)
        self._limiter = trio.CapacityLimiter(threads)
        self._after = ""
        """The object behind which `expire` goes on."""
        self._addresses: tuple[float, Sequence[Host]] = (0.0, ())

    def configure(self, config: Config) -> None:
        self._limiter.total_tokens = config.storage_threads

    async def _look_up(self, name: str) -> Sequence[Host] | NoHosts:
        """The system finds the server: an operator has named it, and no rules are about it."""
        until, found = self._addresses
        if trio.current_time() >= until:
            try:
                known = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                return NoHosts(f"{name}: {error}")
            found = [Host(name, str(address[0])) for *_, address in known]
            self._addresses = trio.current_time() + LOOK_UP_SECONDS, found
        return found

    # Requests

    async def _ask(
        self,
        method: str,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int = SAID_BYTES,
    ) -> Response:
        """Ask until there is a response that is not about the moment. Raises `StorageError`."""
        path = f"{self._base}/{self._prefix}{key}" if key else self._base
        body_digest = EMPTY_DIGEST
        if body:
            work = partial(digest, body)
            body_digest = await trio.to_thread.run_sync(work) if len(body) > SMALL_BYTES else work()
        pause, problem = PAUSE_SECONDS, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await trio.sleep(random.uniform(0, pause))
                pause *= 2
            async with self._limiter:
                response = await self._send(
                    method, path, query or {}, headers or {}, body, body_digest, limit
                )
            if isinstance(response, NoResponse):
                problem = escape(response.text)
                if response.failure in _LASTING:
                    break
            elif response.status not in _BUSY:
                return response
            else:
                problem = self._said(response)
        raise StorageError(f"{self.name}: {problem}; mail waits for it")

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | None,
        body_digest: str,
        limit: int,
    ) -> Response | NoResponse:
        """Sign and send once: a signature is good for some minutes."""
        location = self._location
        target = encode_path(path) + (f"?{canonical_query(query)}" if query else "")
        signed = {"Host": self._server.authority, **headers}
        added = sign(
            method,
            path,
            query,
            signed,
            body_digest,
            access_key=location.access_key,
            secret=location.secret,
            region=location.region,
            now=self._clock(),
        )
        return await self._https.request(
            self._server._replace(target=target),
            method=method,
            headers={**headers, **added},
            body=body,
            bounds=Bounds(body_bytes=limit),
            ca_file=location.ca_file,
        )

    def _said(self, response: Response) -> str:
        """What an error is about; the words of a server are not for the log."""
        code = _code(response)
        advice = _ADVICE.get(code, "")
        text = f"the server answers {response.status} {code}".rstrip()
        return f"{text}: {advice}" if advice else text

    def _refused(self, response: Response) -> StorageError:
        return StorageError(f"{self.name}: {self._said(response)}; mail waits for it")

    # The interface

    async def put(self, bodies: Sequence[Body]) -> None:
        for body in bodies:
            response = await self._ask(
                "PUT", body.key, headers={"Content-Type": "message/rfc822"}, body=body.data
            )
            if response.status != 200:
                raise self._refused(response)

    async def get(self, key: str) -> bytes | None:
        size = size_of(key)
        # Packed, a body of ours may have some bytes more.
        limit = MAX_BODY if size is None else min(size + size // 100 + SAID_BYTES, MAX_BODY)
        response = await self._ask("GET", key, limit=limit)
        if response.status == 200:
            return response.body
        if response.status == 404 and _code(response) in ("NoSuchKey", ""):
            return None
        raise self._refused(response)

    async def expire(self, now: float) -> int:
        """Remove objects whose hour is over; a list is in the order of the keys."""
        removed, after, self._after = 0, self._after, ""
        for _ in range(MAX_LISTS):
            query = {
                "list-type": "2",
                "max-keys": str(LIST_KEYS),
                "prefix": f"{self._prefix}2",  # our keys begin with the year
                **({"start-after": after} if after else {}),
            }
            response = await self._ask("GET", query=query, limit=LIST_BYTES)
            if response.status != 200:
                raise self._refused(response)
            # A server may send more than was asked for.
            text = response.body.decode("utf-8", "replace")
            found = [each[1] for each in islice(_KEY.finditer(text), LIST_KEYS)]
            ends = {name: ends_of(name.removeprefix(self._prefix)) for name in found}
            expired = [name for name, end in ends.items() if end is not None and end <= now]
            if expired:
                await self._delete(expired)
                removed += len(expired)
            if len(found) < LIST_KEYS or any(end and end > now for end in ends.values()):
                return removed
            after = found[-1]
        self._after = after  # go on there: an application may have that many keys before ours
        return removed

    async def _delete(self, names: Sequence[str]) -> None:
        objects = "".join(f"<Object><Key>{name}</Key></Object>" for name in names)
        body = f"<Delete><Quiet>true</Quiet>{objects}</Delete>".encode()
        checksum = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        response = await self._ask(
            "POST",
            query={"delete": ""},
            headers={"Content-MD5": checksum, "Content-Type": "application/xml"},
            body=body,
        )
        if response.status != 200:
            raise self._refused(response)
        if (code := _code(response)) and code != "NoSuchKey":
            raise StorageError(f"{self.name}: an expired object cannot be removed: {code}")


def _code(response: Response) -> str:
    found = _CODE.search(response.body[:SAID_BYTES].decode("utf-8", "replace"))
    return "" if found is None else found[1]
