#!/usr/bin/env python3
"""What the guest's kernel does for each disk, and what of it can be spared: on and off.

    .venv/bin/python benchmarks/probe.py [--json] [--disks N] [--runs N] [--only NAME ...]

Disks are plugged into a VM all at once by bare pipelined QMP; the time ends when the guest's
kernel announces the last of them (a uevent; nothing polls), and again when the guest has let
all of them go (`delete` in sysfs). Each effect is a way beside another one that differs in
one thing, in turns on the same VM; medians of the pairs' ratios, so that the machine's moods
count less. There is no floor here but the other way. Where the kernel spends its time is said
by samples of its call chains. The commands are counted by the guest's
kernel (the trace event scsi_dispatch_cmd_start), in a round of its own.
"""

from __future__ import annotations

import collections
import contextlib
import re
import statistics
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from probe_vm import FOUR, ProbeVM, Spent, Way
from reporting import Report, arguments, in_turn, run

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

ONE = Way()
TWO_CPUS = Way(cpus=2)
NO_VPD = {"vendor": "DELL", "product": "PERCRAID", "scsi_version": 3}
"""A disk that Linux asks for none, for what it costs; nobody should have such a one.

virtio-scsi has the kernel ask any disk that is not in the kernel's own list (Linux 6.1,
virtscsi_device_alloc: BLIST_TRY_VPD_PAGES; scsi_devinfo.c), whatever its version is and
whatever scsi_mod's default_dev_flags are.
"""

SOONER_RCU = {"/sys/module/rcutree/parameters/jiffies_till_first_fqs": "0"}
"""RCU looks at once whether idle processors let a grace period end, and not a tick later."""


@dataclass(frozen=True)
class Effect:
    """One thing that can be had in two ways."""

    name: str
    on: Way
    off: Way = field(default=ONE)


EFFECTS = (
    Effect("2 controllers", replace(ONE, controllers=FOUR[:2])),
    Effect("4 controllers", replace(ONE, controllers=FOUR)),
    Effect("2 controllers, 2 CPUs", replace(TWO_CPUS, controllers=FOUR[:2]), TWO_CPUS),
    Effect("4 controllers, 2 CPUs", replace(TWO_CPUS, controllers=FOUR), TWO_CPUS),
    Effect("2 CPUs", TWO_CPUS, ONE),
    Effect("1 queue, 2 CPUs", replace(TWO_CPUS, controllers=("one-queue",)), TWO_CPUS),
    Effect("ioeventfd=on", replace(ONE, controllers=("ioeventfd",))),
    Effect("iothread, beside ioeventfd=on", replace(ONE, controllers=("iothread",)),
           replace(ONE, controllers=("ioeventfd",))),
    Effect("paused meanwhile", replace(ONE, paused=True)),
    Effect("paused, 4 controllers", replace(ONE, controllers=FOUR, paused=True)),
    Effect("8 at a time", replace(ONE, window=8)),
    Effect(
        "8 at a time, 4 controllers",
        replace(ONE, controllers=FOUR, window=8),
        replace(ONE, controllers=FOUR),
    ),
    Effect("highest LUN first", replace(ONE, backwards=True)),
    Effect("one scan, no events", replace(ONE, controllers=("no-events",), scan=True)),
    Effect("no VPD pages", replace(ONE, properties=NO_VPD)),
    Effect("read-only", replace(ONE, read_only=True)),
    Effect("write-cache=off", replace(ONE, properties={"write-cache": "off"})),
    Effect("removable", replace(ONE, properties={"removable": True})),
    Effect("rotation_rate=1", replace(ONE, properties={"rotation_rate": 1})),
    Effect("blocks of 4096", replace(ONE, properties=dict.fromkeys(
        ("logical_block_size", "physical_block_size"), 4096))),
    Effect("a partition", replace(ONE, image="mbr")),
    Effect("woken for each event", replace(ONE, listener=True)),
    Effect("agent stopped", replace(ONE, agent=False)),
    Effect("rcu_expedited off", replace(ONE, settings={"/sys/kernel/rcu_expedited": "0"})),
    Effect("sooner RCU", replace(ONE, settings=SOONER_RCU)),
    Effect("sooner RCU, 2 CPUs", replace(TWO_CPUS, settings=SOONER_RCU), TWO_CPUS),
    Effect("sooner RCU, 4 controllers", replace(ONE, controllers=FOUR, settings=SOONER_RCU),
           replace(ONE, controllers=FOUR)),
    Effect("unbound first", replace(ONE, unbind=True)),
    Effect("unbound first, 4 controllers", replace(ONE, controllers=FOUR, unbind=True),
           replace(ONE, unbind=True)),
    Effect("unbound first, 64 threads", replace(ONE, threads=64, unbind=True),
           replace(ONE, unbind=True)),
    Effect("deleted one by one", replace(ONE, threads=1)),
    Effect("deleted one by one, 2 CPUs", replace(TWO_CPUS, threads=1), TWO_CPUS),
)  # fmt: skip

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("nothing to do", ("native_safe_halt",)),
    ("uevents", ("kobject_uevent_env",)),
    ("VPD pages", ("scsi_attach_vpd", "scsi_get_vpd_page", "scsi_get_vpd_size")),
    ("partition table", ("disk_scan_partitions",)),
    ("sd asks the disk", ("sd_revalidate_disk",)),
    ("block device", ("device_add_disk",)),
    ("SCSI device in sysfs", ("scsi_sysfs_add_sdev",)),
    ("scan after missed events", ("scsi_scan_host", "virtscsi_rescan_hotunplug")),
    ("scan for one event", ("scsi_add_device", "virtscsi_handle_event")),
    ("last write-back (sd)", ("sd_shutdown",)),
    ("block device goes", ("del_gendisk",)),
    ("SCSI device goes", ("__scsi_remove_device", "sdev_store_delete")),
    ("devtmpfs", ("devtmpfsd",)),
    ("RCU", ("rcu_gp_kthread", "rcu_core", "wait_rcu_exp_gp", "synchronize_rcu")),
    ("programs, and what they call", ("user",)),
)
"""What the kernel may be at, and the functions that say so (Linux 6.1); the first counts."""
PROFILES = 3

Samples = dict[str, list[tuple[Spent, Spent]]]
PHASES = ("until the guest has all", "until the guest has let all go")


class Bench:
    """The VMs, by the number of their processors."""

    def __init__(self, vms: dict[int, ProbeVM], disks: int) -> None:
        self._vms = vms
        self._disks = disks

    async def samples(self, effect: Effect, runs: int) -> Samples:
        samples: Samples = {"off": [], "on": []}

        async def kept(side: str) -> float:
            way: Way = getattr(effect, side)
            spent = await self._vms[way.cpus].plug_and_let_go(way, self._disks)
            samples[side].append(spent)
            return spent[0].seconds

        await in_turn(runs, off=partial(kept, "off"), on=partial(kept, "on"))
        return samples

    async def profile(self, report: Report) -> None:
        rounds = [await self._vms[1].shares(ONE, self._disks, PARTS) for _ in range(PROFILES)]
        for phase, title in enumerate(PHASES):
            table = report.table(f"processor's time, {title}", "at", "share")
            counts: collections.Counter[str] = collections.Counter()
            for shares in rounds:
                counts.update(shares[phase])
            for name, count in counts.most_common():
                if count:
                    table.rows.append((name or "all else", count / counts.total()))

    async def commands(self, way: Way) -> tuple[list[str], list[str]]:
        return await self._vms[way.cpus].commands(way, self._disks)


async def measure(chosen: argparse.Namespace) -> Report:
    effects = [effect for effect in EFFECTS if chosen.only is None or effect.name in chosen.only]
    report = Report()
    columns = ("off ms", "on ms", "ratio", "CPU ratio", "commands off", "on")
    titles = [f"{chosen.disks} disks at once, {phase}" for phase in PHASES]
    tables = [report.table(title, "effect", *columns) for title in titles]
    async with contextlib.AsyncExitStack() as stack:
        cpus = {way.cpus for effect in effects for way in (effect.off, effect.on)} | {1}
        vms = {n: await stack.enter_async_context(ProbeVM.start(n)) for n in cpus}
        bench = Bench(vms, chosen.disks)
        commands = await bench.commands(ONE)
        await bench.profile(report)
        for effect in effects:
            samples = await bench.samples(effect, chosen.runs)
            counts = [await bench.commands(way) for way in (effect.off, effect.on)]
            for phase, table in enumerate(tables):
                a_disk = [len(count[phase]) / chosen.disks for count in counts]
                table.rows.append((effect.name, *_figures(samples, phase), *a_disk))
    for phase, noted in zip(PHASES, commands, strict=True):
        _count(report, f"SCSI commands, {phase}", noted, chosen.disks)
    return report


def _figures(samples: Samples, phase: int) -> Sequence[float]:
    """Milliseconds off and on, and the ratios on to off, of time and of the processors' time."""
    off, on = ([spent[phase] for spent in samples[side]] for side in ("off", "on"))
    pairs = list(zip(off, on, strict=True))
    return (
        1e3 * statistics.median(spent.seconds for spent in off),
        1e3 * statistics.median(spent.seconds for spent in on),
        statistics.median(after.seconds / before.seconds for before, after in pairs),
        statistics.median(after.cpu / before.cpu for before, after in pairs),
    )


def _count(report: Report, title: str, noted: Sequence[str], disks: int) -> None:
    counts = collections.Counter(map(_command, noted))
    table = report.table(title, "command", "count", "a disk", "share")
    for name, count in counts.most_common():
        table.rows.append((name, count, count / disks, count / len(noted)))


def _command(noted: str) -> str:
    """What a line of the kernel's trace is about, in the words of the standard."""
    found = re.search(r" id=(\d+) .*cmnd=\((\w+) .*raw=([0-9a-f ]+)\)", noted)
    if found is None:
        raise ValueError(f"not a trace of a command: {noted}")
    name, raw = found[2], bytes.fromhex(found[3])
    if name == "INQUIRY":
        name += f", VPD page {raw[2]:02x}" if raw[1] & 1 else ""
        return name if found[1] == "0" else f"{name}, to targets without disks"
    if name.startswith("MODE_SENSE"):
        return f"{name}, page {raw[2] & 0x3F:02x}"
    return {"SERVICE_ACTION_IN_16": "READ_CAPACITY_16"}.get(name, name)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--disks", type=int, default=64, help="how many at once")
    parser.add_argument("--runs", type=int, default=7, help="of each pair")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these effects")
    run(__doc__ or "", measure, parser)


if __name__ == "__main__":
    main()
