"""Merge statistics of several parts into one tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

__all__ = ["total"]

LARGEST: Final = frozenset(
    {"largest_commit", "longest", "uptime", "pauses", "errors", "suppressed", "acted_on"}
)
"""Figures whose maximum is the total; other figures are added."""

RANKED: Final = frozenset({"domains", "limits", "unclassified"})
"""Parts whose largest figures come first."""


def total(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge trees of the same kind: add numbers, join lists, keep the first of other values.

    >>> total([{"sent": 1, "longest": 3.0, "at": ["a"]}, {"sent": 2, "longest": 2.0, "at": ["b"]}])
    {'sent': 3, 'longest': 3.0, 'at': ['a', 'b']}
    """
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for tree in trees for name in tree):
        values = [tree[name] for tree in trees if name in tree]
        if all(isinstance(value, dict) for value in values):
            merged[name] = total(values)
            if name in RANKED:
                ranked = sorted(merged[name].items(), key=lambda item: -item[1])
                merged[name] = dict(ranked)
        elif all(isinstance(value, list) for value in values):
            merged[name] = list(dict.fromkeys(item for value in values for item in value))
        elif all(isinstance(value, int | float) for value in values):
            merged[name] = max(values) if name in LARGEST else sum(values)
        else:
            merged[name] = values[0]
    if "messages_per_commit" in merged:
        merged["messages_per_commit"] = merged["messages"] / max(merged["commits"], 1)
    return merged
