"""The benchmarks that need no VM run, and have a figure for all that they say they measure."""

from __future__ import annotations

from support.benchmarks import reported


def test_a_managers_costs_have_their_parts() -> None:
    """In one round: what an add + release is made of adds up to it."""
    report = reported("manager", "--runs", "1")
    whole, parts, *_ = report.tables
    assert [row[0] for row in whole.rows] == [0, 64, 255]
    us = [row[1] for row in parts.rows]
    assert all(isinstance(cell, float) for cell in us)
    assert abs(sum(float(cell or 0) for cell in us) - float(whole.rows[-1][1] or 0)) < 1e-6
    assert all(ratio > 0 for ratio in report.ratios.values())


def test_costs_have_an_exponent() -> None:
    """In one round, with one and four of everything: each table ends in the line through it."""
    report = reported("scale", "--runs", "1", "--vms", "0", "--most", "10")
    assert report.tables[0].columns[1:] == ["KiB each", "tasks each"]
    growing = report.tables[1:]
    assert len(growing) == len(report.targets) == len(report.ratios) == 7
    for table in growing:
        *costs, (name, _, nothing) = table.rows
        assert (name, nothing) == ("exponent", None)
        assert [row[0] for row in costs] in (["1", "4"], ["1", "10"])
        assert all(isinstance(cell, float) and cell > 0 for row in costs for cell in row[1:])


def test_requests_have_their_floor() -> None:
    """In one round: one at a time, many in flight, and long ones."""
    report = reported("bridge", "--runs", "1")
    assert [len(table.rows) for table in report.tables] == [2, 2, 2]
    for table in report.tables:
        for _, *figures in table.rows:
            assert all(isinstance(cell, (int, float)) and cell > 0 for cell in figures)
    assert len(report.ratios) == 6
