"""``mailerq status``: the state of a running daemon."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Final

from mailerq.cli import control
from mailerq.cli.common import command_parser, complain, print_json, print_table
from mailerq.config import Config

__all__ = ["main"]

FIGURES: Final = (
    "calls", "suspensions", "rejects", "timeouts", "kept", "kept_bytes", "seconds",
)  # fmt: skip
"""Counters for each event of a plugin, see `mailerq.plugins.Plugins.statistics`."""

PROCESS: Final = (
    "process", "pid", "state", "starts", "uptime", "connections", "settings", "shares",
)  # fmt: skip
"""Fields for each of several processes, see `mailerq.cli.supervisor.parent`."""

WORDS: Final = {
    "started": "when the daemon started (UTC)",
    "uptime": "seconds since then",
    "pid": "its process id",
    "hostname": "the name that it gives itself",
    "listening": "the addresses and ports that clients can connect to",
    "workers": "worker threads (smtp-threads)",
    "shares": "the shares of the queue directory that are delivered",
    "settings.number": "which settings are in force: one more by each reload",
    "settings.loaded": "when they were read (UTC)",
    "incoming.open": "sessions with clients that are open now",
    "incoming.memory": "bytes of memory that mail on its way in takes now",
    "incoming.held": "of these, the ones of mail that plugins hold",
    "incoming.connections": "connections that became a session",
    "incoming.refused_connections": "connections that were sent away",
    "incoming.lost_connections": "sessions that the client broke off",
    "incoming.timeouts": "sessions that took too long and were ended",
    "incoming.transactions": "mails taken, each counted once",
    "incoming.messages": "messages taken, one for each recipient of a mail",
    "incoming.bytes": "bytes of the mails taken",
    "incoming.refused_senders": "refused MAIL commands",
    "incoming.refused_recipients": "refused RCPT commands",
    "incoming.refused_messages": "mails refused after their content",
    "incoming.queue_errors": "mails not taken because the queue could not keep them",
    "incoming.tls": "TLS handshakes done",
    "incoming.logins": "logins that were right",
    "incoming.failed_logins": "logins that were wrong",
    "incoming.spilled": "mails that came in by way of a file (smtp-spill-size)",
    "incoming.failed_recipients": "recipients that plugins failed in a mail taken for others",
    "incoming.reports": "messages that went to the queue of rabbitmq-reports",
    "outgoing.consumed": "messages taken from the outbox",
    "outgoing.held": "messages put back until the time that their sender asked for",
    "outgoing.attempts": "attempts that have a result",
    "outgoing.delivered": "messages delivered",
    "outgoing.failed": "messages that failed for good",
    "outgoing.reports": "reports made for senders of mail (DSN)",
    "outgoing.retried": "attempts that failed and are made again later",
    "outgoing.handed_over": "messages given to the instance of the cluster that has their address",
    "outgoing.put_off": "messages put back because of a reply that is not about them",
    "outgoing.queue_errors": "reads and writes that the queue could not do",
    "outgoing.unsettled": "results that are not written yet",
    "outgoing.connections": "connections to other hosts that are open or opening now",
    "outgoing.opening": "of these, the ones that are opening",
    "outgoing.idle": "of these, the ones without a message",
    "outgoing.opened": "connections that were opened",
    "outgoing.ahead": "messages whose envelope was sent right behind the mail before",
    "outgoing.destinations": "sites that there is something to do for, or that are down",
    "outgoing.waiting": "messages in memory that wait for a connection",
    "outgoing.domains": "of these, how many for each of the sites with the most",
    "outgoing.paused": "sites and local addresses whose mail waits for the end of a pause",
    "outgoing.parked": "destinations whose mail waits for the end of a pause of a tag",
    "outgoing.limited": "flows and connections that wait for a limit",
    "outgoing.limits": "of these, how many for each of the limits that most wait for",
    "replies.classes": "replies of each class (responses-file)",
    "replies.acted_on": "sites and providers that are paused or get less, by a pattern",
    "replies.actions": "of these, the first ones with their patterns",
    "replies.unclassified": "the most frequent replies that no pattern matches",
    "queue.commits": "commits to the queue file",
    "queue.messages": "messages in them: published, put back, settled",
    "queue.messages_per_commit": "their average",
    "queue.largest_commit": "the most in one",
    "queue.commit_seconds": "seconds that commits took",
    "queue.reads": "times that the file was read for waiting messages",
    "queue.read_messages": "messages that were read so",
    "queue.trimmed": "failures that were removed: there were too many, or they were too old",
    "queue.published": "messages that RabbitMQ confirmed",
    "queue.parked": "of these, how many were set aside for a destination that takes nothing now",
    "queue.connections": "connections to RabbitMQ that were opened",
    "queue.broker": "what is the case with RabbitMQ: connected, blocked, or why not",
    "queue.fallback.away": "processes that keep new mail on this host, because no broker takes it",
    "queue.fallback.waiting": "messages of each queue that wait here until a broker takes them",
    "queue.fallback.bytes": "bytes of the files that they are in",
    "queue.fallback.stored": "messages that were kept here since the start",
    "queue.fallback.moved": "messages of these that were moved to the broker",
    "queue.leased": "messages of each queue that are in memory now",
    "rows.pauses": "pauses in force (mailerq pause)",
    "rows.errors": "forced errors in force (mailerq error)",
    "rows.suppressed": "addresses and domains that are suppressed (mailerq suppress)",
    "cluster.connected": "1 while the exchange of the cluster can be heard",
    "cluster.instances": "instances that announce themselves, this one too",
    "cluster.addresses": "local addresses that this instance could send from",
    "cluster.owned": "of these, the ones whose lock it has",
    "cluster.usable": "of these, the ones that it may send from now",
    "cluster.rows": "rows and suppressed addresses that the cluster shares",
    "cluster.received": "changes of these that came from other instances",
    "watchdog.stalls": "times that a worker stood still for watchdog-seconds",
    "watchdog.standing": "workers that stand still now",
    "watchdog.longest": "the longest of these times, in seconds",
    "watchdog.places": "how often in each place: a plugin's function, or the program",
    "calls": "of a plugin: times that the event's function was called",
    "suspensions": "of these, how often the plugin took control",
    "rejects": "of these, how often it refused",
    "timeouts": "of these, how often it was given up (plugin-timeout)",
    "kept": "of these, how many the plugin has not handed back yet",
    "kept_bytes": "bytes of mail that these keep in memory or on disk",
    "seconds": "seconds that the calls took",
}
"""The meaning of each figure; names of domains, queues or places come behind."""


def _legend() -> str:
    lines = [f"  {name:<29}{text}" for name, text in WORDS.items()]
    return "\n".join(["figures, counted since the start where they do not say now:", *lines])


def main(settings: list[str], rest: list[str]) -> int:
    """Ask the daemon on this queue directory and show its answer."""
    parser = command_parser(
        "status", f"Show how the daemon that runs on this host is.\n\n{_legend()}"
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    parser.add_argument(
        "--cluster", action="store_true", help="the instances of the cluster instead"
    )
    options = parser.parse_args(rest)
    config = Config.load(settings)
    if options.cluster:
        from mailerq.cli.cluster import print_instances

        return print_instances(config, as_json=options.json)
    try:
        reply = control.ask(config.queue_directory, "status")
    except PermissionError:
        complain(f"you may not ask the daemon on {config.queue_directory}; its user and root may")
        return os.EX_NOPERM
    except OSError as error:
        complain(f"no daemon answers on {config.queue_directory}: {error.strerror or error}")
        if config.origin("queue-directory") == "default":
            complain("if it has settings of its own, name their file with --config-file")
        return os.EX_UNAVAILABLE
    if "error" in reply:
        complain(f"the daemon says: {reply['error']}")
        return os.EX_SOFTWARE
    if options.json:
        print_json(reply)
    else:
        plugins = reply.pop("plugins", {})
        processes = reply.pop("processes", [])
        print_table(("WHAT", "VALUE"), list(_flatten(reply)))
        if processes:
            sys.stdout.write("\n")
            print_table([name.upper() for name in PROCESS], [_process(row) for row in processes])
        if plugins:
            sys.stdout.write("\n")
            print_table(("PLUGIN", "EVENT", *map(str.upper, FIGURES)), list(_rows(plugins)))
    return os.EX_OK


def _process(row: dict[str, Any]) -> list[Any]:
    uptime, shares = row["uptime"], ", ".join(map(str, row["shares"]))
    shown = {**row, "uptime": None if uptime is None else round(uptime, 1), "shares": shares}
    return [shown[name] for name in PROCESS]


def _rows(plugins: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The counters of each plugin in each event."""
    for plugin, events in plugins.items():
        for event, row in events.items():
            figures = [row.get(name, 0) for name in FIGURES]
            yield plugin, event, *figures[:-1], f"{figures[-1]:.6f}"


def _flatten(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of numbers, each with its path from the root."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{name}.")
        elif isinstance(value, list):
            yield f"{path}{name}", ", ".join(map(str, value))
        else:
            yield f"{path}{name}", f"{value:.1f}" if isinstance(value, float) else value
