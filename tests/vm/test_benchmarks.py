"""The benchmarks that need a VM run, and have a figure for all that they say they measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.benchmarks import reported

LIBVIRTD = Path("/usr/sbin/libvirtd")


def test_disks_at_once_have_their_floor() -> None:
    """In one round: two disks are mounted and released, by a Manager and by the bare calls."""
    report = reported("attach", "--disks", "2", "--runs", "1")
    assert report.ratios.keys() == {"attach + mount, 2 at once", "release, 2 at once"}
    for table in report.tables:
        (row,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
        assert row["disks"] == 2
        assert all(isinstance(cell, (int, float)) and cell > 0 for cell in row.values())


def test_operations_have_their_figures() -> None:
    """In one round, a median each: the agent's, and of what it is compared with."""
    some = [word for name in ("mount ext4", "unplug", "verity") for word in ("--only", name)]
    report = reported("guest", "--runs", "1", *some)
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
    report = reported("start", "--runs", "1")
    assert len(report.targets) == 3
    assert all(ratio > 0 for ratio in report.ratios.values())
    host, guest = report.tables
    assert [row[0] for row in host.rows][-1] == "hotlun --help"
    assert [row[0] for row in guest.rows] == ["python3 -I -c ''", "agent, until it answers"]


def test_costs_have_an_exponent_on_a_vm() -> None:
    """In one round: the disks that are attached to a VM make a line, one VM alone makes none."""
    report = reported("scale", "--runs", "1", "--vms", "1", "--most", "4")
    *_, one, disks = report.tables
    assert [row[0] for row in one.rows] == ["1"]
    assert [row[0] for row in disks.rows] == ["1", "4", "exponent"]


def test_an_effect_on_the_probe_has_its_figures() -> None:
    """Disks come and go both ways; where the time goes is sampled, and commands are counted."""
    report = reported("probe", "--disks", "2", "--runs", "1", "--only", "2 controllers")
    came, went, coming, going, asked, let_go = (table.rows for table in report.tables)
    for (row,) in (came, went):
        assert row[0] == "2 controllers"
        assert all(isinstance(cell, (int, float)) and cell > 0 for cell in row[1:])
    for rows in (coming, going):
        assert sum(float(row[1] or 0) for row in rows) == pytest.approx(1)
    assert "block device" in [name for name, _ in coming]
    assert ["INQUIRY, VPD page 80", 4, 2.0] in [row[:3] for row in asked]
    assert ["SYNCHRONIZE_CACHE", 2, 1.0, 1.0] in let_go


@pytest.mark.skipif(
    not LIBVIRTD.exists(), reason="what only benchmarks need is brought by scripts/setup bench"
)
def test_libvirts_ways_and_ours_have_their_times() -> None:
    """With two disks, once: a time for each way, and what is aimed at for the best of theirs."""
    report = reported("versus_libvirt", "--disks", "2", "--runs", "1")
    ends = ("mounted", "gone", "gone from the guest, too")
    assert report.ratios.keys() == {f"2 disks {end}" for end in ends}
    assert len(report.targets) == 2
    for table in report.tables:
        (row,) = table.rows
        assert all(isinstance(cell, (int, float)) and cell > 0 for cell in row)
