#!/usr/bin/env python3
"""Proves on a real Windows, in a minute, what hotlun does there - or shows what it does not.

    py scripts\\windows-smoke.py                     what there is, and what it says of itself
    py scripts\\windows-smoke.py --vm ID             the same, and a disk attached and detached

In a terminal of an administrator, with Python 3.11 or newer and hotlun installed (or from its
checkout). The VM has to run already. WSL 2 has one: start it, and give `--controllers 0`, as its
controllers are named by number. A small VHD is made for it in the temporary folder, attached at
a free slot (`--slot`), and taken away again; nothing is mounted, and nothing else is touched.

Prints one line a step, and at the end a report in JSON to send along with an issue.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import platform
import struct
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

with suppress(IndexError):  # a checkout serves as well as an installation
    sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from hotlun.backends.hcs import HCSHostBackend
from hotlun.errors import HotlunError, SlotTakenError
from hotlun.hcs import CONTROLLERS, enumerate_systems, open_system
from hotlun.hcs.computecore import ComputeCore
from hotlun.model import Attachment, Disk, DiskKind, Slot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hotlun.hcs import System

SIZE = 240 * 4 * 17 * 512
"""Bytes of the disk: cylinders, heads, sectors and their size, as a VHD says its size twice."""


class Report:
    """What was tried, and how it went."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    async def step(self, what: str, work: Callable[[], Awaitable[object]]) -> object:
        """Do something, and say how that went."""
        began = time.perf_counter()
        try:
            found: object = await work()
            entry = {"step": what, "ok": True, "found": found}
        except (HotlunError, OSError, ValueError) as error:
            found = None
            code = getattr(error, "code", None)
            entry = {
                "step": what,
                "ok": False,
                "error": f"{type(error).__name__}: {error}",
                "code": f"0x{code:08X}" if isinstance(code, int) else code,
            }
        entry["ms"] = round(1000 * (time.perf_counter() - began), 1)
        self.steps.append(entry)
        outcome = "ok  " if entry["ok"] else "FAIL"
        print(f"{outcome} {entry['ms']:8.1f} ms  {what}: {entry.get('error', entry.get('found'))}")
        return found

    @property
    def is_good(self) -> bool:
        """Whether everything went as it should."""
        return all(step["ok"] for step in self.steps)


async def look_around(report: Report, core: ComputeCore) -> None:
    """Nothing is changed."""

    async def systems() -> list[dict[str, str]]:
        found = await enumerate_systems(kind="", core=core)
        return [
            {"id": one.id, "kind": one.kind, "owner": one.owner, "state": one.state}
            for one in found
        ]

    await report.step("list the compute systems", systems)


async def try_disk(report: Report, system: System, arguments: argparse.Namespace) -> None:
    """Attach a disk, see what the service says of it, and take it away again."""
    host = HCSHostBackend(system, controllers=arguments.controllers)
    controller, lun = arguments.slot.split(":")
    slot = Slot(int(controller), int(lun))

    async def told() -> object:
        found = await host.occupied()
        return sorted(map(str, found)) or "the service tells of no disks"

    for name in ("{}", '{"PropertyTypes":["GuestConnection"]}'):
        await report.step(f"ask for {name}", lambda name=name: system.properties(json.loads(name)))
    await report.step("ask which slots are taken", told)
    with tempfile.TemporaryDirectory(prefix="hotlun-smoke-") as folder:
        disk, other = (
            Disk(str(fixed_vhd(Path(folder, name))), DiskKind.VIRTUAL_DISK)
            for name in ("one.vhd", "other.vhd")
        )
        attachment = Attachment(slot, disk, "smoke1")
        late = Attachment(slot, other, "smoke2")

        async def taken() -> str:
            try:
                await host.attach(late)
            except SlotTakenError as error:
                return f"refused, as it should be: 0x{error.code:08X}"
            await host.detach(late)
            raise ValueError("two disks went into one slot")

        async def survey() -> object:
            found = await host.survey([attachment])
            return "the service does not say" if found is None else found["smoke1"]

        for one in (disk, other):
            await report.step(
                f"let the VM open {one}", lambda one=one: host.grant_access(one, arguments.vm)
            )
        await report.step(f"attach it at {slot}", lambda: host.attach(attachment))
        await report.step("ask whether it is there", survey)
        await report.step("attach another one there", taken)
        await report.step("detach it", lambda: host.detach(attachment))
        again = Attachment(slot, disk, "smoke3")  # of which the backend knows nothing
        await report.step("detach what is not there", lambda: host.detach(again))
        for one in (disk, other):
            await report.step(
                f"take {one} away from the VM",
                lambda one=one: host.revoke_access(one, arguments.vm),
            )


def fixed_vhd(path: Path) -> Path:
    """An empty fixed VHD: its bytes, and the footer of the VHD specification behind them."""
    geometry = struct.pack(">HBB", SIZE // 512 // 4 // 17, 4, 17)
    footer = struct.pack(
        ">8sIIQI4sI4sQQ4sII16sB427x",
        b"conectix",
        2,
        0x00010000,
        0xFFFFFFFFFFFFFFFF,
        0,
        b"hlun",
        0x00010000,
        b"Wi2k",
        SIZE,
        SIZE,
        geometry,
        2,  # fixed
        0,  # the checksum, which is over the footer without it
        uuid.uuid4().bytes,
        0,
    )
    checksum = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(SIZE)
        file.write(footer[:64] + checksum + footer[68:])
    return path


def load(library: str | None) -> ComputeCore:
    """The service's library: Windows' own, or one with the same functions."""
    if library is None:
        return ComputeCore.load()
    core = ctypes.CDLL(library)
    return ComputeCore(core, core)


async def run(arguments: argparse.Namespace) -> Report:
    """All steps; the first that fails for good is the last."""
    report = Report()
    report.steps.append(
        {
            "step": "versions",
            "ok": True,
            "found": {"python": sys.version, "system": platform.platform(), "os": os.name},
        }
    )
    try:
        core = load(arguments.library)
        await look_around(report, core)
        if arguments.vm is not None:
            async with open_system(arguments.vm, timeout=arguments.timeout, core=core) as system:
                await try_disk(report, system, arguments)
    except HotlunError as error:
        report.steps.append({"step": "begin", "ok": False, "error": str(error)})
        print(f"FAIL {error}")
    return report


def main() -> int:
    """Run it; 0 if everything went as it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vm", metavar="ID", help="a running VM, by its id in the list")
    parser.add_argument(
        "--slot", default="0:63", help="where to attach the disk, CONTROLLER:LUN (default: 0:63)"
    )
    parser.add_argument(
        "--controllers",
        nargs="+",
        default=list(CONTROLLERS),
        metavar="NAME",
        help="the VM's SCSI controllers, as its document names them (default: hotlun's GUIDs)",
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each call")
    parser.add_argument("--library", metavar="PATH", help="use this instead of computecore.dll")
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments))
    print(json.dumps(report.steps, indent=2, default=str))
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
