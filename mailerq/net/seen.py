"""Put together what several processes show of their flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

__all__ = ["merged_answers", "merged_pages"]


def merged_answers(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer of `mailerq.outbound.explaining` from those of all deliveries.

    All decide alike, and count in the same cells. Each has flows of its own.
    """
    whole = next((answer for answer in answers if not answer.get("pending")), answers[0])
    for answer in answers:
        if answer is whole:
            continue
        if "destination" in whole:
            destination, other = whole["destination"], answer["destination"]
            destination["due"] = destination["due"] or other["due"]
            times = [time for time in (destination["next"], other["next"]) if time is not None]
            destination["next"] = min(times, default=None)
        parts = {part["local-ip"]: part for part in answer.get("from", ())}
        for part in whole.get("from", ()):
            if (same := parts.get(part["local-ip"])) is not None:
                part["flows"] += same["flows"]
                _add_waiting(part["limits"], same["limits"])
    return whole


def _add_waiting(limits: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Add the numbers of those that wait in other processes."""
    waiting = {_key(limit): limit["waiting"] for limit in others if "waiting" in limit}
    for limit in limits:
        if "waiting" in limit:
            limit["waiting"] += waiting.get(_key(limit), 0)


def _key(limit: dict[str, Any]) -> tuple[str, ...]:
    return limit["limit"], limit["scope"], limit["where"]


SUMS: Final = ("memory", "connections", "opening", "idle", "messages")
TOTALS: Final = ("flows", "pauses", "matching", "memory", "connections", "delivered")


def merged_pages(pages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One page of `mailerq.outbound.listing` from those of all deliveries.

    Rows of one site and local address become one. What limits a row is what limits it first.

    >>> row = {"id": "a", "local-ip": None, "demands": [], "site": "d.test", "kind": "flow",
    ...     "destinations": [], "more-destinations": 0, "memory": 1, "connections": 1,
    ...     "opening": 0, "idle": 0, "messages": 2, "limited-by": "", "until": None,
    ...     "seconds": None, "reply": ""}
    >>> page = {"flows": 1, "pauses": 0, "matching": 1, "memory": 1, "connections": 1,
    ...     "delivered": 2, "rows": [row]}
    >>> whole = merged_pages([page, {**page, "rows": [{**row, "limited-by": "a limit"}]}])
    >>> [(row["messages"], row["limited-by"]) for row in whole["rows"]], whole["delivered"]
    ([(4, 'a limit')], 4)
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for page in pages for row in page["rows"]):
        key = row["id"], row["local-ip"], *row["demands"]
        rows[key] = _added(rows[key], row) if key in rows else row
    whole: dict[str, Any] = {name: sum(page[name] for page in pages) for name in TOTALS}
    # Mail without a flow in one process may have one in another.
    with_flow = {
        key for row in rows.values() if row["kind"] != "mail" for key in row["destinations"]
    }
    whole["rows"] = [
        row for row in rows.values() if row["kind"] != "mail" or row["site"] not in with_flow
    ]
    return whole


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two rows of one site and local address as one."""
    if one["kind"] != "flow":
        one, other = other, one  # a flow has the name of the site
    first = min((one, other), key=lambda row: (not row["limited-by"], row["seconds"] or 0.0))
    return {
        **one,
        **{name: one[name] + other[name] for name in SUMS},
        "destinations": list(dict.fromkeys(one["destinations"] + other["destinations"])),
        "more-destinations": max(one["more-destinations"], other["more-destinations"]),
        **{name: first[name] for name in ("limited-by", "until", "seconds")},
        "reply": one["reply"] or other["reply"],
    }
