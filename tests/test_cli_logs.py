"""The application log in a file, when logrotate moves it and when root writes it for an account."""

from __future__ import annotations

import logging
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailerq.cli import logs
from mailerq.config import Config
from mailerq.errors import ConfigError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has an account to change to")

ACCOUNT = "nobody"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The logger of the program; what the tests do to logging is undone."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    for handler in before:
        root.removeHandler(handler)
    yield logging.getLogger("mailerq")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in before:
        root.addHandler(handler)
    root.setLevel(level)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the account may write."""
    path = tmp_path / "log"
    path.mkdir()
    if os.geteuid() == 0:
        account = pwd.getpwnam(ACCOUNT)
        os.chown(path, account.pw_uid, account.pw_gid)
    return path


def configure(path: Path, **more: object) -> None:
    logs.configure(Config(application_log=str(path), **more))  # type: ignore[arg-type]


def test_what_others_say_is_one_line_that_deceives_nobody(
    log: logging.Logger, directory: Path
) -> None:
    configure(directory / "app")
    log.warning("peer said %s", "\x1b[31m\u202egnp\xa0\u200b\\ \n[Info] forged")
    try:
        raise ValueError("a\n[Info] [2026-01-01 00:00:00] forged\u2028[Info] too\x1b")
    except ValueError:
        log.critical("failed", exc_info=True)
    first, second, *trace = (directory / "app").read_text().splitlines()
    assert first.endswith(r"peer said \x1b[31m\u202egnp\xa0\u200b\\ \x0a[Info] forged")
    assert second.endswith("] failed")
    assert all(line.startswith("  ") and line.isprintable() for line in trace)
    assert trace[-1].endswith(r"[Info] too\x1b")


def test_lines_go_into_a_new_file_when_the_old_one_was_moved(
    log: logging.Logger, directory: Path
) -> None:
    configure(directory / "app")
    log.info("one")
    (directory / "app").rename(directory / "app.1")
    log.info("two")
    assert (directory / "app.1").read_text().endswith("one\n")
    assert (directory / "app").read_text().endswith("two\n")


def test_lines_go_on_into_the_old_file_while_no_new_one_can_be_opened(
    log: logging.Logger, directory: Path
) -> None:
    configure(directory / "app")
    (directory / "app").rename(directory / "app.1")
    (directory / "app").mkdir()
    log.info("one")
    (directory / "app").rmdir()
    log.info("two")
    assert (directory / "app.1").read_text().endswith("one\n")
    assert (directory / "app").read_text().endswith("two\n")


def test_a_link_is_followed_where_no_account_could_have_made_it(
    log: logging.Logger, directory: Path
) -> None:
    (directory / "app").symlink_to("other")
    configure(directory / "app")
    log.info("one")
    assert (directory / "other").read_text().endswith("one\n")


@as_root
def test_a_file_that_root_makes_belongs_to_the_account(
    log: logging.Logger, directory: Path
) -> None:
    configure(directory / "app", user=ACCOUNT)
    (directory / "app").rename(directory / "app.1")
    log.info("one")
    for name in ("app", "app.1"):
        status = (directory / name).stat()
        assert status.st_uid == pwd.getpwnam(ACCOUNT).pw_uid
        assert stat.S_IMODE(status.st_mode) == 0o640


@as_root
def test_root_follows_no_link_of_the_account(log: logging.Logger, directory: Path) -> None:
    precious = directory / "precious"
    precious.write_text("data")
    (directory / "app").symlink_to("precious")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        configure(directory / "app", user=ACCOUNT)
    (directory / "app").unlink()
    configure(directory / "app", user=ACCOUNT)
    (directory / "app").rename(directory / "app.1")
    (directory / "app").symlink_to("precious")
    log.info("one")
    (directory / "app").unlink()
    os.mkfifo(directory / "app")
    log.info("two")
    assert [line[-3:] for line in (directory / "app.1").read_text().splitlines()] == ["one", "two"]
    assert precious.read_text() == "data"


@as_root
def test_root_follows_no_directory_of_the_account(log: logging.Logger, directory: Path) -> None:
    (directory / "a").mkdir()
    (directory / "b").mkdir()
    configure(directory / "a" / "app", user=ACCOUNT)
    (directory / "a").rename(directory / "c")
    (directory / "a").symlink_to("b")
    log.info("one")
    assert (directory / "c" / "app").read_text().endswith("one\n")
    assert list((directory / "b").iterdir()) == []


@as_root
def test_the_account_writes_on_into_the_old_file_while_it_may_not_open_the_new_one(
    log: logging.Logger, directory: Path
) -> None:
    configure(directory / "app", user=ACCOUNT)
    (directory / "app").rename(directory / "app.1")
    (directory / "app").touch(mode=0o600)
    os.seteuid(pwd.getpwnam(ACCOUNT).pw_uid)
    try:
        log.info("one")
    finally:
        os.seteuid(0)
    assert (directory / "app.1").read_text().endswith("one\n")


@as_root
def test_root_and_the_account_write_into_one_file_after_the_old_one_was_moved(
    log: logging.Logger, directory: Path
) -> None:
    configure(directory / "app", user=ACCOUNT)
    root = logging.getLogger()
    of_account, root.handlers = root.handlers, []
    configure(directory / "app", user=ACCOUNT)
    (directory / "app").rename(directory / "app.1")
    log.info("of root")
    of_root, root.handlers = root.handlers, of_account
    os.seteuid(pwd.getpwnam(ACCOUNT).pw_uid)
    try:
        log.info("of the account")
    finally:
        os.seteuid(0)
    root.handlers = of_account + of_root
    assert "of root\n" in (directory / "app").read_text()
    assert (directory / "app").read_text().endswith("of the account\n")
