"""The cluster of an engine: opened before mail is sent, and never the end of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import trio

from mailerq.clustering.addresses import available, has
from mailerq.clustering.digest import settings_digest
from mailerq.clustering.lease_file import LeaseFile
from mailerq.clustering.member import Cluster, Facts
from mailerq.live import Live
from mailerq.outbound.cells import boot_time
from mailerq.outbound.dispatcher import Dispatcher
from mailerq.outbound.keeper import Keeper
from mailerq.outbound.limits import Limits
from mailerq.queues import Queues
from mailerq.queues.opening import instance_queue, open_exchange

__all__ = ["EngineCluster"]

log = logging.getLogger("mailerq.cluster")

DEFECT_SECONDS: Final = 5

JUDGE_SECONDS: Final = 1.0
"""How often mail that was handed to this instance is compared with the owners of its addresses."""


class EngineCluster:
    """What an engine has to do with its cluster, if the settings name one."""

    def __init__(
        self,
        live: Live,
        keeper: Keeper,
        limits: Limits,
        dispatchers: Callable[[], Sequence[Dispatcher]],
        queues: Queues,
    ) -> None:
        self._live = live
        self._keeper = keeper
        self._limits = limits
        self._dispatchers = dispatchers
        self._queues = queues
        self._digest = ""
        self._cluster: Cluster | None = None
        self._reloaded = trio.Event()

    async def open(self, stack: AsyncExitStack) -> None:
        """Learn which addresses need a lease. Raises `ConfigError`."""
        config = self._live.current.config
        if not config.has_cluster:
            return
        await self._look_at_settings()
        cluster = Cluster(
            config.instance,
            open_exchange(config, boot_time),
            self._keeper,
            self._facts,
            lambda: available(self._live.current.config, self._limits.shaping.local_ips),
            file=LeaseFile(config.queue_directory),
            clock=boot_time,
            on_leases=self._leases_changed,
        )
        stack.callback(cluster.close)
        await cluster.open()
        self._limits.leases = cluster.leases
        self._cluster = cluster

    async def _look_at_settings(self) -> None:
        self._digest = await trio.to_thread.run_sync(settings_digest, self._live.current.config)

    async def run(self) -> None:
        """Belong to the cluster. A defect in that does not end deliveries."""
        if self._cluster is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_settings)
            nursery.start_soon(self._follow_owners)
            while True:
                try:
                    await self._cluster.run()
                except Exception:
                    log.exception("the cluster is left for %d seconds", DEFECT_SECONDS)
                await trio.sleep(DEFECT_SECONDS)

    async def _follow_settings(self) -> None:
        while True:
            await self._reloaded.wait()
            self._reloaded = trio.Event()
            await self._look_at_settings()
            if self._cluster is not None:
                self._cluster.settings_changed()

    def _leases_changed(self) -> None:
        self._limits.leases_changed()
        for dispatcher in self._dispatchers():
            dispatcher.flows.seek()

    async def _follow_owners(self) -> None:
        while True:
            await trio.sleep(JUDGE_SECONDS)
            for dispatcher in self._dispatchers():
                dispatcher.flows.hand_on()

    def reload(self) -> None:
        """Other settings are in force."""
        self._reloaded.set()

    def rows_changed(self) -> None:
        """The rows in force have changed."""
        if self._cluster is not None:
            self._cluster.rows_changed()

    @property
    def queue(self) -> str:
        """The queue of mail that others hand over; empty without a cluster or a broker for mail."""
        config = self._live.current.config
        if not (config.has_cluster and config.has_broker):
            return ""
        return instance_queue(config.rabbitmq_outbox, config.instance)

    def keeper_of(self, ips: Sequence[str]) -> str | None:
        """The queue of the instance that should send from some addresses; empty: this one.

        None: not known now.
        """
        name = "" if self._cluster is None else self._cluster.keeper_of(ips)
        if name is None and any(map(has, ips)):
            return ""  # an address of this host that the settings do not name
        if not name:
            return name
        return instance_queue(self._live.current.config.rabbitmq_outbox, name)

    async def stop(self) -> None:
        """Leave the cluster in order: no mail is sent any more."""
        if self._cluster is not None:
            await self._cluster.stop()

    def statistics(self) -> dict[str, Any]:
        """Numbers for `mailerq status`."""
        return {} if self._cluster is None else self._cluster.statistics()

    def _facts(self) -> Facts:
        """What this instance announces of itself."""
        dispatchers = self._dispatchers()
        return Facts(
            settings=self._live.current.number,
            digest=self._digest,
            delivered=sum(each.counters.delivered for each in dispatchers),
            connections=sum(each.connections for each in dispatchers),
            waiting=sum(each.in_memory for each in dispatchers),
            takes=self._queues.identity if self.queue else "",
        )
