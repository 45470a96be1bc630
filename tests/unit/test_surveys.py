"""What a guest is asked for in a survey, in how many requests, and what its answers can say."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from hotlun.backends import surveys
from hotlun.bridge import messages
from hotlun.bridge.documents import Fields, MessageError, encode_request
from hotlun.model import (
    Attachment,
    Disk,
    DiskIdentity,
    DiskKind,
    GuestMount,
    GuestSurvey,
    MountConfig,
    Secret,
    Slot,
    Verity,
)

DISK = Disk("/srv/data.vhdx", DiskKind.VIRTUAL_DISK)


def attachment(lun: int = 0, controller: int = 0) -> Attachment:
    return Attachment(Slot(controller, lun), DISK, f"h{controller}x{lun}")


ONE = attachment()
MOUNT = GuestMount(ONE, "/mnt/one", MountConfig())


def query_of(survey: surveys.Survey) -> Any:
    return json.loads(survey.document["Query"])["Hotlun"]["Disks"]


def answer(*disks: Any, properties: Any = None) -> Fields:
    found = {"Hotlun": {"Disks": list(disks)}} if properties is None else properties
    return Fields({"Result": 0, "Properties": json.dumps(found)})


def test_a_request_as_it_is_sent() -> None:
    """A document in a string; of each mount what tells a device, and zero values left out."""
    scratch = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)
    mounts = [
        GuestMount(ONE, "/mnt/one", MountConfig(partition=2, options=["noatime"])),
        GuestMount(ONE, "/mnt/link", MountConfig(block_device=True)),
        GuestMount(ONE, "/mnt/tree", MountConfig(verity=Verity("ab" * 32, 512))),
        GuestMount(ONE, "/mnt/new", scratch, DiskIdentity("h0x0", 4096)),
    ]
    [survey] = surveys.over([ONE, attachment(5, 3)], mounts)
    assert survey.document == {
        "ContainerId": messages.NULL_ID,
        "ActivityId": messages.NULL_ID,
        "Query": '{"Hotlun":{"Disks":[{"Serial":"h0x0","Mounts":['
        '{"MountPath":"/mnt/one","Partition":2},'
        '{"MountPath":"/mnt/link","BlockDev":true},'
        '{"MountPath":"/mnt/tree","Verity":{"RootHash":"' + "ab" * 32 + '","HashOffset":512}},'
        '{"MountPath":"/mnt/new","Encrypted":true}]},'
        '{"Controller":3,"Lun":5,"Serial":"h3x5"}]}}',
    }


def test_no_key_is_in_a_question() -> None:
    """A volume under the caller's key is asked for as one that is encrypted."""
    key = "Correct-Horse"
    mount = GuestMount(ONE, "/mnt/one", MountConfig(encrypted=True, key=Secret(key)))
    [survey] = surveys.over([], [mount])
    said = encode_request(survey.document)
    assert key.encode() not in said
    assert base64.b64encode(key.encode()) not in said
    assert query_of(survey)[0]["Mounts"] == [{"MountPath": "/mnt/one", "Encrypted": True}]


def test_nothing_to_ask_for_is_no_request() -> None:
    """Nor is a slot that no guest can be told of: nothing can be there."""
    assert list(surveys.over([], [])) == []
    assert list(surveys.over([attachment(controller=4), attachment(lun=256)], [])) == []
    assert surveys.together([]) == GuestSurvey()


def test_many_disks_take_several_requests() -> None:
    """Each within what an agent takes at once, and together they ask for all."""
    attachments = [attachment(lun, controller) for controller in range(4) for lun in range(256)]
    mounts = [
        GuestMount(one, f"/m/{n}/{one.serial}", MountConfig())
        for one in attachments
        for n in range(3)
    ]
    several = list(surveys.over(attachments, mounts))
    assert len(several) > 1
    found = []
    for survey in several:
        disks = query_of(survey)
        assert len(disks) <= messages.MAX_SURVEYED_DISKS
        assert sum(len(disk["Mounts"]) for disk in disks) <= messages.MAX_SURVEYED_MOUNTS
        answers = [{"Device": "Own", "Mounts": [True] * len(disk["Mounts"])} for disk in disks]
        found.append(survey.read(answer(*answers)))
    everything = GuestSurvey(frozenset(one.serial for one in attachments), frozenset(mounts))
    assert surveys.together(found) == everything


@pytest.mark.parametrize("part", ["x", "\\", "\x01"])
def test_long_paths_take_several_requests(part: str) -> None:
    """No frame comes near the 4 MiB that an agent takes, whatever a path's characters cost."""
    mounts = [GuestMount(ONE, f"/{n}/" + part * 4000, MountConfig()) for n in range(300)]
    several = list(surveys.over([], mounts))
    assert len(several) > 2
    assert all(len(encode_request(survey.document)) < 512 << 10 for survey in several)
    assert sum(len(disk["Mounts"]) for one in several for disk in query_of(one)) == len(mounts)


def test_the_disk_of_a_mount_is_not_named_unless_asked_for() -> None:
    """An answer about a mount's disk is of no use to who did not ask for it."""
    [survey] = surveys.over([], [MOUNT])
    found = survey.read(answer({"Device": "Own", "Mounts": [True]}))
    assert found == GuestSurvey(frozenset(), frozenset({MOUNT}))


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({}, GuestSurvey()),
        ({"Device": "Other"}, GuestSurvey()),
        ({"Busy": True}, GuestSurvey(busy=frozenset({ONE.serial}))),
        ({"Device": "Unknown"}, GuestSurvey()),
        ({"Device": "Own"}, GuestSurvey(frozenset({ONE.serial}))),
        ({"Device": "Own", "Mounts": [False]}, GuestSurvey(frozenset({ONE.serial}))),
        (
            {"Device": "Own", "Mounts": [True], "More": 7},
            GuestSurvey(frozenset({ONE.serial}), frozenset({MOUNT})),
        ),
    ],
)
def test_answers(told: dict[str, Any], found: GuestSurvey) -> None:
    """What is missing is not there."""
    [survey] = surveys.over([ONE], [MOUNT])
    assert survey.read(answer(told)) == found


@pytest.mark.parametrize(
    "fields",
    [
        answer(),
        answer({}, {}),
        answer(7),
        answer({"Device": 7}),
        answer({"Device": "own"}),
        answer({"Device": "Mine\x1b[31m"}),
        answer({"Device": "Own", "Mounts": True}),
        answer({"Device": "Own", "Mounts": [1]}),
        answer({"Device": "Own", "Mounts": [True, True]}),
        answer({"Device": "Other", "Mounts": [True]}),
        answer({"Mounts": [True]}),
        answer(properties={}),
        answer(properties={"Hotlun": 7}),
        answer(properties={"Hotlun": {"Disks": {}}}),
        answer(properties=[]),
        Fields({"Properties": {"Hotlun": {"Disks": [{}]}}}),
        Fields({"Properties": "no document"}),
        Fields({"Properties": "[" * 9999}),
        Fields({"Properties": "\ud800"}),
        Fields({}),
    ],
)
def test_answers_that_make_no_sense(fields: Fields) -> None:
    """One kind of error for all of them, and nothing of them is believed."""
    [survey] = surveys.over([ONE], [MOUNT])
    with pytest.raises(MessageError):
        survey.read(fields)
