"""The benchmarks that need a VM run, and have a figure for all that they say they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from saved import Result

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
GUEST, START = BENCHMARKS / "guest.py", BENCHMARKS / "start.py"


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


def test_starts_have_their_figures() -> None:
    """Each once, on the host and in the guest, beside its floor."""
    done = subprocess.run(
        [sys.executable, START, "--runs", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["targets"]) == 3
    assert all(ratio > 0 for ratio in report["ratios"].values())
    host, guest = report["tables"]
    assert [row[0] for row in host["rows"]][-1] == "hotlun --help"
    assert [row[0] for row in guest["rows"]] == ["python3 -I -c ''", "agent, until it answers"]
