"""MTA-STS: the DNS record and the policy of a recipient's domain (RFC 8461).

The record says which version of the policy is the current one, the policy says which hosts are
those of the domain. Both are written by strangers: whatever does not have the form that the
standard prescribes is no record and no policy, and the problem names its line.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

import idna

from mailerq.rules.security import StsMode, StsPolicy

__all__ = [
    "MAX_AGE_SECONDS",
    "MAX_POLICY_BYTES",
    "PATH",
    "Document",
    "Wrong",
    "parse_policy",
    "policy_host",
    "record_id",
    "record_name",
]

PATH: Final = "/.well-known/mta-sts.txt"

MAX_POLICY_BYTES: Final = 64 << 10
"""The size that section 3.3 recommends as the largest one to accept."""

MAX_AGE_SECONDS: Final = 31_557_600
"""The longest time a policy is valid (section 3.2): a year. More is taken as this."""

MAX_PATTERNS: Final = 250
"""``mx`` lines of one policy; those that are in use have up to some dozens."""

MAX_SHOWN: Final = 60
"""Characters of a line that a problem quotes."""

VERSION: Final = "STSv1"
BEGINNING: Final = b"v=STSv1;"

_is_id: Final = re.compile(rb"[A-Za-z0-9]{1,32}").fullmatch
_is_field: Final = re.compile(
    rb"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}=[\x21-\x3a\x3c\x3e-\x7e]{1,1000}"
).fullmatch
_is_label: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?").fullmatch


def record_name(domain: str) -> str:
    """The name at which a domain has its record.

    >>> record_name("d.example")
    '_mta-sts.d.example'
    """
    return f"_mta-sts.{domain}"


def policy_host(domain: str) -> str:
    """The host that has the policy of a domain, and the name its certificate must be for."""
    return f"mta-sts.{domain}"


def record_id(records: Iterable[bytes]) -> str | None:
    """The ``id`` in the TXT records at `record_name`, or None (section 3.1).

    Other records may stand beside it. None stands for no record, for more than one, and for one
    that has not the right form; the domain then has no new policy.

    >>> record_id([b"v=spf1 -all", b"v=STSv1; id=20160831085700Z;"])
    '20160831085700Z'
    >>> record_id([b"v=STSv1; id=1", b"v=STSv1; id=1"])
    """
    found = [record for record in records if record.startswith(BEGINNING)]
    if len(found) != 1:
        return None
    fields = [field.strip(b" \t") for field in found[0][len(BEGINNING) :].split(b";")]
    if fields[-1] == b"":
        del fields[-1]
    number = None
    for field in fields:
        if not _is_field(field):
            return None
        name, _, value = field.partition(b"=")
        if name == b"id" and number is None:
            if not _is_id(value):
                return None
            number = value.decode()
    return number


class Wrong(NamedTuple):
    """Why a text is no policy: the number of the line, 0 for the whole, and what is wrong there."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


class Document(NamedTuple):
    """A policy as it was read. `patterns` are in lower case and A-labels, without a final dot."""

    mode: StsMode
    max_age: int
    """Seconds from the time of the fetch for which the policy is valid."""
    patterns: tuple[str, ...]
    lines: tuple[str, ...]
    """The lines as they were published, without blank ones."""

    def policy(self, domain: str, number: str) -> StsPolicy:
        """The policy of a domain whose record has this ``id``."""
        return StsPolicy(domain, number, self.mode, self.patterns)


def parse_policy(text: bytes) -> Document | Wrong:
    r"""Read a policy (section 3.2).

    Of a key that is there twice the first line counts, but for ``mx``; unknown keys are ignored,
    and so are blank lines. An ``mx`` that is an IP address is no mistake and matches no host. A
    policy other than of mode ``none`` has an ``mx``.

    >>> parse_policy(b"version: STSv1\nmode: enforce\nmx: *.M.example.\nmax_age: 9\n").patterns
    ('*.m.example',)
    >>> str(parse_policy(b"version: STSv1\nmode: on\n"))
    "line 2: mode is 'on', and neither enforce, testing nor none"
    """
    if len(text) > MAX_POLICY_BYTES:
        return Wrong(0, f"the policy is larger than {MAX_POLICY_BYTES} bytes")
    try:
        # A mark of the byte order stands where some editors put it.
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Wrong(text.count(b"\n", 0, error.start) + 1, "the line is not UTF-8")
    first: dict[str, tuple[int, str]] = {}
    patterns: dict[str, None] = {}
    hosts = 0
    lines = []
    for number, raw in enumerate(decoded.split("\n"), start=1):
        line = raw.strip(" \t\r")
        if not line:
            continue
        lines.append(line)
        key, colon, value = line.partition(":")
        if not colon:
            return Wrong(number, f"{line[:MAX_SHOWN]!r} has no colon")
        key, value = key.rstrip(" \t"), value.strip(" \t")
        if key != "mx":
            first.setdefault(key, (number, value))
            continue
        hosts += 1
        if hosts > MAX_PATTERNS:
            return Wrong(number, f"more than {MAX_PATTERNS} hosts")
        pattern = _pattern(value)
        if pattern is None:
            return Wrong(number, f"mx {value[:MAX_SHOWN]!r} is no host and no *. before a domain")
        if pattern:
            patterns[pattern] = None
    wrong = _version_problem(first)
    if wrong is not None:
        return wrong
    mode = _mode(first)
    if isinstance(mode, Wrong):
        return mode
    max_age = _max_age(first)
    if isinstance(max_age, Wrong):
        return max_age
    if not hosts and mode is not StsMode.NONE:
        return Wrong(0, "mx is missing")
    return Document(mode, max_age, tuple(patterns), tuple(lines))


Fields = dict[str, tuple[int, str]]


def _version_problem(fields: Fields) -> Wrong | None:
    if "version" not in fields:
        return Wrong(0, "version is missing")
    number, version = fields["version"]
    if version != VERSION:
        return Wrong(number, f"version is {version[:MAX_SHOWN]!r} and not {VERSION}")
    return None


def _mode(fields: Fields) -> StsMode | Wrong:
    if "mode" not in fields:
        return Wrong(0, "mode is missing")
    number, mode = fields["mode"]
    try:
        return StsMode(mode)
    except ValueError:
        shown = f"{mode[:MAX_SHOWN]!r}"
        return Wrong(number, f"mode is {shown}, and neither enforce, testing nor none")


def _max_age(fields: Fields) -> int | Wrong:
    if "max_age" not in fields:
        return Wrong(0, "max_age is missing")
    number, text = fields["max_age"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        return Wrong(number, f"max_age {text[:MAX_SHOWN]!r} is not a number of seconds")
    return min(int(text), MAX_AGE_SECONDS)


def _pattern(value: str) -> str | None:
    """A pattern in the form that is compared; empty for an IP address, None for anything else."""
    name = value.removesuffix(".").lower()
    wild = name.startswith("*.")
    name = name.removeprefix("*.")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        pass
    else:
        return ""
    if len(name) > 253:
        return None
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode().lower()
        except UnicodeError:
            return None
    if len(name) > 253 or not all(map(_is_label, name.split("."))):
        return None
    return f"*.{name}" if wild else name
