"""What a request about a disk says is read with suspicion, before a disk is touched."""

from __future__ import annotations

from typing import Any

import pytest

from hotlun.agent.errors import RequestError
from hotlun.agent.settings import DiskSettings, Slot
from hotlun.bridge.messages import Fields, HResult


def settings(path: str, *, adding: bool = True, **more: Any) -> DiskSettings:
    return DiskSettings.read(Fields({"MountPath": path, **more}), adding=adding)


def test_what_is_not_said_is_zero() -> None:
    """As every member is left out by the host when it is."""
    assert DiskSettings.read(Fields({}), adding=True) == DiskSettings(
        slot=Slot(0, 0),
        partition=0,
        path="",
        read_only=False,
        options=(),
        block_device=False,
        ensure_filesystem=False,
        filesystem="",
        timeout=None,
    )


def test_members_are_found_in_any_case_and_others_passed_over() -> None:
    """As the original agent reads them; ours beside them is the time-out."""
    document = {
        "mountpath": "/run//m0/./",
        "LUN": 7,
        "controller": 3,
        "Partition": 2,
        "readOnly": True,
        "Options": ["ro", "rshared"],
        "FileSystem": "ext4",
        "VerityInfo": {"Version": 1},
        "TimeoutInMs": 2500,
    }
    read = DiskSettings.read(Fields(document), adding=True)
    assert (str(read.slot), read.partition, read.path) == ("3:7", 2, "/run/m0")
    assert (read.read_only, read.options, read.filesystem) == (True, ("ro", "rshared"), "ext4")
    assert read.timeout == 2.5


def test_a_remove_may_say_what_an_add_may_not() -> None:
    """Whatever was mounted, undoing it is not refused for how it was to be mounted."""
    more = {"Encrypted": True, "EnsureFilesystem": True, "Filesystem": "btrfs"}
    assert settings("/m0", adding=False, **more).path == "/m0"


@pytest.mark.parametrize(
    ("member", "code"),
    [("Encrypted", HResult.NOT_IMPLEMENTED), ("PreserveData", HResult.NOT_IMPLEMENTED)],
)
def test_what_this_agent_cannot_do_is_refused_before_anything(member: str, code: HResult) -> None:
    """A disk must not be touched by half of what was asked."""
    with pytest.raises(RequestError, match=member) as caught:
        settings("/m0", EnsureFilesystem=True, Filesystem="ext4", **{member: True})
    assert caught.value.code == code


@pytest.mark.parametrize(
    "more",
    [
        {"path": "relative"},
        {"path": "/a/../b"},
        {"path": "/a\0b"},
        {"path": "/"},
        {"path": "//./"},
        {"path": "/" + "x/" * 3000},
        {"path": "/\ud800"},
        {"path": "/m0", "EnsureFilesystem": True},
        {"path": "/m0", "EnsureFilesystem": True, "Filesystem": "vfat"},
        {"path": "/m0", "Filesystem": "../ext4"},
        {"path": "/m0", "Options": ["remount"]},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything(more: dict[str, Any]) -> None:
    """With the code for bad arguments."""
    with pytest.raises(RequestError) as caught:
        settings(**more)
    assert caught.value.code == HResult.INVALID_ARGUMENT
