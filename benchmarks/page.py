"""docs/performance.md: what stands between its marks is written from results/*.json.

A mark is `<!-- table: NAME -->`, all that a benchmark prints; `<!-- picture: NAME -->`, what
`plot.py` draws of it; `<!-- change: NAME -->`, its targets and ratios beside earlier ones, those
in results/before; or `<!-- targets -->`, those of all benchmarks. What was put there ends with
`<!-- end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import plot
import saved
from reporting import Table
from saved import BENCHMARKS, RESULTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reporting import Report, Target

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"

BEFORE = "before"
"""The folder of results that those of today are shown beside."""

MARKED = re.compile(
    r"<!-- (table|picture|change|targets)(?:: (\S+))? -->\n(.*?)<!-- end -->", re.DOTALL
)
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"(\d[\d.,]*)\s?(?:(?:ns|us|ms|s|x|MB|KiB|MiB|bytes|times|seconds)\b|%)")
EXPLAINED = re.compile(r"^\* \*\*(.+?)\*\*", re.MULTILINE | re.DOTALL)
MISSED = "## Missed, and why"


def write() -> None:
    """Write the page anew."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page, with what the saved results say between its marks."""

    def put(found: re.Match[str]) -> str:
        kind, name, before = found.group(1), found.group(2) or "", found.group(3)
        head = found[0].removesuffix(f"{before}<!-- end -->")
        return f"{head}\n{_content(kind, name, folder)}\n\n<!-- end -->"

    return MARKED.sub(put, page)


def _content(kind: str, name: str, folder: Path) -> str:
    if kind == "targets":
        return _code(_all_targets(folder))
    result = saved.load(name, folder)
    if result is None:
        return f"Nothing is saved yet: `scripts/bench --save {name}`."
    if kind == "picture":
        return plot.PICTURES[name].markdown(name)
    if kind == "table":
        return f"Measured {result.measured_on()}.\n\n{_code(str(result.report))}"
    before = saved.load(name, folder / BEFORE)
    if before is None:
        return f"Nothing is saved from before: `scripts/bench --save --as {BEFORE} {name}`."
    return f"Before: {before.measured_on()}.\n\n{_code(str(_change(before.report, result.report)))}"


def _change(before: Report, now: Report) -> Table:
    """What is in both: figures that are aimed at, and ratios."""
    table = Table("before and after", ("", "before", "after", "after / before"))
    old = _compared(before)
    for what, value in _compared(now).items():
        if what in old:
            table.rows.append((what, old[what], value, value / old[what] if old[what] else None))
    return table


def _compared(report: Report) -> dict[str, float]:
    return {target.what: target.value for target in report.targets} | report.ratios


def _code(text: str) -> str:
    return f"```text\n{text}\n```"


def _all_targets(folder: Path) -> str:
    lines = []
    for name in BENCHMARKS:
        targets = [target for whose, target in _targets(folder) if whose == name]
        lines += [name, *map(str, targets)] if targets else []
    met = sum(target.is_met for _, target in _targets(folder))
    missed = sum(not target.is_met for _, target in _targets(folder))
    return "\n".join([*lines, f"{met} met, {missed} missed"])


def _targets(folder: Path) -> Iterator[tuple[str, Target]]:
    for name in BENCHMARKS:
        result = saved.load(name, folder)
        if result is not None:
            yield from ((name, target) for target in result.report.targets)


def missed(folder: Path = RESULTS) -> set[str]:
    """The targets that are missed, each with its benchmark."""
    return {f"{name}: {target.what}" for name, target in _targets(folder) if not target.is_met}


def explained(page: str) -> set[str]:
    """The missed targets that the page gives a reason for: what is bold under its heading."""
    _, _, rest = page.partition(f"\n{MISSED}\n")
    section, _, _ = rest.partition("\n## ")
    return {" ".join(bold.split()) for bold in EXPLAINED.findall(section)}


def unmeasured(page: str) -> set[str]:
    """Figures with units in the page's own words that stand nowhere between its marks."""
    measured = {
        figure.rstrip(".,")
        for found in MARKED.finditer(page)
        for figure in re.findall(r"\d[\d.,]*", found.group(3))
    }
    words = CODE.sub("", MARKED.sub("", page))
    return {found[0] for found in FIGURE.finditer(words) if found[1] not in measured}
