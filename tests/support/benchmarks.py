"""Runs a benchmark as its users do, to see what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from saved import Result

if TYPE_CHECKING:
    from reporting import Report

_FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


def reported(name: str, *arguments: str) -> Report:
    """What it reports; the command has to succeed."""
    done = subprocess.run(
        [sys.executable, _FOLDER / f"{name}.py", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Result.from_json(done.stdout).report
