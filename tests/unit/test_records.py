"""Records: what is written down is read back the same, and what is no record is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun import Disk, DiskKind, ImageFormat, MountConfig, Secret, Slot, Verity, record_checks
from hotlun.facts import Fact
from hotlun.journal_documents import DiskText
from hotlun.owners import NOBODY, Owner
from hotlun.records import DiskRecord, GrantRecord, HolderRecord, MountRecord, salt_of

SALT = b"salt"
TEXT = st.text(st.characters(blacklist_characters="\0"), min_size=1, max_size=20)
"""Lone surrogates too: names of files that are no UTF-8 come as those."""
FACTS = st.sampled_from(Fact)

CONFIGS = st.sampled_from(
    [
        MountConfig(),
        MountConfig(partition=3, options=["noatime", "data=ordered", "noatime"], lazy_unmount=True),
        MountConfig(container_scratch=True),
        MountConfig(filesystem="xfs", ensure_filesystem=True, preserve_data=True),
        MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True),
        MountConfig(block_device=True, partition=1),
        MountConfig(verity=Verity("ab" * 32, 4096)),
        MountConfig(encrypted=True, key=Secret("sesame")),
    ]
)
DISKS = st.one_of(
    st.builds(
        Disk,
        TEXT,
        st.just(DiskKind.VIRTUAL_DISK),
        st.booleans(),
        format=st.sampled_from([None, *ImageFormat]),
    ),
    st.builds(Disk, TEXT, st.just(DiskKind.PHYSICAL_DISK), st.booleans()),
    st.builds(Disk, TEXT, st.just(DiskKind.EXTENSIBLE_VIRTUAL_DISK), st.booleans(), TEXT),
)
RECORDS = st.builds(
    DiskRecord,
    serial=st.just("h123"),
    slot=st.builds(Slot, st.integers(0, 3), st.integers(0, 63)),
    is_vacated=st.booleans(),
    disk=DISKS,
    identity=st.one_of(
        st.tuples(st.just("file"), st.integers(0, 1 << 64), st.integers(0, 1 << 64)),
        st.tuples(st.just("path"), TEXT, st.just("")),
    ),
    fact=FACTS,
    grants=st.lists(
        st.builds(GrantRecord, TEXT, FACTS, TEXT, st.integers(0, 1 << 62)), max_size=2
    ).map(tuple),
    mounts=st.lists(st.builds(MountRecord, TEXT, CONFIGS, FACTS), max_size=2).map(tuple),
    holders=st.lists(
        st.builds(
            HolderRecord,
            TEXT,
            st.integers(0, 1 << 40),
            st.sampled_from([NOBODY, Owner("job"), Owner("pid:7", 1234)]),
            st.none() | TEXT,
            st.just("") | TEXT,
        ),
        max_size=2,
    ).map(tuple),
    reason=TEXT,
)


@given(RECORDS)
def test_what_is_written_is_read(record: DiskRecord) -> None:
    """Equal in every part; options in their order; a key as what equals it."""
    text = record.to_text(SALT)
    again = DiskRecord.from_text(text)
    assert again == record
    assert [m.config.options for m in again.mounts] == [m.config.options for m in record.mounts]
    assert again.to_text(b"another") == text
    assert text.isascii()
    assert "sesame" not in text


@given(st.lists(RECORDS, min_size=1, max_size=3))
def test_a_text_is_made_of_what_is_true_now(records: list[DiskRecord]) -> None:
    """Whatever was kept encoded of the disk as it was before."""
    text = DiskText(records[0].identity, SALT)
    for number, record in enumerate(records):
        moved = record._replace(serial=f"h{number // 2}", slot=records[number // 2].slot)
        moved = moved._replace(disk=records[0].disk, identity=records[0].identity)
        expected = moved.to_document(SALT) | {"version": 2}
        del expected["holders"]
        assert json.loads(text.of(moved)) == json.loads(json.dumps(expected))


def test_the_salt_is_found_again() -> None:
    """So that a key of a later process has the same seal."""
    mount = MountRecord("/m", MountConfig(encrypted=True, key=Secret("x")), Fact.YES)
    disk = Disk("/d", DiskKind.VIRTUAL_DISK)
    record = DiskRecord("h1", Slot(0, 0), False, disk, ("path", "/d", ""), Fact.YES, (), (mount,))
    assert salt_of((DiskRecord.from_text(record.to_text(SALT)),)) == SALT
    assert salt_of(()) is None


GOOD = json.loads(
    DiskRecord(
        "h1",
        Slot(0, 0),
        False,
        Disk("/d", DiskKind.VIRTUAL_DISK),
        ("path", "/d", ""),
        Fact.YES,
        (GrantRecord("vm", Fact.YES),),
        (MountRecord("/m", MountConfig(encrypted=True, key=Secret("x")), Fact.YES),),
        (HolderRecord("h2", 0, NOBODY, "/m"),),
    ).to_text(SALT)
)


def test_a_config_of_before_a_field_was_thought_of() -> None:
    """Its documents lack it, and so do those of now where it says nothing."""
    mount = MountRecord("/m", MountConfig(), Fact.YES)
    disk = Disk("/d", DiskKind.VIRTUAL_DISK)
    record = DiskRecord("h1", Slot(0, 0), False, disk, ("path", "/d", ""), Fact.YES, (), (mount,))
    document = json.loads(record.to_text(SALT))
    assert document["mounts"] == [["/m", "yes", False, {}]]
    assert DiskRecord.from_text(json.dumps(document)) == record
    document["mounts"] = [["/m", "yes", False, {"filesystem": "ext4", "options": ["noatime"]}]]
    (again,) = DiskRecord.from_text(json.dumps(document)).mounts
    assert again.config == MountConfig(filesystem="ext4", options=["noatime"])
    assert not again.config.container_scratch


OTHER: dict[str, Any] = {
    "serial": "h9",
    "identity": ["path", "/e", ""],
    "disk": ["/e", "VirtualDisk", False, "", None],
}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"slot": [0]},
        {"slot": [-1, 0]},
        {"disk": ["/d", "Floppy", False, "", None]},
        {"disk": ["", "VirtualDisk", False, "", None]},
        {"identity": ["path"]},
        {"fact": "perhaps"},
        {"grants": [["vm"]]},
        {"mounts": [["/m", "yes", False, {"partition": -1}]]},
        {"mounts": [["/m", "yes", False, {"colour": "red"}]]},
        {"mounts": [["/m", "yes", False, {"encrypted": True, "key": ["zz", "zz"]}]]},
        {"mounts": [["/m", "yes", False, {"partition": 1.5}]]},
        {"mounts": [["/m", "yes", False, {"partition": True}]]},
        {"mounts": [["/m", "yes", False, {"options": "ro"}]]},
        {"mounts": [["/m", "yes", False, {"container_scratch": 1}]]},
        {"mounts": [["/m", "yes", False, {"container_scratch": True, "partition": 1}]]},
        {"mounts": [[7, "yes", False, {}]]},
        {"mounts": [["/m", "yes", {}]]},
        {"mounts": 5},
        {"slot": [0.5, 1]},
        {"slot": [True, 1]},
        {"serial": "UPPER"},
        {"serial": 5},
        {"vacated": "no"},
        {"identity": ["path", ["/d"], ""]},
        {"reason": None},
        {"grants": [["vm", "yes", 5]]},
        {"holders": [["h2", "first", "", None, None, ""]]},
        {"holders": [["h2", 0, "me", 5, None, ""]]},
        {"holders": [["h2", 0, "pid:", 5, None, ""]]},
        {"holders": [["h2", 0, "pid:7", "x", None, ""]]},
        {"holders": [["h2", 0, "", None, 5, ""]]},
        {"holders": [["h2"]]},
        {"holders": None},
    ],
    ids=str,
)
def test_what_is_no_record(change: dict[str, Any]) -> None:
    """Whatever is wrong with it, there is one error."""
    DiskRecord.from_document(GOOD)
    with pytest.raises(ValueError, match=r"version|no record of a disk"):
        DiskRecord.from_document({**GOOD, **change})


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', 5, "[" * 100_000])
def test_what_is_no_document(text: str) -> None:
    """Nor is this one."""
    with pytest.raises(ValueError, match=r"Expecting|no record|version"):
        DiskRecord.from_text(text)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, "same serial"),
        ({"serial": "h9"}, "same file"),
        ({"serial": "h9", "identity": ["path", "/e", ""]}, "same path"),
        (OTHER, "same slot"),
        ({**OTHER, "slot": [0, 1]}, "same guest path"),
        ({**OTHER, "slot": [0, 1], "mounts": []}, "same holder"),
        ({**OTHER, "slot": [0, 1], "mounts": [], "holders": []}, None),
        ({**OTHER, "vacated": True, "fact": "no", "mounts": [], "holders": []}, None),
        ({**OTHER, "vacated": True}, "without a slot"),
        ({"grants": [["vm", "unplugged", "", 0]]}, "no grant .* is ever"),
        ({"grants": [["vm", "yes", "", 0], ["vm", "no", "", 1]]}, "two grants"),
        ({"mounts": [["/m", "yes", False, {}], ["/n", "yes", False, {}]]}, "two guest mounts"),
        (
            {"mounts": [["/m", "yes", False, {}], ["/m", "yes", False, {"partition": 1}]]},
            "two guest paths",
        ),
        ({"holders": [["h2", 0, "", None, "/m", ""]] * 2}, "two holders"),
    ],
    ids=str,
)
def test_what_cannot_all_be_true(change: dict[str, Any], problem: str | None) -> None:
    """Two disks do not share what only one can have, and none is in a state that there is not."""
    first, second = (DiskRecord.from_document({**GOOD, **more}) for more in ({}, change))
    record_checks.check([first])
    if problem is None:
        record_checks.check([first, second])
        return
    with pytest.raises(ValueError, match=problem):
        record_checks.check([first, second])
