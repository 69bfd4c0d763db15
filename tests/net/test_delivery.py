"""Messages on their way: what is sent, what becomes of it, and what is said of it."""

from __future__ import annotations

from tests.net.delivery_kit import open_bench


async def test_a_message_arrives_and_its_result_is_published() -> None:
    async with open_bench() as bench:
        bench.send(body="Subject: x\r\n\r\nhi\r\n.dot\r\n", custom=77)
        (result,) = await bench.results()
        (mail,) = bench.peer.mails
        assert (mail.envelope, mail.recipient) == ("a@b.test", "c@d.test")
        assert mail.body == b"Subject: x\r\n\r\nhi\r\n.dot\r\n"
        assert result == {
            "attempt": 1,
            "type": "success",
            "state": "accept",
            "result": "accepted",
            "time": "2026-01-01 12:00:00",
            "mta": "mx.test",
            "from": "127.0.0.1",
            "to": "127.0.0.1",
            "messages": 1,
            "code": 250,
            "status": "2.0.0",
            "description": "taken",
        }
        (message,) = bench.queues["results"]
        assert message.body is None
        assert message.properties["custom"] == 77
        assert bench.queues["outbox"] == bench.queues["failure"] == bench.queues["retry"] == []
        assert len(bench.queues["success"]) == 1
        assert not bench.queues.leased
