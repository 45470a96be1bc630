"""Brings a VM up: out of its snapshot, taken if there is none; by booting if there can be none.

Or empty: a QEMU that waits for a guest to migrate into it.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from hotlun.errors import UnsupportedError
from hotlun.vm.errors import StaleSnapshotError
from hotlun.vm.launch import Software, boot, launched
from hotlun.vm.monitor import Monitor
from hotlun.vm.snapshot import Snapshots, restore

if TYPE_CHECKING:
    from hotlun.vm.hardware import Accelerator, Hardware
    from hotlun.vm.process import Process, Runtime

log = logging.getLogger("hotlun.vm")


async def power_on(
    hardware: Hardware,
    runtime: Runtime,
    *,
    timeout: float,
    accelerator: Accelerator | None = None,
    detached: bool = False,
    incoming: str = "",
) -> Process:
    """Bring a VM up in the directory of `runtime`; nothing is connected to its sockets.

    Args:
        hardware: what it is to have.
        runtime: an existing, empty directory for its sockets and logs.
        timeout: seconds from QEMU's start to the guest's first answer. Building
            the image and taking a snapshot, which happen once, do not count.
        accelerator: None for the fastest that works.
        detached: let QEMU outlive this process.
        incoming: where QEMU is to listen for a guest that migrates into it. There is
            then no guest to wait for; it listens when this returns.

    Raises:
        UnsupportedError: something that is needed is not on this machine.
        MachineError: it did not come up; QEMU and the console have the last word.
    """
    if hardware.user and os.geteuid() != 0:
        raise UnsupportedError(
            f"only root can have QEMU run as {hardware.user}: leave the user out, or be root"
        )
    software = await Software.ready(accelerator)
    if incoming:
        return await _listen(incoming, hardware, software, runtime, timeout=timeout)
    if hardware.extra_arguments:
        return await boot(hardware, software, runtime, timeout=timeout, detached=detached)
    snapshots = Snapshots(hardware, software, timeout=timeout)

    async def restored() -> Process:
        state = await snapshots.find_or_take()
        return await restore(state, hardware, software, runtime, timeout=timeout, detached=detached)

    try:
        return await restored()
    except (StaleSnapshotError, FileNotFoundError) as error:
        log.warning("the snapshot cannot be used, taking a new one: %s", error)
        snapshots.discard()
    return await restored()


async def _listen(
    uri: str, hardware: Hardware, software: Software, runtime: Runtime, *, timeout: float
) -> Process:
    """Start a QEMU that waits for a migration; a monitor that answers says that it listens.

    (QEMU 7.2 opens `-incoming` before it first enters its main loop, where monitors are served.)
    """
    async with launched(
        hardware, software, runtime, "-incoming", uri, timeout=timeout
    ) as process, Monitor.connect(runtime.socket("control")) as monitor:  # fmt: skip
        await monitor.announce_migration()
    return process
