"""What the QEMU backend finds of some attachments in a real VM, whoever attached them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING

import pytest
from support.qemu import Refuses, ScriptedMonitor, attachment, connected, make_image

from hotlun import BackendError, DiskIdentity
from hotlun.backends import base
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.model import Attachment, DiskKind, ImageFormat, Presence, Slot

if TYPE_CHECKING:
    from pathlib import Path

    from support.qemu import QEMU

RAW, QCOW2, VHD, VHDX = ImageFormat
ABSENT, PARTIAL, PRESENT = Presence.ABSENT, Presence.PARTIAL, Presence.PRESENT
MIB = 1 << 20


def raw(tmp_path: Path, lun: int = 0, controller: int = 0) -> Attachment:
    path = tmp_path / f"{controller}-{lun}.raw"
    path.write_bytes(bytes(MIB))
    return attachment(path, lun, controller=controller)


async def seen(host: QEMUHostBackend, *attachments: Attachment) -> list[Presence]:
    found = await base.host_survey(host, attachments)
    assert found is not None
    assert set(found) == {each.serial for each in attachments}
    return [found[each.serial] for each in attachments]


@pytest.mark.qemu
async def test_attached_or_not(vm: QEMU, host: QEMUHostBackend, tmp_path: Path) -> None:
    """Present between attach and detach, absent otherwise; only what is asked for is told."""
    one, two, other = raw(tmp_path, 1), raw(tmp_path, 2, 1), raw(tmp_path, 3)
    assert await seen(host, one, two) == [ABSENT, ABSENT]
    await host.attach(one)
    await host.attach(other)
    assert await seen(host, one, two) == [PRESENT, ABSENT]
    await host.attach(two)
    assert await seen(host, two, one) == [PRESENT, PRESENT]
    assert await seen(host) == []
    for disk in (one, two, other):
        await host.detach(disk)
    assert await seen(host, one, two, other) == [ABSENT] * 3


@pytest.mark.qemu
async def test_what_is_elsewhere_is_partial(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """A device at another LUN, controller, channel or target is not the attachment as it was."""
    node = {"driver": "null-co", "read-zeroes": True}
    places = [
        {"bus": "scsi0.0", "lun": 4},
        {"bus": "scsi1.0", "lun": 3},
        {"bus": "scsi0.0", "lun": 3, "scsi-id": 1},
    ]
    for place in places:
        disk = attachment(tmp_path / "x", 3)
        name = f"hotlun-{disk.serial}"
        below = {"driver": "raw", "node-name": name, "file": node}
        await vm.client.execute("blockdev-add", below)
        device = {"driver": "scsi-hd", "id": name, "drive": name, "channel": 0, "scsi-id": 0}
        await vm.client.execute("device_add", device | place)
        assert await seen(host, disk) == [PARTIAL]
        await host.detach(disk)
        assert await seen(host, disk) == [ABSENT]
    beyond = Attachment(Slot(9, 0), disk.disk, "nowhere")
    assert await seen(host, beyond) == [ABSENT]


@pytest.mark.qemu
async def test_what_is_there_in_another_way_is_partial(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """Another format, or read-only where it may be written: it can only be undone."""
    there = raw(tmp_path)
    await host.attach(there)
    path = there.disk.path
    for disk in (attachment(path, read_only=True), attachment(path, format=QCOW2)):
        assert await seen(host, Attachment(there.slot, disk.disk, there.serial)) == [PARTIAL]
    assert await seen(host, there) == [PRESENT]
    await host.detach(there)


@pytest.mark.qemu
async def test_halves_are_partial(vm: QEMU, host: QEMUHostBackend, tmp_path: Path) -> None:
    """A node alone is; so is one whose device is going."""
    half, going = raw(tmp_path), raw(tmp_path, 1)
    await vm.client.execute(
        "blockdev-add",
        {"driver": "null-co", "node-name": f"hotlun-{half.serial}", "read-zeroes": True},
    )
    await host.attach(going)
    await vm.client.execute("device_del", {"id": f"hotlun-{going.serial}"})
    assert await seen(host, half, going) == [PARTIAL, PARTIAL]
    for disk in (half, going):
        await host.detach(disk)


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("format", "made_as", "size"),
    [(RAW, "raw", 8 * MIB), (QCOW2, "qcow2", 8 * MIB), (VHDX, "vhdx", 8 * MIB), (VHD, "vpc", None)],
)
@pytest.mark.parametrize("read_only", [False, True])
async def test_another_processs_disk_has_its_identity_again(
    vm: QEMU,
    tmp_path: Path,
    format: ImageFormat,  # noqa: A002 - the word of the API
    made_as: str,
    size: int | None,
    read_only: bool,
) -> None:
    """What is found is known, with its size where the guest surely sees that one."""
    path = make_image(tmp_path / "disk", made_as, "8M")
    disk = attachment(path, format=format, read_only=read_only)
    async with connected(vm) as host:
        await host.attach(disk)
        before = host.identity(disk)
    async with connected(vm) as host:
        assert host.identity(disk) == DiskIdentity(disk.serial)
        assert await seen(host, disk) == [PRESENT]
        assert host.identity(disk) == before == DiskIdentity(disk.serial, size)
        await host.detach(disk)
        assert host.identity(disk) == DiskIdentity(disk.serial)


@pytest.mark.qemu
async def test_what_somebody_else_took_out_is_forgotten(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path
) -> None:
    """A survey corrects what this process believed."""
    disk = raw(tmp_path)
    await host.attach(disk)
    assert host.device_arguments()
    await vm.client.execute("device_del", {"id": f"hotlun-{disk.serial}"})
    assert await seen(host, disk) == [PARTIAL]
    assert host.device_arguments() == []
    await host.detach(disk)
    assert await seen(host, disk) == [ABSENT]


@pytest.mark.qemu
async def test_an_attach_during_a_survey_is_not_forgotten(
    host: QEMUHostBackend, tmp_path: Path
) -> None:
    """What was looked at before it happened does not undo what is known since."""
    disks = [raw(tmp_path, lun) for lun in range(16)]
    await asyncio.gather(host.survey(disks), *map(host.attach, disks), host.survey(disks))
    assert len(host.device_arguments()) == 4 * len(disks)
    await asyncio.gather(host.survey(disks), *map(host.detach, disks), host.survey(disks))
    assert host.device_arguments() == []


@pytest.mark.qemu
async def test_64_disks(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two questions for all, and four for each that is there; none for what is not."""
    there = [raw(tmp_path, lun, controller) for controller in range(2) for lun in range(32)]
    absent = [raw(tmp_path, lun) for lun in range(64)]
    await asyncio.gather(*map(host.attach, there))
    caplog.set_level(logging.DEBUG, "hotlun.qemu")
    caplog.clear()
    assert await seen(host, *there, *absent) == [PRESENT] * 64 + [ABSENT] * 64
    said = [record.message for record in caplog.records if record.name == "hotlun.qemu"]
    commands = [message.split(": ")[1].split(" ")[0] for message in said]
    assert sorted(set(commands)) == ["qom-get", "qom-list", "query-named-block-nodes"]
    assert len(commands) == 2 + 4 * 64
    caplog.set_level(logging.INFO, "hotlun.qemu")
    began = time.monotonic()
    await host.survey(there)
    assert time.monotonic() - began < 10
    await asyncio.gather(*map(host.detach, there))


async def test_answers_that_make_no_sense(tmp_path: Path) -> None:
    """What QEMU does not say in the expected way is not taken for an attachment."""
    disk = raw(tmp_path)
    name = f"hotlun-{disk.serial}"
    async with (
        ScriptedMonitor.serving(tmp_path) as monitor,
        QEMUHostBackend.connect(monitor.path, controllers=["scsi0"]) as host,
    ):
        for devices, nodes, place in (
            ({}, {}, 0),
            ([], [1, None, {"node-name": [name]}], 0),
            ([{"name": name, "type": "child<scsi-hd>"}], [{"node-name": name}], Refuses("no")),
            ([{"name": name, "type": "child<scsi-hd>"}], [{"node-name": name}], "x"),
            ([{"name": name, "type": "link<scsi-hd>"}], {}, 0),
        ):
            monitor.answers = {"qom-list": [devices], "query-named-block-nodes": [nodes]}
            monitor.answers["qom-get"] = place
            assert (await host.survey([disk]))[disk.serial] is not PRESENT
        monitor.answers = {"query-named-block-nodes": Refuses("no")}
        with pytest.raises(BackendError, match="does not answer query-named-block-nodes"):
            await host.survey([disk])
        assert json.dumps(host.device_arguments()) == "[]"


async def test_other_kinds_have_the_size_that_is_certain(tmp_path: Path) -> None:
    """A block device's is QEMU's; what a server has may change."""
    provided = attachment(
        "h:1", kind=DiskKind.EXTENSIBLE_VIRTUAL_DISK, provider="nbd", format=None, read_only=True
    )
    device = attachment("/dev/x", kind=DiskKind.PHYSICAL_DISK, format=None)
    async with (
        ScriptedMonitor.serving(tmp_path) as monitor,
        QEMUHostBackend.connect(monitor.path, controllers=["scsi0"]) as host,
    ):
        for disk, size in ((provided, None), (device, MIB)):
            name = f"hotlun-{disk.serial}"
            monitor.answers["qom-list"] = [[{"name": name, "type": "child<scsi-hd>"}]]
            image = {"virtual-size": MIB}
            node = {"node-name": name, "drv": "raw", "ro": disk.disk.read_only, "image": image}
            monitor.answers["query-named-block-nodes"] = [[node]]
            bus = "/machine/peripheral/scsi0/scsi0.0"
            monitor.answers["qom-get"] = [bus, 0, 0, 0]
            assert (await host.survey([disk]))[disk.serial] is PRESENT
            assert host.identity(disk) == DiskIdentity(disk.serial, size)
