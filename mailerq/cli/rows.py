"""``mailerq pause``, ``error``, ``suppress`` and ``rows``: what the operator wants of deliveries.

All of them have one grammar: add, list, extend, remove. They change a file in the queue directory
(`mailerq.store.row_file`), and then tell the daemon, if one runs.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec

from mailerq.cli import control
from mailerq.cli.common import (
    Parser,
    command_parser,
    complain,
    positive,
    print_json,
    print_table,
    with_files,
)
from mailerq.config import Config
from mailerq.errors import ConfigError, MessageError, RowError
from mailerq.message import format_time, parse_time
from mailerq.rules.row import ERROR, PAUSE, SUPPRESSED, SUPPRESSION, Row, suppressible
from mailerq.rules.shaping import Shaping
from mailerq.rules.shared_rows import is_shared
from mailerq.store.row_file import RowFile
from mailerq.store.table import Table

__all__ = ["error", "pause", "rows", "suppress"]

PLACES: Final = {
    "domain": "mail to this domain; *.example.com for all domains below it",
    "site": "mail to sites with this MX host, or with a host below *.example.com",
    "provider": "mail to sites of this [[provider]] of limits-file",
    "remote-ip": "connections to this address or network; other hosts of the domain go on",
}

SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

MAX_MISTAKES: Final = 10
"""Mistakes in a list of addresses that are named."""

REPLIES: Final = {
    ERROR: (451, "", "deferred by the operator of this server"),
    SUPPRESSION: SUPPRESSED,
}
"""Code, status and description where a command names none."""

TITLES: Final = {
    "pause": "Pause mail: it waits in the queue, and nothing is tried.",
    "error": "Force a reply: mail gets it in place of an attempt.",
    "suppress": "Suppress recipients: mail to them fails at once.",
    "rows": "All rows of any kind, those of rules too.",
}


def pause(settings: list[str], rest: list[str]) -> int:
    """``mailerq pause``."""
    return _main("pause", PAUSE, settings, rest)


def error(settings: list[str], rest: list[str]) -> int:
    """``mailerq error``."""
    return _main("error", ERROR, settings, rest)


def suppress(settings: list[str], rest: list[str]) -> int:
    """``mailerq suppress``."""
    return _main("suppress", SUPPRESSION, settings, rest)


def rows(settings: list[str], rest: list[str]) -> int:
    """``mailerq rows``."""
    return _main("rows", "", settings, rest)


def _main(name: str, kind: str, settings: list[str], rest: list[str]) -> int:
    options = _parse(name, kind, rest)
    config = Config.load(settings)

    def run() -> int:
        os.stat(config.queue_directory)
        file = RowFile(config.queue_directory, config.user, server=config.cluster_member)
        return int(options.run(file, config, options))

    return with_files(config, run)


# The grammar


def _parse(name: str, kind: str, rest: Sequence[str]) -> Namespace:
    parser = command_parser(name, TITLES[name])
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog
    )

    def command(name: str, text: str, run: Callable[..., int]) -> Parser:
        added: Parser = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run, kind=kind)
        added.add_argument("--json", action="store_true", help="for programs: JSON, one per line")
        return added

    if kind:
        add = command("add", "add one; it is in force when the command ends", _add)
        if kind == SUPPRESSION:
            _add_values(add)
        else:
            _add_scope(add, kind)
        if kind != PAUSE:
            _add_reply(add, kind)
        _add_end(add)
        where = add.add_mutually_exclusive_group()
        where.add_argument(
            "--cluster", action="store_true", default=None, help="for all instances of the cluster"
        )
        where.add_argument(
            "--local", dest="cluster", action="store_false", default=None,
            help="for this instance only; cluster-rows has the default",
        )  # fmt: skip
        add.add_argument("--reason", default="", help="for people: why")
    listing = command("list", "list what is in force", _list)
    if kind == SUPPRESSION:
        listing.add_argument("value", nargs="*", metavar="ADDRESS|DOMAIN", help="only these")
    listing.add_argument("--limit", type=positive, metavar="N", help="no more than N lines")
    extend = command("extend", "change the end of rows", _extend)
    extend.add_argument("id", nargs="+", type=positive, metavar="ID")
    _add_end(extend, required=True)
    extend.add_argument("--reason", default="", help="for the audit file: why")
    remove = command("remove", "end what is in force", _free if kind == SUPPRESSION else _remove)
    if kind == SUPPRESSION:
        _add_values(remove)
    else:
        remove.add_argument("id", nargs="*", type=positive, metavar="ID")
        remove.add_argument("--all", action="store_true", help="all that 'list' shows")
    if kind == SUPPRESSION:
        remove.add_argument(
            "--id", type=positive, action="append", help="all that one command has added"
        )
    remove.add_argument("--reason", default="", help="for the audit file: why")
    return parser.parse_args(rest)


def _add_scope(parser: Parser, kind: str) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--local-ip", default="", help="mail that leaves from this address of ours")
    source.add_argument("--pool", default="", help="mail from this [[pool]] of addresses-file")
    group = parser.add_mutually_exclusive_group()
    for name, text in PLACES.items():
        if not (kind == ERROR and name == "remote-ip"):
            group.add_argument(f"--{name}", default="", help=text)
    parser.add_argument("--tag", default="", help="mail with this tag")
    parser.add_argument("--everything", action="store_true", help="all mail, without a scope")


def _add_values(parser: Parser) -> None:
    parser.add_argument(
        "value", nargs="*", metavar="ADDRESS|DOMAIN", help="*.example.com: all domains below it"
    )
    parser.add_argument("--from-file", metavar="FILE", help="one on each line; - is stdin")


def _add_reply(parser: Parser, kind: str) -> None:
    code, status, description = REPLIES[kind]
    meaning = "4xx defers, 5xx fails, 2xx takes the mail away" if kind == ERROR else "5xx"
    parser.add_argument("--code", type=positive, default=code, help=f"{meaning}; {code}")
    parser.add_argument("--status", "--extended", default=None, help=f"{status or 'such as 4.3.0'}")
    parser.add_argument("--description", default=description, help=f"the text: {description}")


def _add_end(parser: Parser, *, required: bool = False) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--until", type=_time, metavar="'YYYY-MM-DD HH:MM:SS'", help="the end, in UTC"
    )
    group.add_argument(
        "--for", dest="seconds", type=_seconds, metavar="TIME", help="such as 90s, 30m, 2h, 1d, 1w"
    )
    group.add_argument("--no-end", action="store_true", help="until it is removed")


def _time(text: str) -> float:
    try:
        return parse_time(text)
    except MessageError as error:
        raise ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if match is None or not int(match[1]):
        raise ArgumentTypeError(f"{text!r} is not a time such as 30m or 2h")
    return int(match[1]) * SECONDS[match[2]]


def _until(options: Namespace) -> float | None:
    now = time.time()
    until: float | None = options.until
    if options.seconds:
        until = now + options.seconds
    if until is not None and until <= now:
        raise RowError(f"the end {format_time(until)} has passed; it is {format_time(now)} UTC")
    return until


# The commands


def _add(file: RowFile, config: Config, options: Namespace) -> int:
    kind = options.kind
    parts: dict[str, Any] = {"kind": kind, "until": _until(options), "reason": options.reason}
    values: list[str] = []
    if kind == SUPPRESSION:
        values = _values(options)
    else:
        names = ("local_ip", "pool", "domain", "site", "provider", "remote_ip", "tag")
        scope = {name: value for name in names if (value := getattr(options, name, ""))}
        if not scope and not options.everything:
            raise RowError("name a scope, or --everything; see --help")
        if scope and options.everything:
            raise RowError("a scope or --everything, not both")
        _check_names(config, scope)
        parts |= scope
    if kind != PAUSE:
        usual = options.code == REPLIES[kind][0]
        status = (REPLIES[kind][1] if usual else "") if options.status is None else options.status
        parts |= {"code": options.code, "status": status, "description": options.description}
    shared = config.cluster_rows if options.cluster is None else options.cluster
    if shared and not config.has_cluster:
        if options.cluster:
            raise RowError("--cluster: there is no cluster; set cluster-address")
        shared = False
    row = file.add(Row(**parts), values, who=_who(), shared=shared)
    in_force = _tell(config)
    if options.json:
        print_json({**_document(row), **({"count": len(values)} if values else {}), **in_force})
    else:
        what = f"{len(values)} suppressed by {row.id}" if values else f"{kind} {row.id}"
        sys.stdout.write(f"{what}{in_force['note']}\n")
    return os.EX_OK


def _list(file: RowFile, config: Config, options: Namespace) -> int:
    table = file.read()
    if file.damaged:
        complain(f"{file.damaged} lines of the file are damaged: rows may be missing here")
    if options.kind == SUPPRESSION:
        return _list_values(table, options)
    rows: Iterable[Row] = table.rows.values()
    if not options.kind:
        rows = [*rows, *table.suppressions.values()]
    found = [table.shown(row) for row in rows if not options.kind or row.kind == options.kind]
    found = sorted(found, key=lambda row: row.id)[: options.limit]
    if options.json:
        for row in found:
            print_json(_document(row))
        return os.EX_OK
    headings = ["ID", "KIND", "SCOPE", "REPLY", "SINCE", "UNTIL", "HITS", "BY", "REASON"]
    cells = [
        [row.id, row.kind, _scope(row, table), _reply(row), format_time(row.since), _end(row),
         row.hits, _by(row), row.reason]
        for row in found
    ]  # fmt: skip
    print_table(headings, cells)
    return os.EX_OK


def _list_values(table: Table, options: Namespace) -> int:
    found: Iterable[tuple[str, Row]] = table.values()
    if options.value:
        wanted = [suppressible(value) for value in options.value]
        places = [
            (value, table.addresses.get(value) or table.domains.get(value)) for value in wanted
        ]
        found = [(value, row) for value, row in places if row is not None]
    found = islice(found, options.limit)
    if options.json:
        for value, row in found:
            print_json({"value": value, **_document(table.shown(row))})
    else:
        headings = ("ADDRESS", "ID", "REPLY", "SINCE", "UNTIL", "BY", "REASON")
        print_table(headings, (
            (value, row.id, _reply(row), format_time(row.since), _end(row), _by(row), row.reason)
            for value, row in found
        ))  # fmt: skip
    return os.EX_OK


def _extend(file: RowFile, config: Config, options: Namespace) -> int:
    until = _until(options)
    missing = _missing(file.read(), options.id, options.kind)
    changed = [
        row
        for number in options.id
        if number not in missing
        and (row := file.change(number, who=_who(), why=options.reason, until=until))
    ]
    return _done(config, options, changed, "extended", missing)


def _remove(file: RowFile, config: Config, options: Namespace) -> int:
    table = file.read()
    if bool(options.id) == options.all:
        raise RowError("name ids, or --all")
    if options.all:
        rows = list(table.rows.values()) + ([] if options.kind else [*table.suppressions.values()])
        options.id = [row.id for row in rows if not options.kind or row.kind == options.kind]
    missing = _missing(table, options.id, options.kind)
    ids = [number for number in options.id if number not in missing]
    ended = file.end(ids, who=_who(), why=options.reason)
    return _done(config, options, ended, "removed", missing)


def _free(file: RowFile, config: Config, options: Namespace) -> int:
    if options.id:
        if options.value or options.from_file:
            raise RowError("addresses, or --id")
        return _remove(file, config, Namespace(**{**vars(options), "all": False}))
    values = _values(options)
    freed = file.free(values, who=_who(), why=options.reason)
    in_force = _tell(config)
    if options.json:
        print_json({"removed": len(freed), **in_force})
    else:
        sys.stdout.write(f"{len(freed)} removed{in_force['note']}\n")
    missing = sorted(set(values).difference(freed))
    for value in missing[:MAX_MISTAKES]:
        complain(f"{value} is not suppressed")
    return 1 if missing else os.EX_OK


def _missing(table: Table, ids: Iterable[int], kind: str) -> list[int]:
    """The ids of no row of the kind."""
    found = ((number, table.get(number)) for number in ids)
    return [number for number, row in found if row is None or (kind and row.kind != kind)]


def _done(
    config: Config, options: Namespace, rows: Sequence[Row], word: str, missing: Sequence[int]
) -> int:
    in_force = _tell(config) if rows else {"in_force": False, "note": ""}
    if options.json:
        for row in rows:
            print_json({**_document(row), **in_force})
    else:
        for row in rows:
            sys.stdout.write(f"{row.kind} {row.id} {word}{in_force['note']}\n")
    for number in missing:
        complain(f"there is no {options.kind or 'row'} {number}")
    return 1 if missing else os.EX_OK


def _tell(config: Config) -> dict[str, Any]:
    """Have the daemon look at the file."""
    try:
        reply = control.ask(config.queue_directory, "rows")
    except OSError:
        return {"in_force": False, "note": ", for the next start: no daemon answers"}
    if reply.get("ok"):
        return {"in_force": True, "note": ""}
    return {"in_force": False, "note": "; not all processes answer, they follow by themselves"}


# Words in


def _values(options: Namespace) -> list[str]:
    """The addresses and domains of the command line and of a file."""
    given = list(enumerate(options.value, start=1))
    where = "argument"
    if options.from_file:
        if given:
            raise RowError("addresses, or --from-file")
        where = "line"
        given = list(_lines(options.from_file))
    found, wrong = [], []
    for number, text in given:
        try:
            found.append(suppressible(text))
        except RowError as error:
            wrong.append(f"{where} {number}: {error}")
    if wrong:
        more = len(wrong) - MAX_MISTAKES
        named = [*wrong[:MAX_MISTAKES], f"and {more} mistakes more"] if more > 0 else wrong
        for text in named[:-1]:
            complain(text)
        raise RowError(named[-1])
    if not found:
        raise RowError("name an address or a domain")
    return found


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        # With or without the mark that some programs write at the beginning.
        with open(0 if path == "-" else path, encoding="utf-8-sig", closefd=path != "-") as file:
            for number, line in enumerate(file, start=1):
                text = line.strip()
                if text and not text.startswith("#"):
                    yield number, text
    except OSError as error:
        raise RowError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RowError(f"{path} is not UTF-8") from None


def _check_names(config: Config, scope: Mapping[str, str]) -> None:
    """A name that no provider or no pool has would do nothing."""
    if not scope.keys() & {"provider", "pool"}:
        return
    try:
        shaping = Shaping.of(config)
    except ConfigError as error:
        complain(str(error))
        return
    for name, setting, known in (
        ("provider", "limits-file", shaping.provider_names),
        ("pool", "addresses-file", shaping.local_ips.pools),
    ):
        if name in scope and scope[name] not in known:
            words = f"it has {', '.join(known)}" if known else "it has none"
            raise RowError(f"{setting} has no {name} {scope[name]!r}; {words}")


def _who() -> str:
    """The user that runs the command, and the one that became root for that."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    sudo = os.environ.get("SUDO_USER", "")
    if os.getuid() == 0 and sudo and sudo != name and sudo.isprintable():
        return f"{name} ({sudo[:100]})"
    return name


# Words out


def _document(row: Row) -> dict[str, Any]:
    """A row for programs: all parts that are set, times as text."""
    document = dict(msgspec.to_builtins(row))
    if is_shared(row.id):
        document["cluster"] = True
    for name in ("since", "until"):
        if document.get(name) is not None:
            document[name] = format_time(document[name])
    return {name.replace("_", "-"): value for name, value in document.items()}


def _scope(row: Row, table: Table) -> str:
    if row.kind == SUPPRESSION:
        return f"{table.counts.get(row.id, 0)} recipients"
    words = (f"{name.replace('_', '-')} {value}" for name, value in row.scope.items())
    return ", ".join(words) or "everything"


def _reply(row: Row) -> str:
    return " ".join(filter(None, (str(row.code or ""), row.status, row.description or row.sample)))


def _end(row: Row) -> str:
    return "" if row.until is None else format_time(row.until)


def _by(row: Row) -> str:
    return row.who if row.origin == "operator" else row.origin
