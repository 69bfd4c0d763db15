"""Find settings that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from mailerq.address import parse_host, parse_mailbox, queue_leads_to
from mailerq.brokers import addresses_of_hosts
from mailerq.errors import AddressError

if TYPE_CHECKING:
    from mailerq.config import Config

__all__ = ["contradictions"]


def contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the attribute to change and the mistake, for each contradiction."""
    yield from _broker(config)
    for key in ("smtp_key", "smtp_ciphers", "smtp_secure_port"):
        if getattr(config, key) and not config.smtp_certificate:
            yield key, f"{key.replace('_', '-')} needs smtp-certificate, which is not set"
    if config.smtp_username and not config.smtp_password:
        yield "smtp_username", "smtp-username needs smtp-password, which is not set"
    if config.smtp_password and not config.smtp_username:
        yield "smtp_password", "smtp-password needs smtp-username, which is not set"
    if config.connection_key and not config.connection_certificate:
        yield "connection_key", "connection-key needs connection-certificate, which is not set"
    yield from _reports(config)
    yield from _logins(config)
    for key, other in (
        ("smtp_secure_port", "smtp_port"),
        ("lmtp_port", "smtp_port"),
        ("lmtp_port", "smtp_secure_port"),
    ):
        for port in set(getattr(config, key)) & set(getattr(config, other)) - {0}:
            yield key, f"port {port} is in {other.replace('_', '-')} as well"
    for key in ("smtp_local_domains", "smtp_local_addresses"):
        served = config.local_delivery and key == "smtp_local_domains"
        if getattr(config, key) and not (served or config.keeps_local_mail):
            yield (
                key,
                f"{key.replace('_', '-')}: mail for them has nowhere to go. Add 'rabbitmq-local:"
                " local' and have a program read that queue, or 'smarthost: ' with the host that"
                " keeps the mailboxes, or for domains 'local-delivery: ' with their LMTP server;"
                " domains that are to be passed on by MX belong in smtp-relay-domains",
            )
    inbox = config.rabbitmq_inbox
    queue = config.rabbitmq_local or (config.rabbitmq_outbox if inbox is None else inbox)
    if config.local_delivery and queue != config.rabbitmq_outbox:
        where = f"goes to the queue {queue!r}" if queue else "is dropped"
        yield "local_delivery", f"local-delivery gets no mail: mail for local domains {where}"
    for domain in sorted({*config.smtp_local_domains} & {*config.smtp_relay_domains}):
        yield "smtp_relay_domains", f"{domain} is in smtp-local-domains as well"
    for key in ("smtp_connections_in", "smtp_connections_out"):
        if (getattr(config, key) or 0) > config.smtp_connections:
            limit = f"smtp-connections ({config.smtp_connections})"
            yield key, f"{key.replace('_', '-')} is more than {limit}, which counts both"
    if config.rabbitmq_reports == config.rabbitmq_outbox:
        yield "rabbitmq_reports", "rabbitmq-reports is the outbox: reports would be sent as mail"
    for key in ("suppress_complaints", "suppress_bounces"):
        if getattr(config, key) in (True, "hard") and not config.rabbitmq_reports:
            yield key, f"{_key(key)} needs rabbitmq-reports, which is not set"
        elif getattr(config, key) in (True, "hard") and not (
            config.verp_key_file or config.suppress_unproved
        ):
            text = f"{_key(key)} needs verp-key-file: nothing can be proved without keys"
            yield key, text
    if config.suppress_unproved and not (
        config.suppress_complaints or config.suppress_bounces == "hard"
    ):
        text = "suppress-unproved needs suppress-complaints or suppress-bounces"
        yield "suppress_unproved", text
    if config.trace_header and not config.verp_key_file:
        yield "trace_header", "trace-header needs verp-key-file, which is not set"
    for key in ("rabbitmq_results", "rabbitmq_success", "rabbitmq_failure", "rabbitmq_retry"):
        queue = config.failure_queue if key == "rabbitmq_failure" else getattr(config, key)
        if queue == config.rabbitmq_outbox:
            name = key.replace("_", "-")
            yield key, f"{name} is the outbox: what it gets would be delivered over and over"
    for name in ("inbox", "local", "reports", "results", "success", "failure", "retry"):
        if queue_leads_to(str(getattr(config, f"rabbitmq_{name}") or ""), config.rabbitmq_outbox):
            text = f"rabbitmq-{name} is a part of the outbox: what it gets would be sent as mail"
            yield f"rabbitmq_{name}", text
    if config.verp_domains and not config.verp_key_file:
        yield "verp_domains", "verp-domains needs verp-key-file, which is not set"
    for key in ("failure_maxmessages", "failure_maxage"):
        for other in ("inbox", "local", "reports"):
            shared = getattr(config, f"rabbitmq_{other}") == config.failure_queue != ""
            if shared and getattr(config, key):
                name = key.replace("_", "-")
                yield key, f"{name} would delete received mail: rabbitmq-{other} is that queue too"


def _broker(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the settings of RabbitMQ."""
    for kind in ("rabbitmq", "cluster"):
        address, hosts = getattr(config, f"{kind}_address"), getattr(config, f"{kind}_host")
        if address and hosts:
            text = f"{kind}-host: {kind}-address names the hosts; remove one of both"
            yield f"{kind}_host", text
        for key in (f"{kind}_user", f"{kind}_password", f"{kind}_vhost"):
            if not getattr(config, key):
                continue
            if address:
                yield key, f"{_key(key)} belongs into {kind}-address, which is set; remove it"
            elif not hosts:
                yield key, f"{_key(key)} needs {kind}-host, which is not set"
        if hosts:
            try:
                addresses_of_hosts(hosts, "", "", "")
            except AddressError as error:
                yield f"{kind}_host", f"{kind}-host: {error}"


def _reports(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the settings of TLS reports."""
    if config.tls_report_from:
        try:
            parse_mailbox(config.tls_report_from, utf8=False)
        except AddressError as error:
            yield "tls_report_from", f"tls-report-from: {error}"
    if not config.tls_report:
        return
    if not config.tls_report_from and not config.tls_report_contact:
        yield (
            "tls_report",
            "tls-report needs tls-report-from, an address to send reports from, or at least"
            " tls-report-contact for reports by HTTPS",
        )


def _logins(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the mistakes in logins at other hosts."""
    for host, prefix in (("smarthost", "smarthost"), ("smtp_sink_address", "smtp_sink")):
        username, password = f"{prefix}_username", f"{prefix}_password"
        for key, other in ((username, password), (password, username), (username, host)):
            if getattr(config, key) and not getattr(config, other):
                yield key, f"{_key(key)} needs {_key(other)}, which is not set"
        host_ip = _ip(getattr(config, host))
        secure = (config.smarthost_secure if prefix == "smarthost" else None) or (
            config.connection_secure
        )
        if host_ip is None or not getattr(config, username) or secure != "none":
            continue
        if not any(host_ip in network for network in config.smtp_out_clear_range):
            yield (
                username,
                f"{_key(username)}: the login would go to {host_ip} over a connection without TLS."
                f" Set {prefix if prefix == 'smarthost' else 'connection'}-secure to required, or"
                " add the address to smtp-out-clear-range",
            )


def _key(attribute: str) -> str:
    return attribute.replace("_", "-")


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        found = parse_host(host) if host else ""
    except AddressError:
        return None
    return None if isinstance(found, str) else found
