"""The settings of mailerq: one table, its reader, and the frozen `Config` that it fills.

*Theory of operation.* The table is the dataclass `Config` itself: each field is one setting
and carries, through `setting`, what its annotation and default do not say (how its text is
read, its bounds, its unit, a sentence for people). `SETTINGS` is the table as a tuple; the
reader, ``--help``, ``mailerq config``, the documentation and the tests read it.

Values come from layers (`mailerq.sources`), a later one over an earlier one: the defaults, the
file ``/etc/mailerq/config.txt`` where there is one, the file that ``--config-file`` names, the
environment (``MAILERQ_SMTP_PORT``), the command line (``--smtp-port=2525``). Every value
remembers its place, see `Config.origin`.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from mailerq.errors import ConfigError
from mailerq.settings import (
    DOMAINS,
    FLAG,
    HOST,
    HOSTNAME,
    IPS,
    NETWORKS,
    NUMBER,
    NUMBERS,
    PATH,
    PORT,
    PORTS,
    QUEUE,
    SECONDS,
    SINK,
    SIZE,
    TEXT,
    URIS,
    Network,
    Setting,
    choice,
    setting,
    table,
)
from mailerq.sources import CONFIG_FILE, NOT_YET, Sources

__all__ = [
    "DEFAULT_FILES",
    "NOT_YET",
    "SETTINGS",
    "Config",
    "Network",
    "Setting",
    "split_arguments",
]

DEFAULT_FILES: Final = ("/etc/mailerq/config.txt",)

HERE: Final = "Host"
SERVER: Final = "SMTP server"
ACCESS: Final = "Who may send what"
TLS: Final = "TLS and login"
QUEUES: Final = "Queues"
DELIVERY: Final = "Delivery"
DNS: Final = "DNS"
PLUGINS: Final = "Plugins"
LOGS: Final = "Logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of one engine, checked and immutable; `smtp-port` is `config.smtp_port`.

    Raises `ConfigError` for a value of a wrong type or out of its bounds, and for values that
    contradict each other.

    >>> config = Config(smtp_port=(2525,), smtp_local_domains=("Example.TEST",))
    >>> config.smtp_local_domains, config.origin("smtp-port"), config.origin("smtp-maxsize")
    (('example.test',), 'program', 'default')
    """

    hostname: str = setting(
        "",
        HOSTNAME,
        HERE,
        "The name that the server gives in its greeting, in EHLO and in message ids.",
        unset="the full name of this host",
    )
    server_id: int | None = setting(
        None,
        NUMBER,
        HERE,
        "Number of this instance, mixed into message ids; different for each instance.",
        unset="derived from the host",
        minimum=0,
    )
    user: str = setting(
        "", TEXT, HERE, "Account to change to once the ports are open.", unset="stay as started"
    )
    lock: str = setting(
        "",
        PATH,
        HERE,
        "File with the process id that keeps a second instance from starting.",
        unset="mailerq.pid in the temporary directory",
    )
    shutdown_timeout: float = setting(
        30.0, SECONDS, HERE, "How long a stop waits for running transactions.", unit="s", minimum=0
    )

    watchdog_seconds: float = setting(
        5.0,
        SECONDS,
        HERE,
        "How long a worker may stand still before the log says in what; 0: nobody looks.",
        unit="s",
        minimum=0,
    )

    smtp_ip: tuple[str, ...] = setting(
        (), IPS, SERVER, "Addresses to listen on.", unset="all addresses"
    )
    smtp_port: tuple[int, ...] = setting(
        (25,), PORTS, SERVER, "Ports to listen on, as a list with ranges: 25,2525,1024-1026."
    )
    smtp_secure_port: tuple[int, ...] = setting(
        (), PORTS, SERVER, "Ports to listen on that speak TLS from the first byte.", unset="none"
    )
    lmtp_port: tuple[int, ...] = setting(
        (), PORTS, SERVER, "Ports to listen on that speak LMTP (RFC 2033).", unset="none"
    )
    smtp_processes: int = setting(
        1,
        NUMBER,
        SERVER,
        "Processes, each with its own smtp-threads, plugins, and share of the embedded queue.",
        minimum=1,
        maximum=256,
    )
    smtp_threads: int = setting(
        1,
        NUMBER,
        SERVER,
        "Worker threads, each with its own plugin context, for mail in and out.",
        minimum=1,
        maximum=1024,
        aliases=("max-threads",),
    )
    smtp_connections: int = setting(
        1000,
        NUMBER,
        SERVER,
        "Connections at a time, in and out together.",
        minimum=1,
        aliases=("max-connections",),
    )
    smtp_connections_in: int | None = setting(
        None,
        NUMBER,
        SERVER,
        "Incoming connections at a time.",
        unset="as smtp-connections",
        minimum=1,
    )
    smtp_connections_out: int | None = setting(
        None,
        NUMBER,
        SERVER,
        "Outgoing connections at a time.",
        unset="as smtp-connections",
        minimum=1,
    )
    smtp_timeout: float = setting(
        300.0, SECONDS, SERVER, "How long a client may be idle.", unit="s", minimum=0.001
    )
    smtp_command_timeout: float = setting(
        60.0,
        SECONDS,
        SERVER,
        "How long a client may take for one command, from its first byte to its last.",
        unit="s",
        minimum=0.001,
    )
    smtp_data_minrate: int = setting(
        500,
        NUMBER,
        SERVER,
        "How fast a client must send a mail once smtp-timeout has passed; 0: no limit.",
        unit="bytes/s",
        unlimited=True,
    )
    smtp_session_timeout: float = setting(
        3600.0,
        SECONDS,
        SERVER,
        "How long a session may last, whatever it does; 0: no limit.",
        unit="s",
        unlimited=True,
    )
    smtp_maxsize: int = setting(
        100 << 20, SIZE, SERVER, "Largest message that is taken; announced with SIZE.", minimum=1
    )
    smtp_maxrecipients: int = setting(
        1000, NUMBER, SERVER, "Recipients of one transaction.", minimum=1
    )
    smtp_bare_newline: str = setting(
        "reject",
        choice("reject", "normalize"),
        SERVER,
        "What to do with a mail that has a bare CR or LF in it.",
    )
    smtp_spill_size: int = setting(
        1 << 20,
        SIZE,
        SERVER,
        "A mail that is larger waits in a file while it comes in; 0: never.",
        unlimited=True,
    )
    max_memory: int = setting(
        1 << 30,
        SIZE,
        SERVER,
        "Memory that mail on its way in may take before new mail gets 452; 0: no limit.",
        unlimited=True,
    )
    smtp_extract: bool = setting(
        True, FLAG, SERVER, "Turn x-mq-* headers of clients that may relay into properties."
    )

    smtp_range: tuple[Network, ...] = setting(
        (),
        NETWORKS,
        ACCESS,
        "Networks whose clients may connect.",
        unset="everybody",
        aliases=("smtp-ranges",),
    )
    smtp_relay_range: tuple[Network, ...] = setting(
        (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128")),
        NETWORKS,
        ACCESS,
        "Networks whose clients may send to any recipient without a login.",
    )
    smtp_local_domains: tuple[str, ...] = setting(
        (), DOMAINS, ACCESS, "Domains that anybody may send to.", unset="none"
    )
    smtp_local_addresses: str = setting(
        "",
        PATH,
        ACCESS,
        "File of addresses that anybody may send to: exact, with * and ?, or /expressions/.",
        unset="none",
    )
    smtp_proxy: tuple[Network, ...] = setting(
        (),
        NETWORKS,
        ACCESS,
        "Networks of proxies, which must say with a PROXY header who their client is.",
        unset="none",
    )
    smtp_xclient_range: tuple[Network, ...] = setting(
        (),
        NETWORKS,
        ACCESS,
        "Networks whose clients may say with XCLIENT who their client is.",
        unset="none",
    )
    smtp_greet_delay: float = setting(
        0.0,
        SECONDS,
        ACCESS,
        "How long the banner waits for those who speak before it; not for clients that may relay.",
        unit="s",
        minimum=0,
        maximum=60,
    )
    smtp_client_maxconnections: int = setting(
        100,
        NUMBER,
        ACCESS,
        "Connections of one client at a time; like all limits of a client, none for those that"
        " may relay by their address. 0: no limit.",
        unlimited=True,
    )
    smtp_client_connects: int = setting(
        600, NUMBER, ACCESS, "Connections of one client in a minute; 0: no limit.", unlimited=True
    )
    smtp_client_messages: int = setting(
        0, NUMBER, ACCESS, "Messages of one client in a minute; 0: no limit.", unlimited=True
    )
    smtp_client_recipients: int = setting(
        0, NUMBER, ACCESS, "Recipients of one client in a minute; 0: no limit.", unlimited=True
    )
    smtp_client_errors: int = setting(
        100, NUMBER, ACCESS, "Errors of one client in a minute; 0: no limit.", unlimited=True
    )
    smtp_client_logins: int = setting(
        10, NUMBER, ACCESS, "Failed logins of one client in a minute; 0: no limit.", unlimited=True
    )

    smtp_certificate: str = setting(
        "", PATH, TLS, "PEM file with the certificate chain; offers STARTTLS.", unset="no TLS"
    )
    smtp_key: str = setting(
        "",
        PATH,
        TLS,
        "PEM file with the private key.",
        unset="in smtp-certificate",
        aliases=("smtp-privatekey",),
    )
    smtp_ciphers: str = setting(
        "", TEXT, TLS, "Ciphers, with colons between them.", unset="the library's choice"
    )
    smtp_handshakes: int = setting(
        100,
        NUMBER,
        TLS,
        "TLS handshakes at a time; 0: no limit.",
        unlimited=True,
    )
    smtp_handshake_timeout: float = setting(
        30.0,
        SECONDS,
        TLS,
        "How long a TLS handshake or a PROXY header may take.",
        unit="s",
        minimum=0.001,
    )
    smtp_auth: tuple[str, ...] = setting(
        (),
        URIS,
        TLS,
        "Who knows the logins for incoming mail: hardcoded://, file://, exec:// and http:// URIs.",
        unset="none",
        secret=True,
    )
    smtp_username: str = setting("", TEXT, TLS, "The one login for incoming mail.", unset="none")
    smtp_password: str = setting("", TEXT, TLS, "Its password.", unset="none", secret=True)

    queue_directory: str = setting(
        "/var/spool/mailerq",
        PATH,
        QUEUES,
        "Where the embedded queue keeps its files; used while rabbitmq-address is not set.",
        needed=True,
    )
    rabbitmq_address: str = setting(
        "", TEXT, QUEUES, "Address of a RabbitMQ; not supported yet.", unset="the embedded queue"
    )
    rabbitmq_outbox: str = setting(
        "outbox", QUEUE, QUEUES, "The queue of mail to deliver, the only one consumed.", needed=True
    )
    rabbitmq_inbox: str | None = setting(
        None,
        QUEUE,
        QUEUES,
        "The queue that received mail goes to; empty drops it.",
        unset="as rabbitmq-outbox",
    )
    rabbitmq_results: str = setting("", QUEUE, QUEUES, "Gets every final result.", unset="off")
    rabbitmq_success: str = setting("", QUEUE, QUEUES, "Gets every delivered mail.", unset="off")
    rabbitmq_failure: str = setting("", QUEUE, QUEUES, "Gets every failed mail.", unset="off")
    rabbitmq_retry: str = setting(
        "", QUEUE, QUEUES, "Gets a copy of each mail that is tried again later.", unset="off"
    )
    rabbitmq_local: str = setting(
        "", QUEUE, QUEUES, "Gets received mail for local recipients.", unset="off"
    )
    rabbitmq_qos: int = setting(
        1000,
        NUMBER,
        QUEUES,
        "Messages held in memory at a time.",
        minimum=1,
        aliases=("max-messages",),
    )

    max_attempts: int = setting(
        0, NUMBER, DELIVERY, "Attempts before a message has failed; 0: no limit.", unlimited=True
    )
    max_delivertime: float = setting(
        86400.0,
        SECONDS,
        DELIVERY,
        "Time from the first sight of a message until it has failed.",
        unit="s",
        minimum=0,
        aliases=("max-deliver-time",),
    )
    retry_interval: tuple[int, ...] = setting(
        (600, 600, 1800, 1800, 3600, 3600, 7200),
        NUMBERS,
        DELIVERY,
        "Delays before attempt 2, 3 and so on; the last one repeats.",
        unit="s",
        minimum=0,
        needed=True,
    )
    smarthost: str = setting("", HOST, DELIVERY, "Host that takes all mail.", unset="none")
    smarthost_port: int = setting(25, PORT, DELIVERY, "Its port.", minimum=1)
    smtp_sink_address: str = setting(
        "",
        SINK,
        DELIVERY,
        "For trying out: connect here instead of to the real hosts.",
        unset="off",
        aliases=("smtp-sink-ip",),
    )
    smtp_sink_port: int = setting(25, PORT, DELIVERY, "Its port.", minimum=1)
    domain_maxconnections: int = setting(
        20,
        NUMBER,
        DELIVERY,
        "Connections to one domain at a time; 0: no limit.",
        unlimited=True,
    )
    connection_maxmessages: int = setting(
        0, NUMBER, DELIVERY, "Messages on one connection; 0: no limit.", unlimited=True
    )
    connection_maxidle: float = setting(
        5000.0, SECONDS, DELIVERY, "How long an idle connection is kept.", unit="ms", minimum=0
    )
    connect_timeout: float = setting(
        30.0, SECONDS, DELIVERY, "How long to wait for a connection.", unit="s", minimum=0.001
    )
    smtp_out_timeout: float = setting(
        60.0,
        SECONDS,
        DELIVERY,
        "How long to wait for a reply; five times as long after the message.",
        unit="s",
        minimum=0.001,
    )

    dns_timeout: float = setting(
        5.0,
        SECONDS,
        DNS,
        "How long to wait for one answer.",
        unit="s (older configurations: ms)",
        minimum=0.001,
        maximum=300,
    )
    dns_attempts: int = setting(
        4, NUMBER, DNS, "Questions before a lookup has failed.", minimum=1, maximum=100
    )

    plugin_directory: str = setting(
        "/usr/share/mailerq/plugins",
        PATH,
        PLUGINS,
        "Every *.so in it is loaded, in the order of names; it may be missing.",
        unset="none",
    )
    plugin_timeout: float = setting(
        300.0,
        SECONDS,
        PLUGINS,
        "How long a plugin may hold an event, and all those at the end of a mail together, before "
        "it is given up with 451; 0: for ever.",
        unit="s",
        minimum=0,
    )

    application_log: str = setting(
        "stderr",
        TEXT,
        LOGS,
        "Where messages about the program go: stdout, stderr, syslog or files, as a list.",
        unset="nowhere",
        aliases=("error-log",),
    )
    send_log_file: str = setting("", PATH, LOGS, "A line for each attempt.", unset="off")
    received_log_file: str = setting("", PATH, LOGS, "A line for each mail taken.", unset="off")
    refused_log_file: str = setting(
        "", PATH, LOGS, "A line for each command that is refused.", unset="off"
    )

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Attribute to place of each value that was set; filled by `load`, read by `origin`."""

    def __post_init__(self) -> None:
        for known in SETTINGS:
            value = getattr(self, known.attribute)
            if value is known.default:
                continue
            try:
                value = known.check(value)
            except ValueError as error:
                raise ConfigError(self._where(known.attribute), str(error)) from None
            object.__setattr__(self, known.attribute, value)
        if not self.hostname:
            object.__setattr__(self, "hostname", _this_host())
        for attribute, problem in _contradictions(self):
            raise ConfigError(self._where(attribute), problem)

    def _where(self, attribute: str) -> str:
        return self.origins.get(attribute) or attribute.replace("_", "-")

    @classmethod
    def load(
        cls,
        arguments: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        files: Iterable[str | os.PathLike[str]] = DEFAULT_FILES,
    ) -> Self:
        """Read all layers: `files` that exist, ``--config-file``, `environ`, `arguments`.

        `arguments` holds nothing but settings (see `split_arguments`); `environ` is
        `os.environ` where it is None. Raises `ConfigError` for the first thing that is wrong.
        """
        sources = Sources(_BY_KEY)
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
                except ValueError as error:
                    raise ConfigError(given.where, f"{key}: {error}") from None
                origins[known.attribute] = given.where
        return cls(**values, origins=origins)

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again.

        >>> Config().replace(smtp_threads=4).smtp_threads
        4
        """
        origins = {name: where for name, where in self.origins.items() if name not in changes}
        return dataclasses.replace(self, **changes, origins=origins)

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

    def text(self, name: str) -> str:
        """The value of a setting (key or attribute) as a file would hold it; empty: unset.

        A secret comes back as it is: ask `Setting.secret` before showing it.
        """
        known = _BY_KEY[name.replace("_", "-")]
        return known.write(getattr(self, known.attribute))


SETTINGS: Final = table(Config)
"""The table, in the order in which people read it; settings of a group stand together."""

_BY_KEY: Final = {name: known for known in SETTINGS for name in (known.key, *known.aliases)}


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Pairs of the attribute to change and what is wrong with it."""
    if config.rabbitmq_address:
        yield "rabbitmq_address", "rabbitmq-address is not supported yet; leave it away"
    for key in ("smtp_key", "smtp_ciphers", "smtp_secure_port"):
        if getattr(config, key) and not config.smtp_certificate:
            yield key, f"{key.replace('_', '-')} needs smtp-certificate, which is not set"
    if config.smtp_username and not config.smtp_password:
        yield "smtp_username", "smtp-username needs smtp-password, which is not set"
    if config.smtp_password and not config.smtp_username:
        yield "smtp_password", "smtp-password needs smtp-username, which is not set"
    for key, other in (
        ("smtp_secure_port", "smtp_port"),
        ("lmtp_port", "smtp_port"),
        ("lmtp_port", "smtp_secure_port"),
    ):
        for port in set(getattr(config, key)) & set(getattr(config, other)) - {0}:
            yield key, f"port {port} is in {other.replace('_', '-')} as well"
    for key in ("smtp_connections_in", "smtp_connections_out"):
        if (getattr(config, key) or 0) > config.smtp_connections:
            limit = f"smtp-connections ({config.smtp_connections})"
            yield key, f"{key.replace('_', '-')} is more than {limit}, which counts both"
    for key in ("rabbitmq_results", "rabbitmq_success", "rabbitmq_failure", "rabbitmq_retry"):
        if getattr(config, key) == config.rabbitmq_outbox:
            name = key.replace("_", "-")
            yield key, f"{name} is the outbox: what it gets would be delivered over and over"


@functools.cache
def _this_host() -> str:
    name = socket.gethostname()
    return name if "." in name else socket.getfqdn()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the settings for `Config.load` and all the rest, in order.

    A setting is a switch whose name is in the table (or known and not supported yet), with
    the value that follows it where it has no ``=``. After ``--`` everything is rest.

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
