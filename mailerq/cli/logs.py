"""The application log of the daemon: messages of the program about itself."""

from __future__ import annotations

import errno
import logging
import logging.handlers
import os
import pwd
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import Final

from mailerq import faults
from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.escaping import escape
from mailerq.message import format_time
from mailerq.privileges import as_account

__all__ = ["account_of", "configure", "handlers", "install", "names"]

_LEVELS: Final = {
    logging.WARNING: "Warning",
    logging.ERROR: "Warning",
    logging.CRITICAL: "Critical",
}


class _Formatter(logging.Formatter):
    """``[Level] [YYYY-MM-DD HH:MM:SS] text``, the text escaped to one line.

    Traceback lines follow indented, so that none of them looks like a record. Texts of plugins
    start with the plugin's name in brackets. With several processes, the name of the process comes
    before the text.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelno, "Info")
        text = escape(self._who + record.getMessage())
        text = f"[{level}] [{format_time(record.created)}] {text}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            text += "".join(f"\n  {escape(line)}" for line in trace.splitlines())
        return text


class _File(logging.FileHandler):
    """A file for appended lines; when logrotate has moved it, a new one is opened.

    With an `account`, root writes where that account may write, and processes with both accounts
    write into one file. So a new file belongs to the account, symbolic links are not followed,
    pipes are not waited for, and the directory stays the one of the start.
    """

    def __init__(self, path: str, account: pwd.struct_passwd | None) -> None:
        self._account = account
        self._path = path
        self._directory: int | None = None
        if account is not None:
            self._path = os.path.basename(path)
            directory = os.path.dirname(path)
            self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            super().__init__(path, encoding="utf-8")
        except OSError:
            self._close_directory()
            raise

    def _open(self) -> TextIOWrapper:
        # An old file may belong to another account: only a new file gets its owner from us.
        if self._account is None:
            return open(self._path, "a", encoding="utf-8")
        try:
            file = self._open_new(self._account)
        except PermissionError:  # root with few capabilities, in a directory of the account
            with as_account(self._account.pw_uid, self._account.pw_gid):
                file = self._open_new(self._account)
        return open(file, "a", encoding="utf-8")

    def _open_new(self, account: pwd.struct_passwd) -> int:
        """Open the file, and give it to the account if it is new."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            new = flags | os.O_CREAT | os.O_EXCL
            file = os.open(self._path, new, 0o640, dir_fd=self._directory)
        except FileExistsError:
            return os.open(self._path, flags, dir_fd=self._directory)
        if os.geteuid() == 0:
            os.fchown(file, account.pw_uid, account.pw_gid)
        return file

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; into the old file while the new one cannot be opened."""
        with suppress(OSError):
            self._follow()
        with suppress(OSError):
            super().emit(record)

    def _follow(self) -> None:
        if self.stream is None:
            return
        try:
            there = os.stat(
                self._path, dir_fd=self._directory, follow_symlinks=self._account is None
            )
        except FileNotFoundError:
            pass
        else:
            if os.path.samestat(there, os.fstat(self.stream.fileno())):
                return
        # Keep the number: another thread may be about to write to it, and last lines go there.
        with self._open() as fresh:
            os.dup2(fresh.fileno(), self.stream.fileno(), inheritable=False)

    def close(self) -> None:
        super().close()
        self._close_directory()

    def _close_directory(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None


def configure(config: Config, who: str = "") -> None:
    """Send the program's log to the places in `application-log`. Raises `ConfigError`.

    `who` stands before each text.
    """
    install(handlers(config), who)


def handlers(config: Config) -> list[logging.Handler]:
    """Open the places in `application-log`, for `install`. Raises `ConfigError`."""
    opened: list[logging.Handler] = [logging.NullHandler()]
    try:
        for name in names(config.application_log):
            opened.append(_handler(name, config))
    except ConfigError:
        for handler in opened:
            handler.close()
        raise
    return opened


def install(opened: list[logging.Handler], who: str) -> None:
    """Log to these places, and close the previous ones."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    before = root.handlers[:]
    for handler in opened:
        handler.setFormatter(_Formatter(who))
        root.addHandler(handler)
    # A full disk or a lost reader costs log lines; a traceback to nowhere helps nobody.
    logging.raiseExceptions = False
    faults.report_to(_last_lines(opened), who)
    for handler in before:
        root.removeHandler(handler)
        handler.close()


def _last_lines(handlers: list[logging.Handler]) -> Iterator[tuple[int, bytes]]:
    """Where the core writes last lines when this process can no longer log, and their prefixes."""
    stderr = -1 if sys.__stderr__ is None else sys.__stderr__.fileno()
    if stderr >= 0:
        yield stderr, b""
    for handler in handlers:
        match handler:
            case logging.StreamHandler(stream=stream) if stream.fileno() != stderr:
                yield stream.fileno(), b""
            case logging.handlers.SysLogHandler():
                priority = handler.encodePriority(handler.facility, handler.LOG_CRIT)
                yield vars(handler)["socket"].fileno(), b"<%d>" % priority


def names(text: str) -> list[str]:
    """The places named in `application-log`."""
    return [name for part in re.split("[;,]", text) if (name := part.strip())]


def _handler(name: str, config: Config) -> logging.Handler:
    where = config.origin("application-log")
    account = account_of(config)
    try:
        match name:
            case "stderr":
                return logging.StreamHandler(sys.stderr)
            case "stdout":
                return logging.StreamHandler(sys.stdout)
            case "syslog":
                return logging.handlers.SysLogHandler(
                    "/dev/log", facility=logging.handlers.SysLogHandler.LOG_MAIL
                )
        return _File(os.path.abspath(name), account)
    except OSError as error:
        if account is not None and error.errno == errno.ELOOP:
            raise ConfigError(
                where,
                f"application-log: {name} is a symbolic link; root does not follow one where "
                f"{config.user}, the account of user, may have made it",
            ) from None
        raise ConfigError(
            where, f"application-log: cannot write to {name}: {error.strerror or error}"
        ) from None


def account_of(config: Config) -> pwd.struct_passwd | None:
    """The account that a root process changes to; None if not root, or if that account is root."""
    if not config.user or os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam(config.user)
    except KeyError:
        return None  # The engine reports it.
    return account if account.pw_uid else None
