"""Read settings as text from files, the environment and the command line.

A file has one ``key: value`` on a line. ``#`` starts a comment at the start of a line or after
white space. There is no quoting; a value ends with its line. Each source becomes a layer: a map
from keys to their text and its place.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from mailerq.errors import Problem
from mailerq.settings import ENVIRON_PREFIX, Setting

__all__ = ["CONFIG_FILE", "NOT_YET", "Given", "Layer", "Sources"]

FILE_SIZE_LIMIT: Final = 1 << 20
"""In bytes. A configuration has a few hundred lines; a larger file is something else."""

CONFIG_FILE: Final = "config-file"

NOT_YET: Final = frozenset(
    """
    database database-address database-threads
    database-ttl database-validate dns-buffersize dns-capacity dns-expire dns-force
    dns-getaddrinfo dns-interval dns-min-ttl dns-rotate dns-sockets dns-spread
    dns-threads domain-maxqueue download-blacklist
    download-cache download-log-directory download-log-file download-proxy download-ttl
    download-user-agent download-whitelist
    max-queues normalize-mime
    proxy-server rabbitmq-refused received-log-directory received-log-format
    received-log-history received-log-maxage received-log-maxsize received-log-prefix
    render-useragent send-bin-log-file send-log-compression send-log-directory send-log-format
    send-log-history send-log-maxage send-log-maxsize send-log-prefix
    smtp-auth-results smtp-check smtp-protection smtp-validate-address spamassassin-host
    spamassassin-port spool-delay spool-directory spool-extract spool-fail-directory
    spool-open-files spool-remove spool-threads validate-envelope
    validate-recipient www-auth www-cache-control www-certificate www-ciphers www-connections
    www-dir www-host www-ip www-log-file www-password www-port www-private-key www-privatekey
    www-secure-port www-url
    """.split()
)
"""Settings of MailerQ 2.1 that are not implemented. They get an error text of their own."""


class Given(NamedTuple):
    """The text of a value, and its place."""

    text: str
    where: str


Layer = dict[str, Given]

# Kubernetes and Docker set these variables beside a service named mailerq.
_NOT_OURS: Final = re.compile(r"MAILERQ_(SERVICE_(HOST|PORT.*)|PORT(_[0-9]+_.*)?)", re.DOTALL)


class Sources:
    """Read layers of settings. `known` maps every name and alias to its setting.

    A text that cannot be read is left out of its layer and added to `problems`.
    """

    def __init__(self, known: Mapping[str, Setting], problems: list[Problem]) -> None:
        self._known = known
        self._problems = problems

    def _wrong(self, where: str, text: str, key: str = "") -> None:
        self._problems.append(Problem(where, text, key))

    def file(self, path: str, *, missing_is_fine: bool = False) -> Layer:
        layer: Layer = {}
        try:
            with open(path, "rb") as file:
                data = file.read(FILE_SIZE_LIMIT + 1)
        except FileNotFoundError:
            if not missing_is_fine:
                self._wrong(path, "there is no such file")
            return layer
        except (OSError, ValueError) as error:
            self._wrong(path, getattr(error, "strerror", None) or str(error))
            return layer
        if len(data) > FILE_SIZE_LIMIT:
            self._wrong(path, f"is larger than {FILE_SIZE_LIMIT} bytes: no configuration")
            return layer
        for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode()
            except UnicodeDecodeError:
                self._wrong(where, "is not UTF-8")
                continue
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if not line:
                continue
            key, colon, text = line.partition(":")
            if not colon:
                first = line.split()[0]  # the rest may be a password
                self._wrong(where, f"the line of {first!r} is not of the form 'key: value'")
            elif key.strip() == CONFIG_FILE:
                self._wrong(where, f"{CONFIG_FILE} cannot stand in a file")
            else:
                self._add(layer, key.strip(), text.strip(), where)
        return layer

    def environ(self, environ: Mapping[str, str]) -> Layer:
        layer: Layer = {}
        for variable, text in environ.items():
            if variable.startswith(ENVIRON_PREFIX) and not _NOT_OURS.fullmatch(variable):
                name = variable.removeprefix(ENVIRON_PREFIX).lower().replace("_", "-")
                self._add(layer, name, text.strip(), variable)
        return layer

    def arguments(self, arguments: Sequence[str]) -> Layer:
        layer: Layer = {}
        remaining = deque(arguments)
        while remaining:
            argument = remaining.popleft()
            if not argument.startswith("--"):
                self._wrong(argument, "is not a setting of the form --key=value")
                continue
            switch, equals, text = argument.partition("=")
            if not equals:
                if not remaining or remaining[0].startswith("--"):
                    known = self._known.get(switch.removeprefix("--"))
                    self._wrong(switch, "needs a value", known.key if known else "")
                    continue
                text = remaining.popleft()
            self._add(layer, switch.removeprefix("--"), text.strip(), switch)
        return layer

    def _add(self, layer: Layer, name: str, text: str, where: str) -> None:
        """Store a value under the key of its setting, whichever alias `name` is."""
        if name == CONFIG_FILE:
            key = name
        elif known := self._known.get(name):
            key = known.key
        elif name in NOT_YET:
            return self._wrong(where, f"{name} is not supported yet")
        else:
            meant = self._meant(name)
            hint = f"; did you mean {meant}?" if meant else ""
            return self._wrong(where, f"unknown setting {name!r}{hint}", meant)
        if key in layer:
            return self._wrong(where, f"second value for {key}; the first is at {layer[key].where}")
        layer[key] = Given(text, where)
        return None

    def _meant(self, name: str) -> str:
        """Return the closest name of a setting, or an empty string."""
        import difflib  # imported here: only errors need it

        name = name.lower().replace("_", "-")
        close = difflib.get_close_matches(name, self._known, n=1, cutoff=0.75)
        return close[0] if close else ""
