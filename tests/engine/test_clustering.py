"""The cluster of an engine: a defect in it does not end deliveries."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mailerq import Engine
from mailerq.clustering import running
from mailerq.clustering.member import Cluster
from tests.clustering.kit import MemoryExchange, MemoryLink
from tests.support import DEADLINE, configure, until


class BrokenLink(MemoryLink):
    async def run(self) -> None:
        raise RuntimeError("a defect")


async def test_settings_may_change_while_the_cluster_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = trio.Event()

    def change(cluster: Cluster) -> None:
        changed(cluster)
        told.set()

    changed = Cluster.settings_changed
    monkeypatch.setattr(Cluster, "settings_changed", change)
    link = BrokenLink(MemoryExchange(), "a")
    monkeypatch.setattr(running, "open_exchange", lambda config, clock: link)
    config = configure(tmp_path, cluster_address="amqp://b.test", cluster_exchange="cluster")
    with trio.fail_after(DEADLINE):
        async with Engine(config) as engine:
            await until(lambda: "the cluster is left for" in caplog.text)
            engine.reload()
            await told.wait()
