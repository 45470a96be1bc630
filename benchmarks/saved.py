"""What benchmarks found, and on what machine: results/NAME.json, which are committed.

Whatever quotes a figure takes it from there: the tables of docs/performance.md, its pictures,
and the guard that compares ratios.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import struct
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reporting import Report, Table, Target

from hotlun.vm.process import QEMU

BENCHMARKS = (
    "manager", "attach", "versus_libvirt", "bridge", "scale", "start", "guest", "probe",
)  # fmt: skip
"""All that there are, in the order in which they are run and spoken of."""

ROW = re.compile(r'\[\n((?: *(?:"[^\n]*"|[^\n"\[\]{}]+),?\n)+) *\]')
"""A list of nothing but strings and numbers, as json indents it."""

RESULTS = Path(__file__).parent / "results"


@dataclass
class Result:
    """A report, and what it was measured on.

    Args:
        machine: facts by name; the date is one, too. Empty if nobody has asked for them.
    """

    report: Report
    machine: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """What a benchmark prints with `--json`, or what was saved of it.

        Raises:
            ValueError: a ratio is none, so that nothing could be compared with it.
        """
        found: dict[str, Any] = json.loads(text)
        report = Report(
            [Table(**table) for table in found["tables"]],
            [Target(**target) for target in found["targets"]],
            found["ratios"],
        )
        for name, ratio in report.ratios.items():
            if not 0 < ratio < math.inf:
                raise ValueError(f"{name}: {ratio} is no ratio")
        return cls(report, {"python": found["python"], **found.get("machine", {})})

    def to_json(self) -> str:
        machine = {name: fact for name, fact in self.machine.items() if name != "python"}
        found = {"python": self.machine["python"], "machine": machine, **asdict(self.report)}
        lines = json.dumps(found, indent=1, ensure_ascii=False)
        return ROW.sub(_in_a_line, lines) + "\n"

    def measured_on(self) -> str:
        """The machine in a line."""
        others = dict(self.machine)
        date, cpus, python = (others.pop(name, "") for name in ("date", "cpus", "python"))
        software = [f"{name} {version}" for name, version in others.items()]
        return ", ".join([f"{date} on {cpus} CPUs", f"Python {python}", *software])


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"{name}.json"


def load(name: str, folder: Path = RESULTS) -> Result | None:
    """What was saved of a benchmark; None if nothing was."""
    path = path_of(name, folder)
    return Result.from_json(path.read_text()) if path.exists() else None


def machine_facts(kernel: str, accelerator: str) -> dict[str, str | int]:
    """What figures depend on, by name.

    Args:
        kernel: path of the guest's.
        accelerator: QEMU's.
    """
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    version, _, _ = said.removeprefix("QEMU emulator version ").partition(" ")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "Linux": kernel_number(f"{platform.release()} {platform.version()}"),
        "QEMU": f"{version.strip()} ({accelerator})",
        "Linux in the guest": kernel_number(kernel_version(kernel)),
    }


def kernel_version(path: str) -> str:
    """The version of a bzImage, as the kernel's Documentation/arch/x86/boot.rst has it."""
    data = Path(path).read_bytes()
    (offset,) = struct.unpack_from("<H", data, 0x20E)
    return data[offset + 0x200 :].split(b"\0", 1)[0].decode()


def kernel_number(version: str) -> str:
    """Without what its builders call it; Debian's have that of their interface first."""
    found = re.search(r"Debian ([\d.]+)", version) or re.match(r"([\d.]+)", version)
    return found[1] if found else version


def _in_a_line(row: re.Match[str]) -> str:
    cells = " ".join(line.strip() for line in row[1].splitlines())
    return f"[{cells}]"
