"""What encryption knows without a kernel: sizes, places, programs' arguments, and where keys go."""

from __future__ import annotations

import os
import re
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from support.disks import MIB, blank

from hotlun.agent import encryption, keyring, luks, unwritten
from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.errors import RequestError
from hotlun.agent.settings import Key, Slot
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from pathlib import Path

KEY = Key(b"correct horse\0battery\n")


def device(path: Path) -> BlockDevice:
    """A file in place of a device."""
    return BlockDevice(Slot(0, 1), "sda", str(path), "8:0", "/sys/block/sda")


class TestCapacity:
    @pytest.mark.parametrize(
        ("disk", "encrypted"),
        [(65536, 64752), (524288, 519920), (1048576, 1040112), (8388608, 8323072)],
    )
    def test_is_what_the_kernel_says(self, disk: int, encrypted: int) -> None:
        """Sectors, as a Linux 6.1 wrote them into the header for disks of these sizes."""
        assert encryption.capacity(disk) == encrypted * 512

    @pytest.mark.parametrize("disk", [0, 1, 8, 272, 528])
    def test_of_a_disk_that_is_too_small(self, disk: int) -> None:
        """Is nothing."""
        assert encryption.capacity(disk) == 0


class TestUnwritten:
    @pytest.mark.parametrize("mebibytes", [1, 32, 127, 128, 300, 512, 4096, 10000])
    @pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
    def test_what_is_written_lies_in_the_device(self, filesystem: str, mebibytes: int) -> None:
        """And is a small part of it."""
        size = mebibytes * MIB - 4096
        ranges = unwritten._zeros(filesystem, size)
        assert all(start >= 0 and length > 0 and start + length <= size for start, length in ranges)
        assert sum(length for _, length in ranges) <= 4 * MIB
        assert ranges[0][0] == 0
        assert max(start + length for start, length in ranges) == size

    @pytest.mark.parametrize("mebibytes", [32, 127, 128, 129, 132, 257, 512, 4064, 4096, 40000])
    def test_ext4s_superblocks_are_where_mke2fs_lists_them(
        self, tmp_path: Path, mebibytes: int
    ) -> None:
        """`mke2fs -n` prints the blocks; each is written."""
        path = blank(tmp_path / "disk.raw", mebibytes * MIB)
        arguments = unwritten._maker_arguments("ext4", mebibytes * MIB)
        done = subprocess.run(
            ["mke2fs", "-n", "-F", "-t", "ext4", *arguments, path],
            check=True,
            capture_output=True,
            text=True,
        )
        _, _, listed = done.stdout.partition("Superblock backups stored on blocks:")
        copies = {int(block) * 4096 for block in re.findall(r"\d+", listed)}
        written = {start for start, _ in unwritten._zeros("ext4", mebibytes * MIB)}
        assert copies <= written
        assert bool(copies) == (mebibytes > 130)  # a group needs room for its own tables

    @pytest.mark.parametrize("mebibytes", [32, 300, 1500])
    def test_ext4s_empty_bitmaps_are_found(self, tmp_path: Path, mebibytes: int) -> None:
        """Those that dumpe2fs says were not written, and no others."""
        path = blank(tmp_path / "disk.raw", mebibytes * MIB)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", path], check=True)
        command: list[str | Path] = ["dumpe2fs", path]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        expected = []
        for group in re.split(r"^Group ", listed, flags=re.MULTILINE)[1:]:
            for word, place in (("BLOCK", "Block"), ("INODE", "Inode")):
                found = re.search(rf"{place} bitmap at (\d+)", group)
                if f"{word}_UNINIT" in group and found:
                    expected.append(int(found[1]))
        with path.open("rb") as file:
            assert sorted(unwritten._unused_bitmaps(file.fileno())) == sorted(expected)

    @pytest.mark.parametrize("mebibytes", [330, 1000, 4064])
    def test_xfss_groups_are_where_they_were_said_to_be(
        self, tmp_path: Path, mebibytes: int
    ) -> None:
        """The maker takes the size that we give it, so that we know where groups begin."""
        path = blank(tmp_path / "disk.raw", mebibytes * MIB - 4096)
        size = path.stat().st_size
        arguments = unwritten._maker_arguments("xfs", size)
        subprocess.run(["mkfs.xfs", "-q", "-f", *arguments, path], check=True, capture_output=True)
        starts = [start for start, length in unwritten._zeros("xfs", size) if length == 128 << 10]
        with path.open("rb") as file:
            assert len(starts) == 3
            for start in starts:
                file.seek(start)
                assert file.read(4) == b"XFSB"

    def test_an_older_mkfs_xfs_is_asked_in_its_own_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before xfsprogs 5.19 a small log needed no option, and had none."""
        program, said = tmp_path / "mkfs.xfs", tmp_path / "said"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {said}\ncase "$*" in *--unsupported*)\n'
            "echo \"mkfs.xfs: unrecognized option '--unsupported'\" >&2; exit 2;; esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        unwritten.make(device(blank(tmp_path / "d", 400 * MIB)), "xfs")
        first, second = said.read_text().splitlines()
        assert first.replace("--unsupported ", "") == second


class TestKeyring:
    def test_an_unknown_machine_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before anything random is drawn."""
        monkeypatch.setattr("os.uname", lambda: SimpleNamespace(machine="vax"))
        with (
            pytest.raises(RequestError, match="vax"),
            keyring.random_key(32, "test"),
        ):
            pass


class TestLUKS:
    """Against a cryptsetup that notes what it is given."""

    @pytest.fixture
    def notes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        notes = tmp_path / "notes"
        notes.mkdir()
        program = tmp_path / "bin/cryptsetup"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\ncat > {notes}/input\necho "$@" >> {notes}/arguments\n'
            f"env > {notes}/environment\nread status < {notes}/status && exit $status\n"
        )
        program.chmod(0o755)
        (notes / "status").write_text("0\n")
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return notes

    def test_the_key_goes_to_the_standard_input_alone(self, tmp_path: Path, notes: Path) -> None:
        """Whole, whatever bytes it has; not into the arguments, not into the environment."""
        luks._cryptsetup(device(tmp_path / "d"), KEY, *luks._FORMAT, "/dev/sda")
        assert (notes / "input").read_bytes() == KEY.value
        assert "horse" not in (notes / "arguments").read_text()
        assert "horse" not in (notes / "environment").read_text()
        assert (notes / "arguments").read_text().startswith("luksFormat ")

    def test_a_wrong_key_has_a_code_of_its_own(self, tmp_path: Path, notes: Path) -> None:
        """Other failures of cryptsetup have not."""
        for status, code in (("2", HResult.WRONG_KEY), ("4", HResult.FAIL)):
            (notes / "status").write_text(f"{status}\n")
            with pytest.raises(RequestError) as caught:
                luks.check_key(device(tmp_path / "d"), KEY)
            assert caught.value.code == code
            assert "horse" not in str(caught.value)

    @pytest.mark.parametrize(
        ("may_format", "read_only", "words"),
        [(False, False, "one is made if"), (True, True, "read-only")],
    )
    def test_nothing_is_made_unasked(
        self, tmp_path: Path, notes: Path, may_format: bool, read_only: bool, words: str
    ) -> None:
        """Nor on what cannot be written."""
        disk = device(blank(tmp_path / "d"))
        with pytest.raises(RequestError, match=words):
            luks._is_there(disk, may_format=may_format, read_only=read_only)
        assert not (notes / "arguments").exists()

    def test_what_is_there_is_not_formatted_over(self, tmp_path: Path, notes: Path) -> None:
        """Whatever it is: nobody has to ask for that."""
        path = blank(tmp_path / "d")
        subprocess.run(["mkswap", path], check=True, capture_output=True)
        with pytest.raises(RequestError, match="holds swap"):
            luks._is_there(device(path), may_format=True, read_only=False)
        assert not (notes / "arguments").exists()

    def test_a_volume_is_none_before_it_is_finished(self, tmp_path: Path) -> None:
        """It has a header long before a key can open it; one that is done is never made anew."""
        path = blank(tmp_path / "d")
        disk = device(path)
        arguments = luks._FORMAT[: luks._FORMAT.index("--pbkdf")]
        cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
        luks._cryptsetup(disk, KEY, *arguments, *cheap, str(path))
        assert not luks._is_there(disk, may_format=True, read_only=False)
        with pytest.raises(RequestError, match="unfinished"):
            luks._is_there(disk, may_format=False, read_only=False)
        luks._cryptsetup(disk, None, *luks._FINISH, str(path))
        assert luks._is_there(disk, may_format=True, read_only=False)
        assert luks._is_there(disk, may_format=False, read_only=True)

    def test_a_guest_without_cryptsetup(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is told what it lacks."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RequestError, match="has none"):
            luks.check_key(device(tmp_path / "d"), KEY)
