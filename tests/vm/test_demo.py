"""The commands that need a VM, run as their users run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HOTLUN = (sys.executable, "-m", "hotlun")


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files and running VMs of the test's own; nothing of them is left."""
    directory = tmp_path / "d"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return directory


def hotlun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HOTLUN, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Started programs can be interrupted, even if this is a job in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def processes_of(directory: Path) -> list[str]:
    """The command lines of running processes that mention the directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


class TestTheDemo:
    def test_shows_everything_and_leaves_nothing(self, own_directory: Path) -> None:
        """Exit code 0, every kind of disk, plain text; no file and no process afterwards."""
        done = hotlun("demo")
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(own_directory.iterdir()) == []
        assert processes_of(own_directory) == []
        assert "\x1b" not in done.stdout
        unwrapped = " ".join(done.stdout.split())  # where lines end follows from long paths
        for words in (
            "web.vhdx has b'vhdxfile' at byte 0",
            "store.vhd has b'conectix' at byte 0",
            "manual.qcow2 has b'QFI\\xfb' at byte 0",
            "parts.img has b'EFI PART' at byte 512",
            "error: disk ",
            "■ taken 6 □ reserved 1 ✗ quarantined 0",
            "the data is there, and the same",
            "the data is the same",
            "and not to be found in secret.raw",
            "hotlun-0-7-p0-crypt is gone",
            "holds ext4, and its data is to be preserved",
            "the manual is where it was",
            "QEMU's block nodes and devices are as before",
            "nothing is left behind",
        ):
            assert words in unwrapped, done.stdout
        for row in (
            r"web\.vhdx +0:1 +sd. +/run/mounts/scsi/m0 +ext4, rw +web, backup",
            r"store\.vhd +0:2 +sd. +\S+ +xfs, rw +store",
            r"parts\.img +0:3 +sd.1 +\S+ +ext4, rw +logs",
            r"parts\.img +0:3 +sd.2 +\S+ +ext4, rw +spool",
            r"nbd demo +0:4 +sd. +\S+ +ext4, rw +remote",
            r"scratch\.raw +0:5 +sd. +/srv/scratch +device, rw +scratch",
            r"manual\.qcow2 +0:6 +sd. +\S+ +ext4, ro +reader",
        ):
            assert re.search(row, done.stdout), done.stdout

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
    )
    def test_leaves_nothing_when_it_is_interrupted(
        self, own_directory: Path, number: signal.Signals, code: int
    ) -> None:
        """In the middle of its work: everything is undone first, then the shell is told."""
        with subprocess.Popen(
            [*HOTLUN, "demo"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as demo:
            assert demo.stdout is not None
            _read_until(demo.stdout, "web.vhdx: attached")
            demo.send_signal(number)
            _, errors = demo.communicate()
        assert demo.returncode == code, errors
        assert "what was begun has been undone" in errors
        assert "Traceback" not in errors
        assert list(own_directory.iterdir()) == []
        assert processes_of(own_directory) == []


def _read_until(output: IO[str], words: str) -> None:
    for line in output:
        if words in line:
            return
    pytest.fail(f"it never said {words!r}")


class TestNamedVMs:
    def test_are_started_listed_used_and_stopped(self, own_directory: Path) -> None:
        """A VM outlives `vm start`, runs commands with their exit codes, and ends by `vm stop`."""
        started = hotlun("vm", "start", "one", "--controllers", "2")
        assert started.returncode == 0, started.stderr
        try:
            assert "one runs: pid " in started.stdout
            assert "controllers scsi0, scsi1" in started.stdout

            again = hotlun("vm", "start", "one")
            assert (again.returncode, again.stdout) == (1, "")
            assert "error: a VM called 'one' runs already" in again.stderr

            _, row = hotlun("vm", "list").stdout.splitlines()
            assert row.split()[0] == "one"
            assert str(own_directory) in row

            done = hotlun("vm", "run", "one", "ls /sys/class/scsi_host | wc -l; exit 3")
            assert (done.returncode, done.stdout, done.stderr) == (3, "2\n", "")
            done = hotlun("vm", "run", "one", "echo", "a  b", "-n", "--help")
            assert (done.returncode, done.stdout) == (0, "a  b -n --help\n")
            done = hotlun("vm", "run", "one", "echo whät >&2; kill -9 $$")
            assert (done.returncode, done.stderr) == (137, "whät\n")
        finally:
            stopped = hotlun("vm", "stop", "one")
        assert (stopped.returncode, stopped.stdout) == (0, "one is stopped\n")
        assert hotlun("vm", "list").stdout == ""
        assert processes_of(own_directory) == []
        assert hotlun("vm", "stop", "one").returncode == 1
        assert hotlun("vm", "stop", "--all").returncode == 0
