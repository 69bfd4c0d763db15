"""Put together what several processes show of their flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["merged_answers"]


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
