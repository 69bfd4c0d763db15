"""Names, arguments and delays of the queues of a broker."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailerq.address import queue_leads_to
from mailerq.config import Config
from mailerq.queues.rabbitmq.topology import (
    DECLARE_SECONDS,
    DELAYS,
    EXPIRES_SECONDS,
    LATE_SECONDS,
    LATE_SHARE,
    PARKED_SECONDS,
    QueueType,
    Topology,
    instance_queue,
    name_problem,
    step_for,
)


@example(84528.25)
@given(st.floats(0.001, 30 * 86400))
def test_steps_make_up_any_delay_not_early_and_hardly_late(delay: float) -> None:
    waited, steps = 0.0, 0
    while step := step_for(delay - waited):
        waited += step
        steps += 1
    assert steps <= 14 + delay // DELAYS[-1]
    # The last second is the smallest wait.
    assert delay <= waited <= delay + max(delay * LATE_SHARE + LATE_SECONDS, 1.0)


@pytest.mark.parametrize("delay", DELAYS)
def test_a_delay_that_has_a_queue_takes_one_step(delay: int) -> None:
    assert step_for(delay) == step_for(delay - 0.3) == delay


def test_the_default_retries_take_one_step_each() -> None:
    for seconds in Config().retry_interval:
        assert step_for(float(seconds)) == seconds


@given(st.text(min_size=1, max_size=255), st.text(max_size=255), st.sampled_from(DELAYS))
def test_names_fit_and_differ(queue: str, destination: str, seconds: int) -> None:
    topology = Topology()
    if name_problem(queue) or not queue.isprintable():
        return
    names = [
        topology.parked(queue, destination)[0],
        topology.parked(queue, destination + "x")[0],
        topology.index(queue)[0],
        *(name for name, _ in topology.waits(queue)),
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert name_problem(name) is None and name.isprintable() and name != queue
    assert topology.wait(queue, seconds)[0] in names


def test_the_names_of_usual_queues_are_plain() -> None:
    topology = Topology()
    assert topology.wait("outbox", 900)[0] == "outbox.wait.900"
    assert topology.parked("outbox", "example.com")[0] == "outbox.parked.to.example.com"
    assert topology.index("outbox")[0] == "outbox.parked.index"


@given(st.text(max_size=100), st.sampled_from(DELAYS))
def test_a_queue_that_leads_to_another_is_told_by_its_name(rest: str, seconds: int) -> None:
    topology = Topology()
    names = [
        topology.wait("outbox", seconds)[0],
        topology.parked("outbox", rest)[0],
        topology.index("outbox")[0],
        instance_queue("outbox", rest),
    ]
    for name in names:
        assert queue_leads_to(name, "outbox")
        assert not queue_leads_to(name, "outbox2")
    for name in ("outbox", "outbox.old", "results", "outbox2.wait.900"):
        assert not queue_leads_to(name, "outbox")


VERSIONS = [(3, 10, 8), (4, 0, 5), (4, 3)]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_quorum_queue_loses_nothing_when_mail_falls_back(version: tuple[int, ...]) -> None:
    topology = Topology("quorum", version, max_priority=9)
    expected: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-message-ttl": 60_000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "outbox",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    if version >= (4,):
        expected["x-delivery-limit"] = -1
    assert topology.wait("outbox", 60) == ("outbox.wait.60", expected)
    assert "x-max-priority" not in topology.main()
    assert topology.problem() is None


@pytest.mark.parametrize("version", VERSIONS)
def test_no_message_is_dropped_because_it_came_back_often(version: tuple[int, ...]) -> None:
    topology = Topology("quorum", version)
    every = [
        topology.main(),
        topology.handed("outbox"),
        topology.parked("outbox", "a.test")[1],
        topology.index("outbox")[1],
        *(arguments for _, arguments in topology.waits("outbox")),
    ]
    limits = {arguments.get("x-delivery-limit") for arguments in every}
    assert limits == ({-1} if version >= (4,) else {None})


def test_a_classic_queue_has_priorities_and_no_strategy() -> None:
    topology = Topology("classic", (3, 8), max_priority=9)
    assert topology.main() == {"x-queue-type": "classic", "x-max-priority": 9}
    _, arguments = topology.parked("outbox", "a.test")
    assert arguments["x-max-priority"] == 9
    assert "x-dead-letter-strategy" not in arguments and "x-overflow" not in arguments
    assert topology.problem() is None


def test_a_broker_that_is_too_old_for_quorum_queues_is_named() -> None:
    assert "classic" in (Topology("quorum", (3, 9, 11)).problem() or "")
    assert Topology("quorum", ()).problem() is None


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_no_queue_expires_with_mail_in_it(queue_type: QueueType) -> None:
    topology = Topology(queue_type, (3, 10))
    for _, arguments in topology.waits("outbox"):
        assert "x-expires" not in arguments
    _, arguments = topology.parked("outbox", "a.test")
    assert arguments["x-message-ttl"] == PARKED_SECONDS * 1000
    # What is published just before the next declaration still falls back in time.
    assert PARKED_SECONDS + DECLARE_SECONDS + 3600 < EXPIRES_SECONDS
    assert arguments["x-expires"] == EXPIRES_SECONDS * 1000


@pytest.mark.parametrize("name", ["amq.x", "ä" * 128])
def test_names_that_a_broker_refuses(name: str) -> None:
    assert name_problem(name)
