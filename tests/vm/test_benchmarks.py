"""The benchmark of the guest's side runs, and has a figure for all that it says it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

GUEST = Path(__file__).parent.parent.parent / "benchmarks/guest.py"


def test_operations_have_their_figures() -> None:
    """In one round, a median each: the agent's, and of what it is compared with."""
    some = [word for name in ("mount ext4", "unplug", "verity") for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, GUEST, "--rounds", "1", "--json", *some],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for name in ("mount ext4", "unmount ext4", "unplug"):
        assert rows[name].keys() == {"agent_ms", "calls_ms", "to_calls", "bare_ms", "to_bare"}
    assert rows["verity"].keys() == {"agent_ms", "bare_ms", "to_bare"}
    assert rows["no-op"].keys() == {"agent_ms"}
    assert all(figure > 0 for row in rows.values() for figure in row.values())
