"""The VM itself: up, used, gone; and what it says when it cannot be."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import disks
from support.agent import agent_pid, kill_agent
from support.clients import Clients, image_at
from support.guest_shell import shell
from support.machine import look

from hotlun import MountConfig, OutcomeUnknownError, Slot, UnsupportedError
from hotlun.bridge.client import BridgeConnection
from hotlun.model import GuestMount
from hotlun.vm import (
    Accelerator,
    Machine,
    MachineError,
    find_machine,
    list_machines,
    start_detached,
    stop,
)
from hotlun.vm import process as process_module

if TYPE_CHECKING:
    from support.machine import Seen

DEADLINE = 60.0


def qemu_processes(word: str) -> list[int]:
    """The pids of running QEMUs that have `word` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if arguments.startswith(b"qemu-system") and word.encode() in arguments:
                found.append(int(entry.name))
    return found


async def gone(pid: int) -> None:
    """Wait until no process has this pid, zombies aside."""
    async with asyncio.timeout(DEADLINE):
        while not has_ended(pid):
            await asyncio.sleep(0.02)


def paths(seen: Seen) -> list[str]:
    """Where something is mounted in the guest."""
    return [mount.path for mount in seen.mounts]


def has_ended(pid: int) -> bool:
    """Whether the process is a zombie or no more; its state follows the last `)` of its name."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


class TestARunningMachine:
    async def test_has_what_disks_are_prepared_and_looked_at_with(self, bare_vm: Machine) -> None:
        """The tools that the documentation promises are in the guest, and run."""
        done = await bare_vm.run(
            "set -e; lsblk -n | wc -l; mke2fs -V; mkfs.xfs -V; cryptsetup --version; ps; "
            "echo abc | grep b; python3 -c 'import asyncio, ctypes, json'"
        )
        assert done.returncode == 0, done.stderr

    async def test_gives_back_what_a_command_said_and_how_it_ended(self, bare_vm: Machine) -> None:
        """Output, errors and the exit status come apart; a non-zero one does not raise."""
        done = await bare_vm.run("echo out; echo err >&2; exit 3")
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
        assert (await bare_vm.run("kill -9 $$")).returncode == -signal.SIGKILL

    async def test_runs_commands_side_by_side(self, bare_vm: Machine) -> None:
        """A command that waits does not keep others waiting, and answers find their callers."""
        first = asyncio.create_task(
            bare_vm.run("until [ -e /tmp/go ]; do sleep 0.02; done; echo first")
        )
        others = await asyncio.gather(*(bare_vm.run(f"echo {number}") for number in range(8)))
        assert [done.stdout for done in others] == [f"{number}\n" for number in range(8)]
        assert not first.done()
        await bare_vm.run("touch /tmp/go")
        assert (await first).stdout == "first\n"

    async def test_a_command_is_bounded_in_time(self, bare_vm: Machine) -> None:
        """A command over its deadline has an unknown outcome; the next one is not disturbed."""
        with pytest.raises(OutcomeUnknownError, match=r"within 0\.2 s"):
            await bare_vm.run("sleep 30", timeout=0.2)
        assert (await bare_vm.run("echo well")).stdout == "well\n"

    async def test_a_cancelled_command_disturbs_no_other(self, bare_vm: Machine) -> None:
        """Giving up on a command leaves the connection in order."""
        task = asyncio.create_task(bare_vm.run("sleep 30"))
        await bare_vm.run("true")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await bare_vm.run("echo well")).stdout == "well\n"

    async def test_has_its_controllers_empty_and_in_our_order(self, bare_vm: Machine) -> None:
        """Four controllers, no SCSI disk, and PCI order is `scsi0`, `scsi1`..."""
        seen = await look(bare_vm)
        assert seen.scsi == ()
        assert set(bare_vm.controllers) <= set(seen.devices)
        assert bare_vm.controllers == ("scsi0", "scsi1", "scsi2", "scsi3")
        done = await bare_vm.run("ls -d /sys/bus/pci/devices/0000:00:1[0-9].0/virtio*/host*")
        assert [line.split("/")[5] for line in done.stdout.splitlines()] == [
            "0000:00:10.0", "0000:00:11.0", "0000:00:12.0", "0000:00:13.0",
        ]  # fmt: skip

    async def test_lives_in_the_present(self, bare_vm: Machine) -> None:
        """A restored guest's clock is set: it is not in the time of the snapshot."""
        before = time.time()
        guest = float((await bare_vm.run("date +%s.%N")).stdout)
        assert before - 1 <= guest <= time.time() + 1

    async def test_can_write_anywhere_in_its_root(self, bare_vm: Machine) -> None:
        """A guest path may be anywhere: the root is writable, though only in memory."""
        assert (await bare_vm.run("mkdir -p /data/deep && touch /data/deep/x")).returncode == 0

    async def test_its_agent_is_started_again_when_it_dies(self, bare_vm: Machine) -> None:
        """The guest's init looks after the agent."""
        async with BridgeConnection.connect_unix(bare_vm.agent_socket, timeout=DEADLINE):
            pass
        old = await agent_pid(bare_vm)
        new = await kill_agent(bare_vm)
        assert new != old
        async with BridgeConnection.connect_unix(bare_vm.agent_socket, timeout=DEADLINE):
            assert await agent_pid(bare_vm) == new

    async def test_its_init_leaves_no_zombies(self, bare_vm: Machine) -> None:
        """Orphans of commands are reaped by PID 1."""
        await bare_vm.run("(sleep 0.01 &) ; (true &)")
        done = await bare_vm.run("sleep 0.3; ps -eo stat= | grep -c Z")
        assert done.stdout == "0\n"

    async def test_has_both_backends(self, vm: Machine) -> None:
        """A machine is connected unless asked not to be, and its agent has answered."""
        assert vm.host is not None
        assert vm.guest is not None
        assert await vm.host.occupied() == frozenset()


class TestRestoring:
    async def test_each_has_randomness_of_its_own(self) -> None:
        """Two guests of one snapshot draw different random numbers from their first one on."""
        drawn = set()
        for _ in range(2):
            async with Machine.start(connect=False) as machine:
                done = await machine.run("head -c 16 /dev/urandom | od -An -tx1")
                drawn.add(done.stdout)
        assert len(drawn) == 2

    async def test_two_at_once_share_nothing(self) -> None:
        """What one VM writes to its root, the other does not see."""
        async with (
            Machine.start(connect=False) as one,
            Machine.start(connect=False) as other,
        ):
            await one.run("touch /root/mark")
            assert (await one.run("ls /root")).stdout == "mark\n"
            assert (await other.run("ls /root")).stdout == ""

    async def test_other_hardware_has_a_snapshot_of_its_own(self) -> None:
        """Controllers, memory and processors are what was asked for."""
        async with Machine.start(controllers=2, memory_mib=384, cpus=2, connect=False) as machine:
            assert machine.controllers == ("scsi0", "scsi1")
            assert (await machine.run("nproc")).stdout == "2\n"
            hosts = await machine.run("ls /sys/class/scsi_host | wc -l")
            assert hosts.stdout == "2\n"

    async def test_a_broken_snapshot_is_taken_anew(
        self, own_cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A state that QEMU does not accept costs a boot, not the start."""
        (state,) = own_cache.glob("snapshots/*/state")
        whole = state.stat().st_size
        os.truncate(state, whole // 2)
        async with Machine.start(connect=False) as machine:
            assert (await machine.run("echo up")).stdout == "up\n"
        assert "taking a new one" in caplog.text
        (again,) = own_cache.glob("snapshots/*/state")
        assert again.stat().st_size > whole // 2

    async def test_a_start_that_is_too_short_of_time_keeps_the_snapshot(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A deadline says nothing about the snapshot: the next start restores it."""
        async with Machine.start(connect=False):
            pass
        caplog.set_level("INFO", "hotlun.vm")
        caplog.clear()
        with pytest.raises(MachineError, match=r"0\.01 s"):
            async with Machine.start(connect=False, timeout=0.01):
                pass
        async with Machine.start(connect=False):
            pass
        assert "booting" not in caplog.text


class TestExtraArguments:
    async def test_are_qemus_own(self, tmp_path: Path) -> None:
        """A disk of the VM's own, given on the command line, is in the guest."""
        disk = tmp_path / "boot.img"
        with disk.open("wb") as file:
            file.truncate(8 << 20)
        async with Machine.start(
            connect=False,
            extra_arguments=(
                "-blockdev", f"driver=file,node-name=boot,filename={disk}",
                "-device", "scsi-hd,id=boot,bus=scsi1.0,lun=5,drive=boot",
            ),
        ) as machine:  # fmt: skip
            (device,) = (await look(machine)).scsi
            assert (device.controller, device.lun) == (1, 5)

    async def test_wrong_ones_are_refused_in_qemus_words(self) -> None:
        """If QEMU does not start, the error has its standard error, and nothing is left."""
        with pytest.raises(MachineError, match="no-such-device"):
            async with Machine.start(connect=False, extra_arguments=("-device", "no-such-device")):
                pass
        assert qemu_processes("no-such-device") == []


@pytest.mark.root
@pytest.mark.parametrize("user", ["nobody", "65534"])
async def test_a_machine_may_run_as_another_user(user: str) -> None:
    """QEMU changes to the user once it has opened what only we may read."""
    async with Machine.start(connect=False, user=user) as machine:
        status = Path(f"/proc/{machine.pid}/status").read_text(encoding="ascii")
        assert "Uid:\t65534\t65534" in status
        assert (await machine.run("echo up")).stdout == "up\n"


class TestAReset:
    async def test_boots_it_anew_with_its_disks(self, tmp_path: Path) -> None:
        """What was mounted and written is gone, disks are found again, and can be mounted."""
        path = disks.ext4(tmp_path / "disk.raw", "still here")
        mount = GuestMount(image_at(path, Slot(2, 9), "disk1"), "/run/disk", MountConfig())
        async with Machine.start(connect=False) as machine:
            bare = await look(machine)
            async with Clients.of(machine) as clients:
                await clients.add(mount)
                await shell(machine, "touch /root/mark")
                before = await look(machine)
                await machine.reset()
                await shell(machine, "until [ -e /sys/block/sda ]; do sleep 0.05; done")
                after = await look(machine)
                assert (after.scsi, after.devices) == (before.scsi, before.devices)
                assert paths(after) == paths(bare)
                assert await shell(machine, "ls /root") == ""
                # Its agent knows nothing of what was said to the one before, and is met anew.
                await clients.guest.mount(mount)
                assert await shell(machine, "cat /run/disk/note") == "still here"
                await clients.remove(mount)
            await shell(machine, "while [ -e /sys/block/sda ]; do sleep 0.05; done")
            after = await look(machine)
            assert (after.scsi, after.devices) == (bare.scsi, bare.devices)
            assert paths(after) == paths(bare)

    async def test_ends_what_ran(self, bare_vm: Machine) -> None:
        """A command has an unknown outcome; the next one is of the new boot."""
        boot = "cat /proc/sys/kernel/random/boot_id"
        old = await shell(bare_vm, boot)
        task = asyncio.create_task(bare_vm.run("sleep 50"))
        await shell(bare_vm, "until pgrep -f 'sleep 50'; do :; done")
        await bare_vm.reset()
        with pytest.raises(OutcomeUnknownError, match="went away"):
            await task
        assert await shell(bare_vm, boot) != old

    async def test_by_the_guest_ends_its_qemu_unless_that_is_allowed(
        self, bare_vm: Machine
    ) -> None:
        """QEMU is told what a reboot means; after our own reset it means the end again."""
        await bare_vm.query("set-action", {"reboot": "reset"})
        with pytest.raises((MachineError, OutcomeUnknownError)):
            await bare_vm.run("echo b >/proc/sysrq-trigger; sleep 30", timeout=2)
        assert (await bare_vm.run("echo up", timeout=DEADLINE)).stdout == "up\n"
        await bare_vm.reset()
        with pytest.raises(OutcomeUnknownError, match="went away"):
            await bare_vm.run("echo b >/proc/sysrq-trigger; sleep 30")
        await bare_vm.wait()

    async def test_of_a_vm_that_is_gone_is_refused(self, bare_vm: Machine) -> None:
        """And what is asked afterwards, too."""
        bare_vm.kill()
        await bare_vm.wait()
        with pytest.raises(MachineError):
            await bare_vm.reset()
        with pytest.raises(MachineError):
            await bare_vm.run("true")

    async def test_has_a_deadline(self, bare_vm: Machine) -> None:
        """A guest that does not come up again is an error with the console's tail."""
        with pytest.raises(MachineError, match=r"within 0\.5 s after its reset.*console said"):
            await bare_vm.reset(timeout=0.5)
        await bare_vm.reset()
        assert (await bare_vm.run("echo up")).stdout == "up\n"


class TestTheEnd:
    async def test_leaves_nothing(self) -> None:
        """After the block there is no process, no socket and no directory."""
        async with Machine.start() as machine:
            directory = Path(machine.qmp_socket).parent
            pid = machine.pid
            assert directory.is_dir()
        assert not directory.exists()
        await gone(pid)

    async def test_comes_with_an_error_in_the_block_too(self) -> None:
        """An exception passes through, and the VM is gone all the same."""
        with pytest.raises(ZeroDivisionError):
            async with Machine.start(connect=False) as machine:
                pid = machine.pid
                raise ZeroDivisionError
        await gone(pid)

    async def test_of_a_vm_that_dies_is_noticed(self, bare_vm: Machine) -> None:
        """A running command has an unknown outcome, the next is refused, both at once."""
        task = asyncio.create_task(bare_vm.run("sleep 50"))
        await bare_vm.run("true")
        bare_vm.kill()
        async with asyncio.timeout(DEADLINE / 2):
            with pytest.raises(OutcomeUnknownError, match="went away"):
                await task
            with pytest.raises(MachineError, match="gone"):
                await bare_vm.run("true")
            with pytest.raises(MachineError):
                await bare_vm.query("query-status")
            await bare_vm.wait()

    async def test_of_a_guest_that_panics_is_the_vms(self, bare_vm: Machine) -> None:
        """A guest that crashes does not leave a QEMU that stands still."""
        with pytest.raises(OutcomeUnknownError):
            await bare_vm.run("echo c >/proc/sysrq-trigger; sleep 50")
        async with asyncio.timeout(DEADLINE):
            await bare_vm.wait()

    async def test_of_this_process_is_the_vms(self, tmp_path: Path) -> None:
        """A starter that is killed takes its VM along."""
        script = textwrap.dedent("""
            import asyncio
            from hotlun.vm import Machine

            async def main():
                async with Machine.start(connect=False) as machine:
                    print(machine.pid, flush=True)
                    await asyncio.sleep(600)

            asyncio.run(main())
        """)
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        starter = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=environment
        )
        assert starter.stdout is not None
        pid = int(await starter.stdout.readline())
        starter.kill()
        await starter.wait()
        await gone(pid)


class TestAStartThatFails:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"controllers": 0}, "controllers"),
            ({"controllers": 9}, "controllers"),
            ({"memory_mib": 64}, "memory"),
            ({"cpus": 0}, "cpus"),
            ({"user": "no-such-user"}, "no-such-user"),
        ],
    )
    async def test_is_refused_at_once_if_it_makes_no_sense(
        self, arguments: dict[str, Any], words: str
    ) -> None:
        """Hardware that cannot be had is a ValueError."""
        with pytest.raises(ValueError, match=words):
            async with Machine.start(**arguments):
                pass

    async def test_names_the_package_that_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Without QEMU the error says what to install."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UnsupportedError, match="qemu-system-x86"):
            async with Machine.start(connect=False):
                pass

    async def test_has_a_deadline_and_leaves_nothing(self) -> None:
        """A guest that does not come up in time is an error with the console's tail."""
        memory = "-device", "pvpanic,id=never-in-time"
        with pytest.raises(MachineError, match="console said"):
            async with Machine.start(connect=False, timeout=0.5, extra_arguments=memory):
                pass
        assert qemu_processes("never-in-time") == []

    async def test_can_be_given_up(self) -> None:
        """A start that is cancelled ends its QEMU."""
        never = "-device", "pvpanic,id=given-up"

        async def start() -> None:
            async with Machine.start(connect=False, extra_arguments=never):
                pass

        task = asyncio.create_task(start())
        async with asyncio.timeout(DEADLINE):
            while not qemu_processes("given-up"):
                await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert qemu_processes("given-up") == []


class TestAQemuThatDoesNotBehave:
    @pytest.fixture
    def fake_qemu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A program of QEMU's name, first in PATH, to be written by the test."""
        program = tmp_path / process_module.QEMU
        program.touch(mode=0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return program

    async def test_ending_at_once_is_an_error_with_its_words(self, fake_qemu: Path) -> None:
        """What QEMU says before it ends is in the error."""
        fake_qemu.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n", encoding="ascii")
        with pytest.raises(MachineError, match="no such luck"):
            async with Machine.start(
                connect=False, accelerator=Accelerator.TCG, extra_arguments=("-S",)
            ):
                pass


class TestNamedMachines:
    @pytest.fixture(autouse=True)
    def runtime_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A runtime directory of the test's own."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        return tmp_path / "hotlun"

    async def test_are_started_listed_used_and_stopped(self, runtime_directory: Path) -> None:
        """A VM by name outlives the call that started it, until it is stopped."""
        started = await start_detached("one", controllers=2)
        try:
            assert list_machines() == [started] == [find_machine("one")]
            assert (await find_machine("one").run("echo here")).stdout == "here\n"
            with pytest.raises(MachineError, match="runs already"):
                await start_detached("one")
        finally:
            await stop("one")
        await gone(started.pid)
        assert list_machines() == []
        assert not Path(started.directory).exists()
        with pytest.raises(MachineError, match="running: none"):
            await stop("one")

    async def test_that_crash_are_not_listed_and_can_be_started_again(self) -> None:
        """A note of a process that is gone, or is another by now, counts for nothing."""
        crashed = await start_detached("two")
        os.kill(crashed.pid, signal.SIGKILL)
        await gone(crashed.pid)
        assert list_machines() == []
        again = await start_detached("two")
        await stop("two")
        assert again.pid != crashed.pid

    @pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 33])
    async def test_have_names_that_are_file_names(self, name: str) -> None:
        """A name that could lead out of the directory is refused."""
        with pytest.raises(ValueError, match="name"):
            await start_detached(name)
