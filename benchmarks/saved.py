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
import shutil
import struct
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import Report, Table, Target

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"

    def measured_on(self) -> str:
        """The machine in a line."""
        facts = dict(self.machine)
        date = facts.pop("date", "")
        return ", ".join(filter(None, [f"{date}", *(f"{k} {v}" for k, v in facts.items())]))


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"{name}.json"


def load(name: str, folder: Path = RESULTS) -> Result | None:
    """What was saved of a benchmark; None if nothing was."""
    path = path_of(name, folder)
    return Result.from_json(path.read_text()) if path.exists() else None


def names(folder: Path = RESULTS) -> Iterable[str]:
    """The benchmarks that something was saved of."""
    return sorted(path.stem for path in folder.glob("*.json"))


def machine_facts(kernel: str, accelerator: str) -> dict[str, str | int]:
    """What figures depend on, by name.

    Args:
        kernel: path of the guest's.
        accelerator: QEMU's.
    """
    facts: dict[str, str | int] = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "Linux": _number(platform.release()),
        "QEMU": _qemu_version(),
        "accelerator": accelerator,
        "guest's Linux": _number(kernel_version(kernel)),
    }
    return {name: fact for name, fact in facts.items() if fact}


def kernel_version(path: str) -> str:
    """The version of a bzImage, as the kernel's Documentation/arch/x86/boot.rst has it."""
    data = Path(path).read_bytes()
    (offset,) = struct.unpack_from("<H", data, 0x20E)
    return data[offset + 0x200 :].split(b"\0", 1)[0].decode()


def _qemu_version() -> str:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return ""
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return _number(said)


def _number(version: str) -> str:
    """The number in it: what stands around it names builds of somebody's."""
    found = re.search(r"\d+(\.\d+)+", version)
    return found[0] if found else ""
