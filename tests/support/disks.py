"""Disk images, made without root and without mounting anything here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MIB = 1 << 20
FIRST_PARTITION = 1 * MIB
PARTITION = 8 * MIB
NOTE = "note"
"""The file that an image is told apart by."""


def blank(path: Path, size: int = 32 * MIB) -> Path:
    """A raw image of zeros, sparse."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def ext4(path: Path, note: str = "", size: int = 16 * MIB) -> Path:
    """A raw image with an ext4, and in it a file `note`."""
    blank(path, size)
    _make_ext4(path, note, "")
    return path


def xfs(path: Path) -> Path:
    """A raw image with an xfs, which is made no smaller than this."""
    blank(path, 320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-f", "-K", path], check=True)
    return path


def partitioned(path: Path, label: str, notes: Mapping[int, str]) -> Path:
    """A raw image with partitions 1, 2... of 8 MiB, those in `notes` with an ext4 and a note.

    Args:
        label: the table's type, `"gpt"` or `"dos"`.
    """
    count = max(notes)
    blank(path, FIRST_PARTITION + (count + 1) * PARTITION)
    script = "\n".join([f"label: {label}", *([f",{PARTITION // MIB}MiB"] * count)])
    subprocess.run(["sfdisk", "--quiet", path], input=script, text=True, check=True)
    for number, note in notes.items():
        offset = FIRST_PARTITION + (number - 1) * PARTITION
        _make_ext4(path, note, f"{PARTITION // MIB}M", "-E", f"offset={offset}")
    return path


def image(path: Path, format: str, *options: str, size: str = "32M") -> Path:  # noqa: A002 - the word of the API
    """An empty image, made by qemu-img in its own name for the format."""
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", format]
    for option in options:
        command += ["-o", option]
    subprocess.run([*command, path, size], check=True)
    return path


def converted(source: Path, path: Path, format: str) -> Path:  # noqa: A002 - the word of the API
    """A raw image in another format."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, source, path], check=True)
    return path


def check(path: Path, format: str) -> None:  # noqa: A002 - the word of the API
    """Have qemu-img look for damage, in the formats where it can."""
    verb = "check" if format in ("qcow2", "vhdx") else "info"
    subprocess.run(["qemu-img", verb, "-f", format, path], check=True, capture_output=True)


def never_unmounted(path: Path) -> Path:
    """Have an ext4 say that its journal is still to be replayed."""
    script = "set_super_value state 0\nfeature needs_recovery\n"
    command: list[str | Path] = ["debugfs", "-w", "-f", "-", path]
    subprocess.run(command, input=script, text=True, check=True, capture_output=True)
    return path


def ext4_file(path: Path, name: str) -> str:
    """A file in an image with an ext4, which must be clean."""
    subprocess.run(["e2fsck", "-f", "-n", path], check=True, capture_output=True)
    command: list[str | Path] = ["debugfs", "-R", f"cat {name}", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def digest(path: Path) -> str:
    """A hash of all its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """A block device of this host whose sectors are the file's (needs root)."""
    command: list[str | Path] = ["losetup", "--find", "--show", *options, path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def nbd_server(path: Path, socket: Path, export: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real qemu-nbd that serves a raw image on a unix socket, as often as it is asked."""
    with subprocess.Popen(
        [
            *("qemu-nbd", "--format", "raw", "--persistent", "--shared", "4"),
            *("--export-name", export, "--socket", socket, "--pid-file", f"{socket}.pid", path),
        ]
    ) as process:
        try:
            # Its pid file is what it writes when it listens.
            while not Path(f"{socket}.pid").exists():
                assert process.poll() is None, "qemu-nbd has ended"
                os.sched_yield()
            yield process
        finally:
            process.terminate()


def _make_ext4(path: Path, note: str, size: str, *options: str) -> None:
    with tempfile.TemporaryDirectory() as files:
        Path(files, NOTE).write_text(note)
        subprocess.run(
            [
                "mke2fs",
                "-q",
                "-F",
                "-t",
                "ext4",
                "-d",
                files,
                *options,
                path,
                *([size] * bool(size)),
            ],
            check=True,
            # It warns that an offset is not the beginning of the device.
            stderr=subprocess.DEVNULL if options else None,
        )
