"""Back ends of logins: decisions, faults, and secrets that no text reveals."""

from __future__ import annotations

import base64
import hmac
import http.server
import logging
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import argon2
import pytest
import trustme

from mailerq.inbound import auth
from mailerq.inbound.auth import Authenticator, AuthUnavailable, verify_hash
from mailerq.plugins import crypt
from mailerq.wire.sasl import Credentials
from tests.net.certificate_kit import common_name_context


def plain(login: str, password: str) -> Credentials:
    return Credentials(login, password)


def cram(login: str, password: str) -> Credentials:
    digest = hmac.new(password.encode(), b"<1@mx.test>", "md5").hexdigest().encode()
    return Credentials(login, None, b"<1@mx.test>", digest)


async def test_hardcoded_logins_are_right_wrong_or_unknown() -> None:
    back_end = auth.parse_backend("hardcoded://ann:se:cret,bob:")
    for credentials in (plain, cram):
        assert await back_end.check(credentials("ann", "se:cret")) is True
        assert await back_end.check(credentials("ann", "other")) is False
        assert await back_end.check(credentials("bob", "")) is True
        assert await back_end.check(credentials("eve", "se:cret")) is None


@pytest.mark.parametrize("setting", [b"$y$j9T$abcdefgh", b"$6$abcdefgh", b"$5$abcdefgh", b"$1$ab"])
def test_every_way_of_crypt_is_known(setting: bytes) -> None:
    stored = crypt(b"s3cret", setting)
    if stored is None:
        pytest.skip("this system's crypt(3) does not know it")
    assert verify_hash("s3cret", stored.decode())
    assert not verify_hash("s3creT", stored.decode())


def test_argon2_is_known() -> None:
    stored = argon2.PasswordHasher(time_cost=1, memory_cost=64).hash("s3cret")
    assert verify_hash("s3cret", stored)
    assert not verify_hash("other", stored)


@pytest.mark.parametrize("stored", ["", "x", "!", "*", "!$6$a$b", "$6$", "$9$a$b", "$argon2", "\0"])
def test_what_is_no_hash_admits_nobody(stored: str) -> None:
    for password in ("", "x", stored, "a\0b"):
        assert not verify_hash(password, stored)


async def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    one, two = (crypt(word, b"$5$rounds=1000$salt").decode() for word in (b"one", b"two"))
    file.write_text(f"# who may send\n\nann:{one}:extra\nbroken line\n:{one}\n")
    back_end = auth.parse_backend(f"file://{file}")
    assert await back_end.check(plain("ann", "one")) is True
    assert await back_end.check(plain("ann", "two")) is False
    assert await back_end.check(plain("bob", "one")) is None
    assert await back_end.check(plain("", "one")) is None
    assert await back_end.check(cram("ann", "one")) is None
    new = tmp_path / "new"
    new.write_text(f"ann:{two}\nbob:{one}\n")
    new.replace(file)
    assert await back_end.check(plain("ann", "two")) is True
    assert await back_end.check(plain("bob", "one")) is True
    file.unlink()
    with pytest.raises(AuthUnavailable, match="logins"):
        await back_end.check(plain("ann", "two"))
    file.write_bytes(b"\xff")
    with pytest.raises(AuthUnavailable):
        await back_end.check(plain("ann", "two"))
    file.write_text(f"ann:{two}\n")
    assert await back_end.check(plain("ann", "two")) is True


async def test_an_unknown_login_is_hashed_for_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(auth, "verify_hash", lambda *pair: asked.append(pair))
    file = tmp_path / "logins"
    hashes = [f"${kind}$salt$0123456789" for kind in "56"]
    file.write_text(f"ann:{hashes[0]}\nbob:{hashes[1]}\ncyd:!\ndee:\n")
    back_end = auth.parse_backend(f"file://{file}")
    names = [f"nobody{number}" for number in range(50)]
    for login in (*names, *names, "cyd", "dee"):
        await back_end.check(plain(login, "password"))
    assert [password for password, _ in asked] == 102 * ["password"]
    assert {stored for _, stored in asked} == set(hashes)
    # Otherwise an unknown login would take now this time and now that one.
    assert asked[:50] == asked[50:100]


async def test_a_login_that_is_locked_is_not_let_in_by_the_hash_of_another(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    stored = crypt(b"s3cret", b"$5$rounds=1000$salt").decode()
    file.write_text(f"ann:{stored}\nbob:!{stored}\ncyd:\n")
    back_end = auth.parse_backend(f"file://{file}")
    assert await back_end.check(plain("ann", "s3cret")) is True
    for login in ("bob", "cyd"):
        assert await back_end.check(plain(login, "s3cret")) is False
    assert await back_end.check(plain("eve", "s3cret")) is None


async def test_a_wrong_password_goes_the_way_of_an_unknown_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(auth, "verify_hash", lambda *pair: asked.append(pair) or False)
    file = tmp_path / "logins"
    file.write_text("bob:$5$salt$0123456789\n")
    both = Authenticator([f"file://{file}"], {"ann": "one"})
    for login in ("ann", "eve", "bob"):
        assert not await both.check(plain(login, "two"))
    assert len(asked) == 3
    broken = Authenticator([f"file://{file}", program(tmp_path, "exit 7")], {"ann": "one"})
    for login in ("ann", "eve", "bob"):
        with pytest.raises(AuthUnavailable):
            await broken.check(plain(login, "two"))
    assert await broken.check(plain("ann", "one"))


def program(directory: Path, text: str) -> str:
    file = directory / "check"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return f"exec://{file}"


async def test_a_program_decides_by_its_exit_status(tmp_path: Path) -> None:
    expected = "'ann a b;$(x)'"
    uri = program(tmp_path, f'read -r login; read -r password; [ "$login $password" = {expected} ]')
    back_end = auth.parse_backend(uri)
    assert await back_end.check(plain("ann", "a b;$(x)")) is True
    assert await back_end.check(plain("ann", "other")) is False
    assert await back_end.check(plain("ann\nroot", "a b;$(x)")) is None
    assert await back_end.check(cram("ann", "a b;$(x)")) is None


async def test_a_program_that_fails_or_is_slow_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AuthUnavailable, match="exit status 7"):
        await auth.parse_backend(program(tmp_path, "exit 7")).check(plain("ann", "x"))
    monkeypatch.setattr(auth, "ASK_SECONDS", 0.05)
    with pytest.raises(AuthUnavailable, match="no answer"):
        await auth.parse_backend(program(tmp_path, "exec sleep 30")).check(plain("ann", "x"))


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        given = self.headers["Authorization"].removeprefix("Basic ")
        login, _, password = base64.b64decode(given).decode().partition(":")
        status = int(password) if login == "status" else 204 if password == "s3:cret" else 401
        self.send_response(status if self.path == "/login?x=1" else 500)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in the handshake is what the test is about."""


@contextmanager
def serve() -> Iterator[QuietServer]:
    with QuietServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def web() -> Iterator[str]:
    with serve() as server:
        yield f"http://127.0.0.1:{server.server_port}"


async def test_a_web_server_decides_by_its_status(web: str) -> None:
    back_end = auth.parse_backend(f"{web}/login?x=1")
    assert await back_end.check(plain("ann", "s3:cret")) is True
    assert await back_end.check(plain("ann", "other")) is False
    assert await back_end.check(plain("status", "404")) is False
    assert await back_end.check(plain("a:nn", "s3:cret")) is None
    for status in ("500", "302", "429"):
        with pytest.raises(AuthUnavailable, match=status):
            await back_end.check(plain("status", status))


async def test_a_common_name_is_no_name_of_a_web_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    good = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(good)
    for context in (good, common_name_context(authority, "localhost")):
        with serve() as server:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            back_end = auth.parse_backend(f"https://localhost:{server.server_port}/login?x=1")
            if context is good:
                assert await back_end.check(plain("ann", "s3:cret")) is True
                continue
            with pytest.raises(AuthUnavailable, match="certificate"):
                await back_end.check(plain("ann", "s3:cret"))


async def test_a_web_server_that_is_away_cannot_tell(web: str) -> None:
    with pytest.raises(AuthUnavailable):
        await auth.parse_backend("http://127.0.0.1:1/").check(plain("ann", "x"))


async def test_the_first_back_end_that_knows_a_login_decides() -> None:
    both = Authenticator(["hardcoded://ann:two,bob:three"], {"ann": "one"})
    assert both.mechanisms == ("PLAIN", "LOGIN", "CRAM-MD5")
    assert await both.check(plain("ann", "one"))
    assert not await both.check(plain("ann", "two"))
    assert await both.check(plain("bob", "three"))
    assert not await both.check(plain("eve", "three"))
    assert not Authenticator()
    assert Authenticator().mechanisms == ()


def test_cram_md5_is_offered_only_where_all_passwords_are_known(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.touch()
    mixed = Authenticator([f"file://{file}", "hardcoded://ann:one"])
    assert mixed.mechanisms == ("PLAIN", "LOGIN")


@pytest.mark.parametrize(
    "uri",
    [
        "ann:hunter2",
        "hardcoded://hunter2",
        "hardcoded://:hunter2",
        "hunter3://x",
        "file://logins",
        "file:///not/there/at/all",
        "exec://check",
        "exec:///etc/passwd",
        "http:///hunter2",
        "http://ann:hunter2@host/",
        "http://host:hunter2/",
    ],
)
def test_a_uri_that_cannot_be_used_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ValueError) as caught:
        Authenticator([uri])
    assert "hunter2" not in str(caught.value)


async def test_no_password_gets_into_a_log_or_an_error(
    tmp_path: Path, web: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "logins"
    file.write_text("ann:hunter2hash\nhunter2\n")
    uris = (f"file://{file}", program(tmp_path, "exit 9"), f"{web}/wrong", "http://127.0.0.1:1/")
    for uri in uris:
        with suppress(AuthUnavailable):
            await auth.parse_backend(uri).check(plain("ann", "hunter2"))
    for uri in uris[1:]:
        with pytest.raises(AuthUnavailable) as caught:
            await auth.parse_backend(uri).check(plain("ann", "hunter2"))
        assert "hunter2" not in str(caught.value)
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(plain("ann", "hunter2"))
