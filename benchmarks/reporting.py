"""What the benchmarks have in common: taking turns, medians, tables, and what is aimed at.

A benchmark fills a `Report` and hands it to `run`, which gives it a command line with `--json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    Cell = str | float | int | None
    Measure = Callable[[argparse.Namespace], Coroutine[Any, Any, "Report"]]


@dataclass
class Table:
    """Figures under headings; a cell that has none is None."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)

    def __str__(self) -> str:
        cells = [[_shown(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])


@dataclass
class Target:
    """What is aimed at: no more than the limit, or at least the limit."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        words = "at least" if self.at_least else "at most"
        return f"  {verdict:<6}  {self.what}: {_shown(self.value)}, {words} {_shown(self.limit)}"


@dataclass
class Report:
    """What one benchmark found.

    Args:
        ratios: by name, ours over what it is compared with in the same run, so that less is
            better and the machine's speed does not matter; `scripts/bench --check` guards them.
    """

    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)

    def table(self, title: str, *columns: str) -> Table:
        """A new table, at the end."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def aim(self, what: str, value: float, limit: float, *, at_least: bool = False) -> None:
        """Say what was aimed at, and what it came to."""
        self.targets.append(Target(what, round(value, 4), limit, at_least))

    def __str__(self) -> str:
        parts = [*map(str, self.tables)]
        if self.targets:
            parts.append("\n".join(["targets", *map(str, self.targets)]))
        return "\n\n".join(parts)


def run(description: str, measure: Measure, parser: argparse.ArgumentParser | None = None) -> None:
    """Be the command of a benchmark: measure, and print it.

    Args:
        description: the module's docstring.
        parser: one with more arguments, made with `arguments`.
    """
    parser = parser or arguments(description)
    chosen = parser.parse_args()
    report = asyncio.run(measure(chosen))
    if not chosen.json:
        print(report)
        return
    print(json.dumps({"python": platform.python_version(), **asdict(report)}, indent=1))


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser


async def in_turn(runs: int, **works: Callable[[], Awaitable[float]]) -> dict[str, list[float]]:
    """What each piece of work says that it took, all of them in turn, so many times.

    The order is turned round from run to run: nobody always comes after the same one.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(runs):
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(await works[name]())
    return samples


def medians(samples: Mapping[str, Iterable[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)
