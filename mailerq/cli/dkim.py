"""``mailerq dkim``: make keys that sign mail, show their DNS records, and check the DNS.

The keys are those of `dkim-directory` and `dkim-file`. Nothing needs a running daemon, and a daemon
that runs sees a new key within seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import Any, Final

from mailerq.cli.common import (
    Parser,
    command_parser,
    complain,
    domain_name,
    print_json,
    print_table,
)
from mailerq.config import Config
from mailerq.errors import AddressError
from mailerq.privileges import give_to
from mailerq.rules.signing import SigningFile, parse_selector
from mailerq.store.signing_keys import ENDING, SigningKey, Surveyed, survey

__all__ = ["main"]

CHECK: Final = """\
Look up the DNS record of each key, and compare the two.

exit status:
  0  all keys can sign, and verifiers find them
  1  some key cannot be used, or its record is missing or another one
  75 the name servers have not answered
"""

MAX_LOOK_UPS: Final = 16
"""Records that are looked up at a time."""

STRING_CHARS: Final = 255
"""Characters of one string of a TXT record."""

RSA_BITS: Final = 2048

Answer = dict[str, Any]


def main(settings: list[str], rest: list[str]) -> int:
    """Run one of the commands."""
    parser = command_parser("dkim", "Keys that sign mail: see docs/signing.md.")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=Parser, prog=parser.prog, dest="command"
    )
    new = commands.add_parser("new", help="make a key in dkim-directory, and show its DNS record")
    new.add_argument("domain", metavar="DOMAIN", type=domain_name)
    new.add_argument("selector", metavar="SELECTOR", type=_selector)
    new.add_argument("--type", choices=("rsa", "ed25519"), default="rsa", help="[%(default)s]")
    new.add_argument(
        "--bits", type=int, choices=(1024, 2048, 3072, 4096), default=RSA_BITS,
        help="the size of an RSA key [%(default)s]",
    )  # fmt: skip
    new.add_argument(
        "--file", metavar="FILE", help="write the key there instead, for a line of dkim-file"
    )
    show = commands.add_parser("show", help="show the DNS records of keys")
    check = commands.add_parser(
        "check", help="compare keys with their DNS records", description=CHECK
    )
    for command in (show, check):
        command.add_argument("domain", metavar="DOMAIN", nargs="?", type=domain_name)
        command.add_argument("selector", metavar="SELECTOR", nargs="?", type=_selector)
    for command in (new, show, check):
        command.add_argument("--json", action="store_true", help="for programs: JSON, one per line")
    options = parser.parse_args(rest)
    config = Config.load(settings)
    if options.command == "new":
        return _new(config, options)
    if not (config.dkim_directory or config.dkim_file):
        complain("neither dkim-directory nor dkim-file is set: no key signs mail")
        return os.EX_CONFIG
    try:
        found = [
            each
            for each in survey(config.dkim_directory, SigningFile.of(config))
            if options.domain in (None, each.domain) and options.selector in (None, each.selector)
        ]
    except OSError as error:
        complain(f"cannot read {error.filename}: {error.strerror}")
        return os.EX_NOINPUT
    if not found:
        complain("there is no such key" if options.domain else "there is no key")
        return os.EX_NOINPUT
    return (_show if options.command == "show" else _check)(config, options, found)


def _selector(text: str) -> str:
    try:
        return parse_selector(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# new


def _new(config: Config, options: argparse.Namespace) -> int:
    path = options.file
    made: list[str] = []
    if path is None:
        if not config.dkim_directory:
            complain("dkim-directory is not set: set it, or name a file with --file")
            return os.EX_CONFIG
        folder = os.path.join(config.dkim_directory, options.domain)
        path = os.path.join(folder, options.selector + ENDING)
        try:
            made = [each for each in (config.dkim_directory, folder) if not os.path.isdir(each)]
            os.makedirs(folder, mode=0o750, exist_ok=True)
        except OSError as error:
            complain(f"cannot make {folder}: {error.strerror}")
            return os.EX_CANTCREAT
    pem = _pem(options.type, options.bits)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(file, "wb") as out:
            out.write(pem)
            out.flush()
            os.fsync(file)
        for each in (*made, path):
            if config.user and os.geteuid() == 0:
                give_to(config.user, each)
    except FileExistsError:
        complain(f"{path} is there already; a new key needs a new selector, see docs/signing.md")
        return os.EX_CANTCREAT
    except OSError as error:
        with suppress(OSError):
            if os.path.getsize(path) < len(pem):
                os.remove(path)
        complain(f"cannot write {path}: {error.strerror}")
        return os.EX_CANTCREAT
    key = SigningKey(pem)
    surveyed = Surveyed(options.domain, options.selector, path, key)
    if options.json:
        print_json(_facts(surveyed))
    else:
        sys.stdout.write(f"; the key is in {path}\n; publish this record:\n{_zone(surveyed)}\n")
    return os.EX_OK


def _pem(kind: str, bits: int) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    key: Any
    if kind == "rsa":
        key = rsa.generate_private_key(65537, bits)
    else:
        key = ed25519.Ed25519PrivateKey.generate()
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


# show


def _strings(record: str) -> list[str]:
    return [record[at : at + STRING_CHARS] for at in range(0, len(record), STRING_CHARS)]


def _zone(surveyed: Surveyed) -> str:
    """The record as a zone file has it."""
    assert surveyed.key is not None, "else there is no record"
    texts = [f'"{text}"' for text in _strings(surveyed.key.record)]
    text = texts[0] if len(texts) == 1 else "(\n\t" + "\n\t".join(texts) + " )"
    return f"{surveyed.name}. IN TXT {text}"


def _facts(surveyed: Surveyed) -> Answer:
    key = surveyed.key
    return {
        "domain": surveyed.domain,
        "selector": surveyed.selector,
        "file": surveyed.path,
        "name": surveyed.name,
        "algorithm": None if key is None else key.algorithm,
        "bits": None if key is None else key.bits,
        "record": None if key is None else key.record,
        "strings": None if key is None else _strings(key.record),
        "problem": surveyed.problem or None,
        "note": surveyed.note or None,
    }


def _show(config: Config, options: argparse.Namespace, found: list[Surveyed]) -> int:
    if options.json:
        for each in found:
            print_json(_facts(each))
    else:
        for each in found:
            if each.key is not None:
                sys.stdout.write(f"{_zone(each)}\n")
    for each in found:
        if each.problem:
            complain(f"the key {each.path} {each.problem}")
    return 1 if any(each.problem for each in found) else os.EX_OK


# check


def _check(config: Config, options: argparse.Namespace, found: list[Surveyed]) -> int:
    import trio

    answers: dict[int, Answer] = {}

    async def run() -> None:
        from mailerq.net.resolver import NoHosts, Resolver

        resolver, limiter = Resolver(config), trio.CapacityLimiter(MAX_LOOK_UPS)

        async def look_up(number: int, surveyed: Surveyed) -> None:
            async with limiter:
                texts = await resolver.texts(surveyed.name)
            if isinstance(texts, NoHosts):
                answers[number] = _finding("no answer", texts.description, "try again later")
            else:
                answers[number] = _compare(surveyed, texts[0])

        async with trio.open_nursery() as nursery:
            for number, each in enumerate(found):
                if each.key is None:
                    todo = "repair or remove the file; mail with it waits, see dkim-missing"
                    answers[number] = _finding("bad key", each.problem, todo)
                else:
                    nursery.start_soon(look_up, number, each)

    trio.run(run)
    rows = [(each, answers[number]) for number, each in enumerate(found)]
    if options.json:
        for each, answer in rows:
            print_json({**_facts(each), **answer})
    else:
        print_table(
            ("RECORD", "STATE", "REASON", "TO DO"),
            [
                (each.name, answer["state"], answer["reason"] or each.note, answer["to-do"])
                for each, answer in rows
            ],
        )
    states = {answer["state"] for answer in answers.values()}
    if states <= {"good"}:
        return os.EX_OK
    return os.EX_TEMPFAIL if states <= {"good", "no answer"} else 1


def _finding(state: str, reason: str = "", todo: str = "") -> Answer:
    return {"state": state, "reason": reason, "to-do": todo}


def _compare(surveyed: Surveyed, texts: tuple[bytes, ...]) -> Answer:
    """What the records of a key's name say about the key, and what to do."""
    from mailerq.mail.dkim_record import GOOD, standing

    key = surveyed.key
    assert key is not None, "else there is nothing to compare"
    found = standing(texts, key.algorithm, key.public)
    if found.state != GOOD:
        todo = "publish the record that 'mailerq dkim show' prints"
    elif found.others:
        todo = "remove the other records"
    else:
        todo = "remove t=y once mail verifies" if found.reason else ""
    return _finding(found.state, found.reason, todo)
