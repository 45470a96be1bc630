#!/usr/bin/env python3
"""What the agent takes in a real VM, beside the bare calls and programs that do the same.

    .venv/bin/python benchmarks/guest.py [--json] [--runs N] [--only NAME]

All are timed in the guest, by `in_guest.py`, in turns on the same disks; medians:

* the agent, from a request to its answer, over a unix socket. The requests are those of a
  Manager, so that each disk is proved by its serial and its size before it is mounted;
* the same system calls as the agent makes, in the same order, by nobody who looks at what
  they say (`recorded.py`);
* bare: what somebody would do who trusts everything. mkdir(2) and mount(2), for one.

Beside "encrypted xfs" are the steps of the original agent, which are cryptsetup's. Beside
"encrypted ext4" is nothing: on 512 MiB mkfs.ext4 fails after those steps.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import Report, arguments, run

from hotlun import (
    Attachment,
    Disk,
    DiskKind,
    GuestMount,
    ImageFormat,
    MountConfig,
    Secret,
    Slot,
    Verity,
)
from hotlun.agent.server import FEATURES
from hotlun.backends import requests
from hotlun.vm import Machine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

MANY, SOME, FEW = 31, 11, 5
"""Rounds, by how long one takes."""
OTHERS = {"calls": "the same calls", "bare": "the bare ones"}
"""What the agent is compared with, and what it is called."""
MIB = 1 << 20

DISKS = {
    "ext4": 64 * MIB,
    "xfs": 320 * MIB,
    "unplugged": 64 * MIB,
    "blank": 320 * MIB,
    "scratch": 512 * MIB,
    "luks": 64 * MIB,
    "verity": 64 * MIB,
}
"""Their sizes in bytes; their LUNs follow the order."""
TREE = 48 * MIB
"""Where on the last one the filesystem ends and the hashes begin."""

KEY = b"a key for benchmarks"
EXT4, XFS = MountConfig(filesystem="ext4"), MountConfig(filesystem="xfs")
ENSURE_EXT4 = MountConfig(filesystem="ext4", ensure_filesystem=True)
ENSURE_XFS = MountConfig(filesystem="xfs", ensure_filesystem=True)
SCRATCH_EXT4 = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)
SCRATCH_XFS = MountConfig(filesystem="xfs", ensure_filesystem=True, encrypted=True)
LUKS = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True, key=Secret(KEY))

MAKE_EXT4 = ("mkfs.ext4", "-F", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard")
MAKE_XFS = ("mkfs.xfs", "-f", "-q", "-K")
"""As the agent runs them."""

SCRIPTS = [Path(__file__).with_name(name) for name in ("in_guest.py", "recorded.py")]
IN_GUEST_TIMEOUT = 1200.0


@dataclass(frozen=True)
class Job:
    """Something that is done and undone.

    Args:
        done, undone: what the rows are called; one without a name is left out.
        config: how the disk is mounted; None if it is unplugged.
        bare: what does the same (`BARE` of in_guest.py), with its arguments; `""` if nothing.
        blank: make the disk blank before each time.
        replayed: make the agent's system calls without it, too; not if it runs programs.
    """

    done: str
    undone: str
    rounds: int
    disk: str
    config: MountConfig | None
    bare: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    blank: bool = False
    replayed: bool = False


def jobs(root_hash: str) -> list[Job]:
    """All there is to measure, in the order of the table."""
    ext4, xfs = {"filesystem": "ext4"}, {"filesystem": "xfs"}
    luks = {"open": ["cryptsetup", "open", "--key-file", "-", "DISK", "NAME"], "key": KEY.hex()}
    tree = f"--hash-offset={TREE}"
    verity = {"open": ["veritysetup", "open", tree, "DISK", "NAME", "DISK", root_hash]}
    verified = MountConfig(filesystem="ext4", verity=Verity(root_hash, TREE))
    found_out, made = "find out and mount", "make and mount"
    opened, formatted = "open and mount", "format, open and mount"
    return [
        Job("mount ext4", "unmount ext4", MANY, "ext4", EXT4, "mount", ext4, replayed=True),
        Job("mount ext4, found out", "", MANY, "ext4", MountConfig(), found_out),
        Job("ensure ext4, is there", "", MANY, "ext4", ENSURE_EXT4, found_out),
        Job("mount xfs", "unmount xfs", MANY, "xfs", XFS, "mount", xfs, replayed=True),
        Job("link", "unlink", MANY, "ext4", MountConfig(block_device=True), "link", replayed=True),
        Job("unplug", "", MANY, "unplugged", None, "delete", replayed=True),
        Job(
            *("ensure ext4, blank", "", SOME, "blank", ENSURE_EXT4),
            *(made, {"maker": MAKE_EXT4, **ext4}, True),
        ),
        Job(
            *("ensure xfs, blank", "", SOME, "blank", ENSURE_XFS),
            *(made, {"maker": MAKE_XFS, **xfs}, True),
        ),
        Job(
            *("encrypted xfs, blank", "unmount encrypted xfs", SOME, "scratch", SCRATCH_XFS),
            *(formatted, xfs, True),
        ),
        Job("encrypted ext4, blank", "", SOME, "scratch", SCRATCH_EXT4, blank=True),
        Job("LUKS with its key", "unmount LUKS", FEW, "luks", LUKS, opened, {**luks, **ext4}),
        Job(
            *("verity", "unmount verity", SOME, "verity", verified),
            *(opened, {**verity, **ext4, "read_only": True}),
        ),
    ]


class Bench:
    """The VM and its disks."""

    def __init__(self, vm: Machine, directory: str) -> None:
        self._vm = vm
        self._disks: dict[str, Attachment] = {}
        for lun, (name, size) in enumerate(DISKS.items()):
            path = Path(directory, f"{name}.img")
            with path.open("wb") as file:
                file.truncate(size)
            disk = Disk(str(path), DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
            self._disks[name] = Attachment(Slot(0, lun), disk, f"benchmark{lun}")

    async def attach(self) -> str:
        """Attach the disks, those with the filesystems that are to be there; verity's root."""
        for attachment in self._disks.values():
            await self._vm.host.attach(attachment)
        for name, config in (("ext4", ENSURE_EXT4), ("xfs", ENSURE_XFS)):
            mount = self._mount(name, config)
            await self._vm.guest.mount(mount)
            await self._vm.guest.unmount(mount)
        return await self._verified()

    async def _verified(self) -> str:
        """Make the tree of hashes, and attach the disk again so that it can only be read."""
        attachment = self._disks["verity"]
        said = await self.shell(
            f"disk=/dev/$(ls /sys/bus/scsi/devices/*:0:0:{attachment.slot.lun}/block)\n"
            f"mkfs.ext4 -q -F -b 4096 $disk {TREE >> 12}\n"
            f"veritysetup format --data-blocks={TREE >> 12} --hash-offset={TREE} $disk $disk"
        )
        await self._vm.guest.unplug(attachment)
        await self._vm.host.detach(attachment)
        disk = Disk(
            attachment.disk.path, DiskKind.VIRTUAL_DISK, read_only=True, format=ImageFormat.RAW
        )
        self._disks["verity"] = Attachment(attachment.slot, disk, attachment.serial)
        await self._vm.host.attach(self._disks["verity"])
        root = re.search(r"Root hash:\s*([0-9a-f]+)", said)
        assert root is not None, said
        return root[1]

    async def shell(self, command: str) -> str:
        done = await self._vm.run(f"set -e\n{command}", timeout=IN_GUEST_TIMEOUT)
        if done.returncode:
            raise RuntimeError(f"in the guest: {done.stdout}{done.stderr}")
        return done.stdout

    async def measure(self, plan: list[Job]) -> dict[str, Any]:
        """Have the script in the guest do it all; its samples, by the name of the job."""
        planned = json.dumps([self._planned(job) for job in plan])
        scripts = [f"cat >/run/{path.name} <<'END'\n{path.read_text()}\nEND\n" for path in SCRIPTS]
        command = "".join(scripts) + (
            f"python3 -I /run/in_guest.py /run/hotlun/agent.pyz <<'END'\n{planned}\nEND\n"
        )
        samples: dict[str, Any] = json.loads(await self.shell(command))
        return samples

    async def round_trip(self) -> float:
        """Seconds on the host for a request that there is nothing to do for."""
        nothing = Attachment(Slot(0, 63), self._disks["ext4"].disk, "nothing")
        begin = time.perf_counter()
        await self._vm.guest.unplug(nothing)
        return time.perf_counter() - begin

    def _planned(self, job: Job) -> dict[str, Any]:
        attachment = self._disks[job.disk]
        if job.config is None:
            do, undo = [requests.unplug_request(attachment, "linux")], []
        else:
            mount = self._mount(job.disk, job.config)
            do = [requests.mount_request(mount, "linux", FEATURES)]
            undo = [requests.unmount_request(mount, "linux", FEATURES)]
        return {
            "name": job.done,
            "rounds": job.rounds,
            "lun": attachment.slot.lun,
            "do": do,
            "undo": undo,
            "bare": job.bare,
            "arguments": job.arguments,
            "blank": job.blank,
            "replayed": job.replayed,
        }

    def _mount(self, name: str, config: MountConfig) -> GuestMount:
        attachment = self._disks[name]
        identity = self._vm.host.identity(attachment)
        return GuestMount(attachment, "/run/benchmark/agent", config, identity)


async def measure(chosen: argparse.Namespace) -> Report:
    """Medians in milliseconds, by what was done."""
    with tempfile.TemporaryDirectory() as directory:
        async with Machine.start() as vm:
            bench = Bench(vm, directory)
            plan = jobs(await bench.attach())
            if chosen.only:
                plan = [job for job in plan if job.done in chosen.only]
            if chosen.runs:
                plan = [replace(job, rounds=chosen.runs) for job in plan]
            samples = await bench.measure(plan)
            there_and_back = [await bench.round_trip() for _ in range(MANY)]
    report = Report()
    table = report.table(
        "in the guest", "operation", "agent ms", "calls ms", "to calls", "bare ms", "to bare"
    )
    for job in plan:
        for name, ms in _rows(job, samples[job.done]):
            row: list[float | None] = []
            for side, what in OTHERS.items():
                ratio = ms["agent"] / ms[side] if side in ms else None
                row += (ms.get(side), ratio)
                if ratio is not None:
                    report.ratios[f"{name}, to {what}"] = round(ratio, 3)
            table.rows.append((name, ms["agent"], *row))
    nothing = _median(sample for sample, _ in samples["nothing"]["agent"])
    for name, only in (("no-op", nothing), ("no-op, from the host", _median(there_and_back))):
        table.rows.append((name, only, *[None] * 4))
    return report


def _rows(job: Job, samples: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Of what is done and of what is undone: milliseconds, by the side."""
    for index, name in enumerate((job.done, job.undone)):
        if name:
            yield (
                name,
                {
                    side: _median(sample[index] for sample in rounds)
                    for side, rounds in samples.items()
                    if rounds
                },
            )


def _median(seconds: Iterable[float]) -> float:
    """In milliseconds."""
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--runs", type=int, help="of each, in place of 31, 11 or 5")
    parser.add_argument("--only", action="append", metavar="NAME", help="a row; can be repeated")
    run(__doc__ or "", measure, parser)


if __name__ == "__main__":
    main()
