"""Programs that are still at work when nobody who started them is there."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hotlun.agent import orphans, programs
from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.errors import AbandonedError, RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.orphans import Orphans
from hotlun.agent.settings import Slot
from hotlun.agent.uevents import Deadline

STARTER = """
import os, sys
from hotlun.agent import programs
programs.run("a disk", ["/bin/sh", "-c", sys.argv[2]], node=sys.argv[1])
"""


@pytest.fixture
def device(tmp_path: Path) -> BlockDevice:
    node = tmp_path / "sda"
    node.touch()
    return BlockDevice(Slot(0, 1), "sda", str(node), "8:0", str(tmp_path))


def started(device: BlockDevice, script: str) -> subprocess.Popen[str]:
    """Another process that runs a program on the device."""
    command = [sys.executable, "-c", STARTER, device.node, script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait(device: BlockDevice, seconds: float) -> None:
    Orphans(Kernel()).wait_for(device, Deadline(seconds))


def test_without_one_nothing_is_waited_for(device: BlockDevice) -> None:
    """Nor after one that has ended."""
    wait(device, 0)
    programs.run("a disk", ["/bin/true"], node=device.node)
    wait(device, 0)


def test_one_that_outlives_its_starter_is_waited_for(device: BlockDevice, tmp_path: Path) -> None:
    """And so is what it has started itself; until then a deadline is kept."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    here = tmp_path / "here"
    with started(device, f"(touch {here}; read go <{gate}) & exit 0") as starter:
        while not here.exists():
            os.sched_yield()
        os.kill(starter.pid, signal.SIGKILL)
    with pytest.raises(RequestError, match="still at work"):
        wait(device, 0.1)
    opening = threading.Timer(0.2, lambda: gate.write_text("go\n"))
    opening.start()
    wait(device, 30)
    opening.join()


def test_who_asked_may_go(device: BlockDevice) -> None:
    """Then nobody waits any longer."""
    with (
        orphans.marked(device.node),
        pytest.raises(AbandonedError),
    ):
        Orphans(Kernel()).wait_for(device, Deadline(30, lambda: False))


def test_other_locks_of_a_node_are_not_minded(device: BlockDevice) -> None:
    """udev's, and those of makers of filesystems, are of another kind."""
    with open(device.node, "r+b") as file, orphans.marked(device.node):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(device.node, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wait(device, 0)


def test_a_node_that_is_not_there_is_worked_on_by_nobody(device: BlockDevice) -> None:
    """What is to work on it says so itself."""
    Path(device.node).unlink()
    wait(device, 0)
    programs.run("a disk", ["/bin/true"], node=device.node)


@pytest.mark.parametrize(
    ("locks", "are_any"),
    [
        ("", False),
        ("1: OFDLCK ADVISORY  READ  -1 00:06:321 0 EOF\n", True),
        (
            "1: FLOCK  ADVISORY  WRITE 7 00:19:44 0 EOF\n2: OFDLCK ADVISORY  READ -1 0:6:3 0 EOF",
            True,
        ),
        (
            "1: FLOCK  ADVISORY  READ  7 00:19:44 0 EOF\n2: POSIX  ADVISORY  READ  7 0:6:3 0 EOF",
            False,
        ),
        ("1: OFDLCK ADVISORY  WRITE -1 00:06:321 0 EOF\n", False),
        ("1: OFDLCK ADVISORY  READ  -1 00:06:321 128 128\n", False),
    ],
)
def test_locks_tell_whether_there_may_be_any(tmp_path: Path, locks: str, are_any: bool) -> None:
    """Those over all of a file, for reading, of an open file description."""
    (tmp_path / "locks").write_text(locks)
    assert Orphans(Kernel(proc=str(tmp_path))).are_any() is are_any


def test_there_are_no_new_ones(tmp_path: Path, device: BlockDevice) -> None:
    """Once there were none; what this process starts itself is looked for all the same."""
    locks = tmp_path / "locks"
    orphans_of_before = Orphans(Kernel(proc=str(tmp_path)))
    assert orphans_of_before.are_any()
    locks.write_text("")
    assert not orphans_of_before.are_any()
    locks.write_text("1: OFDLCK ADVISORY  READ  -1 00:06:321 0 EOF\n")
    assert not orphans_of_before.are_any()
    with orphans.marked(device.node), pytest.raises(RequestError, match="still at work"):
        orphans_of_before.wait_for(device, Deadline(0))
