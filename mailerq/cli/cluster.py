"""``mailerq cluster list``: the instances that announce themselves on the exchange."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from mailerq.cli.common import command_parser, complain, print_json, print_table
from mailerq.config import Config
from mailerq.message import format_time
from mailerq.queues.opening import open_exchange
from mailerq.rules.cluster import MAX_MEMBERS, Hello, Here, read, write

if TYPE_CHECKING:
    from mailerq.clustering.member import Link

__all__ = ["list_cluster", "main", "print_instances"]

CONNECT_SECONDS = 15.0

MAX_NAMED = 4
"""Addresses that a line of the table names."""


def main(settings: list[str], rest: list[str]) -> int:
    """``mailerq cluster``, and ``mailerq --list-cluster``."""
    parser = command_parser("cluster", "The instances of the cluster.")
    parser.add_argument("--list-cluster", action="store_true", help="as 'mailerq cluster list'")
    parser.add_argument("--json", action="store_true", help="for programs: JSON, one per line")
    parser.add_argument(
        "command", nargs="?", choices=["list"], default="list",
        help="listen for cluster-timeout, and show who announces itself",
    )  # fmt: skip
    options = parser.parse_args(rest)
    return print_instances(Config.load(settings), as_json=options.json)


def print_instances(config: Config, *, as_json: bool) -> int:
    """Listen, print, and return the exit status."""
    if not config.has_cluster:
        complain(
            "there is no cluster: cluster-exchange is empty"
            if not config.cluster_exchange
            else "there is no cluster: set cluster-address or rabbitmq-address"
        )
        return os.EX_CONFIG
    import trio

    found, problem = trio.run(list_cluster, open_exchange(config), config.cluster_timeout)
    if problem:
        complain(f"the cluster cannot be heard: {problem}")
        return os.EX_UNAVAILABLE
    instances = sorted(found.values(), key=lambda here: here.name)
    if as_json:
        for here in instances:
            print_json(_document(here))
        return os.EX_OK
    headings = (
        "INSTANCE", "HOST", "VERSION", "STARTED", "SETTINGS", "DIGEST", "PER MINUTE",
        "CONNECTIONS", "IN MEMORY", "ROWS", "OWNS", "ADDRESSES",
    )  # fmt: skip
    print_table(headings, [_cells(here) for here in instances])
    if len({here.digest for here in instances}) > 1:
        complain("the instances have different settings: see DIGEST, and docs/cluster.md")
    return os.EX_OK


def _cells(here: Here) -> list[Any]:
    return [
        here.name, here.hostname, here.version, format_time(here.started), here.settings,
        here.digest, here.messages, here.connections, here.waiting, here.rows,
        _named(here.holds), _named(here.ips),
    ]  # fmt: skip


def _named(ips: tuple[str, ...]) -> str:
    more = len(ips) - MAX_NAMED
    return ", ".join(ips[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _document(here: Here) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(here)
    for name in ("kind", "v", "serial", "run", "queue"):
        document.pop(name, None)
    document["started"] = format_time(here.started)
    return {name.replace("_", "-"): value for name, value in document.items()}


async def list_cluster(link: Link, seconds: float) -> tuple[dict[str, Here], str]:
    """Greet all instances and listen; returns those that answer, and why nothing can be heard."""
    import trio

    found: dict[str, Here] = {}
    problems: list[str] = []
    opened = trio.Event()

    def hear(data: bytes) -> None:
        document = read(data)
        if isinstance(document, Here) and len(found) <= MAX_MEMBERS:
            # Two instances of one name are two lines.
            found[f"{document.name} {document.run}"] = document

    def greet() -> None:
        link.publish(write(Hello()))
        opened.set()

    link.on_open, link.on_document, link.on_lost = greet, hear, problems.append
    end = time.monotonic() + CONNECT_SECONDS
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        while not (opened.is_set() or problems) and time.monotonic() < end:
            with trio.move_on_after(0.05):
                await opened.wait()
        if opened.is_set():
            await trio.sleep(seconds)
            problems.clear()
        nursery.cancel_scope.cancel()
    if opened.is_set():
        return found, ""
    return found, problems[0] if problems else "the broker does not answer"
