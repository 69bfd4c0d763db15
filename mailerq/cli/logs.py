"""The application log of the daemon: what the program has to say about itself."""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from typing import Final

from mailerq.config import Config
from mailerq.errors import ConfigError
from mailerq.message import format_time
from mailerq.net.logs import escape

__all__ = ["configure"]

_LEVELS: Final = {
    logging.WARNING: "Warning",
    logging.ERROR: "Warning",
    logging.CRITICAL: "Critical",
}


class _Formatter(logging.Formatter):
    """``[Level] [YYYY-MM-DD HH:MM:SS] text``, the text escaped to one line.

    What plugins have to say starts with their name in brackets. Before the text stands who says it
    where there are several.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelno, "Info")
        text = escape(self._who + record.getMessage())
        text = f"[{level}] [{format_time(record.created)}] {text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def configure(config: Config, who: str = "") -> None:
    """Send what the program logs to where `application-log` says. Raises `ConfigError`.

    `who` stands before each text.
    """
    handlers: list[logging.Handler] = [logging.NullHandler()]
    handlers += [_handler(name, config) for name in _names(config.application_log)]
    for handler in handlers:
        handler.setFormatter(_Formatter(who))
    logging.basicConfig(
        level=logging.INFO, handlers=handlers or [logging.NullHandler()], force=True
    )
    # A full disk or a reader that went away costs log lines; a traceback to nowhere helps nobody.
    logging.raiseExceptions = False


def _names(text: str) -> list[str]:
    return [name for part in re.split("[;,]", text) if (name := part.strip())]


def _handler(name: str, config: Config) -> logging.Handler:
    where = config.origin("application-log")
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
        return logging.handlers.WatchedFileHandler(os.path.abspath(name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            where, f"application-log: cannot write to {name}: {error.strerror or error}"
        ) from None
