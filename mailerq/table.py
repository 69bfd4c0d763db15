"""The table of settings: a field of `Table` is one setting.

Each field carries, through `setting`, what its annotation and default do not say: how its text is
read, its bounds, its unit, a sentence for people. A setting that only a restart changes is
`fixed`. `mailerq.config` reads values into the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import (
    DNS_SERVERS,
    FLAG,
    HOST,
    IPS,
    LMTP,
    NETWORKS,
    NUMBER,
    NUMBERS,
    PATH,
    PORT,
    QUEUE,
    SECONDS,
    SECURE,
    SINK,
    SIZE,
    TEXT,
    DnsServer,
    Network,
    choice,
    fixed,
    networks,
    setting,
)
from mailerq.table_server import ServerTable

__all__ = ["FAILURE_MESSAGES", "FAILURE_QUEUE", "FAILURE_SECONDS", "Table"]

FAILURE_QUEUE: Final = "failure"
FAILURE_MESSAGES: Final = 100_000
FAILURE_SECONDS: Final = 7 * 86400
"""The failure queue while nobody has named one, and what it keeps: nobody may empty it."""

QUEUES: Final = "Queues"
DELIVERY: Final = "Delivery"
TLS_OUT: Final = "TLS of deliveries"
POLICIES: Final = "Policies of recipients"
SIGNING: Final = "Signing"
DNS: Final = "DNS"
PLUGINS: Final = "Plugins"
LOGS: Final = "Logs"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class Table(ServerTable):
    """Every setting with its default."""

    queue_directory: str = fixed(
        "/var/spool/mailerq",
        PATH,
        QUEUES,
        "Where the daemon keeps its files: the embedded queue, the operator's pauses, the control"
        " socket.",
        needed=True,
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
    rabbitmq_reports: str = setting(
        "",
        QUEUE,
        QUEUES,
        "Gets reports that come in for local recipients: bounces, complaints and the like."
        " docs/reports.md explains it.",
        unset="off",
    )
    rabbitmq_dsn: str = setting(
        "",
        QUEUE,
        QUEUES,
        "Gets the reports that mailerq makes for senders, as mail for another program to send.",
        unset="they are sent",
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
        "Messages held in memory at a time; beyond that, a few for each connection "
        "that has nothing to send.",
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
        "", TEXT, DELIVERY, "Login at smarthost, by AUTH; docs/peers.md explains it.", unset="none"
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
        networks("127.0.0.0/8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7"),
        NETWORKS,
        DELIVERY,
        "Networks of hosts that may get a login over a connection without TLS.",
        unset="none",
    )
    smtp_out_port: int = setting(
        25, PORT, DELIVERY, "Port of the MX hosts; another than 25 is for trying out.", minimum=1
    )
    smtp_out_forbidden: tuple[Network, ...] = setting(
        networks("0.0.0.0/8 127.0.0.0/8 169.254.0.0/16 ::/128 ::1/128 fe80::/10"),
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
        "", PATH, TLS_OUT, "PEM file with its private key.", unset="in connection-certificate"
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

    dkim_directory: str = setting(
        "", PATH, SIGNING, "Keys for mail from each DOMAIN: DOMAIN/SELECTOR.pem.", unset="none"
    )
    dkim_file: str = setting(
        "", PATH, SIGNING, "TOML file: which keys sign which mail; docs/signing.md.", unset="none"
    )
    dkim_missing: str = setting(
        "defer",
        choice("defer", "unsigned"),
        SIGNING,
        "Mail whose key is missing or cannot be read: try again later, or send without it.",
    )
    arc_seal: bool = setting(
        False, FLAG, SIGNING, "Seal received mail that goes on (ARC), by keys that are for arc."
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
    dane: bool = setting(True, FLAG, DNS, "Obey the TLSA records of hosts, see docs/dane.md.")
    dns_trust_ad: bool = setting(
        False, FLAG, DNS, "Believe the AD bit of name servers that are not on this host."
    )
    dns_validator: str = setting(
        "resolver", choice("resolver", "unbound"), DNS, "What checks DNSSEC, see docs/dane.md."
    )
    dns_trust_anchor: str = setting(
        "/usr/share/dns/root.key", PATH, DNS, "Keys of the root zone for dns-validator: unbound."
    )

    mta_sts: bool = setting(
        True,
        FLAG,
        POLICIES,
        "Honour the MTA-STS policies of recipients' domains (RFC 8461); docs/mta-sts.md explains"
        " it.",
    )
    mta_sts_port: int = setting(
        443,
        PORT,
        POLICIES,
        "Port of the servers that have the policies; another than 443 is for trying out.",
        minimum=1,
    )
    tls_report: bool = setting(
        False,
        FLAG,
        POLICIES,
        "Count how TLS works, and send the daily reports that recipients' domains ask for (RFC"
        " 8460); docs/tls-reports.md explains it.",
    )
    tls_report_from: str = setting(
        "",
        TEXT,
        POLICIES,
        "Sender of these reports, an address whose domain signs with DKIM.",
        unset="no reports by mail",
    )
    tls_report_contact: str = setting(
        "",
        TEXT,
        POLICIES,
        "Address or URL in these reports, for those who have questions.",
        unset="tls-report-from",
    )
    tls_report_organization: str = setting(
        "", TEXT, POLICIES, "Name of the sender of these reports.", unset="hostname"
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
