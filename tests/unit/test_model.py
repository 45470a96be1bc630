"""The values: frozen, hashable, validated when built."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotlun
from hotlun import (
    Attachment,
    BackendError,
    Disk,
    DiskIdentity,
    DiskKind,
    GuestMount,
    HotlunError,
    ImageFormat,
    MountConfig,
    OutcomeUnknownError,
    Secret,
    Slot,
    Verity,
    WrongKeyError,
)

DISK = Disk("/d.img", DiskKind.VIRTUAL_DISK)


def test_slots_are_ordered() -> None:
    """By controller, then LUN."""
    assert sorted([Slot(1, 0), Slot(0, 5), Slot(0, 1)]) == [Slot(0, 1), Slot(0, 5), Slot(1, 0)]
    assert str(Slot(1, 2)) == "1:2"


@pytest.mark.parametrize("position", [(-1, 0), (0, -1)])
def test_slots_are_counted_from_zero(position: tuple[int, int]) -> None:
    """There is no slot -1."""
    with pytest.raises(ValueError, match="from 0"):
        Slot(*position)


def test_the_kinds_are_the_hcs_attachment_types() -> None:
    """As the Host Compute Service spells them."""
    assert [*DiskKind] == ["VirtualDisk", "PassThru", "ExtensibleVirtualDisk"]
    assert [*ImageFormat] == ["raw", "qcow2", "vhd", "vhdx"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("", DiskKind.VIRTUAL_DISK),
        ("a\0", DiskKind.VIRTUAL_DISK),
        ("a", "Iso"),
        ("a", DiskKind.EXTENSIBLE_VIRTUAL_DISK),
        ("a", DiskKind.VIRTUAL_DISK, False, "nbd"),
        ("a", DiskKind.VIRTUAL_DISK, False, "", "vmdk"),
    ],
)
def test_disks_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    """No path, NUL, an unknown kind or format, a provider where there is none."""
    with pytest.raises(ValueError, match=r".+"):
        Disk(*arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"partition": -1},
        {"ensure_filesystem": True},
        {"preserve_data": True, "filesystem": "ext4"},
        {"encrypted": True, "filesystem": "ext4"},
        {"block_device": True, "filesystem": "ext4"},
        {"block_device": True, "options": ["ro"]},
        {"block_device": True, "ensure_filesystem": True, "filesystem": "ext4"},
        {"key": Secret("k")},
        {"key": Secret("k"), "filesystem": "ext4"},
        {"encrypted": True, "preserve_data": True, "key": Secret("k")},
        {"encrypted": True, "block_device": True, "key": Secret("k")},
        {"verity": "ab" * 32, "encrypted": True, "key": Secret("k")},
        {"verity": "ab" * 32, "ensure_filesystem": True, "filesystem": "ext4"},
        {"verity": "ab" * 15},
        {"verity": "ab" * 65},
        {"verity": "a" * 33},
        {"verity": "xy" * 32},
        {"verity": ""},
        {"lazy_unmount": True, "block_device": True},
        {"container_scratch": True, "partition": 1},
        {"container_scratch": True, "filesystem": "refs"},
        {"container_scratch": True, "ensure_filesystem": True, "filesystem": "refs"},
        {"container_scratch": True, "options": ["ro"]},
        {"container_scratch": True, "block_device": True},
        {"container_scratch": True, "encrypted": True, "key": Secret("k")},
        {"container_scratch": True, "verity": "ab" * 32},
        {"container_scratch": True, "lazy_unmount": True},
        {"options": ["ro", "rw"]},
        {"options": ["atime", "noatime"]},
        {"options": ["noexec", "exec"]},
        {"options": ["sync", "async"]},
        {"options": ["shared", "private"]},
        {"options": ["shared", "rshared"]},
        {"options": ["data=ordered", "data=journal"]},
        {"options": [""]},
        {"options": ["ro,noatime"]},
        {"options": ["a\0b"]},
        {"filesystem": "../ext4"},
        {"filesystem": "ext 4"},
    ],
)
def test_configs_that_contradict_themselves(fields: dict[str, Any]) -> None:
    """ValueError when built."""
    with pytest.raises(ValueError, match=r".+"):
        MountConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"encrypted": True, "key": Secret("k")},
        {"encrypted": True, "key": Secret("k"), "filesystem": "ext4", "ensure_filesystem": True},
        {"encrypted": True, "filesystem": "ext4", "ensure_filesystem": True, "preserve_data": True},
        {"verity": Verity("ab" * 32, 512), "block_device": True},
        {"verity": "ab" * 32, "filesystem": "erofs", "options": ["noatime"]},
        {"lazy_unmount": True, "filesystem": "ext4"},
        {"container_scratch": True},
    ],
)
def test_configs_that_make_sense(fields: dict[str, Any]) -> None:
    """A key needs no format, and a verified device needs no mount."""
    config = MountConfig(**fields)
    assert all(getattr(config, name) for name in fields)


def test_a_root_hash_is_a_verity() -> None:
    """In lower case, with its tree right behind the filesystem."""
    assert MountConfig(verity="AB" * 32).verity == Verity("ab" * 32)
    assert MountConfig(verity=Verity("AB" * 16)) == MountConfig(verity="ab" * 16)


@pytest.mark.parametrize("hash_offset", [-512, 1, 511, 1 << 63])
def test_hash_trees_begin_at_sectors(hash_offset: int) -> None:
    """Of 512 bytes, from 0."""
    with pytest.raises(ValueError, match="hash_offset"):
        Verity("ab" * 32, hash_offset)


@pytest.mark.parametrize("fields", [{"verity": b"ab"}, {"verity": 5}, {"key": "sesame"}])
def test_keys_and_trees_of_another_type(fields: dict[str, Any]) -> None:
    """TypeError, at once."""
    with pytest.raises(TypeError):
        MountConfig(**fields)


@pytest.mark.parametrize("options", ["ro", b"ro", "", [3]])
def test_options_are_a_sequence_of_strings(options: Any) -> None:
    """A single string is a mistake that would go unnoticed."""
    with pytest.raises(TypeError):
        MountConfig(options=options)


@given(st.permutations(["noatime", "nodev", "data=ordered", "nodev"]))
def test_order_and_repeats_of_options_make_no_difference(options: list[str]) -> None:
    """Equal, with an equal hash, and the order kept for the wire."""
    config = MountConfig(options=options)
    other = MountConfig(options=("nodev", "noatime", "data=ordered"))
    assert config == other
    assert hash(config) == hash(other)
    assert config.options == tuple(options)


def test_configs_that_differ() -> None:
    """Every field counts."""
    configs = {
        MountConfig(),
        MountConfig(partition=1),
        MountConfig(options=["ro"]),
        MountConfig(filesystem="ext4"),
        MountConfig(filesystem="ext4", ensure_filesystem=True),
        MountConfig(filesystem="ext4", ensure_filesystem=True, preserve_data=True),
        MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True),
        MountConfig(block_device=True),
        MountConfig(encrypted=True, key=Secret("one")),
        MountConfig(encrypted=True, key=Secret("two")),
        MountConfig(verity="ab" * 32),
        MountConfig(verity=Verity("ab" * 32, 4096)),
        MountConfig(lazy_unmount=True),
        MountConfig(container_scratch=True),
    }
    assert len(configs) == 14


@pytest.mark.parametrize("serial", ["", "1a", "A", "a-b", "a" * 21, "ä"])
def test_serials_that_no_scsi_disk_can_carry(serial: str) -> None:
    """At most 20 of [a-z][a-z0-9]*."""
    with pytest.raises(ValueError, match="serial"):
        Attachment(Slot(0, 0), DISK, serial)


def test_a_guest_mount_is_as_writable_as_its_disk() -> None:
    """read_only follows the disk."""
    for read_only in (True, False):
        disk = dataclasses.replace(DISK, read_only=read_only)
        mount = GuestMount(Attachment(Slot(0, 0), disk, "h1"), "/m", MountConfig())
        assert mount.read_only is read_only


def test_guest_mounts_are_equal_whatever_is_known_of_the_disk() -> None:
    """What an unmount says of a mount needs no identity."""
    attachment = Attachment(Slot(0, 0), DISK, "h1")
    mount = GuestMount(attachment, "/m", MountConfig())
    known = dataclasses.replace(mount, identity=DiskIdentity("h1", 512))
    assert known == mount
    assert hash(known) == hash(mount)
    assert known.identity != DiskIdentity("h1")


@pytest.mark.parametrize(
    "value",
    [
        Slot(1, 2),
        DISK,
        MountConfig(options=["ro"]),
        MountConfig(verity="ab" * 32),
        Verity("ab" * 32),
        DiskIdentity("h1", 512),
        Attachment(Slot(0, 0), DISK, "h"),
    ],
)
def test_values_are_frozen_and_travel(value: Any) -> None:
    """Hashable, unchangeable, equal after a copy and a pickle."""
    assert len({value, copy.deepcopy(value), pickle.loads(pickle.dumps(value))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)


def test_errors_keep_the_facts() -> None:
    """Built alike, keep what they were given, survive a copy, and are one tree."""
    for name in hotlun.__all__:
        cls = getattr(hotlun, name)
        if name.endswith("Error"):
            assert issubclass(cls, HotlunError)
            error = cls("what", operation="attach", slot=Slot(0, 1), disk=DISK, code=5, detail="d")
            for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
                assert str(one) == "what"
                assert (one.operation, one.slot, one.disk) == ("attach", Slot(0, 1), DISK)
                assert (one.code, one.detail) == (5, "d")
    plain = BackendError("what")
    assert (plain.operation, plain.slot, plain.disk, plain.code) == ("", None, None, None)
    assert not issubclass(OutcomeUnknownError, BackendError)
    assert issubclass(WrongKeyError, BackendError)
