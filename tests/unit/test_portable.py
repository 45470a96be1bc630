"""What runs on Windows needs nothing that Windows lacks, and nothing here needs Windows."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.portable import portable_modules, posix_only

TESTS = Path(__file__).parent.parent
SOURCE = TESTS.parent / "src" / "hotlun"
PROGRAMS = ("__main__", "agent.__main__")


def all_modules() -> list[str]:
    """By their names below hotlun."""
    parts = (path.relative_to(SOURCE).with_suffix("").parts for path in SOURCE.rglob("*.py"))
    names = (".".join(part for part in each if part != "__init__") for each in parts)
    return sorted(name for name in names if name not in PROGRAMS)


def test_without_what_windows_lacks(tmp_path: Path) -> None:
    """Everything is imported, and a Manager, its journal and the commands are used."""
    names = [name for name in portable_modules() if name != "hotlun.__main__"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "support.without_posix", tmp_path, *names],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{SOURCE.parent}:{TESTS}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"used {len(names)} modules\n"


@pytest.mark.parametrize("name", all_modules())
def test_everything_is_imported_here(name: str) -> None:
    """Also what is for Windows alone."""
    importlib.import_module(f"hotlun.{name}".rstrip("."))


def test_what_is_left_out_is_there() -> None:
    """A name in the list that names nothing would leave out nothing, and nobody would see."""
    for name in posix_only():
        path = SOURCE.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
    assert "hotlun.manager" in portable_modules()
    assert "hotlun.hcs.computecore" in portable_modules()
    assert not any(name.startswith("hotlun.agent.") for name in portable_modules())
