"""What becomes of mail that a broker cannot take: kept in a reserve, and moved over in order."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mailerq.errors import MessageError, QueueError
from mailerq.message import Message
from mailerq.queues import Depth, Publication, Settlement
from mailerq.queues.embedded.queues import EmbeddedQueues
from mailerq.queues.fallback.mover import MIN_AGAIN_SECONDS, Mover
from mailerq.queues.fallback.queues import FallbackQueues, Patience
from mailerq.queues.fallback.reserve import Line
from mailerq.queues.opening import open_embedded
from tests.queues.contract import again, mail, receive, tag_of
from tests.queues.fallback.standin import QUICK, StandIn, both, standin
from tests.support import DEADLINE, until

AWAY = "the cable is cut"


@asynccontextmanager
async def opened(
    directory: Path, *, limit: int = 10_000_000, patience: Patience = QUICK
) -> AsyncIterator[tuple[StandIn, FallbackQueues]]:
    async with (
        standin(directory) as broker,
        both(broker, directory, limit=limit, patience=patience) as queues,
    ):
        yield broker, queues


async def until_away(queues: FallbackQueues, away: bool = True) -> None:
    with trio.fail_after(DEADLINE):
        while queues.away is not away:
            await queues._news.wait()


async def until_moved(queues: FallbackQueues) -> None:
    with trio.fail_after(DEADLINE):
        while queues.reserve.lines:
            await next(iter(queues.reserve.lines.values())).news.wait()


def tags(publications: list[list[Publication]]) -> list[int]:
    return [each.message.properties["tag"] for group in publications for each in group]


async def test_mail_for_a_broker_that_is_away_is_moved_over_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        for tag in range(450):
            await queues.publish([mail(tag)])
        assert broker.published == []
        assert queues.statistics()["fallback"]["waiting"] == {"outbox": 450}
        assert await queues.depths() == [Depth("outbox", 450, 0)]
        broker.set_away(None)
        await until_moved(queues)
        assert tags(broker.published) == list(range(450))
        assert await queues.depths() == await broker.depths() == [Depth("outbox", 450, 0)]
        await queues.publish([mail(450)])
        assert tags(broker.published)[-1] == 450


async def test_a_copy_has_one_identity_in_all_attempts(tmp_path: Path) -> None:
    """Also over a failure in the middle, and over the death of the process that kept the mail."""
    own = {"fallback-identity": ["mine", 1]}
    tried: list[Publication] = []

    async def lose_the_confirmation() -> None:
        raise QueueError("not confirmed")

    async with opened(tmp_path) as (broker, queues):
        publish = broker.publish

        async def noted(publications: Sequence[Publication], *, again: bool = False) -> None:
            tried.extend(publications)
            await publish(publications, again=again)

        broker.publish = noted  # type: ignore[method-assign]
        broker.before_confirm = lose_the_confirmation
        await queues.publish([mail(1), mail(2, **own)])
        first = [each.identity for each in tried]
        assert len(set(first)) == 2
        assert not any(each.again for each in tried)
        await until(lambda: len(tried) >= 4)
    async with opened(tmp_path) as (broker, queues):
        await until_moved(queues)
        moved = [each for group in broker.published for each in group]
        attempts = [tried[at : at + 2] for at in range(2, len(tried), 2)]
        for attempt in (*attempts, moved):
            assert [each.identity for each in attempt] == first
            assert all(each.again for each in attempt)
        assert [each.message.properties for each in moved] == [
            mail(1).message.properties,
            mail(2, **own).message.properties,
        ]


async def test_what_waits_for_the_broker_is_kept_when_the_broker_is_away(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues), trio.open_nursery() as nursery:
        await trio.testing.wait_all_tasks_blocked()  # it has seen the broker there
        broker.away = AWAY
        nursery.start_soon(queues.publish, [mail(1)])
        await broker.waiting.wait()
        assert not queues.away
        broker.set_away(AWAY)
        await until_away(queues)
        await until(lambda: queues.reserve.stored == 1)


async def test_a_short_trouble_costs_a_wait_and_no_more(tmp_path: Path) -> None:
    patience = Patience(grace=DEADLINE, steady=0)
    async with (
        opened(tmp_path, patience=patience) as (broker, queues),
        trio.open_nursery() as nursery,
    ):
        broker.set_away(AWAY)
        nursery.start_soon(queues.publish, [mail(1)])
        await broker.waiting.wait()
        broker.set_away(None)
        await until(lambda: broker.published != [])
        assert (queues.away, queues.reserve.stored) == (False, 0)


async def test_new_mail_goes_behind_what_is_being_moved(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues), trio.open_nursery() as nursery:
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(tag) for tag in range(300)])
        slow, go_on = trio.Event(), trio.Event()

        async def stop() -> None:
            slow.set()
            await go_on.wait()

        broker.before_confirm = stop
        broker.set_away(None)
        with trio.fail_after(DEADLINE):
            await slow.wait()
        nursery.start_soon(queues.publish, [mail(300)])
        nursery.start_soon(queues.publish, [Publication("other", Message({"tag": -1}))])
        await trio.testing.wait_all_tasks_blocked(0.01)
        broker.before_confirm = None
        go_on.set()
        await until(lambda: len(tags(broker.published)) == 302)
        assert [tag for tag in tags(broker.published) if tag >= 0] == list(range(301))


async def test_due_times_survive(tmp_path: Path) -> None:
    now = time.time()
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(1, due=now + 1000), mail(2, due=now - 1000), mail(3)])
        assert await queues.depths() == [Depth("outbox", 2, 1)]
        broker.set_away(None)
        await until_moved(queues)
        (group,) = broker.published
        assert [each.due for each in group] == [pytest.approx(now + 1000, abs=0.01), None, None]
        assert await broker.depths() == [Depth("outbox", 2, 1)]


@pytest.mark.parametrize("limit", [0, 200_000])
async def test_without_room_in_the_reserve_a_publication_fails(tmp_path: Path, limit: int) -> None:
    async with opened(tmp_path, limit=limit) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        kept = 10 if limit else 0
        for tag in range(kept):
            await queues.publish([mail(tag, body=bytes(10_000))])
        with pytest.raises(QueueError, match=AWAY) as raised:
            await queues.publish([mail(kept, body=bytes(limit))])
        assert ("fallback-maxsize" in str(raised.value)) is bool(limit)
        broker.set_away(None)
        await until_away(queues, False)
        await until_moved(queues)
        await queues.publish([mail(kept)])
        assert tags(broker.published) == list(range(kept + 1))


async def test_order_is_given_up_rather_than_mail_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=300_000) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(1, body=bytes(10_000))])
        broker.set_away(None)
        broker.refused["outbox"] = QueueError("no room for the queue outbox")
        await until_away(queues, False)
        with trio.fail_after(DEADLINE):
            while not queues.reserve.lines["outbox"].failures:
                await queues.reserve.lines["outbox"].news.wait()
        await queues.publish([mail(2)])
        assert queues.reserve.lines["outbox"].count == 2
        del broker.refused["outbox"]
        queues.limit = 1
        await queues.publish([mail(3)])
        await until_moved(queues)
        assert sorted(tags(broker.published)) == [1, 2, 3]


async def test_a_queue_that_the_broker_refuses_concerns_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.refused["results"] = QueueError("the queue 'results' is not there")
        result = Publication("results", Message({"tag": 7}))
        for _ in range(3):
            await queues.publish([result])
        await queues.publish([mail(1)])
        assert tags(broker.published) == [1]
        assert queues.statistics()["fallback"]["waiting"] == {"results": 3}
        assert caplog.text.count("'results' is not there") == 1
        del broker.refused["results"]
        await until_moved(queues)
        assert await broker.depths() == [Depth("outbox", 1, 0), Depth("results", 3, 0)]


async def test_what_the_broker_never_takes_stays_and_keeps_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(tag) for tag in range(3)])
        check = broker.check

        def picky(publication: Publication) -> None:
            if publication.message.properties["tag"] == 1:
                raise MessageError("too large")
            check(publication)

        broker.check = picky  # type: ignore[method-assign]
        broker.set_away(None)
        await until_moved(queues)
        assert tags(broker.published) == [0, 2]
        assert caplog.text.count("too large") == 1
        await queues.publish([mail(3)])
        assert tags(broker.published) == [0, 2, 3]
    async with opened(tmp_path) as (broker, queues):  # the next start tries again
        await until_moved(queues)
        assert tags(broker.published) == [1]


async def test_a_message_that_no_queue_can_have_is_refused_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        for bad in (Publication("", Message({})), mail(1, more=object())):
            with pytest.raises(MessageError):
                await queues.publish([mail(0), bad])
        assert queues.reserve.messages == 0


async def test_what_a_disk_does_not_let_go_is_published_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(tag) for tag in range(3)])
        asked = 0
        works = EmbeddedQueues.change

        async def change(*values: Any, **more: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked <= 3:
                raise QueueError("read-only file system")
            return await works(*values, **more)

        monkeypatch.setattr(EmbeddedQueues, "change", change)
        broker.set_away(None)
        await until(lambda: asked > 0)
        with trio.fail_after(DEADLINE):
            while queues.reserve.lines:
                queues._movers[0].hasten()
                await trio.sleep(0.01)
        assert tags(broker.published) == [0, 1, 2]
        assert "read-only file system" in caplog.text


async def test_a_start_moves_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(1), mail(2)])
    async with opened(tmp_path) as (broker, queues):
        await until_moved(queues)
        assert tags(broker.published) == [1, 2]
    assert "2 messages wait for the broker" in caplog.text


# Settlements


async def test_a_settlement_ends_while_the_broker_is_away(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        await queues.publish([mail(1), mail(2)])
        async with queues.consume("outbox", prefetch=9) as consumer:
            done, retried = await receive(consumer, 2)
            broker.set_away(AWAY)
            await until_away(queues)
            result = Publication("results", Message({"tag": 7}))
            later = again(retried, due=time.time() + 1000)
            await queues.ack([Settlement(done, [result]), Settlement(retried, [later])])
            with pytest.raises(ValueError, match="over"):
                await queues.ack([Settlement(done, [result])])
        assert await broker.depths() == []
        broker.set_away(None)
        await until_moved(queues)
        assert await broker.depths() == [Depth("outbox", 0, 1), Depth("results", 1, 0)]


async def test_a_settlement_that_finds_no_room_leaves_the_lease(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=1) as (broker, queues):
        await queues.publish([mail(1)])
        async with queues.consume("outbox", prefetch=9) as consumer:
            (lease,) = await receive(consumer, 1)
            broker.set_away(AWAY)
            await until_away(queues)
            result = Publication("results", Message({"tag": 7}))
            with pytest.raises(QueueError, match="fallback-maxsize"):
                await queues.ack([Settlement(lease, [result])])
            broker.set_away(None)
            await until_away(queues, False)
            await queues.ack([Settlement(lease, [result])])
        assert await broker.depths() == [Depth("results", 1, 0)]


async def test_what_is_settled_without_the_broker_is_known_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        await queues.publish([mail(1), mail(2)])
        async with queues.consume("outbox", prefetch=9) as consumer:
            leases = await receive(consumer, 2)
            broker.set_away(AWAY)
            await until_away(queues)
            broker.lost = ["first", "second"]
            await queues.ack([Settlement(lease) for lease in leases])
        assert queues.reserve.messages == 0
    async with standin(tmp_path) as broker:
        async with both(broker, tmp_path) as queues:
            assert broker.recognised == ["first", "second"]
            assert queues._on_recognised == broker.on_recognised
            queues._on_recognised("first")
            assert await queues.reserve.forget(lambda each, _: each in queues._recognised) == 1
        assert broker.on_recognised is None
        broker.recognised.clear()
        async with both(broker, tmp_path):
            assert broker.recognised == ["second"]


async def test_acknowledgements_that_may_be_lost_are_known_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        assert broker.on_unheard is not None
        broker.on_unheard(["first", "second"])
        await until(lambda: queues._records)
    async with opened(tmp_path) as (broker, _):
        assert broker.recognised == ["first", "second"]


async def test_settled_mail_is_forgotten_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mailerq.queues.fallback import queues as module

    monkeypatch.setattr(module, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(module, "RECORD_SECONDS", -1.0)
    async with opened(tmp_path) as (_, queues):
        await queues.reserve.store([], ["first"], 10_000_000)
        queues._records = True
        await until(lambda: not queues._records)
        assert await queues.reserve.begin() == []


# Away and back


async def test_each_change_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        for tag in range(5):
            await queues.publish([mail(tag)])
        broker.set_away(None)
        await until_moved(queues)
    said = [record.getMessage() for record in caplog.records]
    directory = tmp_path / "fallback"
    assert said == [
        f"new mail is kept in {directory}, up to 10000000 bytes, until the broker takes it: {AWAY}",
        f"the broker takes mail again; 5 messages are moved there from {directory}",
        f"5 messages were moved from {directory} to the broker; none is left",
    ]


async def test_a_broker_that_does_not_last_is_waited_for_longer(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Only `_follow` is under test: the files of the queue have threads in real time."""
    async with opened(tmp_path, patience=Patience(grace=3, steady=1)) as (broker, queues):
        waits = []
        for last in (False, False, False, True, False):
            broker.set_away(AWAY)
            await until_away(queues)
            begun = trio.current_time()
            broker.set_away(None)
            await until_away(queues, False)
            waits.append(round(trio.current_time() - begun))
            await trio.sleep(100 if last else 5)
        assert waits == [1, 2, 4, 8, 1]


async def test_a_pause_that_ends_while_the_mover_looks_is_over(
    tmp_path: Path, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that stands still at that moment is no reason to wait for the next mail."""
    mock_clock.rate = 1.0
    look = Mover._next

    def look_for_long(mover: Mover) -> Line | None:
        found = look(mover)
        mock_clock.jump(MIN_AGAIN_SECONDS)
        return found

    monkeypatch.setattr(Mover, "_next", look_for_long)
    async with opened(tmp_path) as (broker, queues):
        broker.refused["outbox"] = QueueError("not now")
        await queues.publish([mail(1)])
        line = queues.reserve.lines["outbox"]
        while not line.failures:
            await line.news.wait()
        broker.refused.clear()
        await until_moved(queues)
        assert tags(broker.published) == [1]


async def test_publications_from_other_loops(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await trio.to_thread.run_sync(trio.run, queues.publish, [mail(1)])
        broker.set_away(None)
        await until_moved(queues)
        await trio.to_thread.run_sync(trio.run, queues.publish, [mail(2)])
        assert tags(broker.published) == [1, 2]
    broker.away, queues.away = AWAY, True
    with pytest.raises(QueueError, match="closed"):
        await queues.publish([mail(3)])


async def test_damaged_mail_is_set_aside_at_the_broker(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(1), mail(2)])
    import apsw

    connection = apsw.Connection(str(tmp_path / "fallback" / "queue.db"))
    connection.execute("UPDATE message SET properties = '{}' WHERE id = 1")
    connection.close()
    async with opened(tmp_path) as (broker, queues):
        await until_moved(queues)
        assert await broker.depths() == [Depth("damaged", 1, 0), Depth("outbox", 1, 0)]


async def test_a_purge_empties_both(tmp_path: Path) -> None:
    async with opened(tmp_path) as (broker, queues):
        await queues.publish([mail(1)])
        broker.set_away(AWAY)
        await until_away(queues)
        await queues.publish([mail(2), mail(3)])
        assert await queues.purge("outbox") == 3
        assert await queues.depths() == []
        assert queues.reserve.messages == 0
        await queues.publish([mail(4)])
        broker.set_away(None)
        await until_moved(queues)
        async with queues.consume("outbox", prefetch=9) as consumer:
            (lease,) = await receive(consumer, 1)
            assert tag_of(lease) == 4


async def test_the_reserve_of_another_process_is_not_opened(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(QueueError, match="held by another"):
            async with open_embedded(str(tmp_path / "fallback"), outbox=""):
                raise AssertionError


async def test_the_reserve_of_a_process_that_is_gone_is_moved_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailerq.queues.adoption.LOOK_SECONDS", 0.02)
    async with standin(tmp_path) as broker:
        async with both(broker, tmp_path, share=1, processes=2) as queues:
            broker.set_away(AWAY)
            await until_away(queues)
            await queues.publish([mail(1), mail(2)])
            await queues.reserve.store([], ["done"], 1_000_000)
        broker.set_away(None)
        async with both(broker, tmp_path, share=0, processes=2) as other:
            await until(lambda: tags(broker.published) == [1, 2])
            assert broker.recognised == ["done"]
            assert other.moved == 0
            # Its own process comes back, and gets its reserve.
            async with both(broker, tmp_path, share=1, processes=2) as queues:
                assert queues.reserve.messages == 0
                assert queues.limit == other.limit == 5_000_000
