"""The address of a storage: ``directory:///path``, ``s3://…`` or ``postgresql://…``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from mailerq.storage.keys import MAX_DEPTH

__all__ = ["Directory", "Location", "Postgres", "S3", "address_problem", "parse_address"]

FOREIGN: Final = frozenset({"couchbase", "mongo", "mongodb", "mysql", "redis", "sqlite"})
"""Schemes of MailerQ that mailerq does not have."""

KNOWN: Final = (
    "directory:///path, s3://key:secret@region/bucket and postgresql://user@host/database"
)

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_PREFIX: Final = re.compile(r"[A-Za-z0-9._=+@/-]{0,200}", re.ASCII)
_REGION: Final = re.compile(r"[A-Za-z0-9-]{1,60}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """A directory; `depth` is the number of levels of folders in a bucket of an hour."""

    path: str
    depth: int = 0
    compress: bool = False

    def __str__(self) -> str:
        return f"directory://{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3:
    """A bucket of S3, or of a server that speaks its protocol at the URL `endpoint`."""

    access_key: str
    secret: str = field(repr=False)
    region: str
    bucket: str
    prefix: str = ""
    endpoint: str = ""
    ca_file: str = ""
    compress: bool = False

    def __str__(self) -> str:
        return f"s3://{self.region}/{self.bucket}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Postgres:
    """A table of a PostgreSQL database. `uri` is for libpq, and may hold the `secrets`."""

    uri: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False, default=())
    """Passwords, in each form in which an error of libpq may quote them."""
    shown: str
    table: str = "mailerq_bodies"
    compress: bool = False

    def __str__(self) -> str:
        return self.shown


Location = Directory | S3 | Postgres


def parse_address(text: str) -> Location:
    """Parse a ``storage-address``. Raises `ValueError`, whose text has no password.

    >>> print(parse_address("dir:///var/lib/bodies?compression=gzip"))
    directory:///var/lib/bodies
    """
    scheme, separator, _ = text.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ValueError(f"is not an address; there are {KNOWN}")
    if scheme in FOREIGN:
        raise ValueError(f"{scheme} is not supported; there are {KNOWN}")
    try:
        parts = urlsplit(text)
        _ = parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
                       if parts.query else ())  # fmt: skip
    except ValueError:
        raise ValueError("is not a URI: a special character must be written as %XX") from None
    if parts.fragment:
        raise ValueError("is not a URI: '#' must be written as %23")
    match scheme:
        case "dir" | "directory":
            return _directory(parts.netloc, unquote(parts.path), options)
        case "s3":
            return _s3(parts.username, parts.password, parts.netloc, parts.path, options)
        case "postgresql" | "postgres":
            return _postgres(text, options)
    raise ValueError(f"the scheme {scheme[:40]!a} is not known; there are {KNOWN}")


def address_problem(text: str) -> str | None:
    """Why a text is not the address of a storage, or None."""
    try:
        parse_address(text)
    except ValueError as error:
        return str(error)
    return None


def _compress(options: dict[str, str]) -> bool:
    match options.pop("compression", "none"):
        case "gzip":
            return True
        case "none" | "identity" | "plain":
            return False
    raise ValueError("compression is gzip or none")


def _end(options: dict[str, str]) -> None:
    if options:
        raise ValueError(f"the option {next(iter(options))[:40]!a} is not known")


def _directory(host: str, path: str, options: dict[str, str]) -> Directory:
    if host or not path.startswith("/") or path.rstrip("/") == "":
        raise ValueError("a directory is written as directory:///path, with three slashes")
    if "\0" in path:
        raise ValueError("a path has no NUL")
    compress, depth = _compress(options), options.pop("depth", "0")
    if not depth.isdecimal() or len(depth) > 2 or int(depth) > MAX_DEPTH:
        raise ValueError(f"depth is a number from 0 to {MAX_DEPTH}")
    _end(options)
    return Directory(path=path.rstrip("/"), depth=int(depth), compress=compress)


def _s3(key: str | None, secret: str | None, netloc: str, path: str, options: dict[str, str]) -> S3:
    region = netloc.rpartition("@")[2]  # upper case may count
    if not key or not secret or not _REGION.fullmatch(region):
        raise ValueError("S3 is written as s3://key:secret@region/bucket")
    bucket, _, prefix = unquote(path).strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{bucket[:80]!a} is not the name of a bucket")
    if not _PREFIX.fullmatch(prefix) or any(part in (".", "..") for part in prefix.split("/")):
        raise ValueError(f"{prefix[:80]!a} cannot begin the names of objects")
    found = S3(
        access_key=unquote(key),
        secret=unquote(secret),
        region=region,
        bucket=bucket,
        prefix=prefix,
        endpoint=options.pop("endpoint", ""),
        ca_file=options.pop("ca-file", ""),
        compress=_compress(options),
    )
    _end(options)
    if found.endpoint and not found.endpoint.lower().startswith(("https://", "http://")):
        raise ValueError("endpoint is a URL that begins with https:// or http://")
    return found


_TABLE: Final = re.compile(r"[a-z_][a-z0-9_]{0,50}(?:\.[a-z_][a-z0-9_]{0,50})?", re.ASCII)


def _postgres(text: str, options: dict[str, str]) -> Postgres:
    """The address goes to libpq without our own options, and with all of its."""
    parts = urlsplit(text)
    compress, table = _compress(options), options.pop("table", "mailerq_bodies")
    if not _TABLE.fullmatch(table):
        raise ValueError("table is the plain name of a table, with a schema or without")
    raw = parts.password or ""
    found = {raw, unquote(raw), options.get("password", ""), options.get("sslpassword", "")}
    found |= {quote(each, safe="") for each in found}
    kept = [
        each
        for each in parts.query.split("&")
        if each and each.partition("=")[0] not in ("compression", "table")
    ]
    uri = parts._replace(query="&".join(kept)).geturl()
    if uri.startswith("postgresql:/") and not parts.netloc:
        uri = f"postgresql://{parts.path}" + (f"?{'&'.join(kept)}" if kept else "")
    host = parts.netloc.rpartition("@")[2]
    where = host if host else options.get("host", "")
    return Postgres(
        uri=uri,
        secrets=tuple(sorted(found - {""}, key=len, reverse=True)),
        shown=f"postgresql://{where}{parts.path}",
        table=table,
        compress=compress,
    )
