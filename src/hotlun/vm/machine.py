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

    def __init__(
        self,
        hardware: Hardware,
        runtime: Runtime,
        process: Process,
        guest_exec: asyncio.Task[GuestExec],
    ) -> None:
        # Typed for the usual case, so that it needs no assertion; None until connected.
        self.host = cast("QEMUHostBackend", None)
        self.guest = cast("BridgeGuestBackend", None)
        self.qmp_socket = runtime.socket("qmp")
        self.agent_socket = runtime.socket("agent")
        self._control = runtime.socket("control")
        self.controllers = hardware.controller_ids
        self.pid = process.pid
        self._process = process
        self._guest_exec = guest_exec

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
        user: str = "",
        accelerator: Accelerator | None = None,
    ) -> AsyncIterator[Machine]:
        """Start a VM; it ends with the block, and so it does if this process dies.

        The very first start builds the guest's image, which takes a minute and the
        network; the first start of some hardware boots and takes a snapshot; from
        then on the snapshot is restored.

        Args:
            controllers: how many virtio-scsi controllers, 1 to 8.
            memory_mib: the guest's memory, which also holds what it writes to its root.
            cpus: virtual processors.
            timeout: seconds for the guest to come up, and for each backend to connect.
            connect: whether to connect the backends. If not, both sockets are free.
            extra_arguments: for QEMU's command line; such a VM is booted each time.
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
            process = await power_on(hardware, runtime, timeout=timeout, accelerator=accelerator)
            stack.push_async_callback(process.end)
            # qemu-guest-agent looks for a host ten times a second only: let it meanwhile.
            opening = asyncio.create_task(GuestExec.open(runtime.socket("guest"), timeout=timeout))
            stack.push_async_callback(_close, opening)
            machine = cls(hardware, runtime, process, opening)
            if connect:
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
            MachineError: the VM has gone.
            OutcomeUnknownError: the command did not end within `timeout` seconds,
                or the VM went away while it ran.
        """
        guest = await asyncio.shield(self._guest_exec)
        return await guest.run(["/bin/sh", "-c", command], timeout=timeout)

    async def query(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = RUN_TIMEOUT
    ) -> object:
        """Run a QMP command over a monitor that is not the user's, and return its answer.

        Raises:
            MachineError: QEMU refused it, the VM has gone, or there was no answer in time.
        """
        try:
            async with asyncio.timeout(timeout), Monitor.connect(self._control) as monitor:
                return await monitor.execute(command, arguments)
        except TimeoutError as error:
            raise MachineError(f"no answer to {command} within {timeout:g} s") from error

    async def wait(self) -> None:
        """Return when the VM has ended, whoever ended it."""
        await self._process.exited.wait()

    def kill(self) -> None:
        """End QEMU as a crash would, for tests of what happens then."""
        self._process.kill()


async def _close(opening: asyncio.Task[GuestExec]) -> None:
    opening.cancel()
    for guest in await asyncio.gather(opening, return_exceptions=True):
        if isinstance(guest, GuestExec):
            await guest.close()
