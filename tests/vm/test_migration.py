"""A guest moved into another QEMU while it runs, with its disks and what is mounted of them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.clients import TIMEOUT, Clients, image_at
from support.counting import COUNT, STOP
from support.guest_shell import shell
from support.machine import eventually, look

from hotlun import MountConfig, OutcomeUnknownError, Slot
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.model import GuestMount
from hotlun.vm import Machine, MachineError

if TYPE_CHECKING:
    from pathlib import Path

    from support.machine import Seen


MKFS_WAITS = r"""
mkdir -p /run/making /usr/local/sbin
cat >/usr/local/sbin/mkfs.ext4 <<'END'
#!/bin/sh
touch /run/making/$$
until [ -e /run/go ]; do sleep 0.05; done
exec /usr/sbin/mkfs.ext4 "$@"
END
chmod +x /usr/local/sbin/mkfs.ext4
"""
MKFS_GOES_ON = """
touch /run/go
until mountpoint -q /run/log; do sleep 0.05; done
"""


@pytest.fixture
def three(tmp_path: Path) -> list[GuestMount]:
    """A raw ext4, a blank qcow2, and one that is encrypted under a key that nobody keeps."""
    made = MountConfig(ensure_filesystem=True, filesystem="ext4")
    encrypted = MountConfig(ensure_filesystem=True, filesystem="ext4", encrypted=True)
    raw = disks.ext4(tmp_path / "data.raw", "moved")
    qcow2 = disks.image(tmp_path / "log.qcow2", "qcow2")
    scratch = disks.blank(tmp_path / "scratch.raw")
    return [
        GuestMount(image_at(raw, Slot(0, 0), "data1"), "/run/data", MountConfig()),
        GuestMount(image_at(qcow2, Slot(1, 7), "log1"), "/run/log", made),
        GuestMount(image_at(scratch, Slot(3, 63), "scratch1"), "/run/scratch", encrypted),
    ]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/migration.sock"


def named(seen: Seen) -> Seen:
    """Without the block nodes that QEMU names itself, differently each time."""
    return replace(seen, nodes=tuple(node for node in seen.nodes if not node.startswith("#")))


class TestWithDisks:
    async def test_nothing_of_what_the_guest_does_is_lost(
        self, three: list[GuestMount], uri: str, tmp_path: Path
    ) -> None:
        """A program writes on, line after line; what is mounted can be used, and taken away."""
        data, _, scratch = (mount.path for mount in three)
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(Machine.start(connect=False))
            bare = await look(source)
            async with Clients.of(source) as clients:
                for mount in three:
                    await clients.add(mount)
                arguments = tuple(clients.host.device_arguments())
            await shell(source, f"echo kept >{scratch}/file; sync {scratch}/file")
            await shell(source, COUNT.format(path=f"{data}/count"))
            destination = await stack.enter_async_context(
                Machine.start(incoming=uri, extra_arguments=arguments)
            )
            before = await look(source)
            await source.migrate(uri, timeout=TIMEOUT)
            await destination.arrived(timeout=TIMEOUT)
            seen = (await shell(destination, f"cat {data}/count")).split()
            assert named(await look(destination)) == named(before)
            await shell(
                destination,
                f'until [ "$(wc -l <{data}/count)" -gt {len(seen) + 20} ]; do sleep 0.1; done',
            )
            assert await shell(destination, f"cat {scratch}/file") == "kept\n"
            await shell(destination, STOP)
            lines = (await shell(destination, f"cat {data}/count")).split()
            assert lines == [str(number) for number in range(len(lines))]
            async with Clients.of(destination) as clients:
                for mount in three:
                    await clients.remove(mount)
            assert await eventually(destination, bare) == bare
        assert disks.ext4_file(tmp_path / "data.raw", "count").split() == lines
        disks.check(tmp_path / "log.qcow2", "qcow2")

    @pytest.mark.root
    async def test_both_ends_may_run_as_another_user(
        self, three: list[GuestMount], uri: str, tmp_path: Path
    ) -> None:
        """The destination opens the disks, and the socket, while it still is who started it."""
        (mount, *_) = three
        async with Machine.start(connect=False, user="nobody") as source:
            async with Clients.of(source) as clients:
                await clients.host.grant_access(mount.attachment.disk, "nobody")
                await clients.add(mount)
                arguments = tuple(clients.host.device_arguments())
            await shell(source, COUNT.format(path=f"{mount.path}/count"))
            async with Machine.start(
                incoming=uri, extra_arguments=arguments, user="nobody"
            ) as destination:
                (tmp_path / "migration.sock").chmod(0o777)
                await source.migrate(uri)
                await destination.arrived()
                await shell(destination, STOP)
                async with Clients.of(destination) as clients:
                    await clients.remove(mount)


class TestClients:
    @pytest.mark.parametrize("early", [False, True], ids=["after", "before"])
    async def test_what_was_asked_is_done_and_its_answer_lost(
        self, three: list[GuestMount], uri: str, early: bool
    ) -> None:
        """A client of the source hears no more; one of the destination may come at any time.

        The guest is not told of another host when one is connected at both ends (QEMU 7.2,
        virtio-serial-bus.c, virtio_serial_post_load_timer_cb). The agent knows it by its
        first word, qemu-guest-agent by the 0xff in front of its.
        """
        mount = three[1]
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(Machine.start(connect=False))
            bare = await look(source)
            await shell(source, MKFS_WAITS)
            old = await stack.enter_async_context(Clients.of(source))
            await old.host.attach(mount.attachment)
            destination = await stack.enter_async_context(
                Machine.start(incoming=uri, extra_arguments=tuple(old.host.device_arguments()))
            )
            asked = [
                asyncio.create_task(old.guest.mount(mount)),
                asyncio.create_task(shell(source, "until [ -e /run/go ]; do sleep 0.05; done")),
            ]
            await shell(source, "until ls /run/making/*; do sleep 0.05; done")
            coming = Clients.of(destination)
            entering = asyncio.create_task(stack.enter_async_context(coming)) if early else None
            await source.migrate(uri)
            await destination.arrived()
            new = await (entering or stack.enter_async_context(coming))
            await shell(destination, MKFS_GOES_ON)
            await new.remove(mount)
            assert await eventually(destination, bare) == bare
            assert not any(one.done() for one in asked)
            source.kill()
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [OutcomeUnknownError] * 2

    async def test_a_guest_that_is_not_here_yet_is_not_asked(self, uri: str) -> None:
        """Until it has arrived a command is refused, and the monitor answers."""
        async with Machine.start(incoming=uri) as destination:
            backends: list[object] = [destination.host, destination.guest]
            assert backends == [None, None]
            with pytest.raises(MachineError, match=r"await arrived\(\)"):
                await destination.run("true")
            with pytest.raises(MachineError, match=r"did not arrive: .* within 0\.1 s"):
                await destination.arrived(timeout=0.1)
            async with QEMUHostBackend.connect(destination.qmp_socket) as host:
                assert await host.occupied() == frozenset()


class TestAMigrationThatFails:
    async def test_to_nowhere_is_one_in_qemus_words(self, bare_vm: Machine, tmp_path: Path) -> None:
        """The guest runs on, where it was."""
        with pytest.raises(MachineError, match="No such file or directory"):
            await bare_vm.migrate(f"unix:{tmp_path}/nobody")
        assert (await bare_vm.run("echo here")).stdout == "here\n"

    async def test_a_disk_that_is_not_there_is_missed_at_both_ends(
        self, bare_vm: Machine, three: list[GuestMount], uri: str
    ) -> None:
        """The destination says which, and ends; the guest runs on at the source."""
        async with Clients.of(bare_vm) as clients:
            await clients.add(three[0])
        async with Machine.start(incoming=uri) as destination:
            done = await asyncio.gather(
                bare_vm.migrate(uri), destination.arrived(), return_exceptions=True
            )
            assert [type(outcome) for outcome in done] == [MachineError] * 2
            assert "10.0/0:0:0/scsi-disk" in str(done[1])
            await destination.wait()
        await shell(bare_vm, f"echo on >{three[0].path}/file; sync {three[0].path}/file")
        async with Clients.of(bare_vm) as clients:
            await clients.remove(three[0])

    @pytest.mark.parametrize("timeout", [0.0, 0.5])
    async def test_one_that_takes_too_long_is_cancelled(
        self, bare_vm: Machine, uri: str, timeout: float
    ) -> None:
        """So that the guest does not go when nobody counts on it any more; it can go later."""
        await bare_vm.query("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        async with Machine.start(incoming=uri) as destination:
            with pytest.raises(MachineError, match=f"within {timeout:g} s: the migration was canc"):
                await bare_vm.migrate(uri, timeout=timeout)
            if timeout:
                await destination.wait()  # it had begun to come
        assert (await bare_vm.run("echo here")).stdout == "here\n"
        await bare_vm.query("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        async with Machine.start(incoming=f"{uri}.again") as destination:
            await bare_vm.migrate(f"{uri}.again")
            await destination.arrived()
            assert (await destination.run("echo there")).stdout == "there\n"

    async def test_where_it_cannot_listen_is_one_at_the_start(self, tmp_path: Path) -> None:
        """In QEMU's words."""
        with pytest.raises(MachineError, match="Failed to bind socket"):
            async with Machine.start(incoming=f"unix:{tmp_path}/none/socket"):
                pass
