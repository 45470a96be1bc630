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

LINK = MountConfig(block_device=True)
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
    ],
    ids=["mapping", "swap", "loop device", "mount elsewhere"],
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
