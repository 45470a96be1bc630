"""A real agent is sent what no host would send, and serves on."""

from __future__ import annotations

from fuzz import report, vm

COUNT = 200
"""Inputs; `scripts/fuzz --vm` sends 2,000."""


async def test_two_hundred_inputs_leave_a_guest_as_it_was() -> None:
    """The same agent, no larger, with nothing mounted, mapped or made, and it mounts a disk."""
    outcome = await vm.run(1, 0, COUNT)
    assert outcome.is_good, report.text(outcome, "scripts/fuzz --vm")
    assert outcome.figures.inputs == COUNT + COUNT // 2
    assert outcome.figures.verbs["done"] > COUNT // 20
