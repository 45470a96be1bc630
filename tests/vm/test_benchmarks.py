"""The benchmark of the guest's side runs, and has a figure for all that it says it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from saved import Result

GUEST = Path(__file__).parent.parent.parent / "benchmarks/guest.py"


def test_operations_have_their_figures() -> None:
    """In one round, a median each: the agent's, and of what it is compared with."""
    some = [word for name in ("mount ext4", "unplug", "verity") for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, GUEST, "--runs", "1", "--json", *some],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = Result.from_json(done.stdout).report
    (table,) = report.tables
    figures = {
        str(name): dict(zip(table.columns[1:], row, strict=True)) for name, *row in table.rows
    }
    there = {name: {c for c, cell in row.items() if cell} for name, row in figures.items()}
    all_of_them = set(table.columns[1:])
    for name in ("mount ext4", "unmount ext4", "unplug"):
        assert there[name] == all_of_them
    assert there["verity"] == {"agent ms", "bare ms", "to bare"}
    assert there["no-op"] == {"agent ms"}
    assert {f"{name}, to the same calls" for name in ("mount ext4", "unplug")} < set(report.ratios)
