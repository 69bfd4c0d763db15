"""The settings of mailerq: the reader, and the frozen `Config` that it fills.

*Theory of operation.* The fields of `Config` come from `mailerq.table.Table` and its parts, one for
each setting. `SETTINGS` is the table as a tuple; the reader, ``--help``, ``mailerq config``, the
documentation and the tests read it.

Values come from layers (`mailerq.sources`). Later layers override earlier ones: the defaults, the
file ``/etc/mailerq/config.txt`` if it exists, the file of ``--config-file``, the environment
(``MAILERQ_SMTP_PORT``), the command line (``--smtp-port=2525``). Every value remembers its place,
see `Config.origin`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from mailerq.consistency import contradictions
from mailerq.errors import ConfigError, Problem
from mailerq.settings import DnsServer, Network, Setting, table
from mailerq.sources import CONFIG_FILE, NOT_YET, Sources
from mailerq.table import FAILURE_MESSAGES, FAILURE_QUEUE, FAILURE_SECONDS
from mailerq.table_cluster import ClusterTable

__all__ = [
    "DEFAULT_FILES",
    "NOT_YET",
    "SETTINGS",
    "Config",
    "DnsServer",
    "Network",
    "Setting",
    "split_arguments",
]

DEFAULT_FILES: Final = ("/etc/mailerq/config.txt",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ClusterTable):
    """Every setting of one engine, checked and immutable; `smtp-port` is `config.smtp_port`.

    Raises `ConfigError` with all values of a wrong type or out of bounds; if there are none, with
    all values that contradict each other.

    >>> config = Config(smtp_port=(2525,), smtp_relay_domains=("Example.TEST",))
    >>> config.smtp_relay_domains, config.origin("smtp-port"), config.origin("smtp-maxsize")
    (('example.test',), 'program', 'default')
    """

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Attribute -> place of each value that was set; filled by `load`, read by `origin`."""
    result_queues: Mapping[str, str] = field(init=False, repr=False, compare=False)
    """The queue for each kind of result; empty if there is none."""
    local_names: frozenset[str] = field(init=False, repr=False, compare=False)
    """The domains that `local-delivery` takes: those of `smtp-local-domains`, and `hostname`, where
    the bare postmaster is; empty without `local-delivery`."""
    tells_success: bool = field(init=False, repr=False, compare=False)
    """Whether senders that do not ask for it get reports of deliveries."""
    report_queue: str = field(init=False, repr=False, compare=False)
    """The queue for failed mail if no setting names one: it gets reports without the mail."""

    def __post_init__(self) -> None:
        wrong: list[tuple[str, str]] = []
        for known in SETTINGS:
            value = getattr(self, known.attribute)
            if value is known.default:
                continue
            try:
                value = known.check(value)
            except ValueError as error:
                wrong.append((known.attribute, str(error)))
            object.__setattr__(self, known.attribute, value)
        if not self.hostname:
            object.__setattr__(self, "hostname", _this_host())
        if wrong := wrong or [*contradictions(self)]:
            raise ConfigError.of(
                [Problem(self._where(name), text, name.replace("_", "-")) for name, text in wrong]
            )
        queues = {
            name: getattr(self, f"rabbitmq_{name}") for name in ("results", "success", "retry")
        }
        queues["failure"] = self.failure_queue
        object.__setattr__(self, "result_queues", queues)
        names = (*self.smtp_local_domains, self.hostname.lower()) if self.local_delivery else ()
        told = "SUCCESS" in (*self.dsn_notify, *self.dsn_notify_json)
        object.__setattr__(self, "tells_success", told)
        object.__setattr__(self, "local_names", frozenset(names))
        object.__setattr__(self, "report_queue", "" if self.failure_is_named else queues["failure"])

    def _where(self, attribute: str) -> str:
        return self.origins.get(attribute) or attribute.replace("_", "-")

    @classmethod
    def load(
        cls,
        arguments: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        files: Iterable[str | os.PathLike[str]] = DEFAULT_FILES,
        *,
        problems: list[Problem] | None = None,
    ) -> Self:
        """Read all layers: `files` that exist, ``--config-file``, `environ`, `arguments`.

        `arguments` holds only settings (see `split_arguments`); `environ` None means `os.environ`.
        Raises `ConfigError` with all mistakes. If a list of `problems` is given, they are added
        there instead, and wrong settings have their defaults.
        """
        found: list[Problem] = []
        sources = Sources(_BY_KEY, found)
        switches = sources.arguments(arguments)
        variables = sources.environ(os.environ if environ is None else environ)
        overlay = switches.pop(CONFIG_FILE, variables.pop(CONFIG_FILE, None))
        variables.pop(CONFIG_FILE, None)
        layers = [sources.file(os.fspath(file), missing_is_fine=True) for file in files]
        if overlay is not None:
            layers.append(sources.file(overlay.text))
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in (*layers, variables, switches):
            for key, given in layer.items():
                known = _BY_KEY[key]
                try:
                    values[known.attribute] = known.read(given.text)
                    origins[known.attribute] = given.where
                except ValueError as error:
                    found.append(Problem(given.where, f"{key}: {error}", key))
        config = cls._consistent(values, origins, found)
        if problems is not None:
            problems += found
        elif found:
            raise ConfigError.of(found)
        return config

    @classmethod
    def _consistent(
        cls, values: dict[str, Any], origins: dict[str, str], found: list[Problem]
    ) -> Self:
        """The settings without those that contradict others; these are added to `found`.

        A contradiction with a wrong value may disappear once that value is right.
        """
        wrong = {problem.key for problem in found}
        while True:
            try:
                return cls(**values, origins=origins)
            except ConfigError as error:
                for problem in error.problems:
                    if wrong.isdisjoint(re.findall("[a-z-]+", problem.text)):
                        found.append(problem)
                keys = {problem.key for problem in error.problems}
                if not values:
                    raise
            wrong |= keys
            left_out = {key.replace("-", "_") for key in keys}
            if left_out.isdisjoint(values):
                left_out = {*values}  # contradicts a default
            values = {name: value for name, value in values.items() if name not in left_out}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked again.

        >>> Config().replace(smtp_threads=4).smtp_threads
        4
        """
        origins = {name: where for name, where in self.origins.items() if name not in changes}
        return dataclasses.replace(self, **changes, origins=origins)

    @property
    def keeps_local_mail(self) -> bool:
        """Whether mail for local recipients reaches somebody, and does not return here by MX.

        `local-delivery` does not count: it takes some domains only, see `local_names`.
        """
        outbox = self.rabbitmq_outbox
        inbox = outbox if self.rabbitmq_inbox is None else self.rabbitmq_inbox
        return (self.rabbitmq_local or inbox) != outbox or bool(
            self.smarthost or self.smtp_sink_address
        )

    def origin(self, name: str) -> str:
        """Where the value of a setting (key or attribute) was set.

        ``file:line``, ``--key``, ``MAILERQ_KEY``, ``program`` or ``default``.
        """
        known = _BY_KEY[name.replace("_", "-")]
        if known.attribute in self.origins:
            return self.origins[known.attribute]
        if known.attribute == "hostname":
            return "default" if self.hostname == _this_host() else "program"
        return "default" if getattr(self, known.attribute) == known.default else "program"

    def place(self, key: str) -> str:
        """A setting for people: its key, and where its value was set.

        >>> Config().place("smarthost")
        'smarthost'
        """
        origin = self.origin(key)
        return key if origin in ("default", "program") else f"{key} ({origin})"

    @property
    def has_broker(self) -> bool:
        """Whether the queues are in RabbitMQ; else they are in files of `queue-directory`."""
        return bool(self.rabbitmq_address or self.rabbitmq_host)

    @property
    def has_cluster(self) -> bool:
        """Whether this instance hears of others on an exchange."""
        own = self.cluster_address or self.cluster_host
        return bool(self.cluster_exchange and (own or self.has_broker))

    @property
    def instance(self) -> str:
        """The name of this instance in its cluster.

        >>> Config(hostname="a.test").instance, Config(hostname="a.test", server_id=7).instance
        ('a.test:25', 'a.test#7')
        """
        if self.server_id is not None:
            return f"{self.hostname}#{self.server_id}"
        port = next((port for port in (*self.smtp_port, *self.smtp_secure_port) if port), 0)
        return f"{self.hostname}:{port or self.queue_directory}"

    @property
    def cluster_member(self) -> str:
        """The name of this instance if it belongs to a cluster, else an empty string."""
        return self.instance if self.has_cluster else ""

    @property
    def shares_rows(self) -> bool:
        """Whether rows are for all instances, unless somebody says otherwise."""
        return self.has_cluster and self.cluster_rows

    @property
    def failure_queue(self) -> str:
        """The queue for failed mail; empty if there is none."""
        return FAILURE_QUEUE if self.rabbitmq_failure is None else self.rabbitmq_failure

    @property
    def failure_is_named(self) -> bool:
        """Whether a setting names this queue, if only for another purpose."""
        others = (getattr(self, f"rabbitmq_{name}") for name in _SHARED_WITH_FAILURE)
        return self.rabbitmq_failure is not None or FAILURE_QUEUE in others

    @property
    def failure_bounds(self) -> tuple[int, float]:
        """Documents that a process keeps in the failure queue, and for how many seconds.

        0 is no limit.
        """
        count, seconds = self.failure_maxmessages, self.failure_maxage
        if count is None:
            count = 0 if self.failure_is_named else FAILURE_MESSAGES
        if seconds is None:
            seconds = 0 if self.failure_is_named else FAILURE_SECONDS
        return math.ceil(count / self.smtp_processes), seconds

    def text(self, name: str) -> str:
        """The value of a setting (key or attribute) as a file would hold it; empty: unset.

        Secrets are in clear: ask `Setting.secret` before showing one.
        """
        known = _BY_KEY[name.replace("_", "-")]
        return known.write(getattr(self, known.attribute))


SETTINGS: Final = table(Config)
"""The table in reading order; settings of a group stand together."""

_SHARED_WITH_FAILURE: Final = ("inbox", "local", "reports", "results", "success", "retry")

_BY_KEY: Final = {name: known for known in SETTINGS for name in (known.key, *known.aliases)}


@functools.cache
def _this_host() -> str:
    name = socket.gethostname()
    return name if "." in name else socket.getfqdn()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the settings for `Config.load` and the rest, in order.

    A setting is a switch whose name is in the table (or known and not yet supported), with the
    following value if it has no ``=``. After ``--`` everything is rest.

    >>> split_arguments(["queue", "--smtp-port", "25", "list", "--json"])
    (['--smtp-port', '25'], ['queue', 'list', '--json'])
    """
    settings: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            rest += [argument, *remaining]
            break
        switch, equals, _ = argument.partition("=")
        name = switch.removeprefix("--")
        if switch == name or not (name in _BY_KEY or name in NOT_YET or name == CONFIG_FILE):
            rest.append(argument)
            continue
        settings.append(argument)
        if not equals:
            settings += [text for text in (next(remaining, None),) if text is not None]
    return settings, rest
