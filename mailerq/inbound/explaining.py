"""Explain whether mail for a recipient ends here, by the code that decides on its arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mailerq.config import Config
from mailerq.inbound.addresses import LocalAddresses, is_local
from mailerq.mail import verp
from mailerq.rules.access import Access
from mailerq.rules.routes import reception_queue

__all__ = ["explain_arrival"]


def explain_arrival(
    recipient: str,
    config: Config,
    access: Access,
    listed: LocalAddresses,
    *,
    keys: Sequence[verp.Key] = (),
    now: float = 0.0,
) -> dict[str, Any] | None:
    """What becomes of mail that comes in for a local recipient; None if it goes out.

    `recipient` may be a domain. `keys` are those of signed return addresses.
    """
    returned = verp.verify(recipient, keys, now=now, max_age=config.verp_maxage) if keys else None
    if isinstance(returned, verp.Return) and (queue := config.rabbitmq_reports):
        return {
            "decision": "local",
            "where": config.place("verp-key-file"),
            "queue": queue,
            "reason": f"a return address that this server has signed: goes to the queue {queue},"
            f" see {config.place('rabbitmq-reports')}",
        }
    address = recipient if "@" in recipient else f"anybody@{recipient}"
    if not is_local(address, access, listed):
        return None
    if isinstance(returned, verp.Problem):
        return {
            "decision": "fail",
            "where": config.place("verp-key-file"),
            "queue": "",
            "reason": f"refused on arrival: the return address is {returned}",
        }
    by_domain = access.is_in_local_domain(address)
    queue = reception_queue(config, local=True)
    is_kept = config.keeps_local_mail or bool(config.local_delivery and by_domain)
    if is_kept and queue == config.rabbitmq_outbox:
        return None
    key = "smtp-local-domains" if by_domain else "smtp-local-addresses"
    found = {"decision": "local", "where": config.place(key), "queue": queue}
    if not is_kept:
        reason = (
            "refused on arrival: the recipient is local, and no setting says where its mail goes"
        )
        return {**found, "decision": "fail", "reason": f"{reason}; set rabbitmq-local"}
    name = "rabbitmq-local" if config.rabbitmq_local else "rabbitmq-inbox"
    reason = f"goes to the queue {queue}, see {config.place(name)}"
    if config.rabbitmq_reports:
        reason += f"; reports go to {config.rabbitmq_reports}"
    return {**found, "reason": reason}
