"""``mailerq`` alone: the daemon, a thin shell around `mailerq.engine.Engine`."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mailerq import __version__, faults
from mailerq.cli import logs
from mailerq.cli.common import Parser, complain
from mailerq.cli.serving import HURRY_SECONDS, OVERDUE_SECONDS, end_at_once, join, prepare
from mailerq.config import SETTINGS, Config
from mailerq.errors import ConfigError, PluginError, QueueError

if TYPE_CHECKING:
    import trio

    from mailerq.engine import Engine

__all__ = ["main"]

log = logging.getLogger("mailerq")

DESCRIPTION: Final = """\
A mail transfer agent. Without a command it is the daemon and stays in the foreground.

commands:
  mailerq rcpt@… [--envelope A] [--extract-recipients] [--ignore-dot]
                         take one mail from stdin; sendmail's -t -i -f A -oi work too
  mailerq queue …        look into the queues and take messages out of them
  mailerq status         how the running daemon is
  mailerq config         all settings, their values, and where each was set
  mailerq check-config   whether a daemon would start with these settings
  mailerq plugin check   whether plugins can be used, and what is wrong with them
  mailerq sink           a receiving server for trying and testing
"""

EPILOG: Final = """\
Every setting is a switch, a line "key: value" in /etc/mailerq/config.txt or the file of
--config-file, and an environment variable: --smtp-port=2525, "smtp-port: 2525",
MAILERQ_SMTP_PORT=2525. The command line wins, then the environment, then --config-file.
"""


def main(settings: list[str], rest: list[str]) -> int:
    """Run the daemon until SIGTERM or SIGINT."""
    parser = Parser(
        prog="mailerq",
        usage="mailerq [--config-file FILE] [--SETTING=VALUE …] [command …]",
        description=DESCRIPTION,
        epilog=EPILOG,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    parser.add_argument("--version", action="version", version=f"mailerq {__version__}")
    # The switch of the reference that says what we are anyway.
    parser.add_argument("--daemon", action="store_true", help="be the daemon, as without it")
    parser.add_argument("--config-file", metavar="FILE", help="more settings, over those in /etc")
    options, unknown = parser.parse_known_args(rest)
    for word in unknown:
        if word.startswith("--"):
            raise ConfigError(word.partition("=")[0], f"unknown setting{_meant(word)}")
        parser.error(f"there is no command {word!r}; an address needs an @")
    if options.help:
        _print_help(parser)
        return os.EX_OK
    config = Config.load(settings)
    with _lock(config):
        try:
            logs.configure(config)
            return _run(config)
        except QueueError as error:
            complain(str(error))
            return os.EX_TEMPFAIL


def _meant(switch: str) -> str:
    """A hint at what somebody may have meant."""
    import difflib  # only for a text about an error

    name = switch.removeprefix("--").partition("=")[0]
    known = [setting.key for setting in SETTINGS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean --{close[0]}?" if close else "; see 'mailerq --help'"


def _print_help(parser: Parser) -> None:
    """The settings come from their table, by groups."""
    groups = {setting.group: parser.add_argument_group(setting.group) for setting in SETTINGS}
    for setting in SETTINGS:
        unit = f" ({setting.unit})" if setting.unit else ""
        default = f" [{setting.default_text}]" if setting.default_text else ""
        groups[setting.group].add_argument(
            f"--{setting.key}",
            metavar=setting.kind.name,
            help=f"{setting.text}{unit}{default}".replace("%", "%%"),
        )
    parser.print_help()


@contextmanager
def _lock(config: Config) -> Iterator[None]:
    """Hold the pid file. Raises `ConfigError` when another process does."""
    path = config.lock or os.path.join(tempfile.gettempdir(), "mailerq.pid")
    file = _locked(path, config.origin("lock"))
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    try:
        yield
    finally:
        try:
            os.unlink(path)
        except OSError:
            os.ftruncate(file, 0)  # No longer root, perhaps. Nobody's process id is left in it.
        os.close(file)


def _locked(path: str, where: str) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(where, f"lock: cannot open {path}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(file, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise ConfigError(
                where,
                f"lock: another mailerq is running (process {holder}), {path} is locked; "
                "stop it, or give this one a lock of its own",
            ) from None
        # The holder before us may have removed the file between our open and our lock.
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        os.close(file)


def _run(config: Config) -> int:
    import trio

    try:
        if config.smtp_processes > 1:
            from mailerq.cli import parent

            return trio.run(parent.serve, config)
        prepare(config)
        return trio.run(_serve, config)
    except (ConfigError, PluginError, QueueError):
        raise
    except Exception:
        log.critical("the engine failed", exc_info=True)
        return os.EX_SOFTWARE


async def _serve(config: Config) -> int:
    import trio

    from mailerq.engine import Engine

    stop = trio.Event()
    failure: Exception | None = None
    engine = Engine(config)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        seconds = config.shutdown_timeout + OVERDUE_SECONDS
        faults.set_deadline(seconds, (signal.SIGINT, signal.SIGTERM))
        async with trio.open_nursery() as nursery:
            started = trio.Event()
            nursery.start_soon(_watch, signals, engine, started, stop)
            try:
                async with engine:
                    started.set()
                    log.info("mailerq %s listens on %s", __version__, join(engine.addresses))
                    await stop.wait()
                log.info("stopped")
            except (ConfigError, PluginError, QueueError) as error:
                failure = error  # Out of the nursery as it is, not as a group.
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return os.EX_OK


async def _watch(
    signals: AsyncIterator[int], engine: Engine, started: trio.Event, stop: trio.Event
) -> None:
    """The first signal stops the engine in its time, the second one ends the process.

    That is safe at any moment: what was accepted is on disk. SIGHUP reloads certificates.
    """
    async for number in signals:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            if started.is_set():
                _reload(name, engine)
        elif not stop.is_set():
            log.info("%s: stopping", name)
            stop.set()
            if not started.is_set():
                engine.plugins.timeout = HURRY_SECONDS
        else:
            end_at_once(number)


def _reload(name: str, engine: Engine) -> None:
    try:
        engine.reload()
    except ConfigError as error:
        log.error("%s: the certificate stays as it was: %s", name, error)
    else:
        log.info("%s: the certificate is read; moved log files are opened anew by themselves", name)
