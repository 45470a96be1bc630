"""What is in the way of a request is named, and partitions are what the table says now."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.guest_shell import mounted_at, note_in, shell

from hotlun import BackendError, Manager, MountConfig

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = disks.MIB
EXT4_MAGIC = 1024 + 56
LINK = MountConfig(block_device=True)
CLOSES_SOON = f"""
import os, sys, time
disk = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(disk, b"x" * {MIB}, {MIB})
open("/run/written", "w")
time.sleep(1)
"""
UNSEEN = f"""
import os, socket, sys, time
disk = os.open(sys.argv[1], os.O_RDWR)
ends = socket.socketpair()
socket.send_fds(ends[0], [b" "], [disk])
os.pwrite(disk, b"x" * {MIB}, {MIB})
os.close(disk)
open("/run/written", "w")
time.sleep(1000)
"""
IN_A_NAMESPACE = """
mkdir /run/theirs
mkfs.ext4 -q $disk
there='mount $disk /run/theirs && touch /run/there && exec sleep 1000'
unshare --mount --propagation private sh -c "$there" > /dev/null 2>&1 &
until [ -e /run/there ]; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("use", "end", "words"),
    [
        (
            'dmsetup create vault --table "0 2048 linear $disk 0"',
            "dmsetup remove vault",
            r"sd\w+ is part of dm-\d+ \(vault\)",
        ),
        (
            "mkswap $disk && swapon $disk",
            "swapoff $disk",
            r"sd\w+ is used as swap",
        ),
        (
            "losetup /dev/loop7 $disk",
            "losetup --detach /dev/loop7",
            r"sd\w+ is part of loop7",
        ),
        (
            IN_A_NAMESPACE,
            "pkill -x sleep && rmdir /run/theirs && rm /run/there",
            r"sd\w+ is mounted at /run/theirs for process \d+ \(sleep\)",
        ),
        (
            "sleep 1000 3<> $disk > /dev/null 2>&1 &",
            "pkill -x sleep",
            r"process \d+ \(sleep\) has /dev/sd\w+ open",
        ),
    ],
    ids=["mapping", "swap", "loop device", "mount elsewhere", "process"],
)
async def test_a_disk_in_use_is_not_unplugged(
    shared_vm: Machine, manager: Manager, tmp_path: Path, use: str, end: str, words: str
) -> None:
    """Who uses it is named; afterwards the release goes through."""
    mount = await manager.add_virtual_disk(disks.blank(tmp_path / "disk.raw"), mount=LINK)
    node = (await shell(shared_vm, f"readlink {mount.guest_path}")).strip()
    await shell(shared_vm, f"export disk={node}; {use}")
    with pytest.raises(BackendError, match=f"in use: {words}"):
        await mount.release()
    await shell(shared_vm, f"disk={node}; {end}")
    await mount.release()


@pytest.mark.parametrize("partition", [0, 1])
@pytest.mark.parametrize("writer", [CLOSES_SOON, UNSEEN], ids=["closes soon", "unseen"])
async def test_what_was_written_to_a_link_is_on_the_disk(
    shared_vm: Machine, manager: Manager, tmp_path: Path, writer: str, partition: int
) -> None:
    """By whoever closes it while it is released, or has it open where it does not show."""
    path = disks.partitioned(tmp_path / "disk.raw", "gpt", {1: ""})
    config = MountConfig(block_device=True, partition=partition)
    mount = await manager.add_virtual_disk(path, mount=config)
    await shell(
        shared_vm,
        f"python3 -I - {mount.guest_path} > /dev/null 2>&1 <<'END' &\n{writer}END\n"
        "echo $! > /run/writer\n"
        "until [ -e /run/written ]; do sleep 0.01; done; rm /run/written",
    )
    await mount.release()
    with path.open("rb") as image:
        image.seek(MIB + (disks.FIRST_PARTITION if partition else 0))
        assert image.read(MIB) == b"x" * MIB
    await shell(shared_vm, "kill $(cat /run/writer) || true; rm /run/writer")


async def test_a_newer_table_counts_before_a_partition_is_formatted(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """What is now where the kernel knew a partition of this number is another's data."""
    path = disks.partitioned(tmp_path / "disk.raw", "gpt", {4: ""})
    link = await manager.add_virtual_disk(path, mount=MountConfig(block_device=True, partition=2))
    move_partition(path, 32 * MIB)
    config = MountConfig(partition=1, filesystem="ext4", ensure_filesystem=True)
    mount = await manager.add_virtual_disk(path, mount=config)
    await mount.release()
    await link.release()
    with path.open("rb") as image:
        image.seek(disks.FIRST_PARTITION)
        assert image.read(disks.PARTITION) == b"x" * disks.PARTITION
        image.seek(32 * MIB + EXT4_MAGIC)
        assert image.read(2) == b"\x53\xef"


async def test_a_table_that_is_newer_than_the_kernels_view(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """It is read again, logical partitions included; and not while one of them is mounted."""
    path = disks.blank(tmp_path / "disk.raw", 64 * disks.MIB)
    await manager.add_virtual_disk(path, mount=LINK)
    with pytest.raises(BackendError, match="has no partition 5; it has none"):
        await manager.add_virtual_disk(path, mount=MountConfig(partition=5))
    write_table(path, disks.ext4(tmp_path / "fs", "logical", disks.PARTITION))
    mount = await manager.add_virtual_disk(path, mount=MountConfig(partition=5))
    assert (await mounted_at(shared_vm, mount)).device.endswith("5")
    assert await note_in(shared_vm, mount) == "logical"
    in_use = r"it has (sd\w+1), .*6; .* cannot be read again now: in use, sd\w+5 is mounted at "
    with pytest.raises(BackendError, match=f"has no partition 9; {in_use}{mount.guest_path}"):
        await manager.add_virtual_disk(path, mount=MountConfig(partition=9))


def move_partition(path: Path, start: int) -> None:
    """Have another place in an image be its only partition, and another's data where it was."""
    table = f"label: gpt\nstart={start // 512}, size={disks.PARTITION // 512}"
    subprocess.run(["sfdisk", "--quiet", path], input=table, text=True, check=True)
    with path.open("r+b") as disk:
        disk.seek(disks.FIRST_PARTITION)
        disk.write(b"x" * disks.PARTITION)


def write_table(path: Path, filesystem: Path) -> None:
    """Give an image partitions 1, 2, which is extended, 5, which has the filesystem, and 6."""
    script = "label: dos\n,8MiB\n,,E\n,8MiB\n,8MiB\n"
    subprocess.run(["sfdisk", "--quiet", path], input=script, text=True, check=True)
    said = subprocess.run(["sfdisk", "--json", path], capture_output=True, check=True).stdout
    start = next(
        512 * partition["start"]
        for partition in json.loads(said)["partitiontable"]["partitions"]
        if partition["node"].endswith("5")
    )
    with path.open("r+b") as disk:
        disk.seek(start)
        disk.write(filesystem.read_bytes())
