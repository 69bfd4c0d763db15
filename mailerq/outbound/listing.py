"""A page of the flows of a dispatcher, for `mailerq top`.

There may be many flows, and the loop must not stand still. So the flows are looked at in steps of
`STEP`, with a turn of the loop behind each, and only those of the page are described. Everything
here runs on the home worker, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import trio

from mailerq.errors import MailerqError
from mailerq.outbound.pause import Pause

if TYPE_CHECKING:
    from mailerq.outbound.flow import Flow
    from mailerq.outbound.seeing import Seeing
    from mailerq.rules.security import Demands

__all__ = ["SORTS", "Wanted", "list_flows"]

STEP: Final = 500
"""Flows that are looked at in one turn of the loop."""

MAX_ROWS: Final = 500
"""Rows of a page."""

MAX_KEYS: Final = 200
"""Destinations that may be asked for by name."""

MAX_DESTINATIONS: Final = 50
"""Destinations that a row names."""

MAX_FILTER: Final = 255


class Wanted(NamedTuple):
    """Which flows, in which order, and how many; those of the destinations in `keys` come too."""

    sort: str
    text: str
    limit: int
    keys: tuple[str, ...]

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Self:
        """What a request wants. Raises `MailerqError`."""
        sort, text = request.get("sort", "waiting"), request.get("filter", "")
        limit, keys = request.get("limit", MAX_ROWS), request.get("keys", [])
        if not isinstance(sort, str) or sort not in SORTS:
            raise MailerqError(f"sort: expected one of {', '.join(SORTS)}")
        if not isinstance(text, str) or len(text) > MAX_FILTER:
            raise MailerqError("filter: expected a part of a name")
        if not isinstance(limit, int) or not 0 < limit <= MAX_ROWS:
            raise MailerqError(f"limit: expected a number from 1 to {MAX_ROWS}")
        if not isinstance(keys, list) or len(keys) > MAX_KEYS:
            raise MailerqError(f"keys: expected a list of up to {MAX_KEYS} destinations")
        return cls(sort, text.lower(), limit, tuple(map(str, keys)))


def _memory(each: Flow | Pause) -> int:
    return 0 if isinstance(each, Pause) else each.held


def _connections(each: Flow | Pause) -> int:
    return 0 if isinstance(each, Pause) else len(each.sessions)


def _waits(each: Flow | Pause) -> int:
    """What is known of waiting mail without a look into the queue."""
    if isinstance(each, Pause):
        return int(any(destination.waits for destination in each.destinations))
    return each.held + len(each.ready)


SORTS: Final[Mapping[str, Callable[[Flow | Pause], int]]] = {
    "waiting": _waits,
    "memory": _memory,
    "connections": _connections,
    "rate": _connections,
    "name": lambda each: 0,
}
"""Orders of a page: more comes first, and equal ones by name."""


async def list_flows(seeing: Seeing, wanted: Wanted) -> dict[str, Any]:
    """A page: totals, and a row for each flow."""
    dispatcher, intake = seeing.dispatcher, seeing.intake
    flows = dispatcher.flows
    every: list[Flow | Pause] = [*flows.live, *flows.pauses.values()]
    amount = SORTS[wanted.sort]
    best: list[tuple[int, str, int, Flow | Pause]] = []
    matching = 0
    for start in range(0, len(every), STEP):
        for number, each in enumerate(every[start : start + STEP], start):
            name = name_of(each)
            if name and wanted.text in name.lower():
                matching += 1
                best.append((-amount(each), name, number, each))
        best.sort()
        del best[wanted.limit :]
        await trio.lowlevel.checkpoint()
    chosen = dict.fromkeys(each for *_, each in best)
    rows = []
    for key in wanted.keys:
        destination = intake.known(key)
        if destination is not None and destination.flows:
            chosen.update(dict.fromkeys(destination.flows))
        else:
            rows.append(_of_destination(seeing, key))
    for number, each in enumerate(chosen):
        if each in flows.live or (isinstance(each, Pause) and flows.pauses.get(each.key) is each):
            rows.append(_row(seeing, each))
        if number % STEP == STEP - 1:
            await trio.lowlevel.checkpoint()
    return {
        "flows": len(flows.live),
        "pauses": len(flows.pauses),
        "matching": matching,
        "memory": intake.leased,
        "connections": dispatcher.connections,
        "delivered": dispatcher.counters.delivered,
        "rows": rows,
    }


def name_of(each: Flow | Pause) -> str:
    """The name of a flow for people; that of a pause, which knows no site, is a destination's."""
    if not isinstance(each, Pause):
        return str(each.site.label)
    return next((str(destination.key) for destination in each.destinations), "")


def _row(seeing: Seeing, each: Flow | Pause) -> dict[str, Any]:
    keys = [destination.key for destination in islice(each.destinations, MAX_DESTINATIONS)]
    return {
        "id": each.site_key.hex(),
        "site": name_of(each),
        "local-ip": each.local_ip,
        "demands": list(_words(each.demands)),
        "kind": "down" if isinstance(each, Pause) else "flow",
        "destinations": keys,
        "more-destinations": max(len(each.destinations) - len(keys), 0),
        "messages": 0 if isinstance(each, Pause) else _messages(each),
        **seeing.describe(each),
    }


def _words(demands: Demands) -> Iterator[str]:
    """What the mail of a flow demands of connections; with it a flow has a name of its own."""
    if demands.login is not None:
        yield demands.login.username
    yield from demands.words()
    if demands.plain:
        yield "plain"


def _messages(flow: Flow) -> int:
    """How many messages have had a result on connections of a flow, since the flow began."""
    return flow.ended_messages + sum(int(session.messages) for session in flow.sessions)


def _of_destination(seeing: Seeing, key: str) -> dict[str, Any]:
    """The row of mail without a flow: it is not due yet, or its hosts are still to be found."""
    found = seeing.destination(key)
    return {
        "id": key, "site": key, "local-ip": None, "demands": [], "kind": "mail",
        "destinations": [key], "more-destinations": 0, "messages": 0, "memory": 0,
        "connections": 0, "opening": 0, "idle": 0,
        "limited-by": seeing.reason_of_key(key), "until": found["next"], "seconds": None,
        "reply": "",
    }  # fmt: skip
