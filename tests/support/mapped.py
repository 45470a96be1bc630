"""Mapped devices in a guest, as the tests look at them: read block by block, checked, used hard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.guest_shell import shell

if TYPE_CHECKING:
    from hotlun.vm import Machine

_READ_METADATA = r"""
import mmap, os, re, subprocess, sys

device, filesystem = sys.argv[1:]

def said(*command):
    return subprocess.run(command, check=True, stdout=-1, stderr=-3, text=True).stdout

def ext4():
    text = said("dumpe2fs", device)
    size = int(re.search(r"Block size: +(\d+)", text)[1])
    places = re.findall(r"(?:superblock|descriptors|bitmap|table) at (\d+)(?:-(\d+))?", text)
    journal = said("debugfs", "-R", "stat <8>", device)
    places += re.findall(r"\([\d-]+\):(\d+)(?:-(\d+))?", journal)
    for first, last in places:
        yield int(first) * size, (int(last or first) - int(first) + 1) * size

def xfs():
    names = "blocksize", "agblocks", "agcount", "agblklog", "logstart", "logblocks", "dblocks"
    text = said("xfs_db", "-r", "-c", "sb 0", "-c", "print " + " ".join(names), device)
    block, group, groups, shift, log, log_blocks, blocks = map(int, re.findall(r"= (\d+)", text))
    for number in range(groups):
        yield number * group * block, min(128 << 10, (blocks - number * group) * block)
    yield ((log >> shift) * group + (log & (1 << shift) - 1)) * block, log_blocks * block

def btrfs():
    yield 64 << 10, 4 << 10
    if os.lseek(disk, 0, os.SEEK_END) >= 65 << 20:
        yield 64 << 20, 4 << 10

disk = os.open(device, os.O_RDONLY | os.O_DIRECT)
failed = blocks = 0
with mmap.mmap(-1, 1 << 20) as buffer:
    for start, length in {"ext4": ext4, "xfs": xfs, "btrfs": btrfs}[filesystem]():
        for offset in range(start, start + length, len(buffer)):
            size = min(len(buffer), start + length - offset)
            try:
                assert os.preadv(disk, [memoryview(buffer)[:size]], offset) == size
            except OSError as error:
                print("at", offset, error)
                failed += 1
            blocks += size // 4096
print("read", blocks)
sys.exit(failed > 0)
"""
"""All metadata that stands at a fixed place: superblocks and their copies, group descriptors,
bitmaps, inode tables, heads of allocation groups, journals. fsck reads the rest."""

_CHECKS = {
    "ext4": "e2fsck -f -n {device}",
    "xfs": "xfs_repair -n {device}",
    "btrfs": "btrfs check --readonly {device}",
}


async def check(vm: Machine, device: str, filesystem: str) -> None:
    """Have all that can look at an unmounted device look, with nothing of it in memory.

    Without readahead, which goes beyond what is asked for and so beyond what is written;
    that is no harm, but the kernel says so, and here every word of it is to count.
    """
    fsck = _CHECKS[filesystem].format(device=device)
    await shell(
        vm,
        f"""
        echo 3 > /proc/sys/vm/drop_caches
        blkid -p {device}
        blockdev --setra 0 {device}
        {fsck} 2>&1
        """,
    )


async def read_metadata(vm: Machine, device: str, filesystem: str) -> int:
    """Read its metadata from the disk itself; how many blocks of 4 KiB there were."""
    command = f"python3 -IS - {device} {filesystem} <<'END'\n{_READ_METADATA}END"
    return int((await shell(vm, command)).rpartition(" ")[2])


async def use_hard(vm: Machine, path: str, mebibytes: int) -> None:
    """Fill that much twice, with small files and a big one, and read it all from the disk."""
    script = f"""
        head -c {mebibytes}M /dev/urandom > /tmp/data
        cd {path}
        mkdir small
        split -b 8K -a 4 /tmp/data small/
        cp /tmp/data big
        rm small/*a
        md5sum big small/* > /tmp/sums
        sync
        echo 3 > /proc/sys/vm/drop_caches
        md5sum --quiet -c /tmp/sums
        rm /tmp/data /tmp/sums
    """
    await shell(vm, script)


async def integrity_errors(vm: Machine) -> str:
    """What the kernel said of blocks that it could not read, since it was asked last."""
    return await shell(vm, "dmesg -c | grep -iE 'AEAD|integrity|I/O error|corrupt' || :")
