"""Seeded storms over the memory backends: rare interleavings are where sharing breaks."""

from __future__ import annotations

import os

import pytest
from support.hang import run_bounded
from support.journal_storm import JournalStorm
from support.storm import Storm

STORMS = int(os.environ.get("HOTLUN_STORMS", "300"))
"""How many; the first seed is HOTLUN_STORM_SEED (0)."""
FIRST = int(os.environ.get("HOTLUN_STORM_SEED", "0"))


@pytest.mark.timeout(0)  # each storm has an alarm of its own
@pytest.mark.parametrize("block", range(FIRST, FIRST + STORMS, 50))
def test_a_storm_leaves_nothing_behind(block: int) -> None:
    """Whatever fails, stalls, is lost or cancelled: every task ends, and nothing is left."""
    for seed in range(block, min(block + 50, FIRST + STORMS)):
        try:
            run_bounded(Storm(seed).run())
        except BaseException as error:
            error.add_note(f"storm seed {seed}")
            raise


@pytest.mark.timeout(0)
@pytest.mark.parametrize("block", range(FIRST, FIRST + STORMS // 3, 25))
def test_a_storm_over_several_managers_loses_nothing(block: int) -> None:
    """Nor does a journal without room, a disk that is pulled, a guest that is reset."""
    for seed in range(block, min(block + 25, FIRST + STORMS // 3)):
        try:
            run_bounded(JournalStorm(seed).run())
        except BaseException as error:
            error.add_note(f"journal storm seed {seed}")
            raise
