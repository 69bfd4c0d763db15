"""What the operator's rows stop: messages, flows, connections, and what a changed row means.

Theory of operation
-------------------
Pauses, forced errors and suppressions (`mailerq.rules.rows`) act at three places.

- The plan of a message names the row that stops the message. Forced errors and suppressions become
  results. A message that a pause stops is *parked*: put back under a destination of its own, which
  nothing reads until the row has ended.
- A pause of all mail of a flow ends the flow. Its messages under way are finished, and a `Pause`
  takes its place, which has no time to look. When the row has ended, one message of that mail tries
  the site, as after a failure, and connections grow from one: so released mail is no wave.
- A remote address that is paused is left out when a connection is opened.

A changed row acts at once. Messages in memory that it stops go back to the queue and are judged
anew. A pause of a domain that shares its hosts with others sets the domain apart: its mail is
sorted anew, into flows of its own.

Everything here runs on the home worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from mailerq.address import parse_mailbox
from mailerq.outbound.pause import Pause
from mailerq.rules.destinations import domain_of, parked_by, place_of
from mailerq.rules.plan import Hold, Park, Refuse, Send, stopped
from mailerq.rules.row import PAUSE, Row, any_of, compared, patterns
from mailerq.rules.rows import Peer

if TYPE_CHECKING:
    from mailerq.message import Message
    from mailerq.net.resolver import Host
    from mailerq.outbound.dispatcher import Dispatcher
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.intake import Destination, Intake
    from mailerq.outbound.jobs import Job
    from mailerq.outbound.sites import Site, Sites
    from mailerq.queues import Lease
    from mailerq.rules.rows import Rows
    from mailerq.rules.shaping import Shaping

__all__ = ["Stops", "late", "peer_of"]


def peer_of(site: Site, local_ip: str | None, shaping: Shaping) -> Peer:
    """What rows compare of a site, as far as a local address can reach it."""
    hosts: Iterable[Host] = site.hosts
    if local_ip is not None:
        six = ":" in local_ip
        hosts = [host for host in hosts if (":" in host.address) == six]
    names = frozenset(host.name.lower().rstrip(".") for host in site.hosts)
    return Peer(names, frozenset(host.address for host in hosts), shaping.provider_of(names))


RELEASED: Final = 200
"""Pauses and destinations that are released in one turn of the loop: some milliseconds."""


def late(
    rows: Rows, message: Message, plan: Send, site: Site, shaping: Shaping
) -> Send | Refuse | Park:
    """What stops a message at these hosts; else the plan with the addresses that are left."""
    if not rows.has_late:
        return plan
    tags = message.properties.get("tags") or ()
    ips = plan.local_ips or (None,)
    found = [rows.late(plan.domain, tags, ip, peer_of(site, ip, shaping)) for ip in ips]
    if all(row is None for row in found):
        return plan
    left = [ip for ip, row in zip(plan.local_ips, found, strict=False) if row is None]
    if left:
        return msgspec.structs.replace(plan, local_ips=tuple(left))
    assert found[0] is not None, "no address is left"
    return stopped(found[0], plan.domain, plan.expires)


ASIDE_SECONDS: Final = 60.0
"""How long a message waits for another address if a row forbids those that could send it."""


class Stops:
    """The rows in force for one dispatcher. `rows` is None if there are none."""

    def __init__(self, dispatcher: Dispatcher, intake: Intake, sites: Sites) -> None:
        self.rows: Rows | None = None
        self.hits: dict[int, int] = {}
        """How often rows have stopped a message, since somebody has looked."""
        self._dispatcher = dispatcher
        self._intake = intake
        self._sites = sites
        self._parked: dict[int, dict[str, None]] = {}
        self._released: deque[Pause | str] = deque()
        """Pauses, and parked destinations, that no row keeps any more."""
        self._releasing = False
        self._again: set[str] = set()
        """Destinations of pauses whose pools have changed: a message shows what still waits."""

    # Messages

    def hit(self, row: int) -> None:
        """A row has stopped a message."""
        self.hits[row] = self.hits.get(row, 0) + 1

    def late(self, job: Job, site: Site) -> Refuse | Park | None:
        """What stops a message at these hosts; else `job` may leave from the addresses it has."""
        if self.rows is None:
            return None
        found = late(self.rows, job.message, job.plan, site, self._dispatcher.limits.shaping)
        if not isinstance(found, Send):
            return found
        job.plan = found
        return None

    def set_aside(self, job: Job, destination: Destination, flow: Flow | Pause) -> bool:
        """Whether a message that its flow cannot take has been put where no other flow reads it.

        A row may leave a message fewer addresses than the rest of its destination has. If the flow
        of such an address has to wait, another one would take the message again and again, or the
        destination would be spread again and again.
        """
        flows = destination.flows
        if len(flows) >= destination.width and not any(
            other is not flow and other.takes_mail for other in flows
        ):
            return False
        decision: Park | Hold
        if flow.paused:
            decision = Park(flow.paused, job.plan.domain)
        else:
            decision = Hold(self._dispatcher.now() + ASIDE_SECONDS)
        self._dispatcher.stop_message(job.lease, decision)
        return True

    def park(self, lease: Lease, row: int) -> None:
        """Close the destination where a message waits for the end of a pause."""
        key = place_of({**lease.message.properties, "paused": row}).destination
        self._again.discard(key)
        self.holds(self._intake.destination(key))

    def holds(self, destination: Destination) -> bool:
        """Whether the mail of a destination waits for the end of a pause, and is not read."""
        if self.rows is None or destination.key in self._again:
            return False
        row = parked_by(destination.key)
        if not row or (found := self.rows.by_id.get(row)) is None or found.kind != PAUSE:
            return False
        keys = self._parked.setdefault(row, {})
        if destination.key not in keys:
            keys[destination.key] = None
            self._intake.close(destination)
        return True

    def apart_of(self, name: str) -> str:
        """What sets the site of a route apart; only the name of a domain has no colon."""
        return "" if self.rows is None or ":" in name else self.rows.apart(name)

    # Flows

    def flow_pause(self, site: Site, local_ip: str | None) -> int:
        """The pause of all mail from a local address to a site, or 0."""
        rows = self.rows
        if rows is None or not rows.by_id:
            return 0
        row = rows.flow_pause(site.apart, local_ip, self._peer(site, local_ip))
        return 0 if row is None else row.id

    def keeps(self, pause: Pause, site: Site) -> bool:
        """Whether a row keeps a pause from asking its site; noted in the pause."""
        pause.paused = self.flow_pause(site, pause.local_ip)
        return bool(pause.paused)

    def rests(self, pause: Pause) -> None:
        """A pause has taken the place of a flow that a row has ended."""
        row = None if self.rows is None else self.rows.by_id.get(pause.paused)
        if row is None:
            self._release(pause)
        elif row.local_ip or row.pool:
            # The mail may have other addresses to leave from.
            self._intake.forget(pause)

    def unpaused(self, hosts: list[Host], local_ip: str | None) -> list[Host]:
        """The hosts that no pause forbids."""
        rows = self.rows
        if rows is None or not rows.has_remote_pauses:
            return hosts
        return [host for host in hosts if rows.remote_pause(local_ip, host.address) is None]

    def _peer(self, site: Site, local_ip: str | None) -> Peer:
        """What rows compare of a site, as far as a local address can reach it."""
        return peer_of(site, local_ip, self._dispatcher.limits.shaping)

    # Changes

    def change(self, rows: Rows | None) -> None:
        """Put other rows in force."""
        before, self.rows = self.rows, rows
        old = {} if before is None else before.by_id
        new = {} if rows is None else rows.by_id
        domains = (frozenset() if before is None else before.domains) ^ (
            frozenset() if rows is None else rows.domains
        )
        if domains:
            self._regroup(domains)
        if rows is not None:
            self._recheck(rows)
        ended, added = old.keys() - new.keys(), new.keys() - old.keys()
        if not self._releasing:
            self._again.clear()
        if moved := _moved(before, rows):
            ended, added = ended | moved, added | moved
        if ended:
            self._end(ended, any(old[row].remote_ip for row in ended))
        pauses = [new[row] for row in added if new[row].kind == PAUSE and not new[row].tag]
        if pauses and rows is not None:
            for flow in list(self._dispatcher.flows.live):
                if any(_may_stop(row, flow) for row in pauses):
                    self._begin(flow, rows)

    def _end(self, ended: Collection[int], remotes: bool) -> None:
        """Rows have ended, some of them, with `remotes`, for remote addresses."""
        rows = {} if self.rows is None else self.rows.by_id
        flows = self._dispatcher.flows
        every: list[Flow | Pause] = [*flows.live, *flows.pauses.values()]
        for each in every:
            # The mail of a flow whose hosts are all paused waits for any of those pauses.
            row = rows.get(each.paused)
            over = row is None or row.id in ended or (remotes and row.remote_ip)
            if each.paused and over:
                if isinstance(each, Pause):
                    self._released.append(each)
                else:
                    each.go_on()
        for number in ended:
            for key in self._parked.pop(number, ()):
                if number in rows:
                    self._again.add(key)
                self._released.append(key)
        if self._released and not (self._releasing or self._dispatcher.stopping):
            self._releasing = True
            self._dispatcher.start_soon(self._release_all)

    async def _release_all(self) -> None:
        """Release what no row keeps any more, a part in each turn: there may be very much."""
        while self._released:
            for _ in range(min(len(self._released), RELEASED)):
                each = self._released.popleft()
                if isinstance(each, str):
                    self._intake.reopen(each)
                elif self._dispatcher.flows.pauses.get(each.key) is each:
                    self._release(each)
            await trio.lowlevel.checkpoint()
        self._releasing = False

    def _begin(self, flow: Flow, rows: Rows) -> None:
        """There are more pauses: end the flow, or some of its sessions."""
        if not flow.paused and (row := self.flow_pause(flow.site, flow.local_ip)):
            flow.end(row)
        elif rows.has_remote_pauses:
            for session in list(flow.sessions):
                remote = session.remote
                if remote and rows.remote_pause(flow.local_ip, remote) is not None:
                    session.leave()

    def _release(self, pause: Pause) -> None:
        """Let one message try; it finds other rows that forbid this."""
        pause.paused = 0
        self._dispatcher.flows.ask(pause)

    def _regroup(self, domains: frozenset[str]) -> None:
        """Sort the mail of domains anew: their sites have changed."""
        concerned = any_of(domains)
        self._sites.forget_domains(concerned)
        self._intake.sort_again(lambda key: concerned(domain_of(key)))
        for flow in list(self._dispatcher.flows.live):
            flow.take_out(lambda job: concerned(job.plan.domain))

    def _recheck(self, rows: Rows) -> None:
        """Take the messages out of memory that must not be sent now."""
        for flow in list(self._dispatcher.flows.live):
            flow.take_out(partial(self._is_stopped, rows, flow))
        self._dispatcher.take_out(partial(self._is_stopped, rows, None))

    def _is_stopped(self, rows: Rows, flow: Flow | None, job: Job) -> bool:
        plan = job.plan
        recipient = compared(parse_mailbox(plan.recipient))
        if rows.suppression(recipient, plan.domain) is not None:
            return True
        tags = job.message.properties.get("tags") or ()
        by_domain = plan.route.name == plan.domain
        row, left = rows.early(plan.domain, tags, plan.local_ips, by_domain=by_domain)
        if row is not None:
            return True
        if flow is None:
            return False
        if left != plan.local_ips and flow.local_ip not in left:
            return True
        peer = self._peer(flow.site, flow.local_ip)
        return rows.has_late and rows.late(plan.domain, tags, flow.local_ip, peer) is not None

    # Seeing

    def statistics(self) -> dict[str, int]:
        """Flows and destinations that a row keeps from sending."""
        pauses = self._dispatcher.flows.pauses.values()
        return {
            "paused": sum(1 for pause in pauses if pause.paused),
            "parked": sum(len(keys) for keys in self._parked.values())
            + sum(isinstance(each, str) for each in self._released),
        }


def _may_stop(row: Row, flow: Flow) -> bool:
    """Whether it is worth the time to see whether a pause is about a flow: there may be many."""
    apart = flow.site.apart
    return (not (row.local_ip or row.pool) or flow.local_ip is not None) and (
        not row.domain or (bool(apart) and row.domain in patterns(apart))
    )


def _moved(before: Rows | None, rows: Rows | None) -> set[int]:
    """The rows that hold on, for a pool that has other addresses now."""
    if before is None or rows is None or before.pools == rows.pools:
        return set()
    return {
        number
        for number, row in rows.by_id.items()
        if number in before.by_id
        and row.pool
        and set(before.pools.get(row.pool, ())) != set(rows.pools.get(row.pool, ()))
    }
