"""Draw the results of targets.py as SVG: messages per second and CPU time, by system.

python benches/plot.py RESULT.json > benches/relay.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Final

__all__ = ["draw"]

WIDTH: Final = 760
LEFT: Final = 250
BARS: Final = 380
ROW: Final = 20
COLOURS: Final = {
    "mailerq": "#1f6feb",
    "mailerq-1": "#79b8ff",
    "postfix": "#8b949e",
    "haraka": "#d4a72c",
}

PANELS: Final = (
    ("accept", "Accepted and synced, messages/s", ".0f"),
    ("end_to_end", "End to end, messages/s", ".0f"),
    ("cpu", "CPU time of a message, ms (less is better)", ".2f"),
)
LOADS: Final = (
    ("relay", False, "20 clients, new connections"),
    ("relay", True, "20 clients, kept connections"),
    ("single", True, "one client, kept connection"),
    ("large", True, "100 KiB, 20 clients, kept"),
)


def draw(document: dict[str, Any]) -> str:
    """The whole picture. Bars are medians, thin lines go from the lowest to the highest run."""
    parts: list[str] = []
    y = 24
    for figure, title, form in PANELS:
        parts.append(_text(12, y, title, weight="bold"))
        rows = list(_rows(document, figure))
        most = max((row["range"][1] for row in rows), default=1.0)
        y += 8
        last = ""
        for row in rows:
            if row["load"] != last:
                parts.append(_text(LEFT - 74, y + 22, last := row["load"], anchor="end"))
                y += 8
            parts += _bar(y, row, BARS / most, form)
            y += ROW
        y += 36
    machine = document["machine"]
    parts.append(_text(12, y - 8, (
        f"2 KiB where not said otherwise; synced before 250. {machine['cores']} cores of a "
        f"{machine['processor']}, {document['date']}."
    )))  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" '
        f'width="{WIDTH}" height="{y + 8}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _rows(document: dict[str, Any], figure: str) -> Iterator[dict[str, Any]]:
    for program, kept, text in LOADS:
        for median in document["programs"].get(program, {}).get("medians", ()):
            if median["kept"] == kept and median[figure] is not None:
                yield {
                    "load": text,
                    "system": median["system"],
                    "median": median[figure],
                    "range": median[figure + "_range"],
                }


def _bar(y: float, row: dict[str, Any], scale: float, form: str) -> list[str]:
    low, high = (LEFT + scale * value for value in row["range"])
    colour = COLOURS.get(row["system"], "black")
    return [
        _text(LEFT - 8, y + 14, row["system"], anchor="end"),
        f'<rect x="{LEFT}" y="{y + 3}" width="{scale * row["median"]:.1f}" height="{ROW - 6}" '
        f'fill="{colour}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 10}" y2="{y + 10}" stroke="black"/>',
        _text(max(high, LEFT + scale * row["median"]) + 8, y + 14, f"{row['median']:{form}}"),
    ]


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    sys.stdout.write(draw(json.loads(Path(sys.argv[1]).read_text())))
