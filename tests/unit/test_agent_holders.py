"""Refusals name who is in the way: whatever holds a disk, whoever keeps a mount busy."""

from __future__ import annotations

import itertools
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from support.guest import FakeGuest

from hotlun.agent import holders
from hotlun.agent.mountinfo import Mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISK, PART = "8:0", "8:1"
MOUNT = Mount("40", "1", PART, "/mnt/a", "ext4", "/dev/sda1")


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path)
    yield guest
    guest.close()


@pytest.fixture
def disk(guest: FakeGuest) -> str:
    """Its directory in sysfs; it has one partition."""
    return str(guest.add_disk(1, "sda", DISK, {"sda1": PART}))


def add_process(guest: FakeGuest, pid: str, *, namespace: str = "mnt:[1]", **links: str) -> Path:
    """A process named `sleeper`; `links` are exe, cwd and root."""
    process = guest.root / "proc" / pid
    for directory in ("ns", "fd", "fdinfo"):
        (process / directory).mkdir(parents=True)
    (process / "ns/mnt").symlink_to(namespace)
    (process / "mountinfo").write_text("")
    (process / "comm").write_text("sleeper\n")
    for name, target in links.items():
        (process / name).symlink_to(target)
    return process


def open_file(process: Path, number: int, path: str, mount: str = "1") -> None:
    (process / f"fd/{number}").symlink_to(path)
    (process / f"fdinfo/{number}").write_text(f"pos:\t0\nflags:\t0100000\nmnt_id:\t{mount}\n")


def loop_on(guest: FakeGuest, name: str, path: str) -> None:
    (guest.sys / f"devices/virtual/block/{name}/loop").mkdir(parents=True)
    (guest.sys / f"devices/virtual/block/{name}/loop/backing_file").write_text(f"{path}\n")


def swap_on(guest: FakeGuest, path: str) -> None:
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    (guest.root / "proc/swaps").write_text(f"{head}{path}  partition\t1020\t\t0\t\t-2\n")


def test_a_disk_that_nothing_uses_has_no_users(guest: FakeGuest, disk: str) -> None:
    """Others' processes, loop devices and swap are none of its."""
    add_process(guest, "self", cwd="/")
    open_file(add_process(guest, "77", cwd="/"), 3, "/dev/null")
    loop_on(guest, "loop0", "/srv/image")
    (guest.sys / "devices/virtual/block/loop0p1").mkdir()
    swap_on(guest, "/swapfile")
    assert holders.users(guest.kernel, disk) == []


def test_what_is_made_of_a_disk_is_named(guest: FakeGuest, disk: str) -> None:
    """Mappings, with their maker's name, RAID, btrfs, swap, loop devices."""
    dev = guest.kernel.dev
    for holder in ("sda/holders/md0", "sda/sda1/holders/dm-3"):
        (guest.sysfs(1) / "block" / holder).mkdir(parents=True)
    (guest.sys / "class/block/dm-3/dm").mkdir(parents=True)
    (guest.sys / "class/block/dm-3/dm/name").write_text("vg-root\n")
    (guest.sys / "fs/btrfs/uuid/devices/sda").mkdir(parents=True)
    swap_on(guest, f"{dev}/sda1")
    loop_on(guest, "loop0", f"{dev}/sda1")
    assert holders.users(guest.kernel, disk) == [
        "sda is part of md0",
        "sda is part of the mounted btrfs uuid",
        "sda1 is part of dm-3 (vg-root)",
        "sda1 is used as swap",
        "sda1 is part of loop0",
    ]


def test_mounts_are_found_in_every_namespace(guest: FakeGuest, disk: str) -> None:
    """With a process that is in it, if it is not ours."""
    line = f"40 1 {PART} / /mnt/a rw - ext4 /dev/sda1 rw\n"
    (add_process(guest, "self") / "mountinfo").write_text(line)
    (add_process(guest, "7") / "mountinfo").write_text(line)
    (add_process(guest, "77", namespace="mnt:[2]") / "mountinfo").write_text(line)
    assert holders.users(guest.kernel, disk) == [
        "sda1 is mounted at /mnt/a",
        "sda1 is mounted at /mnt/a for process 77 (sleeper)",
    ]


@pytest.mark.root
def test_who_has_the_node_open_is_named(guest: FakeGuest, disk: str) -> None:
    """By the node's number, whatever its name; once a process, and not the agent itself."""
    for name, number in (("mine", os.makedev(8, 1)), ("other", os.makedev(8, 16))):
        os.mknod(os.path.join(guest.kernel.dev, name), 0o60600, number)
    os.mknod(os.path.join(guest.kernel.dev, "tty"), 0o20600, os.makedev(8, 1))
    for pid in ("77", str(os.getpid())):
        process = add_process(guest, pid)
        for number in (3, 4):
            open_file(process, number, f"{guest.kernel.dev}/mine")
    for pid, name in (("78", "other"), ("79", "tty"), ("80", "gone")):
        open_file(add_process(guest, pid), 3, f"{guest.kernel.dev}/{name}")
    assert holders.users(guest.kernel, disk) == [
        f"process 77 (sleeper) has {guest.kernel.dev}/mine open"
    ]


def test_many_users_are_counted(guest: FakeGuest, disk: str) -> None:
    """Five are named."""
    for number in range(8):
        (guest.sysfs(1) / f"block/sda/holders/dm-{number}").mkdir(parents=True)
    users = holders.users(guest.kernel, disk)
    assert users[4:] == ["sda is part of dm-4", "and 3 more"]


def test_a_search_that_takes_too_long_is_given_up(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine can have a hundred thousand processes."""
    monkeypatch.setattr(holders, "_PATIENCE", -1.0)
    add_process(guest, "77", cwd="/mnt/a")
    assert holders.keeping_busy(guest.kernel, MOUNT, "") == []

    monkeypatch.setattr(holders, "_PATIENCE", 0.2)
    slow = guest.root / "proc/77/comm"
    slow.unlink()
    os.mkfifo(slow)
    timer = threading.Timer(0.5, lambda: slow.write_text("sleeper\n"))
    timer.start()
    add_process(guest, "self")
    add_process(guest, "78", cwd="/mnt/a")
    assert holders.keeping_busy(guest.kernel, MOUNT, "") == [
        "the directory of process 77 (sleeper): /mnt/a",
        "maybe more, as not every process was looked at",
    ]
    timer.join()


def test_a_process_with_a_million_files_is_given_up_too(
    guest: FakeGuest, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is looked at for each of them, not only for each process."""
    process = add_process(guest, "77")
    for number in range(200):
        open_file(process, number, "/mnt/b/file")
    looked: list[str] = []

    def link(path: str) -> str:
        looked.append(path)
        return ""

    def search(what: Callable[[], list[str]]) -> int:
        """How many files are looked at in ten seconds, one of which each look at the time takes."""
        looked.clear()
        clock = SimpleNamespace(monotonic=itertools.count().__next__)
        monkeypatch.setattr(holders, "time", clock)
        assert what() == []
        return sum("/fd/" in path for path in looked)

    monkeypatch.setattr(holders, "_PATIENCE", 10.0)
    monkeypatch.setattr(holders, "_link", link)
    assert 0 < search(lambda: holders.openers(guest.kernel, disk)) < 20
    assert 0 < search(lambda: holders.keeping_busy(guest.kernel, MOUNT, "")) < 20


def test_only_so_much_is_read_of_what_a_process_has_mapped(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be megabytes, which the kernel writes anew for each who asks."""
    of_others = "7f00-7f01 r--s 00000000 08:01 12    /mnt/b/other data\n" * 5000
    mapping = "7f00-7f01 r--s 00000000 08:01 12    /mnt/a/some data\n"
    add_process(guest, "self")
    (add_process(guest, "77", cwd="/", root="/", exe="/bin/x") / "maps").write_text(
        of_others + mapping
    )
    assert holders.keeping_busy(guest.kernel, MOUNT, "") == [
        "a mapped file of process 77 (sleeper): /mnt/a/some data"
    ]
    monkeypatch.setattr(holders, "_MOST_MAPPED", 1000)
    assert holders.keeping_busy(guest.kernel, MOUNT, "") == []


def test_the_kernels_own_threads_are_not_looked_at(guest: FakeGuest) -> None:
    """Where number 2 is their parent, and not some program, as it is in a container."""
    for pid in ("2", "3", "77"):
        add_process(guest, pid)
    children = guest.root / "proc/2/task/2/children"
    children.parent.mkdir(parents=True)
    children.write_text("3 ")
    assert [os.path.basename(path) for path in guest.kernel.processes()] == ["self", "2", "77"]
    (guest.root / "proc/2/exe").symlink_to("/bin/program")
    assert [os.path.basename(path) for path in guest.kernel.processes()] == ["self", "2", "3", "77"]


def test_who_keeps_a_mount_busy_is_named_with_the_file(guest: FakeGuest) -> None:
    """Each process once, by the first that is found of it."""
    add_process(guest, "self", cwd="/")
    open_file(add_process(guest, "70", cwd="/mnt/a/dir"), 3, "/mnt/a/log (deleted)", mount="40")
    add_process(guest, "71", cwd="/mnt/a/dir", root="/mnt/a")
    add_process(guest, "72", cwd="/", root="/mnt/a")
    add_process(guest, "73", cwd="/", root="/", exe="/mnt/a/bin/x")
    mapping = "7f00-7f01 r--s 00000000 08:01 12    /mnt/a/some data\n7f02-7f03 rw-p 00 00:00 0 \n"
    (add_process(guest, "74", cwd="/", root="/", exe="/bin/x") / "maps").write_text(mapping)
    loop_on(guest, "loop0", "/mnt/a/image")
    assert holders.keeping_busy(guest.kernel, MOUNT, "") == [
        "loop0 is made of /mnt/a/image",
        "an open file of process 70 (sleeper): /mnt/a/log (deleted)",
        "the directory of process 71 (sleeper): /mnt/a/dir",
        "the root of process 72 (sleeper): /mnt/a",
        "the program of process 73 (sleeper): /mnt/a/bin/x",
        "and 1 more",
    ]
    (guest.sys / "devices/virtual/block/loop0/loop/backing_file").unlink()
    named = holders.keeping_busy(guest.kernel, MOUNT, "")
    assert named[4] == "a mapped file of process 74 (sleeper): /mnt/a/some data"


def test_mounts_and_swap_on_a_mount_keep_it_busy(guest: FakeGuest) -> None:
    """They are no process's."""
    text = (
        f"40 1 {PART} / /mnt/a rw - ext4 /dev/sda1 rw\n41 40 0:50 / /mnt/a/b rw - tmpfs none rw\n"
    )
    swap_on(guest, "/mnt/a/swap")
    assert holders.keeping_busy(guest.kernel, MOUNT, text) == [
        "/mnt/a/b is mounted on it",
        "/mnt/a/swap is used as swap",
    ]


def test_innocent_processes_are_not_named(guest: FakeGuest) -> None:
    """Another mount of the same path, a path that begins the same, another namespace."""
    add_process(guest, "self", cwd="/")
    open_file(add_process(guest, "70", cwd="/mnt/abc"), 3, "/mnt/a/file", mount="99")
    add_process(guest, "71", namespace="mnt:[2]", cwd="/mnt/a", root="/mnt/a", exe="/bin/x")
    mapping = "7f00-7f01 r--s 00000000 08:11 12    /mnt/a/some data\n"
    (add_process(guest, "72", cwd="/", exe="/mnt/ab/x") / "maps").write_text(mapping)
    assert holders.keeping_busy(guest.kernel, MOUNT, "") == []
