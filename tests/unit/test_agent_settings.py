"""What a request about a disk says is read with suspicion, before a disk is touched."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from hotlun.agent.errors import RequestError
from hotlun.agent.settings import DiskSettings, Key, Slot, Verity, read_timeout
from hotlun.agent.vpd import Identity
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import Fields, MessageError

SECRET = b"a key that nobody sees"
KEY = base64.b64encode(SECRET).decode()
ROOT_HASH = "0123456789abcdef" * 4


def settings(path: str, *, adding: bool = True, **more: Any) -> DiskSettings:
    return DiskSettings.read(Fields({"MountPath": path, **more}), adding=adding)


def test_what_is_not_said_is_zero() -> None:
    """As every member is left out by the host when it is."""
    assert DiskSettings.read(Fields({}), adding=True) == DiskSettings(
        slot=Slot(0, 0),
        partition=0,
        path="",
        read_only=False,
        encrypted=False,
        options=(),
        block_device=False,
        ensure_filesystem=False,
        filesystem="",
        preserve_data=False,
        identity=Identity("", None),
        key=None,
        verity=None,
        lazy=False,
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


def test_our_own_members_are_read() -> None:
    """Those that a host sends to an agent that has announced the feature."""
    read = settings(
        "/m0",
        ReadOnly=True,
        PreserveData=True,
        Serial="hotlun-7",
        Size=1 << 40,
        Verity={"RootHash": ROOT_HASH.upper(), "HashOffset": 4096},
        LazyUnmount=True,
    )
    assert (read.preserve_data, read.lazy) == (True, True)
    assert read.identity == Identity("hotlun-7", 1 << 40)
    assert read.verity == Verity(ROOT_HASH, 4096)


def test_a_verity_tree_may_lie_behind_the_filesystem() -> None:
    """That is what an offset of 0 says, or none."""
    offsets: tuple[dict[str, Any], ...] = ({}, {"HashOffset": 0})
    for more in offsets:
        verity = {"RootHash": ROOT_HASH, **more}
        assert settings("/m0", ReadOnly=True, Verity=verity).verity == Verity(ROOT_HASH, 0)


def test_a_key_is_read_and_shows_nowhere() -> None:
    """Its bytes are in `value` alone, whatever is printed of the settings."""
    read = settings("/m0", Encrypted=True, Key=KEY)
    assert read.key is not None
    assert read.key.value == SECRET
    assert SECRET.decode() not in f"{read} {read!r} {read.key} {read.digest!r}"
    assert KEY not in f"{read} {read!r}"


@pytest.mark.parametrize("length", [1, 4096])
def test_a_key_has_up_to_four_kibibytes(length: int) -> None:
    """Which is what its program's standard input takes."""
    key = settings("/m0", Encrypted=True, Key=base64.b64encode(bytes(length)).decode()).key
    assert isinstance(key, Key)
    assert len(key.value) == length


@pytest.mark.parametrize(
    "key",
    ["=", KEY + "*", KEY[:-1], "\ud800", "\u00e9", base64.b64encode(bytes(4097)).decode()],
)
def test_a_key_that_is_none_is_refused_without_its_text(key: str) -> None:
    """The words could end up in a log."""
    with pytest.raises(RequestError) as caught:
        settings("/m0", Encrypted=True, Key=key)
    assert caught.value.code == HResult.INVALID_ARGUMENT
    assert str(caught.value) == "the Key is not the base64 of 1 to 4096 bytes"
    assert caught.value.__cause__ is None


def test_a_digest_stands_for_how_it_is_mounted() -> None:
    """Not for the key's bytes, nor for how long somebody waits, nor how it is unmounted."""
    base = settings("/m0", Encrypted=True, Key=KEY).digest
    other_key = base64.b64encode(b"another").decode()
    same: dict[str, Any] = {"TimeoutInMs": 7, "LazyUnmount": True, "Key": other_key}
    assert settings("/m0", Encrypted=True, **{"Key": KEY, **same}).digest == base
    changes: tuple[dict[str, Any], ...] = (
        {"Options": ["ro"]},
        {"ReadOnly": True},
        {"Partition": 1},
        {"Lun": 1},
        {"Serial": "x"},
        {"Filesystem": "xfs"},
        {"PreserveData": True},
    )
    for change in changes:
        assert settings("/m0", Encrypted=True, Key=KEY, **change).digest != base
    assert len(base) == 32


def test_a_digest_stands_for_every_member_that_a_mount_is_made_from() -> None:
    """Which are all but two, and of the key, whether there is one."""
    base = settings("/m0")
    changes: list[dict[str, Any]] = [{name: "another"} for name in base._fields]
    others = {name: base._replace(**change).digest for change in changes for name in change}
    assert {name for name in others if others[name] == base.digest} == {"lazy", "timeout"}


def test_a_timeout_of_nothing_is_the_agents_own() -> None:
    """0 is how a host leaves it unsaid; all else is in milliseconds."""
    assert read_timeout(Fields({})) is None
    assert read_timeout(Fields({"TimeoutInMs": 0})) is None
    assert read_timeout(Fields({"TimeoutInMs": 0xFFFFFFFF})) == 0xFFFFFFFF / 1000


@pytest.mark.parametrize(
    "more",
    [
        {"PreserveData": 1},
        {"Serial": 7},
        {"Size": -1},
        {"Size": 1 << 64},
        {"Size": 1.0},
        {"Key": ["x"]},
        {"Verity": "x"},
        {"Verity": {"RootHash": 7}},
        {"Verity": {"RootHash": ROOT_HASH, "HashOffset": -512}},
        {"LazyUnmount": "yes"},
        {"TimeoutInMs": 1 << 32},
        {"TimeoutInMs": True},
    ],
)
@pytest.mark.parametrize("adding", [True, False])
def test_a_member_of_another_type_is_no_request(more: dict[str, Any], adding: bool) -> None:
    """Named in the error, on Remove as on Add."""
    with pytest.raises(MessageError, match=next(iter(more))):
        settings("/m0", adding=adding, **more)


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
        {"path": "/m0", "Filesystem": "ext\0"},
        {"path": "/m0", "Filesystem": "\u00e9xt4"},
        {"path": "/m0", "Encrypted": True},
        {"path": "/m0", "EnsureFilesystem": True, "Filesystem": "ext4", "Key": KEY},
        {"path": "/m0", "BlockDev": True, "Encrypted": True, "Key": KEY},
        {
            "path": "/m0",
            "Encrypted": True,
            "EnsureFilesystem": True,
            "Filesystem": "xfs",
            "ReadOnly": True,
        },
        {"path": "/m0", "Verity": {"RootHash": ROOT_HASH}},
        {"path": "/m0", "Verity": {"RootHash": ROOT_HASH}, "BlockDev": True},
        {
            "path": "/m0",
            "Verity": {"RootHash": ROOT_HASH},
            "ReadOnly": True,
            "Encrypted": True,
            "Key": KEY,
        },
        {
            "path": "/m0",
            "Verity": {"RootHash": ROOT_HASH},
            "ReadOnly": True,
            "EnsureFilesystem": True,
            "Filesystem": "ext4",
        },
        {"path": "/m0", "Verity": {}},
        {"path": "/m0", "ReadOnly": True, "Verity": {"RootHash": "xy" * 32}},
        {"path": "/m0", "ReadOnly": True, "Verity": {"RootHash": "ab" * 15}},
        {"path": "/m0", "ReadOnly": True, "Verity": {"RootHash": "ab" * 65}},
        {"path": "/m0", "ReadOnly": True, "Verity": {"RootHash": ROOT_HASH, "HashOffset": 511}},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything(more: dict[str, Any]) -> None:
    """With the code for bad arguments."""
    with pytest.raises(RequestError) as caught:
        settings(**more)
    assert caught.value.code == HResult.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "more",
    [
        {"EnsureFilesystem": True, "Filesystem": "btrfs"},
        {"EnsureFilesystem": True, "Filesystem": "ext4", "PreserveData": True},
        {"EnsureFilesystem": True, "Filesystem": "xfs", "Encrypted": True},
        {"Encrypted": True, "Key": KEY},
        {"Encrypted": True, "Key": KEY, "ReadOnly": True},
        {"ReadOnly": True, "Verity": {"RootHash": ROOT_HASH}, "BlockDev": True},
        {"BlockDev": True, "Encrypted": True, "Filesystem": "../x", "Options": ["remount"]},
        {"LazyUnmount": True},
    ],
)
def test_what_can_be_done_to_some_disk_passes(more: dict[str, Any]) -> None:
    """With a link to the device, what is about a filesystem is passed over."""
    assert settings("/m0", **more).path == "/m0"
