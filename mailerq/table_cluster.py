"""The settings of a cluster, a part of `mailerq.table.Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailerq.settings import BROKERS, FLAG, QUEUE, SECONDS, TEXT, fixed, setting
from mailerq.table_storage import StorageTable

__all__ = ["ClusterTable"]

CLUSTER: Final = "Cluster"


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False, eq=False)
class ClusterTable(StorageTable):
    """How instances hear of each other."""

    cluster_address: str = fixed(
        "",
        BROKERS,
        CLUSTER,
        "The brokers of the exchange on which instances hear of each other, as rabbitmq-address;"
        " also with the embedded queue. docs/cluster.md explains it.",
        unset="the brokers of rabbitmq-address",
        secret=True,
    )
    cluster_host: str = fixed(
        "",
        TEXT,
        CLUSTER,
        "Older form of cluster-address: the hosts, with or without ports.",
        unset="none",
    )
    cluster_user: str = fixed("", TEXT, CLUSTER, "The login for cluster-host.", unset="guest")
    cluster_password: str = fixed("", TEXT, CLUSTER, "Its password.", unset="guest", secret=True)
    cluster_vhost: str = fixed("", TEXT, CLUSTER, "The vhost of cluster-host.", unset="/")
    cluster_exchange: str = fixed(
        "cluster",
        QUEUE,
        CLUSTER,
        "The exchange, which is the same for all instances of a cluster; empty: this instance is"
        " alone.",
        unset="alone",
    )
    cluster_verify: bool = fixed(
        True,
        FLAG,
        CLUSTER,
        "Refuse a broker of cluster-address (amqps) whose certificate is not valid for its host.",
    )
    cluster_timeout: float = setting(
        1.0,
        SECONDS,
        CLUSTER,
        "How long 'mailerq cluster list' listens.",
        unit="s",
        minimum=0.1,
        maximum=60,
    )
    cluster_rows: bool = setting(
        False,
        FLAG,
        CLUSTER,
        "Enter pauses, forced errors and suppressions for all instances, as with --cluster, unless"
        " the command says --local; also the suppressions that reports make.",
    )
