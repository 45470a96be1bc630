"""docs/performance.md quotes what was measured, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import page
import plot
import pytest
import saved
from reporting import Report
from saved import BENCHMARKS, Result

ROOT = Path(__file__).parent.parent.parent
PAGE = page.PAGE.read_text()
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))


def some(folder: Path, *, value: float = 1.2) -> Result:
    """A result, saved as that of attach.py."""
    report = Report(ratios={"release": value})
    report.table("release", "disks", "ours ms", "floor ms").rows.append((64, 1250.5, 1000.0))
    report.aim("release: times the floor", value, 1.3)
    result = Result(report, {"python": "3.11.2", "cpus": 2, "date": "2020-02-02", "QEMU": "7.2"})
    saved.path_of("attach", folder).write_text(result.to_json())
    return result


def test_the_tables_are_what_the_results_say() -> None:
    """Whoever saves new figures writes them into the page: `scripts/bench --doc`."""
    assert page.filled(PAGE) == PAGE


def test_every_benchmark_has_its_table() -> None:
    """And each that the page has is one of ours."""
    assert set(re.findall(r"<!-- table: (\S+) -->", PAGE)) == set(BENCHMARKS)
    assert set(re.findall(r"<!-- picture: (\S+) -->", PAGE)) == set(plot.PICTURES)


def test_every_figure_in_the_text_was_measured() -> None:
    """One with a unit stands in some table of the page."""
    assert page.unmeasured(PAGE) == set()


def test_every_missed_target_has_its_reason() -> None:
    """And no reason is left of one that is met by now."""
    assert page.explained(PAGE) == page.missed()


def test_pictures_are_drawn_from_the_results() -> None:
    """Each shows the figures that are saved, and there is one of everything that can be drawn."""
    drawn = {picture.stem: plot.described(picture) for picture in PICTURES}
    results = {name: saved.load(name) for name in plot.PICTURES}
    assert drawn == {name: plot.figures(result) for name, result in results.items() if result}


def test_a_table_is_put_between_its_marks(tmp_path: Path) -> None:
    """As it was printed, with the machine; what stood there goes, and the rest stays."""
    result = some(tmp_path)
    text = "before\n<!-- table: attach -->\nold\n<!-- end -->\nafter 1.25 x\n"
    written = page.filled(text, tmp_path)
    assert f"```text\n{result.report}\n```\n" in written
    assert "Measured 2020-02-02 on 2 CPUs, Python 3.11.2, QEMU 7.2." in written
    assert "old" not in written
    assert written.startswith("before\n<!-- table: attach -->\n")
    assert written.endswith("\n<!-- end -->\nafter 1.25 x\n")
    assert page.filled(written, tmp_path) == written


def test_what_is_not_saved_says_how_it_would_be(tmp_path: Path) -> None:
    """A page can name a benchmark before there are figures of it."""
    written = page.filled("<!-- table: attach -->\n<!-- end -->\n", tmp_path)
    assert "`scripts/bench --save attach`" in written


def test_what_was_before_stands_beside_what_is_now(tmp_path: Path) -> None:
    """Each figure that was aimed at, and each ratio, that is in both."""
    (tmp_path / page.BEFORE).mkdir()
    earlier = some(tmp_path / page.BEFORE, value=2.4)
    some(tmp_path)
    written = page.filled("<!-- change: attach -->\n<!-- end -->\n", tmp_path)
    assert f"Before: {earlier.measured_on()}." in written
    rows = [line.split() for line in written.splitlines() if line.startswith("  release")]
    assert rows == [
        ["release:", "times", "the", "floor", "2.4", "1.2", "0.5"],
        ["release", "2.4", "1.2", "0.5"],
    ]


@pytest.mark.parametrize(("value", "verdict"), [(1.2, "1 met, 0 missed"), (1.4, "0 met, 1 missed")])
def test_targets_stand_together(tmp_path: Path, value: float, verdict: str) -> None:
    """Those of all benchmarks, and how many are met."""
    result = some(tmp_path, value=value)
    written = page.filled("<!-- targets -->\n<!-- end -->\n", tmp_path)
    assert f"attach\n{result.report.targets[0]}\n{verdict}\n" in written
    expected = {"attach: release: times the floor"} if value > 1.3 else set()
    assert page.missed(tmp_path) == expected


def test_a_figure_of_nobody_is_found(tmp_path: Path) -> None:
    """With its unit, wherever it stands in the text; what is in a table may be quoted."""
    some(tmp_path)
    table = page.filled("<!-- table: attach -->\n<!-- end -->\n", tmp_path)
    words = "64 disks took 1000 ms, which is 1.25 x; 25% more, or 3.5 seconds.\n"
    assert page.unmeasured(words + table) == {"1.25 x", "25%", "3.5 seconds"}


def test_reasons_are_read_from_their_section() -> None:
    """Of each, what is bold; wherever its lines are broken."""
    text = (
        f"# A page\n* **not this**\n\n{page.MISSED}\n\n* **attach: one\n  thing**: why.\n\n## End\n"
    )
    assert page.explained(text) == {"attach: one thing"}


def test_times_are_drawn_in_seconds(tmp_path: Path) -> None:
    """Of tables by disks: each column that says its unit."""
    report = some(tmp_path).report
    report.table("other", "journal", "us").rows.append(("none", 1.0))
    expected = {"release": {"disks": [64], "ours": [1.2505], "floor": [1.0]}}
    assert plot.figures(Result(report)) == expected
