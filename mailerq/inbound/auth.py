"""The back ends of ``smtp-auth``: they check logins and passwords.

Each URI of the setting is a back end. They are asked in order, and the first one that knows the
login decides. Plugins are asked before all of them.

``hardcoded://ann:secret,bob:other``
    Logins in the configuration itself.
``file:///path``
    Lines ``login:hash``, read again when the file changes. A hash is an argon2 hash, or one of
    crypt(3) in any form that the system's library knows.
``exec:///path``
    A program that reads login and password from two lines of standard input. Other users could
    see arguments. Exit status 0 admits, 1 refuses, anything else is a fault.
``http://host/path`` and ``https://…``
    Login and password as Basic authentication (RFC 7617); 2xx admits, 401, 403 and 404
    refuse, anything else is a fault.

A back end that cannot decide raises `AuthUnavailable`, and the client is told to try again. Errors
and log lines hold no password, and no URI, since a URI may hold a password.

Neither the time nor the kind of an answer reveals which logins exist. The back ends behind the one
that knows the login check a wrong password too, as they do for an unknown login. A file computes a
hash for every login. The session answers a failed login after a fixed time
(`LOGIN_DELAY_SECONDS`), which covers the usual time of a program or a web server.
"""

from __future__ import annotations

import base64
import hmac
import http.client
import logging
import os
import re
import secrets
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol, Self
from urllib.parse import urlsplit

import trio

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.net.files import WatchedFile
from mailerq.plugins import crypt
from mailerq.wire.sasl import Credentials

__all__ = ["AuthUnavailable", "Authenticator", "parse_backend", "verify_hash"]

log = logging.getLogger("mailerq.auth")

HASHERS: Final = 4
"""Hashes or external services at a time; hashing is slow by design."""

ASK_SECONDS: Final = 10.0
"""Timeout for a program or a server."""


class AuthUnavailable(Exception):
    """A back end cannot decide now; the text is for the log."""


class Backend(Protocol):
    """One source of logins. `reveals`: it has passwords in clear, as CRAM-MD5 needs."""

    reveals: bool

    async def check(self, credentials: Credentials) -> bool | None:
        """Whether the credentials are right; None for an unknown login.

        Raises `AuthUnavailable`.
        """


class Authenticator:
    """All back ends of a server: `logins` from the settings first, then `uris`.

    Raises ValueError with the mistake.
    """

    def __init__(self, uris: Sequence[str] = (), logins: Mapping[str, str] | None = None) -> None:
        self._backends: list[Backend] = [Hardcoded(logins)] if logins else []
        self._backends += [parse_backend(uri) for uri in uris]

    @classmethod
    def of(cls, config: Config) -> Self:
        """The back ends that the settings name. Raises `ConfigError`."""
        logins = {config.smtp_username: config.smtp_password} if config.smtp_username else None
        try:
            return cls(config.smtp_auth, logins)
        except ValueError as error:
            raise ConfigError(config.origin("smtp-auth"), f"smtp-auth: {error}") from None

    def __bool__(self) -> bool:
        return bool(self._backends)

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The mechanisms that AUTH may offer. CRAM-MD5 needs passwords in clear."""
        if not self._backends:
            return ()
        all_reveal = all(backend.reveals for backend in self._backends)
        return ("PLAIN", "LOGIN", "CRAM-MD5") if all_reveal else ("PLAIN", "LOGIN")

    async def check(self, credentials: Credentials) -> bool:
        """Whether the credentials are right. Raises `AuthUnavailable`."""
        decision: bool | None = None
        for backend in self._backends:
            found = await backend.check(credentials)
            if decision is None:
                decision = found
            if decision:
                return True
        return False


def parse_backend(uri: str) -> Backend:
    """Make the back end of a URI. Raises ValueError with the mistake."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise ValueError("a back end is a URI such as file:///etc/mailerq/logins")
    match scheme.lower():
        case "hardcoded":
            return Hardcoded(_pairs(rest))
        case "file":
            return PasswordFile(_path(rest))
        case "exec":
            return Program(_path(rest))
        case "http" | "https":
            return WebServer(uri)
        case _:
            raise ValueError(
                f"{scheme}:// is not supported; there are hardcoded, file, exec, http and https"
            )


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("the path must be absolute, as in file:///etc/mailerq/logins")
    return text


def _pairs(text: str) -> dict[str, str]:
    passwords: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        login, separator, password = pair.partition(":")
        if not separator or not login:
            raise ValueError("hardcoded:// takes login:password, with commas between them")
        passwords[login] = password
    return passwords


class Hardcoded:
    """Logins in the configuration."""

    reveals = True

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._passwords = dict(passwords)

    async def check(self, credentials: Credentials) -> bool | None:
        password = self._passwords.get(credentials.login)
        # An unknown login takes as long as a known one.
        proven = credentials.proves(password if password is not None else "")
        return None if password is None else proven


class _Logins(NamedTuple):
    """The content of a file: the hash of each login, and the hashes that a password can have."""

    hashes: dict[str, str]
    usable: list[str]


class PasswordFile:
    """Lines ``login:hash``; empty lines and lines that start with ``#`` are skipped."""

    reveals = False

    def __init__(self, path: str) -> None:
        self._file = WatchedFile(path, self._parse)
        self._secret = secrets.token_bytes(32)
        self._limiter = trio.CapacityLimiter(HASHERS)
        try:
            self._file.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {_reason(error)}") from None

    async def check(self, credentials: Credentials) -> bool | None:
        try:
            logins = self._file.read()
        except (OSError, ValueError) as error:
            raise AuthUnavailable(f"{self._file.path}: {_reason(error)}") from error
        password = credentials.password
        if password is None or not logins.hashes:
            return None
        stored = logins.hashes.get(credentials.login)
        if stored is not None and _is_hash(stored):
            model = stored
        else:
            model = self._dummy(credentials.login, logins.usable)
        proven = await trio.to_thread.run_sync(
            verify_hash, password, model, limiter=self._limiter, abandon_on_cancel=True
        )
        return None if stored is None else proven and model == stored

    def _dummy(self, login: str, usable: Sequence[str]) -> str:
        """The hash to try for an unknown login, always the same one for a login.

        The hash comes from the file, which may hold several kinds: an unknown login takes as long
        as some known login.
        """
        if not usable:
            return ""
        digest = hmac.digest(self._secret, login.encode(), "sha256")
        return usable[int.from_bytes(digest) % len(usable)]

    def _parse(self, text: str) -> _Logins:
        hashes: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            login, separator, stored = line.partition(":")
            if separator and login:
                hashes[login] = stored.split(":")[0].strip()
            else:
                log.warning("%s:%d: no login:hash, skipped", self._file.path, number)
        return _Logins(hashes, [stored for stored in hashes.values() if _is_hash(stored)])


# Any other start locks the login, as in /etc/shadow: crypt(3) gives up at once.
_is_hash: Final = re.compile(r"[$_./0-9A-Za-z].{10,}", re.DOTALL).fullmatch


def verify_hash(password: str, stored: str) -> bool:
    """Whether a hash is that of a password. Slow by design."""
    if stored.startswith("$argon2"):
        import argon2  # late: few hashes are argon2

        try:
            return argon2.PasswordHasher().verify(stored, password)
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False
    # crypt(3) would take an empty hash as a choice of method; no password has it.
    if not stored or "\0" in password or "\0" in stored:
        return False
    computed = crypt(password.encode(), stored.encode())
    return computed is not None and hmac.compare_digest(computed, stored.encode())


class Program:
    """A program, run for each login."""

    reveals = False

    def __init__(self, path: str) -> None:
        self._path = path
        self._limiter = trio.CapacityLimiter(HASHERS)
        if not os.access(path, os.X_OK):
            raise ValueError(f"{path}: cannot be executed")

    async def check(self, credentials: Credentials) -> bool | None:
        login, password = credentials.login, credentials.password
        if password is None or "\n" in login + password:
            return None
        status = None
        async with self._limiter:
            with trio.move_on_after(ASK_SECONDS):
                try:
                    finished = await trio.run_process(
                        [self._path],
                        stdin=f"{login}\n{password}\n".encode(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        check=False,
                    )
                except OSError as error:
                    raise AuthUnavailable(f"{self._path}: {_reason(error)}") from error
                status = finished.returncode
        if status is None:
            raise AuthUnavailable(f"{self._path}: no answer in {ASK_SECONDS:g} seconds")
        if status not in (0, 1):
            raise AuthUnavailable(f"{self._path}: exit status {status}")
        return status == 0


class WebServer:
    """A web server, asked with Basic authentication."""

    reveals = False

    def __init__(self, uri: str) -> None:
        try:
            parts = urlsplit(uri)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            raise ValueError("a URI of a web server that cannot be read") from None
        if not self._host or parts.username is not None:
            raise ValueError("http:// takes host and path, as in http://127.0.0.1:8080/login")
        self._secure = parts.scheme.lower() == "https"
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._limiter = trio.CapacityLimiter(HASHERS)

    async def check(self, credentials: Credentials) -> bool | None:
        if credentials.password is None or ":" in credentials.login:
            return None
        pair = f"{credentials.login}:{credentials.password}"
        try:
            status = await trio.to_thread.run_sync(
                self._ask, pair, limiter=self._limiter, abandon_on_cancel=True
            )
        except (OSError, http.client.HTTPException) as error:
            raise AuthUnavailable(f"{self._host}: {_reason(error)}") from error
        if status in (401, 403, 404):
            return False
        if not 200 <= status < 300:
            raise AuthUnavailable(f"{self._host}: status {status}")
        return True

    def _ask(self, pair: str) -> int:
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            context.hostname_checks_common_name = False
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=ASK_SECONDS, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=ASK_SECONDS)
        try:
            token = base64.b64encode(pair.encode()).decode()
            connection.request("GET", self._target, headers={"Authorization": f"Basic {token}"})
            return connection.getresponse().status
        finally:
            connection.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
