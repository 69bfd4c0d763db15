"""``mailerq`` alone: the daemon, a thin shell around `mailerq.engine.Engine`."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import mailerq
from mailerq import __version__, faults
from mailerq.cli import logs
from mailerq.cli.common import Parser, complain
from mailerq.cli.serving import (
    RELOAD_SIGNAL,
    STOP_SIGNALS,
    fail,
    join,
    obey,
    overdue_seconds,
    prepare,
    stop_soon,
)
from mailerq.config import SETTINGS, Config
from mailerq.errors import ConfigError, PluginError, QueueError
from mailerq.locks import FileLock, Held
from mailerq.privileges import as_owner
from mailerq.queues.opening import make_directory

if TYPE_CHECKING:
    from mailerq.cli.reloading import Source

__all__ = ["lock_place", "main", "open_lock"]

log = logging.getLogger("mailerq")

DESCRIPTION: Final = """\
A mail transfer agent. Without a command it is the daemon and stays in the foreground.

commands:
  mailerq rcpt@… [--envelope A] [--extract-recipients] [--ignore-dot]
                         take one mail from stdin; sendmail's -t -i -f A -bs -bp -q work too
  mailerq queue …        look into the queues and take messages out of them
  mailerq pause …        pause mail to domains, sites or providers, from addresses, or with a tag
  mailerq suppress …     fail mail to some recipients at once
  mailerq error …        force a reply for some mail; 'mailerq rows list' shows all three
  mailerq explain        where mail to an address would go, what holds it, and which lines say so
  mailerq cluster list   the instances of the cluster (also --list-cluster)
  mailerq status         how the running daemon is
  mailerq top            what waits for each site, how fast it goes, and what limits it
  mailerq trace          what its sessions say while they run, without secrets
  mailerq reload         have the running daemon read its settings anew
  mailerq config         all settings, their values, and where each was set
  mailerq check-config   whether a daemon would start with these settings
  mailerq check          what is wrong with a document or a mail, and what of it is ignored
  mailerq plugin check   whether plugins can be used, and what is wrong with them
  mailerq dkim …         make keys that sign mail, show their DNS records, and compare both
  mailerq sts …          the MTA-STS policies of recipients' domains
  mailerq tls-report …   the reports about TLS for recipients' domains
  mailerq verp …         signed return addresses
  mailerq report parse   what a mail would be recognised as: a bounce, a complaint, …
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
    parser.add_argument("--include-dir", action="store_true", help="show where mailerq.h is")
    # The reference's switch for what this program already is.
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
    if options.include_dir:
        if (directory := _include_directory()) is None:
            parser.exit(os.EX_UNAVAILABLE, "mailerq: mailerq.h is not installed\n")
        sys.stdout.write(f"{directory}\n")
        return os.EX_OK
    config = Config.load(settings)
    try:
        with _lock(config):
            logs.configure(config)
            return _run(config, settings)
    except QueueError as error:
        complain(str(error))
        return os.EX_TEMPFAIL


def _include_directory() -> str | None:
    """The place of ``mailerq.h``: beside this package in a source tree, or where pip put it."""
    package = os.path.dirname(os.path.abspath(mailerq.__file__))
    directory = os.path.join(os.path.dirname(package), "include")
    if os.path.exists(os.path.join(directory, "mailerq.h")):
        return directory
    from importlib.metadata import PackageNotFoundError, files

    with suppress(PackageNotFoundError):
        for file in files("mailerq") or ():
            if file.name == "mailerq.h":
                return os.path.dirname(os.path.realpath(str(file.locate())))
    return None


def _meant(switch: str) -> str:
    """A hint at the switch that may be meant."""
    import difflib  # only for an error text

    name = switch.removeprefix("--").partition("=")[0]
    known = [setting.key for setting in SETTINGS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean --{close[0]}?" if close else "; see 'mailerq --help'"


def _print_help(parser: Parser) -> None:
    """Print the settings from their table, by groups."""
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


def lock_place(config: Config) -> tuple[str, str, str]:
    """The pid file, the setting that names it, and the account that owns it beside root."""
    if config.lock:
        return config.lock, "lock", ""
    return os.path.join(config.queue_directory, "mailerq.pid"), "queue-directory", config.user


def open_lock(path: str, flags: int = 0) -> int:
    """Open the pid file. Raises OSError, also for a file that others may have planted."""
    flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o644)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        os.close(file)
        raise PermissionError(
            errno.EPERM,
            "it is no file of this account alone; remove it, or have the lock in a directory that "
            "others cannot write to",
        )
    return file


@contextmanager
def _lock(config: Config) -> Iterator[None]:
    """Hold the pid file. Raises `ConfigError` if another process holds it.

    The queue has a lock for each share. The pid file stands for the whole daemon: it is taken
    before anything else is opened, and names the process to ask or to stop.
    """
    make_directory(config.queue_directory, config.user)
    path, key, user = lock_place(config)
    directory = os.path.dirname(path) or "."
    where = config.origin(key)
    try:
        with as_owner(directory, user):
            lock = _locked(path, where, key)
    except OSError as error:
        whose = f" as {user}" if user else ""
        raise ConfigError(where, f"{key}: cannot open {path}{whose}: {error.strerror}") from None
    lock.write(str(os.getpid()))
    try:
        yield
    finally:
        with suppress(OSError):  # a plugin may have closed the file
            lock.check()
            _give_up(lock, path, directory)


def _give_up(lock: FileLock, path: str, directory: str) -> None:
    """Release the lock and leave no stale process id behind."""
    try:
        with as_owner(directory):
            os.unlink(path)
    except OSError:
        # Perhaps no longer root, or the disk is read-only.
        with suppress(OSError):
            lock.write("")
    lock.close()


def _locked(path: str, where: str, key: str) -> FileLock:
    """Take the lock. Raises `ConfigError`, and OSError for a file that cannot be opened."""
    while True:
        try:
            lock = FileLock(open_lock(path, os.O_CREAT))
        except Held as held:
            raise ConfigError(
                where,
                f"{key}: another mailerq is running (process {held.holder}), {path} is locked; "
                f"stop it, or give this one a {key} of its own",
            ) from None
        # The previous holder may have removed the file between our open and our lock.
        try:
            if os.path.samestat(os.fstat(lock.fd), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        lock.close()


def _run(config: Config, settings: list[str]) -> int:
    import trio

    from mailerq.cli.reloading import Source

    source = Source(settings)

    try:
        if config.smtp_processes > 1:
            from mailerq.cli.supervisor import parent

            return trio.run(parent.serve, config, source)
        prepare(config)
        return trio.run(_serve, config, source)
    except (ConfigError, PluginError, QueueError):
        raise
    except Exception as error:
        fail(error)


async def _serve(config: Config, source: Source) -> int:
    import trio

    from mailerq.cli.reloading import Reloader
    from mailerq.engine import Engine

    stop, started = trio.Event(), trio.Event()
    failure: Exception | None = None
    engine = Engine(config, commands={"reload": lambda request: reloader.answer()})
    reloader = Reloader(source, engine)

    def hang_up() -> None:
        if not stop.is_set():
            reloader.hang_up(now=started.is_set())

    with trio.open_signal_receiver(*STOP_SIGNALS, RELOAD_SIGNAL) as signals:
        faults.set_deadline(overdue_seconds(config), STOP_SIGNALS)
        async with trio.open_nursery() as nursery:
            stopping = partial(stop_soon, engine, started, stop)
            nursery.start_soon(partial(obey, signals, stop, stop=stopping, reload=hang_up))
            try:
                async with engine:
                    started.set()
                    reloader.started()
                    log.info("mailerq %s listens on %s", __version__, join(engine.addresses))
                    await stop.wait()
                log.info("stopped")
            except (ConfigError, PluginError, QueueError) as error:
                failure = error  # Leave the nursery as the error itself, not as a group.
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return os.EX_OK
