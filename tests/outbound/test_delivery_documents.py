"""The queue accepts or refuses any document, and delivery finishes every accepted one."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mailerq.config import Config
from mailerq.errors import MessageError
from mailerq.live import Live
from mailerq.mail.made import NotMade, is_made, make
from mailerq.message import Message
from mailerq.net.resolver import NoHosts
from mailerq.net.slots import Slots
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.outbound.limits import Limits
from mailerq.outbound.openings import Openings
from mailerq.queues import Publication
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.opening import open_embedded
from mailerq.rules.documents import examine, problems
from mailerq.rules.plan import Hold, Refuse, body_problem, plan
from mailerq.rules.retry import not_before
from mailerq.rules.shaping import Shaping
from mailerq.wire.smtp import Reply
from tests.outbound.kit import StubPlugins, StubResolver, StubWorker
from tests.outbound.memory_queues import NOW

KNOWN = (
    "envelope recipient key keepmime mime mime-base64 ips pool delayed maxdelivertime maxattempts"
    " retries data queues smarthost tags headers dsn results seen domain message-id priority"
    " requiretls security binarymime smtputf8 nextattempt received"
).split()

TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(alphabet=st.characters(), max_size=8),  # surrogates among them
    st.sampled_from([
        "outbox", "failure", "", "a" * 300, "ü" * 200, "a\0b", "\ud800", "9999-12-31 23:59:59",
        "0001-01-01 00:00:00", "2026-01-01 12:00:00", "1900-01-01 00:00:00", "c@never.test",
        "c@later.test", "null", "a\r\nb",
    ]),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400]),
    st.floats(),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
QUEUES = st.dictionaries(st.sampled_from(["results", "success", "failure", "retry", "x"]), PLAIN)
RESULTS = st.lists(st.dictionaries(st.sampled_from(["time", "attempt"]), PLAIN), max_size=3)
DOCUMENTS = st.builds(
    lambda some, more: {"recipient": "c@later.test", "mime": "hi", **some, **more},
    st.dictionaries(st.sampled_from(KNOWN) | TEXTS, VALUES, max_size=4),
    st.fixed_dictionaries(
        {},
        optional={
            "queues": QUEUES,
            "retries": st.lists(NUMBERS, max_size=3),
            "maxattempts": NUMBERS,
            "delayed": TEXTS,
            "maxdelivertime": TEXTS,
            "results": RESULTS,
            "seen": TEXTS,
            "data": st.dictionaries(TEXTS, VALUES, max_size=2),
            "headers": st.dictionaries(st.sampled_from(["add", "remove", "x"]), VALUES),
            "mime": st.one_of(
                st.sampled_from(["hi", "Subject: {$a}\r\n\r\n{$b", "A: b\r\n\r\n{$envelope}"]),
                st.dictionaries(st.sampled_from(["from", "text", "content", "headers"]), VALUES),
            ),
        },
    ),
)

NEVER = NoHosts("", Reply(550, "5.1.10 no mail here"))


async def publish_and_deliver(documents: list[dict[str, Any]], checked: bool = False) -> None:
    config = Config(
        hostname="me.test",
        rabbitmq_results="results",
        rabbitmq_failure="failure",
        rabbitmq_retry="retry",
        rabbitmq_qos=2,
    )
    with tempfile.TemporaryDirectory() as directory, trio.fail_after(60):
        async with (
            open_embedded(directory, clock=lambda: NOW) as queues,
            trio.open_nursery() as nursery,
        ):
            taken = 0
            for document in documents:
                try:
                    message = Message.from_dict(document)
                    if checked and any(problems(message, config, now=NOW)):
                        continue
                    await queues.publish([Publication("outbox", message)])
                except MessageError:
                    continue
                taken += 1
            worker = StubWorker(0, nursery, StubPlugins())
            dispatcher = Dispatcher(
                Live(config),
                queues,
                worker,  # type: ignore[arg-type]
                plugins=StubPlugins(),  # type: ignore[arg-type]
                resolver=StubResolver(never_test=NEVER),  # type: ignore[arg-type]
                openings=Openings(Slots(10), worker),  # type: ignore[arg-type]
                limits=Limits(Shaping(config)),
                clock=lambda: NOW,
            )
            await nursery.start(dispatcher.run)
            while not await is_quiet(queues, dispatcher, taken):
                await trio.sleep(0.002)
                dispatcher.flush()  # what waits for hosts that are down is tried as well
            await dispatcher.stop(5)
            nursery.cancel_scope.cancel()
            depths = {depth.queue: depth for depth in await queues.depths()}
            assert "damaged" not in depths
            delayed = depths["outbox"].delayed if "outbox" in depths else 0
            finished = depths["results"].total if "results" in depths else 0
            named = sum(isinstance(document.get("queues"), dict) for document in documents)
            assert taken - named <= delayed + finished <= taken
            if checked:
                entries = await queues.browse("results")
                assert "invalid" not in [entry.message.results[-1]["result"] for entry in entries]


async def is_quiet(queues: EmbeddedQueues, dispatcher: Dispatcher, taken: int) -> bool:
    """Whether nothing is under way, and nothing of the outbox is due."""
    figures = dispatcher.statistics()
    if figures["consumed"] < taken or figures["unsettled"] or figures["waiting"]:
        return False
    if queues.statistics()["leased"].get("outbox"):
        return False
    return all(depth.due == 0 for depth in await queues.depths() if depth.queue == "outbox")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DOCUMENTS, min_size=1, max_size=12))
@example([{"recipient": "c@later.test", "mime": "x", "retries": [10**400]}] * 4)
@example([{"recipient": "c@later.test", "mime": "x", "queues": {"retry": "outbox"}}] * 4)
@example([{"recipient": "c@never.test", "mime": "x", "queues": {"results": "a" * 300}}] * 4)
def test_any_document_is_taken_and_settled_or_refused(
    caplog: pytest.LogCaptureFixture, documents: list[dict[str, Any]]
) -> None:
    caplog.set_level(logging.ERROR)
    trio.run(publish_and_deliver, documents)
    assert caplog.messages == []


@settings(max_examples=60)
@given(st.lists(DOCUMENTS, min_size=1, max_size=12))
@example([{"recipient": "c@later.test", "mime": "x", "smarthost": {"name": "x", "port": 1e400}}])
@example([{"recipient": "c@later.test", "mime": "x", "ips": ["127.0.0.1", "x"]}])
def test_no_delivery_finds_a_document_invalid_that_publish_has_let_pass(
    documents: list[dict[str, Any]],
) -> None:
    trio.run(publish_and_deliver, documents, True)


NESTED = ["[" * 150 + "]" * 150, "[" * 250 + "]" * 250, '{"a":' * 250 + "1" + "}" * 250]


@settings(max_examples=200)
@given(st.one_of(st.sampled_from(NESTED), st.sampled_from(["1e400", "9" * 5000, '"\\ud800"'])))
def test_what_is_read_as_json_can_be_written_again(value: str) -> None:
    text = f'{{"recipient":"c@later.test","mime":"hi","x":{value}}}'
    try:
        message = Message.from_json(text)
    except MessageError:
        return
    assert Message.from_json(message.to_json()).properties == message.properties


def fails_unsent(document: dict[str, Any], config: Config) -> bool:
    """Whether a due message is finished without an attempt."""
    message = Message.from_dict(document)
    due = not_before(message.properties, now=NOW)
    now = NOW if due is None else max(NOW, due)
    decision = plan(message, config, now=now, seen=now)
    assert not isinstance(decision, Hold)
    if isinstance(decision, Refuse) or body_problem(message, supplied=False) is not None:
        return True
    if not is_made(message.properties):
        return False
    try:
        body = make(message.properties, message.body, hostname="me.test", now=now)
    except NotMade:
        return True
    return body_problem(Message(message.properties, body), supplied=False) is not None


@settings(max_examples=400)
@given(DOCUMENTS)
@example({"recipient": "c@d.test", "mime": "x", "delayed": "9999-12-31 23:59:59"})
@example({"recipient": "c@d.test", "mime": "x", "maxdelivertime": "1999-12-31 23:59:59"})
@example({"recipient": "c@d.test", "mime": "x", "security": "verified"})
@example({"recipient": "c@d.test", "mime": "A: b\r\n\r\n{$x", "data": {}})
@example({"recipient": "c@d.test", "mime": "x", "pool": "0"})
@example({"recipient": "c@d.test", "mime": {"text": "x"}})
@example({"recipient": "c@d.test", "mime": {"to": [{"email": "x"}], "from": "a@b.test"}})
@example({"recipient": "c@d.test", "mime": "x", "headers": {"add": {"a b": "c"}}})
@example({"recipient": "c@d.test", "mime": "Received: x\r\n" * 100 + "\r\n"})
@example({"recipient": "c@d.test", "mime": "Received: x\r\n" * 101 + "\r\n"})
def test_a_check_finds_an_error_where_delivery_would_and_nowhere_else(
    document: dict[str, Any],
) -> None:
    config = Config(hostname="me.test")
    try:
        message = Message.from_dict(document)
    except MessageError:
        return
    errors = [each.text for each in examine(message, config, now=NOW) if each.level == "error"]
    fails = fails_unsent(document, config)
    assert not fails or errors
    if not message.properties.get("ips"):  # one of them is tried, and all of them are checked
        assert fails or not errors
