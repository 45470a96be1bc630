"""Real disks for the demo: image files by qemu-img and sfdisk, and an export by qemu-nbd."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotlun.errors import HotlunError, UnsupportedError
from hotlun.vm.process import Process, Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_MIB = 1 << 20
_PACKAGES = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils", "sfdisk": "fdisk"}
_TWO_PARTITIONS = b"label: gpt\nsize=48MiB\nsize=+\n"


@dataclass(frozen=True)
class DemoDisks:
    """Paths of image files. All are sparse: together they take a few MiB."""

    vhdx: str
    vhd: str
    qcow2: str
    partitioned: str
    raw: str
    remote: str
    secret: str

    @property
    def magic(self) -> dict[str, tuple[int, bytes]]:
        """Where each format, and a partition table, says what it is: offset and bytes."""
        return {
            self.vhdx: (0, b"vhdxfile"),
            self.vhd: (0, b"conectix"),
            self.qcow2: (0, b"QFI\xfb"),
            self.partitioned: (512, b"EFI PART"),
        }


def make_disks(directory: str) -> DemoDisks:
    """Make them all in `directory`, empty but for one partition table.

    Raises:
        UnsupportedError: a tool is missing.
        HotlunError: a tool failed.
    """
    disks = DemoDisks(
        vhdx=os.path.join(directory, "web.vhdx"),
        vhd=os.path.join(directory, "store.vhd"),
        qcow2=os.path.join(directory, "manual.qcow2"),
        partitioned=os.path.join(directory, "parts.img"),
        raw=os.path.join(directory, "scratch.raw"),
        remote=os.path.join(directory, "remote.img"),
        secret=os.path.join(directory, "secret.raw"),
    )
    _run("qemu-img", "create", "-q", "-f", "vhdx", disks.vhdx, "64M")
    # XFS wants 300 MiB at least (xfsprogs 5.19).
    _run("qemu-img", "create", "-q", "-f", "vpc", disks.vhd, "320M")
    _run("qemu-img", "create", "-q", "-f", "qcow2", disks.qcow2, "64M")
    raw = ((disks.partitioned, 96), (disks.raw, 16), (disks.remote, 64), (disks.secret, 64))
    for path, size in raw:
        with open(path, "wb") as file:
            file.truncate(size * _MIB)
    _run("sfdisk", "--quiet", disks.partitioned, stdin=_TWO_PARTITIONS)
    return disks


def bytes_at(path: str, offset: int, size: int) -> bytes:
    """What an image file has there."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def holds(path: str, words: bytes) -> bool:
    """Whether an image file has these bytes anywhere."""
    with open(path, "rb") as file:
        return words in file.read()


@dataclass(frozen=True)
class Export:
    """A disk that a server offers: its address as the Manager takes it, and the server's pid."""

    address: str
    pid: int


@asynccontextmanager
async def exported(path: str) -> AsyncIterator[Export]:
    """Serve a raw image over NBD, on a unix socket beside it, while the block lasts.

    The server ends by itself when its first client leaves, so not even a demo that
    is killed leaves it behind.
    """
    socket, pid_file = f"{path}.sock", f"{path}.pid"
    # --fork returns once the server listens.
    _run(
        "qemu-nbd", "--fork", f"--pid-file={pid_file}", f"--socket={socket}",
        "--format=raw", "--export-name=demo", path,
    )  # fmt: skip
    server = Process(int(bytes_at(pid_file, 0, 20)), Runtime(os.path.dirname(path)), None)
    try:
        yield Export(f"evd://nbd/unix:{socket}:demo", server.pid)
    finally:
        await server.end()


def _run(tool: str, *arguments: str, stdin: bytes = b"") -> None:
    """Run a tool that takes a tenth of a second; a Ctrl-C meanwhile is not its business."""
    # Users who are not root have no sbin in their PATH.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    program = shutil.which(tool, path=path)
    if program is None:
        raise UnsupportedError(f"there is no {tool}: install the package {_PACKAGES[tool]}")
    done = subprocess.run(
        [program, *arguments], input=stdin, capture_output=True, process_group=0, check=False
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise HotlunError(f"{tool} failed ({done.returncode})", detail=words)
