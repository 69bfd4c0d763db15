"""LMTP in the client machine."""

from __future__ import annotations

import pytest

from mailerq.wire.client import ClientProtocol, Failed, Refused, Step
from mailerq.wire.smtp import Reply
from tests.wire.test_client import PIPELINING, feed, output


@pytest.fixture(params=[False, True], ids=["whole", "bytewise"])
def bytewise(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_lmtp_begins_with_lhlo_and_knows_no_helo(bytewise: bool) -> None:
    protocol = ClientProtocol("me.test", lmtp=True)
    assert feed(protocol, b"220 mx.test LMTP\r\n", bytewise=bytewise) == []
    assert output(protocol) == b"LHLO me.test\r\n"
    (event,) = feed(protocol, b"500 what?\r\n", bytewise=bytewise)
    assert event == Refused(Step.EHLO, Reply(500, "what?"))
    assert protocol.ended


def test_lmtp_never_asks_for_a_mail_without_a_recipient(bytewise: bool) -> None:
    protocol = ClientProtocol("me.test", lmtp=True)
    feed(protocol, b"220 mx.test\r\n" + PIPELINING, bytewise=bytewise)
    protocol.mail("a@b.test", "c@d.test")
    output(protocol)
    (event,) = feed(protocol, b"250 ok\r\n550 no\r\n354 go\r\n", bytewise=bytewise)
    assert isinstance(event, Failed)
    assert protocol.out_of_step
