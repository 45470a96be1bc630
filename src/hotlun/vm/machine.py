"""A VM to try things on: up in a third of a second, gone without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from typing import TYPE_CHECKING, Any, cast

from hotlun.backends.bridge import BridgeGuestBackend
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import BridgeConnection
from hotlun.vm.errors import MachineError
from hotlun.vm.guest_exec import RUN_TIMEOUT, GuestExec
from hotlun.vm.hardware import Accelerator, Hardware
from hotlun.vm.monitor import Monitor
from hotlun.vm.power import power_on
from hotlun.vm.process import Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from hotlun.vm.guest_exec import Completed
    from hotlun.vm.process import Process


MIGRATION_TIMEOUT = 120.0
"""Seconds for a guest to move; half a gigabyte of memory takes a few."""
RESET_TIMEOUT = 120.0
"""Seconds for a guest to be up again."""


class Machine:
    """A running VM of our own, with empty SCSI controllers `scsi0`, `scsi1`...

    Attributes:
        host: the host backend, connected; None with `connect=False`.
        guest: the guest backend, connected; None with `connect=False`.
        qmp_socket: path of QEMU's monitor; it serves one client at a time.
        agent_socket: path of the bridge to the agent; one client at a time, too.
        controllers: the controllers' QEMU device ids, in our order.
        pid: QEMU's process id.
    """

    def __init__(self, hardware: Hardware, runtime: Runtime, process: Process) -> None:
        # Typed for the usual case, so that it needs no assertion; None until connected.
        self.host = cast("QEMUHostBackend", None)
        self.guest = cast("BridgeGuestBackend", None)
        self.qmp_socket = runtime.socket("qmp")
        self.agent_socket = runtime.socket("agent")
        self._control = runtime.socket("control")
        self._guest_socket = runtime.socket("guest")
        self.controllers = hardware.controller_ids
        self.pid = process.pid
        self._process = process
        self._guest_exec: asyncio.Task[GuestExec] | None = None  # None without a guest

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        controllers: int = 4,
        memory_mib: int = 512,
        cpus: int = 1,
        timeout: float = 120.0,
        connect: bool = True,
        *,
        extra_arguments: Sequence[str] = (),
        incoming: str = "",
        user: str = "",
        accelerator: Accelerator | None = None,
    ) -> AsyncIterator[Machine]:
        """Start a VM; it ends with the block, and so it does if this process dies.

        The very first start builds the guest's image, which takes a minute and the
        network; the first start of some hardware boots and takes a snapshot; from
        then on the snapshot is restored.

        With `incoming` nothing is booted: QEMU listens there, and `migrate` of another
        machine of the same arguments moves its guest here. Say `await arrived()` then.

        Args:
            controllers: how many virtio-scsi controllers, 1 to 8.
            memory_mib: the guest's memory, which also holds what it writes to its root.
            cpus: virtual processors.
            timeout: seconds for the guest to come up, and for each backend to connect.
            connect: whether to connect the backends. If not, both sockets are free.
                With `incoming` they are not connected, whatever this says.
            extra_arguments: for QEMU's command line; such a VM is booted each time.
                With `incoming`: the disks that the guest brings along.
            incoming: QEMU's URI of where a guest will come from, `unix:/PATH` for one.
            user: name or uid that QEMU is to run as (needs root).
            accelerator: None for KVM where it works, else TCG.

        Raises:
            ValueError: such hardware cannot be had.
            UnsupportedError: something that is needed is not on this machine.
            MachineError: the VM did not come up; nothing of it is left.
        """
        hardware = Hardware(controllers, memory_mib, cpus, tuple(extra_arguments), user)
        async with contextlib.AsyncExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hotlun-vm-"))
            runtime = Runtime(directory)
            process = await power_on(
                hardware, runtime, timeout=timeout, accelerator=accelerator, incoming=incoming
            )
            stack.push_async_callback(process.end)
            machine = cls(hardware, runtime, process)
            stack.push_async_callback(machine._hang_up)
            if not incoming:
                # qemu-guest-agent looks for a host ten times a second only: let it meanwhile.
                machine._call(timeout)
            if connect and not incoming:
                machine.host = await stack.enter_async_context(
                    QEMUHostBackend.connect(
                        machine.qmp_socket, controllers=machine.controllers, timeout=timeout
                    )
                )
                connection = await stack.enter_async_context(
                    BridgeConnection.connect_unix(machine.agent_socket, timeout=timeout)
                )
                machine.guest = BridgeGuestBackend(connection, "linux")
            yield machine

    async def run(self, command: str, *, timeout: float = RUN_TIMEOUT) -> Completed:
        """Run `/bin/sh -c COMMAND` as root in the guest, not over the bridge.

        A returncode that is not zero does not raise. Commands may run side by side.

        Raises:
            MachineError: the VM has gone, or its guest has not arrived yet.
            OutcomeUnknownError: the command did not end within `timeout` seconds,
                or the VM went away, or was reset, while it ran.
        """
        if self._guest_exec is None:
            raise MachineError(
                "there is no guest to ask: it is being reset, or has still to arrive here "
                "(migrate one, then await arrived())",
                operation="run",
            )
        guest = await asyncio.shield(self._guest_exec)
        return await guest.run(["/bin/sh", "-c", command], timeout=timeout)

    async def query(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = RUN_TIMEOUT
    ) -> object:
        """Run a QMP command over a monitor that is not the user's, and return its answer.

        It serves one at a time: others wait, also for `migrate` and `arrived` to be over.

        Raises:
            MachineError: QEMU refused it, the VM has gone, or there was no answer in time.
        """
        try:
            async with asyncio.timeout(timeout), Monitor.connect(self._control) as monitor:
                return await monitor.execute(command, arguments)
        except TimeoutError as error:
            raise MachineError(f"no answer to {command} within {timeout:g} s") from error

    async def migrate(self, uri: str, *, timeout: float = MIGRATION_TIMEOUT) -> None:
        """Move the guest to the machine that was started with `incoming=uri`; live.

        When this returns the guest runs there (or is about to: see `arrived`), and here it
        stands still, its disks let go of. If it fails, the guest goes on here.

        Args:
            uri: as in `incoming`. QEMU connects as the user that it runs as.
            timeout: seconds; after that the migration is cancelled, which takes a moment. (A
                caller that is cancelled cancels no migration.)

        Raises:
            MachineError: it failed, in QEMU's words, or took too long.
        """
        try:
            async with asyncio.timeout(timeout), Monitor.connect(self._control) as monitor:
                return await monitor.migrate(uri)
        except TimeoutError:
            pass
        try:
            async with asyncio.timeout(RUN_TIMEOUT), Monitor.connect(self._control) as monitor:
                if not await monitor.cancel_migration():
                    return None
            end = "the migration was cancelled"
        except TimeoutError:
            end = "QEMU does not answer, and the guest may still go there"
        raise MachineError(
            f"the guest was not at {uri} within {timeout:g} s: {end}", operation="migrate"
        )

    async def arrived(self, *, timeout: float = MIGRATION_TIMEOUT) -> None:
        """Return when the guest that this machine was started for is here: `run` works now.

        Clients of `agent_socket` may connect from the start, but the guest is told that its
        host has changed only if at the end of the migration no client is connected at one
        of the two (QEMU 7.2, virtio-serial-bus.c, virtio_serial_post_load_timer_cb). Our
        agent knows a new host by its first word all the same; wait for an agent that does not.
        What a client of the source has asked for is done, and never answered.

        Raises:
            MachineError: it did not come; QEMU has the last word.
        """
        runtime = self._process.runtime
        try:
            async with asyncio.timeout(timeout), Monitor.connect(self._control) as monitor:
                await monitor.arrived()
        except (MachineError, TimeoutError) as error:
            reason = str(error) or f"it was not here within {timeout:g} s"
            words = runtime.last_words()
            raise MachineError(
                f"the guest did not arrive: {reason}; {words}", operation="migrate", detail=words
            ) from error
        if self._guest_exec is None:
            self._call(timeout)

    async def reset(self, *, timeout: float = RESET_TIMEOUT) -> None:
        """Reset the guest, as its reset button would, and return when `run` works again.

        It boots anew, a restored one too, from the kernel and initramfs that its QEMU was
        given; its memory, and with it all that was written to its root, is lost. Disks that
        were attached are found again, perhaps a little later, and not mounted. Clients stay
        connected to `qmp_socket` and `agent_socket`; no bridge hears of it, and the new agent,
        there a few seconds after this returns, is met by what it is asked next.

        A guest that resets itself ends its QEMU, unless
        `query("set-action", {"reboot": "reset"})` was said before.

        Args:
            timeout: seconds for the guest to be up again; a boot takes five.

        Raises:
            MachineError: the VM has gone, or its guest does not come up.
        """
        await self._hang_up()
        try:
            async with asyncio.timeout(timeout):
                async with Monitor.connect(self._control) as monitor:
                    await monitor.execute("set-action", {"reboot": "reset"})
                    await monitor.event("RESET", "system_reset")
                await asyncio.shield(self._call(timeout))
            # Not before: SeaBIOS resets once more, by itself, when it finds that it has run
            # (1.16, resume.c). From here on a guest that panics ends its QEMU again.
            await self.query("set-action", {"reboot": "shutdown"}, timeout=timeout)
        except TimeoutError as error:
            raise MachineError(
                f"the guest was not up within {timeout:g} s after its reset; "
                f"{self._process.runtime.last_words()}",
                operation="reset",
            ) from error

    async def wait(self) -> None:
        """Return when the VM has ended, whoever ended it."""
        await self._process.exited.wait()

    def kill(self) -> None:
        """End QEMU as a crash would, for tests of what happens then."""
        self._process.kill()

    def _call(self, timeout: float) -> asyncio.Task[GuestExec]:
        """Begin to connect to qemu-guest-agent; `run` waits for it."""
        self._guest_exec = asyncio.create_task(
            GuestExec.open(self._guest_socket, timeout=timeout), name="hotlun-guest-exec"
        )
        return self._guest_exec

    async def _hang_up(self) -> None:
        opening, self._guest_exec = self._guest_exec, None
        if opening is not None:
            opening.cancel()
            for guest in await asyncio.gather(opening, return_exceptions=True):
                if isinstance(guest, GuestExec):
                    await guest.close()
