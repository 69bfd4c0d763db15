"""How the settings become the use of a broker, and what its version cannot do of them."""

from __future__ import annotations

import ssl
from dataclasses import replace
from typing import Any

import pytest

from mailerq import Config
from mailerq.errors import ConfigError, MessageError
from mailerq.message import Message
from mailerq.queues import Publication
from mailerq.queues.rabbitmq.addresses import Address, addresses_of, cluster_addresses_of
from mailerq.queues.rabbitmq.options import Options
from mailerq.queues.rabbitmq.queues import open_rabbitmq

BROKER = {"rabbitmq_address": "amqp://u:p@h/v"}


def options(**settings: Any) -> Options:
    return Options.of(Config(**BROKER, **settings))


def test_the_defaults_are_safe() -> None:
    found = options()
    assert (found.queue_type, found.declare, found.durable, found.persistent) == (
        "quorum", True, True, True,
    )  # fmt: skip
    for version in ((3, 10, 8), (4, 0, 5), (4, 3), ()):
        assert list(found.notes(version)) == []
    assert found.context is None  # the certificate is verified
    assert found.names == ("failure", "outbox")


def test_an_unverified_certificate_is_asked_for() -> None:
    context = options(rabbitmq_verify=False).context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)


def test_only_queues_of_results_may_forget() -> None:
    """A queue that gets mail as well is none of results."""
    found = options(
        rabbitmq_queue_type="classic", rabbitmq_durable=False, rabbitmq_persistent=False,
        rabbitmq_results="results", rabbitmq_success="results", rabbitmq_retry="local",
        rabbitmq_local="local", rabbitmq_inbox="inbox",
    )  # fmt: skip
    assert found.results == {"results", "failure"}
    for queue in ("outbox", "inbox", "local", "damaged", "other"):
        assert not found.is_transient(queue, (3, 10))
    assert found.is_transient("results", (3, 10))
    assert not found.is_transient("results", (4, 3))


@pytest.mark.parametrize(
    ("settings", "version", "said"),
    [
        ({"rabbitmq_durable": False}, (3, 10), "quorum queues only as durable"),
        ({"rabbitmq_durable": False, "rabbitmq_queue_type": "classic"}, (4, 3), "4.3 refuses"),
        ({"rabbitmq_durable": False, "rabbitmq_queue_type": "classic"}, (4, 0), ""),
        ({"rabbitmq_persistent": False}, (4, 0), "every message on disk"),
        ({"rabbitmq_persistent": False, "rabbitmq_queue_type": "classic"}, (4, 0), ""),
        ({"rabbitmq_lazy": True}, (3, 10), "keep no bodies in memory"),
        ({"rabbitmq_lazy": True, "rabbitmq_queue_type": "classic"}, (3, 10), ""),
        ({"rabbitmq_lazy": True, "rabbitmq_queue_type": "classic"}, (4, 3), "without it"),
        ({"rabbitmq_maxpriority": 9}, (3, 10), "no priorities"),
        ({"rabbitmq_maxpriority": 9}, (4, 0, 5), "two priorities"),
        ({"rabbitmq_maxpriority": 9}, (4, 3, 1), "32 priorities"),
        ({"rabbitmq_maxpriority": 9, "rabbitmq_queue_type": "classic"}, (4, 3), ""),
        ({"rabbitmq_consumers": 4}, (4, 0), "smtp-processes"),
        ({"rabbitmq_publishers": 4}, (4, 0), "smtp-processes"),
    ],
)
def test_what_a_version_cannot_do_is_said_with_the_version(
    settings: dict[str, Any], version: tuple[int, ...], said: str
) -> None:
    notes = list(options(**settings).notes(version))
    assert len(notes) == bool(said)
    if said:
        (key,) = (key for key in settings if key != "rabbitmq_queue_type")
        assert said in notes[0] and key.replace("_", "-") in notes[0]
        assert "consumers" in key or "publishers" in key or ".".join(map(str, version)) in notes[0]


def test_queues_are_lazy_where_the_broker_takes_that() -> None:
    lazy = options(rabbitmq_lazy=True, rabbitmq_queue_type="classic")
    assert lazy.is_lazy((3, 11, 5)) and not lazy.is_lazy((3, 12)) and not lazy.is_lazy((4, 3))


def test_the_queue_of_failures_is_bounded_for_all_processes_together() -> None:
    (bound,) = options(smtp_processes=4).bounds
    assert (bound.queue, bound.messages, bound.reports_only) == ("failure", 100_000, True)
    (bound,) = options(rabbitmq_failure="failed", failure_maxage=60).bounds
    assert (bound.queue, bound.messages, bound.seconds) == ("failed", 0, 60)
    assert not bound.reports_only


def test_older_settings_name_the_same_brokers() -> None:
    older = Config(
        rabbitmq_host="a.test; b.test:5673", rabbitmq_user="u", rabbitmq_password="p",
        rabbitmq_vhost="v",
    )  # fmt: skip
    uri = Config(rabbitmq_address="amqp://u:p@a.test;b.test:5673/v")
    assert addresses_of(older) == addresses_of(uri)
    assert older.has_broker and not Config().has_broker


def test_older_settings_name_the_same_brokers_of_a_cluster() -> None:
    older = Config(
        cluster_host="a.test; b.test:5673", cluster_user="u", cluster_password="p",
        cluster_vhost="v",
    )  # fmt: skip
    uri = Config(cluster_address="amqp://u:p@a.test;b.test:5673/v")
    assert cluster_addresses_of(older) == cluster_addresses_of(uri)
    assert older.has_cluster and not older.has_broker
    assert cluster_addresses_of(Config(**BROKER)) == addresses_of(Config(**BROKER))


@pytest.mark.parametrize(
    "settings",
    [
        {"rabbitmq_host": "a.test", **BROKER},
        {"rabbitmq_user": "u"},
        {"rabbitmq_password": "p"},
        {"rabbitmq_vhost": "v", **BROKER},
        {"rabbitmq_host": "a.test:0"},
        {"rabbitmq_address": "http://a.test"},
        {"cluster_host": "a.test", "cluster_address": "amqp://a.test"},
        {"cluster_user": "u", **BROKER},
        {"cluster_host": "a.test:0"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Config(**settings)


async def test_no_result_goes_to_a_lock_of_the_cluster() -> None:
    config = Config(rabbitmq_address="amqp://127.0.0.1:1")
    options = replace(Options.of(config), publish_seconds=0.1)
    async with open_rabbitmq([Address("127.0.0.1", 1)], options) as queues:
        for name in ("cluster.lock.192.0.2.1", "cluster.lock."):
            with pytest.raises(MessageError, match="is that of a lock of the cluster"):
                queues.check(Publication(name, Message({})))
            with pytest.raises(MessageError, match="is that of a lock of the cluster"):
                await queues.publish([Publication(name, Message({}))])
        queues.check(Publication("clusters", Message({})))
    assert Options.of(Config(rabbitmq_address="amqp://h", cluster_exchange="")).locks == ""
