"""What can die does, in the middle of work on real disks; `scripts/torture` does more of it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from torture.faults import FAULTS, end_the_vm, strike
from torture.kills import kill_and_drain
from torture.soak import soak

if TYPE_CHECKING:
    from pathlib import Path

    from torture.figures import Figures

    from hotlun.vm import Machine

KILLS = 40
ROUNDS = {"the monitor cut": 6, "the agent killed": 3, "the guest reset": 2}
GROWTH = 8.0
"""MiB that a process may have more when it has done as much again: its allocator's business."""
GUEST_GROWTH = 24 << 10
"""KiB; slabs and page tables of a kernel that has seen many disks."""


def assert_good(figures: Figures, rounds: int) -> None:
    assert figures.failures == []
    assert figures.rounds == rounds


async def test_processes_that_are_killed(bare_vm: Machine, tmp_path: Path) -> None:
    """At points of their work; the next one settles, and drains: nothing is left anywhere."""
    figures = await kill_and_drain(bare_vm, tmp_path, 7, KILLS)
    assert_good(figures, KILLS)
    assert len(figures.points) > 8, "all were killed at the same few points"
    assert figures.disagreements


@pytest.mark.parametrize("name", sorted(FAULTS))
async def test_what_else_dies(name: str, tmp_path: Path) -> None:
    """The process lives on: what is held is whole, and can be released."""
    assert_good(await strike(name, tmp_path, 11, ROUNDS[name]), ROUNDS[name])


async def test_qemu_that_is_killed(tmp_path: Path) -> None:
    """Everything ends, and is forgotten; the disks serve the next VM."""
    assert_good(await end_the_vm(tmp_path, 13, 4), 4)


async def test_a_soak_leaves_nothing_to_grow(tmp_path: Path) -> None:
    """Neither memory, descriptors and tasks here nor anything in the guest."""
    result = await soak(tmp_path, 17, 200)
    assert result.faults.total() == 5
    assert result.after.descriptors <= result.before.descriptors
    assert result.after.tasks <= result.before.tasks
    assert result.after.mebibytes < result.before.mebibytes + GROWTH
    assert result.guest_after < result.guest_before + GUEST_GROWTH


def test_the_command_prints_figures() -> None:
    """And its exit status says whether all was as it must be."""
    done = subprocess.run(
        [sys.executable, "-m", "torture", "3", "2", "--faults", "0", "--soak", "40"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "killed, seed 3: 2 rounds, 0 failed" in done.stdout
    assert "soak: 40 operations from 16 tasks" in done.stdout
