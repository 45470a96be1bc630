"""Every Python example in the documentation runs, on a real VM where it needs one."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest
from support import disks
from support.computecore import RUNTIME_ID, build

from hotlun.vm import Machine

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    f"{page.relative_to(ROOT)}-{number}": source
    for page in PAGES
    for number, source in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}
EXPECTED = {
    "docs/inside-the-guest.md-0": "kept\n\nFilesystem ",
    "README.md-0": "/run/mounts/scsi/m0",
    "docs/your-own-vm.md-0": "0:0 taken 1 ",
    "docs/reconciliation.md-0": "True /run/mounts/scsi/m0",
    "docs/reconciliation.md-1": "paused: somebody said `stop`\ngone, with 0 disks left",
    "docs/reconciliation.md-2": "0:0 lost+found",
    "docs/testing.md-0": "as scripted: the reply to mount was lost",
    "docs/windows.md-0": "0:0 /run/mounts/scsi/m0",
    "docs/windows.md-1": "frozenset({Slot(controller=0, lun=0)})",
    "docs/windows.md-2": "0:0 in linux",
}


A_COMPUTE_SERVICE = f"""
import ctypes
from hotlun.hcs.computecore import ComputeCore
library = ctypes.CDLL({build().core!r})
library.fake_system(b"my-vm", b"{RUNTIME_ID}", b"Linux")
ComputeCore.load = classmethod(lambda cls: cls(library, library))
"""
"""What a program begins with that believes itself on Windows."""


def test_every_example_is_expected() -> None:
    """An example without a word that it must print proves little."""
    assert EXAMPLES.keys() == EXPECTED.keys()


def test_the_first_example_has_ten_lines() -> None:
    """As its heading says, blank ones left out."""
    lines = [line for line in EXAMPLES["README.md-0"].splitlines() if line.strip()]
    assert len(lines) <= 10


@pytest.mark.parametrize("name", sorted(EXAMPLES))
async def test_an_example_runs(name: str, tmp_path: Path) -> None:
    """As it stands, but for the sockets and the Windows that the reader already has."""
    source = EXAMPLES[name]
    if "open_system" in source:
        source = A_COMPUTE_SERVICE + source.replace(
            'listen_hyperv(info.runtime_id, "linux")', 'connect_unix("/run/vm/agent.sock")'
        )
    for image in ("disk.img", "scratch.img"):
        disks.blank(tmp_path / image, 340 * disks.MIB)
    if "/run/vm/" not in source:
        assert EXPECTED[name] in await run(source, tmp_path)
        return
    async with Machine.start(controllers=2, connect=False) as machine:
        source = source.replace("/run/vm/qmp.sock", str(machine.qmp_socket))
        source = source.replace("/run/vm/agent.sock", str(machine.agent_socket))
        assert EXPECTED[name] in await run(source, tmp_path)


async def run(source: str, directory: Path) -> str:
    """Run a program in a directory; what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        source,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert not err, err.decode()
    return out.decode()
