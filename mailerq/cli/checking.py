"""``mailerq check-config``: whether a daemon would start with these settings.

It checks everything that a start opens, as the account that opens it, and reports all mistakes, not
only the first. It makes, changes and keeps open nothing. A daemon that runs with these settings
goes on, and what it has in use is no mistake.
"""

from __future__ import annotations

import logging
import os
import pwd
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from typing import Any, Final

import trio

from mailerq import inspection
from mailerq.address import parse_lmtp, parse_mailbox
from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, print_json
from mailerq.cli.daemon import lock_place, open_lock
from mailerq.cli.logs import account_of, names
from mailerq.config import Config
from mailerq.errors import AddressError, ConfigError, Problem, RowError
from mailerq.escaping import escape
from mailerq.inbound.addresses import LocalAddresses
from mailerq.inbound.auth import parse_backend
from mailerq.inbound.listener import unusable
from mailerq.live import alike
from mailerq.locks import holder_of
from mailerq.net import unbound
from mailerq.net.client_tls import ClientTls
from mailerq.net.dane import Dane
from mailerq.net.resolver import Resolver
from mailerq.net.tls import tls_context, try_handshake
from mailerq.privileges import as_owner
from mailerq.queues.opening import broker_problem, share_files
from mailerq.rules.answers import Answers
from mailerq.rules.local_ips import LocalIps
from mailerq.rules.reporting import Reports
from mailerq.rules.shaping import Shaping
from mailerq.rules.signing import SigningFile
from mailerq.rules.steering import Steering
from mailerq.storage.opening import storage_problem
from mailerq.store.row_file import FILE_NAME as ROWS_NAME
from mailerq.store.row_file import RowFile
from mailerq.store.signing_keys import has_key, keyless, survey

__all__ = ["examine_changes", "main", "unset"]

log = logging.getLogger("mailerq")

SYSLOG: Final = "/dev/log"

MAX_NAMED: Final = 20
"""Keys with mistakes that are named."""

LOG_FILES: Final = ("send-log-file", "received-log-file", "refused-log-file")


def main(settings: list[str], rest: list[str]) -> int:
    """Check the settings: 0 when a daemon would start, 1 when it would not."""
    parser = command_parser(
        "check-config",
        "Check the settings and what they point to, all that a start needs. Nothing is started or "
        "changed. Exit status: 0 it would start, 1 it would not.",
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options, unknown = parser.parse_known_args(rest)
    problems: list[Problem] = []
    config = Config.load([*settings, *unknown], problems=problems)
    with _warnings() as notes:
        problems += _examine(config, unset(config, problems))
        notes += _notes(config)
    if options.json:
        print_json({
            "ok": not problems,
            "problems": [problem._asdict() for problem in problems],
            "notes": notes,
        })  # fmt: skip
    else:
        for note in notes:
            sys.stdout.write(f"note: {escape(note)}\n")
        for problem in problems:
            complain(str(problem))
        if problems:
            count = f"{len(problems)} mistakes" if len(problems) > 1 else "1 mistake"
            complain(f"{count}: a daemon would not start")
        else:
            sys.stdout.write("the configuration is good\n")
    return 1 if problems else os.EX_OK


def unset(config: Config, problems: list[Problem]) -> set[str]:
    """The settings that are wrong in every layer, so their targets are unknown."""
    keys = {problem.key for problem in problems if problem.key}
    return {key for key in keys if config.origin(key) == "default"}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The log warnings of a start."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("mailerq")
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)


def _examine(config: Config, wrong: set[str]) -> Iterator[Problem]:
    """Run every check whose settings can be used."""
    running = _running(config)
    for keys, check in AS_STARTED:
        if wrong.isdisjoint(keys):
            yield from check(config, running)
    try:
        with _as_user(config):
            found = [check(config, running) for keys, check in AS_USER if wrong.isdisjoint(keys)]
            problems = list(chain.from_iterable(found))
    except OSError as error:
        text = f"cannot become {config.user}: {error.strerror}"
        problems = [_problem(config, "user", text)]
    yield from problems


def examine_changes(config: Config, before: Config, wrong: set[str]) -> Iterator[Problem]:
    """Settings changed since `before` that a running daemon could not use."""
    for keys, check in (*AS_STARTED, *AS_USER):
        names = [key.replace("-", "_") for key in keys]
        if check in AS_RUNNING and wrong.isdisjoint(keys) and not alike(config, before, *names):
            yield from check(config, None)


def _running(config: Config) -> dict[str, Any] | None:
    """The status of the daemon on this queue directory; None if none answers."""
    try:
        reply = control.ask(config.queue_directory, "status")
    except OSError:
        return None
    return reply if isinstance(reply.get("pid"), int) else None


@contextmanager
def _as_user(config: Config) -> Iterator[None]:
    """Take the rights of the daemon after its change to the account of `user`.

    Raises OSError if this process may not.
    """
    account = account_of(config)
    with ExitStack() as stack:
        if account is not None:
            stack.callback(os.setgroups, os.getgroups())
            os.initgroups(account.pw_name, account.pw_gid)
            stack.callback(os.setegid, os.getegid())
            os.setegid(account.pw_gid)
            os.seteuid(account.pw_uid)
            stack.callback(os.seteuid, 0)
        yield


Running = dict[str, Any] | None
Check = Callable[[Config, Running], Iterator[Problem]]


def _problem(config: Config, key: str, text: str) -> Problem:
    return Problem(config.origin(key), f"{key}: {text}", key)


# Steps of a start before it changes its account


def _check_user(config: Config, running: Running) -> Iterator[Problem]:
    if not config.user:
        return
    try:
        pwd.getpwnam(config.user)
    except KeyError:
        yield _problem(config, "user", f"{config.user}: no such account")
        return
    if os.geteuid() != 0:
        yield _problem(config, "user", f"cannot become {config.user}: only root can, check as root")


def _check_plugins(config: Config, running: Running) -> Iterator[Problem]:
    """Examine each plugin in a process of its own, which contains its side effects."""
    try:
        paths = inspection.plugins_in(config.plugin_directory)
    except FileNotFoundError:
        return
    except OSError as error:
        text = f"{config.plugin_directory}: {error.strerror}"
        yield _problem(config, "plugin-directory", text)
        return
    account = account_of(config)
    owners = () if account is None else (account.pw_uid,)
    for path in paths:
        for finding in inspection.examine(path, owners=owners).findings:
            if finding.level == "error":
                yield _problem(config, "plugin-directory", f"{path}: {finding.text}")
            else:
                log.warning("%s: %s", path, finding.text)


def _check_tls(config: Config, running: Running) -> Iterator[Problem]:
    try:
        context = tls_context(config)
    except ConfigError as error:
        yield from error.problems
        return
    if context is not None and (problem := try_handshake(context, config.smtp_certificate)):
        text = f"cannot use {config.smtp_certificate}: {problem}"
        yield _problem(config, "smtp-certificate", text)


def _check_auth(config: Config, running: Running) -> Iterator[Problem]:
    for uri in config.smtp_auth:
        try:
            parse_backend(uri)
        except ValueError as error:
            yield _problem(config, "smtp-auth", str(error))


def _reads(read: Callable[[Config], object]) -> Check:
    """A check that reads something as a start does."""

    def check(config: Config, running: Running) -> Iterator[Problem]:
        try:
            read(config)
        except ConfigError as error:
            yield from error.problems

    return check


_check_client_tls: Final = _reads(ClientTls.of)
_check_addresses: Final = _reads(LocalAddresses.of)
_check_steering: Final = _reads(Steering.of)
_check_limits: Final = _reads(Shaping.of)
_check_signing: Final = _reads(SigningFile.of)


def _check_responses(config: Config, running: Running) -> Iterator[Problem]:
    try:
        providers = Shaping.of(config).providers
        Answers.of(config, providers)
    except ConfigError as error:
        yield from (problem for problem in error.problems if problem.key == "responses-file")


def _check_validator(config: Config, running: Running) -> Iterator[Problem]:
    return unbound.problems(config)


def _check_ports(config: Config, running: Running) -> Iterator[Problem]:
    ours = {address.rpartition(":")[2] for address in (running or {}).get("listening", ())}
    for port, error in unusable(config):
        if str(port) not in ours:
            yield from error.problems


def _check_lock(config: Config, running: Running) -> Iterator[Problem]:
    path, key, user = lock_place(config)
    directory = os.path.dirname(path) or "."
    if not config.lock and not os.path.isdir(directory):
        return  # The start creates it, or `_check_queue` reports the reason.
    try:
        with as_owner(directory, user):
            lock = open_lock(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        if reason := _cannot_make(path) if missing else error.strerror:
            yield _problem(config, key, f"cannot open {path}: {reason}")
        return
    pid = holder_of(lock)
    if pid is not None and (running is None or str(running["pid"]) != pid):
        text = f"another mailerq is running (process {pid}), {path} is locked"
        yield _problem(config, key, text)


def _check_application_log(config: Config, running: Running) -> Iterator[Problem]:
    flags = os.O_NOFOLLOW if account_of(config) is not None else 0
    for name in names(config.application_log):
        if name == "syslog":
            reason = _no_syslog()
        elif name in ("stdout", "stderr"):
            reason = None
        else:
            reason = _cannot_append(os.path.abspath(name), flags)
        if reason:
            yield _problem(config, "application-log", f"cannot write to {name}: {reason}")


def _no_syslog() -> str | None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        try:
            sock.connect(SYSLOG)
        except OSError as error:
            return error.strerror
    return None


# Steps of a start after it has changed its account


def _check_queue(config: Config, running: Running) -> Iterator[Problem]:
    directory = config.queue_directory
    try:
        os.stat(directory)
    except FileNotFoundError:
        if reason := _cannot_make(directory, parents=True):
            yield _problem(config, "queue-directory", f"{directory} cannot be made: {reason}")
        return
    except OSError as error:
        text = f"{_who()} cannot reach {directory}: {error.strerror}"
        yield _problem(config, "queue-directory", text)
        return
    for path, file, lock in share_files(directory):
        if not os.path.isdir(path):
            yield _problem(config, "queue-directory", f"{path} is no directory")
            continue
        both = os.R_OK | os.W_OK
        for name, mode in ((path, both | os.X_OK), (file, both), (lock, both)):
            if os.path.lexists(name) and not os.access(name, mode, effective_ids=True):
                text = f"{name} is not readable and writable for {_who()}"
                yield _problem(config, "queue-directory", text)
        if running is None and (pid := _holder(lock)):
            text = f"{lock} is held by another mailerq, process {pid}, that does not answer"
            yield _problem(config, "queue-directory", text)


def _holder(path: str) -> str | None:
    """The holder of a queue directory's lock."""
    try:
        return holder_of(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return None


def _check_broker(config: Config, running: Running) -> Iterator[Problem]:
    if (error := broker_problem(config)) is not None:
        yield from error.problems


def _check_storage(config: Config, running: Running) -> Iterator[Problem]:
    if (error := storage_problem(config)) is not None:
        yield from error.problems


def _check_logs(config: Config, running: Running) -> Iterator[Problem]:
    for key in LOG_FILES:
        path = config.text(key)
        if path and (reason := _cannot_append(os.path.abspath(path))):
            yield _problem(config, key, f"cannot write {path}: {reason}")


def _check_reports(config: Config, running: Running) -> Iterator[Problem]:
    try:
        Reports.of(config)
    except ConfigError as error:
        yield from error.problems
        return
    if config.verp_key_file and os.stat(config.verp_key_file).st_mode & stat.S_IROTH:
        log.warning("verp-key-file %s can be read by every account", config.verp_key_file)


AS_STARTED: Final[tuple[tuple[tuple[str, ...], Check], ...]] = (
    (("user",), _check_user),
    (("plugin-directory",), _check_plugins),
    (("smtp-certificate", "smtp-key", "smtp-ciphers"), _check_tls),
    (
        (
            "connection-ca-file",
            "connection-certificate",
            "connection-key",
            "connection-ciphers",
            "connection-tls-min",
        ),
        _check_client_tls,
    ),
    (("smtp-auth",), _check_auth),
    (("smtp-local-addresses",), _check_addresses),
    (("smtp-extract", "smtp-extract-range", "smtp-extract-logins"), _check_steering),
    (("dns-validator", "dns-trust-anchor"), _check_validator),
    (("limits-file", "addresses-file", "dns-helofile"), _check_limits),
    (("responses-file", "limits-file"), _check_responses),
    (("dsn-texts-file", "verp-key-file"), _check_reports),
    (("dkim-file", "dkim-directory"), _check_signing),
    (("smtp-ip", "smtp-port", "smtp-secure-port", "lmtp-port"), _check_ports),
    (("lock",), _check_lock),
    (("application-log", "user"), _check_application_log),
)
"""Each check with the settings it reads."""

AT_START: Final = (
    "smtp-certificate", "smtp-key", "smtp-local-addresses", "limits-file", "responses-file",
    "addresses-file", "dns-helofile", "dsn-texts-file", "verp-key-file", "connection-ca-file",
    "connection-certificate", "connection-key",
)  # fmt: skip
"""Files that a start reads before it changes its account."""

AS_USER: Final[tuple[tuple[tuple[str, ...], Check], ...]] = (
    (("queue-directory",), _check_queue),
    (("rabbitmq-address", "rabbitmq-host"), _check_broker),
    (("storage-address",), _check_storage),
    (LOG_FILES, _check_logs),
)

AS_RUNNING: Final = frozenset({
    _check_tls, _check_client_tls, _check_auth, _check_addresses, _check_steering, _check_validator,
    _check_limits, _check_responses, _check_reports, _check_application_log, _check_logs,
})  # fmt: skip
"""The checks that apply to a running daemon: it opens the rest only at its start."""


# Files


def _cannot_append(path: str, flags: int = 0) -> str | None:
    """Why no line can be appended to a file, or None. A new file is not created."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | flags))
    except FileNotFoundError:
        return _cannot_make(path)
    except OSError as error:
        return error.strerror
    return None


def _cannot_make(path: str, *, parents: bool = False) -> str | None:
    """Why nothing new can be created there, or None; with `parents` those are created too."""
    above = os.path.dirname(os.path.abspath(path))
    while True:
        try:
            found = os.stat(above)
            break
        except FileNotFoundError:
            if not parents:
                return f"there is no directory {above}"
            above = os.path.dirname(above)
        except OSError as error:
            return f"{_who()} cannot reach {above}: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{above} is no directory"
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        return f"{_who()} may not write into {above}"
    return None


def _who() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# Notes, which are no mistakes


def _unreadable(config: Config) -> Iterator[str]:
    """Files that root reads at the start, and that the account of `user` cannot read again."""
    for key in AT_START:
        path = config.text(key)
        if path and not os.access(path, os.R_OK, effective_ids=True):
            yield f"{key} {path} is read at the start only: {_who()} may not read it again"


def _foreign(config: Config) -> Iterator[str]:
    """Addresses to send from that this host does not have."""
    try:
        local = LocalIps.of(config)
    except ConfigError:  # reported before
        return
    for ip in dict.fromkeys(chain(local.default, *local.pools.values())):
        with closing(socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)) as sock:
            try:
                sock.bind((ip, 0))
            except OSError as error:
                yield f"mail cannot leave from {ip}: {error.strerror}"


def _keys(config: Config) -> Iterator[str]:
    """Keys that cannot sign, or that others can read, and domains without a key in force.

    A daemon starts, and their mail waits.
    """
    if not (config.dkim_directory or config.dkim_file):
        return
    try:
        file = SigningFile.of(config)
    except ConfigError:  # reported before
        file = SigningFile()
    found = []
    try:
        for each in survey(config.dkim_directory, file):
            if text := each.problem or each.note:
                found.append(f"the key {each.path} {text}")
        for domain, text in keyless(config.dkim_directory, file, time.time()):
            found.append(f"mail from {domain} cannot be signed: {text}")
    except OSError as error:
        found.append(f"dkim-directory: cannot read {error.filename}: {error.strerror}")
    yield from found[:MAX_NAMED]
    if len(found) > MAX_NAMED:
        more = len(found) - MAX_NAMED
        yield f"{more} more keys or domains have mistakes; 'mailerq dkim check' names all keys"


def _unsigned_reports(config: Config) -> Iterator[str]:
    """A sender of TLS reports whose domain has no key."""
    if not (config.tls_report and config.tls_report_from):
        return
    try:
        domain = parse_mailbox(config.tls_report_from, utf8=False).domain
        file = SigningFile.of(config)
        if has_key(config.dkim_directory, file, domain, time.time()):
            return
    except (AddressError, ConfigError, OSError):  # reported before
        return
    need = "" if config.dkim_directory else " after dkim-directory is set"
    yield (
        f"tls-report-from: no key signs mail from {domain}, and receivers refuse TLS reports"
        " without a DKIM signature (RFC 8460). Make a key with"
        f" 'mailerq dkim new {domain} SELECTOR'{need}"
    )


def _notes(config: Config) -> Iterator[str]:
    """No errors, but possible surprises."""
    directory = config.plugin_directory
    if not directory:
        yield "plugin-directory is empty: no plugins are loaded"
    elif not os.path.exists(directory):
        yield f"plugin-directory {directory} is missing: no plugins are loaded"
    else:
        with suppress(OSError):  # reported before: it cannot be read
            names = map(os.path.basename, inspection.plugins_in(directory))
            found = ", ".join(names) or "no *.so in it: no plugins are loaded"
            yield f"plugin-directory {directory} has {found}"
    with suppress(OSError), as_owner(config.queue_directory, config.user):
        file = RowFile(config.queue_directory)
        try:
            file.read()
        except RowError as error:
            yield str(error)
        if file.damaged:
            yield (
                f"{os.path.join(config.queue_directory, ROWS_NAME)}: {file.damaged} lines are"
                " damaged; pauses, forced errors or suppressions may be missing. A start keeps"
                " a copy and goes on with the other lines"
            )
    if config.dane and not list(unbound.problems(config)):
        yield trio.run(Dane(Resolver(config)).probe).text
    if not os.path.isdir(config.queue_directory):
        yield f"queue-directory {config.queue_directory} is missing: the daemon will make it"
    if account_of(config) is not None:
        unreadable: list[str] = []
        with suppress(OSError), _as_user(config):  # reported before: the account cannot be taken
            unreadable += _unreadable(config)
        yield from unreadable
    keys: list[str] = []
    with suppress(OSError), _as_user(config):  # reported before: the account cannot be taken
        keys += _keys(config)
        keys += _unsigned_reports(config)
    yield from keys
    if config.local_delivery:
        path, port = parse_lmtp(config.local_delivery)
        if not port and not os.path.exists(path):
            yield f"local-delivery: there is no socket {path} now; mail waits for it"
    yield from _foreign(config)
    if config.smtp_sink_address:
        yield f"smtp-sink-address is set: all mail goes to {config.smtp_sink_address}"
    if not config.smtp_range and any(network.prefixlen == 0 for network in config.smtp_relay_range):
        yield "smtp-relay-range lets everybody relay: this is an open relay"
