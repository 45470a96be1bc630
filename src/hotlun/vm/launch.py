"""Starts QEMU on a VM's hardware, and says what it said last if the VM does not come up."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotlun.vm.accelerator import working_accelerator
from hotlun.vm.agent_archive import agent_archive
from hotlun.vm.errors import MachineError
from hotlun.vm.guest_exec import GuestExec
from hotlun.vm.hardware import (
    Accelerator,
    Hardware,
    Wiring,
    boot_arguments,
    device_arguments,
    machine_arguments,
)
from hotlun.vm.image import Image, built_image
from hotlun.vm.process import Process, Runtime, listening_sockets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass(frozen=True)
class Software:
    """What runs in a VM, and what runs the VM."""

    image: Image
    agent: bytes
    accelerator: Accelerator

    @classmethod
    async def ready(cls, accelerator: Accelerator | None = None) -> Software:
        """The image, built if it must be; the agent of this source tree; an accelerator that works.

        Raises:
            UnsupportedError: something that is needed is not on this machine.
            MachineError: building the image failed.
        """
        image = await built_image()
        if accelerator is None:
            accelerator = await working_accelerator(image)
        return cls(image, await agent_archive(), accelerator)


@contextlib.asynccontextmanager
async def launched(
    hardware: Hardware,
    software: Software,
    runtime: Runtime,
    *more: str,
    timeout: float,
    detached: bool = False,
) -> AsyncIterator[Process]:
    """A started QEMU, for a block that brings the VM up within `timeout` seconds.

    It goes on running after the block. If the block fails, it is ended, the
    files of `runtime` are removed, and the error has its last words.

    Raises:
        MachineError: the VM did not come up.
    """
    _write_initramfs(software, runtime)
    with listening_sockets(runtime) as sockets:
        arguments = [
            *machine_arguments(software.accelerator, hardware.memory_mib, hardware.cpus),
            *boot_arguments(software.image.kernel, runtime.initramfs),
            *device_arguments(hardware, Wiring(sockets, runtime.console, software.image.root)),
            *more,
        ]
        descriptors = tuple(sockets.values())
        process = await Process.start(
            arguments, runtime, descriptors=descriptors, detached=detached
        )
    try:
        async with asyncio.timeout(timeout):
            yield process
    except BaseException as error:
        await process.end()
        words = runtime.last_words()
        runtime.clear()
        kind = MachineError
        if isinstance(error, TimeoutError):
            reason = f"nothing came within {timeout:g} s"
        elif isinstance(error, MachineError):
            kind, reason = type(error), str(error)
        else:
            raise
        raise kind(
            f"the VM did not come up: {reason}; {words}", operation="start", detail=words
        ) from error


async def boot(
    hardware: Hardware,
    software: Software,
    runtime: Runtime,
    *,
    timeout: float,
    detached: bool = False,
) -> Process:
    """Boot the guest, and return when it has."""
    async with launched(hardware, software, runtime, timeout=timeout, detached=detached) as process:
        guest = await GuestExec.open(runtime.socket("guest"), timeout=timeout)
        await guest.close()
    return process


def _write_initramfs(software: Software, runtime: Runtime) -> None:
    with open(software.image.initramfs, "rb") as image, open(runtime.initramfs, "wb") as file:
        file.write(image.read())
        file.write(software.agent)
