#!/usr/bin/env python3
"""Draws docs/pictures: time against the number of disks, from benchmarks/results.

    .venv/bin/python benchmarks/plot.py

A picture holds the figures that it shows, as JSON in its description: whether it is up to
date can be told without drawing it. The same figures make the same bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import saved
from saved import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from reporting import Cell
    from saved import Result

    Panels = dict[str, dict[str, list[float]]]
    """By title and label; one label is "disks", the others' figures are seconds."""

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"

UNITS = {" ms": 1e-3, " s": 1.0}
"""What columns of times end with, in seconds."""

LOOKS: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "floor": {"color": "#000000", "marker": "x", "linestyle": "--"},
}
"""Of series: colours of Okabe and Ito's, and told apart without any, too."""
OTHER_LOOKS: list[dict[str, Any]] = [
    {"color": "#D55E00", "marker": "s", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "^", "linestyle": ":"},
    {"color": "#009E73", "marker": "D", "linestyle": (0, (5, 1))},
]
"""Of series with other names, in their order."""
DOTS_PER_INCH = 120


@dataclass(frozen=True)
class Picture:
    """What a picture shows, in words."""

    says: str

    def markdown(self, name: str) -> str:
        return f"![{self.says}](pictures/{name}.png)"


PICTURES = {
    "attach": Picture("Time to attach and mount disks, and to release them: ours and the floor"),
    "versus_libvirt": Picture("Time until all disks are mounted, and gone: ours and libvirt's"),
}
"""By benchmark."""


def figures(result: Result) -> Panels:
    """Of each table by disks, its columns of times in seconds, and the disks."""
    panels: Panels = {}
    for table in result.report.tables:
        columns = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
        if "disks" in columns:
            panels[table.title] = {"disks": [_number(cell) for cell in columns["disks"]]} | {
                name.removesuffix(unit): [round(_number(cell) * seconds, 6) for cell in column]
                for name, column in columns.items()
                for unit, seconds in UNITS.items()
                if name.endswith(unit)
            }
    return panels


def _number(cell: Cell) -> float:
    if not isinstance(cell, (int, float)):
        raise TypeError(f"{cell!r} cannot be drawn")
    return cell


def described(path: Path) -> Panels:
    """The figures that a picture was drawn from; PNG's chunks are in its specification, 5.3."""
    data = path.read_bytes()
    offset = 8
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        keyword, _, text = data[offset + 8 : offset + 8 + length].partition(b"\0")
        if kind == b"tEXt" and keyword == b"Description":
            found: Panels = json.loads(text)
            return found
        offset += length + 12
    raise ValueError(f"{path}: no figures in it")


def draw(name: str, result: Result, folder: Path = FOLDER) -> None:
    """Write a picture, whatever somebody's own settings of matplotlib are."""
    from matplotlib import style

    folder.mkdir(exist_ok=True)
    panels = figures(result)
    with style.context("default"):
        _drawn(panels).savefig(
            folder / f"{name}.png",
            dpi=DOTS_PER_INCH,
            metadata={"Software": None, "Description": json.dumps(panels)},
        )


def _drawn(panels: Panels) -> Figure:
    """Above the time for all disks, below for each of them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    picture = Figure(figsize=(4.5 * len(panels), 7), layout="constrained")
    axes = picture.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for (above, below), (title, columns) in zip(axes.T, panels.items(), strict=True):
        disks, others = columns["disks"], iter(OTHER_LOOKS)
        for label, times in columns.items():
            if label == "disks":
                continue
            look = LOOKS[label] if label in LOOKS else next(others)
            above.plot(disks, times, label=label, **look)
            each = [1e3 * seconds / count for seconds, count in zip(times, disks, strict=True)]
            below.plot(disks, each, **look)
        above.set_title(title)
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
        below.set_xlabel("disks at once")
        _dress(above, disks)
        _dress(below, disks)
    axes[1][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("all of them: seconds")
    axes[1][0].set_ylabel("each of them: milliseconds")
    lines = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()}
    picture.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=4)
    return picture


def _dress(axes: Axes, disks: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(disks, [f"{count:g}" for count in disks])
    axes.minorticks_off()
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_all(folder: Path = FOLDER, results: Path = RESULTS) -> None:
    """Draw what there are results of."""
    for name in PICTURES:
        result = saved.load(name, results)
        if result is not None:
            draw(name, result, folder)


if __name__ == "__main__":
    draw_all()
