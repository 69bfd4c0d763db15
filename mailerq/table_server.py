"""The settings of the host and of incoming mail, the first part of the table of settings.

`mailerq.table` has the rest, and says what a field is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import (
    DOMAINS,
    EXTRACT,
    FLAG,
    HOSTNAME,
    IPS,
    NAMES,
    NETWORKS,
    NUMBER,
    PATH,
    PORTS,
    SECONDS,
    SIZE,
    TEXT,
    URIS,
    Network,
    choice,
    fixed,
    networks,
    setting,
)

__all__ = ["ServerTable"]

HERE: Final = "Host"
SERVER: Final = "SMTP server"
ACCESS: Final = "Who may send what"
TLS: Final = "TLS and login"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class ServerTable:
    """The settings of the host, of the SMTP server, of access, and of TLS and login, with their
    defaults.
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
    user: str = fixed(
        "", TEXT, HERE, "Account to change to once the ports are open.", unset="stay as started"
    )
    lock: str = fixed(
        "",
        PATH,
        HERE,
        "File with the process id that keeps a second instance from starting.",
        unset="mailerq.pid in queue-directory",
    )
    shutdown_timeout: float = setting(
        30.0,
        SECONDS,
        HERE,
        "How long a stop waits for running transactions; 5 s later the process ends anyway.",
        unit="s",
        minimum=0,
    )

    watchdog_seconds: float = setting(
        5.0,
        SECONDS,
        HERE,
        "How long a worker may stand still before the log says in what; 0: nobody looks.",
        unit="s",
        minimum=0,
    )

    smtp_ip: tuple[str, ...] = fixed(
        (), IPS, SERVER, "Addresses to listen on.", unset="all addresses"
    )
    smtp_port: tuple[int, ...] = fixed(
        (25,), PORTS, SERVER, "Ports to listen on, as a list with ranges: 25,2525,1024-1026."
    )
    smtp_secure_port: tuple[int, ...] = fixed(
        (), PORTS, SERVER, "Ports to listen on that speak TLS from the first byte.", unset="none"
    )
    lmtp_port: tuple[int, ...] = fixed(
        (), PORTS, SERVER, "Ports to listen on that speak LMTP (RFC 2033).", unset="none"
    )
    smtp_processes: int = fixed(
        1,
        NUMBER,
        SERVER,
        "Processes, each with its own smtp-threads, plugins, and share of the embedded queue.",
        minimum=1,
        maximum=256,
    )
    smtp_threads: int = fixed(
        1,
        NUMBER,
        SERVER,
        "Worker threads, each with its own plugin context, for incoming mail; the first sends.",
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
        "Incoming connections at a time. By default a tenth of smtp-connections, at most 50, is"
        " left to outgoing ones.",
        unset="the rest of smtp-connections",
        minimum=1,
    )
    smtp_connections_out: int | None = setting(
        None,
        NUMBER,
        SERVER,
        "Outgoing connections at a time.",
        unset="half of smtp-connections",
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
        "normalize",
        choice("normalize", "reject"),
        SERVER,
        "A bare CR or LF in a mail: make it CR LF, or refuse the mail.",
    )
    dsn_advertise: bool = setting(
        True,
        FLAG,
        SERVER,
        "Offer DSN: clients say which reports they want, and mailerq makes them or passes the wish"
        " on to peers.",
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
    smtp_extract: tuple[str, ...] = setting(
        ("safe",),
        EXTRACT,
        SERVER,
        "Which x-mq-* fields of clients that may relay become properties: safe ones (tags, delays"
        " up to max-delivertime, DSN wishes and the like), none, all, or names such as ips.",
        needed=True,
    )
    smtp_extract_range: tuple[Network, ...] = setting(
        (),
        NETWORKS,
        SERVER,
        "Networks of clients that may relay in whose mail all x-mq-* fields count.",
        unset="none",
    )
    smtp_extract_logins: tuple[str, ...] = setting(
        (),
        NAMES,
        SERVER,
        "Logins in whose mail all x-mq-* fields count; * is every login.",
        unset="none",
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
        networks("127.0.0.0/8 ::1/128"),
        NETWORKS,
        ACCESS,
        "Networks whose clients may send to any recipient without a login.",
    )
    smtp_local_domains: tuple[str, ...] = setting(
        (),
        DOMAINS,
        ACCESS,
        "Domains that anybody may send to and whose mail ends here: in rabbitmq-local, another"
        " inbox than the outbox, at local-delivery or at smarthost.",
        unset="none",
    )
    smtp_relay_domains: tuple[str, ...] = setting(
        (),
        DOMAINS,
        ACCESS,
        "Domains that anybody may send to and whose mail other hosts keep: it goes on by MX.",
        unset="none",
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
        "Networks of proxies, which must say with a PROXY header who their client is; where one "
        "names none, as in a health check, it is greeted and has no other right.",
        unset="none",
    )
    smtp_xclient_range: tuple[Network, ...] = setting(
        (),
        NETWORKS,
        ACCESS,
        "Networks whose clients may say with XCLIENT, once, who their client is.",
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
    smtp_client_prefix4: int = setting(
        32,
        NUMBER,
        ACCESS,
        "IPv4 clients of one network of this prefix length are one client to its limits.",
        unit="bits",
        minimum=8,
        maximum=32,
    )
    smtp_client_prefix6: int = setting(
        64,
        NUMBER,
        ACCESS,
        "IPv6 clients of one network of this prefix length are one client to its limits: 64, or "
        "56 or 48 as providers hand them out.",
        unit="bits",
        minimum=16,
        maximum=128,
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
