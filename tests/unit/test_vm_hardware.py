"""The guest's first files and QEMU's command line: pure, so tested without a VM."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from hotlun.vm.hardware import (
    SOCKETS,
    Accelerator,
    Hardware,
    Wiring,
    device_arguments,
    snapshot_arguments,
)
from hotlun.vm.initramfs import Archive

if TYPE_CHECKING:
    from pathlib import Path


def devices(hardware: Hardware, root: str = "/root.erofs") -> list[str]:
    """The device part of the command line."""
    return device_arguments(hardware, Wiring(dict.fromkeys(SOCKETS, 3), "/console.log", root))


def test_controllers_ascend_on_the_pci_bus() -> None:
    """Our order is PCI order: that is how the agent finds a controller."""
    words = [word for word in devices(Hardware(controllers=3)) if "virtio-scsi" in word]
    assert words == [
        "virtio-scsi-pci,id=scsi0,addr=0x10,ioeventfd=off",
        "virtio-scsi-pci,id=scsi1,addr=0x11,ioeventfd=off",
        "virtio-scsi-pci,id=scsi2,addr=0x12,ioeventfd=off",
    ]


def test_a_comma_in_a_path_stays_in_the_path() -> None:
    """QEMU's option parser wants it doubled; a path cannot add options."""
    (word,) = [word for word in devices(Hardware(), "/a,b/root") if "root-file,filename" in word]
    assert "filename=/a,,b/root,read-only=on" in word


def test_whoever_runs_qemu_shares_the_snapshot() -> None:
    """A user and extra arguments are one VM's own; devices, memory, processors are not."""
    plain = snapshot_arguments(Hardware(), Accelerator.TCG)
    assert snapshot_arguments(Hardware(user="root"), Accelerator.TCG) == plain
    for other in (Hardware(controllers=3), Hardware(memory_mib=300), Hardware(cpus=2)):
        assert snapshot_arguments(other, Accelerator.TCG) != plain
    assert snapshot_arguments(Hardware(), Accelerator.KVM) != plain


def test_archives_are_what_cpio_reads(tmp_path: Path) -> None:
    """Directories, files and modes arrive; whatever their length, so does the next one."""
    archive = Archive()
    archive.directory("d")
    for size in range(5):
        archive.file(f"d/{'n' * (size + 1)}", b"x" * size, executable=size == 4)
    subprocess.run(
        ["cpio", "--extract", "--quiet"], input=archive.finished(), cwd=tmp_path, check=True
    )
    for size in range(5):
        assert (tmp_path / "d" / ("n" * (size + 1))).read_bytes() == b"x" * size
    assert (tmp_path / "d/nnnnn").stat().st_mode & 0o111
    assert not (tmp_path / "d/n").stat().st_mode & 0o111


def test_an_archive_can_be_followed_by_another() -> None:
    """Archives are padded, and finishing one does not end it."""
    archive = Archive()
    archive.file("a", b"1")
    once = archive.finished()
    assert archive.finished() == once
    assert len(once) % 512 == 0
