"""The table of replies: each is named, stands in one place, and has the status of its code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mailerq
from mailerq.wire import smtp
from mailerq.wire.client import ClientProtocol
from mailerq.wire.smtp import STATUS, Reply, status_for

REPLIES = {name: reply for name, reply in vars(smtp).items() if isinstance(reply, Reply)} | {
    "greeting": smtp.greeting("mx.test"),
    "not_now": smtp.not_now("later"),
    "not_taken": smtp.not_taken("never"),
    "too_big_for_peer": smtp.too_big_for_peer(2, 1),
    "tls_failed": smtp.tls_failed("reason"),
    "requiretls_failed": smtp.requiretls_failed("reason"),
    "no_such_domain": smtp.no_such_domain("x is no domain"),
    "bounced": smtp.bounced("bounced by ann"),
    "null_mx": smtp.null_mx("d.test"),
    "loops_back": smtp.loops_back("d.test"),
    "forbidden_hosts": smtp.forbidden_hosts("d.test", "192.0.2.1"),
}
BARE = {"greeting", "START_DATA"}
"""RFC 2034, section 3, gives these no status."""


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_has_a_status_of_the_class_of_its_code(name: str) -> None:
    reply = REPLIES[name]
    assert (reply.status is None) == (name in BARE)
    assert reply.status is None or reply.status[0] == str(reply.code)[0]


def test_two_replies_do_not_say_the_same() -> None:
    assert len({(reply.code, reply.text) for reply in REPLIES.values()}) == len(REPLIES)


@pytest.mark.parametrize("code", [421, 450, 451, 452, 454, 535, 550, 552, 554])
def test_a_refusal_without_a_status_gets_one_of_its_class(code: int) -> None:
    assert STATUS.fullmatch(status_for(code))
    assert status_for(code)[0] == str(code)[0]


def test_no_other_module_writes_a_refusal_with_a_status() -> None:
    package = Path(mailerq.__file__).parent
    found = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        if path != package / "wire" / "smtp.py"
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (status := STATUS.match(node.value)) and status[1] in "45" and status[0] != node.value
    ]
    assert found == []


LINES = st.lists(
    st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")), min_size=1, max_size=140
)


@given(LINES, st.sampled_from([b"\r\n", b"\n", b"\r\r\n"]), st.sampled_from([b" ", b"-", b""]))
@example([b""] * 127 + [b"last"], b"\r\n", b" ")
@example([b""] * 128 + [b"last"], b"\r\n", b" ")
@example([b"mx.test", b"SIZE 1000", b"8BITMIME"], b"\r\n", b" ")
def test_a_reply_read_at_once_is_the_reply_read_by_its_lines(
    lines: list[bytes], end: bytes, last: bytes
) -> None:
    heads = [b"-"] * (len(lines) - 1) + [last]
    data = b"".join(b"250" + head + line + end for head, line in zip(heads, lines, strict=True))
    events = []
    for size in (len(data), 1):  # a reply whose first line came alone is read by its lines
        protocol = ClientProtocol("me.test")
        protocol.receive_data(b"220 mx.test\r\n")
        event = protocol.next_event()
        for start in range(0, len(data), size):
            protocol.receive_data(data[start : start + size])
            event = protocol.next_event()
        events.append((event, protocol.extensions, protocol.replies))
    assert events[0] == events[1]
