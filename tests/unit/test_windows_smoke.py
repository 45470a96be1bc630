"""The script that a Windows user runs: its whole way, on a library that checks each call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.computecore import VM, build

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "windows-smoke.py"
WITH_A_VM = f"""
import ctypes, runpy, sys
library = ctypes.CDLL({build().core!r})
library.fake_system(b"{VM}", b"3f2504e0-4f89-11d3-9a0c-0305e82c3301", b"Linux")
sys.argv = ["windows-smoke.py", "--library", {build().core!r}, *sys.argv[1:]]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    library.fake_violations.restype = ctypes.c_char_p
    print(library.fake_violations().decode(), file=sys.stderr)
"""


def run(*arguments: str) -> tuple[int, str, list[dict[str, Any]], str]:
    """Exit status, what was printed, the report in it, and what the library complained of."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_VM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    lines, bracket, report = done.stdout.partition("\n[\n")
    return done.returncode, lines, json.loads(bracket + report or "[]"), done.stderr.strip()


def test_it_lists_what_there_is() -> None:
    """Nothing else is done without a VM."""
    status, lines, report, complaints = run()
    assert (status, complaints) == (0, "")
    assert "list the compute systems" in lines
    assert [step["step"] for step in report] == ["versions", "list the compute systems"]
    assert report[1]["found"] == [
        {"id": VM, "kind": "VirtualMachine", "owner": "fake", "state": "Running"}
    ]


def test_it_attaches_a_disk_and_takes_it_away() -> None:
    """Each step as it should be, and the report says so."""
    status, _, report, complaints = run("--vm", VM)
    assert (status, complaints) == (0, ""), report
    found = {step["step"]: step["found"] for step in report}
    assert found["attach it at 0:63"] is None
    assert found["ask whether it is there"] == "present"
    assert found["attach another one there"] == "refused, as it should be: 0x800700B7"
    assert found["detach what is not there"] is None
    assert sum(step["step"].startswith("let the VM open") for step in report) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--vm", "nobody"], "there is no VM with this id"), (["--vm", VM, "--slot", "0:64"], "64")],
)
def test_what_fails_is_in_the_report(arguments: list[str], words: str) -> None:
    """And in the exit status."""
    status, lines, report, complaints = run(*arguments)
    assert (status, complaints) == (1, "")
    assert words in lines
    assert any(not step["ok"] for step in report)


def test_on_another_system_it_says_what_it_takes() -> None:
    """Rather than a traceback."""
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 1
    assert "is a part of Windows" in done.stdout
    assert done.stderr == ""


def test_its_disk_is_one(tmp_path: Path) -> None:
    """As others read it."""
    code = (
        "import runpy, sys, pathlib;"
        "runpy.run_path(sys.argv[1])['fixed_vhd'](pathlib.Path(sys.argv[2]))"
    )
    path = tmp_path / "x.vhd"
    subprocess.run([sys.executable, "-c", code, SCRIPT, path], check=True, timeout=50)
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "vpc", path],
        capture_output=True,
        check=True,
        timeout=50,
    )
    assert json.loads(info.stdout)["virtual-size"] == 240 * 4 * 17 * 512
    assert path.stat().st_size == 240 * 4 * 17 * 512 + 512
