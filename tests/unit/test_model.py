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
    DiskKind,
    GuestMount,
    HotlunError,
    ImageFormat,
    MountConfig,
    OutcomeUnknownError,
    Slot,
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
    }
    assert len(configs) == 8


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


@pytest.mark.parametrize(
    "value", [Slot(1, 2), DISK, MountConfig(options=["ro"]), Attachment(Slot(0, 0), DISK, "h")]
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
