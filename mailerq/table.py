"""The table of settings: a field of `Table` is one setting.

Each field carries, through `setting`, what its annotation and default do not say: how its text is
read, its bounds, its unit, a sentence for people. A setting that only a restart changes is
`fixed`. `mailerq.config` reads values into the table.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from mailerq.settings import (
    DNS_SERVERS,
    DOMAINS,
    EXTRACT,
    FLAG,
    HOST,
    HOSTNAME,
    IPS,
    LMTP,
    NAMES,
    NETWORKS,
    NUMBER,
    NUMBERS,
    PATH,
    PORT,
    PORTS,
    QUEUE,
    SECONDS,
    SECURE,
    SINK,
    SIZE,
    TEXT,
    URIS,
    DnsServer,
    Network,
    choice,
    fixed,
    setting,
)

__all__ = ["FAILURE_MESSAGES", "FAILURE_QUEUE", "FAILURE_SECONDS", "Table"]

FAILURE_QUEUE: Final = "failure"
FAILURE_MESSAGES: Final = 100_000
FAILURE_SECONDS: Final = 7 * 86400
"""The failure queue while nobody has named one, and what it keeps: nobody may empty it."""

HERE: Final = "Host"
SERVER: Final = "SMTP server"
ACCESS: Final = "Who may send what"
TLS: Final = "TLS and login"
QUEUES: Final = "Queues"
DELIVERY: Final = "Delivery"
TLS_OUT: Final = "TLS of deliveries"
REPORTS: Final = "Reports to senders"
DNS: Final = "DNS"
PLUGINS: Final = "Plugins"
LOGS: Final = "Logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Every setting with its default."""

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
        "Incoming connections at a time.",
        unset="as smtp-connections",
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
        False,
        FLAG,
        SERVER,
        "Offer DSN, and pass on to peers which reports a client wants; mailerq itself makes none.",
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
        (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128")),
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

    queue_directory: str = fixed(
        "/var/spool/mailerq",
        PATH,
        QUEUES,
        "Where the embedded queue keeps its files; used while rabbitmq-address is not set.",
        needed=True,
    )
    rabbitmq_address: str = fixed(
        "", TEXT, QUEUES, "Address of a RabbitMQ; not supported yet.", unset="the embedded queue"
    )
    rabbitmq_outbox: str = fixed(
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
    rabbitmq_failure: str | None = setting(
        None,
        QUEUE,
        QUEUES,
        "Gets every failed mail; empty: off.",
        unset=f"{FAILURE_QUEUE}, for reports without the text of the mail",
    )
    rabbitmq_retry: str = setting(
        "", QUEUE, QUEUES, "Gets a copy of each mail that is tried again later.", unset="off"
    )
    rabbitmq_local: str = setting(
        "", QUEUE, QUEUES, "Gets received mail for local recipients.", unset="off"
    )
    failure_maxmessages: int | None = setting(
        None,
        NUMBER,
        QUEUES,
        "Documents that the queue of rabbitmq-failure keeps, looked at once a minute; the oldest go"
        " first, but no mail while rabbitmq-failure is not set. 0: no limit.",
        unset=f"{FAILURE_MESSAGES} while rabbitmq-failure is not set, else no limit",
        unlimited=True,
    )
    failure_maxage: float | None = setting(
        None,
        SECONDS,
        QUEUES,
        "How long the queue of rabbitmq-failure keeps a document; 0: no limit.",
        unit="s",
        unset=f"{FAILURE_SECONDS} while rabbitmq-failure is not set, else no limit",
        unlimited=True,
    )
    rabbitmq_qos: int = fixed(
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
        "Delays before attempt 2, 3 and so on, give or take a tenth; the last one repeats.",
        unit="s",
        minimum=0,
        needed=True,
    )
    local_delivery: str = setting(
        "",
        LMTP,
        DELIVERY,
        "LMTP server with the mailboxes of smtp-local-domains: lmtp://host:port or lmtp:///path of"
        " its socket; docs/peers.md explains it.",
        unset="none",
    )
    smtp_default_ips: tuple[str, ...] = setting(
        (),
        IPS,
        DELIVERY,
        "Addresses to send from, for mail whose properties name neither ips nor a pool.",
        unset="the system chooses",
        aliases=("smtp-defaultips", "smtp-defaultip"),
    )
    smtp_mappable_ips: tuple[Network, ...] = setting(
        (),
        NETWORKS,
        DELIVERY,
        "Networks of addresses of this host; mail that comes in by such an address leaves from it,"
        " unless x-mq-ip or x-mq-pool say otherwise.",
        unset="none",
    )
    smtp_unmappable_ips: tuple[Network, ...] = setting(
        (), NETWORKS, DELIVERY, "Networks within smtp-mappable-ips that do not count.", unset="none"
    )
    addresses_file: str = setting(
        "",
        PATH,
        DELIVERY,
        "TOML file with pools, weights and EHLO names of addresses to send from;"
        " docs/addresses.md explains it.",
        unset="none",
    )
    dns_helofile: str = setting(
        "",
        PATH,
        DELIVERY,
        "File with lines of an address of this host and its name in EHLO; addresses-file comes"
        " first.",
        unset="hostname for all addresses",
    )
    smarthost: str = setting("", HOST, DELIVERY, "Host that takes all mail.", unset="none")
    smarthost_port: int = setting(25, PORT, DELIVERY, "Its port.", minimum=1)
    smarthost_username: str = setting(
        "",
        TEXT,
        DELIVERY,
        "Login at smarthost, by AUTH; docs/peers.md explains it.",
        unset="none",
    )
    smarthost_password: str = setting(
        "", TEXT, DELIVERY, "Its password.", unset="none", secret=True
    )
    smarthost_secure: str | None = setting(
        None, SECURE, DELIVERY, "TLS to smarthost.", unset="as connection-secure"
    )
    smtp_sink_address: str = setting(
        "",
        SINK,
        DELIVERY,
        "For trying out: connect here instead of to the real hosts.",
        unset="off",
        aliases=("smtp-sink-ip",),
    )
    smtp_sink_port: int = setting(25, PORT, DELIVERY, "Its port.", minimum=1)
    smtp_sink_username: str = setting(
        "", TEXT, DELIVERY, "Login at smtp-sink-address.", unset="none"
    )
    smtp_sink_password: str = setting(
        "", TEXT, DELIVERY, "Its password.", unset="none", secret=True
    )
    smtp_out_clear_range: tuple[Network, ...] = setting(
        tuple(
            map(
                ipaddress.ip_network,
                (
                    "127.0.0.0/8",
                    "10.0.0.0/8",
                    "172.16.0.0/12",
                    "192.168.0.0/16",
                    "::1/128",
                    "fc00::/7",
                ),
            )
        ),
        NETWORKS,
        DELIVERY,
        "Networks of hosts that may get a login over a connection without TLS.",
        unset="none",
    )
    smtp_out_port: int = setting(
        25, PORT, DELIVERY, "Port of the MX hosts; another than 25 is for trying out.", minimum=1
    )
    smtp_out_forbidden: tuple[Network, ...] = setting(
        tuple(
            map(
                ipaddress.ip_network,
                ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "::/128", "::1/128", "fe80::/10"),
            )
        ),
        NETWORKS,
        DELIVERY,
        "Networks that no mail is sent to, whatever MX records, recipients and smarthosts of"
        " messages say; not for smarthost and smtp-sink-address.",
        unset="none",
    )
    limits_file: str = setting(
        "",
        PATH,
        DELIVERY,
        "TOML file with limits for domains, providers and addresses; docs/limits.md explains it.",
        unset="none",
    )
    responses_file: str = setting(
        "",
        PATH,
        DELIVERY,
        "TOML file with patterns for the replies of peers; docs/answers.md explains it.",
        unset="none",
    )
    domain_maxmessages: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "Messages a minute to the hosts of a domain; 0: no limit.",
        unlimited=True,
    )
    domain_maxbytes: int = setting(
        0, SIZE, DELIVERY, "Bytes a minute to the hosts of a domain; 0: no limit.", unlimited=True
    )
    domain_maxconnects: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "New connections a minute to the hosts of a domain; 0: no limit.",
        unlimited=True,
    )
    domain_maxconnections: int = setting(
        20,
        NUMBER,
        DELIVERY,
        "Connections to the hosts of a domain at a time; 0: no limit.",
        unlimited=True,
    )
    domain_maxstarting: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "Connections to the hosts of a domain that are being opened; 0: no limit.",
        unlimited=True,
    )
    domain_maxidle: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "Connections to the hosts of a domain that wait for mail; 0: no limit.",
        unlimited=True,
    )
    ip_maxmessages: int = setting(
        0, NUMBER, DELIVERY, "Messages a minute to one remote address; 0: no limit.", unlimited=True
    )
    ip_maxbytes: int = setting(
        0, SIZE, DELIVERY, "Bytes a minute to one remote address; 0: no limit.", unlimited=True
    )
    ip_maxconnects: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "New connections a minute to one remote address; 0: no limit.",
        unlimited=True,
    )
    ip_maxconnections: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "Connections to one remote address at a time; 0: no limit.",
        unlimited=True,
    )
    ip_maxstarting: int = setting(
        0,
        NUMBER,
        DELIVERY,
        "Connections to one remote address that are being opened; 0: no limit.",
        unlimited=True,
    )
    connection_maxmessages: int = setting(
        0, NUMBER, DELIVERY, "Messages on one connection; 0: no limit.", unlimited=True
    )
    connection_maxbytes: int = setting(
        0, SIZE, DELIVERY, "Bytes on one connection; 0: no limit.", unlimited=True
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
        "How long to wait for a reply; 10 times as long, at most 10 minutes, after the message. The"
        " replies to an envelope get more while no other mail waits, see docs/peers.md.",
        unit="s",
        minimum=0.001,
    )

    connection_secure: str = setting(
        "opportunistic",
        SECURE,
        TLS_OUT,
        "TLS of deliveries: not tried, used if the host offers it, required, or required with a"
        " certificate that is valid for the host; docs/security.md explains it.",
    )
    connection_ca_file: str = setting(
        "",
        PATH,
        TLS_OUT,
        "PEM file with the authorities whose certificates are valid.",
        unset="those of the system",
    )
    connection_certificate: str = setting(
        "",
        PATH,
        TLS_OUT,
        "PEM file with the certificate chain to show to hosts that ask for one.",
        unset="none",
    )
    connection_key: str = setting(
        "",
        PATH,
        TLS_OUT,
        "PEM file with its private key.",
        unset="in connection-certificate",
    )
    connection_ciphers: str = setting(
        "", TEXT, TLS_OUT, "Ciphers, with colons between them.", unset="the library's choice"
    )
    connection_tls_min: str = setting(
        "1.2",
        choice("1.0", "1.1", "1.2", "1.3"),
        TLS_OUT,
        "The oldest version of TLS. Where a certificate has to be valid, 1.2 is the least; 1.0 and"
        " 1.1 need DEFAULT@SECLEVEL=0 in connection-ciphers.",
    )
    connection_tls_retry: float = setting(
        3600.0,
        SECONDS,
        TLS_OUT,
        "How long mail goes in clear at once to a host whose TLS failed, where nothing demands"
        " TLS.",
        unit="s",
        minimum=0,
    )

    verp_key_file: str = setting(
        "",
        PATH,
        REPORTS,
        "File with the keys of signed return addresses (VERP): lines of an id and a secret, the"
        " newest first.",
        unset="no signed return addresses",
    )
    verp_maxage: float = setting(
        30 * 86400.0,
        SECONDS,
        REPORTS,
        "How long a signed return address is good.",
        unit="s",
        minimum=86400,
        maximum=10_000 * 86400,
    )

    dns_servers: tuple[DnsServer, ...] = setting(
        (),
        DNS_SERVERS,
        DNS,
        "Servers to ask for MX records and the addresses in them, the next one where one does not"
        " answer: 192.0.2.53, 127.0.0.1:5353, [::1]:5353. The system looks up smarthosts.",
        unset="those of the system",
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

    plugin_directory: str = fixed(
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
