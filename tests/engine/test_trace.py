"""Traces of an engine: a session that is almost over when the trace begins."""

from __future__ import annotations

from pathlib import Path

import trio

from mailerq.message import decode_properties
from mailerq.plugins import Connection
from tests.engine.kit import open_dialog, serve
from tests.support import DEADLINE


async def test_a_session_whose_connection_is_closed_is_not_joined(tmp_path: Path) -> None:
    """A plugin may hold a session for long after its connection has closed."""
    held, go = trio.Event(), trio.Event()
    seen: list[str] = []

    async def hold(connection: Connection) -> None:
        if not held.is_set():
            held.set()
            await go.wait()

    async def send(data: bytes) -> None:
        seen.extend(decode_properties(line).get("text", "") for line in data.splitlines())
        begun.set()

    async def follow() -> None:
        await engine.commands()["trace"]({"sessions": 1}).write(send)  # type: ignore[attr-defined]
        over.set()

    begun, over = trio.Event(), trio.Event()
    async with serve(tmp_path) as engine, trio.open_nursery() as nursery:
        engine.on("close", hold)
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.codes("NOOP first", "QUIT")
        await held.wait()
        nursery.start_soon(follow)
        await begun.wait()
        async with open_dialog(engine.addresses[0]) as dialog:
            await dialog.codes("NOOP second", "QUIT")
        with trio.move_on_after(DEADLINE):
            await over.wait()
        go.set()
        nursery.cancel_scope.cancel()
    assert over.is_set()
    assert "NOOP second" in seen
    assert seen[-1] == "(closed)"
