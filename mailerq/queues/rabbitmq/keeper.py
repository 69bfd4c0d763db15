"""Keeps a connection to one of several brokers open.

Theory of operation
-------------------
`Keeper.run` tries the brokers in turn, begins anew when a connection ends, and waits longer after
each failure in a row. Nothing here raises for a broker that is away: `Keeper.state` says what is
the case, with one message, and each change is logged once. A trouble that keepers with the same
`said` have in common, or that comes back without a connection in between, is logged for the first
of them. Others wait in `Keeper.connection`.
"""

from __future__ import annotations

import logging
import random
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import trio

from mailerq.queues.rabbitmq.addresses import Address
from mailerq.queues.rabbitmq.connection import BrokerError, Connection, connect

__all__ = ["Keeper", "State"]

log = logging.getLogger("mailerq.queues")

FIRST_PAUSE_SECONDS: Final = 0.1
MAX_PAUSE_SECONDS: Final = 10.0
MAX_SAID: Final = 100
STEADY_SECONDS: Final = 10.0
"""The next pause is the first one again if a connection has lasted this long."""


@dataclass(slots=True, frozen=True)
class State:
    """What is the case with a broker, for people.

    `connecting` for the first time; `open`; `blocked`: short of memory or disk, it takes no
    publications; `lost`: not reachable, or it refuses; `closed` by ourselves.
    """

    kind: Literal["connecting", "open", "blocked", "lost", "closed"]
    text: str


class Keeper:
    """An open connection most of the time. Belongs to the loop of `run`."""

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        name: str = "mailerq",
        context: ssl.SSLContext | None = None,
        open_seconds: float = 15.0,
        first_pause: float = FIRST_PAUSE_SECONDS,
        said: set[str] | None = None,
    ) -> None:
        self.state = State("connecting", f"connecting to {addresses[0]}")
        self.on_change: list[Callable[[State], None]] = []
        self.connections = 0
        """Connections opened so far."""
        self.version: tuple[int, ...] = ()
        """The version of the broker of the last connection."""
        self._addresses = addresses
        self._name = name
        self._context = context
        self._open_seconds = open_seconds
        self._first_pause = first_pause
        self._said = set() if said is None else said
        self._trouble_of = name if said is None else "RabbitMQ"
        self._open: Connection | None = None
        self._news = trio.Event()

    @property
    def open(self) -> Connection | None:
        """The connection, if there is one now."""
        return self._open if self._open is not None and self._open.is_open else None

    async def connection(self) -> Connection:
        """Wait for an open connection."""
        while (connection := self.open) is None:
            await self._news.wait()
        return connection

    async def run(self) -> None:
        """Keep a connection open until cancelled."""
        pause = self._first_pause
        turn = 0
        try:
            while True:
                address = self._addresses[turn % len(self._addresses)]
                begun = trio.current_time()
                try:
                    async with connect(
                        address,
                        context=self._context,
                        open_seconds=self._open_seconds,
                        name=self._name,
                    ) as connection:
                        reason = await self._keep(connection)
                    if trio.current_time() - begun >= STEADY_SECONDS:
                        pause = self._first_pause
                except BrokerError as error:
                    reason = error
                turn += 1  # the one that fails is tried last
                self._set(State("lost", str(reason)))
                if turn % len(self._addresses) == 0:
                    # Processes that lost the same broker do not come back at one moment.
                    await trio.sleep(pause * random.uniform(0.8, 1.2))
                    pause = min(2 * pause, MAX_PAUSE_SECONDS)
        finally:
            self._set(State("closed", "the connection is closed"))

    async def _keep(self, connection: Connection) -> BrokerError:
        def tell() -> None:
            if connection.blocked is None:
                self._set(State("open", f"connected to {connection.address}, {product}"))
            else:
                self._set(
                    State(
                        "blocked",
                        f"{connection.address} takes no publications: {connection.blocked}",
                    )
                )

        product = connection.product
        self._open = connection
        self.version = connection.version
        self.connections += 1
        connection.on_blocked.append(tell)
        tell()
        try:
            return await connection.wait_closed()
        finally:
            self._open = None

    def _level(self, state: State) -> int:
        """How loud to say it."""
        if state.kind not in ("blocked", "lost"):
            self._said.clear()
            return logging.INFO
        if state.text in self._said:
            return logging.DEBUG
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said.add(state.text)
        return logging.WARNING

    def _set(self, state: State) -> None:
        if state != self.state:
            self.state = state
            is_trouble = state.kind in ("blocked", "lost")
            name = self._trouble_of if is_trouble else self._name
            log.log(self._level(state), "%s: %s", name, state.text)
        news, self._news = self._news, trio.Event()
        news.set()
        for callback in tuple(self.on_change):
            callback(state)
