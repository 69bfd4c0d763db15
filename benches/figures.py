"""The results of a benchmark: named figures, as a table for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Figure", "print_document", "progress", "table"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. `detail` is its origin, for people."""

    name: str
    value: float
    unit: str
    detail: str = ""

    @property
    def text(self) -> str:
        digits = 0 if self.value >= 1000 else 1 if self.value >= 10 else 2
        return f"{self.value:,.{digits}f} {self.unit}"


def progress(text: str) -> None:
    """Show progress to people."""
    print(text, file=sys.stderr, flush=True)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, aligned in columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def print_document(figures: Sequence[Figure], *, as_json: bool, **others: Any) -> None:
    """Print figures and further facts as JSON, or only the figures as a table."""
    if as_json:
        found = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": found, **others}, indent=1))
    else:
        print(table([(figure.name, figure.text, figure.detail) for figure in figures]))
