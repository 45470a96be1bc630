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
from hotlun.agent.errors import AbandonedError, RequestError
from hotlun.agent.kernel import Kernel
from hotlun.agent.scsi import BlockDevice
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
    orphans.wait_for(Kernel(), device, Deadline(seconds))


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
        orphans.wait_for(Kernel(), device, Deadline(30, lambda: False))


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
