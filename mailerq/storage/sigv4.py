"""Signatures of requests to S3: AWS Signature Version 4, without I/O and without a clock.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

__all__ = ["EMPTY_DIGEST", "canonical_query", "digest", "encode_path", "sign"]

ALGORITHM: Final = "AWS4-HMAC-SHA256"
EMPTY_DIGEST: Final = hashlib.sha256(b"").hexdigest()
UNRESERVED: Final = "-_.~"
"""Characters beside letters and digits that are not encoded (RFC 3986)."""

_BLANKS: Final = re.compile(r" +")


def digest(body: bytes) -> str:
    """The SHA-256 of a body in hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def encode_path(path: str) -> str:
    """A path as S3 signs it: encoded once, slashes as they are, nothing normalised.

    >>> encode_path("/a b/é/$file.text")
    '/a%20b/%C3%A9/%24file.text'
    """
    return quote(path, safe="/" + UNRESERVED)


def canonical_query(query: Mapping[str, str]) -> str:
    """The query as it is signed and sent, sorted by its encoded names.

    >>> canonical_query({"prefix": "J", "max-keys": "2", "delete": ""})
    'delete=&max-keys=2&prefix=J'
    """
    pairs = (
        (quote(name, safe=UNRESERVED), quote(value, safe=UNRESERVED))
        for name, value in query.items()
    )
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


def _canonical_headers(headers: Mapping[str, str]) -> tuple[str, str]:
    """The headers as they are signed, and their names."""
    found = sorted(
        (name.lower(), _BLANKS.sub(" ", value.strip(" "))) for name, value in headers.items()
    )
    text = "".join(f"{name}:{value}\n" for name, value in found)
    return text, ";".join(name for name, _ in found)


def _keyed(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def sign(
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    body_digest: str,
    *,
    access_key: str,
    secret: str,
    region: str,
    now: float,
    service: str = "s3",
) -> dict[str, str]:
    """Return the headers to add: ``X-Amz-Date``, ``X-Amz-Content-Sha256``, ``Authorization``.

    `headers` has ``Host``, and all others to sign. `path` is not encoded. `now` is seconds since
    1970; the server takes a signature for 15 minutes.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    added = {"X-Amz-Date": stamp, "X-Amz-Content-Sha256": body_digest}
    text, names = _canonical_headers({**headers, **added})
    request = "\n".join(
        (method, encode_path(path), canonical_query(query), text, names, body_digest)
    )
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    to_sign = "\n".join((ALGORITHM, stamp, scope, digest(request.encode())))
    key = _keyed(b"AWS4" + secret.encode(), stamp[:8])
    for part in (region, service, "aws4_request"):
        key = _keyed(key, part)
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    added["Authorization"] = (
        f"{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return added
